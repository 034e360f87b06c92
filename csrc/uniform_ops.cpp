// lowbit::uniform as a PyTorch operator.
#include "casting.h"

#include <cstdint>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor uniform(const Tensor& key, std::vector<int64_t> shape) {
  const lowbit::UniformKernels& kernels = lowbit::kernels().uniform;
  const lowbit::PhiloxWords words(key);
  int64_t count = 1;
  for (int64_t n : shape) {
    STD_TORCH_CHECK(n >= 0, "uniform needs sizes of at least 0, got ", n);
    count *= n;
  }
  Tensor out = lowbit::empty({shape.data(), shape.size()}, ScalarType::Float);
  float* data = out.mutable_data_ptr<float>();
  const int64_t blocks = (count + 3) / 4;
  constexpr int64_t worth_a_thread = 1 << 13;  // blocks, about 20 microseconds
  torch::stable::parallel_for(0, blocks, worth_a_thread, [&](int64_t begin, int64_t end) {
    kernels.fill(data, count, begin, end, words.key, words.high);
  });
  return out;
}

// For tests: `count` blocks from block `first` on, which no tensor that fits into memory may reach.
Tensor uniform_blocks(const Tensor& key, int64_t first, int64_t count) {
  STD_TORCH_CHECK(first >= 0 && count > 0, "blocks are numbered from 0 and at least one; got ", count, " from ", first);
  const lowbit::PhiloxWords words(key);
  const int64_t numbers = 4 * count;
  Tensor out = lowbit::empty({&numbers, 1}, ScalarType::Float);
  float* const data = out.mutable_data_ptr<float>();
  // the kernel counts from element 0
  auto* const zero = reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(data) - uintptr_t(16) * uintptr_t(first));
  lowbit::kernels().uniform.fill(zero, 4 * (first + count), first, first + count, words.key, words.high);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowbit, m) { m.def("_uniform_blocks(Tensor key, int first, int count) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  m.impl("uniform", TORCH_BOX(&uniform));
  m.impl("_uniform_blocks", TORCH_BOX(&uniform_blocks));
}

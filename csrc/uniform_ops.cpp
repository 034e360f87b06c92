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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) { m.impl("uniform", TORCH_BOX(&uniform)); }

// lowbit::uniform as a PyTorch operator.
#include "library.h"

#include <cstdint>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor uniform(const Tensor& key, std::vector<int64_t> shape) {
  const lowbit::UniformKernels& kernels = lowbit::kernels().uniform;
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::Long && key.dim() == 1 && key.size(0) == 3,
                  "uniform needs a key of three int64: seed, stream, step");
  int64_t count = 1;
  for (int64_t n : shape) {
    STD_TORCH_CHECK(n >= 0, "uniform needs sizes of at least 0, got ", n);
    count *= n;
  }
  const int64_t* words = key.const_data_ptr<int64_t>();
  const int64_t seed = words[0], stream = words[key.stride(0)], step = words[2 * key.stride(0)];
  const uint32_t philox_key[2] = {uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32)};
  const uint32_t high[2] = {uint32_t(uint64_t(step)), uint32_t(uint64_t(stream))};
  Tensor out = torch::stable::empty({shape.data(), shape.size()}, ScalarType::Float);
  float* data = out.mutable_data_ptr<float>();
  const int64_t blocks = (count + 3) / 4;
  constexpr int64_t worth_a_thread = 1 << 13;  // blocks, about 20 microseconds
  torch::stable::parallel_for(0, blocks, worth_a_thread, [&](int64_t begin, int64_t end) {
    kernels.fill(data, count, begin, end, philox_key, high);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) { m.impl("uniform", TORCH_BOX(&uniform)); }

// lowbit::fingerprint as a PyTorch operator.
#include "library.h"

#include <atomic>
#include <cstdint>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t fingerprint(const Tensor& x, const Tensor& weights) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "fingerprint needs contiguous float32");
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Int && weights.is_contiguous() &&
                      weights.numel() == 2 * lowbit::fingerprint_lanes,
                  "fingerprint needs int32 weights of shape (2, 16)");
  const auto* words = reinterpret_cast<const uint32_t*>(x.const_data_ptr<float>());
  const auto* start = reinterpret_cast<const uint32_t*>(weights.const_data_ptr<int32_t>());
  constexpr int64_t block = 1 << 14;  // elements that a thread takes at a time, 2 microseconds and more
  const int64_t count = x.numel(), blocks = (count + block - 1) / block;
  std::atomic<uint64_t> total{0};
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = end * block < count ? end * block : count;
    total += lowbit::kernels().fingerprint.sum(words, begin * block, last, start, start + lowbit::fingerprint_lanes);
  });
  return int64_t(total.load());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fingerprint)); }

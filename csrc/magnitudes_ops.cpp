// lowbit::magnitudes as a PyTorch operator.
#include "library.h"

#include "halves.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using lowbit::BlockMagnitudes;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// NaNs have no sign and no payload.
double tidy(double x) { return std::isnan(x) ? std::numeric_limits<double>::quiet_NaN() : x; }

Tensor magnitudes(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 2 && x.is_contiguous(),
                  "magnitudes needs a contiguous float32 matrix (blocks, n)");
  const int64_t blocks = x.size(0), n = x.size(1), chunks = (n + lowbit::rule_chunk - 1) / lowbit::rule_chunk;
  STD_TORCH_CHECK(n > 0 || blocks == 0, "magnitudes needs an element in each block");
  const int64_t shape[2] = {blocks, 3};
  Tensor out = lowbit::empty({shape, 2}, ScalarType::Double);
  const auto tasks = static_cast<size_t>(blocks * chunks);
  std::vector<float> most(tasks);
  std::vector<double> sums(tasks), squares(tasks);
  const float* data = x.const_data_ptr<float>();
  constexpr int64_t worth_a_thread = 16;  // chunks, about 10 microseconds
  torch::stable::parallel_for(0, blocks * chunks, worth_a_thread, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / chunks, first = task % chunks * lowbit::rule_chunk;
      const BlockMagnitudes found =
          lowbit::kernels().magnitudes.chunk(data + block * n + first, std::min(lowbit::rule_chunk, n - first));
      const auto i = static_cast<size_t>(task);
      most[i] = found.most, sums[i] = found.sum, squares[i] = found.squares;
    }
  });
  double* result = out.mutable_data_ptr<double>();
  for (int64_t block = 0; block < blocks; ++block, result += 3) {
    float top = 0.0f;
    for (int64_t c = block * chunks; c < (block + 1) * chunks; ++c) {
      const float next = most[static_cast<size_t>(c)];
      if (std::isnan(next) || next > top) top = next;
    }
    result[0] = tidy(top);
    result[1] = tidy(lowbit::by_halves(sums.data() + block * chunks, chunks));
    result[2] = tidy(lowbit::by_halves(squares.data() + block * chunks, chunks));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) { m.impl("magnitudes", TORCH_BOX(&magnitudes)); }

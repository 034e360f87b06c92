// lowbit::hadamard as a PyTorch operator.
#include "library.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor hadamard(const Tensor& x, int64_t size, std::optional<Tensor> signs, bool inverse) {
  const lowbit::HadamardKernels& kernels = lowbit::kernels().hadamard;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "hadamard needs float32");
  STD_TORCH_CHECK(size >= 1 && size <= 4096 && (size & (size - 1)) == 0,
                  "size must be a power of two, 1 to 4096; got ", size);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) % size == 0, "the last axis must be a multiple of size ", size);
  const Tensor source = torch::stable::contiguous(x);
  Tensor out = lowbit::empty(x.sizes(), ScalarType::Float);
  const int64_t count = source.numel();
  if (count == 0) return out;
  // without signs all runs are one row
  int64_t row = count;
  std::vector<float> factors;
  if (signs.has_value()) {
    row = x.size(-1);
    const int64_t length = signs->dim() == 1 ? signs->size(0) : 0;
    STD_TORCH_CHECK(signs->scalar_type() == ScalarType::Float && (length == size || length == row),
                    "signs must be float32 of length ", size, " or ", row);
    const float* s = signs->const_data_ptr<float>();
    const int64_t stride = signs->stride(0);
    factors.resize(size_t(row));
    for (int64_t i = 0; i < row; ++i) factors[size_t(i)] = s[i % length * stride];
  }
  const float* data = source.const_data_ptr<float>();
  float* result = out.mutable_data_ptr<float>();
  const float scale = float(1.0 / std::sqrt(double(size)));
  const int64_t piece = std::min(row, std::max<int64_t>(size, 4096));  // floats of a task; a multiple of size
  const int64_t pieces = (row + piece - 1) / piece;
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / piece);  // 32,768 floats take about 10 microseconds
  torch::stable::parallel_for(0, count / row * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t at = task % pieces * piece, start = task / pieces * row + at;
      const float* factor = factors.empty() ? nullptr : factors.data() + at;
      kernels.transform({data + start, result + start, std::min(piece, row - at), size, scale,
                         inverse ? nullptr : factor, inverse ? factor : nullptr});
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) { m.impl("hadamard", TORCH_BOX(&hadamard)); }

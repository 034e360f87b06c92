// lowbit::affine as a PyTorch operator; the definition is in src/lowbit/ops/affine.py.
#include "casting.h"

#include <cmath>
#include <cstdint>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> affine(const Tensor& low, const Tensor& high, double denominator, bool code) {
  STD_TORCH_CHECK(low.scalar_type() == ScalarType::Float && high.scalar_type() == ScalarType::Float &&
                      low.sizes() == high.sizes(),
                  "affine needs float32 ends of one shape");
  STD_TORCH_CHECK(denominator > 0, "the denominator must be positive; got ", denominator);
  const Tensor lows = torch::stable::contiguous(low), highs = torch::stable::contiguous(high);
  Tensor scales = lowbit::empty(low.sizes(), ScalarType::Float);
  Tensor zeros = lowbit::empty(low.sizes(), ScalarType::Float);
  const float *least = lows.const_data_ptr<float>(), *most = highs.const_data_ptr<float>();
  float *scale = scales.mutable_data_ptr<float>(), *zero = zeros.mutable_data_ptr<float>();
  const float steps = float(denominator);
  for (int64_t i = 0; i < low.numel(); ++i) {
    // comparisons with NaN are false: it stays
    const float a = code && least[i] > 0 ? 0.0f : least[i], b = code && most[i] < 0 ? 0.0f : most[i];
    const float span = b - a;
    float step = std::isinf(span) ? b / steps - a / steps : span / steps;
    if (span == 0) step = std::fabs(b);
    if (step == 0) step = 1.0f;
    float z = -a / step;
    if (code) {
      z = std::nearbyint(z);
      z = z < 0 ? 0.0f : z > steps ? steps : z;
    }
    scale[i] = lowbit::tidy(step), zero[i] = lowbit::tidy(z);
  }
  return {scales, zeros};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) { m.impl("affine", TORCH_BOX(&affine)); }

// lowbit::reflect as a PyTorch operator.
#include "library.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether the elements fill their memory without gap or overlap, row after row.
bool rows_in_memory(const Tensor& x) {
  const int64_t row = lowbit::filled(x, 1);
  return row != 0 && (x.size(0) == 1 || x.stride(0) == row);
}

Tensor reflect(const Tensor& given, const Tensor& group, const Tensor& v, std::optional<Tensor> before,
               std::optional<Tensor> after) {
  STD_TORCH_CHECK(given.scalar_type() == ScalarType::Float && given.dim() >= 1, "reflect needs float32 (rows, ...)");
  const int64_t rows = given.size(0);
  const auto a_row = [&](const char* name, const Tensor& t, ScalarType type) {
    STD_TORCH_CHECK(t.scalar_type() == type && t.dim() == 1 && t.size(0) == rows && t.is_contiguous(), name,
                    " must be contiguous ", type == ScalarType::Long ? "int64" : "float64", " of shape (rows,)");
  };
  a_row("group", group, ScalarType::Long);
  a_row("v", v, ScalarType::Double);
  if (before.has_value()) a_row("before", *before, ScalarType::Double);
  if (after.has_value()) a_row("after", *after, ScalarType::Double);
  if (given.numel() == 0) return torch::stable::empty(given.sizes(), ScalarType::Float);
  const Tensor x = rows_in_memory(given) ? given : torch::stable::contiguous(given);
  Tensor out = torch::stable::empty_like(x);

  const int64_t* groups = group.const_data_ptr<int64_t>();
  const double* normal = v.const_data_ptr<double>();
  std::vector<double> norm(static_cast<size_t>(rows), 0.0), own(norm), spread(norm), collect(norm);
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t g = groups[r];
    STD_TORCH_CHECK(g >= 0 && g < rows, "a group is 0 to rows - 1; got ", g);
    count = std::max(count, g + 1);
    norm[size_t(g)] += normal[r] * normal[r];
  }
  for (int64_t r = 0; r < rows; ++r) {
    const auto i = static_cast<size_t>(r);
    const double square = norm[size_t(groups[r])], factor = 2.0 / (square == 0.0 ? 1.0 : square);
    const double first = before.has_value() ? before->const_data_ptr<double>()[r] : 1.0;
    const double last = after.has_value() ? after->const_data_ptr<double>()[r] : 1.0;
    own[i] = last * first, spread[i] = last * (normal[r] * factor), collect[i] = normal[r] * first;
  }

  const int64_t columns = x.numel() / rows;
  const int64_t width = std::clamp<int64_t>((1 << 15) / rows / 16 * 16, 16, 256);  // a tile fits a core's own cache
  const int64_t tiles = (columns + width - 1) / width;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (rows * width));
  const float* data = x.const_data_ptr<float>();
  float* result = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> totals(size_t(count * width));
    std::vector<float> copy(size_t(rows * width));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t at = tile * width;
      lowbit::kernels().reflect.reflect({rows, std::min(width, columns - at), count, data + at, columns, result + at,
                                         columns, groups, own.data(), spread.data(), collect.data(), totals.data(),
                                         copy.data()});
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) { m.impl("reflect", TORCH_BOX(&reflect)); }

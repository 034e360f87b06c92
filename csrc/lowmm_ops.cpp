// lowbit::pack_signs and lowbit::binary_mm as PyTorch operators.
#include "library.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor pack_signs(const Tensor& x) {
  const lowbit::LowmmKernels& kernels = lowbit::kernels().lowmm;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() >= 1, "pack_signs needs float32 of shape (..., K)");
  const Tensor source = torch::stable::contiguous(x);
  const int64_t depth = x.size(-1), words = (depth + 63) / 64;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = words;
  Tensor out = torch::stable::empty({shape.data(), shape.size()}, ScalarType::Long);
  const int64_t rows = words == 0 ? 0 : out.numel() / words;
  const float* data = source.const_data_ptr<float>();
  uint64_t* result = reinterpret_cast<uint64_t*>(out.mutable_data_ptr<int64_t>());
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, depth));  // 65,536 floats: 10 microseconds
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) kernels.pack_signs(data + row * depth, result + row * words, depth);
  });
  return out;
}

Tensor binary_mm(const Tensor& a, const Tensor& b, int64_t depth) {
  const lowbit::LowmmKernels& kernels = lowbit::kernels().lowmm;
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Long && b.scalar_type() == ScalarType::Long && a.dim() == 2 && b.dim() == 2,
                  "binary_mm needs matrices of int64 words");
  const int64_t words = a.size(1);
  STD_TORCH_CHECK(depth >= 0 && depth < int64_t(1) << 31 && words == (depth + 63) / 64 && b.size(1) == words,
                  "binary_mm of depth ", depth, " needs a and b with ", (depth + 63) / 64, " words in a row");
  const int64_t shape[2] = {a.size(0), b.size(0)};
  Tensor out = torch::stable::empty({shape, 2}, ScalarType::Int);
  if (shape[0] == 0 || shape[1] == 0) return out;
  const Tensor left = torch::stable::contiguous(a), right = torch::stable::contiguous(b);
  lowbit::BinaryMm job;
  job.a = reinterpret_cast<const uint64_t*>(left.const_data_ptr<int64_t>());
  job.b = reinterpret_cast<const uint64_t*>(right.const_data_ptr<int64_t>());
  job.out = out.mutable_data_ptr<int32_t>();
  job.rows = shape[0], job.columns = shape[1], job.words = words, job.depth = depth;
  job.a_row = job.b_row = words, job.out_row = shape[1], job.out_column = 1;
  // columns are laid out anew for the vectors: where there are few rows, they are the ones that cost less
  if (job.rows <= kernels.panel_columns && job.rows < job.columns) {
    std::swap(job.a, job.b);
    std::swap(job.rows, job.columns);
    std::swap(job.out_row, job.out_column);
  }
  const int64_t panels = (job.columns + kernels.panel_columns - 1) / kernels.panel_columns;
  const int64_t wanted = 4 * int64_t(torch::stable::get_num_threads());
  const int64_t cuts = std::max<int64_t>(1, std::min((wanted + panels - 1) / panels, job.rows / 32));
  const int64_t block = (job.rows + cuts - 1) / cuts;
  const int64_t cost = std::max<int64_t>(1, block * kernels.panel_columns * words);  // words of a task
  constexpr int64_t worth_a_thread = 1 << 16;                                        // about 10 microseconds
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / cost);
  torch::stable::parallel_for(0, panels * cuts, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> packed(size_t(words * kernels.panel_columns));
    int64_t panel_in_place = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / cuts, row = task % cuts * block;
      const int64_t row_end = std::min(job.rows, row + block);
      if (row >= row_end) continue;
      if (panel != panel_in_place) kernels.pack_panel(job, panel * kernels.panel_columns, packed.data());
      panel_in_place = panel;
      kernels.multiply(job, panel * kernels.panel_columns, row, row_end, packed.data());
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  m.impl("pack_signs", TORCH_BOX(&pack_signs));
  m.impl("binary_mm", TORCH_BOX(&binary_mm));
}

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
  job.out_row = shape[1], job.out_column = 1;
  // lanes are columns: where there are few rows, let them be the columns
  if (job.rows < kernels.binary_panel && job.rows < job.columns) {
    std::swap(job.a, job.b);
    std::swap(job.rows, job.columns);
    std::swap(job.out_row, job.out_column);
  }
  const int64_t length = (words + kernels.binary_unit - 1) / kernels.binary_unit * kernels.binary_unit + 1;
  const int64_t panels = (job.columns + kernels.binary_panel - 1) / kernels.binary_panel;
  std::vector<uint64_t> packed(size_t(panels * kernels.binary_panel * length));
  const int64_t panel_words = kernels.binary_panel * length;
  constexpr int64_t worth_a_thread = 1 << 16;  // words that are packed or multiplied, about 20 microseconds
  torch::stable::parallel_for(0, panels, std::max<int64_t>(1, worth_a_thread / panel_words), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      kernels.pack_binary_panel(job, panel * kernels.binary_panel, packed.data() + panel * panel_words);
  });
  constexpr int64_t block = 32;  // rows of a task: they stay in the first cache while the panels pass
  const int64_t blocks = (job.rows + block - 1) / block;
  const int64_t grain = std::max<int64_t>(1, 8 * worth_a_thread / (block * job.columns * length));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> rows(size_t(block * length));
    for (int64_t row = begin * block; row < std::min(job.rows, end * block); row += block) {
      const int64_t row_end = std::min(job.rows, row + block);
      kernels.pack_binary_rows(job, row, row_end, rows.data());
      for (int64_t panel = 0; panel < panels; ++panel)
        kernels.multiply_binary(job, row, row_end, rows.data(), panel * kernels.binary_panel,
                                packed.data() + panel * panel_words);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  m.impl("pack_signs", TORCH_BOX(&pack_signs));
  m.impl("binary_mm", TORCH_BOX(&binary_mm));
}

// lowbit::pack_signs, binary_mm, packed_mm and packed_mm_int8 as PyTorch operators.
#include "library.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// contiguous() is a call through the dispatcher, a microsecond each, which a product with one row would feel
Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

Tensor pack_signs(const Tensor& x) {
  const lowbit::LowmmKernels& kernels = lowbit::kernels().lowmm;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() >= 1, "pack_signs needs float32 of shape (..., K)");
  const Tensor source = dense(x);
  const int64_t depth = x.size(-1), words = (depth + 63) / 64;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = words;
  Tensor out = lowbit::empty({shape.data(), shape.size()}, ScalarType::Long);
  const int64_t rows = words == 0 ? 0 : out.numel() / words;
  const float* data = source.const_data_ptr<float>();
  uint64_t* result = reinterpret_cast<uint64_t*>(out.mutable_data_ptr<int64_t>());
  constexpr int64_t worth_a_thread = 1 << 16;  // floats, about 10 microseconds
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, depth));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) kernels.pack_signs(data + row * depth, result + row * words, depth);
  });
  return out;
}

Tensor binary_mm(const Tensor& a, const Tensor& b, int64_t depth) {
  const lowbit::LowmmKernels& kernels = lowbit::kernels().lowmm;
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Long && b.scalar_type() == ScalarType::Long,
                  "binary_mm needs int64 words");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "binary_mm needs matrices");
  const int64_t words = a.size(1);
  STD_TORCH_CHECK(depth >= 0 && depth < int64_t(1) << 31 && words == (depth + 63) / 64 && b.size(1) == words,
                  "binary_mm of depth ", depth, " needs a and b with ", (depth + 63) / 64, " words in a row");
  const int64_t shape[2] = {a.size(0), b.size(0)};
  Tensor out = lowbit::empty({shape, 2}, ScalarType::Int);
  if (shape[0] == 0 || shape[1] == 0) return out;
  const Tensor left = dense(a), right = dense(b);
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
  const int64_t panel_words = kernels.binary_panel * length;
  const auto packed = std::make_unique_for_overwrite<uint64_t[]>(size_t(panels * panel_words));
  constexpr int64_t worth_a_thread = 1 << 16;  // words that are packed or multiplied, about 20 microseconds
  const int64_t panel_grain = std::max<int64_t>(1, worth_a_thread / panel_words);
  torch::stable::parallel_for(0, panels, panel_grain, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      kernels.pack_binary_panel(job, panel * kernels.binary_panel, packed.get() + panel * panel_words);
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
                                packed.get() + panel * panel_words);
    }
  });
  return out;
}

// What both products with packed weights have in common; `lane` keeps the table that the job points to.
lowbit::PackedMm packed_job(const Tensor& x, const Tensor& weight, const Tensor& scale, int64_t bits, int64_t group,
                            std::vector<int32_t>& lane) {
  STD_TORCH_CHECK(bits == 1 || bits == 2 || bits == 4, "packed weights have 1, 2 or 4 bits, got ", bits);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 2, "packed_mm needs x (M, K) of float32");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Byte && weight.dim() == 2,
                  "packed_mm needs a weight (N, bytes) of uint8");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, "packed_mm needs a scale of float32");
  lowbit::PackedMm job = {};
  job.rows = x.size(0), job.depth = x.size(1), job.columns = weight.size(0), job.bits = bits;
  STD_TORCH_CHECK(job.depth <= int64_t(1) << 20, "packed_mm adds up to 2^20 products, got ", job.depth);
  job.weight_bytes = weight.size(1);
  STD_TORCH_CHECK(job.weight_bytes == (job.depth + 31) / 32 * 4 * bits, "a row of ", job.depth, " codes of ", bits,
                  " bits is ", (job.depth + 31) / 32 * 4 * bits, " bytes, got ", job.weight_bytes);
  job.runs = (job.weight_bytes + 63) / 64;
  STD_TORCH_CHECK(group >= 0 && group % 32 == 0, "group must be 0 or a multiple of 32, got ", group);
  job.groups = group == 0 ? 1 : (job.depth + group - 1) / group;
  STD_TORCH_CHECK(scale.numel() == job.columns * job.groups, "packed_mm needs ", job.groups, " scales for a row");
  const int64_t codes = 32 / bits, run = 16 * codes;
  job.segment = group == 0 ? std::max<int64_t>(1, job.runs) : group % run == 0 ? group / run : 1;
  if (group == 0) return job;
  lane.resize(size_t(16 * ((job.runs + job.segment - 1) / job.segment)));
  for (int64_t i = 0; i < int64_t(lane.size()); ++i) {
    const int64_t first = (i / 16 * job.segment * 16 + i % 16) * codes;  // code of the lane in the segment
    lane[size_t(i)] = int32_t(std::min(first / group, job.groups - 1));
  }
  job.lane = lane.data();
  return job;
}

// Work as (begin, end) of the job's columns. They are given out in blocks: a column is a row of weights in memory.
template <class F>
void over_columns(const lowbit::PackedMm& job, const F& multiply) {
  constexpr int64_t block = 16, worth_a_thread = 1 << 18;  // multiply-adds, about 20 microseconds
  const int64_t cost = std::max<int64_t>(1, job.depth * job.rows * block), blocks = (job.columns + block - 1) / block;
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / cost);
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    multiply(begin * block, std::min(job.columns, end * block));
  });
}

template <class F>
void over_rows(const lowbit::PackedMm& job, const F& fill) {
  constexpr int64_t worth_a_thread = 1 << 14;  // activations, about 10 microseconds
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, job.depth));
  torch::stable::parallel_for(0, job.rows, grain, fill);
}

Tensor packed_mm(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& levels, int64_t group) {
  const lowbit::LowmmKernels& kernels = lowbit::kernels().lowmm;
  const int64_t count = levels.numel();
  STD_TORCH_CHECK(levels.scalar_type() == ScalarType::Float && (count == 2 || count == 4 || count == 16),
                  "packed_mm needs 2, 4 or 16 levels of float32, got ", count);
  std::vector<int32_t> lane;
  lowbit::PackedMm job = packed_job(x, weight, scale, count == 2 ? 1 : count == 4 ? 2 : 4, group, lane);
  const int64_t shape[2] = {job.rows, job.columns};
  Tensor out = lowbit::empty({shape, 2}, ScalarType::Float);
  if (job.depth == 0) std::fill_n(out.mutable_data_ptr<float>(), out.numel(), 0.0f);
  if (job.depth == 0 || out.numel() == 0) return out;
  const Tensor a = dense(x), w = dense(weight),
               s = dense(scale), l = dense(levels);
  float table[16];
  for (int64_t i = 0; i < 16; ++i) table[i] = l.const_data_ptr<float>()[i % count];
  job.weight = w.const_data_ptr<uint8_t>(), job.scale = s.const_data_ptr<float>(), job.levels = table;
  job.out = out.mutable_data_ptr<float>();
  const int64_t length = job.runs * 16 * (32 / job.bits);
  std::vector<float> laid(size_t(job.rows * length));
  const float* data = a.const_data_ptr<float>();
  over_rows(job, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      kernels.fill_floats(job, data + row * job.depth, laid.data() + row * length);
  });
  job.x = laid.data();
  over_columns(job, [&](int64_t begin, int64_t end) { kernels.multiply_floats(job, begin, end); });
  return out;
}

Tensor packed_mm_int8(const Tensor& x, const Tensor& weight, const Tensor& scale, int64_t bits, int64_t offset,
                      int64_t group) {
  const lowbit::LowmmKernels& kernels = lowbit::kernels().lowmm;
  std::vector<int32_t> lane;
  lowbit::PackedMm job = packed_job(x, weight, scale, bits, group, lane);
  STD_TORCH_CHECK(offset >= 0 && offset < int64_t(1) << bits, "offset must be a code, got ", offset);
  const int64_t shape[2] = {job.rows, job.columns};
  Tensor out = lowbit::empty({shape, 2}, ScalarType::Float);
  if (job.depth == 0) std::fill_n(out.mutable_data_ptr<float>(), out.numel(), 0.0f);
  if (job.depth == 0 || out.numel() == 0) return out;
  const Tensor a = dense(x), w = dense(weight),
               s = dense(scale);
  job.weight = w.const_data_ptr<uint8_t>(), job.scale = s.const_data_ptr<float>();
  job.out = out.mutable_data_ptr<float>();
  const int64_t length = job.runs * 16 * (32 / bits), sums = (job.runs + job.segment - 1) / job.segment * 16;
  std::vector<int8_t> codes(size_t(job.rows * length));
  std::vector<int32_t> base(size_t(job.rows * sums));
  std::vector<float> code_scale(static_cast<size_t>(job.rows));
  const float* data = a.const_data_ptr<float>();
  over_rows(job, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> scratch(static_cast<size_t>(length));
    for (int64_t row = begin; row < end; ++row)
      kernels.fill_codes(job, data + row * job.depth, offset, scratch.data(), codes.data() + row * length,
                         base.data() + row * sums, code_scale.data() + row);
  });
  job.codes = codes.data(), job.base = base.data(), job.code_scale = code_scale.data();
  over_columns(job, [&](int64_t begin, int64_t end) { kernels.multiply_codes(job, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  m.impl("pack_signs", TORCH_BOX(&pack_signs));
  m.impl("binary_mm", TORCH_BOX(&binary_mm));
  m.impl("packed_mm", TORCH_BOX(&packed_mm));
  m.impl("packed_mm_int8", TORCH_BOX(&packed_mm_int8));
}

// lowbit::chunked_mm as a PyTorch operator.
#include "library.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

lowbit::Minifloat minifloat(int64_t exponent, int64_t mantissa, int64_t bias) {
  STD_TORCH_CHECK(exponent >= 2 && exponent <= 8, "exponent must have 2 to 8 bits, got ", exponent);
  STD_TORCH_CHECK(mantissa >= 1 && mantissa <= 22, "mantissa must have 1 to 22 bits, got ", mantissa);
  const int64_t e_min = 1 - bias, e_max = (int64_t(1) << exponent) - 2 - bias;
  STD_TORCH_CHECK(bias >= 0 && bias <= 127 && e_max <= 127, "bias ", bias, " leaves the range of float32");
  lowbit::Minifloat f;
  f.largest = float(std::ldexp(2.0 - std::ldexp(1.0, int(-mantissa)), int(e_max)));
  f.lowest_bits = bits_of(float(std::ldexp(1.0, int(e_min))));
  f.magic_bits = int32_t(((23 - mantissa) << 23) + (1 << 22));
  f.mantissa = int32_t(mantissa);
  f.wide = mantissa > 21 || e_max - mantissa + 23 > 127;
  return f;
}

Tensor chunked_mm(const Tensor& a, const Tensor& b, int64_t chunk, int64_t exponent, int64_t mantissa, int64_t bias) {
  const lowbit::Kernels& isa = lowbit::kernels();
  const lowbit::ChunkedKernels& kernels = isa.chunked;
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float && b.scalar_type() == ScalarType::Float,
                  "chunked_mm needs float32 operands");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "chunked_mm needs a (M, K) and b (K, N)");
  STD_TORCH_CHECK(chunk >= 1, "chunk must be at least 1, got ", chunk);
  const int64_t shape[2] = {a.size(0), b.size(1)};
  Tensor out = torch::stable::empty({shape, 2}, ScalarType::Float);
  lowbit::ChunkedMm job;
  job.format = minifloat(exponent, mantissa, bias);
  if (shape[0] == 0 || shape[1] == 0) return out;
  job.a = a.const_data_ptr<float>(), job.b = b.const_data_ptr<float>(), job.out = out.mutable_data_ptr<float>();
  job.rows = shape[0], job.depth = a.size(1), job.columns = shape[1];
  job.a_row = a.stride(0), job.a_depth = a.stride(1), job.b_depth = b.stride(0), job.b_column = b.stride(1);
  job.out_row = shape[1], job.out_column = 1;
  job.chunk = chunk;
  // vectors run along the columns: where there are few, compute the transposed product (a * b = b * a, bit for bit)
  if (job.columns < isa.lanes && job.rows > job.columns) {
    std::swap(job.a, job.b);
    std::swap(job.rows, job.columns);
    std::swap(job.a_row, job.b_column);
    std::swap(job.a_depth, job.b_depth);
    std::swap(job.out_row, job.out_column);
  }
  // tasks: panels of columns, each cut into blocks of rows only as far as the threads need it, because every thread
  // that works on a panel packs it once
  const int64_t panels = (job.columns + kernels.panel_columns - 1) / kernels.panel_columns;
  const int64_t wanted = 4 * int64_t(torch::stable::get_num_threads());
  const int64_t cuts = std::max<int64_t>(1, std::min((wanted + panels - 1) / panels, job.rows / 32));
  const int64_t block = (job.rows + cuts - 1) / cuts;
  const int64_t cost = std::max<int64_t>(1, block * kernels.panel_columns * job.depth);  // multiply-adds of a task
  constexpr int64_t worth_a_thread = 1 << 16;                                            // about 10 microseconds
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / cost);
  torch::stable::parallel_for(0, panels * cuts, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> packed(size_t(job.depth * kernels.panel_columns));
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

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) { m.impl("chunked_mm", TORCH_BOX(&chunked_mm)); }

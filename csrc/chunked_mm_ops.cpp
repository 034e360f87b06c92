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

// Where the elements lie along the axes [first, last) taken as one, in elements from the first.
std::vector<int64_t> offsets(const Tensor& x, int64_t first, int64_t last) {
  std::vector<int64_t> result(1, 0);
  for (int64_t axis = first; axis < last; ++axis) {
    std::vector<int64_t> longer;
    longer.reserve(result.size() * size_t(x.size(axis)));
    for (int64_t offset : result)
      for (int64_t i = 0; i < x.size(axis); ++i) longer.push_back(offset + i * x.stride(axis));
    result.swap(longer);
  }
  return result;
}

// What the magnitudes of an operand have in common, read in its memory from the first element to the last.
lowbit::Magnitudes magnitudes(const Tensor& x, const lowbit::ChunkedKernels& kernels) {
  int64_t reach = 1;
  for (int64_t axis = 0; axis < x.dim(); ++axis) reach += (x.size(axis) - 1) * x.stride(axis);
  const float* data = x.const_data_ptr<float>();
  constexpr int64_t piece = 1 << 15;
  const int64_t pieces = (reach + piece - 1) / piece;
  std::vector<lowbit::Magnitudes> parts(static_cast<size_t>(pieces));
  torch::stable::parallel_for(0, pieces, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      parts[size_t(p)] = kernels.scan(data + p * piece, std::min(piece, reach - p * piece));
  });
  lowbit::Magnitudes all = parts[0];
  for (const lowbit::Magnitudes& part : parts) {
    all.bits |= part.bits;
    all.largest = std::max(all.largest, part.largest);
    all.smallest = std::min(all.smallest, part.smallest);
  }
  return all;
}

double value_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Whether the sums need neither the cut at the largest number nor a rounding of each product: operands of at most 12
// significant bits, products above float32's subnormal numbers, and a bound on every partial sum. A rounding adds at
// most 2^-mantissa of its argument or the smallest number, so a sum of n terms up to t stays below
// n (t + smallest) exp(n 2^-mantissa).
bool tame(const lowbit::ChunkedMm& job, const Tensor& a, const Tensor& b, const lowbit::ChunkedKernels& kernels) {
  const lowbit::Magnitudes x = magnitudes(a, kernels), y = magnitudes(b, kernels);
  if (((x.bits | y.bits) & 0xfff) != 0 || x.largest >= 0x7f800000 || y.largest >= 0x7f800000) return false;
  if (value_of(x.smallest) * value_of(y.smallest) < 0x1p-100) return false;
  const double smallest = std::ldexp(value_of(job.format.lowest_bits), int(-job.format.mantissa));
  const double growth = std::ldexp(1.0, int(-job.format.mantissa));
  const double chunk = double(std::min(job.chunk, job.depth)), chunks = std::ceil(double(job.depth) / chunk);
  const double term = value_of(x.largest) * value_of(y.largest);
  const double inner = chunk * (term + smallest) * std::exp(growth * chunk);
  return chunks * (inner + smallest) * std::exp(growth * chunks) < 0.5 * double(job.format.largest);
}

Tensor chunked_mm(const Tensor& a, const Tensor& b, int64_t chunk, int64_t exponent, int64_t mantissa, int64_t bias,
                  int64_t row_axes, int64_t depth_axes) {
  const lowbit::Kernels& isa = lowbit::kernels();
  const lowbit::ChunkedKernels& kernels = isa.chunked;
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float && b.scalar_type() == ScalarType::Float,
                  "chunked_mm needs float32 operands");
  STD_TORCH_CHECK(row_axes >= 0 && row_axes <= a.dim() && depth_axes >= 0 && depth_axes <= b.dim() &&
                      a.dim() - row_axes == depth_axes,
                  "chunked_mm needs a (rows..., depth...) and b (depth..., columns...)");
  for (int64_t axis = 0; axis < depth_axes; ++axis)
    STD_TORCH_CHECK(a.size(row_axes + axis) == b.size(axis), "chunked_mm needs a (M, K) and b (K, N)");
  STD_TORCH_CHECK(chunk >= 1, "chunk must be at least 1, got ", chunk);
  std::vector<int64_t> a_rows = offsets(a, 0, row_axes), a_depths = offsets(a, row_axes, a.dim());
  std::vector<int64_t> b_depths = offsets(b, 0, depth_axes), b_columns = offsets(b, depth_axes, b.dim());
  const int64_t shape[2] = {int64_t(a_rows.size()), int64_t(b_columns.size())};
  Tensor out = lowbit::empty({shape, 2}, ScalarType::Float);
  lowbit::ChunkedMm job;
  job.format = minifloat(exponent, mantissa, bias);
  if (shape[0] == 0 || shape[1] == 0) return out;
  job.a = a.const_data_ptr<float>(), job.b = b.const_data_ptr<float>(), job.out = out.mutable_data_ptr<float>();
  job.rows = shape[0], job.depth = int64_t(a_depths.size()), job.columns = shape[1];
  job.a_rows = a_rows.data(), job.a_depths = a_depths.data();
  job.b_depths = b_depths.data(), job.b_columns = b_columns.data();
  job.out_row = shape[1], job.out_column = 1;
  job.chunk = chunk;
  if (job.depth == 0) {
    std::memset(job.out, 0, size_t(job.rows * job.columns) * sizeof(float));
    return out;
  }
  job.tame = !job.format.wide && tame(job, a, b, kernels);
  // vectors run along the columns: where there are few, compute the transposed product (a * b = b * a, bit for bit)
  if (job.columns < isa.lanes && job.rows > job.columns) {
    std::swap(job.a, job.b);
    std::swap(job.rows, job.columns);
    std::swap(job.a_rows, job.b_columns);
    std::swap(job.a_depths, job.b_depths);
    std::swap(job.out_row, job.out_column);
  }
  // a slab of a panel is one chunk, or fills half a megabyte at most: what is packed stays in the cache until it has
  // met all rows
  const int64_t length = std::min(job.chunk, job.depth);
  const int64_t slab_depth = std::min(job.depth, std::max<int64_t>(1, 4096 / length) * length);
  // tasks: panels of columns, each cut into blocks of rows only as far as the threads need it, because every thread
  // that works on a panel packs it once
  const int64_t panels = (job.columns + kernels.panel_columns - 1) / kernels.panel_columns;
  const int64_t wanted = 4 * int64_t(torch::stable::get_num_threads());
  const int64_t cuts = std::max<int64_t>(1, std::min((wanted + panels - 1) / panels, job.rows / 8));
  const int64_t block = (job.rows + 8 * cuts - 1) / (8 * cuts) * 8;
  const int64_t cost = std::max<int64_t>(1, block * kernels.panel_columns * job.depth);  // multiply-adds of a task
  constexpr int64_t worth_a_thread = 1 << 16;                                            // about 10 microseconds
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / cost);
  torch::stable::parallel_for(0, panels * cuts, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> packed(size_t(slab_depth * kernels.panel_columns)), sums;
    for (int64_t task = begin; task < end;) {
      const int64_t panel = task / cuts, next = std::min(end, (panel + 1) * cuts);  // all of the range on this panel
      const int64_t row = std::min(job.rows, task % cuts * block);
      const int64_t row_end = std::min(job.rows, ((next - 1) % cuts + 1) * block);
      task = next;
      if (row >= row_end) continue;
      if (slab_depth < job.depth) sums.resize(size_t((row_end - row) * kernels.panel_columns));
      for (int64_t first = 0; first < job.depth; first += slab_depth) {
        const lowbit::ChunkedSlab slab = {panel * kernels.panel_columns, first, std::min(job.depth, first + slab_depth),
                                          packed.data(), sums.data()};
        kernels.pack_slab(job, slab, packed.data());
        kernels.multiply(job, slab, row, row_end);
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) { m.impl("chunked_mm", TORCH_BOX(&chunked_mm)); }

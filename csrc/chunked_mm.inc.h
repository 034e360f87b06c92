// lowbit::chunked_mm for one instruction set; needs `Vec`. The definition is in src/lowbit/ops/chunked.py.
//
// A tile of `Rows` x `Vectors` vectors of `out` keeps its partial sums in registers: the additions of one element must
// follow each other, so it is the independent elements of the tile that fill the processor's pipelines.
#pragma once

namespace lowbit {
namespace {

constexpr int64_t panel_vectors = 2;
constexpr int64_t panel_columns = panel_vectors * Vec::lanes;

// M = 1.5 * 2^(e - mantissa + 23), e the exponent of x; (x + M) - M rounds to the format's grid
struct RoundByMagic {
  Vec::F largest;
  Vec::I exponent, lowest, magic;
  explicit RoundByMagic(const Minifloat& f)
      : largest(Vec::set(f.largest)),
        exponent(Vec::set(int32_t(0x7f800000))),
        lowest(Vec::set(f.lowest_bits)),
        magic(Vec::set(f.magic_bits)) {}
  Vec::F operator()(Vec::F x) const {
    x = Vec::clamp(x, largest);
    const Vec::I power = Vec::larger(Vec::bit_and(Vec::as_int(x), exponent), lowest);
    const Vec::F m = Vec::as_float(Vec::add(power, magic));
    return Vec::sub(Vec::add(x, m), m);
  }
};

// The same where M is no usable float32: half-to-even on the bits, and a fixed step below the smallest normal number
struct RoundByBits {
  Vec::F largest, magic;
  Vec::I magnitude, lowest, one, half, keep;
  int32_t shift;
  explicit RoundByBits(const Minifloat& f)
      : largest(Vec::set(f.largest)),
        magic(Vec::as_float(Vec::set(f.lowest_bits + f.magic_bits))),
        magnitude(Vec::set(int32_t(0x7fffffff))),
        lowest(Vec::set(f.lowest_bits)),
        one(Vec::set(int32_t(f.mantissa < 23 ? 1 : 0))),
        half(Vec::set(int32_t(f.mantissa < 23 ? (1 << (22 - f.mantissa)) - 1 : 0))),
        keep(Vec::set(int32_t(-(1 << (23 - f.mantissa))))),
        shift(23 - f.mantissa) {}
  Vec::F operator()(Vec::F x) const {
    x = Vec::clamp(x, largest);
    const Vec::I bits = Vec::as_int(x);
    const Vec::I odd = Vec::bit_and(Vec::shift_right(bits, shift), one);
    const Vec::F normal = Vec::as_float(Vec::bit_and(Vec::add(Vec::add(bits, half), odd), keep));
    const Vec::F small = Vec::sub(Vec::add(x, magic), magic);
    return Vec::nan_or(x, Vec::where_less(Vec::bit_and(bits, magnitude), lowest, small, normal));
  }
};

void pack_panel(const ChunkedMm& job, int64_t column, float* packed) {
  const int64_t width = job.columns - column < panel_columns ? job.columns - column : panel_columns;
  const float* source = job.b + column * job.b_column;
  for (int64_t k = 0; k < job.depth; ++k, source += job.b_depth, packed += panel_columns) {
    for (int64_t j = 0; j < width; ++j) packed[j] = source[j * job.b_column];
    for (int64_t j = width; j < panel_columns; ++j) packed[j] = 0.0f;
  }
}

template <int Rows, int Vectors, class Round>
inline void tile(const ChunkedMm& job, int64_t column, int64_t row, const float* packed, const Round& round) {
  const float* a[Rows];
  for (int i = 0; i < Rows; ++i) a[i] = job.a + (row + i) * job.a_row;
  Vec::F t[Rows][Vectors], s[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) t[i][j] = Vec::set(0.0f);
  for (int64_t begin = 0; begin < job.depth;) {
    const int64_t end = job.depth - begin > job.chunk ? begin + job.chunk : job.depth;
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Vectors; ++j) s[i][j] = Vec::set(0.0f);
    for (int64_t k = begin; k < end; ++k) {
      Vec::F b[Vectors];
      for (int j = 0; j < Vectors; ++j) b[j] = Vec::load(packed + k * panel_columns + j * Vec::lanes);
      for (int i = 0; i < Rows; ++i) {
        const Vec::F x = Vec::set(a[i][k * job.a_depth]);
        for (int j = 0; j < Vectors; ++j) s[i][j] = round(Vec::add(s[i][j], Vec::mul(x, b[j])));
      }
    }
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Vectors; ++j) t[i][j] = round(Vec::add(t[i][j], s[i][j]));
    begin = end;
  }
  for (int i = 0; i < Rows; ++i) {
    float line[Vectors * Vec::lanes];
    for (int j = 0; j < Vectors; ++j) Vec::store(line + j * Vec::lanes, Vec::nan_or(t[i][j], t[i][j]));
    float* out = job.out + (row + i) * job.out_row + column * job.out_column;
    const int64_t left = job.columns - column;
    const int64_t width = left < Vectors * Vec::lanes ? left : Vectors * Vec::lanes;
    for (int64_t j = 0; j < width; ++j) out[j * job.out_column] = line[j];
  }
}

template <int Vectors, class Round>
void rows_of_panel(const ChunkedMm& job, int64_t column, int64_t row, int64_t row_end, const float* packed,
                   const Round& round) {
  constexpr int most = Vectors == 1 ? 8 : 4;
  for (; row + most <= row_end; row += most) tile<most, Vectors>(job, column, row, packed, round);
  for (; row + 2 <= row_end; row += 2) tile<2, Vectors>(job, column, row, packed, round);
  for (; row < row_end; ++row) tile<1, Vectors>(job, column, row, packed, round);
}

void chunked_mm(const ChunkedMm& job, int64_t column, int64_t row, int64_t row_end, const float* packed) {
  const bool narrow = job.columns - column <= Vec::lanes;
  if (job.format.wide) {
    const RoundByBits round(job.format);
    if (narrow) rows_of_panel<1>(job, column, row, row_end, packed, round);
    else rows_of_panel<2>(job, column, row, row_end, packed, round);
  } else {
    const RoundByMagic round(job.format);
    if (narrow) rows_of_panel<1>(job, column, row, row_end, packed, round);
    else rows_of_panel<2>(job, column, row, row_end, packed, round);
  }
}

constexpr ChunkedKernels chunked_kernels = {panel_columns, pack_panel, chunked_mm};

}  // namespace
}  // namespace lowbit

// lowbit::chunked_mm for one instruction set; needs `Vec`. The definition is in src/lowbit/ops/chunked.py.
//
// A tile of `Rows` x `Vectors` vectors of `out` keeps its partial sums in registers: the additions of one element must
// follow each other, so it is the independent elements of the tile that fill the processor's pipelines.
#pragma once

#include <string.h>

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
  Vec::F operator()(Vec::F s, Vec::F a, Vec::F b) const { return (*this)(Vec::add(s, Vec::mul(a, b))); }
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
  Vec::F operator()(Vec::F s, Vec::F a, Vec::F b) const { return (*this)(Vec::add(s, Vec::mul(a, b))); }
  Vec::F operator()(Vec::F x) const {
    x = Vec::clamp(x, largest);
    const Vec::I bits = Vec::as_int(x);
    const Vec::I odd = Vec::bit_and(Vec::shift_right(bits, shift), one);
    const Vec::F normal = Vec::as_float(Vec::bit_and(Vec::add(Vec::add(bits, half), odd), keep));
    const Vec::F small = Vec::sub(Vec::add(x, magic), magic);
    return Vec::nan_or(x, Vec::where_less(Vec::bit_and(bits, magnitude), lowest, small, normal));
  }
};

// As RoundByMagic for tame operands. M = 1.5 * 2^(23 - mantissa) * 2^e is exact, so x + M and the subtraction of M may
// each be one fused multiply-add; so may the sum with a product that is exact.
struct RoundTame {
#if defined(__AVX512F__)
  __m512 factor;
  __m512i exponent, lowest;
  explicit RoundTame(const Minifloat& f)
      : factor(_mm512_castsi512_ps(_mm512_set1_epi32((127 << 23) + f.magic_bits))),
        exponent(_mm512_set1_epi32(0x7f800000)),
        lowest(_mm512_set1_epi32(f.lowest_bits)) {}
  Vec::F operator()(Vec::F s, Vec::F a, Vec::F b) const { return (*this)(_mm512_fmadd_ps(a, b, s)); }
  Vec::F operator()(Vec::F x) const {
    const __m512i e = _mm512_and_si512(_mm512_castps_si512(x), exponent);
    const __m512 power = _mm512_castsi512_ps(_mm512_max_epi32(e, lowest));
    return _mm512_fnmadd_ps(power, factor, _mm512_fmadd_ps(power, factor, x));
  }
#else
  Vec::I exponent, lowest, magic;
  explicit RoundTame(const Minifloat& f)
      : exponent(Vec::set(int32_t(0x7f800000))), lowest(Vec::set(f.lowest_bits)), magic(Vec::set(f.magic_bits)) {}
  Vec::F operator()(Vec::F s, Vec::F a, Vec::F b) const { return (*this)(Vec::add(s, Vec::mul(a, b))); }
  Vec::F operator()(Vec::F x) const {
    const Vec::I power = Vec::larger(Vec::bit_and(Vec::as_int(x), exponent), lowest);
    const Vec::F m = Vec::as_float(Vec::add(power, magic));
    return Vec::sub(Vec::add(x, m), m);
  }
#endif
};

void pack_slab(const ChunkedMm& job, const ChunkedSlab& slab, float* packed) {
  const int64_t left = job.columns - slab.column, width = left < panel_columns ? left : panel_columns;
  const int64_t* columns = job.b_columns + slab.column;
  for (int64_t k = slab.begin; k < slab.end; ++k, packed += panel_columns) {
    const float* source = job.b + job.b_depths[k];
    for (int64_t j = 0; j < width; ++j) packed[j] = source[columns[j]];
    for (int64_t j = width; j < panel_columns; ++j) packed[j] = 0.0f;
  }
}

template <int Rows, int Vectors, class Round>
inline void tile(const ChunkedMm& job, const ChunkedSlab& slab, int64_t row, float* sums, const Round& round) {
  const float* a[Rows];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) a[i] = job.a + job.a_rows[row + i];
  const int64_t* depths = job.a_depths;
  Vec::F t[Rows][Vectors], s[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j)
      t[i][j] = slab.begin == 0 ? Vec::set(0.0f) : Vec::load(sums + i * panel_columns + j * Vec::lanes);
  }
  const float* packed = slab.packed;
  for (int64_t begin = slab.begin; begin < slab.end;) {
    const int64_t end = slab.end - begin > job.chunk ? begin + job.chunk : slab.end;
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) s[i][j] = Vec::set(0.0f);
    }
    for (int64_t k = begin; k < end; ++k, packed += panel_columns) {
      Vec::F b[Vectors];
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) b[j] = Vec::load(packed + j * Vec::lanes);
      const int64_t at = depths[k];
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        const Vec::F x = Vec::set(a[i][at]);
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) s[i][j] = round(s[i][j], x, b[j]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) t[i][j] = round(Vec::add(t[i][j], s[i][j]));
    }
    begin = end;
  }
  if (slab.end < job.depth) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) Vec::store(sums + i * panel_columns + j * Vec::lanes, t[i][j]);
    }
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    float line[Vectors * Vec::lanes];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) Vec::store(line + j * Vec::lanes, Vec::nan_or(t[i][j], t[i][j]));
    float* out = job.out + (row + i) * job.out_row + slab.column * job.out_column;
    const int64_t left = job.columns - slab.column;
    const int64_t width = left < Vectors * Vec::lanes ? left : Vectors * Vec::lanes;
    for (int64_t j = 0; j < width; ++j) out[j * job.out_column] = line[j];
  }
}

template <int Vectors, class Round>
void rows_of_slab(const ChunkedMm& job, const ChunkedSlab& slab, int64_t row, int64_t row_end, const Round& round) {
  constexpr int most = Vectors == 1 ? 8 : 4;
  float* sums = slab.sums;
  for (; row + most <= row_end; row += most, sums += most * panel_columns)
    tile<most, Vectors>(job, slab, row, sums, round);
  for (; row + 2 <= row_end; row += 2, sums += 2 * panel_columns) tile<2, Vectors>(job, slab, row, sums, round);
  for (; row < row_end; ++row, sums += panel_columns) tile<1, Vectors>(job, slab, row, sums, round);
}

template <class Round>
void multiply_slab(const ChunkedMm& job, const ChunkedSlab& slab, int64_t row, int64_t row_end) {
  const Round round(job.format);
  if (job.columns - slab.column <= Vec::lanes) rows_of_slab<1>(job, slab, row, row_end, round);
  else rows_of_slab<2>(job, slab, row, row_end, round);
}

void chunked_mm(const ChunkedMm& job, const ChunkedSlab& slab, int64_t row, int64_t row_end) {
  if (job.format.wide) multiply_slab<RoundByBits>(job, slab, row, row_end);
  else if (job.tame) multiply_slab<RoundTame>(job, slab, row, row_end);
  else multiply_slab<RoundByMagic>(job, slab, row, row_end);
}

Magnitudes scan_magnitudes(const float* x, int64_t count) {
  int32_t bits = 0, largest = 0, smallest = 0x7f800000;
  for (int64_t i = 0; i < count; ++i) {
    int32_t word;
    memcpy(&word, x + i, sizeof word);
    word &= 0x7fffffff;
    const int32_t counted = word == 0 ? 0x7f800000 : word;
    bits |= word;
    largest = word > largest ? word : largest;
    smallest = counted < smallest ? counted : smallest;
  }
  return {bits, largest, smallest};
}

constexpr ChunkedKernels chunked_kernels = {panel_columns, pack_slab, chunked_mm, scan_magnitudes};

}  // namespace
}  // namespace lowbit

// Products with operands of a few bits for one instruction set; the definitions are in src/lowbit/ops/binary_mm.py and
// packed_mm.py.
#pragma once

#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

// ---- binary x binary ------------------------------------------------------------------------------------------------
//
// A lane is a column: one vector holds the same word of several columns of b, and a word of a row of a goes to all
// lanes. The set bits of a[k] ^ b[k] are counted two words at a time: a full adder per bit leaves one bit of weight 1 for
// the next pair and one of weight 2, and only the latter is counted.

#if defined(__AVX512BW__)
struct Words {
  static constexpr int64_t lanes = 8;
  static constexpr int rows = 4;  // of a tile, with two vectors of columns
  typedef __m512i V;
  static V load(const uint64_t* p) { return _mm512_loadu_si512(p); }
  static V set(uint64_t w) { return _mm512_set1_epi64((long long)w); }
  static V add(V a, V b) { return _mm512_add_epi64(a, b); }
  static V count(V v) {
#if defined(__AVX512VPOPCNTDQ__)
    return _mm512_popcnt_epi64(v);
#else
    const V nibble = _mm512_set1_epi8(15);
    const V counts = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const V low = _mm512_shuffle_epi8(counts, _mm512_and_si512(v, nibble));
    const V high = _mm512_shuffle_epi8(counts, _mm512_and_si512(_mm512_srli_epi64(v, 4), nibble));
    return _mm512_sad_epu8(_mm512_add_epi8(low, high), _mm512_setzero_si512());
#endif
  }
  // ones + bits of (a0 ^ b0) + bits of (a1 ^ b1) = new ones + 2 * result
  static V add_pair(V& ones, V a0, V b0, V a1, V b1) {
    const V first = _mm512_ternarylogic_epi64(ones, a0, b0, 0x96);
    const V both = _mm512_ternarylogic_epi64(first, a1, b1, 0x96);
    const V carry = _mm512_ternarylogic_epi64(first, both, ones, 0x3a);  // first ? ~both : ones
    ones = both;
    return carry;
  }
  static void store(int32_t* out, V v) { _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi64_epi32(v)); }
};
#elif defined(__AVX2__)
struct Words {
  static constexpr int64_t lanes = 4;
  static constexpr int rows = 2;
  typedef __m256i V;
  static V load(const uint64_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static V set(uint64_t w) { return _mm256_set1_epi64x((long long)w); }
  static V add(V a, V b) { return _mm256_add_epi64(a, b); }
  static V count(V v) {
    const V nibble = _mm256_set1_epi8(15);
    const V counts = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const V low = _mm256_shuffle_epi8(counts, _mm256_and_si256(v, nibble));
    const V high = _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi64(v, 4), nibble));
    return _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256());
  }
  static V add_pair(V& ones, V a0, V b0, V a1, V b1) {
    const V x = a0 ^ b0, y = a1 ^ b1, first = ones ^ x;
    const V carry = (ones & x) | (first & y);
    ones = first ^ y;
    return carry;
  }
  static void store(int32_t* out, V v) {
    const __m256i low = _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    _mm_storeu_si128((__m128i*)out, _mm256_castsi256_si128(low));
  }
};
#else
struct Words {
  static constexpr int64_t lanes = 1;
  static constexpr int rows = 2;
  typedef uint64_t V;
  static V load(const uint64_t* p) { return *p; }
  static V set(uint64_t w) { return w; }
  static V add(V a, V b) { return a + b; }
  static V count(V v) { return V(__builtin_popcountll(v)); }
  static V add_pair(V& ones, V a0, V b0, V a1, V b1) {
    const V x = a0 ^ b0, y = a1 ^ b1, first = ones ^ x;
    const V carry = (ones & x) | (first & y);
    ones = first ^ y;
    return carry;
  }
  static void store(int32_t* out, V v) { *out = int32_t(v); }
};
#endif

constexpr int64_t binary_panel = 2 * Words::lanes;

void pack_signs(const float* x, uint64_t* words, int64_t count) {
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    uint64_t word = 0;
#if defined(__AVX512F__)
    for (int j = 0; j < 4; ++j)
      word |= uint64_t(_mm512_cmp_ps_mask(_mm512_loadu_ps(x + i + 16 * j), _mm512_setzero_ps(), _CMP_GE_OQ)) << 16 * j;
#elif defined(__AVX2__)
    for (int j = 0; j < 8; ++j) {
      const __m256 set = _mm256_cmp_ps(_mm256_loadu_ps(x + i + 8 * j), _mm256_setzero_ps(), _CMP_GE_OQ);
      word |= uint64_t(uint32_t(_mm256_movemask_ps(set))) << 8 * j;
    }
#else
    for (int j = 0; j < 64; ++j) word |= uint64_t(x[i + j] >= 0.0f) << j;
#endif
    *words++ = word;
  }
  if (i < count) {
    uint64_t word = 0;
    for (int j = 0; i + j < count; ++j) word |= uint64_t(x[i + j] >= 0.0f) << j;
    *words = word;
  }
}

void pack_binary_panel(const BinaryMm& job, int64_t column, uint64_t* packed) {
  const int64_t width = job.columns - column < binary_panel ? job.columns - column : binary_panel;
  for (int64_t j = 0; j < width; ++j) {
    const uint64_t* source = job.b + (column + j) * job.b_row;
    for (int64_t k = 0; k < job.words; ++k) packed[k * binary_panel + j] = source[k];
  }
  for (int64_t j = width; j < binary_panel; ++j)
    for (int64_t k = 0; k < job.words; ++k) packed[k * binary_panel + j] = 0;
}

template <int Rows, int Vectors>
inline void binary_tile(const BinaryMm& job, int64_t column, int64_t row, const uint64_t* packed) {
  typedef Words::V V;
  const uint64_t* a[Rows];
  for (int i = 0; i < Rows; ++i) a[i] = job.a + (row + i) * job.a_row;
  V ones[Rows][Vectors], twos[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) ones[i][j] = twos[i][j] = Words::set(0);
  int64_t k = 0;
  for (; k + 2 <= job.words; k += 2, packed += 2 * binary_panel) {
    V b0[Vectors], b1[Vectors];
    for (int j = 0; j < Vectors; ++j) {
      b0[j] = Words::load(packed + j * Words::lanes);
      b1[j] = Words::load(packed + binary_panel + j * Words::lanes);
    }
    for (int i = 0; i < Rows; ++i) {
      const V a0 = Words::set(a[i][k]), a1 = Words::set(a[i][k + 1]);
      for (int j = 0; j < Vectors; ++j)
        twos[i][j] = Words::add(twos[i][j], Words::count(Words::add_pair(ones[i][j], a0, b0[j], a1, b1[j])));
    }
  }
  if (k < job.words)
    for (int j = 0; j < Vectors; ++j) {
      const V b = Words::load(packed + j * Words::lanes), zero = Words::set(0);
      for (int i = 0; i < Rows; ++i)
        twos[i][j] = Words::add(twos[i][j], Words::count(Words::add_pair(ones[i][j], Words::set(a[i][k]), b, zero, zero)));
    }
  const int64_t width = job.columns - column;
  const bool direct = job.out_column == 1 && width >= Vectors * Words::lanes;
  for (int i = 0; i < Rows; ++i) {
    int32_t* out = job.out + (row + i) * job.out_row + column * job.out_column;
    int32_t part[binary_panel];
    for (int j = 0; j < Vectors; ++j) {
      const V total = Words::add(Words::add(twos[i][j], twos[i][j]), Words::count(ones[i][j]));
      const V result = Words::set(uint64_t(job.depth)) - Words::add(total, total);
      Words::store((direct ? out : part) + j * Words::lanes, result);
    }
    if (direct) continue;
    for (int64_t j = 0; j < Vectors * Words::lanes && j < width; ++j) out[j * job.out_column] = part[j];
  }
}

template <int Vectors>
inline void binary_rows(const BinaryMm& job, int64_t column, int64_t row, int64_t end, const uint64_t* packed) {
  for (; row + Words::rows <= end; row += Words::rows) binary_tile<Words::rows, Vectors>(job, column, row, packed);
  for (; row < end; ++row) binary_tile<1, Vectors>(job, column, row, packed);
}

void multiply_binary(const BinaryMm& job, int64_t column, int64_t row_begin, int64_t row_end, const uint64_t* packed) {
  if (job.columns - column <= Words::lanes) return binary_rows<1>(job, column, row_begin, row_end, packed);
  binary_rows<2>(job, column, row_begin, row_end, packed);
}

constexpr LowmmKernels lowmm_kernels = {pack_signs, binary_panel, pack_binary_panel, multiply_binary};

}  // namespace
}  // namespace lowbit

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
// Winograd's inner product (1968) for bits. With d = a xor b for two words, and A = a0 xor a1, B = b0 xor b1,
//
//     d0 + d1 = 2 f - A + B        f = d1 where A = B, else A
//
// because d0 xor d1 = A xor B: where A = B the two bits are equal, elsewhere exactly one is set. So a pair of words costs
// one count instead of two, and the counts of A and of B belong to one operand each. Rows hold (a1, A) for (a0, a1).
//
// A lane is a column: one vector holds the same word of several columns of b, and a word of a row goes to all lanes.

#if defined(__AVX512BW__)
struct Words {
  static constexpr int64_t lanes = 8;
  static constexpr int rows = 4;  // of a tile, with two vectors of columns
#if defined(__AVX512VPOPCNTDQ__)
  static constexpr int64_t unit = 2;  // words that are counted together
#else
  static constexpr int64_t unit = 4;
#endif
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
  static V pair(V a1, V b1, V a, V b) {  // f
    return _mm512_ternarylogic_epi64(_mm512_xor_si512(a1, b1), a, b, 0xd4);
  }
  static void store(int32_t* out, V v) { _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi64_epi32(v)); }
};
#elif defined(__AVX2__)
struct Words {
  static constexpr int64_t lanes = 4;
  static constexpr int rows = 2;
  static constexpr int64_t unit = 4;
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
  static V pair(V a1, V b1, V a, V b) {
    const V differ = a ^ b;
    return (differ & a) | (~differ & (a1 ^ b1));
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
  static constexpr int64_t unit = 4;
  typedef uint64_t V;
  static V load(const uint64_t* p) { return *p; }
  static V set(uint64_t w) { return w; }
  static V add(V a, V b) { return a + b; }
  static V count(V v) { return V(__builtin_popcountll(v)); }
  static V pair(V a1, V b1, V a, V b) {
    const V differ = a ^ b;
    return (differ & a) | (~differ & (a1 ^ b1));
  }
  static void store(int32_t* out, V v) { *out = int32_t(v); }
};
#endif

constexpr int64_t binary_panel = 2 * Words::lanes;

inline int64_t binary_units(int64_t words) { return (words + Words::unit - 1) / Words::unit; }

// full adder: ones + x + y = new ones + 2 * result
inline Words::V carry(Words::V& ones, Words::V x, Words::V y) {
  const Words::V half = ones ^ x, result = (ones & x) | (half & y);
  ones = half ^ y;
  return result;
}

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

// A row, (a0, a1) as (a1, A), filled up with zeros; the last word is the count of all A. `step` is the distance of words.
inline void pack_binary(const uint64_t* source, int64_t words, uint64_t* row, int64_t step) {
  const int64_t padded = binary_units(words) * Words::unit;
  uint64_t count = 0;
  int64_t k = 0;
  for (; k + 2 <= words; k += 2) {
    const uint64_t second = source[k + 1], both = source[k] ^ second;
    row[k * step] = second;
    row[(k + 1) * step] = both;
    count += uint64_t(__builtin_popcountll(both));
  }
  if (k < words) {
    row[k * step] = 0;
    row[(k + 1) * step] = source[k];
    count += uint64_t(__builtin_popcountll(source[k]));
    k += 2;
  }
  for (; k < padded; ++k) row[k * step] = 0;
  row[padded * step] = count;
}

void pack_binary_rows(const BinaryMm& job, int64_t begin, int64_t end, uint64_t* rows) {
  const int64_t length = binary_units(job.words) * Words::unit + 1;
  for (int64_t i = begin; i < end; ++i) pack_binary(job.a + i * job.words, job.words, rows + (i - begin) * length, 1);
}

void pack_binary_panel(const BinaryMm& job, int64_t column, uint64_t* panel) {
  const int64_t length = binary_units(job.words) * Words::unit + 1;
  for (int64_t j = 0; j < binary_panel; ++j) {
    if (column + j < job.columns) {
      pack_binary(job.b + (column + j) * job.words, job.words, panel + j, binary_panel);
    } else {
      for (int64_t k = 0; k < length; ++k) panel[k * binary_panel + j] = 0;
    }
  }
}

template <int Rows, int Vectors>
inline void binary_tile(const BinaryMm& job, int64_t row, const uint64_t* rows, int64_t column, const uint64_t* panel) {
  typedef Words::V V;
  const int64_t units = binary_units(job.words), length = units * Words::unit + 1;
  V counts[Rows][Vectors], ones[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) counts[i][j] = ones[i][j] = Words::set(0);
  for (int64_t u = 0; u < units; ++u, rows += Words::unit, panel += Words::unit * binary_panel) {
    V b[Words::unit][Vectors];
    for (int k = 0; k < Words::unit; ++k)
      for (int j = 0; j < Vectors; ++j) b[k][j] = Words::load(panel + k * binary_panel + j * Words::lanes);
    for (int i = 0; i < Rows; ++i) {
      const uint64_t* a = rows + i * length;
      for (int j = 0; j < Vectors; ++j) {
        V bits = Words::pair(Words::set(a[0]), b[0][j], Words::set(a[1]), b[1][j]);
        if constexpr (Words::unit == 4)
          bits = carry(ones[i][j], bits, Words::pair(Words::set(a[2]), b[2][j], Words::set(a[3]), b[3][j]));
        counts[i][j] = Words::add(counts[i][j], Words::count(bits));
      }
    }
  }
  const int64_t width = job.columns - column;
  const bool direct = job.out_column == 1 && width >= Vectors * Words::lanes;
  for (int i = 0; i < Rows; ++i) {
    int32_t* out = job.out + (row + i) * job.out_row + column * job.out_column;
    int32_t part[binary_panel];
    for (int j = 0; j < Vectors; ++j) {
      V twice = counts[i][j];  // popcount(a xor b) = 2 f - A + B
      if constexpr (Words::unit == 4) twice = Words::add(Words::add(twice, twice), Words::count(ones[i][j]));
      twice = Words::add(twice, twice);
      const V differ = twice - Words::set(rows[i * length]) + Words::load(panel + j * Words::lanes);
      Words::store((direct ? out : part) + j * Words::lanes, Words::set(uint64_t(job.depth)) - differ - differ);
    }
    if (direct) continue;
    for (int64_t j = 0; j < Vectors * Words::lanes && j < width; ++j) out[j * job.out_column] = part[j];
  }
}

template <int Vectors>
inline void binary_tiles(const BinaryMm& job, int64_t row, int64_t end, const uint64_t* rows, int64_t column,
                         const uint64_t* panel) {
  const int64_t length = binary_units(job.words) * Words::unit + 1;
  for (; row + Words::rows <= end; row += Words::rows, rows += Words::rows * length)
    binary_tile<Words::rows, Vectors>(job, row, rows, column, panel);
  for (; row < end; ++row, rows += length) binary_tile<1, Vectors>(job, row, rows, column, panel);
}

void multiply_binary(const BinaryMm& job, int64_t begin, int64_t end, const uint64_t* rows, int64_t column,
                     const uint64_t* panel) {
  if (job.columns - column <= Words::lanes) return binary_tiles<1>(job, begin, end, rows, column, panel);
  binary_tiles<2>(job, begin, end, rows, column, panel);
}

constexpr LowmmKernels lowmm_kernels = {
    pack_signs, binary_panel, Words::unit, pack_binary_rows, pack_binary_panel, multiply_binary,
};

}  // namespace
}  // namespace lowbit

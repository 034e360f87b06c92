// Products with operands of a few bits for one instruction set; the definitions are in src/lowbit/ops/binary_mm.py and
// packed_mm.py.
#pragma once

#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

// ---- binary x binary ----------------------------------------------------------------------------------------------
//
// Winograd's inner product (1968) for bits. With d = a xor b for two words, and A = a0 xor a1, B = b0 xor b1,
//
//     d0 + d1 = 2 f - A + B        f = d1 where A = B, else A
//
// because d0 xor d1 = A xor B: where A = B the two bits are equal, elsewhere exactly one is set. So a pair of words
// costs one count instead of two, and the counts of A and of B belong to one operand each. Rows hold (a1, A) for
// (a0, a1).
//
// A lane is a column: one vector holds the same word of several columns of b, and a word of a row goes to all lanes.

#if defined(__AVX512BW__)
struct Words {
  static constexpr int64_t lanes = 8;
#if defined(__AVX512VPOPCNTDQ__)
  static constexpr int rows = 8;      // of a tile, with two vectors of columns
  static constexpr int64_t unit = 2;  // words that are counted together
#else
  static constexpr int rows = 4;
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

// A row, (a0, a1) as (a1, A), filled up with zeros; the last word is the count of all A. Words are `step` apart.
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

// ---- packed weights x float32 or int8 activations -----------------------------------------------------------------
//
// Sixteen lanes, whatever the vectors: lane l of a run of 512 bits is its l-th word of 32 bits, that is 32 / bits codes
// that follow each other. A step takes the lowest code of every word, so the order of additions in a lane is that of
// the codes; the activations are laid out to match, once per call.

constexpr int parts = 16 / int(Vec::lanes);  // vectors of a run

#if defined(__AVX512BW__)
struct Run {
  __m512i v;
  static Run load(const uint8_t* p, int64_t bytes) {
    if (bytes >= 64) return {_mm512_loadu_si512(p)};
    return {_mm512_maskz_loadu_epi32(__mmask16((1u << (bytes / 4)) - 1), p)};
  }
};
struct Table {
  __m512 v;
  explicit Table(const float* levels) : v(_mm512_loadu_ps(levels)) {}
};
template <int Bits>
inline void take(const Table& table, Run& run, Vec::F out[parts]) {
  out[0] = _mm512_permutexvar_ps(run.v, table.v);  // reads the low four bits
  run.v = _mm512_srli_epi32(run.v, Bits);
}
struct Sums {
  __m512i v;
  static Sums load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  void floats(Vec::F out[parts]) const { out[0] = _mm512_cvtepi32_ps(v); }
  void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
};
// the codes as bytes: byte i of vector j is code 8 / Bits * i + j; those of 1 bit are doubled
template <int Bits>
struct Spread {
  __m512i v[8 / Bits];
  explicit Spread(const Run& run) {
    for (int j = 0; j < 8 / Bits; ++j) {
      if (Bits == 1)
        v[j] = _mm512_and_si512(j ? _mm512_srli_epi32(run.v, j - 1) : _mm512_slli_epi32(run.v, 1), _mm512_set1_epi8(2));
      else
        v[j] = _mm512_and_si512(_mm512_srli_epi32(run.v, j * Bits), _mm512_set1_epi8((1 << Bits) - 1));
    }
  }
};
template <int Bits>
inline void dot(Sums& sums, const Spread<Bits>& codes, const int8_t* x) {
#if defined(__AVX512VNNI__)
  for (int j = 0; j < 8 / Bits; ++j) sums.v = _mm512_dpbusd_epi32(sums.v, codes.v[j], _mm512_loadu_si512(x + 64 * j));
#else
  // at most 8 * 2 * 2 * 127, 4 * 2 * 3 * 127, 2 * 2 * 15 * 127: within int16
  __m512i pairs = _mm512_maddubs_epi16(codes.v[0], _mm512_loadu_si512(x));
  for (int j = 1; j < 8 / Bits; ++j)
    pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(codes.v[j], _mm512_loadu_si512(x + 64 * j)));
  sums.v = _mm512_add_epi32(sums.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}
#elif defined(__AVX2__)
struct Run {
  __m256i v[2];
  static Run load(const uint8_t* p, int64_t bytes) {
    uint8_t whole[64] = {};
    if (bytes < 64) p = (const uint8_t*)memcpy(whole, p, size_t(bytes));
    return {{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}};
  }
};
struct Table {
  __m256 low, high;
  explicit Table(const float* levels) : low(_mm256_loadu_ps(levels)), high(_mm256_loadu_ps(levels + 8)) {}
};
template <int Bits>
inline void take(const Table& table, Run& run, Vec::F out[parts]) {
  for (int p = 0; p < 2; ++p) {
    out[p] = _mm256_permutevar8x32_ps(table.low, run.v[p]);  // reads the low three bits
    if (Bits == 4) {
      const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(run.v[p], 28));
      out[p] = _mm256_blendv_ps(out[p], _mm256_permutevar8x32_ps(table.high, run.v[p]), fourth);
    }
    run.v[p] = _mm256_srli_epi32(run.v[p], Bits);
  }
}
struct Sums {
  __m256i v[2];
  static Sums load(const int32_t* p) {
    return {{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))}};
  }
  void floats(Vec::F out[parts]) const {
    for (int p = 0; p < 2; ++p) out[p] = _mm256_cvtepi32_ps(v[p]);
  }
  void store(int32_t* p) const {
    _mm256_storeu_si256((__m256i*)p, v[0]);
    _mm256_storeu_si256((__m256i*)(p + 8), v[1]);
  }
};
template <int Bits>
struct Spread {
  __m256i v[8 / Bits][2];
  explicit Spread(const Run& run) {
    for (int j = 0; j < 8 / Bits; ++j)
      for (int p = 0; p < 2; ++p) {
        const __m256i w = run.v[p];
        if (Bits == 1)
          v[j][p] = _mm256_and_si256(j ? _mm256_srli_epi32(w, j - 1) : _mm256_slli_epi32(w, 1), _mm256_set1_epi8(2));
        else
          v[j][p] = _mm256_and_si256(_mm256_srli_epi32(w, j * Bits), _mm256_set1_epi8((1 << Bits) - 1));
      }
  }
};
template <int Bits>
inline void dot(Sums& sums, const Spread<Bits>& codes, const int8_t* x) {
  // at most 8 * 2 * 2 * 127, 4 * 2 * 3 * 127, 2 * 2 * 15 * 127: within int16
  for (int p = 0; p < 2; ++p) {
    __m256i pairs = _mm256_setzero_si256();
    for (int j = 0; j < 8 / Bits; ++j) {
      const __m256i bytes = _mm256_loadu_si256((const __m256i*)(x + 64 * j + 32 * p));
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes.v[j][p], bytes));
    }
    sums.v[p] = _mm256_add_epi32(sums.v[p], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
}
#else
struct Run {
  uint32_t v[16];
  static Run load(const uint8_t* p, int64_t bytes) {
    Run run = {};
    memcpy(run.v, p, bytes < 64 ? size_t(bytes) : 64);
    return run;
  }
};
struct Table {
  const float* v;
  explicit Table(const float* levels) : v(levels) {}
};
template <int Bits>
inline void take(const Table& table, Run& run, Vec::F out[parts]) {
  for (int l = 0; l < 16; ++l) {
    out[l / Vec::lanes][l % Vec::lanes] = table.v[run.v[l] & 15];
    run.v[l] >>= Bits;
  }
}
struct Sums {
  int32_t v[16];
  static Sums load(const int32_t* p) {
    Sums sums;
    memcpy(sums.v, p, sizeof sums.v);
    return sums;
  }
  void floats(Vec::F out[parts]) const {
    for (int l = 0; l < 16; ++l) out[l / Vec::lanes][l % Vec::lanes] = float(v[l]);
  }
  void store(int32_t* p) const { memcpy(p, v, sizeof v); }
};
template <int Bits>
struct Spread {
  int8_t v[8 / Bits][64];
  explicit Spread(const Run& run) {
    for (int j = 0; j < 8 / Bits; ++j)
      for (int i = 0; i < 64; ++i) {
        const int code = int(run.v[i / 4] >> (i % 4 * 8 + j * Bits)) & ((1 << Bits) - 1);
        v[j][i] = int8_t(Bits == 1 ? 2 * code : code);
      }
  }
};
template <int Bits>
inline void dot(Sums& sums, const Spread<Bits>& codes, const int8_t* x) {
  for (int j = 0; j < 8 / Bits; ++j)
    for (int i = 0; i < 64; ++i) sums.v[i / 4] += codes.v[j][i] * x[64 * j + i];
}
#endif

inline int32_t float_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// NaNs have no payload
inline float plain_nan(float x) { return x == x ? x : __builtin_nanf(""); }

void fill_floats(const PackedMm& job, const float* x, float* out) {
  const int64_t codes = 32 / job.bits, whole = job.depth / (16 * codes);
  for (int64_t r = 0; r < job.runs; ++r)
    for (int64_t i = 0; i < codes; ++i)
      for (int64_t l = 0; l < 16; ++l) {
        const int64_t k = (16 * r + l) * codes + i;
        *out++ = r < whole || k < job.depth ? x[k] : 0.0f;
      }
}

// scale = max(max |x| / 127, 2^-126), code = x / scale to nearest even; NaN as scale where x is not finite
void fill_codes(const PackedMm& job, const float* x, int64_t offset, int8_t* scratch, int8_t* codes, int32_t* base,
                float* scale) {
  const int64_t per_byte = 8 / job.bits, per_lane = 4 * per_byte, per_run = 16 * per_lane;
  int32_t most = 0;
  for (int64_t k = 0; k < job.depth; ++k) {
    const int32_t magnitude = float_bits(x[k]) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  memset(scratch, 0, size_t(job.runs * per_run));
  if (most >= 0x7f800000) {
    *scale = __builtin_nanf("");
  } else {
    float largest;
    memcpy(&largest, &most, sizeof largest);
    const float step = largest / 127.0f, lowest = 0x1p-126f, s = step < lowest ? lowest : step;
    constexpr float magic = 0x1.8p23f;  // adding it rounds to whole numbers
    for (int64_t k = 0; k < job.depth; ++k) scratch[k] = int8_t(float_bits(x[k] / s + magic) - float_bits(magic));
    *scale = s;
  }
  for (int64_t r = 0; r < job.runs; ++r)
    for (int64_t j = 0; j < per_byte; ++j)
      for (int64_t i = 0; i < 64; ++i) *codes++ = scratch[r * per_run + i * per_byte + j];
  for (int64_t r = 0; r < job.runs; ++r) {
    int32_t* sums = base + r / job.segment * 16;
    if (r % job.segment == 0) memset(sums, 0, 16 * sizeof *sums);
    for (int64_t l = 0; l < 16; ++l) {
      int32_t sum = 0;
      for (int64_t i = 0; i < per_lane; ++i) sum += *scratch++;
      sums[l] -= int32_t(offset) * sum;
    }
  }
}

// 16 lanes to one: 8 + 8, 4 + 4, ...
inline float across(const Vec::F v[parts]) {
  float lanes[16];
  for (int p = 0; p < parts; ++p) Vec::store(lanes + p * Vec::lanes, v[p]);
  for (int half = 8; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// The scales of the lanes of a segment; their places rise from lane to lane.
inline void lane_scales(const PackedMm& job, const float* scale, int64_t segment, Vec::F out[parts]) {
  const int32_t* lane = job.lane + 16 * segment;
  if (lane[0] == lane[15]) {
    for (int p = 0; p < parts; ++p) out[p] = Vec::set(scale[lane[0]]);
    return;
  }
#if defined(__AVX512F__)
  const __mmask16 there = __mmask16((2u << (lane[15] - lane[0])) - 1);
  const __m512i place = _mm512_sub_epi32(_mm512_loadu_si512(lane), _mm512_set1_epi32(lane[0]));
  out[0] = _mm512_permutexvar_ps(place, _mm512_maskz_loadu_ps(there, scale + lane[0]));
#else
  float scales[16];
  for (int l = 0; l < 16; ++l) scales[l] = scale[lane[l]];
  for (int p = 0; p < parts; ++p) out[p] = Vec::load(scales + p * Vec::lanes);
#endif
}

template <int Bits, int Columns, int Rows>
inline void floats_tile(const PackedMm& job, int64_t column, int64_t row) {
  constexpr int steps = 32 / Bits;
  const Table table(job.levels);
  const int64_t ahead = Columns * job.weight_bytes;  // the next tile's row: rows end before prefetchers get going
  const uint8_t* weight[Columns];
  for (int n = 0; n < Columns; ++n) weight[n] = job.weight + (column + n) * job.weight_bytes;
  const float* x = job.x + row * job.runs * steps * 16;
  Vec::F total[Columns][Rows][parts], sum[Columns][Rows][parts];
  for (int n = 0; n < Columns; ++n)
    for (int m = 0; m < Rows; ++m)
      for (int p = 0; p < parts; ++p) total[n][m][p] = Vec::set(0.0f);
  for (int64_t r = 0; r < job.runs;) {
    const int64_t segment = r / job.segment;
    for (int n = 0; n < Columns; ++n)
      for (int m = 0; m < Rows; ++m)
        for (int p = 0; p < parts; ++p) sum[n][m][p] = Vec::set(0.0f);
    for (const int64_t end = r + job.segment < job.runs ? r + job.segment : job.runs; r < end; ++r) {
      Run run[Columns];
      for (int n = 0; n < Columns; ++n) {
        run[n] = Run::load(weight[n] + 64 * r, job.weight_bytes - 64 * r);
        __builtin_prefetch(weight[n] + 64 * r + ahead);
      }
      for (int i = 0; i < steps; ++i) {
        Vec::F value[Columns][parts];
        for (int n = 0; n < Columns; ++n) take<Bits>(table, run[n], value[n]);
        for (int m = 0; m < Rows; ++m)
          for (int p = 0; p < parts; ++p) {
            const Vec::F a = Vec::load(x + ((m * job.runs + r) * steps + i) * 16 + p * Vec::lanes);
            for (int n = 0; n < Columns; ++n) sum[n][m][p] = Vec::add(sum[n][m][p], Vec::mul(value[n][p], a));
          }
      }
    }
    if (job.lane)
      for (int n = 0; n < Columns; ++n) {
        Vec::F scale[parts];
        lane_scales(job, job.scale + (column + n) * job.groups, segment, scale);
        for (int m = 0; m < Rows; ++m)
          for (int p = 0; p < parts; ++p)
            total[n][m][p] = Vec::add(total[n][m][p], Vec::mul(scale[p], sum[n][m][p]));
      }
  }
  for (int n = 0; n < Columns; ++n)
    for (int m = 0; m < Rows; ++m) {
      const float y = job.lane ? across(total[n][m]) : across(sum[n][m]) * job.scale[column + n];
      job.out[(row + m) * job.columns + column + n] = plain_nan(y);
    }
}

template <int Bits, int Columns, int Rows>
inline void codes_tile(const PackedMm& job, int64_t column, int64_t row) {
  constexpr int64_t run_bytes = 64 * (8 / Bits);
  const int64_t segments = (job.runs + job.segment - 1) / job.segment;
  const int64_t ahead = Columns * job.weight_bytes;  // the next tile's row: rows end before prefetchers get going
  const uint8_t* weight[Columns];
  for (int n = 0; n < Columns; ++n) weight[n] = job.weight + (column + n) * job.weight_bytes;
  const int8_t* x = job.codes + row * job.runs * run_bytes;
  Vec::F total[Columns][Rows][parts];
  Sums sum[Columns][Rows];
  for (int n = 0; n < Columns; ++n)
    for (int m = 0; m < Rows; ++m)
      for (int p = 0; p < parts; ++p) total[n][m][p] = Vec::set(0.0f);
  for (int64_t r = 0; r < job.runs;) {
    const int64_t segment = r / job.segment;
    for (int m = 0; m < Rows; ++m)
      for (int n = 0; n < Columns; ++n) sum[n][m] = Sums::load(job.base + ((row + m) * segments + segment) * 16);
    for (const int64_t end = r + job.segment < job.runs ? r + job.segment : job.runs; r < end; ++r)
      for (int n = 0; n < Columns; ++n) {
        const Spread<Bits> codes(Run::load(weight[n] + 64 * r, job.weight_bytes - 64 * r));
        __builtin_prefetch(weight[n] + 64 * r + ahead);
        for (int m = 0; m < Rows; ++m) dot<Bits>(sum[n][m], codes, x + (m * job.runs + r) * run_bytes);
      }
    if (job.lane)
      for (int n = 0; n < Columns; ++n) {
        Vec::F scale[parts], floats[parts];
        lane_scales(job, job.scale + (column + n) * job.groups, segment, scale);
        for (int m = 0; m < Rows; ++m) {
          sum[n][m].floats(floats);
          for (int p = 0; p < parts; ++p) total[n][m][p] = Vec::add(total[n][m][p], Vec::mul(scale[p], floats[p]));
        }
      }
  }
  for (int n = 0; n < Columns; ++n)
    for (int m = 0; m < Rows; ++m) {
      float y;
      if (job.lane) {
        y = across(total[n][m]);
      } else {
        int32_t lanes[16], whole = 0;
        sum[n][m].store(lanes);
        for (int l = 0; l < 16; ++l) whole += lanes[l];
        y = float(whole) * job.scale[column + n];
      }
      job.out[(row + m) * job.columns + column + n] = plain_nan(y * job.code_scale[row + m]);
    }
}

constexpr int64_t packed_row_block = 32;  // rows of activations that stay in a cache while the weights pass

#define LOWBIT_PACKED_MM(name)                                                                        \
  template <int Bits, int Columns>                                                                    \
  inline void name##_columns(const PackedMm& job, int64_t column, int64_t row, int64_t end) {         \
    for (; row + 4 <= end; row += 4) name##_tile<Bits, Columns, 4>(job, column, row);                 \
    for (; row + 2 <= end; row += 2) name##_tile<Bits, Columns, 2>(job, column, row);                 \
    if (row < end) name##_tile<Bits, Columns, 1>(job, column, row);                                   \
  }                                                                                                   \
  template <int Bits>                                                                                 \
  void name##_of_bits(const PackedMm& job, int64_t begin, int64_t end) {                              \
    for (int64_t row = 0; row < job.rows; row += packed_row_block) {                                  \
      const int64_t row_end = row + packed_row_block < job.rows ? row + packed_row_block : job.rows;  \
      int64_t column = begin;                                                                         \
      for (; column + 2 <= end; column += 2) name##_columns<Bits, 2>(job, column, row, row_end);      \
      if (column < end) name##_columns<Bits, 1>(job, column, row, row_end);                           \
    }                                                                                                 \
  }                                                                                                   \
  void multiply_##name(const PackedMm& job, int64_t begin, int64_t end) {                             \
    if (job.bits == 1) return name##_of_bits<1>(job, begin, end);                                     \
    if (job.bits == 2) return name##_of_bits<2>(job, begin, end);                                     \
    name##_of_bits<4>(job, begin, end);                                                               \
  }
LOWBIT_PACKED_MM(floats)
LOWBIT_PACKED_MM(codes)
#undef LOWBIT_PACKED_MM

constexpr LowmmKernels lowmm_kernels = {
    pack_signs,      binary_panel, Words::unit, pack_binary_rows, pack_binary_panel,
    multiply_binary, fill_floats,  fill_codes,  multiply_floats,  multiply_codes,
};

}  // namespace
}  // namespace lowbit

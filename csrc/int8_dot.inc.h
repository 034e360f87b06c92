// One step of an int8 product, for one instruction set: sums += left (4 codes) . right (4 codes of each column).
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#include <stdint.h>
#include <string.h>

namespace lowbit {
namespace {

#if defined(__AVX512VNNI__)

struct Dot {
  // The left codes of vpdpbusd are unsigned. The matrix unit, which does nearly all of the work where there is one, takes
  // signed ones, and they are flipped here.
#if defined(__AMX_INT8__)
  static constexpr uint8_t flip = 0;
  static constexpr int64_t matrix_steps = 16;  // segments of whole such pieces go to the matrix unit, without correction
#else
  static constexpr uint8_t flip = 0x80;
#endif
  static constexpr int64_t lanes = 16;
  static constexpr int most_rows = 12, most_panels = 2, most_rows_narrow = 24;  // 24 sums; with more, GCC spills
  typedef __m512i Sums;
  typedef __m512i Left;
  typedef __m512i Right;
  static Sums zero() { return _mm512_setzero_si512(); }
  static Sums load_sums(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_sums(int32_t* p, Sums v) { _mm512_storeu_si512(p, v); }
  static Sums plus(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
  static __m512 real(Sums v) { return _mm512_cvtepi32_ps(v); }
  static Left left(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    const __m512i codes = _mm512_set1_epi32(word);
    return flip != 0 ? codes : _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
  }
  static Right right(const int8_t* p) { return _mm512_loadu_si512(p); }
  static Sums add(Sums sums, Left a, Right b) { return _mm512_dpbusd_epi32(sums, a, b); }
  // -128 * the sum of each column of a panel
  static void correct(const int8_t* packed, int64_t steps, int32_t* correction) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sums[4] = {zero(), zero(), zero(), zero()};
    int64_t k = 0;
    for (; k + 4 <= steps; k += 4)
      for (int i = 0; i < 4; ++i) sums[i] = add(sums[i], ones, right(packed + (k + i) * 64));
    for (; k < steps; ++k) sums[0] = add(sums[0], ones, right(packed + k * 64));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
    store_sums(correction, _mm512_sub_epi32(zero(), _mm512_slli_epi32(sum, 7)));
  }
};

#else

// Signed codes, as pairs of 16-bit numbers: bytes 0 and 2 of a word, and bytes 1 and 3.
struct DotOfPairs {
  static constexpr uint8_t flip = 0;
  static void correct(const int8_t*, int64_t, int32_t* correction) { memset(correction, 0, int8_panel * 4); }
};

#if defined(__AVX512BW__)

struct Dot : DotOfPairs {
  static constexpr int64_t lanes = 16;
  static constexpr int most_rows = 8, most_panels = 2, most_rows_narrow = 8;
  typedef __m512i Sums;
  struct Left { __m512i even, odd; };
  typedef Left Right;
  static Sums load_sums(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_sums(int32_t* p, Sums v) { _mm512_storeu_si512(p, v); }
  static Sums plus(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
  static __m512 real(Sums v) { return _mm512_cvtepi32_ps(v); }
  static Left split(__m512i v) { return {_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8), _mm512_srai_epi16(v, 8)}; }
  static Left left(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return split(_mm512_set1_epi32(word));
  }
  static Right right(const int8_t* p) { return split(_mm512_loadu_si512(p)); }
  static Sums add(Sums sums, const Left& a, const Right& b) {
    const __m512i pairs = _mm512_add_epi32(_mm512_madd_epi16(a.even, b.even), _mm512_madd_epi16(a.odd, b.odd));
    return _mm512_add_epi32(sums, pairs);
  }
};

#elif defined(__AVX2__)

struct Dot : DotOfPairs {
  static constexpr int64_t lanes = 8;
  static constexpr int most_rows = 4, most_panels = 1, most_rows_narrow = 4;
  typedef __m256i Sums;
  struct Left { __m256i even, odd; };
  typedef Left Right;
  static Sums load_sums(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static void store_sums(int32_t* p, Sums v) { _mm256_storeu_si256((__m256i*)p, v); }
  static Sums plus(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
  static __m256 real(Sums v) { return _mm256_cvtepi32_ps(v); }
  static Left split(__m256i v) { return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)}; }
  static Left left(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return split(_mm256_set1_epi32(word));
  }
  static Right right(const int8_t* p) { return split(_mm256_loadu_si256((const __m256i*)p)); }
  static Sums add(Sums sums, const Left& a, const Right& b) {
    const __m256i pairs = _mm256_add_epi32(_mm256_madd_epi16(a.even, b.even), _mm256_madd_epi16(a.odd, b.odd));
    return _mm256_add_epi32(sums, pairs);
  }
};

#elif defined(__SSE2__)

struct Dot : DotOfPairs {
  static constexpr int64_t lanes = 4;
  static constexpr int most_rows = 2, most_panels = 1, most_rows_narrow = 2;
  typedef __m128i Sums;
  struct Left { __m128i even, odd; };
  typedef Left Right;
  static Sums load_sums(const int32_t* p) { return _mm_loadu_si128((const __m128i*)p); }
  static void store_sums(int32_t* p, Sums v) { _mm_storeu_si128((__m128i*)p, v); }
  static Sums plus(Sums a, Sums b) { return _mm_add_epi32(a, b); }
  static Vec::F real(Sums v) { return (Vec::F)_mm_cvtepi32_ps(v); }
  static Left split(__m128i v) { return {_mm_srai_epi16(_mm_slli_epi16(v, 8), 8), _mm_srai_epi16(v, 8)}; }
  static Left left(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return split(_mm_set1_epi32(word));
  }
  static Right right(const int8_t* p) { return split(_mm_loadu_si128((const __m128i*)p)); }
  static Sums add(Sums sums, const Left& a, const Right& b) {
    const __m128i pairs = _mm_add_epi32(_mm_madd_epi16(a.even, b.even), _mm_madd_epi16(a.odd, b.odd));
    return _mm_add_epi32(sums, pairs);
  }
};

#else

struct Dot : DotOfPairs {
  static constexpr int64_t lanes = 4;
  static constexpr int most_rows = 2, most_panels = 1, most_rows_narrow = 2;
  typedef Vec::I Sums;
  struct Left { int8_t code[4]; };
  struct Right { int8_t code[4][4]; };  // (column, k)
  static Sums load_sums(const int32_t* p) { Sums v; memcpy(&v, p, sizeof v); return v; }
  static void store_sums(int32_t* p, Sums v) { memcpy(p, &v, sizeof v); }
  static Sums plus(Sums a, Sums b) { return a + b; }  // without flip no sum overflows
  static Vec::F real(Sums v) { return __builtin_convertvector(v, Vec::F); }
  static Left left(const uint8_t* p) { Left v; memcpy(&v, p, sizeof v); return v; }
  static Right right(const int8_t* p) { Right v; memcpy(&v, p, sizeof v); return v; }
  static Sums add(Sums sums, const Left& a, const Right& b) {
    for (int j = 0; j < 4; ++j)
      for (int k = 0; k < 4; ++k) sums[j] += int32_t(a.code[k]) * b.code[j][k];
    return sums;
  }
};

#endif
#endif

static_assert(Dot::lanes == Vec::lanes, "sums become vectors of float32");

}  // namespace
}  // namespace lowbit

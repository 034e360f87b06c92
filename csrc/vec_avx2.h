// Vectors of eight float32 for x86 with AVX2.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace lowbit {
namespace {

struct Vec {
  static constexpr int64_t lanes = 8;
  typedef __m256 F;
  struct I { __m256i v; };

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static I set(int32_t x) { return {_mm256_set1_epi32(x)}; }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static I add(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
  static I sub(I a, I b) { return {_mm256_sub_epi32(a.v, b.v)}; }
  static I bit_and(I a, I b) { return {_mm256_and_si256(a.v, b.v)}; }
  static I shift_right(I a, int32_t n) { return {_mm256_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
  static I larger(I a, I b) { return {_mm256_max_epi32(a.v, b.v)}; }
  // |x| cut at `limit`; min and max give their second operand where one is NaN, so NaN stays NaN
  static F clamp(F x, F limit) {
    return _mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), limit), _mm256_min_ps(limit, x));
  }
  static F where_less(I a, I b, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v)));
  }
  static F nan_or(F test, F no) {
    return _mm256_blendv_ps(no, as_float(set(int32_t(0x7fc00000))), _mm256_cmp_ps(test, test, _CMP_UNORD_Q));
  }
  static I as_int(F v) { return {_mm256_castps_si256(v)}; }
  static F as_float(I v) { return _mm256_castsi256_ps(v.v); }

  // Philox words of four counters, one per 64-bit lane; the high halves may hold anything
  struct Words {
    __m256i v;
    static constexpr int64_t counters = 4;
    static constexpr int together = 2;  // vectors that Philox keeps in registers
    static Words set(uint64_t x) { return {_mm256_set1_epi64x((long long)x)}; }
    // in the order in which `store_top` takes them
    static Words range(uint64_t first) {
      return {_mm256_add_epi64(_mm256_set1_epi64x((long long)first), _mm256_setr_epi64x(0, 2, 1, 3))};
    }
    static Words load(const uint32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
    void store(uint64_t* p) const { _mm256_storeu_si256((__m256i*)p, v); }
    static Words add(Words a, Words b) { return {_mm256_add_epi64(a.v, b.v)}; }
    static Words add_halves(Words a, Words b) { return {_mm256_add_epi32(a.v, b.v)}; }
    static Words product(Words a, Words b) { return {_mm256_mul_epu32(a.v, b.v)}; }
    static Words high(Words a) { return {_mm256_srli_epi64(a.v, 32)}; }
    static Words exclusive_or(Words a, Words b) { return {_mm256_xor_si256(a.v, b.v)}; }
    static Words exclusive_or(Words a, Words b, Words c) { return exclusive_or(exclusive_or(a, b), c); }
    // the low word of `product` becomes the high one, and its high word, exclusive or both others, the low one
    static Words pair(Words product, Words b, Words c) {
      return {_mm256_blend_epi32(exclusive_or(high(product), b, c).v, _mm256_slli_epi64(product.v, 32), 0xaa)};
    }
    // the top 24 bits of pairs of words 0 and 1, and 2 and 3, in the order of the elements
    template <bool units>
    static void store_top(float* out, Words low, Words high) {
      _mm256_storeu_ps(out, top<units>(_mm256_unpacklo_epi64(low.v, high.v)));
      _mm256_storeu_ps(out + 8, top<units>(_mm256_unpackhi_epi64(low.v, high.v)));
    }
   private:
    // as whole numbers, or as the uniforms that these are in units of 2^-24
    template <bool units>
    static F top(__m256i words) {
      const F x = _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 8));
      return units ? x : _mm256_mul_ps(x, _mm256_set1_ps(0x1p-24f));
    }
  };
};

}  // namespace
}  // namespace lowbit

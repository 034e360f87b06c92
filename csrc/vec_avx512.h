// Vectors of sixteen float32 for x86 with AVX-512 F.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace lowbit {
namespace {

struct Vec {
  static constexpr int64_t lanes = 16;
  typedef __m512 F;
  struct I { __m512i v; };

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static I set(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static I add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
  static I sub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
  static I bit_and(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
  static I shift_right(I a, int32_t n) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
  static I larger(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
  // |x| cut at `limit`; min and max give their second operand where one is NaN, so NaN stays NaN
  static F clamp(F x, F limit) {
    return _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), limit), _mm512_min_ps(limit, x));
  }
  static F where_less(I a, I b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(a.v, b.v), no, yes);
  }
  static F nan_or(F test, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(test, test, _CMP_UNORD_Q), no, as_float(set(int32_t(0x7fc00000))));
  }
  static I as_int(F v) { return {_mm512_castps_si512(v)}; }
  static F as_float(I v) { return _mm512_castsi512_ps(v.v); }

  // Philox words of eight counters, one per 64-bit lane; the high halves may hold anything
  struct Words {
    __m512i v;
    static constexpr int64_t counters = 8;
    static constexpr int together = 4;  // vectors that Philox keeps in registers
    static Words set(uint64_t x) { return {_mm512_set1_epi64((long long)x)}; }
    // in the order in which `store_top` takes them
    static Words range(uint64_t first) {
      return {_mm512_add_epi64(_mm512_set1_epi64((long long)first), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7))};
    }
    static Words load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
    void store(uint64_t* p) const { _mm512_storeu_si512(p, v); }
    static Words add(Words a, Words b) { return {_mm512_add_epi64(a.v, b.v)}; }
    static Words add_halves(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
    static Words product(Words a, Words b) { return {_mm512_mul_epu32(a.v, b.v)}; }
    // not a shift: those wait for the port of the products
    static Words high(Words a) { return {_mm512_shuffle_epi32(a.v, _MM_PERM_DDBB)}; }
    static Words exclusive_or(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
    static Words exclusive_or(Words a, Words b, Words c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
    // the low word of `product` becomes the high one, and its high word, exclusive or both others, the low one
    static Words pair(Words product, Words b, Words c) {
      const __m512i swapped = _mm512_shuffle_epi32(product.v, _MM_PERM_CDAB);
      return {_mm512_mask_ternarylogic_epi32(swapped, 0x5555, b.v, c.v, 0x96)};
    }
    // the top 24 bits of pairs of words 0 and 1, and 2 and 3, in the order of the elements
    template <bool units>
    static void store_top(float* out, Words low, Words high) {
      _mm512_storeu_ps(out, top<units>(_mm512_unpacklo_epi64(low.v, high.v)));
      _mm512_storeu_ps(out + 16, top<units>(_mm512_unpackhi_epi64(low.v, high.v)));
    }
    // as whole numbers, or as the uniforms that these are in units of 2^-24
    template <bool units>
    static F top(__m512i words) {
      const F x = _mm512_cvtepi32_ps(_mm512_srli_epi32(words, 8));
      return units ? x : _mm512_mul_ps(x, _mm512_set1_ps(0x1p-24f));
    }
  };
};

}  // namespace
}  // namespace lowbit

// lowbit::cast: t = (x - offset) / scale + zero, rounded to the grid, back to (grid - zero) * step + offset. Every
// operation is rounded by itself, as in the definition.
//
// The rounding rules are written once, for lanes of float: sixteen with AVX-512, otherwise one at a time.
#pragma once

#include <string.h>

namespace lowbit {
namespace {

#if defined(__AVX512F__)
struct Lanes {
  static constexpr int64_t count = 16;
  typedef __m512 F;
  struct I { __m512i v; };
  typedef __mmask16 Mask;

  static Mask first(int64_t n) { return Mask((1u << n) - 1); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const float* p, Mask k) { return _mm512_maskz_loadu_ps(k, p); }
  static F load(const uint16_t* p) { return widened(_mm256_loadu_si256((const __m256i*)p)); }
  static F load(const uint16_t* p, Mask k) { return widened(_mm256_maskz_loadu_epi16(k, p)); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void store(float* p, F v, Mask k) { _mm512_mask_storeu_ps(p, k, v); }
  // integers in [-128, 127], NaN is 0
  static void store(int8_t* p, F v) { _mm_storeu_si128((__m128i*)p, bytes(v)); }
  static void store(int8_t* p, F v, Mask k) { _mm_mask_storeu_epi8(p, k, bytes(v)); }
  // numbers of less than 2^31 to the nearest integers, ties to even
  static I nearest(F t) { return {_mm512_cvtps_epi32(t)}; }
  // to the integers that `stochastic` gives, with uniforms in these units
  static I drawn(F t, F u, F unit) {
    const F less = _mm512_fnmadd_round_ps(u, unit, t, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    return {_mm512_cvt_roundps_epi32(less, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC)};
  }
  static void store_codes(int8_t* p, I x, int8_t low, int8_t high) {
    _mm_storeu_si128((__m128i*)p, within(_mm512_cvtsepi32_epi8(x.v), low, high));
  }
  static void store_codes(int8_t* p, I x, int8_t low, int8_t high, Mask k) {
    _mm_mask_storeu_epi8(p, k, within(_mm512_cvtsepi32_epi8(x.v), low, high));
  }
  static void store_codes(int8_t* p, const I (&x)[4], int8_t low, int8_t high) {
    // of each 128 bits, packing joins those of one vector with those of another
    const __m512i mixed =
        _mm512_packs_epi16(_mm512_packs_epi32(x[0].v, x[1].v), _mm512_packs_epi32(x[2].v, x[3].v));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i above = _mm512_max_epi8(_mm512_permutexvar_epi32(order, mixed), _mm512_set1_epi8(low));
    _mm512_storeu_si512(p, _mm512_min_epi8(above, _mm512_set1_epi8(high)));
  }
  static F quotient(F x, F scale, F inverse) {  // x / scale: see `Encoder`
    F q = _mm512_mul_ps(x, inverse);
    q = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, scale, x), inverse, q);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(q, scale, x), inverse, q);
  }
  static F set(float x) { return _mm512_set1_ps(x); }
  static I set(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static F floor(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  // the ceiling of x - u: as no integer lies between, also of x - u rounded upward
  static F stochastic(F x, F u) {
    const F less = _mm512_sub_round_ps(x, u, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    return _mm512_roundscale_ps(less, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  }
  static F truncate(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
  static F half_even(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F smaller(F a, F b) { return _mm512_min_ps(a, b); }  // b where one is NaN
  static F larger(F a, F b) { return _mm512_max_ps(a, b); }   // b where one is NaN
  static Mask less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static Mask equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static Mask is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  static Mask odd(I a, I bit) { return _mm512_test_epi32_mask(a.v, bit.v); }
  static Mask both(Mask a, Mask b) { return a & b; }
  static Mask either(Mask a, Mask b) { return a | b; }
  static F where(Mask k, F yes, F no) { return _mm512_mask_blend_ps(k, no, yes); }
  static F copysign(F size, F sign) {
    const __m512i bit = _mm512_set1_epi32(INT32_MIN);
    return real({_mm512_ternarylogic_epi32(bit, bits(sign).v, bits(size).v, 0xca)});
  }
  static F abs(F x) { return real({_mm512_and_si512(bits(x).v, _mm512_set1_epi32(INT32_MAX))}); }
  static I bits(F x) { return {_mm512_castps_si512(x)}; }
  static F real(I x) { return _mm512_castsi512_ps(x.v); }
  static I whole(F x) { return {_mm512_cvttps_epi32(x)}; }
  static I add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
  static I sub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
  static I bit_and(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
  static I larger(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
  static I add_where(Mask k, I a, I b) { return {_mm512_mask_add_epi32(a.v, k, a.v, b.v)}; }
  static float largest(F x) { return _mm512_reduce_max_ps(x); }
  static float smallest(F x) { return _mm512_reduce_min_ps(x); }
  static int32_t largest(I x) { return _mm512_reduce_max_epi32(x.v); }
  static bool any(Mask k) { return k != 0; }

  // a table in registers where it has 16 or 32 entries
  template <int64_t entries>
  struct Table {
    const float* p;
    explicit Table(const float* table) : p(table) {}
    F operator[](I i) const { return _mm512_i32gather_ps(i.v, p, 4); }
  };

 private:
  static F widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  static __m128i within(__m128i x, int8_t low, int8_t high) {
    return _mm_min_epi8(_mm_max_epi8(x, _mm_set1_epi8(low)), _mm_set1_epi8(high));
  }
  static __m128i bytes(F v) {
    return _mm512_cvtsepi32_epi8(_mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v));
  }
};
template <>
struct Lanes::Table<16> {
  F a;
  explicit Table(const float* table) : a(load(table)) {}
  F operator[](I i) const { return _mm512_permutexvar_ps(i.v, a); }
};
template <>
struct Lanes::Table<32> {
  F a, b;
  explicit Table(const float* table) : a(load(table)), b(load(table + 16)) {}
  F operator[](I i) const { return _mm512_permutex2var_ps(a, i.v, b); }
};
#else
struct Lanes {
  static constexpr int64_t count = 1;
  typedef float F;
  typedef int32_t I;
  typedef bool Mask;

  static Mask first(int64_t) { return true; }
  static F load(const float* p) { return *p; }
  static F load(const float* p, Mask) { return *p; }
  static F load(const uint16_t* p) { return real(I(uint32_t(*p) << 16)); }
  static F load(const uint16_t* p, Mask) { return load(p); }
  static void store(float* p, F v) { *p = v; }
  static void store(float* p, F v, Mask) { *p = v; }
  static void store(int8_t* p, F v) { *p = v == v ? int8_t(v) : int8_t(0); }
  static void store(int8_t* p, F v, Mask) { store(p, v); }
  static I nearest(F t) { return I(half_even(t)); }
  static I drawn(F t, F u, F unit) { return I(stochastic(t, u * unit)); }
  static void store_codes(int8_t* p, I x, int8_t low, int8_t high) {
    *p = int8_t(x < low ? low : x > high ? high : x);
  }
  static void store_codes(int8_t* p, I x, int8_t low, int8_t high, Mask) { store_codes(p, x, low, high); }
  static F quotient(F x, F scale, F) { return x / scale; }
  static F set(float x) { return x; }
  static I set(int32_t x) { return x; }
  static F floor(F x) { return __builtin_floorf(x); }
  static F stochastic(F x, F u) { return F(__builtin_ceil(double(x) - double(u))); }
  static F truncate(F x) { return __builtin_truncf(x); }
  static F half_even(F x) { return __builtin_rintf(x); }
  static F smaller(F a, F b) { return a < b ? a : b; }
  static F larger(F a, F b) { return a > b ? a : b; }
  static Mask less(F a, F b) { return a < b; }
  static Mask at_least(F a, F b) { return a >= b; }
  static Mask equal(F a, F b) { return a == b; }
  static Mask is_nan(F a) { return a != a; }
  static Mask odd(I a, I bit) { return (a & bit) != 0; }
  static Mask both(Mask a, Mask b) { return a && b; }
  static Mask either(Mask a, Mask b) { return a || b; }
  static F where(Mask k, F yes, F no) { return k ? yes : no; }
  static F copysign(F size, F sign) { return __builtin_copysignf(size, sign); }
  static F abs(F x) { return __builtin_fabsf(x); }
  static I bits(F x) { I i; memcpy(&i, &x, sizeof i); return i; }
  static F real(I i) { F x; memcpy(&x, &i, sizeof x); return x; }
  static I whole(F x) { return x == x ? I(x) : 0; }
  static I add(I a, I b) { return I(uint32_t(a) + uint32_t(b)); }
  static I sub(I a, I b) { return I(uint32_t(a) - uint32_t(b)); }
  static I bit_and(I a, I b) { return a & b; }
  static I larger(I a, I b) { return a > b ? a : b; }
  static I add_where(Mask k, I a, I b) { return k ? a + b : a; }
  static float largest(F x) { return x; }
  static float smallest(F x) { return x; }
  static int32_t largest(I x) { return x; }
  static bool any(Mask k) { return k; }

  template <int64_t entries>
  struct Table {
    const float* p;
    explicit Table(const float* table) : p(table) {}
    F operator[](I i) const { return p[i]; }
  };
};
#endif

// ---- rounding rules: t in grid units, u uniform ---------------------------------------------------------------------

using LaneF = Lanes::F;
using LaneI = Lanes::I;

constexpr int32_t exponent_bits = 0x7f800000;

inline LaneF cut(LaneF x, LaneF low, LaneF high) { return Lanes::smaller(high, Lanes::larger(low, x)); }  // keeps NaN

template <CastRounding rounding>
inline LaneF round_whole(LaneF t, LaneF u) {
  using L = Lanes;
  const LaneF one = L::set(1.0f), none = L::set(0.0f), half = L::set(0.5f);
  if constexpr (rounding == CastRounding::half_even) return L::half_even(t);
  if constexpr (rounding == CastRounding::floor) return L::floor(t);
  if constexpr (rounding == CastRounding::truncate) return L::truncate(t);
  if constexpr (rounding == CastRounding::stochastic) return L::stochastic(t, u);
  const LaneF whole = L::truncate(t), rest = t - whole;
  const auto up = rounding == CastRounding::half_down ? L::less(half, rest) : L::at_least(rest, half);
  const auto down = rounding == CastRounding::half_up ? L::less(rest, L::set(-0.5f)) : L::at_least(L::set(-0.5f), rest);
  return whole + L::where(up, one, none) - L::where(down, one, none);
}

template <CastRounding rounding>
struct RoundInteger {
  static constexpr bool stochastic = rounding == CastRounding::stochastic;
  LaneF low, high, up, down;
  explicit RoundInteger(const CastFormat& f)
      : low(Lanes::set(f.low)), high(Lanes::set(f.high)), up(Lanes::set(f.up)), down(Lanes::set(f.down)) {}
  LaneF operator()(LaneF t, LaneF u) const {
    return (round_whole<rounding>(cut(t * up, low, high), u) + Lanes::set(0.0f)) * down;  // -0 becomes +0
  }
};

// between the odd integers low and low + 2
template <CastRounding rounding>
struct RoundEven {
  static constexpr bool stochastic = rounding == CastRounding::stochastic;
  LaneF low, high;
  explicit RoundEven(const CastFormat& f) : low(Lanes::set(f.low)), high(Lanes::set(f.high)) {}
  LaneF operator()(LaneF t, LaneF u) const {
    using L = Lanes;
    const LaneF one = L::set(1.0f), two = L::set(2.0f), half = L::set(0.5f), none = L::set(0.0f);
    const LaneF x = cut(t, low, high);
    const LaneF below = two * L::floor((L::floor(x) - one) * half) + one, above = below + two, middle = below + one;
    LaneF y;
    if constexpr (rounding == CastRounding::stochastic) {
      y = L::where(L::less(u, (x - below) * half), above, below);
    } else if constexpr (rounding == CastRounding::floor) {
      y = L::where(L::at_least(x, above), above, below);
    } else if constexpr (rounding == CastRounding::truncate) {
      const auto positive = L::either(L::less(below, none), L::at_least(x, above));
      const auto negative = L::both(L::at_least(none, above), L::less(below, x));
      const auto sign = L::at_least(x, none);
      y = L::where(sign, L::where(positive, above, below), L::where(negative, above, below));
    } else {
      auto up = L::less(middle, x);
      const auto tie = L::equal(x, middle);
      if constexpr (rounding == CastRounding::half_even) {
        const LaneI code = L::whole((below + high) * half);
        up = L::either(up, L::both(tie, L::odd(code, L::set(1))));
      } else if constexpr (rounding == CastRounding::half_away) {
        up = L::either(up, L::both(tie, L::at_least(x, none)));
      } else if constexpr (rounding == CastRounding::half_up) {
        up = L::either(up, tie);
      }
      y = L::where(L::equal(x, none), one, L::where(up, above, below));
    }
    return L::where(L::is_nan(t), t, y);
  }
};

// The step is that of the binade, 2^-mantissa of its power of two. To nearest, the processor's own rounding falls on
// the step when a number of the right size is added and subtracted.
template <CastRounding rounding>
struct RoundFloat {
  static constexpr bool stochastic = rounding == CastRounding::stochastic;
  LaneF low, high;
  LaneI lowest, shift;
  bool minus_zero, within;  // within: no rounding leads beyond `high`, which is on the grid
  explicit RoundFloat(const CastFormat& f)
      : low(Lanes::set(f.low)),
        high(Lanes::set(f.high)),
        lowest(Lanes::set(f.lowest_power)),
        shift(Lanes::set(rounding == CastRounding::stochastic ? f.mantissa << 23
                                                              : ((23 - f.mantissa) << 23) + (1 << 22))),
        minus_zero(f.minus_zero),
        within(f.high_on_grid) {}
  LaneF operator()(LaneF t, LaneF u) const {
    using L = Lanes;
    const LaneF x = cut(t, low, high);
    const LaneI power = L::larger(L::bit_and(L::bits(x), L::set(exponent_bits)), lowest);
    LaneF y;
    if constexpr (rounding == CastRounding::stochastic) {
      const LaneI step = L::sub(power, shift);
      const LaneF inverse = L::real(L::sub(L::set(254 << 23), step));  // a power of two, and normal: so is the inverse
      y = round_whole<rounding>(x * inverse, u) * L::real(step);
      if (!within) y = cut(y, low, high);
    } else {
      const LaneF magic = L::real(L::add(power, shift));
      y = (x + magic) - magic;
    }
    y = L::copysign(y, x);
    return minus_zero ? y : y + L::set(0.0f);
  }
};

struct RoundLog2 {
  static constexpr bool stochastic = true;
  LaneF least, most;
  explicit RoundLog2(const CastFormat& f) : least(Lanes::set(f.low)), most(Lanes::set(f.high)) {}
  LaneF operator()(LaneF t, LaneF u) const {
    using L = Lanes;
    const LaneF one = L::set(1.0f), none = L::set(0.0f);
    const LaneF size = L::smaller(most, L::abs(t));
    const LaneF power = L::real(L::bit_and(L::bits(size), L::set(exponent_bits)));
    const LaneF low = L::where(L::less(size, least), none, power), gap = L::larger(low, least);
    const LaneF part = (size - low) * L::real(L::sub(L::set(254 << 23), L::bits(gap)));
    const LaneF away = L::where(L::less(u, part), low + gap, low);
    const LaneF toward = L::where(L::at_least(u, one - part), low + gap, low);
    const LaneF y = L::copysign(L::where(L::less(t, none), toward, away), t) + none;
    return L::where(L::is_nan(t), t, y);
  }
};

// Sorted numbers, halved again and again: `size` is 8 of 15. Each step has the table from its middle on, so that no index
// needs an addition.
template <int64_t entries, int64_t size>
struct Search {
  Lanes::Table<entries> table;
  LaneF middle;
  Search<entries, size / 2> rest;
  explicit Search(const float* sorted) : table(sorted + size - 1), middle(Lanes::set(sorted[size - 1])), rest(sorted) {}
  // how many of the 2 size - 1 numbers from `first` on are <= x, added to `first`
  LaneI from(LaneI first, LaneF x) const {
    return rest.from(Lanes::add_where(Lanes::at_least(x, table[first]), first, Lanes::set(int32_t(size))), x);
  }
  // of the first
  LaneI all(LaneF x) const {
    return rest.from(Lanes::add_where(Lanes::at_least(x, middle), Lanes::set(0), Lanes::set(int32_t(size))), x);
  }
};
template <int64_t entries>
struct Search<entries, 0> {
  explicit Search(const float*) {}
  LaneI from(LaneI first, LaneF) const { return first; }
};

template <int64_t entries, bool drawn>
struct RoundTable {
  static constexpr bool stochastic = drawn;
  LaneF low, high, least;
  bool zero;
  Search<16, 8> splits;
  Search<entries, entries <= 32 ? entries / 2 : 8> switches;
  Lanes::Table<entries> values, above;
  explicit RoundTable(const CastFormat& f)
      : low(Lanes::set(f.low)),
        high(Lanes::set(f.high)),
        least(Lanes::set(f.least)),
        zero(f.least == 0.0f),
        splits(f.splits),
        switches(f.switches),
        values(f.values),
        above(f.values + 1) {}
  LaneF operator()(LaneF t, LaneF u) const {
    using L = Lanes;
    const LaneF none = L::set(0.0f);
    LaneF x = t;
    if (!zero) x = L::where(L::less(L::abs(x), least), L::where(L::less(x, none), none - least, least), x);
    x = cut(x, low, high);
    const LaneI i = find(x);
    LaneF y = values[i];
    if constexpr (stochastic) {
      const LaneF next = above[i];
      y = L::where(L::less(u, (x - y) / (next - y)), next, y);
    }
    return L::where(L::is_nan(t), t, y);
  }

 private:
  LaneI find(LaneF x) const {
    using L = Lanes;
    if constexpr (entries <= 32) return switches.all(x);
    LaneI i = splits.all(x);  // a large table is in memory: first every sixteenth, in a register
    for (int doubling = 0; doubling < 4; ++doubling) i = L::add(i, i);
    return switches.from(i, x);
  }
};

// As `fetch`, where loops are made of vectors: among single numbers it would cost more than it brings.
inline void fetch_vector(const void* x) {
  if (Lanes::count > 1) fetch(x);
}

// ---- uniforms of a tile ---------------------------------------------------------------------------------------------

// The uniforms first, first + 1, ... on their way to `out`, where there is room for 3 before and 127 behind.
struct Draw {
  PhiloxSequence<true> blocks;
  float* out;

  explicit Draw(const CastUniforms* job) : Draw(*job, job->first, job->out) {}
  Draw(const CastUniforms& job, uint64_t first, float* to)
      : blocks(job.key, job.high, first / 4), out(to - first % 4) {}
  // those of a tile's row before column `c`
  void until(const CastTile& tile, int64_t r, int64_t c) {
    const float* const end = tile.u + r * tile.u_row + c;
#if defined(LOWBIT_VECTOR_WORDS)
    while (out < end) some<philox_many>();
#else
    rest(end);
#endif
  }
  void all(int64_t count) {
    const float* const end = out + count;
#if defined(LOWBIT_VECTOR_WORDS)
    while (end - out > 4 * philox_blocks_in<philox_few>) some<philox_many>();
#endif
    rest(end);
  }

 private:
#if defined(LOWBIT_VECTOR_WORDS)
  template <int Vectors>
  void some() {
    blocks.next<Vectors>(out);
    out += 4 * philox_blocks_in<Vectors>;
  }
  void rest(const float* end) {
    while (out < end) some<philox_few>();
  }
#else
  void rest(const float* end) {
    for (; out < end; out += 4) blocks.one(out);
  }
#endif
};

void uniforms_in_order(const CastUniforms& job, uint64_t first, int64_t count, float* out) {
  Draw(job, first, out).all(count + int64_t(first % 4));
}

#if defined(__AVX512F__)
// The rows follow each other and sixteen columns lie anywhere: one counter for each column gives four rows of it.
void uniforms_of_columns(const CastUniforms& job, uint64_t first, float* out, int64_t row) {
  using W = Vec::Words;
  const __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i step = _mm512_set1_epi64((long long)job.column_index);
  const __m512i origin = _mm512_set1_epi64((long long)first);
  const __m512i index[2] = {_mm512_add_epi64(origin, _mm512_mullo_epi64(step, lane)),
                            _mm512_add_epi64(origin, _mm512_mullo_epi64(step, _mm512_add_epi64(lane, W::set(8).v)))};
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i halves[2] = {even, _mm512_add_epi32(even, _mm512_set1_epi32(1))};
  const __m512i offset = _mm512_and_si512(_mm512_permutex2var_epi32(index[0], even, index[1]), _mm512_set1_epi32(3));
  const __m512i block[2] = {_mm512_srli_epi64(index[0], 2), _mm512_srli_epi64(index[1], 2)};
  __mmask16 starts[4];
  for (int i = 0; i < 4; ++i) starts[i] = _mm512_cmpeq_epi32_mask(offset, _mm512_set1_epi32(i));
  const bool aligned = starts[0] == 0xffff;
  const PhiloxKeys keys(job.key, job.high, first / 4);
  // columns that start at another word of their first block than 0 are shifted up: a row is made of rows of blocks
  float rows[4 * 16 * 2];  // this block and the one before
  const auto take = [&](const W (&first)[2], const W (&second)[2], int64_t b) {
    float* now = rows + (b % 2) * 64;
    const float* before = rows + (1 - b % 2) * 64;
    for (int w = 0; w < 4; ++w) {
      const __m512 u = W::top<true>(_mm512_permutex2var_epi32(first[w / 2].v, halves[w % 2], second[w / 2].v));
      if (!aligned) _mm512_storeu_ps(now + 16 * w, u);
      else if (4 * b + w < job.rows) _mm512_storeu_ps(out + (4 * b + w) * row, u);
    }
    if (aligned) return;
    for (int64_t w = 0; w < 4; ++w) {
      // row r of a column with offset o is word r + o; at block b, word w is the latest that any column needs
      const int64_t r = 4 * b + w - 3;
      if (r < 0 || r >= job.rows) continue;
      __m512 u = _mm512_setzero_ps();
      for (int64_t o = 0; o < 4; ++o) {
        const int64_t word = w - 3 + o;
        u = _mm512_mask_loadu_ps(u, starts[o], word < 0 ? before + 16 * (word + 4) : now + 16 * word);
      }
      _mm512_storeu_ps(out + r * row, u);
    }
  };
  const int64_t blocks = (job.rows + (aligned ? 0 : 3) + 3) / 4;
  int64_t b = 0;
  const auto counters = [&](int64_t of, int i) { return W{_mm512_add_epi64(block[i], W::set(uint64_t(of)).v)}; };
  for (; b + 1 < blocks; b += 2) {
    const PhiloxBatch<4> batch({counters(b, 0), counters(b, 1), counters(b + 1, 0), counters(b + 1, 1)}, keys);
    take(batch.pairs[0], batch.pairs[1], b);
    take(batch.pairs[2], batch.pairs[3], b + 1);
  }
  if (b < blocks) {
    const PhiloxBatch<2> batch({counters(b, 0), counters(b, 1)}, keys);
    take(batch.pairs[0], batch.pairs[1], b);
  }
}
#else
void uniforms_of_columns(const CastUniforms& job, uint64_t first, float* out, int64_t row) {
  float column[CastKernels::buffer];
  for (int64_t c = 0; c < 16; ++c) {
    uniforms_in_order(job, first + uint64_t(c * job.column_index), job.rows, column + 4);
    for (int64_t r = 0; r < job.rows; ++r) out[r * row + c] = column[4 + r];
  }
}
#endif

void uniforms(const CastUniforms& job, CastTile& tile) {
  float* out = job.out;
  tile.u = out, tile.u_unit = uniform_unit;
  const uint64_t end = job.first + uint64_t((job.rows - 1) * job.row_index + (job.columns - 1) * job.column_index);
  const bool one_word = (end + 3) / 4 >> 32 == job.first / 4 >> 32;  // the high word of all counters
  if (job.column_index == 1 && (job.rows == 1 || job.row_index == job.columns)) {
    tile.u_row = job.columns;
    tile.draw = &job;  // drawn while casting: the multiplications of one overlap with the divisions of the other
  } else if (job.column_index == 1) {
    tile.u_row = job.columns + 4;
    for (int64_t r = 0; r < job.rows; ++r)
      uniforms_in_order(job, job.first + uint64_t(r * job.row_index), job.columns, out + r * tile.u_row);
  } else if (job.row_index == 1 && one_word) {
    tile.u_row = (job.columns + 15) / 16 * 16;
    for (int64_t c = 0; c < job.columns; c += 16)
      uniforms_of_columns(job, job.first + uint64_t(c * job.column_index), out + c, tile.u_row);
  } else {
    tile.u_row = job.columns;
    for (int64_t r = 0; r < job.rows; ++r)
      for (int64_t c = 0; c < job.columns; ++c) {
        const uint64_t index = job.first + uint64_t(r * job.row_index + c * job.column_index);
        float four[4];
        philox_block(index / 4, job.key, job.high, four);
        out[r * job.columns + c] = four[index % 4];
      }
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// The numbers of a block, or of the blocks of lanes; those that a tile lacks are not used.
struct BlockLanes {
  LaneF scale, zero, offset, step;

  template <class Load>
  BlockLanes(const CastTile& tile, int64_t at, Load load)
      : scale(load(tile.scale + at)),
        zero(tile.zero == nullptr ? scale : load(tile.zero + at)),
        offset(tile.offset == nullptr ? scale : load(tile.offset + at)),
        step(tile.step == nullptr ? scale : load(tile.step + at)) {}
};

template <class Round, bool scale_column, bool whole>
inline void cast_lanes(const Round& round, CastResult result, const CastTile& tile, int64_t r, int64_t c,
                       const BlockLanes& row, Lanes::Mask part) {
  using L = Lanes;
  const auto load = [part](const float* p) { return whole ? L::load(p) : L::load(p, part); };
  fetch_vector(tile.x + r * tile.x_row + c + elements_ahead);
  const LaneF x = load(tile.x + r * tile.x_row + c);
  const LaneF u = tile.u == nullptr ? x : load(tile.u + r * tile.u_row + c) * L::set(tile.u_unit);
  const BlockLanes block = scale_column ? BlockLanes(tile, r * tile.scale_row + c, load) : row;
  LaneF t = (tile.offset != nullptr ? x - block.offset : x) / block.scale;
  if (tile.zero != nullptr) t = t + block.zero;
  LaneF y = round(t, u);
  const int64_t at = r * tile.out_row + c;
  if (result == CastResult::codes) {
    int8_t* out = static_cast<int8_t*>(tile.out) + at;
    whole ? L::store(out, y) : L::store(out, y, part);
    return;
  }
  if (result == CastResult::values) {
    y = (tile.zero != nullptr ? y - block.zero : y) * block.step;
    if (tile.offset != nullptr) y = y + block.offset;
  }
  y = L::where(L::is_nan(y), L::real(L::set(0x7fc00000)), y);
  float* out = static_cast<float*>(tile.out) + at;
  whole ? L::store(out, y) : L::store(out, y, part);
}

struct NoDraw {
  explicit NoDraw(const CastUniforms*) {}
  void until(const CastTile&, int64_t, int64_t) {}
};
template <bool drawing>
struct ChooseDraw { typedef NoDraw type; };
template <>
struct ChooseDraw<true> { typedef Draw type; };

template <class Round, bool scale_column, bool drawing>
void cast_tile(const CastFormat& format, const CastTile& given) {
  const Round round(format);
  const CastTile tile = given;  // a copy: stores through `out` can't change it
  const CastResult result = format.result;
  const int64_t rest = tile.columns % Lanes::count, whole = tile.columns - rest;
  typename ChooseDraw<drawing>::type draw(tile.draw);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const BlockLanes row(tile, r * tile.scale_row, [](const float* p) { return Lanes::set(*p); });
    for (int64_t c = 0; c < whole; c += Lanes::count) {
      draw.until(tile, r, c + Lanes::count);
      cast_lanes<Round, scale_column, true>(round, result, tile, r, c, row, Lanes::Mask());
    }
    if (rest) {
      draw.until(tile, r, tile.columns);
      cast_lanes<Round, scale_column, false>(round, result, tile, r, whole, row, Lanes::first(rest));
    }
  }
}

template <class Round, bool drawing>
void cast_scale(const CastFormat& format, const CastTile& tile) {
  tile.scale_column ? cast_tile<Round, true, drawing>(format, tile) : cast_tile<Round, false, drawing>(format, tile);
}

template <class Round>
void cast_with(const CastFormat& format, const CastTile& tile) {
  if constexpr (Round::stochastic)
    if (tile.draw != nullptr) return cast_scale<Round, true>(format, tile);
  cast_scale<Round, false>(format, tile);
}

template <template <CastRounding> class Round>
void cast_rounding(const CastFormat& format, const CastTile& tile) {
  switch (format.rounding) {
    case CastRounding::half_even: return cast_with<Round<CastRounding::half_even>>(format, tile);
    case CastRounding::half_away: return cast_with<Round<CastRounding::half_away>>(format, tile);
    case CastRounding::half_up: return cast_with<Round<CastRounding::half_up>>(format, tile);
    case CastRounding::half_down: return cast_with<Round<CastRounding::half_down>>(format, tile);
    case CastRounding::floor: return cast_with<Round<CastRounding::floor>>(format, tile);
    case CastRounding::truncate: return cast_with<Round<CastRounding::truncate>>(format, tile);
    case CastRounding::stochastic: return cast_with<Round<CastRounding::stochastic>>(format, tile);
  }
}

template <bool stochastic>
void cast_table(const CastFormat& format, const CastTile& tile) {
  if (format.search == 16) return cast_with<RoundTable<16, stochastic>>(format, tile);
  if (format.search == 32) return cast_with<RoundTable<32, stochastic>>(format, tile);
  return cast_with<RoundTable<256, stochastic>>(format, tile);
}

// int8 codes where `scale` and x / scale are far from the ends of the range of float32. There x / scale needs no
// division: with y the inverse of b to the nearest, and q within one ulp of a / b, fma(fma(-q, b, a), y, q) is a / b to
// the nearest (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990). a y is
// within two ulp, and a first such step brings it within one.
//
// The codes are rounded first and then cut to low and high, which are integers.
template <class X, bool stochastic>
struct Encoder {
  const X* x;
  const CastTile& tile;
  int8_t low, high;

  // a vector of codes of row r from column c on, or a part of it
  template <class... Part>
  void one(int64_t r, int64_t c, LaneF scale, LaneF inverse, Part... part) const {
    fetch_vector(x + r * tile.x_row + c + tile.ahead);
    Lanes::store_codes(to(r, c), code(r, c, scale, inverse, part...), low, high, part...);
  }
#if defined(__AVX512F__)
  // four vectors
  void four(int64_t r, int64_t c, const LaneF (&scale)[4], const LaneF (&inverse)[4]) const {
    LaneI codes[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t at = c + i * Lanes::count;
      if (i % (64 / (Lanes::count * sizeof(X))) == 0) fetch(x + r * tile.x_row + at + tile.ahead);
      codes[i] = code(r, at, scale[i], inverse[i]);
    }
    fetch(to(r, c) + tile.out_ahead);
    Lanes::store_codes(to(r, c), codes, low, high);
  }
#endif

 private:
  int8_t* to(int64_t r, int64_t c) const { return static_cast<int8_t*>(tile.out) + r * tile.out_row + c; }
  template <class... Part>
  LaneI code(int64_t r, int64_t c, LaneF scale, LaneF inverse, Part... part) const {
    using L = Lanes;
    const LaneF t = L::quotient(L::load(x + r * tile.x_row + c, part...), scale, inverse);
    if constexpr (stochastic) return L::drawn(t, L::load(tile.u + r * tile.u_row + c, part...), L::set(tile.u_unit));
    else return L::nearest(t);
  }
};

template <class X, bool stochastic, bool scale_column, bool drawing>
void codes_tile(const CastFormat& format, const CastTile& given, const X* x) {
  using L = Lanes;
  constexpr int64_t count = L::count, wide = 4 * count;
  CastTile tile = given;
  const bool gapless =
      tile.x_row == tile.columns && tile.out_row == tile.columns && (!stochastic || tile.u_row == tile.columns);
  if (!scale_column && tile.scale_row == 0 && gapless)
    tile.columns *= tile.rows, tile.rows = 1;  // short rows cost more than their elements
  const Encoder<X, stochastic> encode = {x, tile, int8_t(format.low), int8_t(format.high)};
  const auto load = [](const float* p, LaneF (&to)[4]) {
    for (int i = 0; i < 4; ++i) to[i] = L::load(p + i * L::count);
  };
  const int64_t rest = tile.columns % count, whole = tile.columns - rest;
  const int64_t in_fours = count > 1 ? tile.columns / wide * wide : 0;
  const auto last = L::first(rest);
  LaneF scales[4], inverses[4];
  if constexpr (scale_column && !drawing && count > 1) {
    // the rows of some vectors of columns one after another: their scales stay in registers
    if (tile.scale_row == 0) {
      int64_t c = 0;
      for (; c < in_fours; c += wide) {
        load(tile.scale + c, scales), load(tile.inverse + c, inverses);
        for (int64_t r = 0; r < tile.rows; ++r) encode.four(r, c, scales, inverses);
      }
      for (; c < whole; c += count) {
        const LaneF scale = L::load(tile.scale + c), inverse = L::load(tile.inverse + c);
        for (int64_t r = 0; r < tile.rows; ++r) encode.one(r, c, scale, inverse);
      }
      if (rest) {
        const LaneF scale = L::load(tile.scale + whole, last), inverse = L::load(tile.inverse + whole, last);
        for (int64_t r = 0; r < tile.rows; ++r) encode.one(r, whole, scale, inverse, last);
      }
      return;
    }
  }
  typename ChooseDraw<drawing>::type draw(tile.draw);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float *of_scale = tile.scale + r * tile.scale_row, *of_inverse = tile.inverse + r * tile.scale_row;
    if constexpr (!scale_column)
      for (int i = 0; i < 4; ++i) scales[i] = L::set(*of_scale), inverses[i] = L::set(*of_inverse);
    int64_t c = 0;
    if constexpr (count > 1)
      for (; c < in_fours; c += wide) {
        draw.until(tile, r, c + wide);
        if constexpr (scale_column) load(of_scale + c, scales), load(of_inverse + c, inverses);
        encode.four(r, c, scales, inverses);
      }
    for (; c < whole; c += count) {
      draw.until(tile, r, c + count);
      if constexpr (scale_column) scales[0] = L::load(of_scale + c), inverses[0] = L::load(of_inverse + c);
      encode.one(r, c, scales[0], inverses[0]);
    }
    if (rest) {
      draw.until(tile, r, tile.columns);
      if constexpr (scale_column)
        scales[0] = L::load(of_scale + whole, last), inverses[0] = L::load(of_inverse + whole, last);
      encode.one(r, whole, scales[0], inverses[0], last);
    }
  }
}

template <class X, bool stochastic, bool drawing>
void codes_scale(const CastFormat& format, const CastTile& tile, const X* x) {
  tile.scale_column ? codes_tile<X, stochastic, true, drawing>(format, tile, x)
                    : codes_tile<X, stochastic, false, drawing>(format, tile, x);
}

template <class X>
void codes(const CastFormat& format, const CastTile& tile, const X* x) {
  if (format.rounding != CastRounding::stochastic) return codes_scale<X, false, false>(format, tile, x);
  tile.draw == nullptr ? codes_scale<X, true, false>(format, tile, x) : codes_scale<X, true, true>(format, tile, x);
}

void cast(const CastFormat& format, const CastTile& tile) {
  if (tile.inverse != nullptr)
    return tile.x16 == nullptr ? codes(format, tile, tile.x) : codes(format, tile, tile.x16);
  const bool stochastic = format.rounding == CastRounding::stochastic;
  switch (format.kind) {
    case CastKind::integer: return cast_rounding<RoundInteger>(format, tile);
    case CastKind::even: return cast_rounding<RoundEven>(format, tile);
    case CastKind::log2: return cast_with<RoundLog2>(format, tile);
    case CastKind::floating:
      return stochastic ? cast_with<RoundFloat<CastRounding::stochastic>>(format, tile)
                        : cast_with<RoundFloat<CastRounding::half_even>>(format, tile);
    case CastKind::table: return stochastic ? cast_table<true>(format, tile) : cast_table<false>(format, tile);
  }
}

// ---- statistics of a tile -------------------------------------------------------------------------------------------

// |x| as an integer: NaN is larger than infinity
inline LaneI magnitude(LaneF x) { return Lanes::bit_and(Lanes::bits(x), Lanes::set(INT32_MAX)); }

#if defined(__AVX512F__)
// Magnitudes of bfloat16 as integers of 16 bits, in the order of those of 32.
struct Halves {
  static constexpr int64_t count = 32;
  __m512i v = _mm512_setzero_si512();

  void merge(const uint16_t* x, __mmask32 part = ~__mmask32(0)) {
    v = _mm512_max_epu16(v, _mm512_and_si512(_mm512_maskz_loadu_epi16(part, x), _mm512_set1_epi16(INT16_MAX)));
  }
  // the magnitudes of the first and the other sixteen as those of 32 bits
  LaneI low() const { return {_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)), 16)}; }
  LaneI high() const { return {_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1)), 16)}; }
};

// `absmax_tile` of bfloat16: half as many instructions as by way of float32.
void absmax_tile(const BlockTile& given, const uint16_t* first) {
  using L = Lanes;
  BlockTile tile = given;
  if (!tile.block_column && tile.block_row == 0 && tile.x_row == tile.columns)
    tile.columns *= tile.rows, tile.rows = 1;
  const auto part = [&](int64_t c) { return __mmask32(tile.columns - c >= 32 ? -1 : (1u << (tile.columns - c)) - 1); };
  if (tile.block_column) {
    const int64_t together = tile.block_row == 0 ? tile.rows : 1;  // rows that share blocks
    for (int64_t begin = 0; begin < tile.rows; begin += together)
      for (int64_t c = 0; c < tile.columns; c += 2 * Halves::count) {
        Halves most[2];
        for (int64_t r = begin; r < begin + together; ++r)
          for (int i = 0; i < 2 && c + i * Halves::count < tile.columns; ++i) {
            const uint16_t* x = first + r * tile.x_row + c + i * Halves::count;
            fetch(x + rows_ahead * tile.x_row);
            most[i].merge(x, part(c + i * Halves::count));
          }
        const LaneI found[4] = {most[0].low(), most[0].high(), most[1].low(), most[1].high()};
        float* high = tile.high + begin * tile.block_row + c;
        for (int64_t i = 0; i < 4 && c + i * L::count < tile.columns; ++i) {
          const int64_t left = tile.columns - c - i * L::count;
          const auto in = L::first(left < L::count ? left : L::count);
          L::store(high + i * L::count, L::real(L::larger(found[i], L::bits(L::load(high + i * L::count, in)))), in);
        }
      }
    return;
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const uint16_t* x = first + r * tile.x_row;
    float* high = tile.high + r * tile.block_row;
    Halves most;
    for (int64_t c = 0; c < tile.columns; c += Halves::count) {
      fetch(x + c + elements_ahead);
      most.merge(x + c, part(c));
    }
    const int32_t bits = L::largest(L::larger(L::larger(most.low(), most.high()), L::bits(L::set(*high))));
    memcpy(high, &bits, sizeof bits);
  }
}
#endif

template <class X>
void absmax_tile(const BlockTile& given, const X* first) {
  using L = Lanes;
  BlockTile tile = given;
  if (!tile.block_column && tile.block_row == 0 && tile.x_row == tile.columns)
    tile.columns *= tile.rows, tile.rows = 1;  // short rows cost more than their elements
  const int64_t rest = tile.columns % L::count, whole = tile.columns - rest;
  const auto part = L::first(rest);
  const auto merge = [](LaneF a, LaneF b) { return L::real(L::larger(magnitude(a), L::bits(b))); };
  if (L::count > 1 && tile.block_column && tile.block_row == 0) {
    // the rows of a vector of columns one after another: the maxima stay in registers
    int64_t c = 0;
    for (; c + 4 * L::count <= whole; c += 4 * L::count) {
      LaneF most[4];
      for (int i = 0; i < 4; ++i) most[i] = L::load(tile.high + c + i * L::count);
      for (int64_t r = 0; r < tile.rows; ++r)
        for (int i = 0; i < 4; ++i) {
          const X* x = first + r * tile.x_row + c + i * L::count;
          fetch_vector(x + rows_ahead * tile.x_row);
          most[i] = merge(L::load(x), most[i]);
        }
      for (int i = 0; i < 4; ++i) L::store(tile.high + c + i * L::count, most[i]);
    }
    for (; c < whole; c += L::count) {
      LaneF most = L::load(tile.high + c);
      for (int64_t r = 0; r < tile.rows; ++r) most = merge(L::load(first + r * tile.x_row + c), most);
      L::store(tile.high + c, most);
    }
    if (rest) {
      LaneF most = L::load(tile.high + whole, part);
      for (int64_t r = 0; r < tile.rows; ++r) most = merge(L::load(first + r * tile.x_row + whole, part), most);
      L::store(tile.high + whole, most, part);
    }
    return;
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const X* x = first + r * tile.x_row;
    float* high = tile.high + r * tile.block_row;
    if (tile.block_column) {
      for (int64_t c = 0; c < whole; c += L::count) {
        fetch_vector(x + c + elements_ahead);
        L::store(high + c, merge(L::load(x + c), L::load(high + c)));
      }
      if (rest) L::store(high + whole, merge(L::load(x + whole, part), L::load(high + whole, part)), part);
    } else {
      LaneI most = L::bits(L::set(*high));
      for (int64_t c = 0; c < whole; c += L::count) {
        fetch_vector(x + c + elements_ahead);
        most = L::larger(most, magnitude(L::load(x + c)));
      }
      if (rest) most = L::larger(most, magnitude(L::load(x + whole, part)));
      const int32_t bits = L::largest(most);
      memcpy(high, &bits, sizeof bits);
    }
  }
}

void absmax(const BlockTile& tile) {
  tile.x16 == nullptr ? absmax_tile(tile, tile.x) : absmax_tile(tile, tile.x16);
}

// A NaN that is there stays, one that comes is put in.
inline LaneF least_of(LaneF x, LaneF low) { return Lanes::where(Lanes::is_nan(x), x, Lanes::smaller(x, low)); }
inline LaneF most_of(LaneF x, LaneF high) { return Lanes::where(Lanes::is_nan(x), x, Lanes::larger(x, high)); }

template <int64_t count>
struct Ends {
  LaneF least[count], most[count];

  void add(int64_t i, LaneF x) { least[i] = least_of(x, least[i]), most[i] = most_of(x, most[i]); }
};

// The rows of some vectors of columns one after another: the ends stay in registers.
template <int64_t count, class... Part>
inline void minmax_columns(const BlockTile& tile, int64_t c, Part... part) {
  using L = Lanes;
  Ends<count> ends;
  for (int64_t i = 0; i < count; ++i) {
    ends.least[i] = L::load(tile.low + c + i * L::count, part...);
    ends.most[i] = L::load(tile.high + c + i * L::count, part...);
  }
  for (int64_t r = 0; r < tile.rows; ++r)
    for (int64_t i = 0; i < count; ++i) {
      const float* x = tile.x + r * tile.x_row + c + i * L::count;
      fetch_vector(x + rows_ahead * tile.x_row);
      ends.add(i, L::load(x, part...));
    }
  for (int64_t i = 0; i < count; ++i) {
    L::store(tile.low + c + i * L::count, ends.least[i], part...);
    L::store(tile.high + c + i * L::count, ends.most[i], part...);
  }
}

// A row of one block.
inline void minmax_row(const float* x, int64_t columns, float* low, float* high) {
  using L = Lanes;
  constexpr int64_t count = 4;
  const LaneF old_low = L::set(*low), old_high = L::set(*high);
  Ends<count> ends = {{old_low, old_low, old_low, old_low}, {old_high, old_high, old_high, old_high}};
  int64_t c = 0;
  for (; c + count * L::count <= columns; c += count * L::count)
    for (int64_t i = 0; i < count; ++i) {
      fetch_vector(x + c + i * L::count + elements_ahead);
      ends.add(i, L::load(x + c + i * L::count));
    }
  for (; c + L::count <= columns; c += L::count) ends.add(0, L::load(x + c));
  if (c < columns) {
    const auto part = L::first(columns - c);
    ends.add(0, L::where(part, L::load(x + c, part), L::set(x[c])));
  }
  LaneF least = ends.least[0], most = ends.most[0];
  for (int64_t i = 1; i < count; ++i) least = least_of(ends.least[i], least), most = most_of(ends.most[i], most);
  const bool nan = L::any(L::is_nan(least));
  *low = nan ? __builtin_nanf("") : L::smallest(least);
  *high = nan ? __builtin_nanf("") : L::largest(most);
}

void minmax(const BlockTile& given) {
  using L = Lanes;
  BlockTile tile = given;
  if (!tile.block_column) {
    if (tile.block_row == 0 && tile.x_row == tile.columns)
      tile.columns *= tile.rows, tile.rows = 1;  // short rows cost more than their elements
    for (int64_t r = 0; r < tile.rows; ++r)
      minmax_row(tile.x + r * tile.x_row, tile.columns, tile.low + r * tile.block_row, tile.high + r * tile.block_row);
    return;
  }
  const int64_t rows = tile.block_row == 0 ? 1 : tile.rows, rest = tile.columns % L::count;
  if (rows > 1) tile.rows = 1;  // of which each has its own blocks
  for (int64_t r = 0; r < rows; ++r) {
    int64_t c = 0;
    for (; c + 4 * L::count <= tile.columns; c += 4 * L::count) minmax_columns<4>(tile, c);
    for (; c + L::count <= tile.columns; c += L::count) minmax_columns<1>(tile, c);
    if (rest) minmax_columns<1>(tile, c, L::first(rest));
    tile.x += tile.x_row, tile.low += tile.block_row, tile.high += tile.block_row;
  }
}

template <class X>
void add_rows_of(const X* x, int64_t x_row, int64_t rows, int64_t columns, float* sums) {
  using L = Lanes;
  constexpr int64_t together = L::count > 1 ? 4 * L::count : 0;
  int64_t c = 0;
  for (; together != 0 && c + together <= columns; c += together) {  // sums stay in registers
    LaneF sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = L::load(sums + c + i * L::count);
    for (int64_t r = 0; r < rows; ++r)
      for (int i = 0; i < 4; ++i) sum[i] = sum[i] + L::load(x + r * x_row + c + i * L::count);
    for (int i = 0; i < 4; ++i) L::store(sums + c + i * L::count, sum[i]);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = c; i < columns; i += L::count) {
      const auto part = L::first(columns - i < L::count ? columns - i : L::count);
      L::store(sums + i, L::load(sums + i, part) + L::load(x + r * x_row + i, part), part);
    }
}

void add_rows(const float* x, const uint16_t* x16, int64_t x_row, int64_t rows, int64_t columns, float* sums) {
  x16 == nullptr ? add_rows_of(x, x_row, rows, columns, sums) : add_rows_of(x16, x_row, rows, columns, sums);
}

constexpr CastKernels cast_kernels = {cast, uniforms, absmax, minmax, add_rows};

}  // namespace
}  // namespace lowbit

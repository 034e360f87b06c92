// Vectors of four float32 for any CPU, in the vector extension that GCC and Clang share (SSE2, NEON, ...).
#pragma once

#include <stdint.h>
#include <string.h>

namespace lowbit {
namespace {

struct Vec {
  static constexpr int64_t lanes = 4;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));  // wraps around where I must not

  static F load(const float* p) { F v; memcpy(&v, p, sizeof v); return v; }
  static void store(float* p, F v) { memcpy(p, &v, sizeof v); }
  static F set(float x) { return F{x, x, x, x}; }
  static I set(int32_t x) { return I{x, x, x, x}; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static I add(I a, I b) { return (I)((U)a + (U)b); }
  static I sub(I a, I b) { return (I)((U)a - (U)b); }
  static I bit_and(I a, I b) { return a & b; }
  static I shift_right(I a, int32_t n) { return a >> n; }  // only used on non-negative results of masks
  static I larger(I a, I b) { return select(a > b, a, b); }
  // |x| cut at `limit`; NaN stays NaN
  static F clamp(F x, F limit) {
    x = as_float(select(x > limit, as_int(limit), as_int(x)));
    return as_float(select(x < -limit, as_int(-limit), as_int(x)));
  }
  static F where_less(I a, I b, F yes, F no) { return as_float(select(a < b, as_int(yes), as_int(no))); }
  static F nan_or(F test, F no) { return as_float(select(test == test, as_int(no), set(int32_t(0x7fc00000)))); }
  static I as_int(F v) { return (I)v; }
  static F as_float(I v) { return (F)v; }

 private:
  static I select(I mask, I yes, I no) { return (mask & yes) | (~mask & no); }
};

}  // namespace
}  // namespace lowbit

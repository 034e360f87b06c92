// What the kernels look like from outside: one table of functions per instruction set.
//
// Each table is built in its own translation unit with its own compiler flags (setup.py), from the same templates.
// Those units include no standard or PyTorch header that defines inline functions: the linker would be free to keep
// the AVX-512 copy of such a function for everybody.
#pragma once

#include <stdint.h>

namespace lowbit {

// A saturating minifloat as the constants that rounding to it needs, see round_minifloat in ops/chunked.py.
struct Minifloat {
  float largest;       // largest finite value
  int32_t lowest_bits; // bits of the smallest normal number
  int32_t magic_bits;  // added to the bits of 2^e: gives M = 1.5 * 2^(e - mantissa + 23)
  int32_t mantissa;    // stored mantissa bits
  bool wide;           // M would not be a usable float32: round on the bits instead
};

// out (rows, columns) = a (rows, depth) * b (depth, columns), any strides, in elements.
struct ChunkedMm {
  const float* a;
  const float* b;
  float* out;
  int64_t rows, depth, columns;
  int64_t a_row, a_depth, b_depth, b_column, out_row, out_column;
  int64_t chunk;
  Minifloat format;
};

struct Kernels {
  const char* name;
  int64_t lanes;         // float32 numbers in a vector
  int64_t panel_columns; // columns of `out` that one panel covers
  // rows [row_begin, row_end) of the panel of columns that starts at `column`; `packed` is depth * panel_columns floats,
  // filled by pack_panel
  void (*pack_panel)(const ChunkedMm&, int64_t column, float* packed);
  void (*chunked_mm)(const ChunkedMm&, int64_t column, int64_t row_begin, int64_t row_end, const float* packed);
  // uniforms of the Philox blocks [begin, end); block i fills out[4 i .. 4 i + 3], cut at `count`
  void (*uniform)(float* out, int64_t count, int64_t begin, int64_t end, const uint32_t key[2], const uint32_t high[2]);
};

const Kernels& portable_kernels();
#if defined(__x86_64__) || defined(_M_X64)
#define LOWBIT_X86 1
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace lowbit

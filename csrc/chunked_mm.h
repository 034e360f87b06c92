// lowbit::chunked_mm from outside; the definition is in src/lowbit/ops/chunked.py.
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

struct ChunkedKernels {
  int64_t panel_columns;  // columns of `out` that one panel covers
  // rows [row_begin, row_end) of the panel of columns that starts at `column`; `packed` is depth * panel_columns floats,
  // filled by pack_panel
  void (*pack_panel)(const ChunkedMm&, int64_t column, float* packed);
  void (*multiply)(const ChunkedMm&, int64_t column, int64_t row_begin, int64_t row_end, const float* packed);
};

}  // namespace lowbit

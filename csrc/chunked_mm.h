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

// out (rows, columns) = a (rows, depth) * b (depth, columns). Element (i, k) of a is a[a_rows[i] + a_depths[k]], and so
// on: rows, depth and columns may each run over several axes of a tensor.
struct ChunkedMm {
  const float* a;
  const float* b;
  float* out;
  int64_t rows, depth, columns;
  const int64_t* a_rows;
  const int64_t* a_depths;
  const int64_t* b_depths;
  const int64_t* b_columns;
  int64_t out_row, out_column;
  int64_t chunk;
  Minifloat format;
  bool tame;  // no NaN, no sum that saturates, products exact in float32: see tame() in chunked_mm_ops.cpp
};

// One slab of a panel of columns: it starts at `column`, its depth [begin, end) is whole chunks but for the last.
struct ChunkedSlab {
  int64_t column, begin, end;
  const float* packed;  // (end - begin) * panel_columns floats, filled by pack_slab
  float* sums;          // sums over the chunks before, panel_columns for each row from row_begin on
};

// Magnitudes of float32 numbers, as bits.
struct Magnitudes {
  int32_t bits;      // all of them, or'ed
  int32_t largest;
  int32_t smallest;  // but zero; infinity if there is none
};

struct ChunkedKernels {
  int64_t panel_columns;  // columns of `out` that one panel covers
  void (*pack_slab)(const ChunkedMm&, const ChunkedSlab&, float* packed);
  // rows [row_begin, row_end)
  void (*multiply)(const ChunkedMm&, const ChunkedSlab&, int64_t row_begin, int64_t row_end);
  Magnitudes (*scan)(const float*, int64_t count);
};

}  // namespace lowbit

// Products with operands of a few bits, from outside; the definitions are in src/lowbit/ops/binary_mm.py and packed_mm.py.
#pragma once

#include <stdint.h>

namespace lowbit {

// out (rows, columns) = depth - 2 * popcount(a xor b), a and b rows of `words` words; strides in elements.
struct BinaryMm {
  const uint64_t* a;
  const uint64_t* b;
  int32_t* out;
  int64_t rows, columns, words, depth;
  int64_t a_row, b_row, out_row, out_column;
};

struct LowmmKernels {
  // bit i of `words` = x[i] >= 0; the last word is filled up with zeros
  void (*pack_signs)(const float* x, uint64_t* words, int64_t count);
  int64_t panel_columns;  // columns of `out` that one panel covers
  // rows [row_begin, row_end) of the panel of columns that starts at `column`; `packed` is words * panel_columns words,
  // filled by pack_panel
  void (*pack_panel)(const BinaryMm&, int64_t column, uint64_t* packed);
  void (*multiply)(const BinaryMm&, int64_t column, int64_t row_begin, int64_t row_end, const uint64_t* packed);
};

}  // namespace lowbit

// Products with operands of a few bits, from outside; the definitions are in src/lowbit/ops/binary_mm.py and packed_mm.py.
#pragma once

#include <stdint.h>

namespace lowbit {

// out (rows, columns) = depth - 2 * popcount(a xor b), a and b rows of `words` words without gaps; strides in elements.
struct BinaryMm {
  const uint64_t* a;
  const uint64_t* b;
  int32_t* out;
  int64_t rows, columns, words, depth;
  int64_t out_row, out_column;
};

struct LowmmKernels {
  // bit i of `words` = x[i] >= 0; the last word is filled up with zeros
  void (*pack_signs)(const float* x, uint64_t* words, int64_t count);

  // Both operands of a binary product are laid out anew, in units of `binary_unit` words and one word more.
  int64_t binary_panel;  // columns of `out` that one panel of b covers
  int64_t binary_unit;
  void (*pack_binary_rows)(const BinaryMm&, int64_t begin, int64_t end, uint64_t* rows);
  void (*pack_binary_panel)(const BinaryMm&, int64_t column, uint64_t* panel);
  void (*multiply_binary)(const BinaryMm&, int64_t begin, int64_t end, const uint64_t* rows, int64_t column,
                          const uint64_t* panel);
};

}  // namespace lowbit

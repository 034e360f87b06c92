// Products with operands of a few bits, from outside; the definitions are in src/lowbit/ops/binary_mm.py and
// packed_mm.py.
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

// out (rows, columns) = activations * weights: `columns` rows of packed codes, each of runs of 512 bits, the last of
// which may be cut at a multiple of 32. Operators lay the activations out anew, by fill_floats or fill_codes.
struct PackedMm {
  const uint8_t* weight;
  int64_t weight_bytes;  // in a row
  int64_t rows, columns, depth;
  int64_t bits;     // 1, 2, 4
  int64_t runs;     // in a row of weights
  int64_t segment;  // runs whose lanes each keep their scale
  const float* scale;
  int64_t groups;       // scales in a row of weights
  const int32_t* lane;  // which of them belongs to lane l of segment s, at 16 s + l; null: one scale for a row
  float* out;
  // float activations: step i of run r of a row at 16 (r * codes in a word + i); and what the codes mean, 16 floats
  const float* x;
  const float* levels;
  // codes: byte i of run r at 64 (r * codes in a byte + i); -offset * their sum, by segment and lane; their scale
  const int8_t* codes;
  const int32_t* base;
  const float* code_scale;
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

  // one row of activations
  void (*fill_floats)(const PackedMm&, const float* x, float* out);
  void (*fill_codes)(const PackedMm&, const float* x, int64_t offset, int8_t* scratch, int8_t* codes, int32_t* base,
                     float* scale);
  // columns [begin, end) of `out`
  void (*multiply_floats)(const PackedMm&, int64_t begin, int64_t end);
  void (*multiply_codes)(const PackedMm&, int64_t begin, int64_t end);
};

}  // namespace lowbit

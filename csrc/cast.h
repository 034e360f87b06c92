// lowbit::cast, lowbit::cast_absmax, lowbit::block_absmax and lowbit::block_minmax from outside; the definitions are in
// src/lowbit/ops/cast.py. The kernels work on tiles: matrices whose columns lie side by side in memory.
#pragma once

#include <stdint.h>

namespace lowbit {

enum class CastKind { integer, even, floating, log2, table };
enum class CastRounding { half_even, half_away, half_up, half_down, floor, truncate, stochastic };
enum class CastResult { values, grid, codes };

struct CastFormat {
  static constexpr int64_t levels = 256;  // of the largest table
  CastKind kind;
  CastRounding rounding;
  CastResult result;
  float low, high;         // the grid ends here; of log2, the smallest and the largest magnitude
  float up, down;          // integer: 2^fl and 2^-fl
  int32_t lowest_power;    // floating: the bits of 2^emin
  int32_t mantissa;        // floating
  bool minus_zero;         // floating: whether it exists
  bool high_on_grid;       // floating
  float least;             // table: the smallest magnitude where 0 is no level, otherwise 0
  int64_t search;          // table: 16, 32 or 256, more than there are switches
  float switches[levels];  // table: x goes to the interval (stochastic) or level i where i of these are <= x; then inf
  float splits[32];          // table: every sixteenth switch, then inf
  float values[levels + 1];  // table: the levels
};

struct CastUniforms {
  uint32_t key[2], high[2];           // as in uniform.h
  uint64_t first;                     // index of the first element of the tile
  int64_t row_index, column_index;    // from one row or column to the next
  int64_t rows, columns;
  float* out;  // has room for `CastKernels::buffer` numbers, and for 3 before
};

struct CastTile {
  int64_t rows, columns;
  const float* x;
  const uint16_t* x16;  // null, or bfloat16 in the place of x, with `inverse` only
  int64_t x_row;
  const float* u;  // uniforms, for stochastic rounding
  int64_t u_row;
  float u_unit;  // and in which units they are
  const CastUniforms* draw;  // null, or what `u` is filled with on the way: the rows follow each other
  int64_t ahead, out_ahead;  // with `inverse`: elements of x and out soon needed are so far behind these in memory
  const float* scale;
  const float* zero;               // or null
  const float* offset;             // or null: taken off before and added to the values
  const float* step;               // or null: the factor of the values, where it is not `scale`
  const float* inverse;            // null, or 1 / scale: see `Encoder`
  int64_t scale_row;               // of all numbers of blocks
  bool scale_column;               // one value for each column, otherwise for each row
  void* out;                       // float, or int8_t for codes
  int64_t out_row;
};

struct BlockTile {
  int64_t rows, columns;
  const float* x;
  const uint16_t* x16;  // null, or bfloat16 in the place of x, of absmax only
  int64_t x_row;
  float* low;          // of minmax
  float* high;         // of absmax and minmax
  int64_t block_row;   // from one row to the next, in `low` and `high`
  bool block_column;   // one block for each column, otherwise for each row
};

struct CastKernels {
  static constexpr int64_t tile = 4096;  // at most so many elements, with four more for each row unless there is one
  static constexpr int64_t wide_tile = 8192;  // the same without uniforms, of codes
  static constexpr int64_t columns = 512;  // at most so many, where each has its own block, in statistics
  static constexpr int64_t buffer = tile + 128;  // numbers that uniforms may take
  void (*cast)(const CastFormat& format, const CastTile& tile);
  void (*uniforms)(const CastUniforms& job, CastTile& tile);  // sets u, u_row and perhaps draw
  void (*absmax)(const BlockTile& tile);  // `high` is what it was (NaN stays) or max|x|, whichever is larger
  void (*minmax)(const BlockTile& tile);  // the same with both ends
  // adds the rows, one after another, to the sums of the columns; `x16` as in BlockTile
  void (*add_rows)(const float* x, const uint16_t* x16, int64_t x_row, int64_t rows, int64_t columns, float* sums);
};

}  // namespace lowbit

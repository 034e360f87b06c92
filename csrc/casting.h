// What operators that cast share: the format from plain values, the key of random numbers, and tensors as tiles.
#pragma once

#include "library.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

namespace lowbit {

CastFormat cast_format(const std::string& kind, const std::vector<double>& numbers,
                       const std::optional<torch::stable::Tensor>& table, const std::string& rounding,
                       const std::string& result);

// Key and high half of the counter as in uniform.h; not `given`, none.
struct PhiloxWords {
  bool given = false;
  uint32_t key[2] = {0, 0}, high[2] = {0, 0};

  bool operator==(const PhiloxWords& o) const {
    return given == o.given && key[0] == o.key[0] && key[1] == o.key[1] && high[0] == o.high[0] && high[1] == o.high[1];
  }

  PhiloxWords() = default;
  explicit PhiloxWords(const torch::stable::Tensor& seed_stream_step);
};

// ---- tensors as tiles -----------------------------------------------------------------------------------------------

// One axis: its size, and in each of the tensors the distance of neighbours. `index` counts elements row-major.
struct Axis {
  int64_t size = 1, x = 0, out = 0, block = 0, u = 0, index = 0;
  int64_t other = 0;  // of a second partition into blocks
};

struct Part {
  int64_t rows, columns;
  Axis at;  // offsets of its first element
};

struct Tiling {
  std::vector<Axis> outer;
  Axis rows, columns;
  int64_t tile_rows = 1, tile_columns = 1, row_tiles = 1, column_tiles = 1;
  int64_t tiles = 1;

  // tiles that share an index of the first axis (or, if that is cut into tiles, a range of them)
  int64_t unit() const { return tiles / (outer.empty() ? row_tiles : outer[0].size); }
  const Axis& first() const { return outer.empty() ? rows : outer[0]; }

  // blocks of different units differ
  bool disjoint() const {
    int64_t others = 0;
    for (const Axis& a : outer)
      if (&a != &first()) others += (a.size - 1) * a.block;
    if (!outer.empty()) others += (rows.size - 1) * rows.block;
    others += (columns.size - 1) * columns.block;
    return first().block > others;
  }
  // a unit holds whole blocks, one for each index of the first axis
  bool whole_blocks() const {
    for (const Axis& a : outer)
      if (&a != &first() && a.block != 0) return false;
    return first().block != 0 && columns.block == 0 && (outer.empty() || rows.block == 0);
  }

  // into tiles of at most these columns, and as many rows as give so many elements, counting `spare` more for each row
  void cut(int64_t most_columns, int64_t elements, int64_t spare = 4) {
    tile_columns = std::min(most_columns, columns.size);
    tile_rows = std::min(rows.size, std::max<int64_t>(1, elements / (tile_columns + spare)));
    row_tiles = (rows.size + tile_rows - 1) / tile_rows;
    column_tiles = (columns.size + tile_columns - 1) / tile_columns;
    tiles = row_tiles * column_tiles;
    for (const Axis& a : outer) tiles *= a.size;
  }

  // inline, or else two numbers just stored one by one are loaded at once, and that waits for all stores before
  [[gnu::always_inline]] Part part(int64_t tile) const {
    Part p;
    const auto move = [&p](const Axis& a, int64_t by) {
      p.at.x += by * a.x, p.at.out += by * a.out, p.at.block += by * a.block, p.at.u += by * a.u;
      p.at.index += by * a.index;
    };
    const int64_t column = tile % column_tiles * tile_columns, row = tile / column_tiles % row_tiles * tile_rows;
    int64_t rest = tile / column_tiles / row_tiles;
    for (size_t d = outer.size(); d-- > 0; rest /= outer[d].size) move(outer[d], rest % outer[d].size);
    move(rows, row), move(columns, column);
    p.rows = std::min(tile_rows, rows.size - row), p.columns = std::min(tile_columns, columns.size - column);
    return p;
  }
};

// `u` and `keyed` say whose strides count. In the order of memory if `by_memory`, otherwise row-major. Tiles have about
// `most` elements.
Tiling tiling(const torch::stable::Tensor& x, const std::vector<int64_t>& out_strides,
              const std::vector<int64_t>& block_strides, const torch::stable::Tensor* u, bool keyed, bool by_memory,
              const std::vector<int64_t>* other_strides = nullptr, int64_t most = CastKernels::tile);

// What the kernels are to draw for a tile; `out` has room for CastKernels::buffer numbers, and for 3 before.
inline CastUniforms uniforms_of(const PhiloxWords& words, const Tiling& tiles, const Part& part, float* out) {
  return {{words.key[0], words.key[1]},
          {words.high[0], words.high[1]},
          uint64_t(part.at.index),
          tiles.rows.index,
          tiles.columns.index,
          part.rows,
          part.columns,
          out};
}

// ---- ends of blocks -------------------------------------------------------------------------------------------------

inline float bits_as_float(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The smaller or larger of both; NaN where one is.
inline void merge_low(float& into, float x) {
  if (std::isnan(x) || (x < into && !std::isnan(into))) into = x;
}
inline void merge_high(float& into, float x) {
  if (std::isnan(x) || (x > into && !std::isnan(into))) into = x;
}
// NaN without sign and payload, +0
inline float tidy(float x) { return std::isnan(x) ? bits_as_float(0x7fc00000) : x + 0.0f; }

}  // namespace lowbit

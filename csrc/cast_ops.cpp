// lowbit::cast, lowbit::cast_absmax, lowbit::cast_absmax_pair, lowbit::block_absmax and lowbit::block_minmax as PyTorch
// operators.
//
// A tensor of any strides becomes a sequence of tiles: matrices of about CastKernels::tile elements whose columns lie
// side by side in memory. What does not is copied into a buffer first.
#include "casting.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using lowbit::Axis;
using lowbit::bits_as_float;
using lowbit::cast_format;
using lowbit::CastFormat;
using lowbit::CastKernels;
using lowbit::CastResult;
using lowbit::CastRounding;
using lowbit::merge_high;
using lowbit::merge_low;
using lowbit::Part;
using lowbit::PhiloxWords;
using lowbit::text;
using lowbit::tidy;
using lowbit::Tiling;
using lowbit::Word;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t worth_a_thread = 1 << 15;  // elements, 5 to 20 microseconds: smaller tensors stay on one thread
constexpr int max_dim = 8;

// ---- tiles as arguments of kernels ----------------------------------------------------------------------------------

float widened(float x) { return x; }
float widened(uint16_t x) { return bits_as_float(int32_t(uint32_t(x) << 16)); }

// The numbers of a tile as float32 in the buffer, with neighbouring columns.
template <class X>
const float* copied(const X* p, const Part& part, int64_t column, int64_t* row, std::vector<float>& buffer) {
  buffer.resize(size_t(part.rows * part.columns));
  for (int64_t r = 0; r < part.rows; ++r)
    for (int64_t c = 0; c < part.columns; ++c) buffer[size_t(r * part.columns + c)] = widened(p[r * *row + c * column]);
  *row = part.columns;
  return buffer.data();
}

// Blocks numbered in the order of the memory of x, so that neighbours lie side by side.
struct Numbering {
  std::vector<int64_t> strides;  // block strides
  std::vector<int64_t> given;    // the number a block came with; empty if that is its number

  Numbering(const Tensor& x, const std::vector<int64_t>& block_strides, int64_t blocks) : strides(block_strides) {
    std::vector<size_t> axes;
    for (size_t d = 0; d < strides.size(); ++d)
      if (strides[d] != 0 && x.size(int64_t(d)) > 1) axes.push_back(d);
    std::sort(axes.begin(), axes.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
    std::vector<size_t> order = axes;
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return x.stride(int64_t(a)) > x.stride(int64_t(b)); });
    if (order == axes) return;
    int64_t count = 1;
    for (size_t i = axes.size(); i-- > 0; count *= x.size(int64_t(axes[i])))
      if (strides[axes[i]] != count) return;  // elements of several axes share a block
    if (count != blocks) return;
    count = 1;
    given.assign(1, 0);
    given.reserve(size_t(blocks));
    for (const size_t d : order) {
      std::vector<int64_t> finer;
      finer.reserve(size_t(blocks));
      for (const int64_t coarse : given)
        for (int64_t i = 0; i < x.size(int64_t(d)); ++i) finer.push_back(coarse + i * block_strides[d]);
      given = std::move(finer);
    }
    for (size_t i = order.size(); i-- > 0; count *= x.size(int64_t(order[i]))) strides[order[i]] = count;
  }
  // one number a block in this order
  const float* in_order(const float* values, std::vector<float>& buffer) const {
    if (values == nullptr || given.empty()) return values;
    buffer.resize(given.size());
    for (size_t i = 0; i < given.size(); ++i) buffer[i] = values[given[i]];
    return buffer.data();
  }
  // and back, in place
  void as_given(float* values) const {
    if (values == nullptr || given.empty()) return;
    const std::vector<float> ordered(values, values + given.size());
    for (size_t i = 0; i < given.size(); ++i) values[given[i]] = ordered[i];
  }
};

// The numbers of a tile with neighbouring columns: in place where they are, otherwise copied into the buffer.
const float* gathered(const float* p, const Part& part, int64_t column, int64_t* row, std::vector<float>& buffer) {
  return column == 1 || part.columns == 1 ? p : copied(p, part, column, row, buffer);
}

// The numbers of a tensor: float32, or bfloat16 in `x16`.
struct Numbers {
  const float* x;
  const uint16_t* x16;

  explicit Numbers(const Tensor& t)
      : x(t.scalar_type() == ScalarType::Float ? t.const_data_ptr<float>() : nullptr),
        x16(x == nullptr ? static_cast<const uint16_t*>(t.const_data_ptr()) : nullptr) {}
  // for a kernel that takes bfloat16, or (`widen`) one that does not
  template <class Tile>
  void place(Tile& tile, const Part& part, const Tiling& tiles, bool widen, std::vector<float>& buffer) const {
    tile.rows = part.rows, tile.columns = part.columns;
    tile.x_row = tiles.rows.x;
    tile.x16 = nullptr;
    const bool neighbours = tiles.columns.x == 1 || part.columns == 1;
    if (x16 == nullptr) tile.x = gathered(x + part.at.x, part, tiles.columns.x, &tile.x_row, buffer);
    else if (neighbours && !widen) tile.x16 = x16 + part.at.x;
    else tile.x = copied(x16 + part.at.x, part, tiles.columns.x, &tile.x_row, buffer);
  }
};

void check_blocks(const char* name, const Tensor& x, const std::vector<int64_t>& block_strides, int64_t blocks,
                  bool bfloat16 = false) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || (bfloat16 && x.scalar_type() == ScalarType::BFloat16), name,
                  bfloat16 ? " needs float32, or bfloat16 for codes" : " needs float32");
  STD_TORCH_CHECK(x.dim() <= max_dim, name, " takes at most 8 dimensions, got ", x.dim());
  STD_TORCH_CHECK(int64_t(block_strides.size()) == x.dim() && blocks >= 0, name, " needs a block stride for each axis");
  if (x.numel() == 0) return;  // no element reads its block
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) {
    const int64_t stride = block_strides[size_t(d)], size = x.size(d);
    STD_TORCH_CHECK(stride >= 0 && (stride <= blocks || size <= 1), name, " needs block strides of 0 to blocks");
    if (size > 1) last += std::min(blocks, size - 1) * stride;
    STD_TORCH_CHECK(last < blocks, name, ": an element belongs to none of the ", blocks, " blocks");
  }
}

// ---- statistics -----------------------------------------------------------------------------------------------------

struct Statistic {
  const Tiling& tiles;
  Numbers x;
  int64_t blocks;
  bool both;  // minmax, otherwise absmax
};

void reduce_tile(const CastKernels& kernels, const Statistic& job, int64_t tile, float* low, float* high,
                 std::vector<float>& buffer) {
  const Part part = job.tiles.part(tile);
  const Axis &rows = job.tiles.rows, &columns = job.tiles.columns;
  lowbit::BlockTile t;
  job.x.place(t, part, job.tiles, false, buffer);
  t.block_row = rows.block;
  t.block_column = columns.block == 1;
  const auto run = job.both ? kernels.minmax : kernels.absmax;
  if (columns.block <= 1) {
    t.low = low + part.at.block, t.high = high + part.at.block;
    return run(t);
  }
  const lowbit::BlockTile all = t;  // blocks further apart: column by column
  t.columns = 1;
  for (int64_t c = 0; c < part.columns; ++c) {
    t.x = all.x + c, t.x16 = all.x16 == nullptr ? nullptr : all.x16 + c;
    t.low = low + part.at.block + c * columns.block, t.high = high + part.at.block + c * columns.block;
    run(t);
  }
}

// `low` and `high` of `count` blocks where nothing was seen yet
void reset(const Statistic& job, float* low, float* high, int64_t count) {
  const float infinity = std::numeric_limits<float>::infinity();
  if (job.both) std::fill(low, low + count, infinity);
  std::fill(high, high + count, job.both ? -infinity : 0.0f);
}

void reduce(const CastKernels& kernels, const Statistic& job, float* low, float* high) {
  const Tiling& tiles = job.tiles;
  const int64_t elements = tiles.tile_rows * tiles.tile_columns;
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, elements));
  const auto run = [&](int64_t begin, int64_t end, float* own_low, float* own_high) {
    std::vector<float> buffer;
    for (int64_t tile = begin; tile < end; ++tile) reduce_tile(kernels, job, tile, own_low, own_high, buffer);
  };
  reset(job, low, high, job.blocks);
  const int64_t pieces = std::min<int64_t>(torch::stable::get_num_threads(), (tiles.tiles + grain - 1) / grain);
  const int64_t unit = tiles.unit(), units = tiles.tiles / unit;
  if (tiles.outer.empty() && tiles.rows.block == 0 && tiles.columns.block == 1 && tiles.column_tiles >= 2 * pieces) {
    // blocks are columns: all rows of a few columns, then the next
    const int64_t columns = std::max<int64_t>(1, grain / tiles.row_tiles);
    torch::stable::parallel_for(0, tiles.column_tiles, columns, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer;
      for (int64_t column = begin; column < end; ++column)
        for (int64_t row = 0; row < tiles.row_tiles; ++row)
          reduce_tile(kernels, job, row * tiles.column_tiles + column, low, high, buffer);
    });
  } else if (pieces > 1 && tiles.disjoint() && units >= 2 * pieces) {
    torch::stable::parallel_for(0, units, std::max<int64_t>(1, grain / unit),
                                [&](int64_t begin, int64_t end) { run(begin * unit, end * unit, low, high); });
  } else if (pieces > 1 && job.blocks * pieces * 4 <= tiles.tiles * elements) {
    std::vector<float> lows(size_t(job.both ? pieces * job.blocks : 0)), highs(size_t(pieces * job.blocks));
    torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        float* own_low = job.both ? lows.data() + piece * job.blocks : nullptr;
        float* own_high = highs.data() + piece * job.blocks;
        reset(job, own_low, own_high, job.blocks);
        run(tiles.tiles * piece / pieces, tiles.tiles * (piece + 1) / pieces, own_low, own_high);
      }
    });
    for (int64_t piece = 0; piece < pieces; ++piece)
      for (int64_t b = 0; b < job.blocks; ++b) {
        merge_high(high[b], highs[size_t(piece * job.blocks + b)]);
        if (!job.both) continue;
        merge_low(low[b], lows[size_t(piece * job.blocks + b)]);
      }
  } else {
    run(0, tiles.tiles, low, high);
  }
  for (int64_t b = 0; b < job.blocks; ++b) {
    high[b] = tidy(high[b]);
    if (job.both) low[b] = tidy(low[b]);
  }
}

void reduce(const CastKernels& kernels, const Tensor& x, const std::vector<int64_t>& block_strides, int64_t blocks,
            bool both, float* low, float* high) {
  const std::vector<int64_t> none(size_t(x.dim()), 0);
  const Numbering numbering(x, block_strides, blocks);
  Tiling tiles = lowbit::tiling(x, none, numbering.strides, nullptr, false, true);
  if (tiles.columns.block == 1 && tiles.rows.block == 0) tiles.cut(CastKernels::columns, CastKernels::wide_tile);
  reduce(kernels, {tiles, Numbers(x), blocks, both}, low, high);
  if (both) numbering.as_given(low);
  numbering.as_given(high);
}

Tensor per_block(int64_t blocks) { return lowbit::empty({&blocks, 1}, ScalarType::Float); }

Tensor block_absmax(const Tensor& x, std::vector<int64_t> block_strides, int64_t blocks) {
  check_blocks("block_absmax", x, block_strides, blocks);
  Tensor out = per_block(blocks);
  float* high = out.mutable_data_ptr<float>();
  if (x.numel() == 0) std::fill(high, high + blocks, 0.0f);
  else reduce(lowbit::kernels().cast, x, block_strides, blocks, false, nullptr, high);
  return out;
}

std::tuple<Tensor, Tensor> block_minmax(const Tensor& x, std::vector<int64_t> block_strides, int64_t blocks) {
  check_blocks("block_minmax", x, block_strides, blocks);
  Tensor lows = per_block(blocks), highs = per_block(blocks);
  float *low = lows.mutable_data_ptr<float>(), *high = highs.mutable_data_ptr<float>();
  if (x.numel() == 0) std::fill(low, low + blocks, 0.0f), std::fill(high, high + blocks, 0.0f);
  else reduce(lowbit::kernels().cast, x, block_strides, blocks, true, low, high);
  return {lows, highs};
}

// ---- cast -----------------------------------------------------------------------------------------------------------

struct Cast {
  Tiling tiles;
  CastFormat format;
  Numbers x;
  const float *scale = nullptr, *u = nullptr;
  const float *zero = nullptr, *offset = nullptr, *step = nullptr;
  const float* inverse = nullptr;  // see CastTile
  void* out = nullptr;
  PhiloxWords key = {};
  int64_t ahead = 0, out_ahead = 0;  // rows, see CastTile
};

struct Buffers {
  std::vector<float> x, u, scale, zero, offset, step, inverse;
};

// Returns the tile with its uniforms; `drawn`, if given, is such a tile whose uniforms are taken instead of a draw.
lowbit::CastTile cast_tile(const CastKernels& kernels, const Cast& job, int64_t tile, Buffers& buffers,
                           const lowbit::CastTile* drawn = nullptr) {
  const Part part = job.tiles.part(tile);
  const Axis &rows = job.tiles.rows, &columns = job.tiles.columns;
  lowbit::CastTile t = {};
  job.x.place(t, part, job.tiles, job.inverse == nullptr, buffers.x);
  t.ahead = job.ahead * rows.x, t.out_ahead = job.out_ahead * rows.out;
  t.scale_column = columns.block != 0;
  const auto of_tile = [&](const float* values, std::vector<float>& buffer) {
    t.scale_row = rows.block;
    if (values == nullptr) return values;
    values += part.at.block;
    return columns.block > 1 ? gathered(values, part, columns.block, &t.scale_row, buffer) : values;
  };
  t.zero = of_tile(job.zero, buffers.zero);
  t.offset = of_tile(job.offset, buffers.offset);
  t.step = of_tile(job.step, buffers.step);
  t.inverse = of_tile(job.inverse, buffers.inverse);
  t.scale = of_tile(job.scale, buffers.scale);
  lowbit::CastUniforms want;
  if (drawn != nullptr) {
    t.u = drawn->u, t.u_row = drawn->u_row, t.u_unit = drawn->u_unit;
  } else if (job.key.given) {
    buffers.u.resize(size_t(CastKernels::buffer) + 4);
    want = lowbit::uniforms_of(job.key, job.tiles, part, buffers.u.data() + 4);
    kernels.uniforms(want, t);
  } else if (job.u != nullptr) {
    t.u_row = rows.u, t.u_unit = 1.0f;
    t.u = gathered(job.u + part.at.u, part, columns.u, &t.u_row, buffers.u);
  }
  t.out_row = rows.out;
  t.out = job.format.result == CastResult::codes ? static_cast<void*>(static_cast<int8_t*>(job.out) + part.at.out)
                                                 : static_cast<void*>(static_cast<float*>(job.out) + part.at.out);
  kernels.cast(job.format, t);
  t.draw = nullptr;
  return t;
}

// The result, with the strides of `x` where it is dense, otherwise contiguous; and those strides.
Tensor result_like(const Tensor& x, CastResult result, bool is_dense, std::vector<int64_t>& strides) {
  const ScalarType type = result == CastResult::codes ? ScalarType::Char : ScalarType::Float;
  std::vector<int64_t> shape;
  strides.assign(size_t(x.dim()), 1);
  for (int64_t d = 0; d < x.dim(); ++d) shape.push_back(x.size(d));
  if (is_dense)
    for (size_t d = 0; d < shape.size(); ++d) strides[d] = x.stride(int64_t(d));
  else
    for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, shape[d]);
  return lowbit::fresh(lowbit::empty_strided(shape, strides, type));
}

std::vector<int64_t> strides_of(const Tensor& t) {
  std::vector<int64_t> strides;
  for (int64_t d = 0; d < t.dim(); ++d) strides.push_back(t.stride(d));
  return strides;
}

// A cast whose scales are still to come, and the memory for its result.
std::pair<Cast, Tensor> prepared(const Tensor& x, const std::optional<Tensor>& key, const std::optional<Tensor>& u,
                                 const std::vector<int64_t>& block_strides, const CastFormat& format) {
  STD_TORCH_CHECK(key.has_value() + u.has_value() == (format.rounding == CastRounding::stochastic),
                  "stochastic rounding needs exactly one of key and u, other roundings neither");
  Cast job = {{}, format, Numbers(x)};
  if (key.has_value()) job.key = PhiloxWords(*key);
  if (u.has_value()) {
    bool same = u->scalar_type() == ScalarType::Float && u->dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = u->size(d) == x.size(d);
    STD_TORCH_CHECK(same, "u must be float32 of the shape of x");
    job.u = u->const_data_ptr<float>();
  }
  const bool is_dense = lowbit::filled(x, 0) != 0;
  std::vector<int64_t> strides;
  Tensor out = result_like(x, format.result, is_dense, strides);
  job.out = out.mutable_data_ptr();
  if (x.numel() != 0)
    job.tiles = lowbit::tiling(x, strides, block_strides, u.has_value() ? &*u : nullptr, job.key.given, is_dense);
  return {job, out};
}

int64_t grain(const Tiling& tiles) {
  return std::max<int64_t>(1, worth_a_thread / (tiles.tile_rows * tiles.tile_columns));
}

void run(const CastKernels& kernels, const Cast& job) {
  torch::stable::parallel_for(0, job.tiles.tiles, grain(job.tiles), [&](int64_t begin, int64_t end) {
    Buffers buffers;
    for (int64_t tile = begin; tile < end; ++tile) cast_tile(kernels, job, tile, buffers);
  });
}

const float* check_per_block(const char* name, const Tensor& t, int64_t blocks) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == blocks &&
                      (blocks <= 1 || t.stride(0) == 1),
                  name, " must be contiguous float32 (blocks,)");
  return t.const_data_ptr<float>();
}

Tensor cast(const Tensor& x, const Tensor& scale, std::optional<Tensor> zero, std::optional<Tensor> key,
            std::optional<Tensor> u, std::vector<int64_t> block_strides, Word kind, std::vector<double> numbers,
            std::optional<Tensor> table, Word rounding, Word result, std::optional<Tensor> offset,
            std::optional<Tensor> step) {
  const CastFormat format = cast_format(text(kind), numbers, table, text(rounding), text(result));
  const int64_t blocks = scale.numel();
  check_blocks("cast", x, block_strides, blocks);
  const auto values = [&](const char* name, const std::optional<Tensor>& t) {
    return t.has_value() ? check_per_block(name, *t, blocks) : nullptr;
  };
  const float *scales = check_per_block("scale", scale, blocks), *zeros = values("zero", zero);
  const float *offsets = values("offset", offset), *steps = values("step", step);
  const Numbering numbering(x, block_strides, blocks);
  auto [job, out] = prepared(x, key, u, numbering.strides, format);
  if (x.numel() == 0) return out;
  Buffers ordered;
  job.scale = numbering.in_order(scales, ordered.scale), job.zero = numbering.in_order(zeros, ordered.zero);
  job.offset = numbering.in_order(offsets, ordered.offset), job.step = numbering.in_order(steps, ordered.step);
  run(lowbit::kernels().cast, job);
  return out;
}

// absmax to scale, in place
void to_scale(float* absmax, int64_t count, float denominator) {
  for (int64_t b = 0; b < count; ++b) {
    absmax[b] = tidy(absmax[b]) / denominator;
    if (absmax[b] == 0.0f) absmax[b] = 1.0f;
  }
}

struct Blocks {
  int64_t first, count;
  int64_t end() const { return first + count; }
};

// Those of a unit that has them whole.
Blocks blocks_of(const Tiling& tiles, int64_t unit) {
  return {tiles.part(unit * tiles.unit()).at.block,
          tiles.outer.empty() ? std::min(tiles.tile_rows, tiles.rows.size - unit * tiles.tile_rows) : 1};
}

// Scales that come from the data, and their inverses where codes can do with them.
struct Scales {
  float *scale, *inverse;
  float denominator, most;  // of the scales that have inverses

  Scales(const CastFormat& f, float* scales, std::vector<float>& inverses, int64_t blocks, float d)
      : scale(scales), inverse(nullptr), denominator(d) {
    // Stochastic: x / scale must not underflow to 0. x is at most scale * denominator.
    most = f.rounding == CastRounding::stochastic ? 1.0f : 0x1p60f;
    const bool rounding = f.rounding == CastRounding::stochastic || f.rounding == CastRounding::half_even;
    if (f.result != CastResult::codes || !rounding || denominator > 0x1p20f) return;
    inverses.resize(size_t(blocks));
    inverse = inverses.data();
  }
  // Makes scales of the absolute maxima of these blocks; returns the inverses of all blocks, if these can be used.
  const float* finish(const Blocks& blocks) const {
    to_scale(scale + blocks.first, blocks.count, denominator);
    for (int64_t b = blocks.first; inverse != nullptr && b < blocks.end(); ++b) inverse[b] = 1.0f / scale[b];
    return usable(blocks);
  }
  const float* usable(const Blocks& blocks) const {
    for (int64_t b = blocks.first; b < blocks.end(); ++b)
      if (!(scale[b] >= 0x1p-60f && scale[b] <= most)) return nullptr;
    return inverse;
  }
};

// Whether threads that take one unit after another all have work.
bool busy(const Tiling& tiles) {
  return tiles.tiles / tiles.unit() >= 4 * int64_t(torch::stable::get_num_threads()) || tiles.tiles <= grain(tiles);
}

bool one_block_a_unit(const Tiling& tiles, int64_t blocks) {
  return tiles.whole_blocks() && tiles.first().block == 1 && tiles.first().size == blocks;
}

// The scales of a unit whose blocks are whole; returns the inverses, if these can be used. `see` gets every tile.
template <class See>
const float* scale_unit(const CastKernels& kernels, const Statistic& absmax, const Scales& scales, int64_t u,
                        Buffers& buffers, See see) {
  const int64_t unit = absmax.tiles.unit();
  const Blocks blocks = blocks_of(absmax.tiles, u);
  reset(absmax, nullptr, scales.scale + blocks.first, blocks.count);
  for (int64_t tile = u * unit; tile < (u + 1) * unit; ++tile) {
    reduce_tile(kernels, absmax, tile, nullptr, scales.scale, buffers.x);
    see(tile);
  }
  return scales.finish(blocks);
}

void absmax_and_cast(const CastKernels& kernels, const Tensor& x, const std::vector<int64_t>& block_strides, Cast& job,
                     float* out, int64_t blocks, float denominator) {
  job.scale = out;
  if (x.numel() == 0) return std::fill(out, out + blocks, 1.0f);
  std::vector<float> inverses;
  const Scales scales(job.format, out, inverses, blocks, denominator);
  const Tiling& tiles = job.tiles;
  if (!one_block_a_unit(tiles, blocks) || !busy(tiles)) {
    reduce(kernels, x, block_strides, blocks, false, nullptr, out);
    job.inverse = scales.finish({0, blocks});
    return run(kernels, job);
  }
  const int64_t unit = tiles.unit(), units = tiles.tiles / unit;
  torch::stable::parallel_for(0, units, std::max<int64_t>(1, grain(tiles) / unit), [&](int64_t begin, int64_t end) {
    Buffers buffers;
    Cast own = job;
    const Statistic absmax = {tiles, job.x, 0, false};
    for (int64_t u = begin; u < end; ++u) {  // a unit's cast while it is still in the cache
      own.inverse = scale_unit(kernels, absmax, scales, u, buffers, [](int64_t) {});
      for (int64_t tile = u * unit; tile < (u + 1) * unit; ++tile) cast_tile(kernels, own, tile, buffers);
    }
  });
}

void check_absmax(const char* name, const Tensor& x, const std::vector<int64_t>& block_strides, int64_t blocks,
                  double denominator, bool codes) {
  check_blocks(name, x, block_strides, blocks, codes);
  STD_TORCH_CHECK(denominator > 0, "the denominator must be positive, got ", denominator);
}

std::tuple<Tensor, Tensor> cast_absmax(const Tensor& x, std::optional<Tensor> key, std::vector<int64_t> block_strides,
                                       int64_t blocks, double denominator, Word kind,
                                       std::vector<double> numbers, std::optional<Tensor> table, Word rounding,
                                       Word result) {
  const CastFormat format = cast_format(text(kind), numbers, table, text(rounding), text(result));
  check_absmax("cast_absmax", x, block_strides, blocks, denominator, format.result == CastResult::codes);
  auto [job, out] = prepared(x, key, std::nullopt, block_strides, format);
  Tensor scale = per_block(blocks);
  absmax_and_cast(lowbit::kernels().cast, x, block_strides, job, scale.mutable_data_ptr<float>(), blocks,
                  float(denominator));
  return {out, scale};
}

// ---- two casts of one tensor ----------------------------------------------------------------------------------------

// The same tiles with the blocks of the other cast.
Tiling other_blocks(Tiling t) {
  for (Axis& a : t.outer) std::swap(a.block, a.other);
  std::swap(t.rows.block, t.rows.other), std::swap(t.columns.block, t.columns.other);
  return t;
}

// Sums over all axes but the last: rows in their order are cut into runs, each is summed row by row, then the runs are, all
// in float32.
struct ColumnSums {
  static constexpr int64_t runs = 32;
  Numbers x;
  int64_t rows, columns, each;  // rows of a run
  std::vector<float> parts;     // sums of the runs

  explicit ColumnSums(const Tensor& contiguous)
      : x(contiguous), rows(1), columns(contiguous.size(contiguous.dim() - 1)) {
    for (int64_t d = 0; d < contiguous.dim() - 1; ++d) rows *= contiguous.size(d);
    each = std::max<int64_t>(1, (rows + runs - 1) / runs);
    parts.assign(size_t(runs * columns), 0.0f);
  }
  // the first row of the first run that starts in this row or later
  int64_t run_from(int64_t row) const { return std::min(rows, (row + each - 1) / each * each); }
  // rows that follow those of their run which were added before
  void add(const CastKernels& kernels, int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t run = begin / each, stop = std::min(end, (run + 1) * each), at = begin * columns;
      kernels.add_rows(x.x == nullptr ? nullptr : x.x + at, x.x == nullptr ? x.x16 + at : nullptr, columns, stop - begin,
                       columns, parts.data() + run * columns);
      begin = stop;
    }
  }
  void add_all(const CastKernels& kernels) {
    const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, each * columns));
    torch::stable::parallel_for(0, runs, grain, [&](int64_t begin, int64_t end) {
      add(kernels, std::min(rows, begin * each), std::min(rows, end * each));
    });
  }
  void finish(const CastKernels& kernels, float* out) const {
    std::fill(out, out + columns, 0.0f);
    kernels.add_rows(parts.data(), nullptr, columns, runs, columns, out);
    for (int64_t c = 0; c < columns; ++c)
      if (std::isnan(out[c])) out[c] = tidy(out[c]);
  }
};

// Whether tiles are rows of the contiguous matrix that `sums` sees.
bool same_rows(const Tiling& tiles, const ColumnSums& sums) {
  return tiles.outer.empty() && tiles.rows.size == sums.rows && tiles.columns.size == sums.columns &&
         (sums.rows == 1 || tiles.rows.x == sums.columns) && (sums.columns == 1 || tiles.columns.x == 1);
}

// Casts `near`, whose blocks are units, and `far`: in a first pass over x the scales of both, in a second both casts of a
// tile, with one draw where both have the same key. Each thread has its own pieces, in the second pass backwards: their
// ends may still be in its cache. `seen` are the tiles of the first pass, which needs no order of uniforms. `sums`, or
// null, are of their rows and made on the way.
void cast_both(const CastKernels& kernels, const Tiling& seen, const Cast& near, const Scales& near_scales, Cast& far,
               const Scales& far_scales, int64_t far_blocks, int64_t pieces, ColumnSums* sums) {
  const Tiling seen_far = other_blocks(seen);
  const Statistic near_absmax = {seen, near.x, 0, false}, absmax = {seen_far, far.x, far_blocks, false};
  std::vector<float> highs(size_t(pieces * far_blocks));
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    Buffers buffers;
    for (int64_t piece = begin; piece < end; ++piece) {
      float* high = highs.data() + piece * far_blocks;
      const auto see = [&](int64_t tile) { reduce_tile(kernels, absmax, tile, nullptr, high, buffers.x); };
      const int64_t units = seen.tiles / seen.unit(), height = seen.tile_rows;
      const auto first = [&](int64_t p) { return units * p / pieces; };
      int64_t summed = sums == nullptr ? 0 : sums->run_from(first(piece) * height);
      for (int64_t u = first(piece); u < first(piece + 1); ++u) {
        scale_unit(kernels, near_absmax, near_scales, u, buffers, see);
        const int64_t end = (u + 1) * height;
        if (sums != nullptr && end > summed) {
          sums->add(kernels, summed, std::min(end, sums->rows));
          summed = end;
        }
      }
      // a run belongs to the piece in which it starts
      if (sums != nullptr) sums->add(kernels, summed, sums->run_from(first(piece + 1) * height));
    }
  });
  reset(absmax, nullptr, far_scales.scale, far_blocks);
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t b = 0; b < far_blocks; ++b) merge_high(far_scales.scale[b], highs[size_t(piece * far_blocks + b)]);
  far.inverse = far_scales.finish({0, far_blocks});
  far.out_ahead = -far.tiles.tile_rows;
  const int64_t unit = near.tiles.unit(), units = near.tiles.tiles / unit;
  const bool one_draw = near.key.given && near.key == far.key;
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    Buffers buffers;
    Cast own = near;
    own.ahead = own.out_ahead = -near.tiles.tile_rows;
    for (int64_t u = units * end / pieces; u-- > units * begin / pieces;) {
      own.inverse = near_scales.usable(blocks_of(near.tiles, u));
      for (int64_t tile = (u + 1) * unit; tile-- > u * unit;) {
        const lowbit::CastTile drawn = cast_tile(kernels, own, tile, buffers);
        cast_tile(kernels, far, tile, buffers, one_draw ? &drawn : nullptr);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cast_absmax_pair(
    const Tensor& x, std::optional<Tensor> key1, std::optional<Tensor> key2, std::vector<int64_t> strides1,
    int64_t blocks1, std::vector<int64_t> strides2, int64_t blocks2, double denominator, Word kind,
    std::vector<double> numbers, std::optional<Tensor> table, Word rounding1, Word rounding2,
    bool with_sums) {
  const std::string name = text(kind);
  const CastFormat format1 = cast_format(name, numbers, table, text(rounding1), "codes");
  const CastFormat format2 = cast_format(name, numbers, table, text(rounding2), "codes");
  check_absmax("cast_absmax_pair", x, strides1, blocks1, denominator, true);
  check_absmax("cast_absmax_pair", x, strides2, blocks2, denominator, true);
  STD_TORCH_CHECK(!with_sums || x.dim() > 0, "cast_absmax_pair: sums are over all axes but the last, and x has none");
  const CastKernels& kernels = lowbit::kernels().cast;
  auto [job1, out1] = prepared(x, key1, std::nullopt, strides1, format1);
  auto [job2, out2] = prepared(x, key2, std::nullopt, strides2, format2);
  Tensor scale1 = per_block(blocks1), scale2 = per_block(blocks2), sums = per_block(with_sums ? x.size(x.dim() - 1) : 0);
  float *data1 = scale1.mutable_data_ptr<float>(), *data2 = scale2.mutable_data_ptr<float>();
  const float divisor = float(denominator);
  std::optional<Tensor> contiguous;
  std::optional<ColumnSums> columns;
  if (with_sums) columns.emplace(contiguous.emplace(x.is_contiguous() ? x : torch::stable::contiguous(x)));
  bool summed = false;
  const auto fused = [&](const Tiling& seen, const Tiling& tiles, Cast& near, float* near_out, int64_t near_blocks,
                         Cast& far, float* far_out, int64_t far_blocks) {
    const int64_t pieces = tiles.tiles <= grain(tiles) ? 1 : torch::stable::get_num_threads();
    if (far_blocks * pieces * 4 > x.numel()) return false;
    for (const Tiling* t : {&seen, &tiles})
      if (!one_block_a_unit(*t, near_blocks) || !busy(*t)) return false;
    near.tiles = tiles, far.tiles = other_blocks(tiles);
    near.scale = near_out, far.scale = far_out;
    std::vector<float> inverses1, inverses2;
    const Scales near_scales(near.format, near_out, inverses1, near_blocks, divisor);
    const Scales far_scales(far.format, far_out, inverses2, far_blocks, divisor);
    summed = with_sums && same_rows(seen, *columns);
    cast_both(kernels, seen, near, near_scales, far, far_scales, far_blocks, pieces, summed ? &*columns : nullptr);
    return true;
  };
  const auto both = [&] {
    if (x.numel() != 0) {
      const std::vector<int64_t> strides = strides_of(out1);
      const bool keyed = job1.key.given || job2.key.given, is_dense = lowbit::filled(x, 0) != 0;
      // several rows share one load of the maxima or scales of the columns
      const Tiling seen = lowbit::tiling(x, strides, strides1, nullptr, false, is_dense, &strides2,
                                         CastKernels::wide_tile);
      const Tiling tiles = keyed ? lowbit::tiling(x, strides, strides1, nullptr, true, is_dense, &strides2) : seen;
      if (fused(seen, tiles, job1, data1, blocks1, job2, data2, blocks2) ||
          fused(other_blocks(seen), other_blocks(tiles), job2, data2, blocks2, job1, data1, blocks1))
        return;
    }
    absmax_and_cast(kernels, x, strides1, job1, data1, blocks1, divisor);
    absmax_and_cast(kernels, x, strides2, job2, data2, blocks2, divisor);
  };
  both();
  if (with_sums) {
    if (!summed) columns->add_all(kernels);
    columns->finish(kernels, sums.mutable_data_ptr<float>());
  }
  return {out1, scale1, out2, scale2, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  m.impl("block_absmax", TORCH_BOX(&block_absmax));
  m.impl("block_minmax", TORCH_BOX(&block_minmax));
  m.impl("cast", TORCH_BOX(&cast));
  m.impl("cast_absmax", TORCH_BOX(&cast_absmax));
  m.impl("cast_absmax_pair", TORCH_BOX(&cast_absmax_pair));
}

// lowbit::reflect, lowbit::reflect_minmax and lowbit::reflect_cast as PyTorch operators.
#include "casting.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace {

using lowbit::CastKernels;
using lowbit::Part;
using lowbit::Tiling;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t strip = lowbit::ReflectKernels::strip;

// Whether the elements fill their memory without gap or overlap, row after row.
bool rows_in_memory(const Tensor& x) {
  const int64_t row = lowbit::filled(x, 1);
  return row != 0 && (x.size(0) == 1 || x.stride(0) == row);
}

void check_rows(const char* name, const Tensor& t, ScalarType type, int64_t rows) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.dim() == 1 && t.size(0) == rows && t.is_contiguous(), name,
                  " must be contiguous ", type == ScalarType::Long ? "int64" : "float32", " of shape (rows,)");
}

// The rows of `x` in their groups; `x` is a copy where its elements do not lie row after row.
struct Groups {
  Tensor x;
  int64_t rows, columns = 0, count = 0;
  std::vector<int64_t> starts, order;  // as in ReflectTile
  std::vector<double> v, factor;       // of each row: its part of the normal, and 2 / |v|^2

  Groups(const Tensor& given, const Tensor& group, const Tensor& normal) : x(given), rows(0) {
    STD_TORCH_CHECK(given.scalar_type() == ScalarType::Float && given.dim() >= 1, "reflect needs float32 (rows, ...)");
    rows = given.size(0);
    check_rows("group", group, ScalarType::Long, rows);
    check_rows("v", normal, ScalarType::Float, rows);
    if (given.numel() == 0) return;
    columns = given.numel() / rows;
    if (!rows_in_memory(given)) x = torch::stable::contiguous(given);
    const int64_t* groups = group.const_data_ptr<int64_t>();
    const float* parts = normal.const_data_ptr<float>();
    const auto size = static_cast<size_t>(rows);
    std::vector<double> norm(size, 0.0);
    starts.assign(size + 1, 0), order.resize(size), factor.resize(size), v.assign(parts, parts + rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t g = groups[r];
      STD_TORCH_CHECK(g >= 0 && g < rows, "a group is 0 to rows - 1; got ", g);
      norm[size_t(g)] += double(parts[r]) * double(parts[r]);
      ++starts[size_t(g) + 1];
      count = std::max(count, g + 1);
    }
    for (size_t g = 0; g < size; ++g) starts[g + 1] += starts[g];
    std::vector<int64_t> next(starts);
    for (int64_t r = 0; r < rows; ++r) {
      const auto g = static_cast<size_t>(groups[r]);
      factor[size_t(r)] = 2.0 / (norm[g] == 0.0 ? 1.0 : norm[g]);
      order[size_t(next[g]++)] = r;
    }
  }
};

// One reflection: the factors of every row.
struct Mirror {
  const Groups& groups;
  std::vector<float> own, spread, collect;

  // `before` and `after` of a row
  template <class Before, class After>
  Mirror(const Groups& g, Before before, After after)
      : groups(g), own(g.v.size()), spread(own.size()), collect(own.size()) {
    for (size_t r = 0; r < own.size(); ++r) {
      const double first = before(r), last = after(r);
      own[r] = float(last * first), spread[r] = float(last * (g.v[r] * g.factor[r])), collect[r] = float(g.v[r] * first);
    }
  }
  // `count` columns of all rows; `copy` has room for rows * strip
  void run(const float* x, int64_t x_row, float* out, int64_t out_row, int64_t count, float* copy) const {
    lowbit::kernels().reflect.reflect({groups.rows, count, groups.count, x, x_row, out, out_row, groups.order.data(),
                                       groups.starts.data(), own.data(), spread.data(), collect.data(), copy});
  }
};

Tensor reflect(const Tensor& given, const Tensor& group, const Tensor& v, std::optional<Tensor> before,
               std::optional<Tensor> after) {
  const Groups groups(given, group, v);
  if (before.has_value()) check_rows("before", *before, ScalarType::Float, groups.rows);
  if (after.has_value()) check_rows("after", *after, ScalarType::Float, groups.rows);
  if (given.numel() == 0) return lowbit::empty(given.sizes(), ScalarType::Float);
  const auto factor = [](const std::optional<Tensor>& t) {
    return [data = t.has_value() ? t->const_data_ptr<float>() : nullptr](size_t r) {
      return data == nullptr ? 1.0f : data[r];
    };
  };
  const Mirror mirror(groups, factor(before), factor(after));
  Tensor out = lowbit::fresh(torch::stable::empty_like(groups.x));
  const int64_t columns = groups.columns, strips = (columns + strip - 1) / strip;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (groups.rows * strip));
  const float* data = groups.x.const_data_ptr<float>();
  float* result = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> copy(size_t(groups.rows * strip));
    const int64_t at = begin * strip;
    mirror.run(data + at, columns, result + at, columns, std::min(end * strip, columns) - at, copy.data());
  });
  return out;
}

// ---- with what is done to the reflected rows ------------------------------------------------------------------------

// Some columns of all rows, those of one tile of a row, side by side: (rows, part.rows, part.columns).
struct Slab {
  Part part;
  int64_t elements;  // of each row
  float* data;
  float* copy;  // for Mirror::run
};

// Cuts the rows into slabs that stay in a core's own cache.
struct Slabs {
  Tiling tiles;  // of one row
  int64_t columns, pieces, room;

  Slabs(const Groups& g, bool keyed) : columns(g.columns) {
    const std::vector<int64_t> none(size_t(g.x.dim()), 0);
    const int64_t most = std::clamp<int64_t>((1 << 16) / g.rows, 256, 512);
    Tensor x = g.x;  // `narrow` takes no constant
    tiles = lowbit::tiling(torch::stable::narrow(x, 0, 0, 1), none, none, nullptr, keyed, true, nullptr, most);
    constexpr int64_t worth_a_thread = 1 << 14;
    pieces = std::min<int64_t>({torch::stable::get_num_threads(), tiles.tiles, 1 + g.x.numel() / worth_a_thread});
    room = g.rows * tiles.tile_rows * tiles.tile_columns;
  }
  // run(place in a row's memory, place in the slab, count) for the elements that are neighbours in both
  template <class Run>
  void neighbours(const Slab& slab, Run run) const {
    const Part& part = slab.part;
    if (part.rows == 1 || tiles.rows.x == part.columns) return run(part.at.x, int64_t(0), slab.elements);
    for (int64_t r = 0; r < part.rows; ++r) run(part.at.x + r * tiles.rows.x, r * part.columns, part.columns);
  }
  // use(slab, piece) for every slab; those of a piece come one after another
  template <class Use>
  void each(const Mirror& mirror, Use use) const {
    const float* x = mirror.groups.x.const_data_ptr<float>();
    torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> data(static_cast<size_t>(room)), copy(size_t(mirror.groups.rows * strip));
      for (int64_t piece = begin; piece < end; ++piece)
        for (int64_t tile = tiles.tiles * piece / pieces; tile < tiles.tiles * (piece + 1) / pieces; ++tile) {
          const Part part = tiles.part(tile);
          const Slab slab = {part, part.rows * part.columns, data.data(), copy.data()};
          neighbours(slab, [&](int64_t from, int64_t to, int64_t count) {
            mirror.run(x + from, columns, slab.data + to, slab.elements, count, slab.copy);
          });
          use(slab, piece);
        }
    });
  }
};

std::tuple<Tensor, Tensor> reflect_minmax(const Tensor& given, const Tensor& group, const Tensor& v,
                                          const Tensor& before) {
  const Groups groups(given, group, v);
  check_rows("before", before, ScalarType::Float, groups.rows);
  const int64_t rows = groups.rows;
  Tensor lows = lowbit::empty({&rows, 1}, ScalarType::Float);
  Tensor highs = lowbit::empty({&rows, 1}, ScalarType::Float);
  float *low = lows.mutable_data_ptr<float>(), *high = highs.mutable_data_ptr<float>();
  if (given.numel() == 0) {
    std::fill(low, low + rows, 0.0f), std::fill(high, high + rows, 0.0f);
    return {lows, highs};
  }
  const float* first = before.const_data_ptr<float>();
  const Mirror mirror(groups, [first](size_t r) { return first[r]; }, [](size_t) { return 1.0f; });
  const Slabs slabs(groups, false);
  constexpr float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> piece_low(size_t(slabs.pieces * rows), infinity), piece_high(piece_low.size(), -infinity);
  slabs.each(mirror, [&](const Slab& slab, int64_t piece) {
    lowbit::BlockTile t = {rows, slab.elements, slab.data, nullptr, slab.elements, piece_low.data() + piece * rows,
                           piece_high.data() + piece * rows, 1, false};
    lowbit::kernels().cast.minmax(t);
  });
  for (int64_t r = 0; r < rows; ++r) {
    low[r] = infinity, high[r] = -infinity;
    for (int64_t piece = 0; piece < slabs.pieces; ++piece) {
      lowbit::merge_low(low[r], piece_low[size_t(piece * rows + r)]);
      lowbit::merge_high(high[r], piece_high[size_t(piece * rows + r)]);
    }
    low[r] = lowbit::tidy(low[r]), high[r] = lowbit::tidy(high[r]);
  }
  return {lows, highs};
}

Tensor reflect_cast(const Tensor& given, const Tensor& group, const Tensor& v, const Tensor& factor,
                    const Tensor& scale, const Tensor& offset, std::optional<Tensor> key, lowbit::Word kind,
                    std::vector<double> numbers, std::optional<Tensor> table, lowbit::Word rounding) {
  const lowbit::CastFormat format =
      lowbit::cast_format(lowbit::text(kind), numbers, table, lowbit::text(rounding), "values");
  const Groups groups(given, group, v);
  const int64_t rows = groups.rows;
  check_rows("factor", factor, ScalarType::Float, rows);
  check_rows("scale", scale, ScalarType::Float, rows);
  check_rows("offset", offset, ScalarType::Float, rows);
  STD_TORCH_CHECK(key.has_value() == (format.rounding == lowbit::CastRounding::stochastic),
                  "stochastic rounding needs a key, other roundings none");
  const lowbit::PhiloxWords words = key.has_value() ? lowbit::PhiloxWords(*key) : lowbit::PhiloxWords();
  if (given.numel() == 0) return lowbit::empty(given.sizes(), ScalarType::Float);
  const float* s = factor.const_data_ptr<float>();
  const auto one = [](size_t) { return 1.0f; };
  const Mirror mirror(groups, [s](size_t r) { return s[r]; }, one);
  const Mirror inverse(groups, one, [s](size_t r) { return 1.0f / s[r]; });
  const float *scales = scale.const_data_ptr<float>(), *offsets = offset.const_data_ptr<float>();
  Tensor out = lowbit::fresh(torch::stable::empty_like(groups.x));
  float* result = out.mutable_data_ptr<float>();
  const Slabs slabs(groups, words.given);
  const CastKernels& kernels = lowbit::kernels().cast;
  slabs.each(mirror, [&](const Slab& slab, int64_t) {
    float u[CastKernels::buffer + 4];
    for (int64_t r = 0; r < rows; ++r) {
      float* data = slab.data + r * slab.elements;
      lowbit::CastTile t = {};
      t.rows = slab.part.rows, t.columns = slab.part.columns;
      t.x = data, t.x_row = t.out_row = t.columns, t.out = data;
      t.scale = scales + r, t.offset = offsets + r;
      lowbit::CastUniforms want;
      if (words.given) {
        want = lowbit::uniforms_of(words, slabs.tiles, slab.part, u + 4);
        want.first += uint64_t(r * groups.columns);
        kernels.uniforms(want, t);
      }
      kernels.cast(format, t);
    }
    slabs.neighbours(slab, [&](int64_t to, int64_t from, int64_t count) {
      inverse.run(slab.data + from, slab.elements, result + to, groups.columns, count, slab.copy);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  m.impl("reflect", TORCH_BOX(&reflect));
  m.impl("reflect_minmax", TORCH_BOX(&reflect_minmax));
  m.impl("reflect_cast", TORCH_BOX(&reflect_cast));
}

// lowbit::reflect for one instruction set.
#pragma once

namespace lowbit {
namespace {

// Columns of one group: their sums, and what becomes of a row. A whole strip, or `count` columns.
template <bool whole>
struct ReflectSums;

template <>
struct ReflectSums<true> {
  static constexpr int64_t vectors = ReflectKernels::strip / Vec::lanes;
  Vec::F total[vectors];

  explicit ReflectSums(int64_t) {
    for (Vec::F& t : total) t = Vec::set(0.0f);
  }
  void add(const float* x, float collect, float* copy) {
    const Vec::F c = Vec::set(collect);
    for (int64_t i = 0; i < vectors; ++i) {
      const Vec::F v = Vec::load(x + Vec::lanes * i);
      Vec::store(copy + Vec::lanes * i, v);
      total[i] = Vec::add(total[i], Vec::mul(c, v));
    }
  }
  void put(const float* x, float own, float spread, float* out) const {
    const Vec::F a = Vec::set(own), b = Vec::set(spread);
    for (int64_t i = 0; i < vectors; ++i) {
      const Vec::F y = Vec::sub(Vec::mul(a, Vec::load(x + Vec::lanes * i)), Vec::mul(b, total[i]));
      Vec::store(out + Vec::lanes * i, Vec::nan_or(y, y));
    }
  }
};

template <>
struct ReflectSums<false> {
  float total[ReflectKernels::strip];
  int64_t count;

  explicit ReflectSums(int64_t n) : count(n) {
    for (int64_t c = 0; c < count; ++c) total[c] = 0.0f;
  }
  void add(const float* x, float collect, float* copy) {
    for (int64_t c = 0; c < count; ++c) copy[c] = x[c], total[c] += collect * x[c];
  }
  void put(const float* x, float own, float spread, float* out) const {
    for (int64_t c = 0; c < count; ++c) {
      const float y = own * x[c] - spread * total[c];
      out[c] = y == y ? y : __builtin_nanf("");
    }
  }
};

// The columns from `at` on. Rows are often a power of two apart, so that what was read of them is soon lost from a cache:
// it is copied.
template <bool whole>
void reflect_strip(const ReflectTile& tile, int64_t at, int64_t count) {
  constexpr int64_t strip = ReflectKernels::strip, ahead = 8, line = 16;
  for (int64_t g = 0; g < tile.groups; ++g) {
    const int64_t first = tile.starts[g], last = tile.starts[g + 1];
    ReflectSums<whole> sums(count);
    for (int64_t k = first; k < last; ++k) {
      const int64_t r = tile.order[k], soon = tile.order[k + ahead < tile.rows ? k + ahead : k];
      for (int64_t c = 0; c < count; c += line) __builtin_prefetch(tile.x + soon * tile.x_row + at + c);
      sums.add(tile.x + r * tile.x_row + at, tile.collect[r], tile.copy + (k - first) * strip);
    }
    for (int64_t k = first; k < last; ++k) {
      const int64_t r = tile.order[k];
      sums.put(tile.copy + (k - first) * strip, tile.own[r], tile.spread[r], tile.out + r * tile.out_row + at);
    }
  }
}

void reflect(const ReflectTile& tile) {
  constexpr int64_t strip = ReflectKernels::strip;
  int64_t at = 0;
  for (; at + strip <= tile.columns; at += strip) reflect_strip<true>(tile, at, strip);
  if (at < tile.columns) reflect_strip<false>(tile, at, tile.columns - at);
}

constexpr ReflectKernels reflect_kernels = {reflect};

}  // namespace
}  // namespace lowbit

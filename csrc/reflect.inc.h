// lowbit::reflect for one instruction set: plain loops that compilers turn into vectors.
#pragma once

namespace lowbit {
namespace {

void reflect(const ReflectTile& tile) {
  const int64_t columns = tile.columns;
  for (int64_t i = 0; i < tile.groups * columns; ++i) tile.totals[i] = 0.0;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* __restrict x = tile.x + r * tile.x_row;
    float* __restrict copy = tile.copy + r * columns;
    double* __restrict total = tile.totals + tile.group[r] * columns;
    const double collect = tile.collect[r];
    for (int64_t c = 0; c < columns; ++c) {
      copy[c] = x[c];
      total[c] += collect * double(x[c]);
    }
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* __restrict x = tile.copy + r * columns;
    const double* __restrict total = tile.totals + tile.group[r] * columns;
    float* __restrict out = tile.out + r * tile.out_row;
    const double own = tile.own[r], spread = tile.spread[r];
    for (int64_t c = 0; c < columns; ++c) {
      const float y = float(own * double(x[c]) - spread * total[c]);
      out[c] = y == y ? y : __builtin_nanf("");
    }
  }
}

constexpr ReflectKernels reflect_kernels = {reflect};

}  // namespace
}  // namespace lowbit

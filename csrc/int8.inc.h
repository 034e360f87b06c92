// The products of int8 codes for one instruction set; needs `Vec`. Operands and layouts are in int8.h.
#pragma once

#include "int8_dot.inc.h"
#include "int8_pack.inc.h"

namespace lowbit {
namespace {

constexpr int panel_sums = int(int8_panel / Dot::lanes);  // vectors of sums for one panel

inline uint16_t bfloat16_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? uint16_t(0x7fc0) : uint16_t(rounded);
}

// `n` <= 16 results
inline void store_results(void* out, int64_t at, bool bfloat16, const float* line, int64_t n) {
  if (!bfloat16) {
    memcpy((float*)out + at, line, size_t(n) * sizeof(float));
    return;
  }
  uint16_t bits[int8_panel];
  for (int64_t j = 0; j < int8_panel; ++j) bits[j] = bfloat16_bits(line[j]);
  memcpy((uint16_t*)out + at, bits, size_t(n) * sizeof(uint16_t));
}

// one row of one panel through the epilogue; `real` are the sums
inline void finish(const Int8Product& job, int64_t at, float left_scale, int64_t column, const Vec::F* real) {
  const Vec::F scale = Vec::set(left_scale);
  const int64_t columns = job.columns - column;
  Vec::F result[panel_sums];
  for (int v = 0; v < panel_sums; ++v) {
    const int64_t lane = column + v * Vec::lanes;
    result[v] = Vec::mul(real[v], Vec::mul(scale, Vec::load(job.right_scale + lane)));
    if (job.bias != nullptr) result[v] = Vec::add(result[v], Vec::load(job.bias + lane));
  }
  if (!job.bfloat16 && columns >= int8_panel) {
    float* out = (float*)job.out + at;
    for (int v = 0; v < panel_sums; ++v) Vec::store(out + v * Vec::lanes, result[v]);
    return;
  }
  float line[int8_panel];
  for (int v = 0; v < panel_sums; ++v) Vec::store(line + v * Vec::lanes, result[v]);
  if (columns >= int8_panel) store_results(job.out, at, job.bfloat16, line, int8_panel);  // a copy of fixed size
  else store_results(job.out, at, job.bfloat16, line, columns);
}

template <int Rows, int Panels>
void tile(const Int8Product& job, const Int8Rows& group, int64_t row, int64_t panel) {
  constexpr int width = Panels * panel_sums;
  const int64_t column = panel * int8_panel;
  Dot::Sums sums[Rows][width];
  for (int v = 0; v < width; ++v) {
    const Dot::Sums correction = Dot::load_sums(job.correction + column + v * Dot::lanes);
    for (int i = 0; i < Rows; ++i) sums[i][v] = correction;
  }
  const uint8_t* const left = group.left + row * job.left_row;
  const int64_t pitch = job.left_row;
  const int8_t* right = job.right + panel * job.panel_bytes;
  for (int64_t s = 0; s < job.segment_count; ++s) {
    const uint8_t* a[(Rows + 2) / 3];  // each for three rows: x86 addresses hold pitch and 2 * pitch
    for (int i = 0; i < (Rows + 2) / 3; ++i) a[i] = left + job.segments[s] + 3 * i * pitch;
    for (int64_t k = 0; k < job.steps; ++k) {
      Dot::Right b[width];
      for (int p = 0; p < Panels; ++p)
        for (int v = 0; v < panel_sums; ++v)
          b[p * panel_sums + v] = Dot::right(right + p * job.panel_bytes + v * Dot::lanes * 4);
      right += 64;
      for (int i = 0; i < Rows; ++i) {
        const Dot::Left x = Dot::left(a[i / 3] + i % 3 * pitch);
        for (int v = 0; v < width; ++v) sums[i][v] = Dot::add(sums[i][v], x, b[v]);
      }
      for (int i = 0; i < (Rows + 2) / 3; ++i) a[i] += 4;
    }
  }
  if (!job.first || !job.last) {
    // a wrapping sum: through unsigned numbers
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < width; ++v) {
        int32_t* kept = group.sums + (row + i) * job.sums_row + column + v * Dot::lanes;
        int32_t line[Dot::lanes];
        Dot::store_sums(line, sums[i][v]);
        if (!job.first)
          for (int64_t j = 0; j < Dot::lanes; ++j) line[j] = int32_t(uint32_t(line[j]) + uint32_t(kept[j]));
        if (job.last) sums[i][v] = Dot::load_sums(line);
        else memcpy(kept, line, sizeof line);
      }
    if (!job.last) return;
  }
  for (int i = 0; i < Rows; ++i)
    for (int p = 0; p < Panels; ++p) {
      Vec::F real[panel_sums];
      for (int v = 0; v < panel_sums; ++v) real[v] = Dot::real(sums[i][p * panel_sums + v]);
      finish(job, group.out + (row + i) * job.out_row + column + p * int8_panel,
             group.left_scale[(row + i) * job.left_scale_step], column + p * int8_panel, real);
    }
}

typedef void (*Tile)(const Int8Product&, const Int8Rows&, int64_t row, int64_t panel);

template <int Rows, int Panels>
struct Tiles {
  static Tile of(int64_t rows) { return rows == Rows ? &tile<Rows, Panels> : Tiles<Rows - 1, Panels>::of(rows); }
};
template <int Panels>
struct Tiles<0, Panels> {
  static Tile of(int64_t) { return nullptr; }
};

// all groups with some panels: the groups inside, so that the panels stay in the cache
template <int Panels, int Most>
void multiply_panels(const Int8Product& job, int64_t panel) {
  // tiles of nearly equal height: `taller` of height + 1, then the others
  const int64_t tiles = (job.rows + Most - 1) / Most, height = job.rows / tiles, taller = job.rows % tiles;
  const Tile low = Tiles<Most, Panels>::of(height), high = taller ? Tiles<Most, Panels>::of(height + 1) : nullptr;
  for (int64_t g = 0; g < job.group_count; ++g) {
    int64_t row = 0;
    for (int64_t t = 0; t < taller; ++t, row += height + 1) high(job, job.groups[g], row, panel);
    for (int64_t t = taller; t < tiles; ++t, row += height) low(job, job.groups[g], row, panel);
  }
}

void multiply(const Int8Product& job) {
  if (job.rows == 0) return;
  const int64_t panels = (job.columns + int8_panel - 1) / int8_panel;
  int64_t panel = 0;
  for (; panel + Dot::most_panels <= panels; panel += Dot::most_panels)
    multiply_panels<Dot::most_panels, Dot::most_rows>(job, panel);
  for (; panel < panels; ++panel) multiply_panels<1, Dot::most_rows_narrow>(job, panel);
}

void finish_long(const Int8Product& job, const int64_t* sums, int64_t sums_row) {
  for (int64_t g = 0; g < job.group_count; ++g)
    for (int64_t r = 0; r < job.rows; ++r)
      for (int64_t column = 0; column < job.columns; column += int8_panel) {
        float line[int8_panel];
        for (int64_t j = 0; j < int8_panel; ++j) line[j] = float(sums[(g * job.rows + r) * sums_row + column + j]);
        Vec::F real[panel_sums];
        for (int v = 0; v < panel_sums; ++v) real[v] = Vec::load(line + v * Vec::lanes);
        finish(job, job.groups[g].out + r * job.out_row + column, job.groups[g].left_scale[r * job.left_scale_step],
               column, real);
      }
}

void finish_grad_w(const Int8GradW& job) {
  constexpr int64_t most = 64;  // results of one column that are put together before they are stored
  for (int64_t column = 0; column < job.columns; column += int8_panel) {
    const int64_t columns = job.columns - column < int8_panel ? job.columns - column : int8_panel;
    const int64_t count = job.channels * job.taps;
    for (int64_t begin = 0; begin < count; begin += most) {
      const int64_t n = count - begin < most ? count - begin : most;
      float real[int8_panel][most];
      int64_t channel = begin / job.taps, tap = begin % job.taps;
      for (int64_t m = 0; m < n; ++m) {
        const int32_t* sums = job.sums + tap * job.tap + channel * job.channel + column;
        const float left = job.channel_scale[channel * job.channel_scale_step];
        float line[int8_panel];
        if (job.parts == 1) {
          for (int64_t j = 0; j < int8_panel; ++j) line[j] = float(sums[j]);
        } else {
          int64_t total[int8_panel] = {};
          for (int64_t p = 0; p < job.parts; ++p)
            for (int64_t j = 0; j < int8_panel; ++j) total[j] += sums[p * job.part + j];
          for (int64_t j = 0; j < int8_panel; ++j) line[j] = float(total[j]);
        }
        for (int64_t j = 0; j < int8_panel; ++j) real[j][m] = line[j] * (left * job.column_scale[column + j]);
        if (++tap == job.taps) tap = 0, ++channel;
      }
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at = (column + j) * job.out_column + begin;
        if (!job.bfloat16) memcpy((float*)job.out + at, real[j], size_t(n) * sizeof(float));
        else
          for (int64_t m = 0; m < n; ++m) ((uint16_t*)job.out)[at + m] = bfloat16_bits(real[j][m]);
      }
    }
  }
}

constexpr Int8Kernels int8_kernels = {
    4,        Dot::most_panels, Dot::most_rows, Dot::most_rows_narrow, pack_left,   pack_right,
    pack_box, pack_planes,      transpose_codes, multiply,             finish_long, finish_grad_w};

}  // namespace
}  // namespace lowbit

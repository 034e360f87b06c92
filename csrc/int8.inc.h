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

inline void store_bfloat16(uint16_t* out, Vec::F x) {
#if defined(__AVX512F__)
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                                _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi32_epi16(rounded));
#else
  float line[Vec::lanes];
  Vec::store(line, x);
  for (int64_t j = 0; j < Vec::lanes; ++j) out[j] = bfloat16_bits(line[j]);
#endif
}

// the results of one row in one panel, `columns` of them
inline void store_results(const Int8Product& job, int64_t at, const Vec::F* result, int64_t columns) {
  union {
    float real[int8_panel];
    uint16_t bits[int8_panel];
  } line;
  const bool full = columns >= int8_panel;
  if (job.bfloat16) {
    uint16_t* const out = (uint16_t*)job.out + at;
    for (int v = 0; v < panel_sums; ++v) store_bfloat16((full ? out : line.bits) + v * Vec::lanes, result[v]);
    if (!full) memcpy(out, line.bits, size_t(columns) * sizeof(uint16_t));
  } else {
    float* const out = (float*)job.out + at;
#if defined(__AVX512F__)
    if (job.stream && full) {
      for (int v = 0; v < panel_sums; ++v) _mm512_stream_ps(out + v * Vec::lanes, result[v]);
      return;
    }
#endif
    for (int v = 0; v < panel_sums; ++v) Vec::store((full ? out : line.real) + v * Vec::lanes, result[v]);
    if (!full) memcpy(out, line.real, size_t(columns) * sizeof(float));
  }
}

// one row of one panel through the epilogue; `real` are the sums
inline void finish(const Int8Product& job, int64_t at, float left_scale, int64_t column, const Vec::F* real) {
  const Vec::F scale = Vec::set(left_scale);
  Vec::F result[panel_sums];
  for (int v = 0; v < panel_sums; ++v) {
    const int64_t lane = column + v * Vec::lanes;
    result[v] = Vec::mul(real[v], Vec::mul(scale, Vec::load(job.right_scale + lane)));
    if (job.bias != nullptr) result[v] = Vec::add(result[v], Vec::load(job.bias + lane));
  }
  store_results(job, at, result, job.columns - column);
}

// The sums of a tile: alone in a function, because they and what feeds them take nearly all registers.
template <int Rows, int Panels>
__attribute__((noinline)) void tile_sums(const Int8Product& job, const uint8_t* left, const int8_t* right,
                                         const int32_t* correction, int32_t* out) {
  constexpr int width = Panels * panel_sums;
  Dot::Sums sums[Rows][width];
  for (int v = 0; v < width; ++v) {
    const Dot::Sums start = Dot::load_sums(correction + v * Dot::lanes);
    for (int i = 0; i < Rows; ++i) sums[i][v] = start;
  }
  const int64_t pitch = job.left_row, panel_bytes = job.panel_bytes, steps = job.steps;
  const int64_t* segment = job.segments;
  for (const int64_t* const end = segment + job.segment_count; segment < end; ++segment) {
    const uint8_t* a[(Rows + 2) / 3];  // each for three rows: x86 addresses hold pitch and 2 * pitch
    for (int i = 0; i < (Rows + 2) / 3; ++i) a[i] = left + *segment + 3 * i * pitch;
    for (int64_t k = steps; k > 0; --k) {
      Dot::Right b[width];
      for (int p = 0; p < Panels; ++p)
        for (int v = 0; v < panel_sums; ++v)
          b[p * panel_sums + v] = Dot::right(right + p * panel_bytes + v * Dot::lanes * 4);
      right += 64;
      for (int i = 0; i < Rows; ++i) {
        const Dot::Left x = Dot::left(a[i / 3] + i % 3 * pitch);
        for (int v = 0; v < width; ++v) sums[i][v] = Dot::add(sums[i][v], x, b[v]);
      }
      for (int i = 0; i < (Rows + 2) / 3; ++i) a[i] += 4;
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < width; ++v) Dot::store_sums(out + (i * width + v) * Dot::lanes, sums[i][v]);
}

// What follows the sums of a tile of `rows` rows, Panels * 16 of them in a row: keeping them, or the epilogue.
template <int Panels>
void finish_tile(const Int8Product& job, const Int8Rows& group, int64_t row, int64_t rows, int64_t column,
                 const int32_t* sums) {
  for (int64_t i = 0; i < rows; ++i, sums += Panels * int8_panel) {
    const int64_t at = group.out + (row + i) * job.out_row + column;
    int32_t* const kept = group.sums + (row + i) * job.sums_row + column;
    for (int p = 0; p < Panels; ++p) {
      Vec::F real[panel_sums];
      for (int v = 0; v < panel_sums; ++v) {
        const int64_t lane = p * int8_panel + v * Dot::lanes;
        Dot::Sums sum = Dot::load_sums(sums + lane);
        if (!job.first) sum = Dot::plus(sum, Dot::load_sums(kept + lane));
        if (!job.last) Dot::store_sums(kept + lane, sum);
        real[v] = Dot::real(sum);
      }
      if (job.last)
        finish(job, at + p * int8_panel, group.left_scale[(row + i) * job.left_scale_step], column + p * int8_panel,
               real);
    }
  }
}

template <int Rows, int Panels>
void tile(const Int8Product& job, const Int8Rows& group, int64_t row, int64_t panel) {
  int32_t sums[Rows * Panels * int8_panel];
  tile_sums<Rows, Panels>(job, group.left + row * job.left_row, job.right + panel * job.panel_bytes,
                          job.correction + panel * int8_panel, sums);
  finish_tile<Panels>(job, group, row, Rows, panel * int8_panel, sums);
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

#if defined(__AMX_INT8__)

// The same with the matrix unit, whose tiles are 16 rows of 16 steps, 16 steps of a panel, and 16 x 16 sums: two left
// tiles and two panels share four tiles of sums.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

constexpr int64_t matrix_rows = 16, matrix_steps = 16;

void shape_tiles(int64_t high, int64_t low) {
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 64;
  shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = uint8_t(high);
  shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = uint8_t(low > 0 ? low : 1);
  shapes.rows[6] = shapes.rows[7] = matrix_steps;
  __asm__ volatile("" ::"r"(&shapes) : "memory");  // GCC takes the next line for a read of 8 bytes
  _tile_loadconfig(&shapes);
}

// `Both` left tiles: `high` rows, then `low` more
template <int Panels, bool Both>
void matrix_tile(const Int8Product& job, const Int8Rows& group, int64_t row, int64_t high, int64_t low, int64_t panel) {
  const int64_t pitch = job.left_row;
  const uint8_t* const left = group.left + row * pitch;
  const int8_t* right = job.right + panel * job.panel_bytes;
  _tile_zero(0);
  if (Panels == 2) _tile_zero(1);
  if (Both) _tile_zero(2);
  if (Both && Panels == 2) _tile_zero(3);
  for (int64_t s = 0; s < job.segment_count; ++s) {
    const uint8_t* a = left + job.segments[s];
    for (int64_t k = 0; k < job.steps; k += matrix_steps, a += 64, right += 1024) {
      _tile_loadd(6, right, 64);
      _tile_loadd(4, a, pitch);
      _tile_dpbusd(0, 4, 6);
      if (Both) {
        _tile_loadd(5, a + high * pitch, pitch);
        _tile_dpbusd(2, 5, 6);
      }
      if (Panels == 2) {
        _tile_loadd(7, right + job.panel_bytes, 64);
        _tile_dpbusd(1, 4, 7);
        if (Both) _tile_dpbusd(3, 5, 7);
      }
    }
  }
  constexpr int64_t width = Panels * int8_panel;
  alignas(64) int32_t sums[2 * matrix_rows * width];
  _tile_stored(0, sums, width * 4);
  if (Panels == 2) _tile_stored(1, sums + int8_panel, width * 4);
  if (Both) _tile_stored(2, sums + high * width, width * 4);
  if (Both && Panels == 2) _tile_stored(3, sums + high * width + int8_panel, width * 4);
  const int64_t column = panel * int8_panel;
  for (int p = 0; p < Panels; ++p) {
    const __m512i correction = _mm512_loadu_si512(job.correction + column + p * int8_panel);
    for (int64_t i = 0; i < high + low; ++i) {
      int32_t* const line = sums + i * width + p * int8_panel;
      _mm512_store_si512(line, _mm512_add_epi32(_mm512_load_si512(line), correction));
    }
  }
  finish_tile<Panels>(job, group, row, high + low, column, sums);
}

void matrix_multiply(const Int8Product& job) {
  const int64_t panels = (job.columns + int8_panel - 1) / int8_panel;
  const int64_t tiles = (job.rows + 2 * matrix_rows - 1) / (2 * matrix_rows);
  const int64_t height = job.rows / tiles, taller = job.rows % tiles;
  int64_t shaped = 0;
  for (int64_t panel = 0; panel < panels; panel += 2)
    for (int64_t g = 0; g < job.group_count; ++g)
      for (int64_t t = 0, row = 0; t < tiles; ++t) {
        const int64_t rows = height + (t < taller ? 1 : 0);
        const int64_t low = rows > matrix_rows ? rows / 2 : 0, high = rows - low;
        if (rows != shaped) shape_tiles(high, low);
        shaped = rows;
        const Int8Rows& group = job.groups[g];
        if (panel + 1 < panels) {
          if (low > 0) matrix_tile<2, true>(job, group, row, high, low, panel);
          else matrix_tile<2, false>(job, group, row, high, low, panel);
        } else {
          if (low > 0) matrix_tile<1, true>(job, group, row, high, low, panel);
          else matrix_tile<1, false>(job, group, row, high, low, panel);
        }
        row += rows;
      }
  _tile_release();
}

constexpr int64_t depth_unit = 4 * matrix_steps, most_tile_rows = 2 * matrix_rows;
#else
constexpr int64_t depth_unit = 4, most_tile_rows = Dot::most_rows;
#endif

void multiply_tiles(const Int8Product& job) {
#if defined(__AMX_INT8__)
  if (job.steps % matrix_steps == 0) return matrix_multiply(job);
#endif
  const int64_t panels = (job.columns + int8_panel - 1) / int8_panel;
  int64_t panel = 0;
  for (; panel + Dot::most_panels <= panels; panel += Dot::most_panels)
    multiply_panels<Dot::most_panels, Dot::most_rows>(job, panel);
  for (; panel < panels; ++panel) multiply_panels<1, Dot::most_rows_narrow>(job, panel);
}

// What was written past the caches is there before other threads read it.
inline void drain(const Int8Product& job) {
#if defined(__AVX512F__)
  if (job.stream) _mm_sfence();
#endif
}

void multiply(const Int8Product& job) {
  if (job.rows == 0) return;
  multiply_tiles(job);
  drain(job);
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
  drain(job);
}

// 16 rows of 16 numbers, transposed
inline void transpose_panel(const float* in, float* out, int64_t out_row) {
#if defined(__SSE2__)
  for (int64_t i = 0; i < int8_panel; i += 4)
    for (int64_t j = 0; j < int8_panel; j += 4) {
      __m128 r[4];
      for (int k = 0; k < 4; ++k) r[k] = _mm_loadu_ps(in + (i + k) * int8_panel + j);
      _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
      for (int k = 0; k < 4; ++k) _mm_storeu_ps(out + (j + k) * out_row + i, r[k]);
    }
#else
  for (int64_t i = 0; i < int8_panel; ++i)
    for (int64_t j = 0; j < int8_panel; ++j) out[j * out_row + i] = in[i * int8_panel + j];
#endif
}

// `count` results of each of up to 16 columns, from tap `tap` of channel 0 on, which lie side by side in `out`
inline void finish_grad_w_run(const Int8GradW& job, int64_t column, const Vec::F* scale, int64_t tap, int64_t count,
                              int64_t out) {
  constexpr int64_t most = 64;  // results of one column that are put together before they are stored
  const int64_t columns = job.columns - column < int8_panel ? job.columns - column : int8_panel;
  int64_t channel = 0;
  for (int64_t begin = 0; begin < count; begin += most) {
    const int64_t n = count - begin < most ? count - begin : most;
    float rows[most * int8_panel] = {}, real[int8_panel * most];
    for (int64_t m = 0; m < n; ++m) {
      const int32_t* sums = job.sums + tap * job.tap + channel * job.channel + column;
      const Vec::F left = Vec::set(job.channel_scale[channel * job.channel_scale_step]);
      float line[int8_panel];
      if (job.parts > 1) {
        int64_t total[int8_panel] = {};
        for (int64_t p = 0; p < job.parts; ++p)
          for (int64_t j = 0; j < int8_panel; ++j) total[j] += sums[p * job.part + j];
        for (int64_t j = 0; j < int8_panel; ++j) line[j] = float(total[j]);
      }
      for (int v = 0; v < panel_sums; ++v) {
        const Vec::F x = job.parts > 1 ? Vec::load(line + v * Vec::lanes)
                                       : Dot::real(Dot::load_sums(sums + v * Vec::lanes));
        Vec::store(rows + m * int8_panel + v * Vec::lanes, Vec::mul(x, Vec::mul(left, scale[v])));
      }
      if (job.out_tap != 0) ++channel;
      else if (++tap == job.taps) tap = 0, ++channel;
    }
    for (int64_t m = 0; m < n; m += int8_panel) transpose_panel(rows + m * int8_panel, real + m, most);
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = (column + j) * job.out_column + out + begin;
#if defined(__AVX512F__)
      if (job.stream) {
        for (int64_t m = 0; m < n; m += 16)
          _mm512_stream_ps((float*)job.out + at + m, _mm512_loadu_ps(real + j * most + m));
        continue;
      }
#endif
      if (!job.bfloat16) memcpy((float*)job.out + at, real + j * most, size_t(n) * sizeof(float));
      else
        for (int64_t m = 0; m < n; ++m) ((uint16_t*)job.out)[at + m] = bfloat16_bits(real[j * most + m]);
    }
  }
}

void finish_grad_w(const Int8GradW& job) {
  for (int64_t column = 0; column < job.columns; column += int8_panel) {
    Vec::F scale[panel_sums];
    for (int v = 0; v < panel_sums; ++v) scale[v] = Vec::load(job.column_scale + column + v * Vec::lanes);
    if (job.out_tap == 0) finish_grad_w_run(job, column, scale, 0, job.channels * job.taps, 0);
    else
      for (int64_t tap = 0; tap < job.taps; ++tap)
        finish_grad_w_run(job, column, scale, tap, job.channels, tap * job.out_tap);
  }
#if defined(__AVX512F__)
  if (job.stream) _mm_sfence();
#endif
}

}  // namespace
}  // namespace lowbit

#include "int8_depthwise.inc.h"

namespace lowbit {
namespace {

constexpr Int8Kernels int8_kernels = {
    depth_unit, Dot::most_panels, most_tile_rows, Dot::most_rows,     Dot::most_rows_narrow,
    pack_left,  pack_right,       pack_box,       pack_planes,        transpose_codes,
    multiply,   multiply_depthwise, depthwise_grad_w, finish_long,    finish_grad_w};

}  // namespace
}  // namespace lowbit

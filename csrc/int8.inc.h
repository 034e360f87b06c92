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

#if defined(__AVX512F__)
// bfloat16 in the upper halves
inline __m512i as_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}

inline __m512i as_bfloat16(__m512 x, __m512 y) {
  alignas(64) static constexpr int16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(as_bfloat16(x), _mm512_load_si512(upper), as_bfloat16(y));
}
#endif

inline void store_bfloat16(uint16_t* out, Vec::F x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi32_epi16(_mm512_srli_epi32(as_bfloat16(x), 16)));
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

// How the results of whole panels are stored.
enum class Stored { real, real_past_caches, bfloat16, bfloat16_past_caches };
template <Stored how>
struct How { static constexpr Stored value = how; };

// `finish` for a tile of whole panels; scales and bias of the columns stay in registers.
template <int Panels, Stored how>
void finish_whole(const Int8Product& job, const Int8Rows& group, int64_t row, int64_t rows, int64_t column,
                  const int32_t* sums) {
  constexpr int width = Panels * panel_sums;
  Vec::F scale[width], bias[width];
  for (int v = 0; v < width; ++v) {
    scale[v] = Vec::load(job.right_scale + column + v * Vec::lanes);
    bias[v] = job.bias == nullptr ? Vec::set(-0.0f) : Vec::load(job.bias + column + v * Vec::lanes);  // x + -0 is x
  }
  int64_t at = group.out + row * job.out_row + column;
  const float* left_scale = group.left_scale + row * job.left_scale_step;
  for (int64_t i = 0; i < rows; ++i, sums += Panels * int8_panel, at += job.out_row, left_scale += job.left_scale_step) {
    const Vec::F left = Vec::set(*left_scale);
    Vec::F result[width];
    for (int v = 0; v < width; ++v) {
      const Vec::F real = Dot::real(Dot::load_sums(sums + v * Dot::lanes));
      result[v] = Vec::add(Vec::mul(real, Vec::mul(left, scale[v])), bias[v]);
    }
    float* const reals = (float*)job.out + at;
    uint16_t* const bits = (uint16_t*)job.out + at;
#if defined(__AVX512F__)
    if constexpr (how == Stored::real_past_caches) {
      for (int v = 0; v < width; ++v) _mm512_stream_ps(reals + v * Vec::lanes, result[v]);
      continue;
    } else if constexpr (how != Stored::real && width % 2 == 0) {
      for (int v = 0; v < width; v += 2) {
        const __m512i line = as_bfloat16(result[v], result[v + 1]);
        if (how == Stored::bfloat16) _mm512_storeu_si512(bits + v * Vec::lanes, line);
        else _mm512_stream_si512((__m512i*)(bits + v * Vec::lanes), line);
      }
      continue;
    }
#endif
    for (int v = 0; v < width; ++v)
      if (how == Stored::bfloat16 || how == Stored::bfloat16_past_caches) store_bfloat16(bits + v * Vec::lanes, result[v]);
      else Vec::store(reals + v * Vec::lanes, result[v]);
  }
}

// What follows the sums of a tile of `rows` rows, Panels * 16 of them in a row: keeping them, or the epilogue.
template <int Panels>
void finish_tile(const Int8Product& job, const Int8Rows& group, int64_t row, int64_t rows, int64_t column,
                 const int32_t* sums) {
  if (job.first && job.last && job.columns - column >= Panels * int8_panel) {
    const auto whole = [&](auto how) { finish_whole<Panels, how.value>(job, group, row, rows, column, sums); };
    if (!job.bfloat16 && !job.stream) return whole(How<Stored::real>());
    if (!job.bfloat16) return whole(How<Stored::real_past_caches>());
    // whole lines, if the first one is
    const bool past = job.stream && uintptr_t((uint16_t*)job.out + group.out + row * job.out_row + column) % 64 == 0;
    return past ? whole(How<Stored::bfloat16_past_caches>()) : whole(How<Stored::bfloat16>());
  }
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

constexpr int64_t matrix_rows = 16, matrix_steps = Dot::matrix_steps;

void shape_tiles(int64_t high, int64_t low) {
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 64;
  shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = uint8_t(high);
  shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = uint8_t(low > 0 ? low : 1);
  shapes.rows[6] = shapes.rows[7] = matrix_steps;
  __asm__ volatile("" ::"r"(&shapes) : "memory");  // GCC takes the next line for a read of 8 bytes
  _tile_loadconfig(&shapes);
}

// A tile whose sums wait for the epilogue. It is done a few rows at a time between the steps of the next tile: the matrix
// unit works meanwhile.
struct Waiting {
  const Int8Rows* group;
  int64_t row, rows, column, panels, done;
  const int32_t* sums;

  void some(const Int8Product& job, int64_t most) {
    const int64_t count = rows - done < most ? rows - done : most;
    if (count <= 0) return;
    const int32_t* const line = sums + done * panels * int8_panel;
    if (panels == 2) finish_tile<2>(job, *group, row + done, count, column, line);
    else finish_tile<1>(job, *group, row + done, count, column, line);
    done += count;
  }
};

// Results that are to be written soon: their lines are fetched between steps, too.
struct Expected {
  const char* line;
  int64_t rows, row_bytes, bytes;

  void some(int64_t most) {
    for (; most > 0 && rows > 0; --most, --rows, line += row_bytes)
      for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(line + i, _MM_HINT_T1);
  }
};

// Steps of the sums in tiles 0 to 3: of rows at `high` and, with `Both`, at `low`, and of one or two panels. `Disjoint`:
// the rows are not read again soon, and the hint keeps the panels in the cache instead. Where rows lie across cache
// lines, a left tile must come right before its products: else they take half as long again. Alone in a function for the
// registers.
template <int Panels, bool Both, bool Disjoint>
__attribute__((noinline)) void add_steps(const uint8_t* high, const uint8_t* low, int64_t pitch, const int8_t* right,
                                         const int8_t* next, int64_t steps) {
  for (; steps > 0; --steps, high += 64, low += 64, right += 1024, next += 1024) {
    _tile_loadd(6, right, 64);
    if (Panels == 2) _tile_loadd(7, next, 64);
    if (Disjoint) _tile_stream_loadd(4, high, pitch);
    else _tile_loadd(4, high, pitch);
    _tile_dpbssd(0, 4, 6);
    if (Panels == 2) _tile_dpbssd(1, 4, 7);
    if (Both) {
      if (Disjoint) _tile_stream_loadd(5, low, pitch);
      else _tile_loadd(5, low, pitch);
      _tile_dpbssd(2, 5, 6);
      if (Panels == 2) _tile_dpbssd(3, 5, 7);
    }
  }
}

// `steps` steps of the sums of `Both` left tiles, `high` rows, then `low` more, from a step of a segment on. `begun`: they
// go on from `sums`.
template <int Panels, bool Both>
void matrix_tile(const Int8Product& job, const uint8_t* left, int64_t high, const int8_t* right, int64_t segment,
                 int64_t step, int64_t steps, bool begun, int32_t* sums, int64_t sums_row, Waiting& waiting,
                 Expected expected) {
  const int64_t pitch = job.left_row, sums_bytes = sums_row * 4, below = high * sums_row;
  const auto add = job.disjoint ? &add_steps<Panels, Both, true> : &add_steps<Panels, Both, false>;
  if (begun) {
    _tile_loadd(0, sums, sums_bytes);
    if (Panels == 2) _tile_loadd(1, sums + int8_panel, sums_bytes);
    if (Both) _tile_loadd(2, sums + below, sums_bytes);
    if (Both && Panels == 2) _tile_loadd(3, sums + below + int8_panel, sums_bytes);
  } else {
    _tile_zero(0);
    if (Panels == 2) _tile_zero(1);
    if (Both) _tile_zero(2);
    if (Both && Panels == 2) _tile_zero(3);
  }
  // a few rows at once, since scales and bias are loaded for each few
  const int64_t rows_a_step = steps > 0 && waiting.rows > 4 * steps ? (waiting.rows + steps - 1) / steps : 4;
  while (steps > 0) {
    const bool busy = waiting.done < waiting.rows || expected.rows > 0;
    const int64_t rest = (job.steps - step) / matrix_steps, run = busy ? 1 : rest < steps ? rest : steps;
    const uint8_t* const at = left + job.segments[segment] + step * 4;
    add(at, at + high * pitch, pitch, right, right + job.panel_bytes, run);
    steps -= run, right += run * 1024, step += run * matrix_steps;
    if (step == job.steps) step = 0, ++segment;
    if (busy) waiting.some(job, rows_a_step), expected.some(4);
  }
  waiting.some(job, waiting.rows);
  _tile_stored(0, sums, sums_bytes);
  if (Panels == 2) _tile_stored(1, sums + int8_panel, sums_bytes);
  if (Both) _tile_stored(2, sums + below, sums_bytes);
  if (Both && Panels == 2) _tile_stored(3, sums + below + int8_panel, sums_bytes);
}

void matrix_multiply(const Int8Product& job) {
  // Steps of two panels that share the L1 cache with rows; half as many where sums are kept: there (the taps of grad_w) the
  // same rows are read again, too.
  const int64_t most_steps = job.last ? 16 : 8;
  constexpr int64_t most_tiles = 16;  // that the same steps of the panels serve, one after the other
  const int64_t panels = (job.columns + int8_panel - 1) / int8_panel;
  const int64_t tiles = (job.rows + 2 * matrix_rows - 1) / (2 * matrix_rows);  // of a group, the taller first
  const int64_t height = job.rows / tiles, taller = job.rows % tiles;
  const int64_t steps = job.segment_count * job.steps / matrix_steps;
  const int64_t pieces = steps > most_steps ? (steps + most_steps - 1) / most_steps : 1;
  const int64_t piece = pieces > 1 ? (steps + pieces - 1) / pieces : steps, chunk = pieces > 1 ? most_tiles : 1;
  // one buffer more than a chunk has tiles: the last tile waits for its epilogue
  alignas(64) int32_t buffers[most_tiles + 1][2 * matrix_rows * 2 * int8_panel];
  Waiting waiting = {};
  int64_t shaped = 0, next_buffer = 0;
  for (int64_t panel = 0; panel < panels; panel += 2) {
    const bool two = panel + 1 < panels;
    const int64_t sums_row = !job.last ? job.sums_row : two ? 2 * int8_panel : int8_panel;
    int64_t next_group = 0, next_tile = 0;
    while (next_group < job.group_count) {  // a chunk: the tiles from here on
      const int64_t first_group = next_group, first_tile = next_tile, first_buffer = next_buffer;
      const int8_t* right = job.right + panel * job.panel_bytes;
      int64_t segment = 0, step = 0;
      for (int64_t left_over = steps;;) {
        const int64_t here = left_over < piece ? left_over : piece;
        const bool begun = left_over < steps || !(job.first || job.last), ends = left_over == here;
        next_group = first_group, next_tile = first_tile, next_buffer = first_buffer;
        for (int64_t i = 0; i < chunk && next_group < job.group_count; ++i) {
          const Int8Rows& group = job.groups[next_group];
          const int64_t row = next_tile * height + (next_tile < taller ? next_tile : taller);
          const int64_t rows = height + (next_tile < taller ? 1 : 0);
          const int64_t low = rows > matrix_rows ? rows / 2 : 0, high = rows - low;
          if (rows != shaped) shape_tiles(high, low);
          shaped = rows;
          int32_t* const sums = job.last ? buffers[next_buffer] : group.sums + row * sums_row + panel * int8_panel;
          const auto tile = two ? (low > 0 ? &matrix_tile<2, true> : &matrix_tile<2, false>)
                                : (low > 0 ? &matrix_tile<1, true> : &matrix_tile<1, false>);
          Expected expected = {};
          if (job.last && ends && !job.stream) {
            const int64_t bytes = job.bfloat16 ? 2 : 4, columns = job.columns - panel * int8_panel;
            const int64_t at = group.out + row * job.out_row + panel * int8_panel;
            expected = {(const char*)job.out + at * bytes, rows, job.out_row * bytes,
                        (columns < 2 * int8_panel ? columns : 2 * int8_panel) * bytes};
          }
          tile(job, group.left + row * job.left_row, high, right, segment, step, here, begun, sums, sums_row, waiting,
               expected);
          if (job.last && ends) waiting = {&group, row, rows, panel * int8_panel, two ? 2 : 1, 0, sums};
          next_buffer = next_buffer == chunk ? 0 : next_buffer + 1;
          if (++next_tile == tiles) next_tile = 0, ++next_group;
        }
        if (ends) break;
        left_over -= here, right += here * 1024;
        for (step += here * matrix_steps; step >= job.steps; ++segment) step -= job.steps;
      }
    }
  }
  waiting.some(job, waiting.rows);
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
    depth_unit, Dot::flip == 0, Dot::most_panels, most_tile_rows, Dot::most_rows, Dot::most_rows_narrow,
    pack_left,  pack_right,       pack_box,       pack_planes,        transpose_codes,
    multiply,   multiply_depthwise, depthwise_grad_w, finish_long,    finish_grad_w};

}  // namespace
}  // namespace lowbit

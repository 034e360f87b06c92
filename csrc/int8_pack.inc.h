// Packing for the int8 products of one instruction set; needs `Dot` (int8_dot.inc.h). Layouts are in int8.h.
#pragma once

namespace lowbit {
namespace {

inline uint8_t flipped(int8_t code) { return uint8_t(code) ^ Dot::flip; }

#if defined(__SSE2__)
typedef __m128i Bytes;

inline Bytes load_bytes(const int8_t* p, int64_t n) {
  if (n >= 16) return _mm_loadu_si128((const __m128i*)p);
#if defined(__AVX512BW__)
  return _mm_maskz_loadu_epi8(__mmask16((1u << n) - 1), p);
#else
  int8_t line[16] = {};
  for (int64_t i = 0; i < n; ++i) line[i] = p[i];
  return _mm_loadu_si128((const __m128i*)line);
#endif
}

inline void store_bytes(void* p, Bytes v, int64_t n) {
  if (n >= 16) return _mm_storeu_si128((__m128i*)p, v);
#if defined(__AVX512BW__)
  _mm_mask_storeu_epi8(p, __mmask16((1u << n) - 1), v);
#else
  int8_t line[16];
  _mm_storeu_si128((__m128i*)line, v);
  for (int64_t i = 0; i < n; ++i) ((int8_t*)p)[i] = line[i];
#endif
}
#endif

#if defined(__SSE2__)
// Four times interleaving rows i and i + 8 transposes 16 x 16 bytes.
template <class V, class Low, class High>
inline void transpose_16(V* x, Low low, High high) {
  for (int round = 0; round < 4; ++round) {
    V y[16];
    for (int i = 0; i < 8; ++i) y[2 * i] = low(x[i], x[i + 8]), y[2 * i + 1] = high(x[i], x[i + 8]);
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
}
#endif

#if defined(__AVX512BW__)
// 64 columns of whole sixteens of rows: four transposes at once, one in each quarter of the vectors
inline void transpose_wide(const int8_t* source, int64_t source_pitch, int64_t rows, uint8_t* out, int64_t pitch,
                           uint8_t flip) {
  const __m512i mask = _mm512_set1_epi8(char(flip));
  for (int64_t r = 0; r < rows; r += 16, source += 16 * source_pitch, out += 16) {
    __m512i x[16];
    for (int i = 0; i < 16; ++i) {
      const int8_t* const row = source + i * source_pitch;
      x[i] = _mm512_loadu_si512(row);
      if (r + 16 < rows) _mm_prefetch((const char*)(row + 16 * source_pitch), _MM_HINT_T0);
    }
    transpose_16(x, [](__m512i a, __m512i b) { return _mm512_unpacklo_epi8(a, b); },
                 [](__m512i a, __m512i b) { return _mm512_unpackhi_epi8(a, b); });
    for (int i = 0; i < 16; ++i) {
      const __m512i line = _mm512_xor_si512(x[i], mask);
      uint8_t* const target = out + i * pitch;
      _mm_storeu_si128((Bytes*)target, _mm512_castsi512_si128(line));
      _mm_storeu_si128((Bytes*)(target + 16 * pitch), _mm512_extracti32x4_epi32(line, 1));
      _mm_storeu_si128((Bytes*)(target + 32 * pitch), _mm512_extracti32x4_epi32(line, 2));
      _mm_storeu_si128((Bytes*)(target + 48 * pitch), _mm512_extracti32x4_epi32(line, 3));
    }
  }
}
#endif

// (rows, columns) to (columns, rows)
inline void transpose_bytes(const int8_t* source, int64_t source_pitch, int64_t rows, int64_t columns, uint8_t* out,
                            int64_t pitch, uint8_t flip) {
#if defined(__AVX512BW__)
  const int64_t whole_rows = rows / 16 * 16, wide = columns / 64 * 64;
  for (int64_t c = 0; c < wide; c += 64)
    transpose_wide(source + c, source_pitch, whole_rows, out + c * pitch, pitch, flip);
#elif defined(__SSE2__)
  constexpr int64_t whole_rows = 0, wide = 0;
#endif
#if defined(__SSE2__)
  const Bytes mask = _mm_set1_epi8(char(flip));
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = r < whole_rows ? wide : 0; c < columns; c += 16) {
      const int64_t down = rows - r < 16 ? rows - r : 16, across = columns - c < 16 ? columns - c : 16;
      Bytes x[16];
      for (int i = 0; i < 16; ++i)
        x[i] = i < down ? load_bytes(source + (r + i) * source_pitch + c, across) : _mm_setzero_si128();
      transpose_16(x, [](Bytes a, Bytes b) { return _mm_unpacklo_epi8(a, b); },
                   [](Bytes a, Bytes b) { return _mm_unpackhi_epi8(a, b); });
      uint8_t* target = out + c * pitch + r;
      for (int i = 0; i < 16; ++i)
        if (i < across) store_bytes(target + i * pitch, _mm_xor_si128(x[i], mask), down);
    }
#else
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) out[c * pitch + r] = uint8_t(source[r * source_pitch + c]) ^ flip;
#endif
}

inline void copy_flipped(const int8_t* source, int64_t n, uint8_t* left, uint8_t flip = Dot::flip) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  const __m512i mask = _mm512_set1_epi8(char(flip));
  for (; i + 64 <= n; i += 64)
    _mm512_storeu_si512(left + i, _mm512_xor_si512(_mm512_loadu_si512(source + i), mask));
  if (i < n) {
    const __mmask64 rest = (__mmask64(1) << (n - i)) - 1;
    _mm512_mask_storeu_epi8(left + i, rest, _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, source + i), mask));
  }
#else
  for (; i < n; ++i) left[i] = uint8_t(source[i]) ^ flip;
#endif
}

void pack_left(const Int8View& view, int64_t rows, int64_t depth, uint8_t* left, int64_t pitch) {
  if (view.column == 1) {
    for (int64_t r = 0; r < rows; ++r) copy_flipped(view.data + r * view.row, depth, left + r * pitch);
  } else if (view.row == 1) {
    transpose_bytes(view.data, view.column, depth, rows, left, pitch, Dot::flip);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < depth; ++k) left[r * pitch + k] = flipped(view.data[r * view.row + k * view.column]);
  }
}

void transpose_codes(const int8_t* source, int64_t source_pitch, int64_t rows, int64_t columns, int8_t* out,
                     int64_t pitch) {
  transpose_bytes(source, source_pitch, rows, columns, (uint8_t*)out, pitch, 0);
}

// `depth` codes of `columns` <= 16 columns as [k / 4][16][4]
inline void pack_part(const Int8View& view, int64_t depth, int64_t columns, int8_t* packed) {
#if defined(__SSE2__)
  if (view.column == 1) {
    for (int64_t k = 0; k < depth; k += 4, packed += 64) {
      Bytes r[4];
      for (int i = 0; i < 4; ++i)
        r[i] = k + i < depth ? load_bytes(view.data + (k + i) * view.row, columns) : _mm_setzero_si128();
      const Bytes low01 = _mm_unpacklo_epi8(r[0], r[1]), low23 = _mm_unpacklo_epi8(r[2], r[3]);
      const Bytes high01 = _mm_unpackhi_epi8(r[0], r[1]), high23 = _mm_unpackhi_epi8(r[2], r[3]);
      _mm_storeu_si128((__m128i*)packed, _mm_unpacklo_epi16(low01, low23));
      _mm_storeu_si128((__m128i*)(packed + 16), _mm_unpackhi_epi16(low01, low23));
      _mm_storeu_si128((__m128i*)(packed + 32), _mm_unpacklo_epi16(high01, high23));
      _mm_storeu_si128((__m128i*)(packed + 48), _mm_unpackhi_epi16(high01, high23));
    }
    return;
  }
  if (view.row == 1) {
    for (int64_t k = 0; k < depth; k += 16, packed += 256) {
      const int64_t steps = (depth - k + 3) / 4;
      for (int64_t c = 0; c < int8_panel; c += 4) {
        Bytes r[4];
        for (int i = 0; i < 4; ++i)
          r[i] = c + i < columns ? load_bytes(view.data + (c + i) * view.column + k, depth - k) : _mm_setzero_si128();
        const Bytes low01 = _mm_unpacklo_epi32(r[0], r[1]), low23 = _mm_unpacklo_epi32(r[2], r[3]);
        const Bytes high01 = _mm_unpackhi_epi32(r[0], r[1]), high23 = _mm_unpackhi_epi32(r[2], r[3]);
        int8_t* target = packed + 4 * c;
        _mm_storeu_si128((__m128i*)target, _mm_unpacklo_epi64(low01, low23));
        if (steps > 1) _mm_storeu_si128((__m128i*)(target + 64), _mm_unpackhi_epi64(low01, low23));
        if (steps > 2) _mm_storeu_si128((__m128i*)(target + 128), _mm_unpacklo_epi64(high01, high23));
        if (steps > 3) _mm_storeu_si128((__m128i*)(target + 192), _mm_unpackhi_epi64(high01, high23));
      }
    }
    return;
  }
#endif
  for (int64_t k = 0; k < depth; k += 4, packed += 64)
    for (int64_t c = 0; c < int8_panel; ++c)
      for (int64_t i = 0; i < 4; ++i)
        packed[4 * c + i] = c < columns && k + i < depth ? view.data[(k + i) * view.row + c * view.column] : int8_t(0);
}

// `depth` codes of 64 columns as four panels, `panel_bytes` apart
inline void pack_bundle(const Int8View& view, int64_t depth, int8_t* packed, int64_t panel_bytes) {
#if defined(__AVX512BW__)
  if (view.column == 1) {
    constexpr int64_t ahead = 16;  // rows: they lie too far apart for the processor to fetch them by itself
    for (int64_t k = 0; k < depth; k += 4, packed += 64) {
      __m512i r[4];
      for (int i = 0; i < 4; ++i) {
        const int8_t* const row = view.data + (k + i) * view.row;
        r[i] = k + i < depth ? _mm512_loadu_si512(row) : _mm512_setzero_si512();
        if (k + i + ahead < depth) _mm_prefetch((const char*)(row + ahead * view.row), _MM_HINT_T0);
      }
      // interleaved within quarters, of which each is a panel's columns
      const __m512i low01 = _mm512_unpacklo_epi8(r[0], r[1]), low23 = _mm512_unpacklo_epi8(r[2], r[3]);
      const __m512i high01 = _mm512_unpackhi_epi8(r[0], r[1]), high23 = _mm512_unpackhi_epi8(r[2], r[3]);
      const __m512i a = _mm512_unpacklo_epi16(low01, low23), b = _mm512_unpackhi_epi16(low01, low23);
      const __m512i c = _mm512_unpacklo_epi16(high01, high23), d = _mm512_unpackhi_epi16(high01, high23);
      // transposed by quarters
      const __m512i ab01 = _mm512_shuffle_i32x4(a, b, 0x44), ab23 = _mm512_shuffle_i32x4(a, b, 0xee);
      const __m512i cd01 = _mm512_shuffle_i32x4(c, d, 0x44), cd23 = _mm512_shuffle_i32x4(c, d, 0xee);
      _mm512_storeu_si512(packed, _mm512_shuffle_i32x4(ab01, cd01, 0x88));
      _mm512_storeu_si512(packed + panel_bytes, _mm512_shuffle_i32x4(ab01, cd01, 0xdd));
      _mm512_storeu_si512(packed + 2 * panel_bytes, _mm512_shuffle_i32x4(ab23, cd23, 0x88));
      _mm512_storeu_si512(packed + 3 * panel_bytes, _mm512_shuffle_i32x4(ab23, cd23, 0xdd));
    }
    return;
  }
#endif
  for (int64_t p = 0; p < int8_bundle; ++p) {
    const Int8View panel = {view.data + p * int8_panel * view.column, view.row, view.column};
    pack_part(panel, depth, int8_panel, packed + p * panel_bytes);
  }
}

void pack_right(const Int8Right& job, int64_t bundle) {
  const int64_t first = bundle * int8_bundle, begin = first * int8_panel;
  const int64_t columns = job.columns - begin < int8_bundle * int8_panel ? job.columns - begin : int8_bundle * int8_panel;
  const int64_t panels = (columns + int8_panel - 1) / int8_panel;
  const int64_t segment_bytes = job.steps * 64, panel_bytes = job.segment_count * segment_bytes;
  int8_t* const packed = job.packed + first * panel_bytes;
  const int64_t used = (job.part_count * job.part_depth + 3) / 4 * 64;
  for (int64_t s = 0; s < job.segment_count; ++s) {
    int8_t* const segment = packed + s * segment_bytes;
    for (int64_t p = 0; p < job.part_count; ++p) {
      int8_t* const part = segment + p * job.part_depth * 16;
      const int64_t start = job.parts[s * job.part_count + p];
      const int64_t codes = start < 0 ? 0 : job.part_codes;
      Int8View view = job.source;
      view.data += (codes > 0 ? start : 0) + begin * view.column;
      const int64_t packed_codes = (codes + 3) / 4 * 4;
      if (codes > 0 && columns == int8_bundle * int8_panel) pack_bundle(view, codes, part, panel_bytes);
      for (int64_t i = 0; i < panels; ++i) {
        int8_t* const target = part + i * panel_bytes;
        if (codes > 0 && columns < int8_bundle * int8_panel) {
          const Int8View panel = {view.data + i * int8_panel * view.column, view.row, view.column};
          const int64_t rest = columns - i * int8_panel;
          pack_part(panel, codes, rest < int8_panel ? rest : int8_panel, target);
        }
        if (packed_codes < job.part_depth)
          memset(target + packed_codes * 16, 0, size_t(job.part_depth - packed_codes) * 16);
      }
    }
    for (int64_t i = 0; i < panels; ++i) memset(segment + i * panel_bytes + used, 0, size_t(segment_bytes - used));
  }
#if defined(__AMX_INT8__)
  if (job.steps % Dot::matrix_steps == 0) return;
#endif
  for (int64_t i = 0; i < panels; ++i)
    Dot::correct(packed + i * panel_bytes, job.segment_count * job.steps, job.correction + begin + i * int8_panel);
}

void pack_box(const Int8Box& box) {
  const uint8_t flip = box.plain ? 0 : Dot::flip;
  const int64_t line = box.box_width * box.channels;
  const int64_t x_begin = box.x < 0 ? (-box.x < box.box_width ? -box.x : box.box_width) : 0;
  int64_t x_end = box.width - box.x < box.box_width ? box.width - box.x : box.box_width;
  if (x_end < x_begin) x_end = x_begin;
  for (int64_t i = 0; i < box.box_height; ++i) {
    uint8_t* left = box.left + i * line;
    const int64_t y = box.y + i;
    if (y < 0 || y >= box.height || x_begin == x_end) {
      memset(left, flip, size_t(line));
      continue;
    }
    memset(left, flip, size_t(x_begin * box.channels));
    memset(left + x_end * box.channels, flip, size_t((box.box_width - x_end) * box.channels));
    const int8_t* source = box.source + y * box.y_stride + (box.x + x_begin) * box.x_stride;
    const int64_t pixels = x_end - x_begin;
    left += x_begin * box.channels;
    if (box.channel_stride == 1 && box.x_stride == box.channels) {
      copy_flipped(source, pixels * box.channels, left, flip);
    } else if (box.channel_stride == 1) {
      for (int64_t x = 0; x < pixels; ++x)
        copy_flipped(source + x * box.x_stride, box.channels, left + x * box.channels, flip);
    } else if (box.x_stride == 1) {
      transpose_bytes(source, box.channel_stride, box.channels, pixels, left, box.channels, flip);
    } else {
      for (int64_t x = 0; x < pixels; ++x)
        for (int64_t c = 0; c < box.channels; ++c)
          left[x * box.channels + c] = uint8_t(source[x * box.x_stride + c * box.channel_stride]) ^ flip;
    }
  }
}

// Zeros in [0, begin) and [end, width) of each channel's line. What lies between may be written, too: it comes later.
inline void pack_margins(uint8_t* line, int64_t plane, int64_t channels, int64_t begin, int64_t end, int64_t width) {
  const uint32_t zeros = 0x01010101u * Dot::flip;
  if (begin <= 4 && width - end <= 4 && width >= 4) {  // the margins of most kernels, without a call for each line
    for (int64_t c = 0; c < channels; ++c, line += plane) {
      memcpy(line, &zeros, sizeof zeros);
      memcpy(line + width - 4, &zeros, sizeof zeros);
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c, line += plane) {
    memset(line, Dot::flip, size_t(begin));
    memset(line + end, Dot::flip, size_t(width - end));
  }
}

void pack_planes(const Int8Planes& job) {
  for (int64_t i = 0; i < job.box_height; ++i) {
    const int64_t y = job.y + i;
    uint8_t* row = job.left + i * job.row;
    for (int64_t phase = 0; phase < job.phases; ++phase) {
      const int64_t x = job.x + phase;  // source column of the first element
      int64_t begin = x < 0 ? (-x + job.step - 1) / job.step : 0;
      int64_t end = x >= job.width ? 0 : (job.width - x + job.step - 1) / job.step;
      if (end > job.box_width) end = job.box_width;
      if (y < 0 || y >= job.height || end <= begin) begin = end = 0;
      pack_margins(row + phase * job.box_width, job.plane, job.channels, begin, end, job.box_width);
      if (end == 0) continue;
      const int8_t* source = job.source + y * job.y_stride + (x + begin * job.step) * job.x_stride;
      uint8_t* left = row + phase * job.box_width + begin;
      const int64_t pixel = job.step * job.x_stride;
      if (job.channel_stride == 1) {
        transpose_bytes(source, pixel, end - begin, job.channels, left, job.plane, Dot::flip);
      } else if (pixel == 1) {
        for (int64_t c = 0; c < job.channels; ++c)
          copy_flipped(source + c * job.channel_stride, end - begin, left + c * job.plane);
      } else {
        for (int64_t c = 0; c < job.channels; ++c)
          for (int64_t j = 0; j < end - begin; ++j)
            left[c * job.plane + j] = flipped(source[c * job.channel_stride + j * pixel]);
      }
    }
  }
}

}  // namespace
}  // namespace lowbit

// The products of int8 codes from outside; the definitions are in src/lowbit/ops/int8.py.
//
// Every product is a sum over left rows and packed right panels:
//   left   bytes with the summed axis contiguous, in one or several segments, each code XOR `flip`
//   right  [column / 16][k / 4][16][4] codes, zeros where there is no column or no k, so that what a left row holds there
//          does not matter; `depth_unit` bytes is the granularity of a segment
// A kernel that needs unsigned left bytes has flip = 0x80, which adds 128 to each code; `correction` takes that back.
// Sums wrap around, so only the true sum has to fit int32.
#pragma once

#include <stdint.h>

namespace lowbit {

constexpr int64_t int8_panel = 16;        // columns in a panel
constexpr int64_t int8_bundle = 4;        // panels that are packed together: their codes in a row fill a cache line
constexpr int64_t int8_safe = 131071;     // (2^31 - 1) / 128^2: products of codes that fit an int32 sum
constexpr int64_t int8_slack = 128;       // bytes that a left buffer has beyond its last row

// a (rows, columns) view of bytes
struct Int8View {
  const int8_t* data;
  int64_t row, column;  // strides
};

// rows of the left operand that are one `row` stride apart, and what belongs to them
struct Int8Rows {
  const uint8_t* left;
  int64_t out;              // elements from Int8Product::out
  const float* left_scale;
  int32_t* sums;            // this group's first row, first column; where sums are kept
};

struct Int8Product {
  const Int8Rows* groups;
  int64_t group_count, rows;     // rows in each group
  int64_t left_row;              // bytes between rows
  bool disjoint;                 // no byte of the left operand belongs to two rows, or to two segments of one
  const int64_t* segments;       // where each segment starts in a row
  int64_t segment_count, steps;  // 4-byte steps in each segment
  const int8_t* right;
  int64_t panel_bytes;
  const int32_t* correction;     // for each column, padded to whole panels
  int64_t columns;
  // first: sums start at zero, else they are read; last: the epilogue, else they are written (panels are 16 wide)
  bool first, last;
  int64_t sums_row;
  // epilogue; right_scale and bias (may be null) are padded to whole panels
  void* out;
  int64_t out_row;
  bool bfloat16;
  bool stream;  // past the caches: `columns` whole panels, `out`, rows and pairs of panels multiples of 64 bytes
  int64_t left_scale_step;
  const float* right_scale;
  const float* bias;
};

// a right operand: `segment_count` stretches of k, each `part_count` * `part_depth` long, then zeros up to 4 * `steps`;
// a part has `part_codes` codes, then zeros
struct Int8Right {
  Int8View source;              // (k inside a part, column)
  const int64_t* parts;         // where each part of each segment starts, in bytes from source.data; -1: it is zero
  int64_t segment_count, part_count, part_depth, part_codes, steps;
  int64_t columns;
  int8_t* packed;
  int32_t* correction;
};

// the left operand of a convolution: a box of rows and pixels of one image, channels contiguous, zeros outside
struct Int8Box {
  const int8_t* source;
  int64_t y_stride, x_stride, channel_stride;
  int64_t height, width, channels;  // of the source
  int64_t y, x;                     // where the box begins, in the source's rows and columns; may be outside
  int64_t box_height, box_width;
  bool plain;  // codes as they are, for the depthwise kernels
  uint8_t* left;
};

// the left operand of grad_w: each channel a plane, rows split by the phase of x: [channel][y][phase][width]
struct Int8Planes {
  const int8_t* source;
  int64_t y_stride, x_stride, channel_stride;
  int64_t height, width, channels;
  int64_t y, box_height;
  int64_t x, step, phases, box_width;  // [phase][i] holds source column x + phase + i * step
  int64_t plane, row;                  // bytes between planes and rows
  uint8_t* left;
};

// sums of grad_w, [part][tap][channel][column], to its result: (column, channel, tap), or (column, tap, channel) with
// `out_tap` elements from tap to tap
struct Int8GradW {
  const int32_t* sums;
  int64_t parts, part, tap, channel;  // how many parts; strides in elements
  int64_t taps, channels, columns;
  const float* channel_scale;
  int64_t channel_scale_step;
  const float* column_scale;          // padded to whole panels
  void* out;
  int64_t out_column;
  int64_t out_tap;  // 0: channels have their taps side by side
  bool bfloat16;
  bool stream;      // past the caches: float32, all that lies side by side multiples of 64 bytes
};

// Depthwise convolutions work on channels-last boxes, 16 channels at a time. Forward and grad_a are an Int8Product whose
// segments are taps, whose columns are channels, and whose right operand is [channel / 16][tap][16] of int32. grad_w:
struct Int8DepthwiseGradW {
  const uint8_t* left;   // of x, a plain box
  const uint8_t* error;  // of e, a plain box: (rows, width, channels)
  int64_t rows, width, channels;
  int64_t left_line, left_row;  // bytes between what neighbouring rows and columns of e see
  const int64_t* taps;          // offsets in `left`
  int64_t tap_count;
  int64_t* sums;  // (tap, channels padded to panels), added to
};

struct Int8Kernels {
  int64_t depth_unit;  // bytes; grad_w may also use 4
  bool plain_left;     // flip is 0
  int64_t most_panels, most_rows;  // of a tile
  int64_t most_rows_of_words, most_rows_narrow;  // where segments are not whole depth units; narrow: with one panel
  // rows of a matrix, `pitch` bytes apart
  void (*pack_left)(const Int8View&, int64_t rows, int64_t depth, uint8_t* left, int64_t pitch);
  void (*pack_right)(const Int8Right&, int64_t bundle);
  void (*pack_box)(const Int8Box&);
  void (*pack_planes)(const Int8Planes&);
  // (rows, columns) bytes to (columns, rows), the latter `pitch` bytes apart
  void (*transpose)(const int8_t* source, int64_t source_pitch, int64_t rows, int64_t columns, int8_t* out, int64_t pitch);
  void (*multiply)(const Int8Product&);
  void (*multiply_depthwise)(const Int8Product&);
  void (*depthwise_grad_w)(const Int8DepthwiseGradW&);
  // the epilogue for sums in int64, (rows, columns)
  void (*finish_long)(const Int8Product&, const int64_t* sums, int64_t sums_row);
  void (*finish_grad_w)(const Int8GradW&);
};

}  // namespace lowbit

// The products of int8 codes as PyTorch operators: what is cut into which tasks. The kernels are in int8.inc.h.
#include "library.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

namespace {

using lowbit::int8_bundle;
using lowbit::int8_panel;
using lowbit::int8_safe;
using lowbit::int8_slack;
using lowbit::Int8Box;
using lowbit::Int8DepthwiseGradW;
using lowbit::Int8GradW;
using lowbit::Int8Kernels;
using lowbit::Int8Planes;
using lowbit::Int8Product;
using lowbit::Int8Right;
using lowbit::Int8Rows;
using lowbit::Int8View;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t worth_a_thread = 1 << 20;  // multiply-adds, about 10 microseconds
constexpr int64_t cache_bytes = 256 << 10;   // of left operand that a task works on: a part of the L2 cache

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t cuts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Memory that a thread keeps between calls: the page faults of a fresh allocation cost more than many a product.
class Scratch {
 public:
  uint8_t* reserve(int64_t bytes) {
    if (bytes > capacity_) {
      memory_.reset();
      memory_.reset(static_cast<uint8_t*>(::operator new(size_t(bytes), std::align_val_t(64))));
      capacity_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  int64_t capacity_ = 0;
};

thread_local Scratch call_scratch, weight_scratch;  // of the thread that calls the operator: what its workers share
thread_local Scratch task_scratch;                  // of each worker

// Offsets of arrays that share one allocation.
struct Layout {
  int64_t bytes = 0;
  int64_t add(int64_t n) {
    const int64_t at = bytes;
    bytes += up(n, 64);
    return at;
  }
};

int64_t grain(int64_t cost) { return std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, cost)); }

bool check_dtype(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "int8 products give float32 or bfloat16; convert the result");
  return dtype == ScalarType::BFloat16;
}

void check_codes(const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Char && x.dim() == dims, "int8 products need int8 codes with ", dims,
                  " axes");
}

void check_vector(const Tensor& x, int64_t n, bool one, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 1 && x.is_contiguous() &&
                      (x.size(0) == n || (one && x.size(0) == 1)),
                  name, " must be float32, contiguous and of ", n, one ? " elements or one" : " elements");
}

// `groups` times `n` numbers of x (it holds one number, or n, or groups * n), each group padded to whole panels
void expand(const float* x, int64_t count, int64_t groups, int64_t n, float* out) {
  const int64_t padded = up(n, int8_panel);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t j = 0; j < padded; ++j)
      out[g * padded + j] = j >= n ? 0.0f : x[count == 1 ? 0 : count == n ? j : g * n + j];
}

// Results of so many bytes are written past the caches, where lines are written whole: a line then need not be read first,
// and what the caches hold stays. Images are read again at once, by a normalization, so they must be more than L2 caches
// keep till then.
constexpr int64_t streamed_matrix = 1 << 20, streamed_images = 1 << 22;

bool whole_lines(const Tensor& out, int64_t columns, int64_t least_bytes) {
  const int64_t bytes = out.scalar_type() == ScalarType::Float ? 4 : 2;
  return out.numel() * bytes >= least_bytes && columns * bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 == 0;
}

// Whether kernels can take codes as left rows where they lie, `row` bytes apart.
bool taken_as_is(const Int8Kernels& kernels, const int8_t* data, int64_t row) {
  return kernels.plain_left && row % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 64 == 0;
}

// ---- matrix product ----

// A matrix that codes make: `view` with the strides of an axis of one element at will.
struct Matrix {
  Int8View view;
  int64_t rows, columns;
  Matrix(const int8_t* data, int64_t m, int64_t n, int64_t row, int64_t column)
      : view{data, m == 1 ? n : row, n == 1 ? 1 : column}, rows(m), columns(n) {}
};

void multiply_matrices(const Matrix& a, const Matrix& b, const Tensor& a_scale, const Tensor& b_scale,
                       const std::optional<Tensor>& bias, Tensor& out) {
  const Int8Kernels& kernels = lowbit::kernels().int8;
  const bool bfloat16 = out.scalar_type() == ScalarType::BFloat16;
  const int64_t rows = a.rows, depth = a.columns, columns = b.columns;

  // pieces of the depth, so that a panel and some rows fit the cache
  constexpr int64_t piece_depth = 4096;
  const int64_t pieces = depth <= 3 * piece_depth / 2 ? 1 : cuts(depth, piece_depth);
  const int64_t piece = up(cuts(depth, pieces), 64), piece_steps = up(piece, kernels.depth_unit) / 4;
  const int64_t piece_count = std::max<int64_t>(1, cuts(depth, std::max<int64_t>(1, piece)));
  const int64_t panels = cuts(columns, int8_panel), padded = panels * int8_panel;
  const bool is_long = depth > int8_safe;

  Layout shared;
  const int64_t packed_at = shared.add(piece_count * panels * piece_steps * 64);
  const int64_t correction_at = shared.add(piece_count * padded * 4);
  const int64_t scale_at = shared.add(padded * 4), bias_at = shared.add(padded * 4);
  uint8_t* const base = call_scratch.reserve(shared.bytes);
  int8_t* const packed = reinterpret_cast<int8_t*>(base + packed_at);
  int32_t* const correction = reinterpret_cast<int32_t*>(base + correction_at);
  float* const right_scale = reinterpret_cast<float*>(base + scale_at);
  float* const right_bias = reinterpret_cast<float*>(base + bias_at);
  expand(b_scale.const_data_ptr<float>(), b_scale.size(0), 1, columns, right_scale);
  if (bias) expand(bias->const_data_ptr<float>(), columns, 1, columns, right_bias);

  const int64_t part = 0;
  auto right_of = [&](int64_t p) {
    Int8Right job;
    job.source = b.view;
    job.source.data += p * piece * b.view.row;
    job.parts = &part, job.segment_count = 1, job.part_count = 1;
    job.part_depth = job.part_codes = std::min(piece, depth - p * piece);
    job.steps = up(job.part_depth, kernels.depth_unit) / 4;
    job.columns = columns;
    job.packed = packed + p * panels * piece_steps * 64, job.correction = correction + p * padded;
    return job;
  };
  const int64_t bundles = cuts(panels, int8_bundle);
  torch::stable::parallel_for(0, piece_count * bundles, grain(piece * 64 * 8), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) kernels.pack_right(right_of(task / bundles), task % bundles);
  });

  // tasks: bands of rows, of which a thread takes some at once; where those are fewer than the threads, also ranges of
  // columns
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t band = kernels.most_rows, bands = cuts(rows, band);
  const int64_t most_bands = std::clamp<int64_t>(2 * cache_bytes / std::max<int64_t>(1, piece) / band, 1, 16);
  const int64_t ranges_wanted = bands < threads ? std::min(cuts(threads, bands), cuts(panels, kernels.most_panels)) : 1;
  const int64_t range = up(cuts(panels, ranges_wanted), kernels.most_panels), ranges = cuts(panels, range);
  // Rows that kernels can take as they lie are not copied.
  const Int8View& view = a.view;
  const bool in_place = view.column == 1 && depth % 64 == 0 && taken_as_is(kernels, view.data, view.row);
  // a copy's rows are not a multiple of 4096 apart: they would share the sets of the L1 cache
  const int64_t pitch = in_place ? view.row : up(piece, 64) + 64;
  const int64_t left_step = a_scale.size(0) == 1 ? 0 : 1;
  const float* const left_scale = a_scale.const_data_ptr<float>();
  void* const out_data = out.mutable_data_ptr();
  const int64_t cost = band * range * int8_panel * depth;
  torch::stable::parallel_for(0, bands * ranges, grain(cost), [&](int64_t begin, int64_t end) {
    const int64_t block_bands = ranges > 1 ? 1 : cuts(end - begin, cuts(end - begin, most_bands));
    const int64_t block = block_bands * band;
    Layout own;
    const int64_t left_at = own.add(in_place ? 0 : block * pitch + int8_slack);
    const int64_t sums_at = own.add(piece_count > 1 ? block * range * int8_panel * 4 : 0);
    const int64_t long_at = own.add(is_long ? block * range * int8_panel * 8 : 0);
    uint8_t* const memory = task_scratch.reserve(own.bytes);
    uint8_t* const left = memory + left_at;
    int32_t* const sums = reinterpret_cast<int32_t*>(memory + sums_at);
    int64_t* const long_sums = reinterpret_cast<int64_t*>(memory + long_at);
    int64_t packed_row = -1;
    for (int64_t task = begin; task < end; task += block_bands) {
      const int64_t row = task / ranges * band, panel = task % ranges * range;
      const int64_t height = std::min(std::min(block_bands, end - task) * band, rows - row);
      const int64_t first_column = panel * int8_panel;
      const int64_t width = std::min(columns - first_column, range * int8_panel), sums_row = up(width, int8_panel);
      Int8Rows group = {left, row * columns + first_column, left_scale + row * left_step, sums};
      Int8Product job;
      job.groups = &group, job.group_count = 1, job.rows = height;
      job.left_row = pitch, job.disjoint = true;
      job.segments = &part, job.segment_count = 1;
      job.columns = width, job.sums_row = sums_row;
      job.out = out_data, job.out_row = columns, job.bfloat16 = bfloat16;
      job.stream = whole_lines(out, columns, streamed_matrix);
      job.left_scale_step = left_step, job.right_scale = right_scale + first_column;
      job.bias = bias ? right_bias + first_column : nullptr;
      if (is_long) std::fill(long_sums, long_sums + height * sums_row, 0);
      int64_t in_sums = 0;  // products in the int32 sums
      for (int64_t p = 0; p < piece_count; ++p) {
        const Int8Right right = right_of(p);
        Int8View here = view;
        here.data += row * here.row + p * piece * here.column;
        if (in_place) {
          group.left = reinterpret_cast<const uint8_t*>(here.data);
        } else if (piece_count > 1 || packed_row != row) {
          kernels.pack_left(here, height, right.part_depth, left, pitch);
          packed_row = row;
        }
        job.steps = right.steps, job.panel_bytes = right.steps * 64;
        job.right = right.packed + panel * job.panel_bytes, job.correction = right.correction + first_column;
        job.first = in_sums == 0, job.last = p + 1 == piece_count && !is_long;
        kernels.multiply(job);
        in_sums += right.part_depth;
        if (is_long && (p + 1 == piece_count || in_sums + piece > int8_safe)) {
          for (int64_t i = 0; i < height * sums_row; ++i) long_sums[i] += sums[i];
          in_sums = 0;
        }
      }
      if (is_long) kernels.finish_long(job, long_sums, sums_row);
    }
  });
}

Tensor int8_matmul(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                   std::optional<Tensor> bias, ScalarType dtype) {
  check_dtype(dtype);
  check_codes(a, 2), check_codes(b, 2);
  const int64_t rows = a.size(0), depth = a.size(1), columns = b.size(1);
  STD_TORCH_CHECK(b.size(0) == depth, "int8_matmul needs a (M, K) and b (K, N), got (", rows, ", ", depth, ") and (",
                  b.size(0), ", ", columns, ")");
  check_vector(a_scale, rows, true, "a_scale"), check_vector(b_scale, columns, true, "b_scale");
  if (bias) check_vector(*bias, columns, false, "bias");
  const int64_t shape[2] = {rows, columns};
  Tensor out = lowbit::fresh(lowbit::empty({shape, 2}, dtype));
  if (rows == 0 || columns == 0) return out;
  multiply_matrices({a.const_data_ptr<int8_t>(), rows, depth, a.stride(0), a.stride(1)},
                    {b.const_data_ptr<int8_t>(), depth, columns, b.stride(0), b.stride(1)}, a_scale, b_scale, bias, out);
  return out;
}

// ---- convolutions ----

struct Geometry {
  int64_t samples, channels, height, width;                  // of the input
  int64_t filters, group_channels, kernel_height, kernel_width;  // of the weight
  int64_t out_height, out_width;
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups, group_filters;
  int64_t taps() const { return kernel_height * kernel_width; }
};

Geometry geometry(const std::vector<int64_t>& x, const std::vector<int64_t>& w, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  STD_TORCH_CHECK(x.size() == 4 && w.size() == 4, "a convolution needs shapes of four numbers");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding and dilation must be two numbers each");
  Geometry g = {};
  g.samples = x[0], g.channels = x[1], g.height = x[2], g.width = x[3];
  g.filters = w[0], g.group_channels = w[1], g.kernel_height = w[2], g.kernel_width = w[3];
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(stride[i] >= 1 && padding[i] >= 0 && dilation[i] >= 1,
                    "stride and dilation must be at least 1, padding at least 0");
    g.stride[i] = stride[i], g.padding[i] = padding[i], g.dilation[i] = dilation[i];
  }
  STD_TORCH_CHECK(groups >= 1 && g.filters % groups == 0 && g.channels == groups * g.group_channels,
                  "groups must divide the output channels, and the input needs groups * ", g.group_channels,
                  " channels; got ", groups, " groups and ", g.channels, " channels");
  STD_TORCH_CHECK(g.samples >= 0 && g.channels >= 0 && g.height >= 0 && g.width >= 0 && g.filters >= 0 &&
                      g.kernel_height >= 1 && g.kernel_width >= 1,
                  "a convolution needs sizes of at least 0 and a kernel of at least 1");
  g.groups = groups, g.group_filters = g.filters / groups;
  const int64_t over[2] = {g.height + 2 * g.padding[0] - g.dilation[0] * (g.kernel_height - 1) - 1,
                           g.width + 2 * g.padding[1] - g.dilation[1] * (g.kernel_width - 1) - 1};
  STD_TORCH_CHECK(over[0] >= 0 && over[1] >= 0, "the kernel is larger than the padded input");
  g.out_height = over[0] / g.stride[0] + 1, g.out_width = over[1] / g.stride[1] + 1;
  return g;
}

bool depthwise(const Geometry& g) { return g.groups > 1 && g.group_channels == 1 && g.group_filters == 1; }

std::vector<int64_t> shape_of(const Tensor& x) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < x.dim(); ++i) shape.push_back(x.size(i));
  return shape;
}

void check_error(const Tensor& e, const Geometry& g) {
  check_codes(e, 4);
  STD_TORCH_CHECK(e.size(0) == g.samples && e.size(1) == g.filters && e.size(2) == g.out_height &&
                      e.size(3) == g.out_width,
                  "e must have the shape of the convolution's output");
}

Tensor channels_last(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype) {
  const int64_t shape[4] = {n, c, h, w};
  return lowbit::fresh(lowbit::empty({shape, 4}, dtype, true));
}

// One image's channels of one group, wherever they lie; an axis of one element has no stride that matters.
struct Images {
  const int8_t* data;
  int64_t samples;
  int64_t sample, channel, y, x;  // strides
  int64_t height, width;
  // whether all pixels are `x` apart
  bool pixels_in_line() const {
    return (height == 1 || y == width * x) && (samples == 1 || sample == height * width * x);
  }
  explicit Images(const Tensor& t)
      : data(t.const_data_ptr<int8_t>()),
        samples(t.size(0)),
        sample(t.stride(0)),
        channel(t.size(1) == 1 ? 1 : t.stride(1)),
        y(t.stride(2)),
        x(t.stride(3)),
        height(t.size(2)),
        width(t.size(3)) {}
};

// The weight as (filter, tap, channel), contiguous: itself if it lies so, else a copy in weight_scratch.
const int8_t* by_taps(const Int8Kernels& kernels, const Tensor& w, const Geometry& g) {
  const int8_t* data = w.const_data_ptr<int8_t>();
  const int64_t channels = g.group_channels, taps = g.taps();
  const int64_t kh = g.kernel_height, kw = g.kernel_width;
  const bool contiguous = (channels == 1 || w.stride(1) == 1) && (kw == 1 || w.stride(3) == channels) &&
                          (kh == 1 || w.stride(2) == kw * channels) &&
                          (g.filters == 1 || w.stride(0) == taps * channels);
  if (contiguous) return data;
  int8_t* const copy = reinterpret_cast<int8_t*>(weight_scratch.reserve(w.numel()));
  const bool tap_inside = (kw == 1 || w.stride(3) == 1) && (kh == 1 || w.stride(2) == kw);
  torch::stable::parallel_for(0, g.filters, grain(taps * channels * 8), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const int8_t* source = data + o * w.stride(0);
      int8_t* target = copy + o * taps * channels;
      if (tap_inside) {
        kernels.transpose(source, w.stride(1), channels, taps, target, channels);
        continue;
      }
      for (int64_t ky = 0; ky < kh; ++ky)
        for (int64_t kx = 0; kx < kw; ++kx)
          for (int64_t c = 0; c < channels; ++c)
            *target++ = source[ky * w.stride(2) + kx * w.stride(3) + c * w.stride(1)];
    }
  });
  return copy;
}

// Some rows and columns of a result, regularly spaced, each of which sees the same taps of the weight at the same
// distance in the source. A convolution is one of these; its grad_a has one for each phase of the stride.
struct Phase {
  int64_t out_y, out_x, rows, columns;
  std::vector<int64_t> dy, dx;   // for each segment: where it begins, from the row's and column's place in the source
  std::vector<int64_t> parts;    // for each part of each segment: where it begins in the weight
  int64_t part_count, part_depth, steps;
  int64_t packed, correction;    // where they lie, for group 0
};

struct Gather {
  std::vector<Phase> phases;
  int64_t y_step, x_step;          // in the source, for a step in the phase
  int64_t out_y_step, out_x_step;  // in the result
  int64_t channels, columns;       // of a group: of the source, of the result
  Int8View weight;                 // (k inside a part, column)
  int64_t weight_group;            // between groups
  bool depthwise;                  // one group for all channels, each segment a tap
};

void gather(const Int8Kernels& kernels, Gather& plan, const Images& source, int64_t samples, int64_t groups,
            const Tensor& left_scale, const Tensor& right_scale, const std::optional<Tensor>& bias, Tensor& out,
            bool bfloat16) {
  const int64_t panels = cuts(plan.columns, int8_panel), padded = panels * int8_panel;
  const int64_t out_channels = groups * plan.columns;
  const int64_t out_height = out.size(2), out_width = out.size(3);

  // the source around a row and a column of the phases
  int64_t y_low = 0, y_high = 0, x_low = 0, x_high = 0, most_rows = 0, most_columns = 0, depth = 0;
  bool any = false;
  int64_t packed_bytes = 0, corrections = 0;
  for (Phase& phase : plan.phases) {
    most_rows = std::max(most_rows, phase.rows), most_columns = std::max(most_columns, phase.columns);
    const int64_t taps = std::max<int64_t>(1, phase.part_count * phase.part_depth / std::max<int64_t>(1, plan.channels));
    for (size_t s = 0; s < phase.dy.size(); ++s) {
      y_low = any ? std::min(y_low, phase.dy[s]) : phase.dy[s], y_high = any ? std::max(y_high, phase.dy[s]) : y_low;
      x_low = any ? std::min(x_low, phase.dx[s]) : phase.dx[s];
      x_high = any ? std::max(x_high, phase.dx[s] + taps - 1) : phase.dx[s] + taps - 1;
      any = true;
    }
    phase.steps = plan.depthwise ? 1 : up(phase.part_count * phase.part_depth, kernels.depth_unit) / 4;
    const int64_t segments = int64_t(phase.dy.size());
    phase.packed = packed_bytes, phase.correction = corrections;
    packed_bytes += panels * segments * phase.steps * 64, corrections += padded;
    depth += segments * phase.steps * 4;
  }

  Layout shared;
  const int64_t packed_at = shared.add(groups * packed_bytes), correction_at = shared.add(groups * corrections * 4);
  const int64_t scale_at = shared.add(groups * padded * 4), bias_at = shared.add(groups * padded * 4);
  uint8_t* const base = call_scratch.reserve(shared.bytes);
  int8_t* const packed = reinterpret_cast<int8_t*>(base + packed_at);
  int32_t* const correction = reinterpret_cast<int32_t*>(base + correction_at);
  float* const scales = reinterpret_cast<float*>(base + scale_at);
  float* const biases = reinterpret_cast<float*>(base + bias_at);
  expand(right_scale.const_data_ptr<float>(), right_scale.size(0), groups, plan.columns, scales);
  if (bias) expand(bias->const_data_ptr<float>(), bias->size(0), groups, plan.columns, biases);

  const int64_t phase_count = int64_t(plan.phases.size()), bundles = plan.depthwise ? panels : cuts(panels, int8_bundle);
  torch::stable::parallel_for(0, groups * phase_count * bundles, grain(depth * 64 * 8), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / (phase_count * bundles);
      const Phase& phase = plan.phases[size_t(task / bundles % phase_count)];
      if (plan.depthwise) {
        int32_t* target = reinterpret_cast<int32_t*>(packed + phase.packed) +
                          task % panels * int64_t(phase.parts.size()) * int8_panel;
        for (int64_t tap : phase.parts)
          for (int64_t c = task % panels * int8_panel; c < (task % panels + 1) * int8_panel; ++c)
            *target++ = c < plan.columns ? plan.weight.data[tap + c * plan.weight.column] : 0;
        continue;
      }
      Int8Right job;
      job.source = plan.weight;
      job.source.data += g * plan.weight_group;
      job.parts = phase.parts.data(), job.segment_count = int64_t(phase.dy.size());
      job.part_count = phase.part_count, job.part_depth = job.part_codes = phase.part_depth;
      job.steps = phase.steps;
      job.columns = plan.columns;
      job.packed = packed + g * packed_bytes + phase.packed;
      job.correction = correction + g * corrections + phase.correction;
      kernels.pack_right(job, task % bundles);
    }
  });

  // tasks: some images, or some rows of one image, or some columns of one row
  const int64_t threads = torch::stable::get_num_threads();
  auto box_height = [&](int64_t rows) { return (rows - 1) * plan.y_step + y_high - y_low + 1; };
  auto box_width = [&](int64_t columns) { return (columns - 1) * plan.x_step + x_high - x_low + 1; };
  const int64_t pixel = std::max<int64_t>(1, plan.channels);
  int64_t columns = most_columns, rows = most_rows, images = 1;
  while (columns > 64 && box_height(1) * box_width(columns) * pixel > cache_bytes) columns = cuts(columns, 2);
  while (rows > 1 && box_height(rows) * box_width(columns) * pixel > cache_bytes) rows = cuts(rows, 2);
  if (columns == most_columns && rows == most_rows)
    images = std::max<int64_t>(1, cache_bytes / (box_height(rows) * box_width(columns) * pixel));
  images = cuts(samples, up(cuts(samples, images), std::min(threads, samples)));
  if (samples < threads) rows = std::min(rows, cuts(most_rows, cuts(threads, samples)));
  const int64_t image_blocks = cuts(samples, images), row_blocks = cuts(most_rows, rows);
  const int64_t column_blocks = cuts(most_columns, columns);
  const int64_t blocks = image_blocks * row_blocks * column_blocks;
  const int64_t box_bytes = box_height(rows) * box_width(columns) * plan.channels;
  const int64_t left_step = left_scale.size(0) == 1 ? 0 : 1;
  const float* const left_scales = left_scale.const_data_ptr<float>();
  void* const out_data = out.mutable_data_ptr();
  // a source without margins can be its own box
  const bool inside = y_low >= 0 && y_low + box_height(most_rows) <= source.height && x_low >= 0 &&
                      x_low + box_width(most_columns) <= source.width;
  const bool in_place = inside && !plan.depthwise && source.channel == 1 && source.x == plan.channels &&
                        source.y % 64 == 0 && source.sample % 64 == 0 &&
                        taken_as_is(kernels, source.data, plan.channels);
  const int64_t cost = images * rows * columns * plan.columns * depth;
  torch::stable::parallel_for(0, groups * blocks, grain(cost), [&](int64_t begin, int64_t end) {
    uint8_t* const left = task_scratch.reserve(in_place ? 0 : images * box_bytes + int8_slack);
    std::vector<Int8Rows> lines;
    std::vector<int64_t> segments;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / blocks, image = task % blocks / (row_blocks * column_blocks) * images;
      const int64_t y = task / column_blocks % row_blocks * rows, x = task % column_blocks * columns;
      const int64_t image_end = std::min(samples, image + images);
      Int8Box box;
      box.plain = plan.depthwise;
      box.y_stride = source.y, box.x_stride = source.x, box.channel_stride = plan.channels == 1 ? 1 : source.channel;
      box.height = source.height, box.width = source.width, box.channels = plan.channels;
      box.y = y * plan.y_step + y_low, box.x = x * plan.x_step + x_low;
      box.box_height = box_height(std::min(rows, most_rows - y));
      box.box_width = box_width(std::min(columns, most_columns - x));
      const int64_t box_line = in_place ? source.y : box.box_width * plan.channels;
      const auto box_of = [&](int64_t n) -> const uint8_t* {
        if (!in_place) return left + (n - image) * box_bytes;
        const int8_t* const data = source.data + n * source.sample + g * plan.channels * source.channel;
        return reinterpret_cast<const uint8_t*>(data) + box.y * source.y + box.x * source.x;
      };
      for (int64_t n = image; n < image_end && !in_place; ++n) {
        box.source = source.data + n * source.sample + g * plan.channels * source.channel;
        box.left = left + (n - image) * box_bytes;
        kernels.pack_box(box);
      }
      for (const Phase& phase : plan.phases) {
        const int64_t here_rows = std::min(rows, phase.rows - y), here_columns = std::min(columns, phase.columns - x);
        if (here_rows <= 0 || here_columns <= 0) continue;
        segments.clear();
        for (size_t s = 0; s < phase.dy.size(); ++s)
          segments.push_back((phase.dy[s] - y_low) * box_line + (phase.dx[s] - x_low) * plan.channels);
        // rows that follow each other in the source and in the result are one long row
        const bool joined = here_columns * plan.x_step * plan.channels == plan.y_step * box_line &&
                            plan.out_x_step == 1 && plan.out_y_step == 1 && here_columns == out_width;
        lines.clear();
        for (int64_t n = image; n < image_end; ++n)
          for (int64_t i = 0; i < (joined ? 1 : here_rows); ++i) {
            const int64_t out_y = phase.out_y + (y + i) * plan.out_y_step;
            const int64_t out_x = phase.out_x + x * plan.out_x_step;
            lines.push_back({box_of(n) + i * plan.y_step * box_line,
                             ((n * out_height + out_y) * out_width + out_x) * out_channels + g * plan.columns,
                             left_scales + n * left_step, nullptr});
          }
        Int8Product job;
        job.groups = lines.data(), job.group_count = int64_t(lines.size());
        job.rows = joined ? here_rows * here_columns : here_columns;
        job.left_row = plan.x_step * plan.channels;
        job.disjoint = segments.size() == 1 && phase.part_depth == plan.channels;
        job.segments = segments.data(), job.segment_count = int64_t(segments.size()), job.steps = phase.steps;
        job.panel_bytes = job.segment_count * phase.steps * 64;
        job.right = packed + g * packed_bytes + phase.packed;
        job.correction = correction + g * corrections + phase.correction;
        job.columns = plan.columns;
        job.first = job.last = true, job.sums_row = 0;
        job.out = out_data, job.out_row = plan.out_x_step * out_channels, job.bfloat16 = bfloat16;
        job.stream = !plan.depthwise && whole_lines(out, plan.columns, streamed_images);
        job.left_scale_step = 0;
        job.right_scale = scales + g * padded, job.bias = bias ? biases + g * padded : nullptr;
        (plan.depthwise ? kernels.multiply_depthwise : kernels.multiply)(job);
      }
    }
  });
}

Tensor int8_conv(const Tensor& x, const Tensor& w, const Tensor& x_scale, const Tensor& w_scale,
                 std::optional<Tensor> bias, std::vector<int64_t> stride, std::vector<int64_t> padding,
                 std::vector<int64_t> dilation, int64_t groups, ScalarType dtype) {
  const Int8Kernels& kernels = lowbit::kernels().int8;
  const bool bfloat16 = check_dtype(dtype);
  check_codes(x, 4), check_codes(w, 4);
  const Geometry g = geometry(shape_of(x), shape_of(w), stride, padding, dilation, groups);
  check_vector(x_scale, g.samples, true, "x_scale"), check_vector(w_scale, g.filters, true, "w_scale");
  if (bias) check_vector(*bias, g.filters, false, "bias");
  STD_TORCH_CHECK(g.group_channels * g.taps() <= int8_safe, "int8_conv sums at most ", int8_safe, " products, got ",
                  g.group_channels * g.taps());
  Tensor out = channels_last(g.samples, g.filters, g.out_height, g.out_width, dtype);
  if (g.samples == 0 || g.filters == 0) return out;
  const int64_t channels = g.group_channels;
  const int8_t* weight = by_taps(kernels, w, g);
  Gather plan;
  plan.depthwise = depthwise(g);
  Phase phase = {};
  phase.rows = g.out_height, phase.columns = g.out_width;
  // a row of the kernel is contiguous in the source and in the weight, unless it is dilated
  const bool whole_rows = g.dilation[1] == 1 && !plan.depthwise;
  for (int64_t ky = 0; ky < g.kernel_height; ++ky)
    for (int64_t kx = 0; kx < (whole_rows ? 1 : g.kernel_width); ++kx) {
      phase.dy.push_back(ky * g.dilation[0] - g.padding[0]), phase.dx.push_back(kx * g.dilation[1] - g.padding[1]);
      phase.parts.push_back((ky * g.kernel_width + kx) * channels);
    }
  phase.part_count = 1, phase.part_depth = (whole_rows ? g.kernel_width : 1) * channels;
  plan.phases.push_back(phase);
  plan.y_step = g.stride[0], plan.x_step = g.stride[1], plan.out_y_step = plan.out_x_step = 1;
  plan.channels = channels, plan.columns = g.group_filters;
  plan.weight = {weight, 1, g.taps() * channels};
  plan.weight_group = g.group_filters * g.taps() * channels;
  if (plan.depthwise) plan.channels = plan.columns = groups;
  gather(kernels, plan, Images(x), g.samples, plan.depthwise ? 1 : groups, x_scale, w_scale, bias, out, bfloat16);
  return out;
}

int64_t modulo(int64_t a, int64_t n) { return (a % n + n) % n; }

Tensor int8_conv_grad_a(const Tensor& e, const Tensor& w, const Tensor& e_scale, const Tensor& w_scale,
                        std::vector<int64_t> a_shape, std::vector<int64_t> stride, std::vector<int64_t> padding,
                        std::vector<int64_t> dilation, int64_t groups, ScalarType dtype) {
  const Int8Kernels& kernels = lowbit::kernels().int8;
  const bool bfloat16 = check_dtype(dtype);
  check_codes(w, 4);
  const Geometry g = geometry(a_shape, shape_of(w), stride, padding, dilation, groups);
  check_error(e, g);
  check_vector(e_scale, g.samples, true, "e_scale"), check_vector(w_scale, g.group_channels, true, "w_scale");
  STD_TORCH_CHECK(g.group_filters * g.taps() <= int8_safe, "int8_conv_grad_a sums at most ", int8_safe,
                  " products, got ", g.group_filters * g.taps());
  Tensor out = channels_last(g.samples, g.channels, g.height, g.width, dtype);
  if (out.numel() == 0) return out;
  const int64_t channels = g.group_channels, filters = g.group_filters;
  const int8_t* weight = by_taps(kernels, w, g);
  Gather plan;
  plan.depthwise = depthwise(g);
  // input pixel y = phase + stride * t is met by output rows t + (phase + padding - ky * dilation) / stride
  auto distance = [&](int axis, int64_t phase, int64_t k) { return phase + g.padding[axis] - k * g.dilation[axis]; };
  for (int64_t py = 0; py < std::min(g.stride[0], g.height); ++py)
    for (int64_t px = 0; px < std::min(g.stride[1], g.width); ++px) {
      Phase phase = {};
      phase.out_y = py, phase.out_x = px;
      phase.rows = cuts(g.height - py, g.stride[0]), phase.columns = cuts(g.width - px, g.stride[1]);
      std::vector<int64_t> across;  // the taps of a row that count, from left to right in the source
      for (int64_t kx = g.kernel_width - 1; kx >= 0; --kx)
        if (modulo(distance(1, px, kx), g.stride[1]) == 0) across.push_back(kx);
      bool whole_rows = filters % 4 == 0;
      for (size_t i = 1; i < across.size(); ++i)
        whole_rows &= distance(1, px, across[i]) - distance(1, px, across[i - 1]) == g.stride[1];
      const size_t together = whole_rows ? across.size() : 1;
      for (int64_t ky = g.kernel_height - 1; ky >= 0; --ky) {
        if (modulo(distance(0, py, ky), g.stride[0]) != 0) continue;
        for (size_t i = 0; i < across.size(); ++i) {
          if (i % together == 0) {
            phase.dy.push_back(distance(0, py, ky) / g.stride[0]);
            phase.dx.push_back(distance(1, px, across[i]) / g.stride[1]);
          }
          phase.parts.push_back((ky * g.kernel_width + across[i]) * channels);
        }
      }
      phase.part_count = int64_t(together), phase.part_depth = filters;
      plan.phases.push_back(phase);
    }
  plan.y_step = plan.x_step = 1, plan.out_y_step = g.stride[0], plan.out_x_step = g.stride[1];
  plan.channels = filters, plan.columns = channels;
  plan.weight = {weight, g.taps() * channels, 1};
  plan.weight_group = filters * g.taps() * channels;
  if (plan.depthwise) plan.channels = plan.columns = groups, plan.weight.column = g.taps();
  gather(kernels, plan, Images(e), g.samples, plan.depthwise ? 1 : groups, e_scale, w_scale, std::nullopt, out, bfloat16);
  return out;
}

void depthwise_grad_w(const Int8Kernels& kernels, const Geometry& g, const Images& source, const Images& error,
                      const Tensor& e_scale, const Tensor& x_scale, Tensor& out, bool bfloat16) {
  const int64_t channels = g.channels, padded = up(channels, int8_panel), taps = g.taps();
  const int64_t margin = (g.kernel_height - 1) * g.dilation[0] + 1;
  const int64_t box_width = (g.out_width - 1) * g.stride[1] + (g.kernel_width - 1) * g.dilation[1] + 1;
  std::vector<int64_t> offsets;
  for (int64_t ky = 0; ky < g.kernel_height; ++ky)
    for (int64_t kx = 0; kx < g.kernel_width; ++kx)
      offsets.push_back((ky * g.dilation[0] * box_width + kx * g.dilation[1]) * channels);

  // tasks: parts of the lines of e, each with sums of its own; inside, blocks of lines of one image
  const int64_t lines = g.samples * g.out_height;
  const int64_t line_bytes = (box_width * g.stride[0] + g.out_width) * channels;
  const int64_t block = std::clamp<int64_t>(cache_bytes / line_bytes, 1, g.out_height);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), lines));
  const int64_t part_lines = cuts(lines, parts);
  int64_t* const all_sums = reinterpret_cast<int64_t*>(call_scratch.reserve(parts * taps * padded * 8));
  torch::stable::parallel_for(0, parts, grain(part_lines * g.out_width * channels * taps * 8),
                              [&](int64_t begin, int64_t end) {
    const int64_t left_bytes = up(((block - 1) * g.stride[0] + margin) * box_width * channels + int8_slack, 64);
    uint8_t* const left = task_scratch.reserve(left_bytes + block * g.out_width * channels + int8_slack);
    for (int64_t part = begin; part < end; ++part) {
      int64_t* const sums = all_sums + part * taps * padded;
      std::fill(sums, sums + taps * padded, 0);
      const int64_t last = std::min(lines, (part + 1) * part_lines);
      for (int64_t line = part * part_lines; line < last;) {
        const int64_t sample = line / g.out_height, y = line % g.out_height;
        const int64_t rows = std::min({block, g.out_height - y, last - line});
        Int8Box box;
        box.plain = true;
        box.source = source.data + sample * source.sample;
        box.y_stride = source.y, box.x_stride = source.x, box.channel_stride = source.channel;
        box.height = g.height, box.width = g.width, box.channels = channels;
        box.y = y * g.stride[0] - g.padding[0], box.x = -g.padding[1];
        box.box_height = (rows - 1) * g.stride[0] + margin, box.box_width = box_width, box.left = left;
        kernels.pack_box(box);
        box.source = error.data + sample * error.sample;
        box.y_stride = error.y, box.x_stride = error.x, box.channel_stride = error.channel;
        box.height = g.out_height, box.width = g.out_width;
        box.y = y, box.x = 0, box.box_height = rows, box.box_width = g.out_width, box.left = left + left_bytes;
        kernels.pack_box(box);
        Int8DepthwiseGradW job;
        job.left = left, job.error = left + left_bytes;
        job.rows = rows, job.width = g.out_width, job.channels = channels;
        job.left_line = g.stride[0] * box_width * channels, job.left_row = g.stride[1] * channels;
        job.taps = offsets.data(), job.tap_count = taps, job.sums = sums;
        kernels.depthwise_grad_w(job);
        line += rows;
      }
    }
  });
  const float* const filter_scale = e_scale.const_data_ptr<float>();
  const float* const channel_scale = x_scale.const_data_ptr<float>();
  // the epilogue of the other products: rows are channels, columns are taps
  Layout own;
  const int64_t tap_columns = up(taps, int8_panel);
  const int64_t sums_at = own.add(channels * tap_columns * 8), ones_at = own.add(tap_columns * 4);
  const int64_t scale_at = own.add(channels * 4);
  uint8_t* const memory = task_scratch.reserve(own.bytes);
  int64_t* const total = reinterpret_cast<int64_t*>(memory + sums_at);
  float* const ones = reinterpret_cast<float*>(memory + ones_at);
  float* const scales = reinterpret_cast<float*>(memory + scale_at);
  std::fill(total, total + channels * tap_columns, 0), std::fill(ones, ones + tap_columns, 1.0f);
  for (int64_t c = 0; c < channels; ++c) {
    scales[c] = filter_scale[e_scale.size(0) == 1 ? 0 : c] * channel_scale[x_scale.size(0) == 1 ? 0 : c];
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t part = 0; part < parts; ++part) total[c * tap_columns + t] += all_sums[(part * taps + t) * padded + c];
  }
  const Int8Rows group = {nullptr, 0, scales, nullptr};
  Int8Product job = {};
  job.groups = &group, job.group_count = 1, job.rows = channels, job.columns = taps;
  job.out = out.mutable_data_ptr(), job.out_row = taps, job.bfloat16 = bfloat16;
  job.left_scale_step = 1, job.right_scale = ones;
  kernels.finish_long(job, total, tap_columns);
}

// Left rows are the channels of the input, each a plane of its own, seen from one tap; right columns are the filters; the
// sum runs along the rows of e, the segments. Many rows of e make a block that fits the cache.
Tensor int8_conv_grad_w(const Tensor& e, const Tensor& x, const Tensor& e_scale, const Tensor& x_scale,
                        std::vector<int64_t> w_shape, std::vector<int64_t> stride, std::vector<int64_t> padding,
                        std::vector<int64_t> dilation, int64_t groups, ScalarType dtype, bool is_channels_last) {
  const Int8Kernels& kernels = lowbit::kernels().int8;
  const bool bfloat16 = check_dtype(dtype);
  check_codes(x, 4);
  const Geometry g = geometry(shape_of(x), w_shape, stride, padding, dilation, groups);
  check_error(e, g);
  check_vector(e_scale, g.filters, true, "e_scale"), check_vector(x_scale, g.channels, true, "x_scale");
  Tensor out = is_channels_last ? channels_last(w_shape[0], w_shape[1], w_shape[2], w_shape[3], dtype)
                                : lowbit::empty({w_shape.data(), w_shape.size()}, dtype);
  if (out.numel() == 0) return out;
  if (depthwise(g)) {
    depthwise_grad_w(kernels, g, Images(x), Images(e), e_scale, x_scale, out, bfloat16);
    return out;
  }
  // of few pixels it is faster as the product of two matrices, where it is one
  constexpr int64_t few_pixels = 1 << 14;
  const int64_t pixels = g.samples * g.out_height * g.out_width;
  const Images source(x), error(e);
  const bool pointwise = g.taps() == 1 && groups == 1 && g.stride[0] == 1 && g.stride[1] == 1 && g.padding[0] == 0 &&
                         g.padding[1] == 0;
  if (pointwise && pixels > 0 && pixels <= few_pixels && source.pixels_in_line() && error.pixels_in_line()) {
    multiply_matrices({error.data, g.filters, pixels, error.channel, error.x},
                      {source.data, pixels, g.channels, source.x, source.channel}, e_scale, x_scale, std::nullopt, out);
    return out;
  }

  // a line is a row of e or, where that is long, a piece of one; lines are numbered (piece, sample, row)
  constexpr int64_t most_width = 512;
  const int64_t width = cuts(g.out_width, cuts(g.out_width, most_width)), pieces = cuts(g.out_width, width);
  const int64_t lines = pieces * g.samples * g.out_height;
  const int64_t channels = g.group_channels, filters = g.group_filters, taps = g.taps();
  const int64_t panels = cuts(filters, int8_panel), padded = panels * int8_panel;
  // column ox + j of the output sees, through tap kx, element j + shift of the phase of kx
  const int64_t phases = std::min(g.stride[1], (g.kernel_width - 1) * g.dilation[1] + 1);
  const int64_t most_shift = ((g.kernel_width - 1) * g.dilation[1]) / g.stride[1];
  // With a large unit each line would be little but padding. Where lines of e and of the planes can follow each other at
  // the same distance, a whole run of lines is one segment, with zeros of e between the lines.
  const bool raster = kernels.depth_unit > 4 && g.stride[0] == 1 && phases == 1;
  const int64_t unit = raster || up(width, kernels.depth_unit) <= 3 * width ? kernels.depth_unit : 4;
  // The zeros to the right of a row of x can be those to the left of the next one, where that makes lines shorter.
  const int64_t own_zeros = up(width + most_shift, 4);
  const int64_t shared_zeros = up(width + most_shift - std::min(g.padding[1], most_shift), 4);
  const bool shared_margins = raster && pieces == 1 && shared_zeros < own_zeros;
  const int64_t line_depth = !raster ? up(width, unit) : shared_margins ? shared_zeros : own_zeros;
  const int64_t plane_width = raster ? line_depth : line_depth + most_shift, plane_row = phases * plane_width;

  // tasks: parts of the sum if the sums of each are small, else parts of the channels
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t sums_bytes = taps * channels * padded * 4;
  const int64_t wanted = cuts(threads, groups);
  const int64_t least_parts = cuts(lines * width, int8_safe / width * width);
  int64_t channel_parts = 1, parts = 1;
  if (sums_bytes <= (512 << 10)) parts = std::min(wanted, cuts(lines * width, 256));
  else channel_parts = std::min(wanted, cuts(channels, kernels.most_rows));
  parts = std::max<int64_t>(1, std::max(parts, least_parts));
  const int64_t part_lines = cuts(lines, parts);
  const int64_t part_channels = cuts(channels, channel_parts);

  // blocks of lines: what they need in the cache, against reading and writing the sums once more for each block
  const int64_t line_bytes = part_channels * plane_row * g.stride[0] + line_depth * padded;
  const int64_t block_bytes = std::clamp<int64_t>(sums_bytes / 2, 3 * cache_bytes / 2, 8 * cache_bytes);
  int64_t block = std::max<int64_t>(1, block_bytes / line_bytes);
  block = std::max<int64_t>(1, cuts(part_lines, std::max<int64_t>(1, cuts(part_lines, block))));
  const bool whole = parts == 1 && pieces == 1 && part_lines <= block;  // no sums are kept
  // a block consists of runs of lines of one image, each with the rows of x that it needs
  const int64_t margin = (g.kernel_height - 1) * g.dilation[0] + 1;
  const int64_t most_runs = block / g.out_height + 2, longest_run = std::min(block, g.out_height);
  const int64_t most_plane_rows = block * g.stride[0] + most_runs * margin + (shared_margins ? 1 : 0);
  const int64_t plane = up(plane_row * most_plane_rows, 128) + 64;

  const bool narrow = panels < kernels.most_panels;
  const int64_t most = unit > 4 ? kernels.most_rows : narrow ? kernels.most_rows_narrow : kernels.most_rows_of_words;
  const int64_t tile_rows = cuts(part_channels, cuts(part_channels, most));
  const int64_t tile_columns = (narrow ? 1 : kernels.most_panels) * int8_panel;

  Layout shared;
  const int64_t group_sums = taps * channels * padded;
  const int64_t sums_at = shared.add(whole ? 0 : parts * groups * group_sums * 4);
  const int64_t scale_at = shared.add(groups * padded * 4);
  uint8_t* const base = call_scratch.reserve(shared.bytes);
  int32_t* const all_sums = reinterpret_cast<int32_t*>(base + sums_at);
  float* const scales = reinterpret_cast<float*>(base + scale_at);
  expand(e_scale.const_data_ptr<float>(), e_scale.size(0), groups, filters, scales);
  const int64_t left_step = x_scale.size(0) == 1 ? 0 : 1;
  const float* const left_scales = x_scale.const_data_ptr<float>();
  void* const out_data = out.mutable_data_ptr();

  auto finish = [&](int64_t group, int64_t channel, int64_t count, int64_t column, int64_t columns,
                    const int32_t* sums, int64_t tap_stride, int64_t channel_stride, int64_t part_count) {
    Int8GradW job;
    job.sums = sums, job.parts = part_count, job.part = groups * group_sums;
    job.tap = tap_stride, job.channel = channel_stride;
    job.taps = taps, job.channels = count, job.columns = columns;
    job.channel_scale = left_scales + (group * channels + channel) * left_step, job.channel_scale_step = left_step;
    job.column_scale = scales + group * padded + column;
    job.out_column = channels * taps, job.out_tap = is_channels_last ? channels : 0, job.bfloat16 = bfloat16;
    const int64_t apart = is_channels_last ? 1 : taps;  // elements from a channel to the next
    const int64_t at = (group * filters + column) * channels * taps + channel * apart;
    job.out = static_cast<uint8_t*>(out_data) + at * (bfloat16 ? 2 : 4);
    constexpr int64_t line = int8_panel;  // floats in a cache line
    job.stream = !bfloat16 && whole_lines(out, channels * apart, streamed_matrix) && at % line == 0 &&
                 count * apart % line == 0;
    kernels.finish_grad_w(job);
  };

  const int64_t tasks = groups * parts * channel_parts;
  const int64_t cost = part_lines * width * taps * part_channels * padded;
  torch::stable::parallel_for(0, tasks, grain(cost), [&](int64_t begin, int64_t end) {
    Layout own;
    // a short run in a block with longer ones is read beyond its end, where e is zero
    const int64_t left_at = own.add(part_channels * plane + (longest_run + margin) * plane_row + int8_slack);
    const int64_t right_at = own.add(panels * int8_panel * (raster ? most_runs * up(longest_run * line_depth, unit)
                                                                   : block * line_depth));
    const int64_t correction_at = own.add(padded * 4);
    const int64_t tile_at = own.add(whole ? taps * tile_rows * tile_columns * 4 : 0);
    uint8_t* const memory = task_scratch.reserve(own.bytes);
    uint8_t* const left = memory + left_at;
    int8_t* const right = reinterpret_cast<int8_t*>(memory + right_at);
    int32_t* const correction = reinterpret_cast<int32_t*>(memory + correction_at);
    int32_t* const tile_sums = reinterpret_cast<int32_t*>(memory + tile_at);
    std::vector<int64_t> segments, error_lines, runs;
    std::vector<Int8Rows> rows(static_cast<size_t>(taps));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / (parts * channel_parts), part = task / channel_parts % parts;
      const int64_t channel = task % channel_parts * part_channels;
      const int64_t channel_count = std::min(part_channels, channels - channel);
      if (channel_count <= 0) continue;
      const int64_t last_line = std::min(lines, (part + 1) * part_lines);
      int64_t line = std::min(lines, part * part_lines);
      bool first = true;
      do {
        // the lines of this block: one piece of the rows, at most `block` of them
        const int64_t piece = line / std::max<int64_t>(1, g.samples * g.out_height);
        const int64_t block_end = std::min({line + block, last_line, (piece + 1) * g.samples * g.out_height});
        const int64_t out_x = piece * width, here_width = std::min(width, g.out_width - out_x);
        segments.clear(), error_lines.clear(), runs.clear();
        int64_t plane_y = 0, longest = 0;
        Int8Planes planes = {};
        while (line < block_end) {
          const int64_t sample = line / g.out_height % g.samples, out_y = line % g.out_height;
          const int64_t run = std::min(block_end - line, g.out_height - out_y);
          planes.source = source.data + sample * source.sample + (group * channels + channel) * source.channel;
          planes.y_stride = source.y, planes.x_stride = source.x;
          planes.channel_stride = channels == 1 ? 1 : source.channel;
          planes.height = g.height, planes.width = g.width, planes.channels = channel_count;
          planes.y = out_y * g.stride[0] - g.padding[0], planes.box_height = (run - 1) * g.stride[0] + margin;
          planes.x = out_x * g.stride[1] - g.padding[1];
          planes.step = g.stride[1], planes.phases = phases, planes.box_width = plane_width;
          planes.plane = plane, planes.row = plane_row;
          planes.left = left + plane_y * plane_row;
          kernels.pack_planes(planes);
          for (int64_t i = 0; i < run; ++i) {
            if (!raster || i == 0) segments.push_back((plane_y + i * g.stride[0]) * plane_row);
            error_lines.push_back(sample * error.sample + (out_y + i) * error.y);
          }
          runs.push_back(run), longest = std::max(longest, run);
          plane_y += planes.box_height, line += run;
        }
        if (shared_margins && plane_y > 0) {  // after the last row: one of zeros
          planes.y = g.height, planes.box_height = 1, planes.left = left + plane_y * plane_row;
          kernels.pack_planes(planes);
        }
        if (raster) {  // every segment has as many lines as the longest
          size_t at = 0;
          for (int64_t run : runs) {
            at += size_t(run);
            error_lines.insert(error_lines.begin() + std::ptrdiff_t(at), size_t(longest - run), -1);
            at += size_t(longest - run);
          }
        }
        Int8Right packing;
        packing.source = {error.data + group * filters * error.channel + out_x * error.x,
                          g.out_width == 1 ? 1 : error.x, error.channel};
        packing.parts = error_lines.data(), packing.segment_count = int64_t(segments.size());
        packing.part_count = raster ? longest : 1, packing.part_depth = raster ? line_depth : here_width;
        packing.part_codes = here_width;
        packing.steps = (raster ? up(longest * line_depth, unit) : line_depth) / 4;
        packing.columns = filters, packing.packed = right, packing.correction = correction;
        for (int64_t p = 0; p < cuts(panels, int8_bundle); ++p) kernels.pack_right(packing, p);

        Int8Product job = {};
        job.groups = rows.data(), job.group_count = taps;
        job.left_row = plane, job.disjoint = taps == 1;
        job.segments = segments.data(), job.segment_count = packing.segment_count, job.steps = packing.steps;
        job.panel_bytes = job.segment_count * job.steps * 64;
        job.first = first, job.last = false;
        for (int64_t column = 0; column < filters; column += tile_columns)
          for (int64_t c = 0; c < channel_count; c += tile_rows) {
            int32_t* sums = tile_sums;
            job.sums_row = tile_columns;
            int64_t tap_stride = tile_rows * tile_columns;
            if (!whole) {
              sums = all_sums + (part * groups + group) * group_sums + (channel + c) * padded + column;
              job.sums_row = padded, tap_stride = channels * padded;
            }
            for (int64_t ky = 0; ky < g.kernel_height; ++ky)
              for (int64_t kx = 0; kx < g.kernel_width; ++kx) {
                const int64_t tap = ky * g.kernel_width + kx, x_distance = kx * g.dilation[1];
                const int64_t at = x_distance % g.stride[1] * plane_width + x_distance / g.stride[1];
                rows[size_t(tap)] = {left + c * plane + ky * g.dilation[0] * plane_row + at, 0, nullptr,
                                     sums + tap * tap_stride};
              }
            job.rows = std::min(tile_rows, channel_count - c);
            job.columns = std::min(tile_columns, filters - column);
            job.right = right + column / int8_panel * job.panel_bytes;
            job.correction = correction + column;
            kernels.multiply(job);
            if (whole) finish(group, channel + c, job.rows, column, job.columns, sums, tap_stride, tile_columns, 1);
          }
        first = false;
      } while (line < last_line);
    }
  });
  if (whole) return out;
  // channels; where they lie side by side in the result, two cache lines of them
  const int64_t slice = is_channels_last ? 2 * int8_panel : cuts(64, taps);
  const int64_t slices = cuts(channels, slice);
  torch::stable::parallel_for(0, groups * slices, grain(slice * taps * padded * parts * 8),
                              [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / slices, channel = task % slices * slice;
      finish(group, channel, std::min(slice, channels - channel), 0, filters,
             all_sums + group * group_sums + channel * padded, channels * padded, padded, parts);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  m.impl("int8_matmul", TORCH_BOX(&int8_matmul));
  m.impl("int8_conv", TORCH_BOX(&int8_conv));
  m.impl("int8_conv_grad_a", TORCH_BOX(&int8_conv_grad_a));
  m.impl("int8_conv_grad_w", TORCH_BOX(&int8_conv_grad_w));
}

// Runs the portable kernels without PyTorch and prints a checksum of what each gives for fixed inputs, tails and special
// values included. The test suite holds these kernels against their definitions on the machine that builds; `make cross`
// builds this program for that machine and for another, and the lines must be the same.
#include "kernels.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace {

using namespace lowbit;

const Kernels& k = portable_kernels();

uint64_t state = 1;

uint32_t random_word() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(state >> 32);
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Magnitudes of 2^-6 to 2^9, ties, and now and then something special.
std::vector<float> floats(int64_t count) {
  const float infinity = std::numeric_limits<float>::infinity(), largest = std::numeric_limits<float>::max();
  const float special[] = {0.0f, -0.0f, infinity, -infinity, NAN, largest, -largest, 1e-45f, -1e-40f, 0x1p-126f};
  std::vector<float> x(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = random_word();
    x[size_t(i)] = i % 17 == 5 ? special[i / 17 % 10]
                   : i % 3 == 0 ? float(int32_t(bits % 1024) - 512) / 4
                                : from_bits((bits & 0x807fffff) | ((121 + (bits >> 23) % 16) << 23));
  }
  return x;
}

std::vector<float> tame_floats(int64_t count) {
  std::vector<float> x(static_cast<size_t>(count));
  for (float& v : x) v = float(int32_t(random_word() % 31) - 15) / 8;
  return x;
}

template <class Number>
std::vector<Number> words(int64_t count) {
  std::vector<Number> x(static_cast<size_t>(count));
  for (Number& v : x) v = Number(uint64_t(random_word()) << 32 | random_word());
  return x;
}

std::vector<float> uniforms(int64_t count) {
  std::vector<float> u(static_cast<size_t>(count));
  for (float& v : u) v = float(random_word() >> 8) * 0x1p-24f;
  return u;
}

struct Checksum {
  uint64_t value = 14695981039346656037u;  // FNV-1a
  void add(const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) value = (value ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
  }
  template <class Number>
  void add(const std::vector<Number>& x) { add(x.data(), x.size() * sizeof(Number)); }
  void add(const std::vector<float>& x) {  // any two NaNs are the same
    for (float v : x) {
      if (v != v) v = from_bits(0x7fc00000);
      add(&v, sizeof v);
    }
  }
  void print(const char* name) { std::printf("%s %016llx\n", name, static_cast<unsigned long long>(value)); }
};

constexpr uint32_t key[2] = {0x12345678, 0x9abcdef0}, high[2] = {7, 0xffffffff};

void check_uniform() {
  Checksum sum;
  for (int64_t count : {1, 4, 63, 1003}) {
    std::vector<float> out(static_cast<size_t>(count));
    k.uniform.fill(out.data(), count, 0, (count + 3) / 4, key, high);
    sum.add(out);
  }
  sum.print("uniform");
}

std::vector<CastFormat> formats() {
  std::vector<CastFormat> all;
  CastFormat f = {};
  for (int r = 0; r <= int(CastRounding::stochastic); ++r) {
    f.rounding = CastRounding(r);
    f.kind = CastKind::integer, f.low = -8, f.high = 7, f.up = 4, f.down = 0.25f;
    all.push_back(f);
    f.kind = CastKind::even, f.low = -15, f.high = 15;
    all.push_back(f);
  }
  for (const CastRounding rounding : {CastRounding::half_even, CastRounding::stochastic}) {
    f.rounding = rounding;
    f.kind = CastKind::floating, f.low = -448, f.high = 448, f.lowest_power = (127 - 6) << 23, f.mantissa = 3;
    f.minus_zero = true;
    all.push_back(f);
    f.kind = CastKind::table;
    for (const int64_t levels : {int64_t(9), int64_t(29), CastFormat::levels}) {
      f.search = levels == 9 ? 16 : levels == 29 ? 32 : 256;
      for (int64_t i = 0; i < CastFormat::levels; ++i) {
        f.values[i] = i < levels ? float(i - levels / 2) * 1.5f : 0.0f;
        f.switches[i] = i < levels - 2 ? f.values[i] + 1.5f : std::numeric_limits<float>::infinity();
      }
      for (int64_t i = 0; i < 16; ++i) f.splits[i] = f.switches[16 * i + 15];
      f.low = f.values[0], f.high = f.values[levels - 1];
      all.push_back(f);
    }
  }
  f.kind = CastKind::log2, f.low = 0x1p-5f, f.high = 64;
  all.push_back(f);
  return all;
}

void check_cast() {
  constexpr int64_t rows = 5, columns = 201, count = rows * columns;
  const std::vector<float> x = floats(count), u = uniforms(count), scale = {0.5f, 3.0f, 1.0f, 0x1p-20f, 0.7f};
  const std::vector<float> zero = {0.0f, 3.0f, -1.0f, 0.5f, 0.0f}, offset = {-1.0f, 0.0f, 0.3f, 2.0f, 5.0f};
  std::vector<float> out(count);
  CastTile tile = {};
  tile.rows = rows, tile.columns = columns, tile.x = x.data(), tile.x_row = columns;
  tile.scale = scale.data(), tile.zero = zero.data(), tile.scale_row = 1, tile.out = out.data(), tile.out_row = columns;
  Checksum values, drawn, codes;
  for (CastFormat f : formats()) {
    for (const CastResult result : {CastResult::values, CastResult::grid}) {
      f.result = result;
      tile.u = u.data(), tile.u_row = columns, tile.draw = nullptr;
      k.cast.cast(f, tile);
      values.add(out);
    }
    tile.offset = offset.data(), tile.step = tile.zero, tile.zero = nullptr;
    k.cast.cast(f, tile);
    values.add(out);
    tile.offset = tile.step = nullptr, tile.zero = zero.data();
    if (f.rounding != CastRounding::stochastic) continue;
    std::vector<float> room(CastKernels::buffer + 3);
    CastUniforms job = {};
    std::memcpy(job.key, key, sizeof key), std::memcpy(job.high, high, sizeof high);
    job.first = 10, job.row_index = columns, job.column_index = 1, job.rows = rows, job.columns = columns;
    job.out = room.data() + 3;
    k.cast.uniforms(job, tile);
    k.cast.cast(f, tile);
    drawn.add(out);
  }
  values.print("cast"), drawn.print("cast with uniforms");

  const std::vector<float> most = {1.0f, 4.0f, 100.0f, 0.01f, 7.0f};  // codes come from moderate numbers
  std::vector<float> finite = tame_floats(count), inverse;
  for (float s : most) inverse.push_back(1.0f / s);
  std::vector<int8_t> bytes(count);
  tile.x = finite.data(), tile.scale = most.data(), tile.inverse = inverse.data(), tile.zero = nullptr;
  tile.out = bytes.data(), tile.u = u.data(), tile.u_row = columns, tile.draw = nullptr;
  for (const CastRounding rounding : {CastRounding::half_even, CastRounding::stochastic}) {
    CastFormat f = {};
    f.kind = CastKind::integer, f.rounding = rounding, f.result = CastResult::codes;
    f.low = -127, f.high = 127, f.up = f.down = 1;
    k.cast.cast(f, tile);
    codes.add(bytes);
  }
  codes.print("cast to codes");

  Checksum blocks;
  for (const bool of_columns : {false, true})
    for (const int64_t given : {count, int64_t(5 * 1)}) {  // with NaN, and without
      std::vector<float> low(columns, 1.0f), up(columns, 1.0f), absmax(columns, 0.0f);
      BlockTile t = {};
      t.rows = rows, t.columns = given / rows, t.x = x.data(), t.x_row = given / rows;
      t.block_column = of_columns, t.block_row = of_columns ? 0 : 1;
      t.low = low.data(), t.high = up.data();
      k.cast.minmax(t);
      t.high = absmax.data();
      k.cast.absmax(t);
      blocks.add(low), blocks.add(up), blocks.add(absmax);
    }
  blocks.print("absmax and minmax");
}

void check_chunked() {
  constexpr int64_t rows = 13, depth = 150, columns = 37;
  std::vector<int64_t> a_rows, depths, b_depths, b_columns;
  for (int64_t i = 0; i < rows; ++i) a_rows.push_back(i * depth);
  for (int64_t i = 0; i < depth; ++i) depths.push_back(i), b_depths.push_back(i * columns);
  for (int64_t i = 0; i < columns; ++i) b_columns.push_back(i);
  Checksum sum;
  for (const bool tame : {false, true}) {
    const std::vector<float> a = tame ? tame_floats(rows * depth) : floats(rows * depth);
    const std::vector<float> b = tame ? tame_floats(depth * columns) : floats(depth * columns);
    std::vector<float> out(rows * columns), packed(size_t(depth * k.chunked.panel_columns));
    const Magnitudes all = k.chunked.scan(a.data(), rows * depth);
    sum.add(&all, sizeof all);
    ChunkedMm job = {};
    job.a = a.data(), job.b = b.data(), job.out = out.data();
    job.rows = rows, job.depth = depth, job.columns = columns;
    job.a_rows = a_rows.data(), job.a_depths = depths.data(), job.b_depths = b_depths.data();
    job.b_columns = b_columns.data(), job.out_row = columns, job.out_column = 1, job.chunk = 64, job.tame = tame;
    const int32_t lowest = (127 - 30) << 23;  // 1-6-9
    job.format = {from_bits(0x4f7fc000), lowest, ((23 - 9) << 23) + (1 << 22), 9, false};
    for (int64_t column = 0; column < columns; column += k.chunked.panel_columns) {
      const ChunkedSlab slab = {column, 0, depth, packed.data(), nullptr};
      k.chunked.pack_slab(job, slab, packed.data());
      k.chunked.multiply(job, slab, 0, rows);
    }
    sum.add(out);
  }
  sum.print("chunked_mm");
}

void check_transforms() {
  Checksum hadamard, fingerprint, rules;
  const std::vector<float> x = floats(8192), factors = tame_floats(8192), grad = floats(8192);
  std::vector<float> out(8192);
  for (int64_t size = 1; size <= 4096; size *= 2) {
    k.hadamard.transform({x.data(), out.data(), 8192, size, 0.3f, factors.data(), nullptr});
    hadamard.add(out);
    k.hadamard.transform({factors.data(), out.data(), 8192, size, 0.3f, nullptr, factors.data()});
    hadamard.add(out);
  }
  const std::vector<uint32_t> data = words<uint32_t>(1001), weights = words<uint32_t>(2 * fingerprint_lanes);
  const uint64_t found = k.fingerprint.sum(data.data(), 16, 1001, weights.data(), weights.data() + fingerprint_lanes);
  fingerprint.add(&found, sizeof found);
  RuleJob job = {grad.data(), x.data(), factors.data(), out.data(), 1003, -3.0f, 5.0f, 0.75f};
  k.rules.in_range_closed(job), rules.add(out);
  k.rules.in_range_open(job), rules.add(out);
  job.grad = factors.data(), job.x = factors.data() + 2000;  // finite sums
  const double sums[] = {k.rules.step(job), k.rules.clip(job)};
  rules.add(sums, sizeof sums), rules.add(out);
  hadamard.print("hadamard"), fingerprint.print("fingerprint"), rules.print("gradient rules");
}

void check_reflect() {
  constexpr int64_t rows = 9, columns = 3 * ReflectKernels::strip + 37, groups = 2;
  const std::vector<float> x = floats(rows * columns);
  std::vector<float> out(rows * columns), copy(rows * ReflectKernels::strip);
  const std::vector<int64_t> order = {0, 3, 4, 6, 1, 2, 5, 7, 8}, starts = {0, 4, 9};
  std::vector<float> own, spread, collect;
  for (int r = 0; r < rows; ++r)
    own.push_back(0.1f * float(r)), spread.push_back(1.0f / float(1 + r)), collect.push_back(0.7f - float(r));
  k.reflect.reflect({rows, columns, groups, x.data(), columns, out.data(), columns, order.data(), starts.data(),
                     own.data(), spread.data(), collect.data(), copy.data()});
  Checksum sum;
  sum.add(out), sum.print("reflect");
}

void check_packing() {
  Checksum sum;
  const std::vector<uint8_t> any = words<uint8_t>(1003);
  for (const int bits : {1, 2, 3, 4, 6})
    for (const int64_t count : {0, 1, 7, 64, 1003}) {
      std::vector<uint8_t> codes(any.begin(), any.begin() + count), packed(size_t(count * bits + 7) / 8), back(codes);
      const bool high_bits = k.packing.pack(codes.data(), packed.data(), count, bits);
      k.packing.unpack(packed.data(), back.data(), count, bits);
      sum.add(&high_bits, sizeof high_bits), sum.add(packed), sum.add(back);
    }
  sum.print("packing");
}

void check_binary() {
  constexpr int64_t rows = 9, columns = 21, depth = 333, count = (depth + 63) / 64;
  const auto signs = [](int64_t n) {
    std::vector<uint64_t> result(size_t(n * count));
    for (int64_t i = 0; i < n; ++i) k.lowmm.pack_signs(floats(depth).data(), result.data() + i * count, depth);
    return result;
  };
  const std::vector<uint64_t> a = signs(rows), b = signs(columns);
  std::vector<int32_t> out(rows * columns);
  const BinaryMm job = {a.data(), b.data(), out.data(), rows, columns, count, depth, columns, 1};
  const int64_t unit = k.lowmm.binary_unit, length = (count + unit - 1) / unit * unit + 1;
  std::vector<uint64_t> left(size_t(rows * length)), panel(size_t(k.lowmm.binary_panel * length));
  k.lowmm.pack_binary_rows(job, 0, rows, left.data());
  for (int64_t column = 0; column < columns; column += k.lowmm.binary_panel) {
    k.lowmm.pack_binary_panel(job, column, panel.data());
    k.lowmm.multiply_binary(job, 0, rows, left.data(), column, panel.data());
  }
  Checksum sum;
  sum.add(a), sum.add(out);
  sum.print("binary_mm");
}

void check_int8() {
  constexpr int64_t rows = 11, depth = 131, columns = 101, panels = (columns + int8_panel - 1) / int8_panel;
  const std::vector<int8_t> a = words<int8_t>(rows * depth), b = words<int8_t>(depth * columns);
  const std::vector<float> left_scale = tame_floats(rows), right_scale = tame_floats(panels * int8_panel);
  const int64_t part = 0, unit = k.int8.depth_unit, bytes = (depth + unit - 1) / unit * unit, pitch = bytes + 64;
  std::vector<int8_t> packed(size_t(panels * bytes * int8_panel));
  std::vector<int32_t> correction(size_t(panels * int8_panel));
  Int8Right right = {};
  right.source = {b.data(), columns, 1}, right.parts = &part, right.segment_count = right.part_count = 1;
  right.part_depth = right.part_codes = depth, right.steps = bytes / 4, right.columns = columns;
  right.packed = packed.data(), right.correction = correction.data();
  for (int64_t bundle = 0; bundle * int8_bundle < panels; ++bundle) k.int8.pack_right(right, bundle);
  std::vector<uint8_t> left(size_t(rows * pitch + int8_slack));
  k.int8.pack_left({a.data(), depth, 1}, rows, depth, left.data(), pitch);
  Checksum sum;
  for (const bool bfloat16 : {false, true}) {
    std::vector<float> out(rows * columns);  // half of it for bfloat16
    const Int8Rows group = {left.data(), 0, left_scale.data(), nullptr};
    Int8Product job = {};
    job.groups = &group, job.group_count = 1, job.rows = rows, job.left_row = pitch, job.segments = &part;
    job.segment_count = 1, job.steps = right.steps, job.right = packed.data(), job.panel_bytes = right.steps * 64;
    job.correction = correction.data(), job.columns = columns, job.first = job.last = true;
    job.out = out.data(), job.out_row = columns, job.bfloat16 = bfloat16, job.left_scale_step = 1;
    job.right_scale = job.bias = right_scale.data();
    k.int8.multiply(job);
    sum.add(out.data(), out.size() * sizeof(float));
  }
  sum.print("int8_matmul");
}

}  // namespace

int main() {
  check_uniform(), check_cast(), check_chunked(), check_transforms(), check_reflect();
  check_packing(), check_binary(), check_int8();
}

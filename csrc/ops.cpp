// The C++ kernels as PyTorch operators, through PyTorch's stable ABI: no Python header, one library for every Python.
//
// Schemas are declared in src/lowbit/ops/*.py; here are the CPU kernels, and two private operators that run a chosen
// instruction set, so that the tests reach every code path on one machine.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tables that this CPU can run, best first.
const std::vector<const lowbit::Kernels*>& available() {
  static const std::vector<const lowbit::Kernels*> tables = [] {
    std::vector<const lowbit::Kernels*> found;
#if defined(LOWBIT_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) found.push_back(&lowbit::avx512_kernels());
    if (__builtin_cpu_supports("avx2")) found.push_back(&lowbit::avx2_kernels());
#endif
    found.push_back(&lowbit::portable_kernels());
    return found;
  }();
  return tables;
}

const lowbit::Kernels& named(const std::string& isa) {
  for (const lowbit::Kernels* table : available())
    if (isa == table->name) return *table;
  STD_TORCH_CHECK(false, "no kernels for instruction set '", isa, "' on this CPU");
}

std::string isas() {
  std::string names;
  for (const lowbit::Kernels* table : available()) {
    if (!names.empty()) names += ' ';
    names += table->name;
  }
  return names;
}

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

lowbit::Minifloat minifloat(int64_t exponent, int64_t mantissa, int64_t bias) {
  STD_TORCH_CHECK(exponent >= 2 && exponent <= 8, "exponent must have 2 to 8 bits, got ", exponent);
  STD_TORCH_CHECK(mantissa >= 1 && mantissa <= 22, "mantissa must have 1 to 22 bits, got ", mantissa);
  const int64_t e_min = 1 - bias, e_max = (int64_t(1) << exponent) - 2 - bias;
  STD_TORCH_CHECK(bias >= 0 && bias <= 127 && e_max <= 127, "bias ", bias, " leaves the range of float32");
  lowbit::Minifloat f;
  f.largest = float(std::ldexp(2.0 - std::ldexp(1.0, int(-mantissa)), int(e_max)));
  f.lowest_bits = bits_of(float(std::ldexp(1.0, int(e_min))));
  f.magic_bits = int32_t(((23 - mantissa) << 23) + (1 << 22));
  f.mantissa = int32_t(mantissa);
  f.wide = mantissa > 21 || e_max - mantissa + 23 > 127;
  return f;
}

Tensor chunked_mm(const lowbit::Kernels& kernels, const Tensor& a, const Tensor& b, int64_t chunk, int64_t exponent,
                  int64_t mantissa, int64_t bias) {
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float && b.scalar_type() == ScalarType::Float,
                  "chunked_mm needs float32 operands");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "chunked_mm needs a (M, K) and b (K, N)");
  STD_TORCH_CHECK(chunk >= 1, "chunk must be at least 1, got ", chunk);
  const int64_t shape[2] = {a.size(0), b.size(1)};
  Tensor out = torch::stable::empty({shape, 2}, ScalarType::Float);
  lowbit::ChunkedMm job;
  job.format = minifloat(exponent, mantissa, bias);
  if (shape[0] == 0 || shape[1] == 0) return out;
  job.a = a.const_data_ptr<float>(), job.b = b.const_data_ptr<float>(), job.out = out.mutable_data_ptr<float>();
  job.rows = shape[0], job.depth = a.size(1), job.columns = shape[1];
  job.a_row = a.stride(0), job.a_depth = a.stride(1), job.b_depth = b.stride(0), job.b_column = b.stride(1);
  job.out_row = shape[1], job.out_column = 1;
  job.chunk = chunk;
  // vectors run along the columns: where there are few, compute the transposed product (a * b = b * a, bit for bit)
  if (job.columns < kernels.lanes && job.rows > job.columns) {
    std::swap(job.a, job.b);
    std::swap(job.rows, job.columns);
    std::swap(job.a_row, job.b_column);
    std::swap(job.a_depth, job.b_depth);
    std::swap(job.out_row, job.out_column);
  }
  // tasks: panels of columns, each cut into blocks of rows only as far as the threads need it, because every thread
  // that works on a panel packs it once
  const int64_t panels = (job.columns + kernels.panel_columns - 1) / kernels.panel_columns;
  const int64_t wanted = 4 * int64_t(torch::stable::get_num_threads());
  const int64_t cuts = std::max<int64_t>(1, std::min((wanted + panels - 1) / panels, job.rows / 32));
  const int64_t block = (job.rows + cuts - 1) / cuts;
  const int64_t cost = std::max<int64_t>(1, block * kernels.panel_columns * job.depth);  // multiply-adds of a task
  constexpr int64_t worth_a_thread = 1 << 16;                                            // about 10 microseconds
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / cost);
  torch::stable::parallel_for(0, panels * cuts, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> packed(size_t(job.depth * kernels.panel_columns));
    int64_t panel_in_place = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / cuts, row = task % cuts * block;
      const int64_t row_end = std::min(job.rows, row + block);
      if (row >= row_end) continue;
      if (panel != panel_in_place) kernels.pack_panel(job, panel * kernels.panel_columns, packed.data());
      panel_in_place = panel;
      kernels.chunked_mm(job, panel * kernels.panel_columns, row, row_end, packed.data());
    }
  });
  return out;
}

Tensor uniform(const lowbit::Kernels& kernels, const Tensor& key, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::Long && key.dim() == 1 && key.size(0) == 3,
                  "uniform needs a key of three int64: seed, stream, step");
  int64_t count = 1;
  for (int64_t n : shape) {
    STD_TORCH_CHECK(n >= 0, "uniform needs sizes of at least 0, got ", n);
    count *= n;
  }
  const int64_t* words = key.const_data_ptr<int64_t>();
  const int64_t seed = words[0], stream = words[key.stride(0)], step = words[2 * key.stride(0)];
  const uint32_t philox_key[2] = {uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32)};
  const uint32_t high[2] = {uint32_t(uint64_t(step)), uint32_t(uint64_t(stream))};
  Tensor out = torch::stable::empty({shape.data(), shape.size()}, ScalarType::Float);
  float* data = out.mutable_data_ptr<float>();
  const int64_t blocks = (count + 3) / 4;
  constexpr int64_t worth_a_thread = 1 << 13;  // blocks, about 20 microseconds
  torch::stable::parallel_for(0, blocks, worth_a_thread, [&](int64_t begin, int64_t end) {
    kernels.uniform(data, count, begin, end, philox_key, high);
  });
  return out;
}

Tensor chunked_mm_cpu(const Tensor& a, const Tensor& b, int64_t chunk, int64_t exponent, int64_t mantissa,
                      int64_t bias) {
  return chunked_mm(*available()[0], a, b, chunk, exponent, mantissa, bias);
}

Tensor chunked_mm_isa(const Tensor& a, const Tensor& b, int64_t chunk, int64_t exponent, int64_t mantissa,
                      int64_t bias, std::string isa) {
  return chunked_mm(named(isa), a, b, chunk, exponent, mantissa, bias);
}

Tensor uniform_cpu(const Tensor& key, std::vector<int64_t> shape) { return uniform(*available()[0], key, shape); }

Tensor uniform_isa(const Tensor& key, std::vector<int64_t> shape, std::string isa) {
  return uniform(named(isa), key, shape);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lowbit, m) {
  m.def("_isas() -> str");
  m.def("_chunked_mm_isa(Tensor a, Tensor b, int chunk, int exponent, int mantissa, int bias, str isa) -> Tensor");
  m.def("_uniform_isa(Tensor key, int[] shape, str isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lowbit, CompositeExplicitAutograd, m) { m.impl("_isas", TORCH_BOX(&isas)); }

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  m.impl("chunked_mm", TORCH_BOX(&chunked_mm_cpu));
  m.impl("uniform", TORCH_BOX(&uniform_cpu));
  m.impl("_chunked_mm_isa", TORCH_BOX(&chunked_mm_isa));
  m.impl("_uniform_isa", TORCH_BOX(&uniform_isa));
}

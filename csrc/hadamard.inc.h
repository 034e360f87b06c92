// lowbit::hadamard for one instruction set; needs `Vec`. The definition is in src/lowbit/ops/hadamard.py.
//
// The butterfly's strides go up: those below a vector's length are shuffles inside a vector, the others are additions
// of vectors, up to eight of which are held in registers for three strides at once.
#pragma once

#include <string.h>

namespace lowbit {
namespace {

// Lane i becomes v[i] + v[i ^ Stride] where bit `Stride` of i is clear, v[i ^ Stride] - v[i] where it is set.
template <int Stride>
inline Vec::F cross(Vec::F v) {
#if defined(__AVX512F__)
  __m512 partner;
  if constexpr (Stride == 1) partner = _mm512_permute_ps(v, 0xb1);
  if constexpr (Stride == 2) partner = _mm512_permute_ps(v, 0x4e);
  if constexpr (Stride == 4) partner = _mm512_shuffle_f32x4(v, v, 0xb1);
  if constexpr (Stride == 8) partner = _mm512_shuffle_f32x4(v, v, 0x4e);
  constexpr __mmask16 set[4] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00};
  constexpr int log = Stride == 1 ? 0 : Stride == 2 ? 1 : Stride == 4 ? 2 : 3;
  return _mm512_mask_sub_ps(_mm512_add_ps(v, partner), set[log], partner, v);
#elif defined(__AVX2__)
  __m256 partner;
  if constexpr (Stride == 1) partner = _mm256_permute_ps(v, 0xb1);
  if constexpr (Stride == 2) partner = _mm256_permute_ps(v, 0x4e);
  if constexpr (Stride == 4) partner = _mm256_permute2f128_ps(v, v, 1);
  constexpr int set = Stride == 1 ? 0xaa : Stride == 2 ? 0xcc : 0xf0;
  return _mm256_blend_ps(_mm256_add_ps(v, partner), _mm256_sub_ps(partner, v), set);
#else
  const Vec::F partner = Stride == 1 ? Vec::F{v[1], v[0], v[3], v[2]} : Vec::F{v[2], v[3], v[0], v[1]};
  const Vec::F plus = v + partner, minus = partner - v;
  return Stride == 1 ? Vec::F{plus[0], minus[1], plus[2], minus[3]} : Vec::F{plus[0], plus[1], minus[2], minus[3]};
#endif
}

// the strides 1, 2, ... Inner / 2, Inner at most a vector's length
template <int Inner>
inline Vec::F inside(Vec::F v) {
  if constexpr (Inner > 1) v = cross<1>(v);
  if constexpr (Inner > 2) v = cross<2>(v);
  if constexpr (Inner > 4) v = cross<4>(v);
  if constexpr (Inner > 8) v = cross<8>(v);
  return v;
}

// the strides 1, 2, ... Radix / 2, in vectors
template <int Radix>
inline void between(Vec::F v[Radix]) {
  for (int stride = 1; stride < Radix; stride *= 2)
    for (int i = 0; i < Radix; ++i)
      if (!(i & stride)) {
        const Vec::F a = v[i], b = v[i + stride];
        v[i] = Vec::add(a, b);
        v[i + stride] = Vec::sub(a, b);
      }
}

inline Vec::F finish(const Hadamard& job, Vec::F v, int64_t at) {
  v = Vec::mul(v, Vec::set(job.scale));
  if (job.after) v = Vec::mul(v, Vec::load(job.after + at));
  return Vec::nan_or(v, v);
}

// Radix vectors of a run, `stride` floats apart, from `at` on
template <int Radix, bool First, bool Last>
inline void pass(const Hadamard& job, int64_t at, int64_t stride) {
  Vec::F v[Radix];
  for (int i = 0; i < Radix; ++i) {
    v[i] = Vec::load((First ? job.x : job.out) + at + i * stride);
    if constexpr (First) {
      if (job.before) v[i] = Vec::mul(v[i], Vec::load(job.before + at + i * stride));
      v[i] = inside<int(Vec::lanes)>(v[i]);
    }
  }
  between<Radix>(v);
  for (int i = 0; i < Radix; ++i)
    Vec::store(job.out + at + i * stride, Last ? finish(job, v[i], at + i * stride) : v[i]);
}

template <int Radix, bool Last>
inline void later_pass(const Hadamard& job, int64_t begin, int64_t stride) {
  for (int64_t at = begin; at < begin + job.size; at += Radix * stride)
    for (int64_t i = 0; i < stride; i += Vec::lanes) pass<Radix, false, Last>(job, at + i, stride);
}

template <int Radix, bool Last>
inline void first_pass(const Hadamard& job, int64_t begin) {
  for (int64_t at = begin; at < begin + job.size; at += Radix * Vec::lanes)
    pass<Radix, true, Last>(job, at, Vec::lanes);
}

// runs of more than a vector
void long_runs(const Hadamard& job) {
  for (int64_t begin = 0; begin < job.count; begin += job.size) {
    int64_t stride = 8 * Vec::lanes;
    switch (job.size / Vec::lanes) {
      case 2: first_pass<2, true>(job, begin); continue;
      case 4: first_pass<4, true>(job, begin); continue;
      case 8: first_pass<8, true>(job, begin); continue;
      default: first_pass<8, false>(job, begin);
    }
    for (; job.size / stride > 8; stride *= 8) later_pass<8, false>(job, begin, stride);
    switch (job.size / stride) {
      case 2: later_pass<2, true>(job, begin, stride); break;
      case 4: later_pass<4, true>(job, begin, stride); break;
      default: later_pass<8, true>(job, begin, stride);
    }
  }
}

// runs of at most a vector: several in one
template <int Size>
void short_runs(const Hadamard& job) {
  int64_t at = 0;
  for (; at + Vec::lanes <= job.count; at += Vec::lanes) {
    Vec::F v = Vec::load(job.x + at);
    if (job.before) v = Vec::mul(v, Vec::load(job.before + at));
    Vec::store(job.out + at, finish(job, inside<Size>(v), at));
  }
  if (at < job.count) {
    float x[Vec::lanes] = {}, before[Vec::lanes] = {}, after[Vec::lanes] = {};
    const size_t left = size_t(job.count - at) * sizeof(float);
    memcpy(x, job.x + at, left);
    if (job.before) memcpy(before, job.before + at, left);
    if (job.after) memcpy(after, job.after + at, left);
    short_runs<Size>({x, x, Vec::lanes, Size, job.scale, job.before ? before : nullptr, job.after ? after : nullptr});
    memcpy(job.out + at, x, left);
  }
}

void hadamard(const Hadamard& job) {
  if (job.size > Vec::lanes) return long_runs(job);
  switch (job.size) {
    case 1: return short_runs<1>(job);
    case 2: return short_runs<2>(job);
    case 4: return short_runs<4>(job);
    case 8:
      if constexpr (Vec::lanes >= 8) return short_runs<8>(job);
      return;
    default:
      if constexpr (Vec::lanes >= 16) return short_runs<16>(job);
  }
}

constexpr HadamardKernels hadamard_kernels = {hadamard};

}  // namespace
}  // namespace lowbit

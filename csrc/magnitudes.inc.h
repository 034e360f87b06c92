// lowbit::magnitudes for one instruction set: plain loops that compilers turn into vectors. After rules.inc.h.
#pragma once

#include <string.h>

namespace lowbit {
namespace {

BlockMagnitudes magnitudes(const float* x, int64_t count) {
  double size[rule_chunk], square[rule_chunk];
  fetch_after(x, count);
  int32_t most = 0;  // |x| as an integer: NaN is larger than infinity
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= INT32_MAX;
    most = bits > most ? bits : most;
    size[i] = double(__builtin_fabsf(x[i]));
    square[i] = double(x[i]) * double(x[i]);
  }
  for (int64_t i = count; i < rule_chunk; ++i) size[i] = square[i] = 0.0;
  BlockMagnitudes result;
  memcpy(&result.most, &most, sizeof most);
  result.sum = rule_sum(size), result.squares = rule_sum(square);
  return result;
}

constexpr MagnitudesKernels magnitudes_kernels = {magnitudes};

}  // namespace
}  // namespace lowbit

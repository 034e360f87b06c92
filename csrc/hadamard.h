// lowbit::hadamard from outside; the definition is in src/lowbit/ops/hadamard.py.
#pragma once

#include <stdint.h>

namespace lowbit {

// Runs of `size` floats, `count` floats in all; `before` and `after` are `count` factors each, or null.
struct Hadamard {
  const float* x;
  float* out;
  int64_t count;
  int64_t size;  // a power of two, 1 to 4096
  float scale;
  const float* before;
  const float* after;
};

struct HadamardKernels {
  void (*transform)(const Hadamard&);
};

}  // namespace lowbit

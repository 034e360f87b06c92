// lowbit::magnitudes from outside; the definition is in src/lowbit/ops/magnitudes.py.
#pragma once

#include <stdint.h>

namespace lowbit {

struct BlockMagnitudes {
  float most;  // NaN where there is one
  double sum, squares;
};

struct MagnitudesKernels {
  BlockMagnitudes (*chunk)(const float* x, int64_t count);  // at most rule_chunk numbers
};

}  // namespace lowbit

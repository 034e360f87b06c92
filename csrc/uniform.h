// lowbit::uniform from outside; the definition is in src/lowbit/ops/uniform.py.
#pragma once

#include <stdint.h>

namespace lowbit {

struct UniformKernels {
  // uniforms of the Philox blocks [begin, end); block i fills out[4 i .. 4 i + 3], cut at `count`
  void (*fill)(float* out, int64_t count, int64_t begin, int64_t end, const uint32_t key[2], const uint32_t high[2]);
};

}  // namespace lowbit

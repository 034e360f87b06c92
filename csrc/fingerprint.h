// lowbit::fingerprint from outside; the definition is in src/lowbit/ops/fingerprint.py.
#pragma once

#include <stdint.h>

namespace lowbit {

constexpr int64_t fingerprint_lanes = 16;

struct FingerprintKernels {
  // sum of word * weight over the elements [begin, end) of `words`; begin is a multiple of the lanes
  uint64_t (*sum)(const uint32_t* words, int64_t begin, int64_t end, const uint32_t* start, const uint32_t* step);
};

}  // namespace lowbit

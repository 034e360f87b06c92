// lowbit::pack and lowbit::unpack from outside; the definitions are in src/lowbit/ops/pack.py.
#pragma once

#include <stdint.h>

namespace lowbit {

// Eight codes fill `bits` whole bytes, so ranges of codes that start at a multiple of eight are independent.
struct PackingKernels {
  // writes ceil(count * bits / 8) bytes; true if a code has higher bits than `bits`, which are dropped
  bool (*pack)(const uint8_t* codes, uint8_t* packed, int64_t count, int bits);
  void (*unpack)(const uint8_t* packed, uint8_t* codes, int64_t count, int bits);
};

}  // namespace lowbit

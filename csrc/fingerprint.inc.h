// lowbit::fingerprint for one instruction set; plain loops that compilers turn into vectors.
#pragma once

namespace lowbit {
namespace {

uint64_t fingerprint_sum(const uint32_t* words, int64_t begin, int64_t end, const uint32_t* start,
                         const uint32_t* step) {
  constexpr int64_t lanes = fingerprint_lanes;
  uint64_t total[lanes] = {};
  uint64_t weight[lanes];  // below 2^32; 64 bits wide, because GCC 12 gets the product of 32-bit ones wrong with AVX2
  for (int64_t l = 0; l < lanes; ++l) weight[l] = uint32_t(start[l] + uint32_t(begin / lanes) * step[l]);
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes) {
    for (int64_t l = 0; l < lanes; ++l) total[l] += uint64_t(words[i + l]) * weight[l];
    for (int64_t l = 0; l < lanes; ++l) weight[l] = uint32_t(weight[l] + step[l]);
  }
  for (int64_t l = 0; i < end && l < lanes; ++i, ++l) total[l] += uint64_t(words[i]) * weight[l];
  uint64_t sum = 0;
  for (int64_t l = 0; l < lanes; ++l) sum += total[l];
  return sum;
}

constexpr FingerprintKernels fingerprint_kernels = {fingerprint_sum};

}  // namespace
}  // namespace lowbit

// lowbit::fingerprint for one instruction set.
#pragma once

namespace lowbit {
namespace {

#if defined(LOWBIT_VECTOR_WORDS)
// The sum over whole groups of lanes: products of a vector's even words, and of its odd words.
uint64_t fingerprint_groups(const uint32_t* words, int64_t groups, const uint32_t* weight, const uint32_t* step) {
  using W = Vec::Words;
  constexpr int64_t wide = 2 * W::counters, vectors = fingerprint_lanes / wide;
  W factor[vectors], further[vectors], even[vectors], odd[vectors];
  for (int64_t v = 0; v < vectors; ++v) {
    factor[v] = W::load(weight + v * wide), further[v] = W::load(step + v * wide);
    even[v] = odd[v] = W::set(0);
  }
  for (; groups > 0; --groups)
    for (int64_t v = 0; v < vectors; ++v, words += wide) {
      const W x = W::load(words);
      even[v] = W::add(even[v], W::product(x, factor[v]));
      odd[v] = W::add(odd[v], W::product(W::high(x), W::high(factor[v])));
      factor[v] = W::add_halves(factor[v], further[v]);
    }
  uint64_t sum = 0;
  for (int64_t v = 0; v < vectors; ++v) {
    uint64_t parts[W::counters];
    W::add(even[v], odd[v]).store(parts);
    for (const uint64_t part : parts) sum += part;
  }
  return sum;
}
#endif

uint64_t fingerprint_sum(const uint32_t* words, int64_t begin, int64_t end, const uint32_t* start,
                         const uint32_t* step) {
  constexpr int64_t lanes = fingerprint_lanes;
  uint64_t sum = 0;
  int64_t i = begin;
#if defined(LOWBIT_VECTOR_WORDS)
  uint32_t first[lanes];
  for (int64_t l = 0; l < lanes; ++l) first[l] = start[l] + uint32_t(i / lanes) * step[l];
  sum += fingerprint_groups(words + i, (end - i) / lanes, first, step);
  i += (end - i) / lanes * lanes;
#endif
  uint64_t weight[lanes];  // below 2^32; 64 bits wide, because GCC 12 gets the product of 32-bit ones wrong with AVX2
  for (int64_t l = 0; l < lanes; ++l) weight[l] = uint32_t(start[l] + uint32_t(i / lanes) * step[l]);
  for (; i < end; i += lanes)
    for (int64_t l = 0; l < lanes && i + l < end; ++l) {
      sum += words[i + l] * weight[l];
      weight[l] = uint32_t(weight[l] + step[l]);
    }
  return sum;
}

constexpr FingerprintKernels fingerprint_kernels = {fingerprint_sum};

}  // namespace
}  // namespace lowbit

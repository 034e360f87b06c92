// lowbit::uniform: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// Block i has the counter (low32(i), high32(i), low32(step), low32(stream)) and the key (low32(seed), high32(seed)); its
// four output words are the elements 4 i ... 4 i + 3, each as (word >> 8) * 2^-24.
#pragma once

namespace lowbit {
namespace {

// multipliers and Weyl increments of the paper
constexpr uint32_t philox_m0 = 0xD2511F53u, philox_m1 = 0xCD9E8D57u;
constexpr uint32_t philox_w0 = 0x9E3779B9u, philox_w1 = 0xBB67AE85u;
constexpr int philox_rounds = 10;

void philox_block(uint64_t block, const uint32_t key[2], const uint32_t high[2], float out[4]) {
  uint32_t c[4] = {uint32_t(block), uint32_t(block >> 32), high[0], high[1]};
  uint32_t k0 = key[0], k1 = key[1];
  for (int r = 0; r < philox_rounds; ++r) {
    const uint64_t p0 = uint64_t(philox_m0) * c[0], p1 = uint64_t(philox_m1) * c[2];
    c[0] = uint32_t(p1 >> 32) ^ c[1] ^ k0;
    c[2] = uint32_t(p0 >> 32) ^ c[3] ^ k1;
    c[1] = uint32_t(p1);
    c[3] = uint32_t(p0);
    k0 += philox_w0;
    k1 += philox_w1;
  }
  for (int i = 0; i < 4; ++i) out[i] = float(c[i] >> 8) * 0x1p-24f;
}

#if defined(LOWBIT_VECTOR_WORDS)
// The keys of all rounds, in memory: there a vector instruction broadcasts them for free.
struct PhiloxKeys {
  uint64_t round[philox_rounds][2];
  explicit PhiloxKeys(const uint32_t key[2]) {
    uint32_t k0 = key[0], k1 = key[1];
    for (auto& k : round) {
      k[0] = k0, k[1] = k1;
      k0 += philox_w0, k1 += philox_w1;
    }
  }
};

// The words of some vectors of counters. A word lives in the low half of a 64-bit lane; what the high half holds does
// not matter, because the widening product reads the low half only. Several, because one alone waits for its products.
template <int Vectors>
struct PhiloxBatch {
  Vec::Words words[Vectors][4];

  PhiloxBatch(const Vec::Words (&first)[Vectors], const PhiloxKeys& keys, const uint32_t high[2]) {
    using W = Vec::Words;
    const W m0 = W::set(philox_m0), m1 = W::set(philox_m1), c2 = W::set(high[0]), c3 = W::set(high[1]);
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i)
      words[i][0] = first[i], words[i][1] = W::high(first[i]), words[i][2] = c2, words[i][3] = c3;
#pragma GCC unroll 10
    for (const auto& k : keys.round) {
#pragma GCC unroll 8
      for (auto& c : words) {
        const W p0 = W::product(c[0], m0), p1 = W::product(c[2], m1);
        c[0] = W::exclusive_or(W::high(p1), c[1], W::set(k[0]));
        c[2] = W::exclusive_or(W::high(p0), c[3], W::set(k[1]));
        c[1] = p1;
        c[3] = p0;
      }
    }
  }
};

constexpr int philox_few = 2, philox_many = Vec::Words::together;  // vectors: where little is left, and otherwise
template <int Vectors>
constexpr int64_t philox_blocks_in = Vectors * Vec::Words::counters;

// uniforms of the blocks from `block` on
template <int Vectors>
inline void philox_blocks(uint64_t block, const PhiloxKeys& keys, const uint32_t high[2], float* out) {
  using W = Vec::Words;
  W first[Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Vectors; ++i) first[i] = W::range(block + uint64_t(i) * W::counters);
  const PhiloxBatch<Vectors> batch(first, keys, high);
#pragma GCC unroll 8
  for (int i = 0; i < Vectors; ++i) {
    const auto& w = batch.words[i];
    W::store_uniform(out + 4 * W::counters * i, w[0], w[1], w[2], w[3]);
  }
}
#endif

void uniform(float* out, int64_t count, int64_t begin, int64_t end, const uint32_t key[2], const uint32_t high[2]) {
  int64_t block = begin;
  const int64_t whole = end < count / 4 ? end : count / 4;
#if defined(LOWBIT_VECTOR_WORDS)
  const PhiloxKeys keys(key);
  constexpr int64_t many = philox_blocks_in<philox_many>, few = philox_blocks_in<philox_few>;
  for (; block + many <= whole; block += many) philox_blocks<philox_many>(uint64_t(block), keys, high, out + 4 * block);
  for (; block + few <= whole; block += few) philox_blocks<philox_few>(uint64_t(block), keys, high, out + 4 * block);
#endif
  for (; block < whole; ++block) philox_block(uint64_t(block), key, high, out + 4 * block);
  for (; block < end; ++block) {
    float last[4];
    philox_block(uint64_t(block), key, high, last);
    for (int64_t i = 0; i < 4 && 4 * block + i < count; ++i) out[4 * block + i] = last[i];
  }
}

constexpr UniformKernels uniform_kernels = {uniform};

}  // namespace
}  // namespace lowbit

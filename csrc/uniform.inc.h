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

constexpr float uniform_unit = 0x1p-24f;

// the four uniforms of a block, in units of `uniform_unit`
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
  for (int i = 0; i < 4; ++i) out[i] = float(c[i] >> 8);
}

#if defined(LOWBIT_VECTOR_WORDS)
// What the counters of a draw share, in memory: there a vector instruction broadcasts it for free.
struct PhiloxKeys {
  uint64_t word;  // the high word of all counters
  uint64_t round[philox_rounds][2];
  uint64_t start[4];  // see PhiloxBatch

  PhiloxKeys(const uint32_t key[2], const uint32_t high[2], uint64_t block) : word(block >> 32) {
    uint32_t k0 = key[0], k1 = key[1];
    for (auto& k : round) {
      k[0] = k0, k[1] = k1;
      k0 += philox_w0, k1 += philox_w1;
    }
    const uint64_t p1 = uint64_t(philox_m1) * high[0];
    const uint64_t p0 = uint64_t(philox_m0) * uint32_t((p1 >> 32) ^ word ^ round[0][0]);
    start[0] = high[1] ^ round[0][1];
    start[1] = uint32_t(p1) ^ round[1][0];
    start[2] = (p0 >> 32) ^ round[1][1];
    start[3] = uint32_t(p0) ^ round[2][1];
  }
};

// The words of some vectors of counters that differ in their low words only: half of the first two rounds is the same for
// all. A word lives in the low half of a 64-bit lane; what the high half holds does not matter, because the widening
// product reads the low half only. The last round puts words 0 and 1 into one lane, and words 2 and 3. Several vectors,
// because one alone waits for its products.
template <int Vectors>
struct PhiloxBatch {
  Vec::Words pairs[Vectors][2];

  PhiloxBatch(const Vec::Words (&first)[Vectors], const PhiloxKeys& keys) {
    using W = Vec::Words;
    const W m0 = W::set(philox_m0), m1 = W::set(philox_m1);
    const auto start = [&keys](int i) { return W::set(keys.start[i]); };
    W words[Vectors][4];
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) {  // rounds 0 and 1
      const W p0 = W::product(first[i], m0), p1 = W::product(W::exclusive_or(W::high(p0), start(0)), m1);
      words[i][0] = W::exclusive_or(W::high(p1), start(1));
      words[i][1] = p1;
      words[i][2] = W::exclusive_or(p0, start(2));
    }
#pragma GCC unroll 10
    for (int r = 2; r < philox_rounds; ++r) {
      const W k0 = W::set(keys.round[r][0]), k1 = W::set(keys.round[r][1]);
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) {
        auto& c = words[i];
        const W p0 = W::product(c[0], m0), p1 = W::product(c[2], m1);
        if (r == philox_rounds - 1) {
          pairs[i][0] = W::pair(p1, c[1], k0), pairs[i][1] = W::pair(p0, c[3], k1);
        } else {
          c[0] = W::exclusive_or(W::high(p1), c[1], k0);
          c[2] = r == 2 ? W::exclusive_or(W::high(p0), start(3)) : W::exclusive_or(W::high(p0), c[3], k1);
          c[1] = p1;
          c[3] = p0;
        }
      }
    }
  }
};

constexpr int philox_few = 2, philox_many = Vec::Words::together;  // vectors: where little is left, and otherwise
template <int Vectors>
constexpr int64_t philox_blocks_in = Vectors * Vec::Words::counters;
#endif

// The uniforms of one block after another: in units of `uniform_unit`, or as they are.
template <bool units>
struct PhiloxSequence {
  const uint32_t *key, *high;
  uint64_t block;
#if defined(LOWBIT_VECTOR_WORDS)
  PhiloxKeys keys;

  PhiloxSequence(const uint32_t k[2], const uint32_t h[2], uint64_t first)
      : key(k), high(h), block(first), keys(k, h, first) {}

  template <int Vectors>
  void next(float* out) {
    using W = Vec::Words;
    constexpr int64_t count = philox_blocks_in<Vectors>;
    if ((block + count - 1) >> 32 != keys.word) {
      for (int64_t i = 0; i < count; ++i) one(out + 4 * i);
      keys = PhiloxKeys(key, high, block);
      return;
    }
    W first[Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) first[i] = W::range(block + uint64_t(i) * W::counters);
    const PhiloxBatch<Vectors> batch(first, keys);
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i)
      W::store_top<units>(out + 4 * W::counters * i, batch.pairs[i][0], batch.pairs[i][1]);
    block += count;
  }
#else
  PhiloxSequence(const uint32_t k[2], const uint32_t h[2], uint64_t first) : key(k), high(h), block(first) {}
#endif

  void one(float* out) {
    philox_block(block++, key, high, out);
    for (int i = 0; i < 4 && !units; ++i) out[i] *= uniform_unit;
  }
};

void uniform(float* out, int64_t count, int64_t begin, int64_t end, const uint32_t key[2], const uint32_t high[2]) {
  const int64_t whole = end < count / 4 ? end : count / 4;
  PhiloxSequence<false> blocks(key, high, uint64_t(begin));
  const auto block = [&blocks] { return int64_t(blocks.block); };
#if defined(LOWBIT_VECTOR_WORDS)
  constexpr int64_t many = philox_blocks_in<philox_many>, few = philox_blocks_in<philox_few>;
  while (block() + many <= whole) blocks.next<philox_many>(out + 4 * block());
  while (block() + few <= whole) blocks.next<philox_few>(out + 4 * block());
#endif
  while (block() < whole) blocks.one(out + 4 * block());
  while (block() < end) {
    float last[4];
    const int64_t at = 4 * block();
    blocks.one(last);
    for (int64_t i = 0; i < 4 && at + i < count; ++i) out[at + i] = last[i];
  }
}

constexpr UniformKernels uniform_kernels = {uniform};

}  // namespace
}  // namespace lowbit

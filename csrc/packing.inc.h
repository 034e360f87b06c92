// lowbit::pack and lowbit::unpack for one instruction set; the definitions are in src/lowbit/ops/pack.py.
//
// Eight codes, one per byte of a 64-bit word, move together in three steps: pairs, pairs of pairs, halves. The steps
// are the same on a vector of words.
#pragma once

#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

// the low `width` bits of every field of `stride` bits
constexpr uint64_t fields(int width, int stride) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += stride) mask |= (width < 64 ? (uint64_t(1) << width) - 1 : ~uint64_t(0)) << at;
  return mask;
}

// Every field of 2 * Stride bits holds two parts of Width bits, `Stride` apart: bring them together, and apart again.
template <int Width, int Stride, class Word>
inline Word join(Word w) {
  constexpr uint64_t low = fields(Width, 2 * Stride);
  return (w & low) | ((w >> (Stride - Width)) & (low << Width));
}
template <int Width, int Stride, class Word>
inline Word part(Word w) {
  constexpr uint64_t low = fields(Width, 2 * Stride);
  return (w & low) | ((w & (low << Width)) << (Stride - Width));
}

template <int Bits, class Word>
inline Word compress(Word w) {
  return join<4 * Bits, 32>(join<2 * Bits, 16>(join<Bits, 8>(w)));
}
template <int Bits, class Word>
inline Word expand(Word w) {
  return part<Bits, 8>(part<2 * Bits, 16>(part<4 * Bits, 32>(w)));
}

#if defined(__AVX2__)
typedef uint64_t Words4 __attribute__((vector_size(32)));
#endif
#if defined(__AVX512VBMI__)
typedef uint64_t Words8 __attribute__((vector_size(64)));

// byte i of the packed stream of eight words that hold `bits` bytes each, and the other way round; 64 reads zero
struct ByteOrder {
  uint8_t gather[64], scatter[64];
  constexpr explicit ByteOrder(int bits) : gather(), scatter() {
    for (int i = 0; i < 8 * bits; ++i) gather[i] = uint8_t(i / bits * 8 + i % bits);
    for (int i = 0; i < 64; ++i) scatter[i] = uint8_t(i / 8 * bits + i % 8 % bits);
  }
};
#endif

template <int Bits>
bool pack(const uint8_t* codes, uint8_t* packed, int64_t count) {
  constexpr uint64_t above = ~fields(Bits, 8);
  uint64_t misfit = 0;
  int64_t i = 0;
#if defined(__AVX512VBMI__)
  static constexpr ByteOrder order(Bits);
  const __m512i gather = _mm512_loadu_si512(order.gather), high = _mm512_set1_epi64((long long)above);
  __mmask64 wrong = 0;
  for (; i + 64 <= count; i += 64, packed += 8 * Bits) {
    const __m512i w = _mm512_loadu_si512(codes + i);
    wrong |= _mm512_test_epi8_mask(w, high);
    if constexpr (Bits == 1) {
      const uint64_t bits = _mm512_test_epi8_mask(w, _mm512_set1_epi8(1));
      memcpy(packed, &bits, 8);
    } else {
      const __m512i joined = _mm512_permutexvar_epi8(gather, (__m512i)compress<Bits>((Words8)w));
      _mm512_mask_storeu_epi8(packed, (uint64_t(1) << (8 * Bits)) - 1, joined);
    }
  }
  misfit |= wrong;
#elif defined(__AVX2__)
  __m256i wrong = _mm256_setzero_si256();
  const __m256i high = _mm256_set1_epi64x((long long)above);
  if constexpr (Bits == 1) {
    for (; i + 32 <= count; i += 32, packed += 4) {
      const __m256i w = _mm256_loadu_si256((const __m256i*)(codes + i));
      wrong = _mm256_or_si256(wrong, _mm256_and_si256(w, high));
      const uint32_t bits = uint32_t(_mm256_movemask_epi8(_mm256_slli_epi16(w, 7)));
      memcpy(packed, &bits, 4);
    }
  } else {
    constexpr auto byte = [](int j) { return char(j < Bits ? j : j < 2 * Bits ? j - Bits + 8 : 0x80); };
    const __m256i gather = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(byte(0), byte(1), byte(2), byte(3), byte(4), byte(5), byte(6), byte(7), byte(8), byte(9),
                      byte(10), byte(11), byte(12), byte(13), byte(14), byte(15)));
    // a store of 16 bytes must not leave the range, which ends beside another thread's
    for (; (count - i) / 8 * Bits >= 2 * Bits + 16 && count - i >= 32; i += 32, packed += 4 * Bits) {
      const __m256i w = _mm256_loadu_si256((const __m256i*)(codes + i));
      wrong = _mm256_or_si256(wrong, _mm256_and_si256(w, high));
      const __m256i joined = _mm256_shuffle_epi8((__m256i)compress<Bits>((Words4)w), gather);
      _mm_storeu_si128((__m128i*)packed, _mm256_castsi256_si128(joined));
      _mm_storeu_si128((__m128i*)(packed + 2 * Bits), _mm256_extracti128_si256(joined, 1));
    }
  }
  misfit |= !_mm256_testz_si256(wrong, wrong);
#endif
  for (; i + 8 <= count; i += 8, packed += Bits) {
    uint64_t w;
    memcpy(&w, codes + i, 8);
    misfit |= w & above;
    w = compress<Bits>(w);
    memcpy(packed, &w, Bits);
  }
  if (i < count) {
    uint64_t w = 0;
    memcpy(&w, codes + i, size_t(count - i));
    misfit |= w & above;
    w = compress<Bits>(w);
    memcpy(packed, &w, size_t((count - i) * Bits + 7) / 8);
  }
  return misfit != 0;
}

template <int Bits>
void unpack(const uint8_t* packed, uint8_t* codes, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512VBMI__)
  static constexpr ByteOrder order(Bits);
  const __m512i scatter = _mm512_loadu_si512(order.scatter), low = _mm512_set1_epi8((1 << Bits) - 1);
  const __m512i shift =  // byte j of a word starts at its bit j * Bits
      _mm512_set1_epi64((long long)(0x0706050403020100u * uint64_t(Bits)));
  for (; i + 64 <= count; i += 64, packed += 8 * Bits) {
    const __m512i bytes = _mm512_maskz_loadu_epi8((uint64_t(1) << (8 * Bits)) - 1, packed);
    const __m512i w = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(scatter, bytes));
    _mm512_storeu_si512(codes + i, _mm512_and_si512(w, low));
  }
#elif defined(__AVX2__)
  constexpr auto byte = [](int j) { return char(j % 8 < Bits ? j / 8 * Bits + j % 8 : 0x80); };
  const __m256i scatter = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(byte(0), byte(1), byte(2), byte(3), byte(4), byte(5), byte(6), byte(7), byte(8), byte(9), byte(10),
                    byte(11), byte(12), byte(13), byte(14), byte(15)));
  // a load of 16 bytes must not leave the packed codes
  for (; (count - i) / 8 * Bits >= 2 * Bits + 16 && count - i >= 32; i += 32, packed += 4 * Bits) {
    const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)packed)),
                                                  _mm_loadu_si128((const __m128i*)(packed + 2 * Bits)), 1);
    _mm256_storeu_si256((__m256i*)(codes + i), (__m256i)expand<Bits>((Words4)_mm256_shuffle_epi8(bytes, scatter)));
  }
#endif
  for (; i + 8 <= count; i += 8, packed += Bits) {
    uint64_t w = 0;
    memcpy(&w, packed, Bits);
    w = expand<Bits>(w);
    memcpy(codes + i, &w, 8);
  }
  if (i < count) {
    uint64_t w = 0;
    memcpy(&w, packed, size_t((count - i) * Bits + 7) / 8);
    w = expand<Bits>(w);
    memcpy(codes + i, &w, size_t(count - i));
  }
}

bool pack_any(const uint8_t* codes, uint8_t* packed, int64_t count, int bits) {
  switch (bits) {
    case 1: return pack<1>(codes, packed, count);
    case 2: return pack<2>(codes, packed, count);
    case 3: return pack<3>(codes, packed, count);
    case 4: return pack<4>(codes, packed, count);
    default: return pack<6>(codes, packed, count);
  }
}

void unpack_any(const uint8_t* packed, uint8_t* codes, int64_t count, int bits) {
  switch (bits) {
    case 1: return unpack<1>(packed, codes, count);
    case 2: return unpack<2>(packed, codes, count);
    case 3: return unpack<3>(packed, codes, count);
    case 4: return unpack<4>(packed, codes, count);
    default: return unpack<6>(packed, codes, count);
  }
}

constexpr PackingKernels packing_kernels = {pack_any, unpack_any};

}  // namespace
}  // namespace lowbit

// Depthwise int8 convolutions for one instruction set: nothing is shared between channels, so vectors run along them.
#pragma once

namespace lowbit {
namespace {

// int32 words of 16 channels
struct Channels {
#if defined(__AVX512F__)
  __m512i words;
  static Channels zero() { return {_mm512_setzero_si512()}; }
  static Channels load(const void* words) { return {_mm512_loadu_si512(words)}; }
  static Channels widen(const uint8_t* codes) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes))};
  }
  // a word is two 16-bit numbers, the upper one its sign: without b's, the sum of two products is the one that counts
  Channels lower() const { return {_mm512_and_si512(words, _mm512_set1_epi32(0xffff))}; }
  void add(const Channels& a, const Channels& lower_b) {
#if defined(__AVX512VNNI__)
    words = _mm512_dpwssd_epi32(words, a.words, lower_b.words);
#else
    words = _mm512_add_epi32(words, _mm512_madd_epi16(a.words, lower_b.words));
#endif
  }
  void store(int32_t* out) const { _mm512_storeu_si512(out, words); }
#else
  int32_t words[16];
  static Channels zero() { return {}; }
  static Channels load(const void* words) {
    Channels v;
    memcpy(v.words, words, sizeof v.words);
    return v;
  }
  static Channels widen(const uint8_t* codes) {
    Channels v;
    for (int j = 0; j < 16; ++j) v.words[j] = int8_t(codes[j]);
    return v;
  }
  Channels lower() const { return *this; }
  void add(const Channels& a, const Channels& b) {
    for (int j = 0; j < 16; ++j) words[j] += a.words[j] * b.words[j];
  }
  void store(int32_t* out) const { memcpy(out, words, sizeof words); }
#endif
};

void multiply_depthwise(const Int8Product& job) {
  for (int64_t column = 0; column < job.columns; column += int8_panel) {
    const int8_t* const weights = job.right + column / int8_panel * job.panel_bytes;
    for (int64_t g = 0; g < job.group_count; ++g) {
      const Int8Rows& group = job.groups[g];
      for (int64_t r = 0; r < job.rows; ++r) {
        const uint8_t* const left = group.left + r * job.left_row + column;
        Channels sum = Channels::zero();
        for (int64_t s = 0; s < job.segment_count; ++s)
          sum.add(Channels::widen(left + job.segments[s]), Channels::load(weights + s * 64).lower());
        int32_t line[int8_panel];
        sum.store(line);
        Vec::F real[panel_sums];
        for (int v = 0; v < panel_sums; ++v) real[v] = Dot::real(Dot::load_sums(line + v * Dot::lanes));
        finish(job, group.out + r * job.out_row + column, group.left_scale[r * job.left_scale_step], column, real);
      }
    }
  }
}

void depthwise_grad_w(const Int8DepthwiseGradW& job) {
  const int64_t padded = (job.channels + int8_panel - 1) / int8_panel * int8_panel;
  for (int64_t channel = 0; channel < padded; channel += int8_panel)
    for (int64_t t = 0; t < job.tap_count; ++t)
      for (int64_t y = 0; y < job.rows; ++y) {
        const uint8_t* left = job.left + y * job.left_line + job.taps[t] + channel;
        const uint8_t* error = job.error + y * job.width * job.channels + channel;
        for (int64_t begin = 0; begin < job.width;) {
          const int64_t end = job.width - begin > int8_safe ? begin + int8_safe : job.width;
          Channels sums[4] = {Channels::zero(), Channels::zero(), Channels::zero(), Channels::zero()};  // independent
          int64_t x = begin;
          for (; x + 4 <= end; x += 4)
            for (int i = 0; i < 4; ++i, left += job.left_row, error += job.channels)
              sums[i].add(Channels::widen(left), Channels::widen(error).lower());
          for (; x < end; ++x, left += job.left_row, error += job.channels)
            sums[0].add(Channels::widen(left), Channels::widen(error).lower());
          int32_t lines[4][int8_panel];
          for (int i = 0; i < 4; ++i) sums[i].store(lines[i]);
          int64_t* const total = job.sums + t * padded + channel;
          for (int64_t j = 0; j < int8_panel; ++j) total[j] += lines[0][j] + lines[1][j] + lines[2][j] + lines[3][j];
          begin = end;
        }
      }
}

}  // namespace
}  // namespace lowbit

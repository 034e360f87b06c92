// The backward passes of gradient rules for one instruction set; the definitions are in src/lowbit/ops/rules.py.
//
// Plain loops that compilers turn into vectors: the time goes into reading the tensors.
#pragma once

namespace lowbit {
namespace {

template <bool Closed>
void rule_in_range(const RuleJob& job) {
  const float* grad = job.grad;
  const float* x = job.x;
  float* out = job.out;
  const float low = job.low, high = job.high;
  for (int64_t i = 0; i < job.count; ++i) {
    const bool inside = Closed ? (x[i] >= low) & (x[i] <= high) : (x[i] > low) & (x[i] < high);
    out[i] = grad[i] * (inside ? 1.0f : 0.0f);
  }
}

// the sum of rule_chunk terms, by halves
inline double rule_sum(double* term) {
  for (int64_t half = rule_chunk / 2; half >= 8; half /= 2)
    for (int64_t i = 0; i < half; ++i) term[i] += term[i + half];
  for (int64_t half = 4; half >= 1; half /= 2)
    for (int64_t i = 0; i < half; ++i) term[i] += term[i + half];
  return term[0];
}

// |x| < 2^22 to the nearest integer, ties to even; a zero comes out as +0
inline float rule_round(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

double rule_step(const RuleJob& job) {
  const float* grad = job.grad;
  const float* x = job.x;
  const float* q = job.q;
  float* out = job.out;
  const float low = job.low, high = job.high, step = job.scale;
  double term[rule_chunk];
  for (int64_t i = 0; i < job.count; ++i) {
    const float z = x[i] / step;
    float grid = q[i] / step;
    grid = grid < low ? low : grid;
    grid = grid > high ? high : grid;
    grid = rule_round(grid);
    const bool inside = (z > low) & (z < high);
    const float slope = inside ? grid - z : grid;
    out[i] = grad[i] * (inside ? 1.0f : 0.0f);
    term[i] = double(grad[i] * slope);
  }
  for (int64_t i = job.count; i < rule_chunk; ++i) term[i] = 0.0;
  return rule_sum(term);
}

double rule_clip(const RuleJob& job) {
  const float* grad = job.grad;
  const float* x = job.x;
  float* out = job.out;
  const float clip = job.scale;
  double term[rule_chunk];
  for (int64_t i = 0; i < job.count; ++i) {
    const bool above = x[i] >= clip, positive = x[i] >= 0.0f;
    out[i] = grad[i] * ((positive & !above) ? 1.0f : 0.0f);
    term[i] = double(grad[i] * (above ? 1.0f : 0.0f));
  }
  for (int64_t i = job.count; i < rule_chunk; ++i) term[i] = 0.0;
  return rule_sum(term);
}

constexpr RulesKernels rules_kernels = {rule_in_range<true>, rule_in_range<false>, rule_step, rule_clip};

}  // namespace
}  // namespace lowbit

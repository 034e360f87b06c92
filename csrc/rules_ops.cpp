// The backward passes of gradient rules as PyTorch operators.
#include "library.h"

#include "halves.h"

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

namespace {

using lowbit::rule_chunk;
using lowbit::RuleJob;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_matrix(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.size(0) == like.size(0) &&
                      t.size(1) == like.size(1) && t.is_contiguous(),
                  name, " must be a contiguous float32 matrix (blocks, n) like grad");
}

const float* per_block(const Tensor& t, const Tensor& grad, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == grad.size(0) &&
                      t.is_contiguous(),
                  name, " must be contiguous float32 (blocks,)");
  return t.const_data_ptr<float>();
}

// the chunks of all blocks: run(job, chunk's number, block)
template <class Run>
void for_each_chunk(const Tensor& grad, const Tensor& x, const Tensor* q, Tensor& out, Run run) {
  const int64_t n = grad.size(1), chunks = (n + rule_chunk - 1) / rule_chunk;
  const float* from_grad = grad.const_data_ptr<float>();
  const float* from_x = x.const_data_ptr<float>();
  const float* from_q = q == nullptr ? nullptr : q->const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  constexpr int64_t worth_a_thread = 16;  // chunks, about 10 microseconds
  torch::stable::parallel_for(0, grad.size(0) * chunks, worth_a_thread, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / chunks, first = task % chunks * rule_chunk, at = block * n + first;
      RuleJob job = {from_grad + at, from_x + at, nullptr, to + at, std::min(rule_chunk, n - first), 0, 0, 0};
      if (from_q != nullptr) job.q = from_q + at;
      run(job, task, block);
    }
  });
}

// the sums of the blocks: the totals of their chunks by halves
Tensor sums(std::vector<double>& totals, int64_t blocks) {
  const int64_t shape[1] = {blocks};
  Tensor out = lowbit::empty({shape, 1}, ScalarType::Float);
  float* to = out.mutable_data_ptr<float>();
  const int64_t chunks = blocks == 0 ? 0 : int64_t(totals.size()) / blocks;
  for (int64_t block = 0; block < blocks; ++block)
    to[block] = float(lowbit::by_halves(totals.data() + block * chunks, chunks));
  return out;
}

std::vector<double> room(const Tensor& grad) {
  return std::vector<double>(size_t(grad.size(0) * ((grad.size(1) + rule_chunk - 1) / rule_chunk)));
}

Tensor in_range_backward(const Tensor& grad, const Tensor& x, const Tensor& low, const Tensor& high, bool closed) {
  const lowbit::RulesKernels& kernels = lowbit::kernels().rules;
  check_matrix(grad, grad, "grad");
  check_matrix(x, grad, "x");
  const float* lows = per_block(low, grad, "low");
  const float* highs = per_block(high, grad, "high");
  Tensor out = lowbit::empty(grad.sizes(), ScalarType::Float);
  const auto kernel = closed ? kernels.in_range_closed : kernels.in_range_open;
  for_each_chunk(grad, x, nullptr, out, [&](RuleJob& job, int64_t, int64_t block) {
    job.low = lows[block], job.high = highs[block];
    kernel(job);
  });
  return out;
}

std::tuple<Tensor, Tensor> step_backward(const Tensor& grad, const Tensor& x, const Tensor& q, const Tensor& step,
                                         double low, double high) {
  const lowbit::RulesKernels& kernels = lowbit::kernels().rules;
  check_matrix(grad, grad, "grad");
  check_matrix(x, grad, "x");
  check_matrix(q, grad, "q");
  const float* steps = per_block(step, grad, "step");
  Tensor out = lowbit::empty(grad.sizes(), ScalarType::Float);
  std::vector<double> totals = room(grad);
  for_each_chunk(grad, x, &q, out, [&](RuleJob& job, int64_t chunk, int64_t block) {
    job.low = float(low), job.high = float(high), job.scale = steps[block];
    totals[size_t(chunk)] = kernels.step(job);
  });
  return {out, sums(totals, grad.size(0))};
}

std::tuple<Tensor, Tensor> clip_backward(const Tensor& grad, const Tensor& x, const Tensor& clip) {
  const lowbit::RulesKernels& kernels = lowbit::kernels().rules;
  check_matrix(grad, grad, "grad");
  check_matrix(x, grad, "x");
  const float* clips = per_block(clip, grad, "clip");
  Tensor out = lowbit::empty(grad.sizes(), ScalarType::Float);
  std::vector<double> totals = room(grad);
  for_each_chunk(grad, x, nullptr, out, [&](RuleJob& job, int64_t chunk, int64_t block) {
    job.scale = clips[block];
    totals[size_t(chunk)] = kernels.clip(job);
  });
  return {out, sums(totals, grad.size(0))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  m.impl("in_range_backward", TORCH_BOX(&in_range_backward));
  m.impl("step_backward", TORCH_BOX(&step_backward));
  m.impl("clip_backward", TORCH_BOX(&clip_backward));
}

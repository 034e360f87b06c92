// The backward passes of gradient rules from outside; the definitions are in src/lowbit/ops/rules.py.
#pragma once

#include <stdint.h>

namespace lowbit {

// Some elements of one block; at most rule_chunk of them where there is a sum.
struct RuleJob {
  const float* grad;
  const float* x;
  const float* q;  // of `step` only
  float* out;
  int64_t count;
  float low, high;
  float scale;  // step or clip
};

constexpr int64_t rule_chunk = 1024;

struct RulesKernels {
  void (*in_range_closed)(const RuleJob&);
  void (*in_range_open)(const RuleJob&);
  double (*step)(const RuleJob&);
  double (*clip)(const RuleJob&);
};

}  // namespace lowbit

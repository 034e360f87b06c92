// lowbit::reflect from outside; the definition is in src/lowbit/ops/reflect.py.
#pragma once

#include <stdint.h>

namespace lowbit {

// Some columns of all rows: out = own * x - spread * (the sum of collect * x over the rows of the group).
struct ReflectTile {
  int64_t rows, columns, groups;
  const float* x;
  int64_t x_row;
  float* out;  // may be x
  int64_t out_row;
  const int64_t *order, *starts;           // the rows of group g, ascending, are order[starts[g]] to order[starts[g + 1]]
  const float *own, *spread, *collect;     // of each row
  float* copy;                             // rows * strip, scratch
};

struct ReflectKernels {
  static constexpr int64_t strip = 128;  // columns at a time
  void (*reflect)(const ReflectTile&);
};

}  // namespace lowbit

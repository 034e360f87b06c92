// lowbit::reflect from outside; the definition is in src/lowbit/ops/reflect.py.
#pragma once

#include <stdint.h>

namespace lowbit {

// Some columns of all rows: out = own * x - spread * (the sum of collect * x over the rows of the group).
struct ReflectTile {
  int64_t rows, columns, groups;
  const float* x;
  int64_t x_row;
  float* out;
  int64_t out_row;
  const int64_t* group;                    // of each row, as the next three
  const double *own, *spread, *collect;
  double* totals;  // groups * columns, scratch
  float* copy;     // rows * columns, scratch: rows that are a power of two apart don't stay in a cache
};

struct ReflectKernels {
  void (*reflect)(const ReflectTile&);
};

}  // namespace lowbit

// The sum of the totals of chunks, in an order that does not depend on threads. For the files of operators only.
#pragma once

#include <cstdint>

namespace lowbit {

// The second half is added to the first until one number is left; overwrites `t`.
inline double by_halves(double* t, int64_t count) {
  for (int64_t left = count; left > 1;) {
    const int64_t half = (left + 1) / 2;
    for (int64_t i = 0; i < half; ++i) t[i] += i + half < left ? t[i + half] : 0.0;
    left = half;
  }
  return count == 0 ? 0.0 : t[0];
}

}  // namespace lowbit

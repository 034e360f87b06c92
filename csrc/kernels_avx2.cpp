// The kernels for avx2; setup.py compiles this file, and only this one, with its flags.
#include "kernels.h"

#if defined(LOWBIT_X86)
#define LOWBIT_VECTOR_WORDS 1
#include "vec_avx2.h"

#include "table.inc.h"

namespace lowbit {

const Kernels& avx2_kernels() {
  static constexpr Kernels table = make_table("avx2");
  return table;
}

}  // namespace lowbit
#endif

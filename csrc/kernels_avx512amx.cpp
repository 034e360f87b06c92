// The kernels for avx512amx; setup.py compiles this file, and only this one, with its flags.
#include "kernels.h"

#if defined(LOWBIT_X86)
#define LOWBIT_VECTOR_WORDS 1
#include "vec_avx512.h"

#include "table.inc.h"

namespace lowbit {

const Kernels& avx512amx_kernels() {
  static constexpr Kernels table = make_table("avx512amx");
  return table;
}

}  // namespace lowbit
#endif

// The kernels for avx512; setup.py compiles this file, and only this one, with its flags.
#include "kernels.h"

#if defined(LOWBIT_X86)
#define LOWBIT_VECTOR_WORDS 1
#include "vec_avx512.h"

#include "chunked_mm.inc.h"
#include "uniform.inc.h"
#endif

namespace lowbit {

#if defined(LOWBIT_X86)
const Kernels& avx512_kernels() {
  static constexpr Kernels table = {Vec::name, Vec::lanes, panel_columns, pack_panel, chunked_mm, uniform};
  return table;
}
#endif

}  // namespace lowbit

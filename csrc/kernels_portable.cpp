// The kernels for any CPU.
#include "kernels.h"

#include "vec_portable.h"

#include "chunked_mm.inc.h"
#include "uniform.inc.h"

namespace lowbit {

const Kernels& portable_kernels() {
  static constexpr Kernels table = {Vec::name, Vec::lanes, panel_columns, pack_panel, chunked_mm, uniform};
  return table;
}

}  // namespace lowbit

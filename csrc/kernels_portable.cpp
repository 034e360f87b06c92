// The kernels for any CPU.
#include "kernels.h"

#include "vec_portable.h"

#include "table.inc.h"

namespace lowbit {

const Kernels& portable_kernels() {
  static constexpr Kernels table = make_table("portable");
  return table;
}

}  // namespace lowbit

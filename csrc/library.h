// What every file of operators needs: PyTorch's stable ABI, and the kernels of this CPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

namespace lowbit {

// The table that calls go to: the best that this CPU can run, unless lowbit::_use_isa chose another.
const Kernels& kernels();

}  // namespace lowbit

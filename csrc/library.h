// What every file of operators needs: PyTorch's stable ABI, and the kernels of this CPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

#include <string>

namespace lowbit {

// A `str` argument as an operator gets it, and its text, after which it is gone. As std::string PyTorch 2.13 leaks it at
// every call (its issue 191340, mended later).
using Word = StringHandle;
std::string text(Word word);

// The table that calls go to: the best that this CPU can run, unless lowbit::_use_isa chose another.
const Kernels& kernels();

// A contiguous tensor, or one of four axes that is channels-last, in memory as it comes. The stable ABI's own `empty` looks
// its operator up by name, a microsecond more: a tenth of a small cast.
torch::stable::Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef shape, torch::headeronly::ScalarType dtype,
                            bool channels_last = false);
torch::stable::Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef shape,
                                    torch::headeronly::IntHeaderOnlyArrayRef strides,
                                    torch::headeronly::ScalarType dtype);

// A result that is about to be written whole. Where it is large its memory is fresh from the system, and every page
// written for the first time costs a fault: huge pages are asked for.
torch::stable::Tensor fresh(torch::stable::Tensor result);

// The elements of the axes from `first` on, if in some order they fill their memory without gap or overlap; otherwise,
// or if there are none, 0.
int64_t filled(const torch::stable::Tensor& x, int64_t first);

}  // namespace lowbit

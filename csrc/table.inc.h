// The kernels of one instruction set as a table; needs `Vec` and, where its words are vectors, LOWBIT_VECTOR_WORDS.
#pragma once

#include "fetch.inc.h"  // first
#include "chunked_mm.inc.h"
#include "fingerprint.inc.h"
#include "hadamard.inc.h"
#include "int8.inc.h"
#include "lowmm.inc.h"
#include "packing.inc.h"
#include "reflect.inc.h"
#include "rules.inc.h"
#include "uniform.inc.h"
#include "magnitudes.inc.h"  // after rules.inc.h
#include "cast.inc.h"  // after uniform.inc.h, which it needs

namespace lowbit {
namespace {

constexpr Kernels make_table(const char* name) {
  return {name, Vec::lanes, uniform_kernels, chunked_kernels, fingerprint_kernels, hadamard_kernels, lowmm_kernels,
          packing_kernels, cast_kernels, int8_kernels, rules_kernels, reflect_kernels, magnitudes_kernels};
}

}  // namespace
}  // namespace lowbit

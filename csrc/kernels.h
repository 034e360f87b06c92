// What the kernels look like from outside: one table of functions per instruction set.
//
// Each table is built in its own translation unit with its own compiler flags (setup.py), from the same templates
// (table.inc.h). Those units include no standard or PyTorch header that defines inline functions: the linker would be
// free to keep the AVX-512 copy of such a function for everybody.
#pragma once

#include <stdint.h>

#include "cast.h"
#include "chunked_mm.h"
#include "fingerprint.h"
#include "hadamard.h"
#include "int8.h"
#include "lowmm.h"
#include "magnitudes.h"
#include "packing.h"
#include "reflect.h"
#include "rules.h"
#include "uniform.h"

namespace lowbit {

struct Kernels {
  const char* name;
  int64_t lanes;  // float32 numbers in a vector
  UniformKernels uniform;
  ChunkedKernels chunked;
  FingerprintKernels fingerprint;
  HadamardKernels hadamard;
  LowmmKernels lowmm;
  PackingKernels packing;
  CastKernels cast;
  Int8Kernels int8;
  RulesKernels rules;
  ReflectKernels reflect;
  MagnitudesKernels magnitudes;
};

const Kernels& portable_kernels();
#if defined(__x86_64__) || defined(_M_X64)
#define LOWBIT_X86 1
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();      // F, BW, DQ, VL
const Kernels& avx512vnni_kernels();  // and VNNI, VBMI, VBMI2, BITALG, VPOPCNTDQ
const Kernels& avx512amx_kernels();   // and AMX TILE, INT8
#endif

}  // namespace lowbit

// The C++ kernels as PyTorch operators, through PyTorch's stable ABI: no Python header, one library for every Python.
//
// Schemas are declared in src/lowbit/ops/*.py and implemented in *_ops.cpp; here is the choice of instruction set.
#include "library.h"

#include <atomic>
#include <string>
#include <vector>

namespace lowbit {
namespace {

// The tables that this CPU can run, best first.
const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> tables = [] {
    std::vector<const Kernels*> found;
#if defined(LOWBIT_X86)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bitalg") &&
                      __builtin_cpu_supports("avx512vpopcntdq");
    if (avx512 && vnni) found.push_back(&avx512vnni_kernels());
    if (avx512) found.push_back(&avx512_kernels());
    if (__builtin_cpu_supports("avx2")) found.push_back(&avx2_kernels());
#endif
    found.push_back(&portable_kernels());
    return found;
  }();
  return tables;
}

std::atomic<const Kernels*> chosen{nullptr};

std::string isas() {
  std::string names;
  for (const Kernels* table : available()) {
    if (!names.empty()) names += ' ';
    names += table->name;
  }
  return names;
}

// For tests and benchmarks: from here on this process uses the kernels of one instruction set ("" is the best).
void use_isa(std::string isa) {
  if (isa.empty()) return chosen.store(nullptr);
  for (const Kernels* table : available())
    if (isa == table->name) return chosen.store(table);
  STD_TORCH_CHECK(false, "no kernels for instruction set '", isa, "' on this CPU");
}

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  return table == nullptr ? *available()[0] : *table;
}

}  // namespace lowbit

STABLE_TORCH_LIBRARY_FRAGMENT(lowbit, m) {
  m.def("_isas() -> str");
  m.def("_use_isa(str isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lowbit, CompositeExplicitAutograd, m) {
  m.impl("_isas", TORCH_BOX(&lowbit::isas));
  m.impl("_use_isa", TORCH_BOX(&lowbit::use_isa));
}

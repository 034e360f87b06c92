// The C++ kernels as PyTorch operators, through PyTorch's stable ABI: no Python header, one library for every Python.
//
// Schemas are declared in src/lowbit/ops/*.py and implemented in *_ops.cpp; here is the choice of instruction set.
#include "library.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>
#include <vector>

#if defined(LOWBIT_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lowbit {
namespace {

#if defined(LOWBIT_X86)
// The CPU has AMX for int8, the system saves its registers, and it lets this process use them.
bool amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
  if ((d & tile) == 0 || (d & int8) == 0) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & bit_OSXSAVE) == 0) return false;
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned tile_state = 3u << 17;  // XTILECFG and XTILEDATA
  if ((low & tile_state) != tile_state) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

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
    if (avx512 && vnni && amx()) found.push_back(&avx512amx_kernels());
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
void use_isa(Word word) {
  const std::string isa = text(word);
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

std::string text(Word word) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(word, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(word, &data));
  std::string copy(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(word));
  return copy;
}

int64_t filled(const torch::stable::Tensor& x, int64_t first) {
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int64_t d = first; d < x.dim(); ++d)
    if (x.size(d) != 1) axes.push_back({x.stride(d), x.size(d)});
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return 0;
    expected *= size;
  }
  return expected;
}

torch::stable::Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef shape, torch::headeronly::ScalarType dtype,
                            bool channels_last) {
  std::vector<size_t> axes;  // the innermost last
  for (size_t d = 0; d < shape.size(); ++d) axes.push_back(d);
  if (channels_last) axes = {0, 2, 3, 1};
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = axes.size(); i-- > 1;)
    strides[axes[i - 1]] = strides[axes[i]] * std::max<int64_t>(1, shape[axes[i]]);
  return empty_strided(shape, strides, dtype);
}

torch::stable::Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef shape,
                                    torch::headeronly::IntHeaderOnlyArrayRef strides,
                                    torch::headeronly::ScalarType dtype) {
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), type,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return torch::stable::Tensor(made);
}

torch::stable::Tensor fresh(torch::stable::Tensor result) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // glibc takes allocations beyond 32 MiB from the system each time
  constexpr uintptr_t large = 32u << 20, huge_page = 2u << 20;
  const size_t bytes = size_t(result.numel()) * size_t(result.element_size());
  if (bytes > large) {
    const uintptr_t begin = (uintptr_t(result.mutable_data_ptr()) + huge_page - 1) & ~(huge_page - 1);
    const uintptr_t end = (uintptr_t(result.mutable_data_ptr()) + bytes) & ~(huge_page - 1);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: without it the result is the same
  }
#endif
  return result;
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

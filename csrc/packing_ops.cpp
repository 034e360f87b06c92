// lowbit::pack and lowbit::unpack as PyTorch operators.
#include "library.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t worth_a_thread = 1 << 12;  // groups of 64 codes, about 20 microseconds

void check_bits(int64_t bits) {
  STD_TORCH_CHECK(bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 6, "codes of ", bits,
                  " bits can't be packed; allowed: 1, 2, 3, 4, 6");
}

std::tuple<Tensor, Tensor> pack(const Tensor& codes, int64_t bits) {
  const lowbit::PackingKernels& kernels = lowbit::kernels().packing;
  check_bits(bits);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte, "pack needs uint8 codes");
  const Tensor flat = torch::stable::contiguous(codes);
  const int64_t count = flat.numel(), bytes = (count * bits + 7) / 8;
  Tensor out = lowbit::empty({&bytes, 1}, ScalarType::Byte);
  Tensor misfit = lowbit::empty({}, ScalarType::Bool);
  const uint8_t* source = flat.const_data_ptr<uint8_t>();
  uint8_t* data = out.mutable_data_ptr<uint8_t>();
  std::atomic<bool> wrong{false};
  torch::stable::parallel_for(0, (count + 63) / 64, worth_a_thread, [&](int64_t begin, int64_t end) {
    const int64_t first = 64 * begin, part = std::min(count, 64 * end) - first;
    if (kernels.pack(source + first, data + 8 * begin * bits, part, int(bits))) wrong = true;
  });
  *misfit.mutable_data_ptr<bool>() = wrong;
  return {out, misfit};
}

Tensor unpack(const Tensor& packed, int64_t bits, int64_t count) {
  const lowbit::PackingKernels& kernels = lowbit::kernels().packing;
  check_bits(bits);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte, "packed codes are uint8");
  STD_TORCH_CHECK(count >= 0, "count must not be negative; got ", count);
  const int64_t have = packed.numel();
  // written so that no count overflows
  STD_TORCH_CHECK(count / 8 < have / bits + 1 && (count * bits + 7) / 8 <= have, count, " codes of ", bits,
                  " bits do not fit ", have, " bytes");
  const Tensor flat = torch::stable::contiguous(packed);
  Tensor out = lowbit::empty({&count, 1}, ScalarType::Byte);
  const uint8_t* source = flat.const_data_ptr<uint8_t>();
  uint8_t* data = out.mutable_data_ptr<uint8_t>();
  torch::stable::parallel_for(0, (count + 63) / 64, worth_a_thread, [&](int64_t begin, int64_t end) {
    const int64_t first = 64 * begin, part = std::min(count, 64 * end) - first;
    kernels.unpack(source + 8 * begin * bits, data + first, part, int(bits));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowbit, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
}

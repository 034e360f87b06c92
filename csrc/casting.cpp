#include "casting.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

namespace lowbit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// ---- formats --------------------------------------------------------------------------------------------------------

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class Value, size_t count>
Value lookup(const std::pair<const char*, Value> (&names)[count], const std::string& name, const char* what) {
  for (const auto& [known, value] : names)
    if (name == known) return value;
  STD_TORCH_CHECK(false, "unknown ", what, " '", name, "'");
}

constexpr std::pair<const char*, CastKind> kinds[] = {{"int", CastKind::integer},
                                                      {"even", CastKind::even},
                                                      {"float", CastKind::floating},
                                                      {"log2", CastKind::log2},
                                                      {"table", CastKind::table}};
constexpr std::pair<const char*, CastRounding> roundings[] = {
    {"half_even", CastRounding::half_even}, {"half_away", CastRounding::half_away},
    {"half_up", CastRounding::half_up},     {"half_down", CastRounding::half_down},
    {"floor", CastRounding::floor},         {"truncate", CastRounding::truncate},
    {"stochastic", CastRounding::stochastic}};
constexpr std::pair<const char*, CastResult> results[] = {
    {"values", CastResult::values}, {"grid", CastResult::grid}, {"codes", CastResult::codes}};

// The least x that goes to the upper of two neighbours.
float switch_point(CastRounding rounding, float low, float high, bool low_even, double middle) {
  const float infinity = std::numeric_limits<float>::infinity();
  if (rounding == CastRounding::floor) return high;
  if (rounding == CastRounding::truncate) {  // toward zero, but across it the sign decides
    if (low >= 0) return high;
    return high <= 0 ? std::nextafterf(low, infinity) : 0.0f;
  }
  float x = float(middle);
  if (x < middle) x = std::nextafterf(x, infinity);
  const bool tie_up = rounding == CastRounding::half_up || (rounding == CastRounding::half_even && !low_even) ||
                      (rounding == CastRounding::half_away && middle >= 0);
  return x == middle && !tie_up ? std::nextafterf(x, infinity) : x;
}

void set_table(CastFormat& f, const Tensor& table) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Double && table.dim() == 2 && table.size(0) == 3 &&
                      table.size(1) >= 2 && table.size(1) <= CastFormat::levels,
                  "a table is float64 (3, 2 to 256)");
  const double* data = table.const_data_ptr<double>();
  const int64_t count = table.size(1), row = table.stride(0), column = table.stride(1);
  const auto at = [&](int64_t r, int64_t i) { return data[r * row + i * column]; };
  const bool stochastic = f.rounding == CastRounding::stochastic;
  std::fill(f.switches, f.switches + CastFormat::levels, std::numeric_limits<float>::infinity());
  std::fill(f.values, f.values + CastFormat::levels + 1, 0.0f);
  for (int64_t i = 0; i < count; ++i) f.values[i] = float(at(0, i));
  f.low = f.values[0], f.high = f.values[count - 1];
  // an interval is looked up by its lower end, and the last level belongs to the last interval
  const int64_t switches = stochastic ? count - 2 : count - 1;
  for (int64_t i = 0; i < switches; ++i) {
    const float low = f.values[i], high = f.values[i + 1];
    f.switches[i] = stochastic ? high : switch_point(f.rounding, low, high, at(1, i) != 0, at(2, i));
    if (!stochastic && f.least > 0 && low < 0 && high > 0) f.switches[i] = 0.0f;  // the sign decides, 0 is positive
  }
  std::fill(f.splits + 16, f.splits + 32, std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < 16; ++i) f.splits[i] = f.switches[16 * i + 15];
  f.search = switches < 16 ? 16 : switches < 32 ? 32 : 256;
}

}  // namespace

CastFormat cast_format(const std::string& kind, const std::vector<double>& numbers, const std::optional<Tensor>& table,
                       const std::string& rounding, const std::string& result) {
  CastFormat f;
  f.kind = lookup(kinds, kind, "kind");
  f.rounding = lookup(roundings, rounding, "rounding");
  f.result = lookup(results, result, "result");
  f.least = 0.0f;
  const auto given = [&](size_t count, bool valid) {
    STD_TORCH_CHECK(numbers.size() == count && valid, "the numbers of kind '", kind, "' describe no format");
  };
  STD_TORCH_CHECK(table.has_value() == (f.kind == CastKind::table), "kind 'table' needs a table, others have none");
  const double* n = numbers.data();
  bool codes = false;
  switch (f.kind) {
    case CastKind::integer:
      given(3, numbers.size() == 3 && n[0] >= -0x1p31 && n[0] <= n[1] && n[1] <= 0x1p32 && n[2] >= -96 && n[2] <= 126);
      f.low = float(n[0]), f.high = float(n[1]);
      f.up = float(std::ldexp(1.0, int(n[2]))), f.down = float(std::ldexp(1.0, -int(n[2])));
      codes = n[2] == 0 && n[0] >= -128 && n[1] <= 127;
      break;
    case CastKind::even:
      given(1, numbers.size() == 1 && n[0] >= 1 && n[0] <= 16);
      f.high = float((int64_t(1) << int(n[0])) - 1), f.low = -f.high;
      break;
    case CastKind::floating:
      given(4, numbers.size() == 4 && n[1] >= 1 && n[1] <= 22 && n[0] - n[1] > -126 && n[0] <= 127 &&
                   n[2] < std::ldexp(1.0, 104 + int(n[1])) && n[2] >= std::ldexp(1.0, int(n[0])));
      STD_TORCH_CHECK(f.rounding == CastRounding::half_even || f.rounding == CastRounding::stochastic,
                      "kind 'float' rounds 'half_even' or 'stochastic'");
      f.high = float(n[2]), f.low = -f.high;
      f.lowest_power = bits_of(float(std::ldexp(1.0, int(n[0]))));
      f.mantissa = int32_t(n[1]);
      f.minus_zero = n[3] != 0;
      f.high_on_grid = std::fmod(n[2], std::ldexp(1.0, std::max(std::ilogb(n[2]), int(n[0])) - int(n[1]))) == 0;
      break;
    case CastKind::log2:
      given(2, numbers.size() == 2 && n[0] > -126 && n[0] <= n[1] && n[1] < 127);
      STD_TORCH_CHECK(f.rounding == CastRounding::stochastic, "kind 'log2' rounds 'stochastic'");
      f.low = float(std::ldexp(1.0, int(n[0]))), f.high = float(std::ldexp(1.0, int(n[1])));
      break;
    case CastKind::table:
      given(1, numbers.size() == 1 && n[0] >= 0);
      f.least = float(n[0]);
      set_table(f, *table);
      break;
  }
  STD_TORCH_CHECK(f.result != CastResult::codes || codes, "codes are of kind 'int' with fl = 0 in -128 to 127");
  return f;
}

PhiloxWords::PhiloxWords(const Tensor& seed_stream_step) : given(true) {
  const Tensor& t = seed_stream_step;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == 3,
                  "a key is three int64: seed, stream, step");
  const int64_t* words = t.const_data_ptr<int64_t>();
  const uint64_t seed = uint64_t(words[0]);
  key[0] = uint32_t(seed), key[1] = uint32_t(seed >> 32);
  const int64_t stream = words[t.stride(0)], step = words[2 * t.stride(0)];
  high[0] = uint32_t(uint64_t(step)), high[1] = uint32_t(uint64_t(stream));
}

Tiling tiling(const Tensor& x, const std::vector<int64_t>& out_strides, const std::vector<int64_t>& block_strides,
              const Tensor* u, bool keyed, bool by_memory, const std::vector<int64_t>* other_strides,
              int64_t most) {
  std::vector<Axis> axes;
  int64_t index = 1;
  for (int64_t d = x.dim(); d-- > 0; index *= x.size(d))
    if (x.size(d) != 1)
      axes.insert(axes.begin(), {x.size(d), x.stride(d), out_strides[size_t(d)], block_strides[size_t(d)],
                                 u == nullptr ? 0 : u->stride(d), keyed ? index : 0,
                                 other_strides == nullptr ? 0 : (*other_strides)[size_t(d)]});
  if (by_memory)
    std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.x > b.x; });
  std::vector<Axis> merged;
  for (const Axis& b : axes) {
    const bool joins = !merged.empty() && [&a = merged.back(), &b] {
      return a.x == b.x * b.size && a.out == b.out * b.size && a.block == b.block * b.size && a.u == b.u * b.size &&
             a.index == b.index * b.size && a.other == b.other * b.size;
    }();
    if (joins) {
      const int64_t size = merged.back().size;
      merged.back() = b;
      merged.back().size *= size;
    } else {
      merged.push_back(b);
    }
  }
  Tiling t;
  if (!merged.empty()) t.columns = merged.back(), merged.pop_back();
  if (keyed && t.columns.size == 1) t.columns.index = 1;
  if (!merged.empty()) {
    auto row = merged.end() - 1;
    if (keyed && t.columns.index != 1)  // four rows in a row share a counter
      row = std::find_if(merged.begin(), merged.end(), [](const Axis& a) { return a.index == 1; });
    if (row == merged.end()) row = merged.end() - 1;
    t.rows = *row;
    merged.erase(row);
  }
  t.outer = std::move(merged);
  if (keyed && t.columns.index != 1) {
    const int64_t vectors = (std::min<int64_t>(64, t.columns.size) + 15) / 16;
    t.cut(64, std::min<int64_t>(64, t.columns.size) * (most / (16 * vectors)), 0);
  } else {
    t.cut(most, most);
  }
  return t;
}

}  // namespace lowbit

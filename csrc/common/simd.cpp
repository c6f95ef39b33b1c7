#include "common/simd.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace ssd_ext {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512"};

SimdLevel widest() {
#if SSD_EXT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("popcnt");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return SimdLevel::avx512;
  }
  if (avx2) return SimdLevel::avx2;
#endif
  return SimdLevel::baseline;
}

SimdLevel parse(const std::string& name, const char* source) {
  for (int i = 0; i < 3; ++i) {
    if (name != kNames[i]) continue;
    if (i > static_cast<int>(widest())) {
      throw std::invalid_argument("ssd_ext: " + std::string(source) + " asks for " + name + ", this CPU has " +
                                  kNames[static_cast<int>(widest())]);
    }
    return static_cast<SimdLevel>(i);
  }
  throw std::invalid_argument("ssd_ext: " + std::string(source) + " must be baseline, avx2 or avx512, got '" + name +
                              "'");
}

SimdLevel initial() {
  const char* name = std::getenv("SSD_EXT_SIMD");
  return name && *name ? parse(name, "SSD_EXT_SIMD") : widest();
}

std::atomic<SimdLevel>& level() {
  static std::atomic<SimdLevel> chosen{initial()};
  return chosen;
}

}  // namespace

SimdLevel simd_level() { return level().load(std::memory_order_relaxed); }
std::string simd_level_name() { return kNames[static_cast<int>(simd_level())]; }
void set_simd_level(const std::string& name) { level() = parse(name, "set_simd_level"); }

}  // namespace ssd_ext

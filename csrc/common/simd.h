#pragma once
// Which instruction set the CPU kernels use, chosen once at run time.
//
// A kernel file `x.simd.h` is compiled once per level by "common/for_each_simd_level.h", into the
// namespaces ssd_ext::{baseline, avx2, avx512}; SSD_EXT_SIMD_CALL picks one. Kernels do the same
// operations on every lane at every level, so results do not depend on the level.
#include <string>
#include <utility>

#if defined(__x86_64__)
#define SSD_EXT_X86 1
#else
#define SSD_EXT_X86 0
#endif

namespace ssd_ext {

enum class SimdLevel { baseline, avx2, avx512 };

// The widest level this CPU has, or the one that the environment variable SSD_EXT_SIMD names.
// Throws std::invalid_argument for an unknown name and for a level that the CPU lacks.
SimdLevel simd_level();
std::string simd_level_name();
void set_simd_level(const std::string& name);  // for tests: "baseline", "avx2", "avx512"

}  // namespace ssd_ext

#if SSD_EXT_X86
#define SSD_EXT_SIMD_CALL(function, ...)                                                   \
  (::ssd_ext::simd_level() == ::ssd_ext::SimdLevel::avx512 ? avx512::function(__VA_ARGS__) \
   : ::ssd_ext::simd_level() == ::ssd_ext::SimdLevel::avx2 ? avx2::function(__VA_ARGS__)   \
                                                           : baseline::function(__VA_ARGS__))
#else
#define SSD_EXT_SIMD_CALL(function, ...) baseline::function(__VA_ARGS__)
#endif

// Compiles the kernel file named by SSD_EXT_SIMD_FILE once per SIMD level. No include guard: a
// binding includes this once for each kernel file it has.
//
// The target is a pragma round the kernel file alone. Compiling whole files with -mavx512f would
// also compile the standard library's inline functions so, and the linker may keep that copy for
// everybody: an illegal instruction on older CPUs.
#ifndef SSD_EXT_SIMD_FILE
#error "define SSD_EXT_SIMD_FILE, then include common/for_each_simd_level.h"
#endif

#include <algorithm>
#include <memory>
#include <vector>

#include "common/box.h"
#include "common/simd.h"

#if SSD_EXT_X86
#include <immintrin.h>
#endif

#define SSD_EXT_SIMD_LEVEL 0
namespace ssd_ext {
namespace {
namespace baseline {
#include "common/simd_level.inl"
#include SSD_EXT_SIMD_FILE
}  // namespace baseline
}  // namespace
}  // namespace ssd_ext
#undef SSD_EXT_SIMD_LEVEL

#if SSD_EXT_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx,avx2,bmi,bmi2,lzcnt,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx,avx2,bmi,bmi2,lzcnt,popcnt")
#endif
#define SSD_EXT_SIMD_LEVEL 1
namespace ssd_ext {
namespace {
namespace avx2 {
#include "common/simd_level.inl"
#include SSD_EXT_SIMD_FILE
}  // namespace avx2
}  // namespace
}  // namespace ssd_ext
#undef SSD_EXT_SIMD_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx,avx2,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx,avx2,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define SSD_EXT_SIMD_LEVEL 2
namespace ssd_ext {
namespace {
namespace avx512 {
#include "common/simd_level.inl"
#include SSD_EXT_SIMD_FILE
}  // namespace avx512
}  // namespace
}  // namespace ssd_ext
#undef SSD_EXT_SIMD_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // SSD_EXT_X86
#undef SSD_EXT_SIMD_FILE

#pragma once
// Reductions and scans over the 32 lanes of a warp, which all of them call together.
#include "common/gpu.h"

namespace ssd_ext::gpu {

// Lane l takes x of lane l ^ 16, then of l ^ 8, ... l ^ 1: one order for sums of doubles, too. Not unrolled: a sum that
// runs once costs more in instruction fetches than a loop does.
template <class X>
__device__ X warp_sum(X x) {
#pragma unroll 1
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

// Sum of x over the lanes before this one.
template <class X>
__device__ X sum_before(X x, int lane) {
  X sum = x;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const X other = __shfl_up_sync(kFullMask, sum, offset);
    if (lane >= offset) sum += other;
  }
  return sum - x;
}

// How many of the lanes before this one have their bit set.
__device__ __forceinline__ unsigned count_before(unsigned bits, int lane) { return __popc(bits & ((1u << lane) - 1)); }

// Places for the lanes whose bit in `taken` is set, from *next on, which moves on.
__device__ __forceinline__ unsigned next_slot(unsigned* next, unsigned taken) {
  const int lane = int(threadIdx.x) % kWarp;
  unsigned slot = 0;
  if (lane == 0 && taken) slot = atomicAdd(next, unsigned(__popc(taken)));
  return __shfl_sync(kFullMask, slot, 0) + count_before(taken, lane);
}

// The sum, the bits that any lane has, and the maximum. From Ampere (sm_80) on each is one instruction; Turing
// exchanges lanes.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
__device__ __forceinline__ uint32_t warp_sum(uint32_t x) { return __reduce_add_sync(kFullMask, x); }
__device__ __forceinline__ int32_t warp_sum(int32_t x) { return __reduce_add_sync(kFullMask, x); }
__device__ __forceinline__ uint32_t warp_or(uint32_t x) { return __reduce_or_sync(kFullMask, x); }
__device__ __forceinline__ uint32_t warp_max(uint32_t x) { return __reduce_max_sync(kFullMask, x); }
#else
__device__ inline uint32_t warp_or(uint32_t x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x |= __shfl_xor_sync(kFullMask, x, offset);
  return x;
}
__device__ inline uint32_t warp_max(uint32_t x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(kFullMask, x, offset);
    x = other > x ? other : x;
  }
  return x;
}
#endif

// The same of 64 bits, for which no GPU has an instruction: the upper halves decide, among equals the lower ones.
__device__ __forceinline__ uint64_t warp_max(uint64_t x) {
  const uint32_t upper = uint32_t(x >> 32), most = warp_max(upper);
  return uint64_t(most) << 32 | warp_max(upper == most ? uint32_t(x) : 0u);
}

}  // namespace ssd_ext::gpu

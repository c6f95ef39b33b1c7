#pragma once
// Sorting in shared memory by the threads of one block, which call these functions together.
#include "common/gpu.h"

namespace ssd_ext::gpu {

constexpr int kSortEach = 4;                     // keys that a lane holds
constexpr int kLeastSorted = kSortEach * kWarp;  // keys that a warp holds

namespace detail {

// __shfl_xor_sync of a key of up to 16 bytes.
template <class Key>
__device__ __forceinline__ Key shuffle_xor(Key key, int lanes) {
  if constexpr (sizeof(Key) <= 8) {
    return __shfl_xor_sync(kFullMask, key, lanes);
  } else {
    const uint64_t high = __shfl_xor_sync(kFullMask, uint64_t(key >> 64), lanes);
    const uint64_t low = __shfl_xor_sync(kFullMask, uint64_t(key), lanes);
    return Key(high) << 64 | low;
  }
}

// The steps from `step` down to `gap` of a bitonic merge of `run` keys, for a thread that holds the keys of
// positions first, first + gap, ...: each step compares keys of positions that differ in one bit only.
template <int kEach, class Key>
__device__ __forceinline__ void merge_steps(Key (&keys)[kEach], int first, int gap, int run, int step) {
#pragma unroll
  for (int apart = kEach / 2; apart > 0; apart /= 2) {
    if (apart * gap > step) continue;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i & apart) continue;
      const bool falls = ((first + i * gap) & run) == 0;
      const Key a = keys[i], b = keys[i + apart];
      const bool swaps = (a < b) == falls;
      keys[i] = swaps ? b : a;
      keys[i + apart] = swaps ? a : b;
    }
  }
}

// All steps of the merges of first_run, 2 * first_run, ... last_run keys that compare keys of one warp's part.
template <class Key>
__device__ void merge_in_warps(Key* keys, int n, int first_run, int last_run) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  for (int part = warp * kLeastSorted; part < n; part += int(blockDim.x) * kSortEach) {
    const int first = part + lane;
    Key held[kSortEach];
#pragma unroll
    for (int i = 0; i < kSortEach; ++i) held[i] = keys[first + i * kWarp];
#pragma unroll 1
    for (int run = first_run; run <= last_run; run *= 2) {
      const int step = run / 2;
      merge_steps(held, first, kWarp, run, step);
#pragma unroll 1
      for (int s = step > kWarp / 2 ? kWarp / 2 : step; s > 0; s /= 2) {
#pragma unroll
        for (int i = 0; i < kSortEach; ++i) {
          const Key other = shuffle_xor(held[i], s);
          const bool falls = ((first + i * kWarp) & run) == 0, is_first = (lane & s) == 0;
          if ((held[i] < other) == (falls == is_first)) held[i] = other;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSortEach; ++i) keys[first + i * kWarp] = held[i];
  }
  __syncthreads();  // the parts are written
}

// The steps of a merge that compare keys of several warps' parts: `step`, and with kEach = 4 step / 2.
template <int kEach, class Key>
__device__ void merge_across_warps(Key* keys, int n, int run, int step) {
  const int gap = 2 * step / kEach;
  for (int i = int(threadIdx.x); i < n / kEach; i += int(blockDim.x)) {
    const int first = (i & -gap) * kEach + (i & (gap - 1));
    Key held[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) held[j] = keys[first + j * gap];
    merge_steps(held, first, gap, run, step);
#pragma unroll
    for (int j = 0; j < kEach; ++j) keys[first + j * gap] = held[j];
  }
  __syncthreads();  // the steps are done
}

}  // namespace detail

// Sorts n unsigned integers in shared memory, the largest first; equal ones are interchangeable. n is a power of
// two, at least kLeastSorted: put zeros after fewer keys. The block has any number of whole warps. The keys are
// written and a barrier has passed before; a barrier has passed at the end.
//
// A bitonic sort. Steps within kLeastSorted keys are a warp's, by registers and shuffles; of the others each
// thread takes two at a time. Barriers: 1 for 128 keys, 5 for 512, 15 for 4,096.
template <class Key>
__device__ void sort_falling(Key* keys, int n) {
#pragma unroll 1
  for (int run = kLeastSorted; run <= n; run *= 2) {
    int step = run / 2;
    for (; step >= 2 * kLeastSorted; step /= 4) detail::merge_across_warps<4>(keys, n, run, step);
    if (step == kLeastSorted) detail::merge_across_warps<2>(keys, n, run, step);
    detail::merge_in_warps(keys, n, run == kLeastSorted ? 2 : run, run);
  }
}

}  // namespace ssd_ext::gpu

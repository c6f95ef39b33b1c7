#pragma once
// Sorting in shared memory by the threads of one block, which call these functions together.
#include "common/gpu.h"

namespace ssd_ext::gpu {

constexpr int kLeastSorted = kWarp;  // keys that a warp holds

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

// All steps of the merges of first_run, 2 * first_run, ... last_run keys that compare keys of one warp.
template <class Key>
__device__ void merge_in_warps(Key* keys, int n, int first_run, int last_run) {
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
    Key held = keys[i];
#pragma unroll 1
    for (int run = first_run; run <= last_run; run *= 2) {
#pragma unroll 1
      for (int step = min_of(run, kWarp) / 2; step > 0; step /= 2) {
        const Key other = shuffle_xor(held, step);
        const bool falls = (i & run) == 0, is_first = (i & step) == 0;
        if ((held < other) == (falls == is_first)) held = other;
      }
    }
    keys[i] = held;
  }
  __syncthreads();  // the keys are written
}

// The steps of a merge that compare keys of several warps: `step`, and with kEach = 4 step / 2. Each compares keys of
// positions that differ in one bit only.
template <int kEach, class Key>
__device__ void merge_across_warps(Key* keys, int n, int run, int step) {
  const int gap = 2 * step / kEach;
  for (int i = int(threadIdx.x); i < n / kEach; i += int(blockDim.x)) {
    const int first = (i & -gap) * kEach + (i & (gap - 1));
    Key held[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) held[j] = keys[first + j * gap];
#pragma unroll
    for (int apart = kEach / 2; apart > 0; apart /= 2) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (j & apart) continue;
        const bool falls = ((first + j * gap) & run) == 0;
        const Key a = held[j], b = held[j + apart];
        const bool swaps = (a < b) == falls;
        held[j] = swaps ? b : a;
        held[j + apart] = swaps ? a : b;
      }
    }
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
// A bitonic sort. Steps within kLeastSorted keys are a warp's, one key a lane, by shuffles, so that all warps take part
// and little code is fetched; of the others each thread takes two at a time. Barriers: 5 for 128 keys, 11 for 512.
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

#pragma once
// Sorting by counting: a key's place is the number of smaller keys, which each key counts for itself. Nothing waits for
// anything else, so that all multiprocessors take part and a few thousand keys are sorted in one launch.
//
// No two keys are equal: the lower 32 bits of a key are the index of what it stands for.
#include "common/gpu_warp.h"

namespace ssd_ext::gpu {

constexpr int kRankThreads = 256;
constexpr int kRankWarps = kRankThreads / kWarp;
constexpr int kRanked = kWarp;                       // keys that a block places
constexpr int kRankedOfWarp = kRanked / kRankWarps;  // in rank_in_group
constexpr int kRankStage = 1024;                     // keys in shared memory at a time
constexpr int kMergedRuns = 32;                      // that merge_runs makes one of

inline unsigned rank_blocks(int64_t n) { return unsigned((n + kRanked - 1) / kRanked); }

// Whether a < b. Keys of 128 bits have no more than 96: the sign of a difference takes half the instructions that nvcc
// compares them with.
template <class Key>
__device__ __forceinline__ int is_less(Key a, Key b) {
  if constexpr (sizeof(Key) == 16) {
    return int((a - b) >> 127);
  } else {
    return a < b;
  }
}

// Sorts each group of `group` keys, a power of two from kRanked on, into the same places of `sorted`. key_at(i) is the
// i-th of the n keys.
template <class Key, class KeyAt>
__device__ void rank_in_group(const KeyAt& key_at, int64_t n, int64_t group, Key (&stage)[kRankStage], Key* sorted) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = int64_t(blockIdx.x) * kRanked + warp;
  const int64_t begin = int64_t(blockIdx.x) * kRanked & -group, end = begin + group < n ? begin + group : n;
  Key own[kRankedOfWarp];
  int smaller[kRankedOfWarp] = {};
#pragma unroll
  for (int e = 0; e < kRankedOfWarp; ++e)
    own[e] = first + e * kRankWarps < end ? key_at(first + e * kRankWarps) : Key(0);
  for (int64_t from = begin; from < end; from += kRankStage) {
    const int count = int(end - from < kRankStage ? end - from : kRankStage);
    Key read[kRankStage / kRankThreads];
#pragma unroll
    for (int e = 0; e < kRankStage / kRankThreads; ++e) {
      const int i = threadIdx.x + e * kRankThreads;
      read[e] = key_at(from + (i < count ? i : count - 1));
    }
#pragma unroll
    for (int e = 0; e < kRankStage / kRankThreads; ++e) stage[threadIdx.x + e * kRankThreads] = read[e];
    __syncthreads();  // the keys of the stage are there
#pragma unroll 4
    for (int i = lane; i < count; i += kWarp) {
      const Key key = stage[i];
#pragma unroll
      for (int e = 0; e < kRankedOfWarp; ++e) smaller[e] += is_less(key, own[e]);
    }
    __syncthreads();  // everybody has read them
  }
#pragma unroll
  for (int e = 0; e < kRankedOfWarp; ++e) {
    const int place = warp_sum(smaller[e]);
    if (lane == e && first + e * kRankWarps < end) sorted[begin + place] = own[e];
  }
}

// The first of keys[low .. high), which rise, that is not smaller than `key`; high if there is none.
template <class Key>
__device__ int64_t lower_bound(const Key* keys, int64_t low, int64_t high, Key key) {
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Merges each kMergedRuns sorted runs of `run` keys, a power of two from kRanked on, into one. A block has kRanked
// neighbours of a run, one in each lane, whose searches read much the same; its warps share out the runs to be
// searched, and search all of theirs at once, as each read of a search waits for the one before it.
template <class Key>
__device__ void merge_runs(const Key* __restrict__ keys, int64_t n, int64_t run, int (&smaller)[kRankWarps][kRanked],
                           Key* __restrict__ merged) {
  constexpr int kSearches = kMergedRuns / kRankWarps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = int64_t(blockIdx.x) * kRanked, i = first + lane, all = run * kMergedRuns;
  const int64_t begin = first & -all, end = begin + all < n ? begin + all : n;
  const Key key = keys[i < n ? i : n - 1];
  int count = 0;
  unsigned at[kSearches], stop[kSearches];  // of each run, up to where keys are known to be smaller, and its end
#pragma unroll
  for (int s = 0; s < kSearches; ++s) {
    const int64_t from = begin + (warp + s * kRankWarps) * run;
    at[s] = unsigned(from < end ? from : end);
    stop[s] = unsigned(from + run < end ? from + run : end);
    count -= int(at[s]);
  }
  for (unsigned step = unsigned(run); step > 0; step /= 2) {
    Key last[kSearches];
#pragma unroll
    for (int s = 0; s < kSearches; ++s) last[s] = keys[(at[s] + step < stop[s] ? at[s] + step : stop[s]) - 1];
#pragma unroll
    for (int s = 0; s < kSearches; ++s) at[s] += (at[s] + step <= stop[s]) & is_less(last[s], key) ? step : 0;
  }
#pragma unroll
  for (int s = 0; s < kSearches; ++s) count += int(at[s]);
  smaller[warp][lane] = count;
  __syncthreads();  // all runs have been searched
  if (warp != 0 || i >= n) return;
  int64_t place = begin;
  for (int other = 0; other < kRankWarps; ++other) place += smaller[other][lane];
  merged[place] = key;
}

}  // namespace ssd_ext::gpu

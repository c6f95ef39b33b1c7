#pragma once
// The k largest keys of an image, by one block: what hard_negatives and multibox_loss select by. Every
// thread of a block of kSelectThreads calls these functions together.
#include "common/gpu.h"

namespace ssd_ext::gpu {

constexpr int kSelectThreads = 1024;
constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr size_t kMostCachedKeys = 40 * 1024;  // bytes kept in shared memory; P = 8732 in float32 fits

constexpr int kAbsentKey = 0;  // the radix key of what is no negative: less than that of any loss

// Lane l takes x of lane l ^ 16, then of l ^ 8, ... l ^ 1: one order for sums of doubles, too.
template <class X>
__device__ X warp_sum(X x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

// Sum of x over the lanes before this one.
__device__ inline int64_t sum_before(int64_t x, int lane) {
  int64_t sum = x;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t other = __shfl_up_sync(kFullMask, sum, offset);
    if (lane >= offset) sum += other;
  }
  return sum - x;
}

// The warps' sums, then the sum of those. `of_warps` is this call's alone until the next __syncthreads.
template <class X>
__device__ X block_sum(X x, X* of_warps) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();  // the sums of the warps are written
  return warp_sum(of_warps[threadIdx.x % kWarp]);
}

// What the threads of a block tell each other.
template <class Key>
struct Selection {
  int64_t positives[kSelectWarps], negatives[kSelectWarps], ties[kSelectWarps];  // found by each warp
  unsigned counts[kDigits];  // keys that begin with the prefix, by their next digit; 64-bit adds would spin
  Key prefix;                // the digits found so far of the k-th largest key
  int64_t wanted;            // how many of the keys that begin so are among the k largest
};

// Every key > cut is among the k largest, and the first `wanted` of those equal to it.
template <class Key>
struct Cut {
  Key key;
  int64_t wanted;
};

// row[i] is the key of prior i < n; `negatives` of them are not kAbsentKey.
template <class Row, class Key>
__device__ Cut<Key> find_cut(const Row& row, int64_t n, int64_t k, int64_t negatives, Selection<Key>& shared) {
  if (k == 0 || k >= negatives) return {k == 0 ? ~Key(0) : Key(kAbsentKey), 0};  // the same in every thread
  const int thread = int(threadIdx.x), lane = thread % kWarp;
  Cut<Key> cut{0, k};
  for (int shift = 8 * int(sizeof(Key)) - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int d = thread; d < kDigits; d += kSelectThreads) shared.counts[d] = 0;
    __syncthreads();  // counts are zero, and everybody has read the last prefix
    for (int64_t begin = 0; begin < n; begin += kSelectThreads) {
      const int64_t i = begin + thread;
      const Key key = i < n ? row[i] : Key(kAbsentKey);
      const bool counted = i < n && ((key ^ cut.key) >> shift >> kDigitBits) == 0;
      const int digit = counted ? int(key >> shift) & (kDigits - 1) : -1;
      // Most losses share their first digit: one addition for all equal digits of the warp.
      const unsigned equal = __match_any_sync(kFullMask, digit);
      if (counted && (equal & ((1u << lane) - 1)) == 0) atomicAdd(&shared.counts[digit], unsigned(__popc(equal)));
    }
    __syncthreads();            // counts are complete
    if (thread / kWarp == 0) {  // lane l looks at digits top, top - 1, ..., from the greatest down
      constexpr int kEach = kDigits / kWarp;
      const int top = kDigits - 1 - lane * kEach;
      int64_t sum = 0;
      for (int j = 0; j < kEach; ++j) sum += shared.counts[top - j];
      int64_t above = sum_before(sum, lane);
      if (above < cut.wanted && cut.wanted <= above + sum) {  // one lane: the k-th largest is among its digits
        int digit = top;
        while (above + shared.counts[digit] < cut.wanted) above += shared.counts[digit--];
        shared.prefix = cut.key | Key(digit) << shift;
        shared.wanted = cut.wanted - above;
      }
    }
    __syncthreads();  // the prefix is written
    cut = {shared.prefix, shared.wanted};
  }
  return cut;
}

// mark(i, largest) for each i < n, by the thread that has just read row[i]: it may change the key.
template <class Row, class Key, class Mark>
__device__ void mark_largest(const Row& row, int64_t n, const Cut<Key>& cut, Selection<Key>& shared, const Mark& mark) {
  // Ties go to the lowest prior. Each warp has a run of consecutive priors: it learns how many ties
  // lie in the runs before its own, then walks through it in order.
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t run = (n + kSelectThreads - 1) / kSelectThreads * kWarp;
  const int64_t begin = warp * run < n ? warp * run : n, end = begin + run < n ? begin + run : n;
  int64_t ties = 0;
  if (cut.wanted > 0) {
    for (int64_t i = begin + lane; i < end; i += kWarp) ties += row[i] == cut.key;
  }
  ties = warp_sum(ties);
  if (lane == 0) shared.ties[warp] = ties;
  __syncthreads();  // the ties of every run are written
  int64_t before = __shfl_sync(kFullMask, sum_before(shared.ties[lane], lane), warp);
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t i = first + lane;
    const Key key = i < end ? row[i] : Key(kAbsentKey);
    const bool tie = i < end && key == cut.key;
    const unsigned tied = __ballot_sync(kFullMask, tie);
    const int64_t rank = before + __popc(tied & ((1u << lane) - 1));
    if (i < end) mark(i, key > cut.key || (tie && rank < cut.wanted));
    before += __popc(tied);
  }
}

}  // namespace ssd_ext::gpu

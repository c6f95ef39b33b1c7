#pragma once
// Selection by the threads of one block, which call these functions together.
#include "common/gpu.h"
#include "common/gpu_warp.h"

namespace ssd_ext::gpu {

// Sum of x over the lanes before this one.
__device__ inline int64_t sum_before(int64_t x, int lane) {
  int64_t sum = x;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t other = __shfl_up_sync(kFullMask, sum, offset);
    if (lane >= offset) sum += other;
  }
  return sum - x;
}

// The warps' sums, then the sum of those, in a block of kWarp warps. `of_warps` is this call's alone until the next
// __syncthreads.
template <class X>
__device__ X block_sum(X x, X* of_warps) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();  // the sums of the warps are written
  return warp_sum(of_warps[threadIdx.x % kWarp]);
}

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;

// What the threads of a block tell each other.
template <class Key>
struct SelectShared {
  unsigned counts[kDigits];  // keys that begin with the prefix, by their next digit; 64-bit adds would spin
  Key prefix;                // the digits found so far of the k-th greatest key
  int64_t wanted;            // how many of the keys that begin so are among the k greatest
  int64_t found;             // how many begin so
};

template <class Key>
struct Cut {
  Key key;         // the k-th greatest
  int64_t wanted;  // of the keys equal to it, how many are among the k greatest
};

// Of key_at(0) .. key_at(n - 1), unsigned integers of kBits bits, at least k >= 1 of them above 0; n < 2^32.
// All threads of the block call it. With kDistinct no two keys above 0 are equal, and the result may be
// any key that divides the k greatest from the others: those at least as great are exactly k.
template <int kThreads, int kBits, bool kDistinct, class Key, class KeyAt>
__device__ Cut<Key> kth_greatest(const KeyAt& key_at, int64_t n, int64_t k, SelectShared<Key>& shared) {
  static_assert(kBits % kDigitBits == 0);
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  Cut<Key> cut{0, k};
#pragma unroll 1
  for (int shift = kBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int d = thread; d < kDigits; d += kThreads) shared.counts[d] = 0;
    __syncthreads();  // counts are zero, and everybody has read the last prefix
#pragma unroll 1
    for (int64_t begin = 0; begin < n; begin += kThreads) {
      const int64_t i = begin + thread;
      const Key key = i < n ? key_at(i) : Key(0);
      const bool counted = ((key ^ cut.key) >> shift >> kDigitBits) == 0;
      const int digit = counted ? int(key >> shift) & (kDigits - 1) : -1;
      // Most keys share their first digit: one addition for all equal digits of the warp.
      const unsigned equal = __match_any_sync(kFullMask, digit);
      if (counted && (equal & ((1u << lane) - 1)) == 0) atomicAdd(&shared.counts[digit], unsigned(__popc(equal)));
    }
    __syncthreads();  // counts are complete
    if (warp == 0) {  // lane l looks at digits top, top - 1, ..., from the greatest down
      constexpr int kEach = kDigits / kWarp;
      const int top = kDigits - 1 - lane * kEach;
      int64_t sum = 0;
      for (int j = 0; j < kEach; ++j) sum += shared.counts[top - j];
      int64_t above = sum_before(sum, lane);
      if (above < cut.wanted && cut.wanted <= above + sum) {  // one lane: the k-th greatest is among its digits
        int digit = top;
        while (above + shared.counts[digit] < cut.wanted) above += shared.counts[digit--];
        shared.prefix = cut.key | Key(digit) << shift;
        shared.wanted = cut.wanted - above;
        shared.found = shared.counts[digit];
      }
    }
    __syncthreads();  // the prefix is written
    cut = {shared.prefix, shared.wanted};
    if (kDistinct && shared.found == cut.wanted) break;  // the same in every thread
  }
  return cut;
}

// ---- the k largest of an image's negatives, for hard_negatives and multibox_loss ----------------

constexpr int kSelectThreads = 1024;  // of a block that calls what follows
constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr size_t kMostCachedBytes = 40 * 1024;  // bytes kept in shared memory; P = 8732 in float32 fits

constexpr int kAbsentKey = 0;  // the radix key of what is no negative: less than that of any loss

template <class Key>
struct Selection {
  int64_t positives[kSelectWarps], negatives[kSelectWarps], ties[kSelectWarps];  // found by each warp
  SelectShared<Key> select;
};

// row(i) is the key of prior i < n; `negatives` of them are not kAbsentKey. The k largest are those above
// the cut, and the first `wanted` of those equal to it.
template <class Row, class Key>
__device__ Cut<Key> find_cut(const Row& row, int64_t n, int64_t k, int64_t negatives, Selection<Key>& shared) {
  if (k == 0 || k >= negatives) return {k == 0 ? ~Key(0) : Key(kAbsentKey), 0};  // the same in every thread
  return kth_greatest<kSelectThreads, 8 * int(sizeof(Key)), false>(row, n, k, shared.select);
}

// mark(i, largest) for each i < n, by the thread that has just read row(i): it may change the key.
template <class Row, class Key, class Mark>
__device__ void mark_largest(const Row& row, int64_t n, const Cut<Key>& cut, Selection<Key>& shared, const Mark& mark) {
  // Ties go to the lowest prior. Each warp has a run of consecutive priors: it learns how many ties
  // lie in the runs before its own, then walks through it in order.
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t run = (n + kSelectThreads - 1) / kSelectThreads * kWarp;
  const int64_t begin = warp * run < n ? warp * run : n, end = begin + run < n ? begin + run : n;
  int64_t ties = 0;
  if (cut.wanted > 0) {
    for (int64_t i = begin + lane; i < end; i += kWarp) ties += row(i) == cut.key;
  }
  ties = warp_sum(ties);
  if (lane == 0) shared.ties[warp] = ties;
  __syncthreads();  // the ties of every run are written
  int64_t before = __shfl_sync(kFullMask, sum_before(shared.ties[lane], lane), warp);
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t i = first + lane;
    const Key key = i < end ? row(i) : Key(kAbsentKey);
    const bool tie = i < end && key == cut.key;
    const unsigned tied = __ballot_sync(kFullMask, tie);
    const int64_t rank = before + __popc(tied & ((1u << lane) - 1));
    if (i < end) mark(i, key > cut.key || (tie && rank < cut.wanted));
    before += __popc(tied);
  }
}

}  // namespace ssd_ext::gpu

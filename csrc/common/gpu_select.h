#pragma once
// Selection by the threads of one block, which call these functions together.
#include "common/gpu.h"
#include "common/gpu_warp.h"

namespace ssd_ext::gpu {

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
  unsigned counts[kDigits];  // keys that begin with the prefix, by their next digit; a 64-bit atomic add
                             // would compile to a retry loop
  Key prefix;                // the digits found so far of the k-th greatest key
  int64_t wanted;            // how many of the keys that begin so are among the k greatest
  int64_t found;             // how many begin so
};

template <int kThreads, class Key>
__device__ void clear_counts(SelectShared<Key>& shared) {
  for (int d = int(threadIdx.x); d < kDigits; d += kThreads) shared.counts[d] = 0;
  __syncthreads();  // counts are zero, and everybody has read the last prefix
}

// Counts the digit of a key that begins at bit `shift`, in each lane that says so. Most keys share their first
// digit: one addition for all equal digits of the warp.
template <class Key>
__device__ __forceinline__ void count_digit(Key key, bool counted, int shift, SelectShared<Key>& shared) {
  const int digit = counted ? int(key >> shift) & (kDigits - 1) : -1;
  const unsigned equal = __match_any_sync(kFullMask, digit), before = (1u << threadIdx.x % kWarp) - 1;
  if (counted && (equal & before) == 0) atomicAdd(&shared.counts[digit], unsigned(__popc(equal)));
}

// Where the k greatest keys end: with the first `wanted` of the `found` keys equal to `key`. Where that is all of
// them, `key` may be any key that divides the k greatest from the others: those at least as great are exactly k.
template <class Key>
struct Kth {
  Key key;
  int64_t wanted, found;
};

// Of key_at(0) .. key_at(n - 1), unsigned integers of kBits bits, at least k >= 1 of them above 0; n < 2^32.
// All threads of the block call it, and each loads kAhead keys before it uses the first. `counted`: the first digits
// are counted, and a barrier has passed. With kRoughly the result may cut off fewer than k, but at least half of them.
template <int kThreads, int kBits, int kAhead = 1, bool kRoughly = false, class Key, class KeyAt>
__device__ Kth<Key> kth_greatest(const KeyAt& key_at, int64_t n, int64_t k, SelectShared<Key>& shared,
                                 bool counted = false) {
  static_assert(kBits % kDigitBits == 0);
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  Kth<Key> kth{0, k, n};
#pragma unroll 1
  for (int shift = kBits - kDigitBits; shift >= 0; shift -= kDigitBits, counted = false) {
    if (!counted) {
      clear_counts<kThreads>(shared);
#pragma unroll 1
      for (int64_t begin = 0; begin < n; begin += kAhead * kThreads) {
        Key keys[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const int64_t i = begin + j * kThreads + thread;
          keys[j] = i < n ? key_at(i) : Key(0);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const bool inside = begin + j * kThreads + thread < n;
          count_digit(keys[j], inside && ((keys[j] ^ kth.key) >> shift >> kDigitBits) == 0, shift, shared);
        }
      }
      __syncthreads();  // counts are complete
    }
    if (warp == 0) {  // lane l looks at digits top, top - 1, ..., from the greatest down
      constexpr int kEach = kDigits / kWarp;
      const int top = kDigits - 1 - lane * kEach;
      int64_t sum = 0;
      for (int j = 0; j < kEach; ++j) sum += shared.counts[top - j];
      int64_t above = sum_before(sum, lane);
      if (above < kth.wanted && kth.wanted <= above + sum) {  // one lane: the k-th greatest is among its digits
        int digit = top;
        while (above + shared.counts[digit] < kth.wanted) above += shared.counts[digit--];
        shared.prefix = kth.key | Key(digit) << shift;
        shared.wanted = kth.wanted - above;
        shared.found = shared.counts[digit];
      }
    }
    __syncthreads();  // the prefix is written
    kth = {shared.prefix, shared.wanted, shared.found};
    if (kth.found == kth.wanted) break;                                               // the same in every thread
    if (kRoughly && k >= 2 * kth.wanted) return {kth.key + (Key(1) << shift), 0, 0};  // those that begin so stay out
  }
  return kth;
}

// ---- the k largest of an image's negatives, for hard_negatives and multibox_loss ----------------

constexpr int kSelectThreads = 1024;  // of a block that calls what follows
constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr size_t kMostCachedBytes = 40 * 1024;  // bytes kept in shared memory; P = 8732 in float32 fits

constexpr int kIgnoredKey = 0, kPositiveKey = 1;  // of what is no negative: less than the key of any loss

// The key of a prior, for `key` that of its loss.
template <class Key>
__device__ __forceinline__ Key key_of(int64_t label, Key key) {
  return label == 0 ? key : Key(label > 0 ? kPositiveKey : kIgnoredKey);
}

// What the threads of a block tell each other.
template <class Key>
struct Selection {
  uint64_t labels[kSelectWarps];  // found by each warp: positives in the upper half, negatives in the lower one
  int64_t ties[kSelectWarps];     // found by each warp
  int64_t end;                    // of the ties that are taken
  SelectShared<Key> select;
};

// The keys of one image: made once into shared memory where they fit, else anew for each pass. make(i) makes the
// key of prior i < n of its loss and its label.
template <class Key_, bool kCached, class Make>
struct ImageKeys {
  using Key = Key_;
  Make make;
  int64_t n;
  Key* cache;  // [n] if kCached

  __device__ Key operator()(int64_t i) const {
    if constexpr (kCached) {
      return cache[i];
    } else {
      return make(i);
    }
  }
};

// The k largest negatives of an image: those whose key is above `key`, or equal to it before prior `end`.
template <class Key>
struct Cut {
  Key key;
  int64_t end;

  __device__ bool takes(Key other, int64_t i) const { return other > key || (other == key && i < end); }
};

// Ties go to the lowest prior: the one after the last that is taken, of the priors whose key is kth.key.
template <class Keys, class Key>
__device__ int64_t end_of_ties(const Keys& keys, const Kth<Key>& kth, Selection<Key>& shared) {
  // Each warp has a run of consecutive priors, and learns how many ties lie in the runs before its own.
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t n = keys.n, run = (n + kSelectThreads - 1) / kSelectThreads * kWarp;
  const int64_t begin = warp * run, end = begin + run < n ? begin + run : n;
  int64_t ties = 0;
  for (int64_t i = begin + lane; i < end; i += kWarp) ties += keys(i) == kth.key;
  ties = warp_sum(ties);
  if (lane == 0) shared.ties[warp] = ties;
  __syncthreads();  // the ties of every run are written
  int64_t before = __shfl_sync(kFullMask, sum_before(shared.ties[lane], lane), warp);
  if (before < kth.wanted && kth.wanted <= before + ties) {  // one warp: the last that is taken lies in its run
    for (int64_t first = begin; first < end; first += kWarp) {
      const int64_t i = first + lane;
      const bool tie = i < end && keys(i) == kth.key;
      const unsigned tied = __ballot_sync(kFullMask, tie);
      if (tie && before + count_before(tied, lane) == kth.wanted - 1) shared.end = i + 1;
      before += __popc(tied);
    }
  }
  __syncthreads();  // the end is written
  return shared.end;
}

// Makes the keys of an image and cuts off the wanted(positives, negatives) largest of its negatives.
template <class Key, bool kCached, class Make, class Wanted>
__device__ Cut<Key> cut_negatives(const ImageKeys<Key, kCached, Make>& keys, const Wanted& wanted,
                                  Selection<Key>& shared) {
  constexpr int kBits = 8 * int(sizeof(Key)),
                kAhead = 16 / int(sizeof(Key));  // keys that a thread loads before it uses the first
  const int64_t n = keys.n;
  clear_counts<kSelectThreads>(shared.select);
  uint64_t labels = 0;
#pragma unroll 1
  for (int64_t begin = 0; begin < n; begin += kAhead * kSelectThreads) {
    const unsigned left = unsigned(n - begin < kAhead * kSelectThreads ? n - begin : kAhead * kSelectThreads);
    Key made[kAhead];
    const auto place = [](int e) { return e * kSelectThreads + threadIdx.x; };
#pragma unroll
    for (int e = 0; e < kAhead; ++e) made[e] = place(e) < left ? keys.make(begin + place(e)) : Key(kIgnoredKey);
#pragma unroll
    for (int e = 0; e < kAhead; ++e) {
      const bool inside = place(e) < left;
      if (kCached && inside) keys.cache[begin + place(e)] = made[e];
      if (inside) labels += uint64_t(made[e] == kPositiveKey) << 32 | uint64_t(made[e] > kPositiveKey);
      count_digit(made[e], inside, kBits - kDigitBits, shared.select);
    }
  }
  labels = block_sum(labels, shared.labels);  // whose barrier publishes cache and counts, too
  const int64_t negatives = int64_t(labels & 0xffffffff), k = wanted(int64_t(labels >> 32), negatives);
  if (k == 0) return {~Key(0), 0};  // the same in every thread
  if (k >= negatives) return {Key(kPositiveKey), 0};
  const Kth<Key> kth = kth_greatest<kSelectThreads, kBits>(keys, n, k, shared.select, true);
  return {kth.key, kth.wanted == kth.found ? n : end_of_ties(keys, kth, shared)};
}

}  // namespace ssd_ext::gpu

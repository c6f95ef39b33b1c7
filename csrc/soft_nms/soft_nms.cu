// One block takes the boxes one after another: as many steps as boxes are taken.
//
// Ladder: clocks of a step at N = 1000, of which
// 311 are taken; of an H200 where measured, else predicted from the instructions of sm_90.
//
// 1. All candidates in global memory, 1,024 threads, the best of warp and block by 30 shuffles each: 2,400 predicted.
// 2. Up to 8,192 candidates in registers, 512 threads, the best of a warp by two __reduce_max_sync, no IoU for boxes
//    that lie apart: 1,330 measured, 209 us in all. 2,680 instructions a step, each of which takes a warp 8 clocks: two
//    IoUs one after the other in most warps, and the owner of a box waits for its index from L2.
// 3. This one: 1,350 instructions a step, 990 clocks measured where 650 were predicted, 156 us in all. Four candidates
//    a thread, so that half as many warps find the best; boxes are compared without a quotient, and the few quotients
//    of a warp, of whatever candidates, are made at once; what a warp proposes brings its box along; indices are
//    looked up in the end.
//
// Rejected, of 159 us on an H100: several boxes a step, as long as the next best is what another warp proposes and none
// taken before lowers it. 124 steps instead of 311, but 202 us: to choose a further box and to lower the scores by it
// takes more clocks than a barrier saves. A box taken off the list without a branch, and written down in shared memory:
// 162 us, as eight instructions more in every warp cost more than the owner's branch.
//
// What binds it: the latency of a step. Of a step of 1,170 clocks, which reading the clock made longer, 420 go by until
// all scores are lowered, 240 until each warp has proposed, 220 from the barrier to the box that is taken, and 290
// until its owner has put it down.
#include "soft_nms/soft_nms.h"

#include "common/gpu.h"
#include "common/gpu_tile.h"
#include "common/gpu_warp.h"

namespace ssd_ext::soft_nms {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / gpu::kWarp;

template <class C>
constexpr C kGone = -std::numeric_limits<C>::infinity();  // the score of a box that is no longer a candidate

// The candidates in the order of their boxes, so that the lower of two positions in this list is the lower box.
// Each warp owns a run of them, of which lane l has number l, l + 32, l + 64 and so on.
template <class C>
struct List {
  C* boxes;         // [n, 4]
  uint32_t* index;  // [n] which box it is
  C* scores;        // [n] the current score where no register holds it
  size_t bytes;

  List(void* base, int64_t n) {
    gpu::Scratch scratch{base};
    boxes = scratch.take<C>(n * 4);
    index = scratch.take<uint32_t>(n);
    scores = scratch.take<C>(n);
    bytes = scratch.bytes;
  }
};

// What a thread owns: up to `most` candidates, at position `first` and every 32nd after it, before `end`.
struct Share {
  int most;  // the same in all threads
  uint32_t first, end;

  __device__ Share(uint32_t size, uint32_t warp, uint32_t lane) : most(int((size + blockDim.x - 1) / blockDim.x)) {
    const uint32_t run = most * gpu::kWarp, begin = warp * run;
    first = begin + lane;
    end = min_of(begin + run, size);
  }

  __device__ uint32_t position(int k) const { return first + k * gpu::kWarp; }
};

// Fills the list and returns its length. Each warp goes twice through a run of consecutive boxes: it counts its
// candidates, adds up those of the warps before it, then writes its own.
template <class T, class C>
__device__ uint32_t list_candidates(const T* __restrict__ boxes, const T* __restrict__ scores, uint32_t n, C floor,
                                    const List<C>& list, uint32_t* counts) {  // [kWarps] in shared memory
  const uint32_t lane = threadIdx.x % gpu::kWarp, warp = threadIdx.x / gpu::kWarp, warps = blockDim.x / gpu::kWarp;
  const uint32_t run = (n + blockDim.x - 1) / blockDim.x * gpu::kWarp;
  const uint32_t begin = warp * run, end = begin + run < n ? begin + run : n;
  uint32_t own = 0;
  for (uint32_t i = begin + lane; i < end; i += gpu::kWarp) own += C(scores[i]) > floor;
  own = gpu::warp_sum(own);
  if (lane == 0) counts[warp] = own;
  __syncthreads();  // all counts are written
  const uint32_t count = lane < warps ? counts[lane] : 0;
  uint32_t before = gpu::warp_sum(lane < warp ? count : 0);
  for (uint32_t first = begin; first < end; first += gpu::kWarp) {
    const uint32_t i = first + lane;
    const C score = i < end ? C(scores[i]) : kGone<C>;
    const bool candidate = score > floor;
    const unsigned candidates = __ballot_sync(gpu::kFullMask, candidate);
    if (candidate) {
      const uint32_t p = before + gpu::count_before(candidates, lane);
      const Box<C> box = gpu::load_box(boxes, i);
      gpu::store_four(list.boxes, p, box.x1, box.y1, box.x2, box.y2);
      list.index[p] = i;
      list.scores[p] = score;
    }
    before += __popc(candidates);
  }
  __syncthreads();  // the list is complete
  return gpu::warp_sum(count);
}

// What a box that is taken does to the scores of others.
template <class C, Method kMethod>
struct Rule {
  static constexpr bool kLinear = kMethod == Method::linear;
  C iou_threshold, sigma, floor, likely;

  __device__ explicit Rule(const Params& p)
      : iou_threshold(C(p.iou_threshold)),
        sigma(C(p.sigma)),
        floor(floor_of<C>(p)),
        likely(OverlapShares<C>(kLinear ? iou_threshold : C(0)).likely) {}

  __device__ __forceinline__ C lowered(C score, C inter, C area_a, C area_b) const {
    score *= decay(iou_from(inter, area_a, area_b), kLinear, iou_threshold, sigma);
    return score > floor ? score : kGone<C>;
  }
};

// The best candidate of a thread: its k-th.
template <class C>
struct Best {
  C score = kGone<C>;
  int k = 0;
};

// kCount candidates of a thread in registers, its `first`-th and those after it.
template <class C, int kCount>
struct Candidates {
  Box<C> boxes[kCount];
  C scores[kCount];

  __device__ __forceinline__ void load(const List<C>& list, const Share& share, int first) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t p = share.position(first + i);
      boxes[i] = p < share.end ? gpu::load_box(list.boxes, p) : Box<C>{};
      scores[i] = p < share.end ? list.scores[p] : kGone<C>;
    }
  }

  __device__ __forceinline__ void store_scores(const List<C>& list, const Share& share, int first) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t p = share.position(first + i);
      if (p < share.end) list.scores[p] = scores[i];
    }
  }

  // Lowers the scores by a taken box and offers what is left to `best`.
  template <class Rule>
  __device__ __forceinline__ void decay(const Rule& rule, const Box<C>& taken, int first, Best<C>& best) {
    // A rough intersection that is wrong, or below 0, makes no IoU above 0.
    const C taken_area = area(taken), likely = taken_area < OverlapShares<C>::kTiny ? C(0) : rule.likely;
    C inters[kCount], areas[kCount];
    unsigned open = 0;  // candidates whose score may fall, as bits
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      areas[i] = area(boxes[i]);
      inters[i] = gpu::rough_intersection(boxes[i], taken);
      const bool is_candidate = scores[i] > kGone<C>, overlaps = inters[i] > likely * (areas[i] + taken_area);
      open |= is_candidate & overlaps ? 1u << i : 0u;
    }
    // Each lane takes the quotient of one of its candidates at the same time; few lanes have a second one.
    for (; open; open &= open - 1) {
      const unsigned one = open & -open;
      C inter = inters[0], own_area = areas[0], score = scores[0];
#pragma unroll
      for (int i = 1; i < kCount; ++i) {
        if (one >> i & 1) {
          inter = inters[i];
          own_area = areas[i];
          score = scores[i];
        }
      }
      score = rule.lowered(score, inter, taken_area, own_area);
#pragma unroll
      for (int i = 0; i < kCount; ++i) scores[i] = one >> i & 1 ? score : scores[i];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (scores[i] > best.score) best = {scores[i], first + i};
    }
  }

  // Removes the thread's k-th candidate, if it is one of these.
  __device__ __forceinline__ void remove(int k, int first) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = first + i == k ? kGone<C> : scores[i];
  }
};

// Keys have the order of scores, and -0 the key of 0. As no score is NaN, this is shorter than order_key_nan_least(),
// which every step of every candidate would pay for.
template <class C>
__device__ __forceinline__ auto key_of(C score) {
  const auto bits = bit_cast<IntOf<C>>(score + C(0)), sign = bits >> (8 * int(sizeof(C)) - 1);
  return radix_key(bits ^ (sign & std::numeric_limits<IntOf<C>>::max()));
}

template <class C>
using Key = decltype(key_of(C{}));

// What each warp proposes: its best candidate.
template <class C>
struct Proposals {
  Key<C> keys[gpu::kWarp];  // 0 of warps that are not there
  gpu::Four<C> boxes[kWarps];
};

// One block. A thread's first kInRegisters candidates stay in registers, the others are read in every step.
template <class T, Method kMethod, int kInRegisters>
__global__ void __launch_bounds__(kThreads, 1) soft_nms_kernel(const T* __restrict__ boxes,   // [n, 4]
                                                               const T* __restrict__ scores,  // [n]
                                                               uint32_t n, Params params, List<gpu::Compute<T>> list,
                                                               int64_t* __restrict__ keep,  // [n]
                                                               T* __restrict__ out_scores,  // [n]
                                                               int64_t* __restrict__ count) {
  using C = gpu::Compute<T>;
  constexpr int kGroup = 4, kGroups = kInRegisters / kGroup, kRead = kGroups > 1 ? 1 : 2;
  // Two of them: while a slow warp still reads one step's, a fast one writes the next step's.
  __shared__ Proposals<C> proposals[2];
  __shared__ uint32_t counts[kWarps];
  const uint32_t lane = threadIdx.x % gpu::kWarp;
  // By a shuffle it stays in a register; otherwise each step would read threadIdx.x anew, which takes long.
  const uint32_t warp = __shfl_sync(gpu::kFullMask, threadIdx.x / gpu::kWarp, 0);
  if (warp == 0) proposals[0].keys[lane] = proposals[1].keys[lane] = 0;
  const Rule<C, kMethod> rule(params);
  const Key<C> threshold = key_of(C(params.score_threshold));
  const Share share(list_candidates(boxes, scores, n, rule.floor, list, counts), warp, lane);
  Candidates<C, kGroup> resident[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) resident[g].load(list, share, g * kGroup);

  Box<C> box{};  // taken in the last step; at first one whose IoU with every other is 0
  uint32_t taken = 0;
  Proposals<C>*now = &proposals[0], *next = &proposals[1];
  for (;; ++taken) {
    // 1. The box of the last step lowers all scores.
    Best<C> best;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g > 0 && g * kGroup >= share.most) break;
      resident[g].decay(rule, box, g * kGroup, best);
    }
    for (int first = kInRegisters; first < share.most; first += kRead) {
      Candidates<C, kRead> others;
      others.load(list, share, first);
      others.decay(rule, box, first, best);
      others.store_scores(list, share, first);
    }
    // 2. The best candidate of the thread, of its warp, of the block. That of a lower warp is the lower box.
    const uint32_t position = share.position(best.k);
    const Key<C> key = key_of(best.score), of_warp = gpu::warp_max(key);
    if (best.score > kGone<C>) box = gpu::load_box(list.boxes, position);  // before it is known who proposes
    const bool proposes = ~position == gpu::warp_max(key == of_warp ? ~position : 0u);
    if (proposes) {
      now->keys[warp] = key;
      gpu::store_four(&now->boxes->v[0], warp, box.x1, box.y1, box.x2, box.y2);
    }
    __syncthreads();  // all warps have proposed
    const Key<C> of_lane = now->keys[lane], top = gpu::warp_max(of_lane);
    if (!(top > threshold)) break;  // the same in every thread
    const uint32_t owner = __ffs(int(__ballot_sync(gpu::kFullMask, of_lane == top))) - 1;
    box = gpu::load_box(&now->boxes->v[0], owner);
    Proposals<C>* const last = now;
    now = next;
    next = last;
    // 3. Its owner takes it off the list.
    if (proposes && warp == owner) {
      keep[taken] = position;
      out_scores[taken] = T(best.score);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) resident[g].remove(best.k, g * kGroup);
      list.scores[position] = kGone<C>;
    }
  }
  for (uint32_t k = threadIdx.x; k < n; k += blockDim.x) {
    keep[k] = k < taken ? int64_t(list.index[keep[k]]) : -1;
    if (k >= taken) out_scores[k] = T(0);
  }
  if (threadIdx.x == 0) *count = taken;
}

}  // namespace

size_t workspace_bytes(DType dtype, int64_t n) {
  return dtype == DType::f64 ? List<double>(nullptr, n).bytes : List<float>(nullptr, n).bytes;
}

void soft_nms_cuda(DType dtype, const void* boxes, const void* scores, int64_t n, const Params& params, void* workspace,
                   int64_t* keep, void* out_scores, int64_t* count, Stream stream) {
  gpu::dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kFew = 4, kMany = sizeof(gpu::Compute<T>) == 8 ? kFew : 16;  // what the registers hold
    const auto launch = [&](auto kernel) {
      const int64_t warps = (n + kFew * gpu::kWarp - 1) / (kFew * gpu::kWarp);
      const int threads = gpu::kWarp * int(warps < 1 ? 1 : warps < kWarps ? warps : kWarps);
      gpu::launch(kernel, dim3(1), dim3(threads), 0, stream, static_cast<const T*>(boxes),
                  static_cast<const T*>(scores), uint32_t(n), params, List<gpu::Compute<T>>(workspace, n), keep,
                  static_cast<T*>(out_scores), count);
    };
    const bool linear = params.method == Method::linear;
    if (n <= kFew * kThreads) {
      launch(linear ? soft_nms_kernel<T, Method::linear, kFew> : soft_nms_kernel<T, Method::gaussian, kFew>);
    } else {
      launch(linear ? soft_nms_kernel<T, Method::linear, kMany> : soft_nms_kernel<T, Method::gaussian, kMany>);
    }
  });
}

}  // namespace ssd_ext::soft_nms

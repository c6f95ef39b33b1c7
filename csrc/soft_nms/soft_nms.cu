// One block takes the boxes one after another: as many steps as boxes are taken. Clocks of a step at N = 1000 (31
// warps of candidates), from the instructions of sm_90; nothing is measured yet.
//
// 1. All candidates in global memory, 1,024 threads, the best of warp and block by 30 shuffles each: 2,400.
// 2. This one: up to 8,192 candidates in registers, 512 threads, the best of a warp by two __reduce_max_sync, and
//    no IoU for boxes that lie apart: 600, or 460 where neighbours in index are neighbours in the image.
//
// What binds it: one multiprocessor issues 60 instructions a warp to find the best, and 15 for each candidate, 50
// with the IoU. Fewer warps would find it sooner, but show the latency of a step (reduction, barrier, reduction, box,
// quotient: 500 clocks).
#include "soft_nms/soft_nms.h"

#include "common/gpu.h"
#include "common/gpu_warp.h"

namespace ssd_ext::soft_nms {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / gpu::kWarp;

template <class C>
constexpr C kGone = -std::numeric_limits<C>::infinity();  // the score of a box that is no longer a candidate

// The candidates in the order of their boxes, so that the lower of two positions in this list is the lower box.
// Thread t owns positions t, t + blockDim.x, t + 2 * blockDim.x and so on.
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

  static __device__ uint32_t position(int k) { return k * blockDim.x + threadIdx.x; }  // of a thread's k-th
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

// What a box that is taken does to the score of another.
template <class C, Method kMethod>
struct Rule {
  C iou_threshold, sigma, floor;

  __device__ explicit Rule(const Params& p)
      : iou_threshold(C(p.iou_threshold)), sigma(C(p.sigma)), floor(floor_of<C>(p)) {}

  __device__ __forceinline__ C lowered(C score, const Box<C>& box, const Box<C>& taken) const {
    score *= decay(iou(taken, box), kMethod == Method::linear, iou_threshold, sigma);
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

  __device__ __forceinline__ void load(const List<C>& list, uint32_t size, int first) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t p = list.position(first + i);
      boxes[i] = p < size ? gpu::load_box(list.boxes, p) : Box<C>{};
      scores[i] = p < size ? list.scores[p] : kGone<C>;
    }
  }

  __device__ __forceinline__ void store_scores(const List<C>& list, uint32_t size, int first) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t p = list.position(first + i);
      if (p < size) list.scores[p] = scores[i];
    }
  }

  // Lowers the scores by a taken box and offers what is left to `best`. No thread has more than `most` candidates.
  template <class Rule>
  __device__ __forceinline__ void decay(const Rule& rule, const Box<C>& taken, int most, int first, Best<C>& best) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i >= most) break;
      const bool candidate = scores[i] > kGone<C>;
      if (candidate & may_meet(boxes[i], taken)) scores[i] = rule.lowered(scores[i], boxes[i], taken);
      if (scores[i] > best.score) best = {scores[i], first + i};
    }
  }

  // Removes the thread's k-th candidate, if it is one of these; the first of them is the thread's first.
  __device__ __forceinline__ void remove(int k) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = i == k ? kGone<C> : scores[i];
  }
};

template <class C>
__device__ __forceinline__ auto key_of(C score) {
  return radix_key(order_key_nan_least(score));
}

// A candidate that a thread or warp proposes. Aligned to be read and written in one access.
template <class C>
struct alignas(2 * sizeof(C)) Proposal {
  decltype(key_of(C{})) key;  // of its score
  uint32_t position;          // in the list
};

// The proposal of highest score, the first in the list among equals, in all lanes.
template <class C>
__device__ __forceinline__ Proposal<C> best_of_warp(const Proposal<C>& own) {
  const auto key = gpu::warp_max(own.key);
  return {key, ~gpu::warp_max(own.key == key ? ~own.position : 0u)};
}

// One block. A thread's first kInRegisters candidates stay in registers, the others are read in every step.
template <class T, Method kMethod, int kInRegisters>
__global__ void __launch_bounds__(kThreads, 1) soft_nms_kernel(const T* __restrict__ boxes,   // [n, 4]
                                                               const T* __restrict__ scores,  // [n]
                                                               uint32_t n, Params params, List<gpu::Compute<T>> list,
                                                               int64_t* __restrict__ keep,  // [n]
                                                               T* __restrict__ out_scores,  // [n]
                                                               int64_t* __restrict__ count) {
  using C = gpu::Compute<T>;
  constexpr int kRead = 2;
  // Two of each: while a slow warp still reads one step's, a fast one writes the next step's.
  __shared__ Proposal<C> proposals[2][kWarps];
  __shared__ uint32_t counts[kWarps];
  const uint32_t lane = threadIdx.x % gpu::kWarp, warp = threadIdx.x / gpu::kWarp, warps = blockDim.x / gpu::kWarp;
  const Rule<C, kMethod> rule(params);
  const auto threshold = key_of(C(params.score_threshold));
  const uint32_t size = list_candidates(boxes, scores, n, rule.floor, list, counts);
  const int most = int((size + blockDim.x - 1) / blockDim.x);
  Candidates<C, kInRegisters> resident;
  resident.load(list, size, 0);

  Box<C> box{};  // taken in the last step; at first one whose IoU with every other is 0
  uint32_t taken = 0;
  for (;; ++taken) {
    // 1. The box of the last step lowers all scores.
    Best<C> best;
    resident.decay(rule, box, most, 0, best);
    for (int first = kInRegisters; first < most; first += kRead) {
      Candidates<C, kRead> others;
      others.load(list, size, first);
      others.decay(rule, box, most, first, best);
      others.store_scores(list, size, first);
    }
    // 2. The best candidate of the thread, of its warp, of the block.
    const Proposal<C> own{key_of(best.score), list.position(best.k)}, of_warp = best_of_warp(own);
    if (lane == 0) proposals[taken % 2][warp] = of_warp;
    __syncthreads();  // all warps have proposed
    const Proposal<C> top = best_of_warp(lane < warps ? proposals[taken % 2][lane] : Proposal<C>{0, 0});
    if (!(top.key > threshold)) break;  // the same in every thread
    // 3. Its owner takes it off the list.
    if (own.position == top.position) {
      keep[taken] = list.index[top.position];
      out_scores[taken] = T(best.score);
      resident.remove(best.k);
      list.scores[top.position] = kGone<C>;
    }
    box = gpu::load_box(list.boxes, top.position);
  }
  for (uint32_t k = taken + threadIdx.x; k < n; k += blockDim.x) {
    keep[k] = -1;
    out_scores[k] = T(0);
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
    const auto launch = [&](auto kernel) {
      const int64_t warps = (n + gpu::kWarp - 1) / gpu::kWarp;
      const int threads = gpu::kWarp * int(warps < 1 ? 1 : warps < kWarps ? warps : kWarps);
      gpu::launch(kernel, dim3(1), dim3(threads), 0, stream, static_cast<const T*>(boxes),
                  static_cast<const T*>(scores), uint32_t(n), params, List<gpu::Compute<T>>(workspace, n), keep,
                  static_cast<T*>(out_scores), count);
    };
    constexpr int kFew = 4, kMany = sizeof(gpu::Compute<T>) == 8 ? kFew : 16;  // what the registers hold
    const bool linear = params.method == Method::linear;
    if (n <= kFew * kThreads) {
      launch(linear ? soft_nms_kernel<T, Method::linear, kFew> : soft_nms_kernel<T, Method::gaussian, kFew>);
    } else {
      launch(linear ? soft_nms_kernel<T, Method::linear, kMany> : soft_nms_kernel<T, Method::gaussian, kMany>);
    }
  });
}

}  // namespace ssd_ext::soft_nms

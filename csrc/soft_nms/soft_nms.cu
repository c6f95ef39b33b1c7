#include "soft_nms/soft_nms.h"

#include "common/gpu.h"

namespace ssd_ext::soft_nms {
namespace {

// Doubles need more registers than a block of 1024 threads has.
template <class C>
constexpr int kMostThreads = sizeof(C) == 8 ? 512 : 1024;

// The candidates: thread t owns entries t, t + blockDim.x, t + 2 * blockDim.x, ... and keeps its own
// packed at the front, in the order of their boxes. Nobody else touches them, so no barrier guards them.
template <class C>
struct Workspace {
  C* boxes;        // [n, 4]
  int64_t* index;  // [n]
  C* scores;       // [n]
  size_t bytes;

  Workspace(void* base, int64_t n) {
    gpu::Scratch scratch{base};
    boxes = scratch.take<C>(n * 4);
    index = scratch.take<int64_t>(n);
    scores = scratch.take<C>(n);
    bytes = scratch.bytes;
  }

  __device__ void set(int64_t i, const Box<C>& b, int64_t j) {
    gpu::store_four(boxes, i, b.x1, b.y1, b.x2, b.y2);
    index[i] = j;
  }
};

template <class C>
struct Pick {
  C score = -std::numeric_limits<C>::infinity();
  int64_t index = -1;

  // A total order, so that every order of reduction gives the same.
  __device__ void take(C other_score, int64_t other_index) {
    if (other_score > score || (other_score == score && other_index < index)) {
      score = other_score;
      index = other_index;
    }
  }
  __device__ void take_warp() {
    for (int distance = gpu::kWarp / 2; distance; distance /= 2) {
      take(__shfl_xor_sync(gpu::kFullMask, score, distance), __shfl_xor_sync(gpu::kFullMask, index, distance));
    }
  }
};

// One block.
template <class T>
__global__ void __launch_bounds__(kMostThreads<gpu::Compute<T>>)
    soft_nms_kernel(const T* __restrict__ boxes,   // [n, 4]
                    const T* __restrict__ scores,  // [n]
                    int64_t n, Params params, Workspace<gpu::Compute<T>> w,
                    int64_t* __restrict__ keep,  // [n]
                    T* __restrict__ out_scores,  // [n]
                    int64_t* __restrict__ count) {
  using C = gpu::Compute<T>;
  constexpr int kWarps = kMostThreads<C> / gpu::kWarp;
  // Two of each: while a slow warp still reads one step's, a fast one writes the next step's.
  __shared__ C best_score[2][kWarps];
  __shared__ int64_t best_index[2][kWarps];
  const C floor = floor_of<C>(params), threshold = C(params.iou_threshold), sigma = C(params.sigma);
  const bool linear = params.method == Method::linear;
  const int lane = threadIdx.x % gpu::kWarp, warp = threadIdx.x / gpu::kWarp, warps = blockDim.x / gpu::kWarp;
  const auto entry = [&](int64_t k) { return k * blockDim.x + threadIdx.x; };

  Pick<C> mine;
  int64_t candidates = 0;  // of this thread
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const C score = C(scores[i]);
    if (!(score > floor)) continue;
    w.set(entry(candidates), gpu::load_box(boxes, i), i);
    w.scores[entry(candidates)] = score;
    mine.take(score, i);
    ++candidates;
  }

  int64_t taken = 0;
  for (;; ++taken) {
    const int side = taken % 2;
    mine.take_warp();
    if (lane == 0) {
      best_score[side][warp] = mine.score;
      best_index[side][warp] = mine.index;
    }
    __syncthreads();
    Pick<C> best;
    if (lane < warps) best.take(best_score[side][lane], best_index[side][lane]);
    best.take_warp();
    if (!(best.score > C(params.score_threshold))) break;  // every thread has the same best
    if (threadIdx.x == 0) {
      keep[taken] = best.index;
      out_scores[taken] = T(best.score);
    }
    const Box<C> box = gpu::load_box(boxes, best.index);
    mine = Pick<C>{};
    int64_t left = 0;
    for (int64_t k = 0; k < candidates; ++k) {
      const int64_t from = entry(k), index = w.index[from];
      if (index == best.index) continue;
      const Box<C> other = gpu::load_box(w.boxes, from);
      const C score = w.scores[from] * decay(iou(box, other), linear, threshold, sigma);
      if (!(score > floor)) continue;
      if (left != k) w.set(entry(left), other, index);
      w.scores[entry(left)] = score;
      mine.take(score, index);
      ++left;
    }
    candidates = left;
  }
  for (int64_t k = taken + threadIdx.x; k < n; k += blockDim.x) {
    keep[k] = -1;
    out_scores[k] = T(0);
  }
  if (threadIdx.x == 0) *count = taken;
}

}  // namespace

size_t workspace_bytes(DType dtype, int64_t n) {
  return dtype == DType::f64 ? Workspace<double>(nullptr, n).bytes : Workspace<float>(nullptr, n).bytes;
}

void soft_nms_cuda(DType dtype, const void* boxes, const void* scores, int64_t n, const Params& params, void* workspace,
                   int64_t* keep, void* out_scores, int64_t* count, Stream stream) {
  gpu::dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kMost = kMostThreads<gpu::Compute<T>>;
    const int threads = n >= kMost ? kMost : (int(n) / gpu::kWarp + 1) * gpu::kWarp;
    gpu::launch(soft_nms_kernel<T>, dim3(1), dim3(threads), 0, stream, static_cast<const T*>(boxes),
                static_cast<const T*>(scores), n, params, Workspace<gpu::Compute<T>>(workspace, n), keep,
                static_cast<T*>(out_scores), count);
  });
}

}  // namespace ssd_ext::soft_nms

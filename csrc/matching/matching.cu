#include "matching/matching.h"

#include "common/gpu.h"

namespace ssd_ext::matching {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / gpu::kWarp;
constexpr int kGtTile = 64;  // ground truths in shared memory at a time

// A ground truth's best prior so far; iou < 0: none.
template <class C>
struct Best {
  C iou;
  int32_t prior;
};

SSD_EXT_HD int64_t tiles_of(const Sizes& sizes) { return (sizes.priors + kThreads - 1) / kThreads; }

// Scratch memory of one call. Tile t of an image covers priors t * kThreads .. (t + 1) * kThreads.
template <class C>
struct Workspace {
  Best<C>* tile_best;  // [tiles, G] the best prior within a tile
  Best<C>* best;       // [G]
  uint8_t* taken;      // [B, P] claimed by force; bipartite only
  size_t bytes;

  Workspace(void* base, const Sizes& sizes, Force force) {
    gpu::Scratch scratch{base};
    tile_best = scratch.take<Best<C>>(tiles_of(sizes) * sizes.gts);
    best = scratch.take<Best<C>>(sizes.gts);
    taken = scratch.take<uint8_t>(force == Force::bipartite ? sizes.images * sizes.priors : 0);
    bytes = scratch.bytes;
  }
};

// Rows of image b, for all threads of a block to call together. From the first offset that falls or
// leaves 0 .. total on, images have no rows: so none leads out of bounds, and no two images share a row.
struct Rows {
  int64_t begin, count;
};
__device__ __forceinline__ Rows rows_of(const int64_t* __restrict__ offsets, int64_t b, int64_t total) {
  const int64_t begin = offsets[b], end = offsets[b + 1];
  bool bad = offsets[0] < 0 || end > total;
#pragma unroll 1  // unrolled, it would hold twice the registers for a loop that rarely comes round
  for (int64_t i = threadIdx.x; i <= b; i += kThreads) bad |= offsets[i + 1] < offsets[i];
  if (__syncthreads_or(bad)) return {0, 0};
  return {begin, end - begin};
}

template <class T>
__device__ __forceinline__ void write_matched(const Outputs& out, const T* __restrict__ gt_boxes,
                                              const int64_t* __restrict__ gt_labels, const T* __restrict__ priors,
                                              const Rule& rule, int64_t row, int64_t p, const Rows& rows, int64_t j) {
  using C = gpu::Compute<T>;
  if (out.matches) {
    out.matches[row] = j;
    return;
  }
  const Box<C> b = gpu::load_box(gt_boxes, rows.begin + j);
  const CenterBox<C> c = gpu::load_prior(priors, p);
  const C center = C(rule.center), size = C(rule.size);
  out.labels[row] = gt_labels[rows.begin + j];
  gpu::store_four(static_cast<T*>(out.deltas), row, encode_center(b.x1, b.x2, c.cx, c.w, center),
                  encode_center(b.y1, b.y2, c.cy, c.h, center), encode_size(b.x1, b.x2, c.w, size),
                  encode_size(b.y1, b.y2, c.h, size));
}

// One thread a prior: its best ground truth by threshold, and each ground truth's best prior of the tile.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    threshold_kernel(const T* __restrict__ gt_boxes,         // [G, 4]
                     const int64_t* __restrict__ gt_labels,  // [G] or nullptr
                     const int64_t* __restrict__ offsets,    // [B + 1]
                     const T* __restrict__ priors,           // [P, 4]
                     Outputs out, Sizes sizes, Rule rule, Workspace<gpu::Compute<T>> work) {
  using C = gpu::Compute<T>;
  __shared__ Box<C> s_box[kGtTile];
  __shared__ C s_area[kGtTile];
  __shared__ bool s_valid[kGtTile];
  __shared__ Best<C> s_best[kWarps][kGtTile];
  const int tid = threadIdx.x, lane = tid % gpu::kWarp, warp = tid / gpu::kWarp;
  const int64_t tiles = tiles_of(sizes), b = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t p = tile * kThreads + tid, row = b * sizes.priors + p;
  const bool inside = p < sizes.priors;
  const Rows rows = rows_of(offsets, b, sizes.gts);
  const CenterBox<C> none{C(0), C(0), C(0), C(0)};
  const Box<C> prior = to_corners(inside ? gpu::load_prior(priors, p) : none);
  const C prior_area = area(prior);

  C best = C(-1);
  int64_t match = kBackground;
  for (int64_t j0 = 0; j0 < rows.count; j0 += kGtTile) {
    const int n = int(rows.count - j0 < kGtTile ? rows.count - j0 : kGtTile);
    if (tid < n) {
      const Box<C> box = gpu::load_box(gt_boxes, rows.begin + j0 + tid);
      s_box[tid] = box;
      s_area[tid] = area(box);
      s_valid[tid] = is_valid(box);
    }
    __syncthreads();  // the tile is loaded before anybody reads it
    for (int j = 0; j < n; ++j) {
      // Outside priors and invalid ground truths get -1, below every IoU.
      const C value = inside && s_valid[j] ? iou_from(intersection(s_box[j], prior), s_area[j], prior_area) : C(-1);
      if (value > best) {
        best = value;
        match = j0 + j;
      }
      C top = value;
      for (int d = gpu::kWarp / 2; d > 0; d /= 2) top = max_of(top, __shfl_xor_sync(gpu::kFullMask, top, d));
      const unsigned holders = __ballot_sync(gpu::kFullMask, value == top);
      if (lane == 0) s_best[warp][j] = {top, int32_t(p) + __ffs(int(holders)) - 1};  // the lowest prior of equals
    }
    __syncthreads();  // all warps' bests are in
    if (tid < n) {
      Best<C> of_tile = s_best[0][tid];
      for (int w = 1; w < kWarps; ++w) {
        if (s_best[w][tid].iou > of_tile.iou) of_tile = s_best[w][tid];
      }
      work.tile_best[tile * sizes.gts + rows.begin + j0 + tid] = of_tile;
    }
    __syncthreads();  // the tile and the bests are read before the next round overwrites them
  }
  if (!inside) return;
  if (rule.force == Force::bipartite) work.taken[row] = 0;
  if (best >= C(rule.iou_threshold)) {
    write_matched(out, gt_boxes, gt_labels, priors, rule, row, p, rows, match);
    return;
  }
  const bool ignored = best >= C(rule.low_threshold);
  if (out.matches) {
    out.matches[row] = ignored ? kIgnore : kBackground;
  } else {
    out.labels[row] = ignored ? -1 : 0;
    gpu::store_four(static_cast<T*>(out.deltas), row, C(0), C(0), C(0), C(0));
  }
}

// a before b in the order in which pairs are joined.
template <class C>
__device__ __forceinline__ bool joins_before(C iou_a, int64_t prior_a, int64_t gt_a, C iou_b, int64_t prior_b,
                                             int64_t gt_b) {
  if (iou_a != iou_b) return iou_a > iou_b;
  if (prior_a != prior_b) return prior_a < prior_b;
  return gt_a < gt_b;
}

// One block an image: ground truths claim priors, over what threshold_kernel has written.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    force_kernel(const T* __restrict__ gt_boxes,         // [G, 4]
                 const int64_t* __restrict__ gt_labels,  // [G] or nullptr
                 const int64_t* __restrict__ offsets,    // [B + 1]
                 const T* __restrict__ priors,           // [P, 4]
                 Outputs out, Sizes sizes, Rule rule, Workspace<gpu::Compute<T>> work) {
  using C = gpu::Compute<T>;
  __shared__ C s_iou[kWarps];
  __shared__ int64_t s_prior[kWarps], s_gt[kWarps];
  const int tid = threadIdx.x, lane = tid % gpu::kWarp, warp = tid / gpu::kWarp;
  const int64_t b = blockIdx.x;
  const Rows rows = rows_of(offsets, b, sizes.gts);
  Best<C>* best = work.best + rows.begin;  // [rows.count]

  for (int64_t j = tid; j < rows.count; j += kThreads) {
    Best<C> top = work.tile_best[rows.begin + j];
    for (int64_t t = 1, tiles = tiles_of(sizes); t < tiles; ++t) {
      const Best<C> other = work.tile_best[t * sizes.gts + rows.begin + j];
      if (other.iou > top.iou) top = other;
    }
    best[j] = top;
  }
  __syncthreads();  // every ground truth's best prior is known

  // Does another ground truth want my prior? A later one beats me under `last`.
  bool shared = false;
  for (int64_t j = tid; j < rows.count; j += kThreads) {
    const Best<C> mine = best[j];
    if (mine.iou < C(0)) continue;
    bool beaten = false;
    for (int64_t h = j + 1; h < rows.count; ++h) beaten |= best[h].iou >= C(0) && best[h].prior == mine.prior;
    shared |= beaten;
    if (rule.force == Force::last && !beaten) {
      write_matched(out, gt_boxes, gt_labels, priors, rule, b * sizes.priors + mine.prior, mine.prior, rows, j);
    }
  }
  if (rule.force == Force::last) return;
  if (!__syncthreads_or(shared)) {  // all different: the greedy order does not matter
    for (int64_t j = tid; j < rows.count; j += kThreads) {
      const int64_t p = best[j].prior;
      if (best[j].iou >= C(0)) {
        write_matched(out, gt_boxes, gt_labels, priors, rule, b * sizes.priors + p, p, rows, j);
      }
    }
    return;
  }

  uint8_t* taken = work.taken + b * sizes.priors;
  for (;;) {
    // The best pair of all: per thread, then per warp, then of the warps.
    C top = C(-1);
    int64_t prior = 0, gt = 0;
    for (int64_t j = tid; j < rows.count; j += kThreads) {
      if (joins_before(best[j].iou, int64_t(best[j].prior), j, top, prior, gt)) {
        top = best[j].iou;
        prior = best[j].prior;
        gt = j;
      }
    }
    for (int d = gpu::kWarp / 2; d > 0; d /= 2) {
      const C other_iou = __shfl_xor_sync(gpu::kFullMask, top, d);
      const int64_t other_prior = __shfl_xor_sync(gpu::kFullMask, prior, d);
      const int64_t other_gt = __shfl_xor_sync(gpu::kFullMask, gt, d);
      if (joins_before(other_iou, other_prior, other_gt, top, prior, gt)) {
        top = other_iou;
        prior = other_prior;
        gt = other_gt;
      }
    }
    if (lane == 0) {
      s_iou[warp] = top;
      s_prior[warp] = prior;
      s_gt[warp] = gt;
    }
    __syncthreads();  // every warp's pair is in; every thread has read best[]
    for (int w = 0; w < kWarps; ++w) {
      if (joins_before(s_iou[w], s_prior[w], s_gt[w], top, prior, gt)) {
        top = s_iou[w];
        prior = s_prior[w];
        gt = s_gt[w];
      }
    }
    if (top < C(0)) return;  // the same for all threads: ground truths or priors have run out
    if (tid == 0) {
      write_matched(out, gt_boxes, gt_labels, priors, rule, b * sizes.priors + prior, prior, rows, gt);
      taken[prior] = 1;
      best[gt].iou = C(-1);
    }
    __syncthreads();  // the pair is recorded before anybody searches; s_* are free again

    // A warp for each ground truth that wanted this prior: its best among the free ones.
    for (int64_t j = warp; j < rows.count; j += kWarps) {
      if (best[j].iou < C(0) || best[j].prior != prior) continue;  // the same for the whole warp
      const Box<C> box = gpu::load_box(gt_boxes, rows.begin + j);
      C found = C(-1);
      int64_t where = sizes.priors;
      for (int64_t q = lane; q < sizes.priors; q += gpu::kWarp) {
        if (taken[q]) continue;
        const C value = iou(box, to_corners(gpu::load_prior(priors, q)));
        if (value > found) {
          found = value;
          where = q;
        }
      }
      for (int d = gpu::kWarp / 2; d > 0; d /= 2) {
        const C other = __shfl_xor_sync(gpu::kFullMask, found, d);
        const int64_t other_where = __shfl_xor_sync(gpu::kFullMask, where, d);
        if (other > found || (other == found && other_where < where)) {
          found = other;
          where = other_where;
        }
      }
      __syncwarp();  // every lane has read best[j] before it changes
      if (lane == 0) best[j] = {found, int32_t(where)};
      __syncwarp();
    }
    __syncthreads();  // all searches are over before the next round reads best[]
  }
}

}  // namespace

size_t workspace_bytes(DType dtype, const Sizes& sizes, Force force) {
  return dtype == DType::f64 ? Workspace<double>(nullptr, sizes, force).bytes
                             : Workspace<float>(nullptr, sizes, force).bytes;
}

void match_cuda(DType dtype, const void* gt_boxes, const int64_t* gt_labels, const int64_t* offsets, const void* priors,
                const Outputs& out, const Sizes& sizes, const Rule& rule, void* workspace, Stream stream) {
  gpu::dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Workspace<gpu::Compute<T>> work(workspace, sizes, rule.force);
    const T *boxes = static_cast<const T*>(gt_boxes), *prior_rows = static_cast<const T*>(priors);
    gpu::launch(threshold_kernel<T>, dim3(unsigned(tiles_of(sizes) * sizes.images)), dim3(kThreads), 0, stream, boxes,
                gt_labels, offsets, prior_rows, out, sizes, rule, work);
    if (rule.force == Force::none || sizes.gts == 0) return;
    gpu::launch(force_kernel<T>, dim3(unsigned(sizes.images)), dim3(kThreads), 0, stream, boxes, gt_labels, offsets,
                prior_rows, out, sizes, rule, work);
  });
}

}  // namespace ssd_ext::matching

#include "nms/nms.h"

#include "common/gpu_tile.h"

// The boxes are gathered in the order of visiting and walked in chunks of kChunk tiles of kTile
// boxes, so that memory stays linear in n. Per chunk:
//   earlier_kernel   which boxes of the chunk overlap which earlier ones of it, as bits
//   sweep_kernel     one block decides, tile after tile, which boxes of the chunk are kept
//   suppress_kernel  removes the boxes behind the chunk that overlap a kept one
namespace ssd_ext::nms {
namespace {

using gpu::ballot_tile;
using gpu::kTile;
using gpu::Word;

constexpr int kChunk = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / gpu::kWarp;
constexpr int kSweepThreads = 1024;
constexpr int kThreadsPerRow = kSweepThreads / kTile;  // in the sweep; each looks after two words of a row
static_assert(kChunk == 2 * kThreadsPerRow);

SSD_EXT_HD int64_t tiles_for(int64_t n) { return (n + kTile - 1) / kTile; }

template <class C>
struct Candidate {
  Box<C> box;
  int64_t class_id;
};

// Scratch memory. Tiles are whole: boxes behind the last are marked as removed.
template <class C>
struct Workspace {
  C* boxes;                 // [tiles * kTile, 4], in the order of visiting
  C* kept_boxes;            // [kChunk * kTile, 4], of the current chunk
  int64_t* class_ids;       // [tiles * kTile]
  int64_t* kept_class_ids;  // [kChunk * kTile]
  Word* removed;            // [tiles]
  Word* earlier;  // [kChunk * kTile, kChunk]: bit j of [i, w]: box i overlaps box j of tile w, before it in the chunk
  int* kept;      // [], of the current chunk
  size_t bytes;

  Workspace(void* base, int64_t n) {
    const size_t all = tiles_for(n) * kTile, chunk = all < kChunk * kTile ? all : kChunk * kTile;
    gpu::Scratch scratch{base};
    boxes = scratch.take<C>(all * 4);
    kept_boxes = scratch.take<C>(chunk * 4);
    class_ids = scratch.take<int64_t>(all);
    kept_class_ids = scratch.take<int64_t>(chunk);
    removed = scratch.take<Word>(all / kTile);
    earlier = scratch.take<Word>(chunk * kChunk);
    kept = scratch.take<int>(1);
    bytes = scratch.bytes;
  }

  __device__ Candidate<C> candidate(int64_t i) const { return {gpu::load_box(boxes, i), class_ids[i]}; }
  __device__ Candidate<C> kept_candidate(int i) const { return {gpu::load_box(kept_boxes, i), kept_class_ids[i]}; }
};

template <class C>
__device__ __forceinline__ bool overlaps(const Candidate<C>& a, const Candidate<C>& b, C threshold) {
  return a.class_id == b.class_id && gpu::overlaps(a.box, b.box, threshold);
}

// The boxes of a tile that one of the kWarps warps of a block looks after.
__device__ __forceinline__ Word share_of(int warp) { return 0x0101010101010101ull << warp; }
static_assert(kWarps == 8);

template <class T>
__global__ void __launch_bounds__(kThreads) sort_keys_kernel(const T* __restrict__ scores,               // [n]
                                                             IntOf<gpu::Compute<T>>* __restrict__ keys,  // [n]
                                                             int64_t n) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = gpu::global_index(); i < n; i += stride) keys[i] = order_key_nan_least(gpu::Compute<T>(scores[i]));
}

// One warp a tile.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const T* __restrict__ boxes,                             // [n, 4]
                  const int64_t* __restrict__ class_ids,                   // [n] or nullptr
                  const IntOf<gpu::Compute<T>>* __restrict__ sorted_keys,  // [n]
                  const int64_t* __restrict__ order,                       // [n]
                  int64_t n, Workspace<gpu::Compute<T>> w,
                  int64_t* __restrict__ keep,  // [n]
                  int64_t* __restrict__ count) {
  using C = gpu::Compute<T>;
  const int lane = threadIdx.x % gpu::kWarp;
  const int64_t tile = gpu::global_index() / gpu::kWarp;
  if (gpu::global_index() == 0) *count = 0;
  if (tile >= tiles_for(n)) return;
  bool removed[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = tile * kTile + half * gpu::kWarp + lane;
    removed[half] = true;
    Candidate<C> c{};
    if (i < n) {
      const int64_t j = order[i];
      c.box = gpu::load_box(boxes, j);
      if (class_ids) c.class_id = class_ids[j];
      removed[half] = sorted_keys[i] == std::numeric_limits<IntOf<C>>::min();
      keep[i] = -1;
    }
    gpu::store_four(w.boxes, i, c.box.x1, c.box.y1, c.box.x2, c.box.y2);
    w.class_ids[i] = c.class_id;
  }
  const Word word = ballot_tile(removed[0], removed[1]);
  if (lane == 0) w.removed[tile] = word;
}

// Block (x, y): the boxes of the chunk's tile y against those of tile x <= y; each warp holds the
// latter, two a lane, and goes through its share of the former. Rows of removed boxes stay unwritten.
template <class C>
__global__ void __launch_bounds__(kThreads) earlier_kernel(Workspace<C> w, int64_t first_tile, C threshold) {
  const int column_tile = blockIdx.x, row_tile = blockIdx.y;
  if (column_tile > row_tile) return;
  const int lane = threadIdx.x % gpu::kWarp, warp = threadIdx.x / gpu::kWarp;
  const int64_t columns = (first_tile + column_tile) * kTile, rows = (first_tile + row_tile) * kTile;
  const Candidate<C> low = w.candidate(columns + lane), high = w.candidate(columns + gpu::kWarp + lane);
  for (Word rest = share_of(warp) & ~w.removed[first_tile + row_tile]; rest; rest &= rest - 1) {
    const int row = __ffsll(rest) - 1;
    const Candidate<C> box = w.candidate(rows + row);
    Word bits = ballot_tile(overlaps(low, box, threshold), overlaps(high, box, threshold));
    if (column_tile == row_tile) bits &= (Word(1) << row) - 1;
    if (lane == 0) w.earlier[(int64_t(row_tile) * kTile + row) * kChunk + column_tile] = bits;
  }
}

// One block.
template <class C>
__global__ void __launch_bounds__(kSweepThreads) sweep_kernel(Workspace<C> w, int64_t first_tile, int tiles,
                                                              const int64_t* __restrict__ order,  // [n]
                                                              int64_t* __restrict__ keep,         // [n]
                                                              int64_t* __restrict__ count) {
  __shared__ Word removed[kChunk], kept[kChunk];
  __shared__ bool suppressed[kTile];  // box of this tile overlaps a kept one of an earlier tile
  const int lane = threadIdx.x % gpu::kWarp, warp = threadIdx.x / gpu::kWarp;
  const int row = threadIdx.x / kThreadsPerRow, word = threadIdx.x % kThreadsPerRow;
  if (const int tile = threadIdx.x; tile < kChunk) {
    removed[tile] = tile < tiles ? w.removed[first_tile + tile] : ~Word(0);
    kept[tile] = 0;
  }
  __syncthreads();

  const auto earlier = [&](int tile, int i, int column_tile) {
    return removed[tile] >> i & 1 ? Word(0) : w.earlier[(int64_t(tile) * kTile + i) * kChunk + column_tile];
  };
  // Words of the current tile's rows: against earlier tiles (every thread), and within the tile (the
  // first warp, two rows a lane). Loaded a step ahead, since they do not depend on what is kept.
  Word before = 0, before_too = 0, within_low = 0, within_high = 0;
  if (warp == 0) {
    within_low = earlier(0, lane, 0);
    within_high = earlier(0, lane + gpu::kWarp, 0);
  }
  for (int tile = 0; tile < tiles; ++tile) {
    const bool hit = (before & kept[word]) | (before_too & kept[word + kThreadsPerRow]);
    const unsigned hits = __ballot_sync(gpu::kFullMask, hit) >> (lane & ~(kThreadsPerRow - 1));
    if (word == 0) suppressed[row] = hits & ((1u << kThreadsPerRow) - 1);
    const int next = tile + 1;
    before = next < tiles && word < next ? earlier(next, row, word) : 0;
    before_too = next < tiles && word + kThreadsPerRow < next ? earlier(next, row, word + kThreadsPerRow) : 0;
    __syncthreads();  // `suppressed` is complete

    if (warp == 0) {
      const Word alive = ~removed[tile] & ~ballot_tile(suppressed[lane], suppressed[lane + gpu::kWarp]);
      const Word now = gpu::kept_of_tile(alive, within_low, within_high);
      if (lane == 0) kept[tile] = now;
      if (next < tiles) {
        within_low = earlier(next, lane, next);
        within_high = earlier(next, lane + gpu::kWarp, next);
      }
    }
    __syncthreads();  // kept[tile] is there, `suppressed` free again
  }

  const int64_t kept_before = *count;
  for (int i = threadIdx.x; i < tiles * kTile; i += kSweepThreads) {
    const int tile = i / kTile;
    const Word bit = Word(1) << (i % kTile);
    if (!(kept[tile] & bit)) continue;
    int rank = __popcll(kept[tile] & (bit - 1));
    for (int t = 0; t < tile; ++t) rank += __popcll(kept[t]);
    const int64_t from = first_tile * kTile + i;
    const Candidate<C> c = w.candidate(from);
    gpu::store_four(w.kept_boxes, rank, c.box.x1, c.box.y1, c.box.x2, c.box.y2);
    w.kept_class_ids[rank] = c.class_id;
    keep[kept_before + rank] = order[from];
  }
  __syncthreads();  // every thread has read the old count
  if (threadIdx.x == 0) {
    int total = 0;
    for (int t = 0; t < tiles; ++t) total += __popcll(kept[t]);
    *w.kept = total;
    *count = kept_before + total;
  }
}

// Block (x, y): the boxes of tile first_tile + x against every gridDim.y-th group of kTile kept
// boxes; each warp holds a group, two a lane, and goes through its share of the tile.
template <class C>
__global__ void __launch_bounds__(kThreads) suppress_kernel(Workspace<C> w, int64_t first_tile, C threshold) {
  const int lane = threadIdx.x % gpu::kWarp, warp = threadIdx.x / gpu::kWarp;
  const int64_t tile = first_tile + blockIdx.x;
  const int kept = *w.kept;
  // Atomic, because blocks beside this one may be removing boxes of the same tile. Whether their
  // removals are seen yet decides only how much work is spared.
  const Word removed = __shfl_sync(gpu::kFullMask, lane == 0 ? atomicOr(&w.removed[tile], 0ull) : 0ull, 0);
  const Word before = share_of(warp) & ~removed;
  Word alive = before;
  for (int group = blockIdx.y; group * kTile < kept && alive; group += gridDim.y) {
    const int i = group * kTile + lane, j = i + gpu::kWarp;
    const Candidate<C> low = i < kept ? w.kept_candidate(i) : Candidate<C>{};
    const Candidate<C> high = j < kept ? w.kept_candidate(j) : Candidate<C>{};
    for (Word rest = alive; rest; rest &= rest - 1) {
      const int row = __ffsll(rest) - 1;
      const Candidate<C> box = w.candidate(tile * kTile + row);
      const bool hit = overlaps(low, box, threshold) | overlaps(high, box, threshold);
      if (__any_sync(gpu::kFullMask, hit)) alive &= ~(Word(1) << row);
    }
  }
  if (lane == 0 && alive != before) atomicOr(&w.removed[tile], before & ~alive);
}

}  // namespace

void sort_keys_cuda(DType dtype, const void* scores, void* keys, int64_t n, Stream stream) {
  gpu::dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gpu::launch(sort_keys_kernel<T>, dim3(gpu::blocks_for(n, kThreads)), dim3(kThreads), 0, stream,
                static_cast<const T*>(scores), static_cast<IntOf<gpu::Compute<T>>*>(keys), n);
  });
}

size_t workspace_bytes(DType dtype, int64_t n) {
  return dtype == DType::f64 ? Workspace<double>(nullptr, n).bytes : Workspace<float>(nullptr, n).bytes;
}

void nms_cuda(DType dtype, const void* boxes, const int64_t* class_ids, const void* sorted_keys, const int64_t* order,
              int64_t n, double iou_threshold, void* workspace, int64_t* keep, int64_t* count, Stream stream) {
  gpu::dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = gpu::Compute<T>;
    const Workspace<C> w(workspace, n);
    const C threshold = C(iou_threshold);
    const int64_t tiles = tiles_for(n);
    // At least one block, which sets the count, even without boxes.
    gpu::launch(gather_kernel<T>, dim3(unsigned(tiles / kWarps + 1)), dim3(kThreads), 0, stream,
                static_cast<const T*>(boxes), class_ids, static_cast<const IntOf<C>*>(sorted_keys), order, n, w, keep,
                count);
    for (int64_t first = 0; first < tiles; first += kChunk) {
      const int in_chunk = int(tiles - first < kChunk ? tiles - first : kChunk);
      gpu::launch(earlier_kernel<C>, dim3(in_chunk, in_chunk), dim3(kThreads), 0, stream, w, first, threshold);
      gpu::launch(sweep_kernel<C>, dim3(1), dim3(kSweepThreads), 0, stream, w, first, in_chunk, order, keep, count);
      // Blocks enough to fill the device where few tiles are left.
      const int64_t behind = tiles - first - in_chunk;
      const unsigned splits = behind < 64 ? kChunk : behind < 2048 ? unsigned(2048 / behind) : 1;
      gpu::launch(suppress_kernel<C>, dim3(unsigned(behind), splits), dim3(kThreads), 0, stream, w, first + in_chunk,
                  threshold);
    }
  });
}

}  // namespace ssd_ext::nms

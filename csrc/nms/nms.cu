#include "nms/nms.h"

#include "common/gpu_last_block.h"
#include "common/gpu_rank.h"
#include "common/gpu_tile.h"

// 1. Sort:     boxes are put in the order of visiting, and where they are many and of several classes grouped by class
//              and cut into tiles of kTile.
// 2. Compare:  which boxes of a chunk, up to kChunk tiles of a group, overlap one kept before it or an earlier one of
//              the chunk. All chunks that are first in their group at once, then all second ones ...
// 3. Sweep:    the last block to compare a chunk decides it tile by tile from the bits of step 2.
// 4. Compact:  the kept boxes of all groups are put in the order of visiting.
// Memory stays linear in n: scratch of about 40 bytes a box, or 350 where they are grouped. The host never learns how
// many boxes are kept or how many classes there are.
//
// The versions so far, predicted for an H100: nms of 1,000 and of 20,000 boxes, batched_nms of 20,000 in 80 classes.
//   48, 245, 335 us  torch's sort, a gather, then for each chunk in the order of visiting three launches: compare,
//                    sweep in one block with two barriers a tile, suppress all later boxes.
//    8,  95,  40 us  Ranks by counting, on all multiprocessors, instead of a sort of 15 launches (or of one warp); no
//                    gather; one launch a chunk; four tiles a step of the sweep; rough comparisons without a branch or
//                    a division; groups side by side. Rejected: one launch of one block
//                    that keeps a list instead of bits, 12 to 35 us for 1,000 boxes, as one multiprocessor compares 8
//                    pairs a clock.
// What binds: at 1,000 boxes latency, of two launches and about ten dependent reads; at 20,000 ten chunks one after
// another, of which half is the sweep's two barriers and four rounds of votes a step; grouped, ten launches for second
// and later chunks that no group may have.
namespace ssd_ext::nms {
namespace {

using gpu::ballot_tile;
using gpu::kTile;
using gpu::Word;

constexpr int kChunk = 32;  // tiles that are decided in one launch
constexpr int64_t kChunkBoxes = kChunk * kTile;
constexpr int64_t kFew = 4096;               // boxes that are sorted in one launch, and not grouped by class
constexpr int kStep = 4;                     // tiles that a step of the sweep decides
constexpr int kStepThreads = kStep * kTile;  // of a block: one for each box of a step
constexpr int kStepWarps = kStepThreads / gpu::kWarp;
constexpr int kThreads = kStepThreads + gpu::kWarp;  // and a warp that decides
constexpr int kRowsOfWarp = kTile / kStepWarps;
template <class C>
constexpr int kRowsAtOnce = sizeof(C) == 8 ? 1 : kRowsOfWarp / 2;  // as registers allow
constexpr int kCompactThreads = gpu::kWarp * gpu::kWarp;
static_assert(kChunk == gpu::kWarp && kChunk % kStep == 0);

SSD_EXT_HD int64_t tiles_for(int64_t n) { return (n + kTile - 1) / kTile; }

// Keys rise in the order of visiting: falling scores, NaN last, the lower index first among equals.
template <class C>
using ScoreBits = decltype(radix_key(IntOf<C>{}));
template <class C>
using ScoreKey = std::conditional_t<sizeof(C) == 8, unsigned __int128, uint64_t>;
// By class, then by place in that order.
using ClassKey = unsigned __int128;

template <class T>
__device__ __forceinline__ ScoreKey<gpu::Compute<T>> score_key(T score, int64_t i) {
  using C = gpu::Compute<T>;
  return ScoreKey<C>(ScoreBits<C>(~radix_key(order_key_nan_least(C(score))))) << 32 | uint32_t(i);
}
template <class C>
__device__ __forceinline__ bool is_nan(ScoreKey<C> key) {
  return ScoreBits<C>(key >> 32) == std::numeric_limits<ScoreBits<C>>::max();
}
template <class Key>
__device__ __forceinline__ int64_t index_of(Key key) {
  return int64_t(uint32_t(key));
}

template <class C>
struct Candidate {
  Box<C> box;
  int64_t class_id;
};

template <class C>
__device__ __forceinline__ bool overlaps(const Candidate<C>& a, const Candidate<C>& b, C threshold) {
  return a.class_id == b.class_id && gpu::overlaps(a.box, b.box, threshold);
}

// The boxes, sorted: at position q is box index_of(keys[q]).
template <class T>
struct Sorted {
  using C = gpu::Compute<T>;
  const T* boxes;            // [n, 4]
  const int64_t* class_ids;  // [n], or nullptr: not to be compared
  const ScoreKey<C>* keys;   // [n]
  const ClassKey* by_class;  // [n]: positions are grouped by class; nullptr: they are places in the order of visiting
  int64_t n;

  __device__ Candidate<C> candidate(ScoreKey<C> key) const {
    const int64_t i = index_of(key);
    return {gpu::load_box(boxes, i), class_ids ? class_ids[i] : 0};
  }
};

// The boxes of a class, or all boxes if they are not grouped: positions start, start + 1 ... end - 1.
struct Group {
  int64_t start, end;
};

// Up to kTile boxes of a group, from position `first` on.
struct Tile {
  int64_t first;
  Group group;
};

// Up to kChunkBoxes boxes of a group, from position `begin` on.
struct Chunk {
  Group group;
  int64_t begin;
  int rows;  // boxes
  int kept;  // boxes of the group that are kept before the chunk

  __device__ int tiles() const { return int(tiles_for(rows)); }
  __device__ bool is_last() const { return begin + rows == group.end; }

  // What a tile of the chunk is compared with: columns of kTile boxes, first those kept of the group before the chunk,
  // then the chunk's own up to the tile itself.
  __device__ int kept_columns() const { return int(tiles_for(kept)); }
  __device__ int columns(int tile) const { return kept_columns() + tile + 1; }

  // Blocks that have something to compare, if each tile's columns are shared out among `splits` blocks.
  __device__ unsigned blocks(int splits) const {
    const int fewer = min_of(max_of(splits - columns(0), 0), tiles());  // tiles with less columns than splits
    return unsigned(fewer * columns(0) + fewer * (fewer - 1) / 2 + (tiles() - fewer) * splits);
  }
};

// What is known of the tile or of the chunk that begins at a position.
struct alignas(16) State {
  Word removed;     // boxes of the tile that are not kept, whatever is kept of the chunk
  unsigned ticket;  // blocks that are done with the chunk
  int kept;         // boxes of the group that are kept before the chunk
};

struct Counts {
  unsigned tiles;  // of all groups
  int longest;     // boxes of the longest group, if that is more than a chunk
};

struct alignas(4) FourFlags {
  uint8_t of[4];  // 0 or 1
};

// Scratch memory. Boxes are grouped by class where there are many.
template <class C>
struct Workspace {
  State* states;             // [n] by position
  ScoreKey<C>* by_score[2];  // [n]
  ClassKey* by_class[2];     // [n], if grouped
  ScoreKey<C>* kept_keys;    // [n] of each group, from its start on; if there is more than one chunk
  Word* earlier;             // [n, kChunk], or of one chunk at a time if not grouped; see earlier_of()
  Tile* tiles;               // [n], if grouped
  FourFlags* kept;           // [n / 4] whether the box at a place is kept, if grouped
  Counts* counts;            // []
  bool grouped;
  size_t bytes;

  Workspace(void* base, int64_t n, bool has_classes) : grouped(has_classes && n > kFew) {
    gpu::Scratch scratch{base};
    const size_t all = n, if_grouped = grouped ? n : 0;
    states = scratch.take<State>(all);
    by_score[0] = scratch.take<ScoreKey<C>>(all);
    by_score[1] = scratch.take<ScoreKey<C>>(n > kFew ? all : 0);
    for (ClassKey*& keys : by_class) keys = scratch.take<ClassKey>(if_grouped);
    kept_keys = scratch.take<ScoreKey<C>>(n > kChunkBoxes ? all : 0);
    earlier = scratch.take<Word>((grouped || n < kChunkBoxes ? all : kChunkBoxes) * kChunk);
    tiles = scratch.take<Tile>(if_grouped);
    kept = scratch.take<FourFlags>((if_grouped + 3) / 4);
    counts = scratch.take<Counts>(1);
    bytes = scratch.bytes;
  }

  __device__ uint8_t& is_kept(int64_t place) const { return kept[place / 4].of[place % 4]; }

  // Of each box of the chunk, which boxes of the chunk's tile `column` it overlaps that are before it.
  __device__ Word* earlier_of(const Chunk& chunk, int column) const {
    return earlier + (grouped ? chunk.begin * kChunk : 0) + column * chunk.rows;
  }
};

// What the threads of chunk_kernel tell each other.
template <class C>
struct Shared {
  alignas(16) C boxes[kTile * 4];  // of the tile
  C shares[kTile];
  int64_t class_ids[kTile];
  unsigned visited[kTile / gpu::kWarp];  // bits of the boxes whose score is a number
  Word removed[kChunk];                  // State::removed of each tile
  Word kept[kChunk];                     // boxes of each tile
  unsigned alive[kStepWarps];            // bits of the step's boxes that overlap none kept before the step
  Word within[2][kStep][kStepThreads];   // of the boxes of this step and the next: earlier ones of each tile of it that
                                         // they overlap
  int64_t kept_before[kChunk + 1];       // boxes kept of the chunk before each tile
};

// ---- sorting ------------------------------------------------------------------------------------

// Sorts groups of scores, and makes outputs and workspace ready.
template <class T>
__global__ void __launch_bounds__(gpu::kRankThreads)
    rank_scores_kernel(const T* __restrict__ scores,  // [n]
                       int64_t n, int64_t group, Workspace<gpu::Compute<T>> w,
                       int64_t* __restrict__ keep,  // [n]
                       int64_t* __restrict__ count) {
  using Key = ScoreKey<gpu::Compute<T>>;
  __shared__ Key stage[gpu::kRankStage];
  const int64_t i = gpu::global_index();
  if (i < n) {
    keep[i] = -1;
    w.states[i] = {0, 0, 0};
    if (w.grouped) w.is_kept(i) = 0;
  }
  if (i == 0) {
    *count = 0;
    *w.counts = {0, 0};
  }
  gpu::rank_in_group([&](int64_t j) { return score_key(scores[j], j); }, n, group, stage, w.by_score[0]);
}

template <class C>
__global__ void __launch_bounds__(gpu::kRankThreads)
    rank_classes_kernel(const int64_t* __restrict__ class_ids,     // [n]
                        const ScoreKey<C>* __restrict__ by_score,  // [n]
                        int64_t n, int64_t group,
                        ClassKey* __restrict__ by_class) {  // [n]
  __shared__ ClassKey stage[gpu::kRankStage];
  const auto key_at = [&](int64_t place) {
    return ClassKey(radix_key(class_ids[index_of(by_score[place])])) << 32 | uint32_t(place);
  };
  gpu::rank_in_group(key_at, n, group, stage, by_class);
}

template <class Key>
__global__ void __launch_bounds__(gpu::kRankThreads)
    merge_kernel(const Key* __restrict__ keys, int64_t n, int64_t run, Key* __restrict__ merged) {
  __shared__ int smaller[gpu::kRankWarps][gpu::kRanked];
  gpu::merge_runs(keys, n, run, smaller, merged);
}

// Cuts groups into tiles, in any order. One thread a position.
template <class Key>
__global__ void __launch_bounds__(gpu::kRankThreads) cut_kernel(const ClassKey* __restrict__ by_class,  // [n]
                                                                const Key* __restrict__ by_score,       // [n]
                                                                int64_t n,
                                                                Key* __restrict__ keys,    // [n] by position
                                                                Tile* __restrict__ tiles,  // [n]
                                                                Counts* __restrict__ counts) {
  const int64_t q = gpu::global_index();
  Tile tile{q, {}};
  bool is_first = false;
  if (q < n) {
    const ClassKey own = by_class[q], class_key = own >> 32;
    keys[q] = by_score[index_of(own)];
    tile.group.start = gpu::lower_bound(by_class, 0, q, class_key << 32);
    is_first = (q - tile.group.start) % kTile == 0;
    if (is_first) tile.group.end = gpu::lower_bound(by_class, q, n, (class_key + 1) << 32);
  }
  const unsigned slot = gpu::next_slot(&counts->tiles, __ballot_sync(gpu::kFullMask, is_first));
  if (!is_first) return;
  tiles[slot] = tile;
  if (q == tile.group.start && tile.group.end - q > kChunkBoxes) atomicMax(&counts->longest, int(tile.group.end - q));
}

// ---- a chunk of each group ------------------------------------------------------------------------

// Compares a tile of the chunk with every gridDim.y-th of its columns. Kept boxes remove what they overlap; of
// those of the chunk bits are written. Each warp holds the column, two boxes a lane, and compares its share of the
// tile.
template <class T>
__device__ void compare_tile(const Sorted<T>& in, const Workspace<gpu::Compute<T>>& w, const Chunk& chunk, int tile,
                             gpu::Compute<T> threshold, Shared<gpu::Compute<T>>& shared) {
  using C = gpu::Compute<T>;
  using Key = ScoreKey<C>;
  const int thread = threadIdx.x, lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;
  const int kept_columns = chunk.kept_columns(), columns = chunk.columns(tile);
  const OverlapShares<C> shares(threshold);

  // A column is filled up with its last box, which changes no result: that is kept anyway, or its further bits belong
  // to no box.
  Candidate<C> low, high;
  C low_share, high_share;
  const auto read_column = [&](int column) {
    const bool is_kept = column < kept_columns;
    const Key* const keys = is_kept ? w.kept_keys + chunk.group.start : in.keys + chunk.begin;
    const int first = (is_kept ? column : column - kept_columns) * kTile,
              last = (is_kept ? chunk.kept : chunk.rows) - 1;
    const Key low_key = keys[min_of(first + lane, last)], high_key = keys[min_of(first + gpu::kWarp + lane, last)];
    low = in.candidate(low_key);
    high = in.candidate(high_key);
    low_share = shares.of(low.box);
    high_share = shares.of(high.box);
  };
  int column = blockIdx.y;
  if (warp < kStepWarps) read_column(column);
  if (thread < kTile) {
    const int row = tile * kTile + thread;
    const Key key = in.keys[chunk.begin + min_of(row, chunk.rows - 1)];
    const Candidate<C> c = in.candidate(key);
    gpu::store_four(shared.boxes, thread, c.box.x1, c.box.y1, c.box.x2, c.box.y2);
    shared.shares[thread] = shares.of_query(c.box);
    shared.class_ids[thread] = c.class_id;
    const unsigned visited = __ballot_sync(gpu::kFullMask, row < chunk.rows && !is_nan<C>(key));
    if (lane == 0) shared.visited[warp] = visited;
  }
  __syncthreads();  // the tile is there
  if (warp >= kStepWarps) return;

  const int first_row = warp * kRowsOfWarp;
  constexpr unsigned kRows = (1u << kRowsOfWarp) - 1;
  unsigned alive = shared.visited[first_row / gpu::kWarp] >> (first_row % gpu::kWarp) & kRows;
  while (column < columns && alive) {
    unsigned hits = 0;  // of the row r: bit r, with the low box, and bit kRowsOfWarp + r, with the high one
#pragma unroll(kRowsAtOnce<C>)
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const Box<C> box = gpu::load_box(shared.boxes, first_row + r);
      const C share = shared.shares[first_row + r];
      hits |= unsigned(gpu::rough_intersection(box, low.box) > share + low_share) << r;
      hits |= unsigned(gpu::rough_intersection(box, high.box) > share + high_share) << (kRowsOfWarp + r);
    }
    hits &= alive | alive << kRowsOfWarp;
    for (unsigned rest = hits; rest; rest &= rest - 1) {
      const unsigned bit = __ffs(int(rest)) - 1, row = first_row + bit % kRowsOfWarp;
      const Candidate<C> one{gpu::load_box(shared.boxes, row), shared.class_ids[row]};
      Candidate<C> other = low;
      if (bit >= kRowsOfWarp) other = high;
      if (!overlaps(one, other, threshold)) hits &= ~(1u << bit);
    }
    Word earlier = 0;
    unsigned met_rows = 0;
    if (__any_sync(gpu::kFullMask, hits != 0)) {
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) {
        const Word met = ballot_tile(hits >> r & 1, hits >> (kRowsOfWarp + r) & 1);
        met_rows |= unsigned(met != 0) << r;
        if (lane == r) earlier = met;
      }
    }
    const int own = column - kept_columns;
    if (own < 0) {
      alive &= ~met_rows;
    } else if (lane < kRowsOfWarp && (alive >> lane & 1)) {
      const int row = first_row + lane;
      if (own == tile) earlier &= (Word(1) << row) - 1;
      w.earlier_of(chunk, own)[tile * kTile + row] = earlier;
    }
    column += gridDim.y;
    if (column < columns) read_column(column);
  }
  if (lane == 0 && alive != kRows) {
    atomicOr(&w.states[chunk.begin + tile * kTile].removed, Word(kRows & ~alive) << first_row);
  }
}

// Which boxes of a step are kept, for one warp to call: tile after tile, since those kept of a tile remove boxes of
// the next ones.
template <class C>
__device__ void decide_step(int step, Shared<C>& shared) {
  const int lane = threadIdx.x % gpu::kWarp;
  Word kept[kStep];
#pragma unroll
  for (int t = 0; t < kStep; ++t) {
    const int low = t * kTile + lane, high = low + gpu::kWarp;
    Word alive = shared.alive[2 * t] | Word(shared.alive[2 * t + 1]) << gpu::kWarp;
    Word low_met = 0, high_met = 0;
#pragma unroll
    for (int before = 0; before < t; ++before) {
      low_met |= shared.within[step % 2][before][low] & kept[before];
      high_met |= shared.within[step % 2][before][high] & kept[before];
    }
    if (t > 0) alive &= ~ballot_tile(low_met != 0, high_met != 0);
    kept[t] = gpu::kept_of_tile(alive, shared.within[step % 2][t][low], shared.within[step % 2][t][high]);
    if (lane == 0) shared.kept[step * kStep + t] = kept[t];
  }
}

// Decides which boxes of a chunk are kept, kStep tiles at a time, from the bits of compare_tile. While one warp
// decides a step, the threads of the others read what they need of the next, each for one box.
template <class C>
__device__ void sweep_chunk(const Workspace<C>& w, const Chunk& chunk, Shared<C>& shared) {
  const int thread = threadIdx.x, lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;
  const int tiles = chunk.tiles(), own_tile = thread / kTile;
  const bool decides = warp == kStepWarps;
  if (thread < kChunk) {
    const State* const state = &w.states[chunk.begin + thread * kTile];
    shared.removed[thread] = thread < tiles ? gpu::load_written(&state->removed) : ~Word(0);
    shared.kept[thread] = 0;
  }
  __syncthreads();  // what is removed is there

  bool removed;           // the box of this thread
  Word met;               // kept boxes of the chunk that it overlaps, but for those of the last step
  Word last_step[kStep];  // boxes of the last step that it overlaps, kept or not
  const auto read_row = [&](int step) {
    removed = shared.removed[step * kStep + own_tile] >> (thread % kTile) & 1;
    met = 0;
    const auto word = [&](int tile) {
      return removed ? Word(0) : gpu::load_written(w.earlier_of(chunk, tile) + step * kStepThreads + thread);
    };
#pragma unroll
    for (int t = 0; t < kStep; ++t) {
      last_step[t] = step > 0 ? word((step - 1) * kStep + t) : 0;
      shared.within[step % 2][t][thread] = t <= own_tile ? word(step * kStep + t) : 0;
    }
#pragma unroll 4
    for (int t = 0; t < (step - 1) * kStep; ++t) met |= word(t) & shared.kept[t];
  };
  if (!decides) read_row(0);
  for (int step = 0; step * kStep < tiles; ++step) {
    if (!decides) {
      if (step > 0) {
#pragma unroll
        for (int t = 0; t < kStep; ++t) met |= last_step[t] & shared.kept[(step - 1) * kStep + t];
      }
      const unsigned alive = __ballot_sync(gpu::kFullMask, !removed && met == 0);
      if (lane == 0) shared.alive[warp] = alive;
    }
    __syncthreads();  // what the step's boxes overlap is there
    if (decides) {
      decide_step(step, shared);
    } else if ((step + 1) * kStep < tiles) {
      read_row(step + 1);
    }
    __syncthreads();  // the kept boxes of the step are known
  }
}

// Writes the kept boxes of a chunk: to `keep`, or as flags if groups are yet to be compacted; and for the next chunk of
// the group.
template <class T>
__device__ void write_kept(const Sorted<T>& in, const Workspace<gpu::Compute<T>>& w, const Chunk& chunk,
                           Shared<gpu::Compute<T>>& shared, int64_t* keep, int64_t* count) {
  using C = gpu::Compute<T>;
  const int thread = threadIdx.x, lane = thread % gpu::kWarp;
  if (thread < kChunk) {
    const int64_t kept = __popcll(shared.kept[lane]), before = gpu::sum_before(kept, lane);
    shared.kept_before[lane] = before;
    if (lane == kChunk - 1) shared.kept_before[kChunk] = before + kept;
  }
  __syncthreads();  // they are counted
  for (int row = thread; row < chunk.rows; row += kThreads) {
    const int tile = row / kTile;
    const Word bit = Word(1) << (row % kTile);
    if (!(shared.kept[tile] & bit)) continue;
    const int64_t rank = chunk.kept + shared.kept_before[tile] + __popcll(shared.kept[tile] & (bit - 1));
    const ScoreKey<C> key = in.keys[chunk.begin + row];
    if (w.grouped) {
      w.is_kept(index_of(in.by_class[chunk.begin + row])) = 1;
    } else {
      keep[rank] = index_of(key);
    }
    if (!chunk.is_last()) w.kept_keys[chunk.group.start + rank] = key;
  }
  if (thread > 0) return;
  const int64_t kept = chunk.kept + shared.kept_before[kChunk];
  if (!chunk.is_last()) w.states[chunk.begin + chunk.rows].kept = int(kept);
  if (!w.grouped) *count = kept;
}

// The chunk number `wave` of each group that has one. Block (x, y) compares every gridDim.x-th tile of them with every
// gridDim.y-th column; the last block to be done with a chunk decides it.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(gpu::Compute<T>) == 8 ? 2 : 3)
    chunk_kernel(Sorted<T> in, Workspace<gpu::Compute<T>> w, int64_t wave, gpu::Compute<T> threshold,
                 int64_t* __restrict__ keep,  // [n]
                 int64_t* __restrict__ count) {
  __shared__ Shared<gpu::Compute<T>> shared;
  if (w.grouped && wave > 0 && w.counts->longest <= wave * kChunkBoxes) return;
  const unsigned tiles = w.grouped ? w.counts->tiles : gridDim.x;
  for (unsigned t = blockIdx.x; t < tiles; t += gridDim.x) {
    const Tile tile = w.grouped ? w.tiles[t] : Tile{(wave * kChunk + t) * kTile, {0, in.n}};
    const int64_t begin = tile.group.start + wave * kChunkBoxes;
    if (tile.first < begin || tile.first >= begin + kChunkBoxes) continue;
    const int rows = int(min_of(kChunkBoxes, tile.group.end - begin)), kept = wave > 0 ? w.states[begin].kept : 0;
    const Chunk chunk{tile.group, begin, rows, kept};
    const int tile_of_chunk = int((tile.first - begin) / kTile);
    if (int(blockIdx.y) >= chunk.columns(tile_of_chunk)) continue;
    compare_tile(in, w, chunk, tile_of_chunk, threshold, shared);
    if (!gpu::is_last_block(&w.states[begin].ticket, chunk.blocks(gridDim.y))) continue;
    sweep_chunk(w, chunk, shared);
    write_kept(in, w, chunk, shared, keep, count);
  }
}

// The kept boxes of all groups in the order of visiting. A thread a place; a block first counts what is kept before it.
template <class Key>
__global__ void __launch_bounds__(kCompactThreads) compact_kernel(const FourFlags* __restrict__ flags,  // [n / 4]
                                                                  const Key* __restrict__ by_score,     // [n]
                                                                  int64_t n,
                                                                  int64_t* __restrict__ keep,  // [n]
                                                                  int64_t* __restrict__ count) {
  __shared__ int64_t kept_before[gpu::kWarp], kept_of[gpu::kWarp];  // by warp: before the block, its share of; in it
  const int lane = threadIdx.x % gpu::kWarp, warp = threadIdx.x / gpu::kWarp;
  const int64_t place = gpu::global_index(), first = int64_t(blockIdx.x) * kCompactThreads;
  const bool is_kept = place < n && flags[place / 4].of[place % 4];
  const unsigned kept = __ballot_sync(gpu::kFullMask, is_kept);
  int64_t before = 0;
  for (int64_t i = threadIdx.x; i < first / 4; i += kCompactThreads) before += __popc(bit_cast<unsigned>(flags[i]));
  before = gpu::warp_sum(before);
  if (lane == 0) {
    kept_before[warp] = before;
    kept_of[warp] = __popc(kept);
  }
  __syncthreads();  // all warps have counted
  const int64_t in_block = __shfl_sync(gpu::kFullMask, gpu::sum_before(kept_of[lane], lane), warp);
  const int64_t rank = gpu::warp_sum(kept_before[lane]) + in_block + gpu::count_before(kept, lane);
  if (is_kept) keep[rank] = index_of(by_score[place]);
  if (place == n - 1) *count = rank + is_kept;
}

// Merges sorted groups of `run` keys in keys[0] with the help of keys[1]; returns where the sorted keys are.
template <class Key>
Key* merge_all(Key* const (&keys)[2], int64_t n, int64_t run, Stream stream) {
  int from = 0;
  for (; run < n; run *= gpu::kMergedRuns) {
    gpu::launch(merge_kernel<Key>, dim3(gpu::rank_blocks(n)), dim3(gpu::kRankThreads), 0, stream, keys[from], n, run,
                keys[1 - from]);
    from = 1 - from;
  }
  return keys[from];
}

}  // namespace

size_t workspace_bytes(DType dtype, int64_t n, bool has_classes) {
  return dtype == DType::f64 ? Workspace<double>(nullptr, n, has_classes).bytes
                             : Workspace<float>(nullptr, n, has_classes).bytes;
}

void nms_cuda(DType dtype, const void* boxes, const void* scores, const int64_t* class_ids, int64_t n,
              double iou_threshold, void* workspace, int64_t* keep, int64_t* count, Stream stream) {
  gpu::dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = gpu::Compute<T>;
    const Workspace<C> w(workspace, n, class_ids != nullptr);
    const dim3 rank_threads(gpu::kRankThreads), ranks(gpu::rank_blocks(n));
    const int64_t group = n <= kFew ? kFew : gpu::kRankStage;
    // At least one block, which sets the count, even without boxes.
    gpu::launch(rank_scores_kernel<T>, dim3(max_of(ranks.x, 1u)), rank_threads, 0, stream,
                static_cast<const T*>(scores), n, group, w, keep, count);
    const ScoreKey<C>* const by_score = merge_all(w.by_score, n, group, stream);
    Sorted<T> sorted{static_cast<const T*>(boxes), class_ids, by_score, nullptr, n};
    if (w.grouped) {
      gpu::launch(rank_classes_kernel<C>, ranks, rank_threads, 0, stream, class_ids, by_score, n, group, w.by_class[0]);
      ScoreKey<C>* const keys = w.by_score[by_score == w.by_score[0]];  // the one that is free now
      sorted = {sorted.boxes, nullptr, keys, merge_all(w.by_class, n, group, stream), n};
      gpu::launch(cut_kernel<ScoreKey<C>>, dim3(unsigned((n + gpu::kRankThreads - 1) / gpu::kRankThreads)),
                  rank_threads, 0, stream, sorted.by_class, by_score, n, keys, w.tiles, w.counts);
    }
    const int64_t tiles = tiles_for(n);
    for (int64_t wave = 0; wave * kChunk < tiles; ++wave) {
      // Columns are shared out among blocks enough to fill the device, if there are so many.
      const int64_t in_chunk = min_of(tiles - wave * kChunk, int64_t(kChunk));
      const int64_t splits = min_of(wave * kChunk + in_chunk, kChunk * kChunk / in_chunk);
      const dim3 grid = !w.grouped  ? dim3(unsigned(in_chunk), unsigned(splits))
                        : wave == 0 ? dim3(512, 4)
                                    : dim3(64, 16);
      gpu::launch(chunk_kernel<T>, grid, dim3(kThreads), 0, stream, sorted, w, wave, C(iou_threshold), keep, count);
    }
    if (w.grouped) {
      gpu::launch(compact_kernel<ScoreKey<C>>, dim3(unsigned((n + kCompactThreads - 1) / kCompactThreads)),
                  dim3(kCompactThreads), 0, stream, w.kept, by_score, n, keep, count);
    }
  });
}

}  // namespace ssd_ext::nms

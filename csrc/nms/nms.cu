#include "nms/nms.h"

#include "common/gpu_last_block.h"
#include "common/gpu_rank.h"
#include "common/gpu_tile.h"

// 1. Sort:     boxes are put in the order of visiting, and where they are many and of several classes grouped by class
//              and cut into tiles of kTile.
// 2. Compare:  which boxes of a chunk, up to kChunk tiles of a group, overlap an earlier one of the chunk, and which
//              boxes of it and of later chunks overlap one that is kept of the chunk before. All chunks that are first
//              in their group at once, then all second ones ...
// 3. Sweep:    the last block to compare a chunk decides it from the bits of step 2, of the boxes that are left a few
//              hundred at a time.
// 4. Compact:  the kept boxes of all groups are put in the order of visiting.
// Memory stays linear in n: scratch of about 50 bytes a box and at most 512 KB, or 370 where they are grouped. The host
// never learns how many boxes are kept or how many classes there are.
//
// Ladder: as a CUDA graph, nms of 1,000 and of 20,000 boxes, batched_nms of 20,000 in 80 classes.
//   48, 245, 335 us  Predicted for an H100: torch's sort, a gather, then for each chunk in the order of visiting three
//                    launches: compare, sweep in one block with two barriers a tile, suppress all later boxes.
//   18, 308,  96 us  Measured on an H200, of 8, 95, 40 predicted: ranks by counting, on all multiprocessors, instead of
//                    a sort of 15 launches (or of one warp); no gather; one launch a chunk; four tiles a step of the
//                    sweep; rough comparisons; groups side by side. Of 30 us a chunk the sweep was 15 to 18: it read
//                    512 KB of bits, most of them 0, and most of them of boxes already removed. Comparing took three
//                    times the instructions of the rough comparisons; the rest, by counting code, were quotients, which
//                    nearly every warp took for some pair, and votes. Rejected: one launch of one block that keeps a
//                    list instead of bits, 12 to 35 us for 1,000 boxes, as one multiprocessor compares 8 pairs a clock.
//   26, 189,  85 us  Measured on an H200, of 14, 120, 70 predicted: words of bits are written and read only where one
//                    is set, and only boxes that are left take part in the sweep: after the first chunk of 20,000
//                    boxes a tenth to a third. A second bound settles nearly all quotients; a row that was removed is
//                    compared no more; while a chunk is decided, other blocks compare all later tiles with what the
//                    chunk before kept, so that a chunk begins with few boxes left; searches of a merge go side by
//                    side; 128-bit keys are compared by their difference. Of the 41,000 clocks of 1,000 boxes' chunk
//                    the sweep took 26,000: in a first chunk rows are dense, so that 32 lanes of a warp changed the
//                    same word by atomics, and most rows met more tiles than had been read in time.
//   23, 169,  81 us  Measured on an H200, of 18, 160, 65 predicted: where all boxes take part, what a warp votes is
//                    stored as the half word that it is, and nothing is listed; settled tiles are looked up before the
//                    rounds, eight words at once; words are found and read without branches; a tile is read together
//                    with its first column. Rejected: settling each warp by itself between the rounds, which saves
//                    hardly one.
//   20, 160,  81 us  Measured on an H100, where the version before took 22, 164 and 76, of 18 and 145 predicted: 512
//                    threads, so that a step decides twice as many boxes; a round keeps what a warp votes, not what
//                    each lane holds, and takes 64 instructions instead of 85; a row's word is written by a lane of its
//                    own. Rejected: two blocks a multiprocessor, 20 and 175 us; grouped, the grid of twice as many
//                    warps that came of the larger blocks, 87 us, and smaller ones for later chunks, with which two
//                    classes take 244 to 320 us instead of 224.
// What binds: at 1,000 boxes latency, mostly of chains of instructions, six clocks each. Of 30,000 clocks the first
// warp compares for 6,000, all warps and the ticket take 4,400 more, the sweep begins its first step 2,500 later, and
// two steps take 7,000 each. At 20,000 boxes ten chunks one after another; grouped, ranks and merges of keys of 128
// bits, and nine launches for later chunks that no group may have.
namespace ssd_ext::nms {
namespace {

using gpu::ballot_tile;
using gpu::kTile;
using gpu::Word;

constexpr int kChunk = 32;  // tiles that are decided in one launch
constexpr int64_t kChunkBoxes = kChunk * kTile;
constexpr int64_t kFew = 4096;  // boxes that are sorted in one launch, and not grouped by class
constexpr int kThreads = 512;   // of chunk_kernel
constexpr int kWarps = kThreads / gpu::kWarp;
constexpr int kHeld = 4;         // words that a thread holds in registers
constexpr int kMore = 8;         // that it reads at once if there are more
constexpr int kRowsOfWarp = 16;  // of a tile that a warp compares with a column
constexpr int kWarpsOfColumn = kTile / kRowsOfWarp;
constexpr int kColumns = kWarps / kWarpsOfColumn;  // that a block compares at once
template <class C>
constexpr int kRowsAtOnce = sizeof(C) == 8 ? 1 : 2;  // as registers allow
constexpr int64_t kBlocks = 132;                     // of chunk_kernel, that a large GPU runs at a time
// Grouped, blocks go from tile to tile: of the first chunks, and of later ones, which are seldom any.
constexpr unsigned kFirstBlocks = 512, kLaterBlocks = 32, kLaterSplits = 4;
constexpr int kCompactThreads = gpu::kWarp * gpu::kWarp;
static_assert(kChunk == gpu::kWarp && 2 * kRowsOfWarp <= 32);

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

// For candidates whose rough intersection exceeds the sum of their shares. Mostly it exceeds that by so much, more than
// the 1e-5 by which shares are lowered and all roundings, that the quotient exceeds the threshold for certain.
template <class C>
__device__ __forceinline__ bool overlaps(const Candidate<C>& a, const Candidate<C>& b, C shares, C threshold) {
  if (a.class_id != b.class_id) return false;
  const bool surely = shares > OverlapShares<C>::kTiny && gpu::rough_intersection(a.box, b.box) > shares * C(1 + 4e-5);
  return surely || gpu::overlaps(a.box, b.box, threshold);
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
  int kept;  // boxes of the group that are kept before the chunk
  int from;  // columns of them with which all later boxes have been compared

  __device__ int rows() const { return int(min_of(kChunkBoxes, group.end - begin)); }
  __device__ int tiles() const { return int(tiles_for(rows())); }
  __device__ bool is_last() const { return begin + rows() == group.end; }

  // What a tile is compared with: columns of kTile boxes, first those kept of the group before the chunk, then the
  // chunk's own up to the tile itself. Tiles from kChunk on are of later chunks.
  __device__ int kept_columns() const { return int(tiles_for(kept)); }
  __device__ int columns(int tile) const { return kept_columns() + (tile < kChunk ? tile + 1 : 0); }

  // Blocks that have something to compare, if each tile's columns are shared out among `splits` blocks. For whole
  // warps to call.
  __device__ unsigned blocks(int splits) const {
    const int tile = threadIdx.x % gpu::kWarp;
    const int sharers = min_of((columns(tile) - from + kColumns - 1) / kColumns, splits);
    return gpu::warp_sum(tile < tiles() ? unsigned(sharers) : 0u);
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
  Word* removed_before;      // [n] boxes of the tile at a position that are removed before its chunk's turn
  unsigned* met_tiles;       // [n] bits of the chunk's tiles that have an earlier box which it overlaps
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
    removed_before = scratch.take<Word>(all);
    met_tiles = scratch.take<unsigned>(all);
    earlier = scratch.take<Word>((grouped || n < kChunkBoxes ? all : kChunkBoxes) * kChunk);
    tiles = scratch.take<Tile>(if_grouped);
    kept = scratch.take<FourFlags>((if_grouped + 3) / 4);
    counts = scratch.take<Counts>(1);
    bytes = scratch.bytes;
  }

  __device__ uint8_t& is_kept(int64_t place) const { return kept[place / 4].of[place % 4]; }

  // Of each box of the chunk, which boxes of the chunk's tile `column` it overlaps that are before it. Written only
  // where there are any, as met_tiles tells: that is seldom.
  __device__ Word* earlier_of(const Chunk& chunk, int column) const {
    return earlier + (grouped ? chunk.begin * kChunk : 0) + column * chunk.rows();
  }
};

// A Word that several warps write: shared memory has no atomics of 64 bits.
struct alignas(8) Halves {
  unsigned of[2];

  // Not 0 if one of these is among `bits`.
  __device__ unsigned met_by(Word bits) const {
    return (unsigned(bits) & of[0]) | (unsigned(bits >> gpu::kWarp) & of[1]);
  }
};

// What the threads of chunk_kernel tell each other.
template <class C>
struct Shared {
  alignas(16) C boxes[kTile * 4];  // of the tile
  C shares[kTile];
  int64_t class_ids[kTile];
  unsigned alive[kTile / gpu::kWarp];  // bits of the boxes that may be kept: their score is a number
  uint16_t rows[kChunkBoxes];          // of the chunk that no box kept before it removes, in order
  Halves kept[2][kChunk];     // boxes of each tile that are kept as far as is known: now, and in the next round
  unsigned votes[2][kWarps];  // the same of a step, by threads
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
    w.removed_before[i] = 0;
    w.met_tiles[i] = 0;
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
__global__ void __launch_bounds__(gpu::kRankThreads, 4)
    merge_kernel(const Key* __restrict__ keys, int64_t n, int64_t run, Key* __restrict__ merged) {
  __shared__ int smaller[gpu::kRankWarps][gpu::kRanked];
  gpu::merge_runs(keys, n, run, smaller, merged);
}

// Cuts groups into tiles, in any order of groups. One thread a position; the first of a group cuts it.
template <class Key>
__global__ void __launch_bounds__(gpu::kRankThreads) cut_kernel(const ClassKey* __restrict__ by_class,  // [n]
                                                                const Key* __restrict__ by_score,       // [n]
                                                                int64_t n,
                                                                Key* __restrict__ keys,    // [n] by position
                                                                Tile* __restrict__ tiles,  // [n]
                                                                Counts* __restrict__ counts) {
  const int64_t q = gpu::global_index();
  if (q >= n) return;
  const ClassKey own = by_class[q], class_key = own >> 32;
  keys[q] = by_score[index_of(own)];
  if (q > 0 && by_class[q - 1] >> 32 == class_key) return;
  const Group group{q, gpu::lower_bound(by_class, q, n, (class_key + 1) << 32)};
  const int64_t boxes = group.end - q;
  Tile* const slots = tiles + atomicAdd(&counts->tiles, unsigned(tiles_for(boxes)));
#pragma unroll 1
  for (int64_t t = 0; t < tiles_for(boxes); ++t) slots[t] = {q + t * kTile, group};
  if (boxes > kChunkBoxes) atomicMax(&counts->longest, int(boxes));
}

// ---- a chunk of each group ------------------------------------------------------------------------

// Compares a tile with its columns, of which `sharers` blocks take kColumns each in turn. Kept boxes remove what they
// overlap; of those of the chunk bits are written. Each warp holds a column, two boxes a lane, and compares its share
// of the tile.
template <class T>
__device__ void compare_tile(const Sorted<T>& in, const Workspace<gpu::Compute<T>>& w, const Chunk& chunk, int tile,
                             int share, int sharers, gpu::Compute<T> threshold, Shared<gpu::Compute<T>>& shared) {
  using C = gpu::Compute<T>;
  using Key = ScoreKey<C>;
  const int thread = threadIdx.x, lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;
  const int kept_columns = chunk.kept_columns(), columns = chunk.columns(tile);
  const OverlapShares<C> shares(threshold);
  Word* const removed_before = &w.removed_before[chunk.begin + tile * kTile];

  // A column is filled up with its last box, which changes no result: that is kept anyway, or its further bits belong
  // to no box.
  Candidate<C> low, high;
  const auto read_column = [&](int column) {
    const bool is_kept = column < kept_columns;
    const Key* const keys = is_kept ? w.kept_keys + chunk.group.start : in.keys + chunk.begin;
    const int first = (is_kept ? column : column - kept_columns) * kTile,
              last = (is_kept ? chunk.kept : chunk.rows()) - 1;
    const Key low_key = keys[min_of(first + lane, last)], high_key = keys[min_of(first + gpu::kWarp + lane, last)];
    low = in.candidate(low_key);
    high = in.candidate(high_key);
  };
  const int64_t position = chunk.begin + tile * kTile + thread % kTile;
  const Key key = in.keys[min_of(position, chunk.group.end - 1)];
  const Word removed = *removed_before;
  int column = chunk.from + share * kColumns + warp / kWarpsOfColumn;
  if (column < columns) read_column(column);
  if (thread < kTile) {  // its boxes are under way before those of the column are used
    const Candidate<C> c = in.candidate(key);
    gpu::store_four(shared.boxes, thread, c.box.x1, c.box.y1, c.box.x2, c.box.y2);
    shared.shares[thread] = shares.of_query(c.box);
    shared.class_ids[thread] = c.class_id;
    const bool is_alive = position < chunk.group.end && !is_nan<C>(key) && !(removed >> thread & 1);
    const unsigned alive = __ballot_sync(gpu::kFullMask, is_alive);
    if (lane == 0) shared.alive[warp] = alive;
  }
  __syncthreads();  // the tile is there

  const int first_row = warp % kWarpsOfColumn * kRowsOfWarp;
  constexpr unsigned kRows = (1u << kRowsOfWarp) - 1;
  unsigned alive = shared.alive[first_row / gpu::kWarp] >> (first_row % gpu::kWarp) & kRows;
  while (column < columns && alive) {
    const C low_share = shares.of(low.box), high_share = shares.of(high.box);
    unsigned hits = 0;  // of the row r: bit r, with the low box, and bit kRowsOfWarp + r, with the high one
    for (unsigned rest = alive; rest;) {
#pragma unroll
      for (int e = 0; e < kRowsAtOnce<C>; ++e) {
        const unsigned bit = rest & -rest;  // 0 if no row is left
        const int row = first_row + max_of(__ffs(int(rest)), 1) - 1;
        rest &= rest - 1;
        const Box<C> box = gpu::load_box(shared.boxes, row);
        const C share = shared.shares[row];
        if (gpu::rough_intersection(box, low.box) > share + low_share) hits |= bit;
        if (gpu::rough_intersection(box, high.box) > share + high_share) hits |= bit << kRowsOfWarp;
      }
    }
    for (unsigned rest = hits; rest; rest &= rest - 1) {
      const unsigned bit = __ffs(int(rest)) - 1, row = first_row + bit % kRowsOfWarp;
      const Candidate<C> one{gpu::load_box(shared.boxes, row), shared.class_ids[row]};
      Candidate<C> other = low;
      C share = low_share;
      if (bit >= kRowsOfWarp) {
        other = high;
        share = high_share;
      }
      if (!overlaps(one, other, shared.shares[row] + share, threshold)) hits &= ~(1u << bit);
    }
    const unsigned met = gpu::warp_or(hits), met_rows = (met | met >> kRowsOfWarp) & kRows;
    const int own = column - kept_columns;
    if (own < 0) {
      alive &= ~met_rows;
    } else {
      Word earlier = 0;  // of the row of this lane
      for (unsigned rest = met_rows; rest; rest &= rest - 1) {
        const int r = __ffs(int(rest)) - 1;
        const Word bits = ballot_tile(hits >> r & 1, hits >> (kRowsOfWarp + r) & 1);
        if (lane == r) earlier = bits;
      }
      const int row = first_row + lane;
      if (own == tile) earlier &= (Word(1) << row % kTile) - 1;
      if (earlier != 0) {
        w.earlier_of(chunk, own)[tile * kTile + row] = earlier;
        atomicOr(&w.met_tiles[chunk.begin + tile * kTile + row], 1u << own);
      }
    }
    column += sharers * kColumns;
    if (column < columns) read_column(column);
  }
  if (lane == 0 && alive != kRows) {
    Word* const to = tile < kChunk ? &w.states[chunk.begin + tile * kTile].removed : removed_before;
    atomicOr(to, Word(kRows & ~alive) << first_row);
  }
}

// Boxes of the chunk that one of it overlaps, of up to kWords tiles.
template <int kWords>
struct Earlier {
  unsigned tiles[(kWords + 3) / 4];  // a byte each
  Word boxes[kWords];

  // Takes the last ones of met_tiles from earlier_of() the chunk's first column. All are read before one is used.
  __device__ __forceinline__ Earlier(const Word* words, unsigned rows, int row, unsigned& met_tiles)
      : tiles{}, boxes{} {
#pragma unroll
    for (int e = 0; e < kWords; ++e) {
      const unsigned tile = unsigned(kChunk - 1 - __clz(int(met_tiles))) % kChunk;
      if (met_tiles) boxes[e] = gpu::load_written(words + (tile * rows + unsigned(row)));
      tiles[e / 4] |= tile << (8 * (e % 4));
      met_tiles &= ~(1u << tile);
    }
  }

  __device__ __forceinline__ bool meet(const Halves* kept) const {
    unsigned met[2] = {};  // a shorter chain than one
#pragma unroll
    for (int e = 0; e < kWords; ++e) met[e % 2] |= kept[tiles[e / 4] >> (8 * (e % 4)) & 255].met_by(boxes[e]);
    return (met[0] | met[1]) != 0;
  }
};

// Decides which boxes of a chunk are kept, from what compare_tile wrote, and writes those: to `keep`, or as flags if
// groups are yet to be compacted; and for the next chunk of the group.
//
// A step decides kThreads of the boxes that nothing kept before the chunk removes, in a few rounds: each box is kept if
// no earlier one that it overlaps was kept in the round before. A box is right at the latest one round after all before
// it are; where a round changes nothing, all are.
template <class T>
__device__ void sweep_chunk(const Sorted<T>& in, const Workspace<gpu::Compute<T>>& w, const Chunk& chunk,
                            Shared<gpu::Compute<T>>& shared, int64_t* keep, int64_t* count) {
  using Key = ScoreKey<gpu::Compute<T>>;
  const int thread = threadIdx.x, lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;
  if (warp == 0) shared.kept[0][lane] = shared.kept[1][lane] = {0, 0};
  // Each warp lists the rows of its share of the tiles, if not all are left, as in a first chunk they are.
  const int boxes = min_of(max_of(chunk.rows() - lane * kTile, 0), kTile);  // of the tile of this lane
  const Word listed =
      boxes == 0 ? 0
                 : ~gpu::load_written(&w.states[chunk.begin + lane * kTile].removed) & (~Word(0) >> (kTile - boxes));
  const int listed_before = gpu::sum_before(__popcll(listed), lane);
  const int rows = __shfl_sync(gpu::kFullMask, listed_before + __popcll(listed), kChunk - 1);
  const int chunk_rows = chunk.rows();
  const bool are_all = rows == chunk_rows;
#pragma unroll 1
  for (int tile = warp; tile < kChunk && !are_all; tile += kWarps) {
    const Word of_tile = __shfl_sync(gpu::kFullMask, listed, tile);
    const unsigned low = unsigned(of_tile), high = unsigned(of_tile >> gpu::kWarp);
    uint16_t* const to = shared.rows + __shfl_sync(gpu::kFullMask, listed_before, tile);
    const int row = tile * kTile + lane;
    if (low >> lane & 1) to[gpu::count_before(low, lane)] = uint16_t(row);
    if (high >> lane & 1) to[__popc(low) + gpu::count_before(high, lane)] = uint16_t(row + gpu::kWarp);
  }
  __syncthreads();  // the rows are listed

  const auto row_at = [&](int i) { return i >= rows ? -1 : are_all ? i : int(shared.rows[i]); };
  const auto row_of = [&](int step) { return row_at(step * kThreads + thread); };
  const unsigned* const met_tiles_of_rows = w.met_tiles + chunk.begin;
  const Word* const words = w.earlier_of(chunk, 0);
  const auto met_tiles_of = [&](int row) { return row < 0 ? 0u : gpu::load_written(met_tiles_of_rows + row); };
  // Most of what a step needs is read while the one before it is decided.
  int row = row_of(0), kept = chunk.kept, now = 0;
  unsigned met_tiles = met_tiles_of(row), next_met_tiles = met_tiles_of(row_of(1));
  Earlier<kHeld> earlier(words, chunk_rows, row, met_tiles);
  for (int step = 0; step * kThreads < rows; ++step) {
    // None of this step is kept yet, and the tiles before it are settled.
    const unsigned settled = (1u << (row_at(step * kThreads) / kTile)) - 1;
    bool is_open = row >= 0 && !earlier.meet(shared.kept[now]);
    for (unsigned rest = met_tiles & settled; rest && is_open;) {
      is_open = !Earlier<kMore>(words, chunk_rows, row, rest).meet(shared.kept[now]);
    }
    met_tiles &= ~settled;

    const Key key = row < 0 ? Key(0) : in.keys[chunk.begin + row];
    const int next_row = row_of(step + 1);
    const Earlier<kHeld> next_earlier(words, chunk_rows, next_row, next_met_tiles);
    const unsigned after_next = met_tiles_of(row_of(step + 2));

    // Votes of three rounds: two copies of what is kept take turns, so that the next one is two rounds old.
    unsigned votes = 0, last = 0, before_last;
    Halves* const of_row = &shared.kept[0][unsigned(row) / kTile % kChunk];
    for (bool found = is_open;;) {
      now = 1 - now;
      before_last = last;
      last = votes;
      votes = __ballot_sync(gpu::kFullMask, found);
      unsigned* const half = &of_row[now * kChunk].of[unsigned(row) / gpu::kWarp % 2];
      if (lane == 0) shared.votes[now][warp] = votes;
      if (are_all) {  // a warp has half a tile
        if (lane == 0 && row >= 0) *half = votes;
      } else if ((votes ^ before_last) >> lane & 1) {
        atomicXor(half, 1u << (row % gpu::kWarp));
      }
      if (!__syncthreads_or(votes != last)) break;  // the round's boxes are known
      found = is_open & !earlier.meet(shared.kept[now]);
      for (unsigned rest = met_tiles; rest && found;) {
        found = !Earlier<1>(words, chunk_rows, row, rest).meet(shared.kept[now]);
      }
    }

    const unsigned of_warp = lane < kWarps ? __popc(shared.votes[now][lane]) : 0;
    const int rank = kept + int(gpu::warp_sum(lane < warp ? of_warp : 0) + gpu::count_before(votes, lane));
    kept += int(gpu::warp_sum(of_warp));
    if (votes >> lane & 1) {
      const int64_t position = chunk.begin + row;
      if (w.grouped) {
        w.is_kept(index_of(in.by_class[position])) = 1;
      } else {
        keep[rank] = index_of(key);
      }
      if (!chunk.is_last()) w.kept_keys[chunk.group.start + rank] = key;
    }
    row = next_row;
    earlier = next_earlier;
    met_tiles = next_met_tiles;
    next_met_tiles = after_next;
  }
  if (thread > 0) return;
  if (!chunk.is_last()) w.states[chunk.begin + chunk.rows()].kept = kept;
  if (!w.grouped) *count = kept;
}

// Decides the chunk number `wave` of each group that has one. Block (x, y) compares every gridDim.x-th tile of them
// with its share of the columns; the last block to be done with a chunk decides it. Meanwhile blocks (x, y, 1) compare
// all later tiles with what has been kept lately.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    chunk_kernel(Sorted<T> in, Workspace<gpu::Compute<T>> w, int64_t wave, gpu::Compute<T> threshold,
                 int64_t* __restrict__ keep,  // [n]
                 int64_t* __restrict__ count) {
  __shared__ Shared<gpu::Compute<T>> shared;
  if (w.grouped && wave > 0 && w.counts->longest <= wave * kChunkBoxes) return;
  const bool is_current = blockIdx.z == 0;
  const unsigned share = is_current ? blockIdx.y : 0, sharers = is_current ? gridDim.y : 1;
  const unsigned blocks = is_current ? gridDim.x : gridDim.x * gridDim.y;
  const unsigned tiles = w.grouped    ? w.counts->tiles
                         : is_current ? gridDim.x
                                      : unsigned(tiles_for(in.n) - wave * kChunk);
  for (unsigned t = blockIdx.x + (blockIdx.y - share) * gridDim.x; t < tiles; t += blocks) {
    const Tile tile = w.grouped ? w.tiles[t] : Tile{(wave * kChunk + t) * kTile, {0, in.n}};
    const int64_t begin = tile.group.start + wave * kChunkBoxes;
    if (tile.first < begin || (tile.first < begin + kChunkBoxes) != is_current) continue;
    const int kept = wave > 0 ? w.states[begin].kept : 0;
    const int compared = wave > 0 ? w.states[begin - kChunkBoxes].kept : 0;
    const Chunk chunk{tile.group, begin, kept, compared / kTile};
    const int tile_of_chunk = int((tile.first - begin) / kTile);
    if (chunk.from + int(share) * kColumns >= chunk.columns(tile_of_chunk)) continue;
    compare_tile(in, w, chunk, tile_of_chunk, share, sharers, threshold, shared);
    if (!is_current) {
      __syncthreads();  // everybody has read the tile
      continue;
    }
    if (!gpu::is_last_block(&w.states[begin].ticket, chunk.blocks(sharers))) continue;
    sweep_chunk(in, w, chunk, shared, keep, count);
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
      // No more blocks than run at a time: each finds out for itself which rows are removed.
      const int64_t in_chunk = min_of(tiles - wave * kChunk, int64_t(kChunk));
      const int64_t splits = min_of((wave * kChunk + in_chunk + kColumns - 1) / kColumns, kBlocks / in_chunk);
      const unsigned turns = wave > 0 && (wave + 1) * kChunk < tiles ? 2 : 1;  // of this chunk and of later ones
      const dim3 grid = !w.grouped  ? dim3(unsigned(in_chunk), unsigned(splits), turns)
                        : wave == 0 ? dim3(kFirstBlocks)
                                    : dim3(kLaterBlocks, kLaterSplits, turns);
      gpu::launch(chunk_kernel<T>, grid, dim3(kThreads), 0, stream, sorted, w, wave, C(iou_threshold), keep, count);
    }
    if (w.grouped) {
      gpu::launch(compact_kernel<ScoreKey<C>>, dim3(unsigned((n + kCompactThreads - 1) / kCompactThreads)),
                  dim3(kCompactThreads), 0, stream, w.kept, by_score, n, keep, count);
    }
  });
}

}  // namespace ssd_ext::nms

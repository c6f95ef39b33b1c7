// Ladder: microseconds on an H200, SSD300, B = 32, C = 81, float32; measured, unless called a prediction.
//
// rank_kernel, which reads all logits, 90.5 MB: 22 at least, 31 on an H100.
//   85-110  (predicted) half a warp a row, each logit loaded when it is needed: 1 load in flight, 423 instructions a
//           pair of rows
//   40      (predicted) logits, background and label of a row loaded before the first is used: 7 loads in flight, 239
//           instructions
//   37      (predicted) exponentials without bounds, scaled in one step, where none can over- or underflow: 224
//   32      a quarter of a warp a row, so that fewer instructions surround the exponentials: 180, 12 loads in flight
//   Now instructions bind it: four of five clocks issue one. Memory is busy for three clocks of five.
// settle_kernel, a block an image, a quarter shorter at B = 1.
//   25      a radix selection; warps share out their kept rows; the last block ends the sums
//   20      keys in registers, bisected. Clocks: 4,300 to load and look at 105 KB, 9,500 for 16 rounds, 3,100 to mark,
//           9,900 for the terms, of which each warp has a few, 1,400 for sums, 2,100 for the ticket, 6,300 for the end
//   16      keys split a thousandfold in two rounds (3,500); full warps compute the terms (about 6,000 with what waits
//           for them); no 64-bit arithmetic for each prior (1,600 to mark); one warp ends it (4,100)
//   Now the loads (4,000 to 6,500) and the latency of its steps bind it: several blocks an image would help, which
//   takes clusters.
// logits_gradient_kernel, which writes 90.5 MB: 20 at least, 31 on an H100.
//   50-58   (predicted) half a warp a row, stores of 64 bytes that no sector begins with
//   32      tiles of 64 rows are cleared 16 bytes at a time, then their few kept rows written
//   Now it waits at its barrier for the first warp, which lists the kept rows.
#include "multibox_loss/multibox_loss.h"

#include "common/gpu_last_block.h"
#include "common/gpu_select.h"

namespace ssd_ext::multibox_loss {
namespace {

#include "multibox_loss/rank.inl"

constexpr int kThreads = 256;

static_assert(kSums == gpu::kSelectThreads && gpu::kWarp * gpu::kWarp == kSums, "a thread has one partial sum");

template <class T>
using Rank = IntOf<gpu::Compute<T>>;
template <class C>
constexpr IntOf<C> kAbsent = std::numeric_limits<IntOf<C>>::min();

// ---- one row of logits, by a group of neighbouring lanes -----------------------------------------

// Adds each half of the values to the other, down to one, without an index that is not known in advance.
template <int kHalf, class C>
__device__ __forceinline__ void fold(C* values) {
  if constexpr (kHalf > 0) {
#pragma unroll
    for (int j = 0; j < kHalf; ++j) values[j] += values[j + kHalf];
    fold<kHalf / 2>(values);
  }
}

// Lane l of kGroup has the foreground classes 1 + l, 1 + l + kGroup, ... and loads kEach of them before it uses the
// first. Unless kSure < 0 there are no more: they lie side by side and stay in registers, and each lane has kSure of
// them for certain. All lanes of a warp call these functions together.
template <class Stored, int kGroup, int kEach, int kSure = -1>
class LogitsRow {
 public:
  using T = Stored;
  using C = gpu::Compute<T>;
  static constexpr int kLanes = kGroup;
  static constexpr bool kInRegisters = kSure >= 0;

  __device__ LogitsRow(const T* x, int64_t stride, int64_t classes)
      : x_(x), stride_(stride), classes_(unsigned(classes)), lane_(threadIdx.x % kLanes) {
    if constexpr (kInRegisters) load(1, values_);
  }

  __device__ C operator[](unsigned c) const { return C(kInRegisters ? x_[c] : x_[c * stride_]); }

  // Whether foreground_near() may be called.
  __device__ bool is_near(C base) const {
    bool near = true;
    for_each_class([&](int j, unsigned c, C x) { near &= !is_class(j, c) || std::abs(x - base) <= kNearExponent; });
    return near;
  }

  // Sum over the foreground classes c of exp(x[c] - base), in the order that multibox_loss.h documents.
  __device__ C foreground_near(C base) const {
    return sum([&](int j, unsigned c, C x) { return is_class(j, c) ? exp_near(x - base) : C(0); });
  }
  __device__ C foreground(C base) const {
    return sum([&](int, unsigned, C x) { return exp(x - base); });
  }
  __device__ C foreground_without(unsigned omitted, C base) const {
    return sum([&](int, unsigned c, C x) { return exp((c == omitted ? kNothing : x) - base); });
  }

  // The maximum of all classes.
  __device__ C top(C background) const {
    C top = background;
    for_each_class([&](int, unsigned, C x) { top = max_of(x, top); });
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      top = max_of(__shfl_xor_sync(gpu::kFullMask, top, offset), top);
    }
    return top;
  }

  // f(j, c, x) for the classes c of this lane, in rising order, padded with -inf to a whole number of steps.
  template <class F>
  __device__ void for_each_class(const F& f) const {
    const auto visit = [&](unsigned first, const C* values) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) f(j, first + j * kLanes + lane_, values[j]);
    };
    if constexpr (kInRegisters) {
      visit(1, values_);
    } else {
#pragma unroll 1
      for (unsigned first = 1; first < classes_; first += kLanes * kEach) {
        C values[kEach];
        load(first, values);
        visit(first, values);
      }
    }
  }

 private:
  static constexpr C kNothing = -std::numeric_limits<C>::infinity();  // of a missing class: its exponential is 0

  __device__ bool is_class(int j, unsigned c) const { return j < kSure || c < classes_; }

  __device__ void load(unsigned first, C* values) const {
    const int64_t stride = kInRegisters ? 1 : stride_;
    int64_t at = (first + lane_) * stride;
#pragma unroll
    for (int j = 0; j < kEach; ++j, at += kLanes * stride) {
      values[j] = is_class(j, first + j * kLanes + lane_) ? C(x_[at]) : kNothing;
    }
  }

  template <class F>
  __device__ C sum(const F& term) const {
    constexpr int parts = kWays / kLanes;  // partial sums of a lane
    C sums[parts] = {};
    for_each_class([&](int j, unsigned c, C x) { sums[j % parts] += term(j, c, x); });
    fold<parts / 2>(sums);
    C total = sums[0];
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(gpu::kFullMask, total, offset);
    return total;
  }

  const T* x_;
  int64_t stride_;
  unsigned classes_, lane_;
  C values_[kInRegisters ? kEach : 1];
};

// Visits the rows of this block, one for each group of kLanes: f(image, prior, inside) by all threads together. Beyond
// the last prior that is the last one again, and `inside` false.
template <int kLanes, class F>
__device__ __forceinline__ void for_rows(const mining::Mining& sizes, const F& f) {
  const unsigned prior = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes, n = unsigned(sizes.num_priors);
  const unsigned image = blockIdx.z * gridDim.y + blockIdx.y;
  if (image < unsigned(sizes.batch)) f(image, min_of(prior, n - 1), prior < n);
}

dim3 grid_for(const mining::Mining& sizes, int lanes) {
  constexpr unsigned most = 65535;  // of y and z
  const unsigned rows = kThreads / lanes, images = unsigned(sizes.batch), layers = (images + most - 1) / most;
  return dim3(unsigned((sizes.num_priors + rows - 1) / rows), images < most ? images : most, layers);
}

template <class Row>
__global__ void __launch_bounds__(kThreads, (Row::kInRegisters ? 24 : 16) / sizeof(typename Row::C))
    rank_kernel(const typename Row::T* __restrict__ logits, Strides strides,
                const int64_t* __restrict__ labels,  // [B, P]
                Loss loss, Rank<typename Row::T>* __restrict__ ranks, unsigned* __restrict__ ticket) {
  using C = typename Row::C;
  if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) *ticket = 0;  // for settle_kernel
  for_rows<Row::kLanes>(loss.mining, [&](int64_t image, unsigned prior, bool inside) {
    const int64_t first = image * loss.mining.num_priors;
    const Row row(logits + image * strides.image + prior * strides.prior, strides.last, loss.classes);
    const C background = row[0];
    const int64_t label = (labels + first)[prior];
    const unsigned y = uint64_t(label) < uint64_t(loss.classes) ? unsigned(label) : 0;
    bool all_near = false;
    if constexpr (Row::kInRegisters) all_near = __all_sync(gpu::kFullMask, (y == 0) & row.is_near(background));
    C at_label = background, sum;
    if (all_near) {
      sum = row.foreground_near(background);
    } else {
      if (y != 0) at_label = row[y];
      sum = row.foreground_without(y, at_label);
      if (y != 0) sum += exp(background - at_label);
    }
    sum += at_label - at_label;  // NaN if the label's logit is infinite
    const bool small = sum <= kLargestSum<C>;
    Rank<typename Row::T> rank = rank_of_sum(sum);
    if (__any_sync(gpu::kFullMask, !small)) {
      const C top = row.top(background);
      const auto large = rank_of_large_loss(top, at_label, row.foreground(top) + exp(background - top));
      if (!small) rank = large;
    }
    if (label >= loss.classes) rank = std::numeric_limits<decltype(rank)>::max();
    if (inside && threadIdx.x % Row::kLanes == 0) (ranks + first)[prior] = rank;
  });
}

// Priors lie closer together than classes.
bool is_class_major(const Strides& strides) { return strides.prior < strides.last; }

// f(the tag of the LogitsRow that suits this layout and number of classes). Few lanes have several classes each, which
// saves the instructions around them. float64 is too rare for more kernels.
template <class T, class F>
void with_row(const Strides& strides, int64_t classes, const F& f) {
  if (is_class_major(strides)) return f(gpu::Tag<LogitsRow<T, 4, 8>>{});
  if (strides.last != 1) return f(gpu::Tag<LogitsRow<T, 16, 4>>{});
  if constexpr (!std::is_same_v<T, double>) {
    if (classes <= 1 + 4 * 3) return f(gpu::Tag<LogitsRow<T, 4, 3, 0>>{});
    if (classes <= 1 + 4 * 5) return f(gpu::Tag<LogitsRow<T, 4, 5, 3>>{});
    if (classes <= 1 + 4 * 8) return f(gpu::Tag<LogitsRow<T, 4, 8, 5>>{});
    if (classes <= 1 + 8 * 8) return f(gpu::Tag<LogitsRow<T, 8, 8, 4>>{});
    if (classes <= 1 + 8 * 10) return f(gpu::Tag<LogitsRow<T, 8, 10, 8>>{});
    if (classes <= 1 + 16 * 8) return f(gpu::Tag<LogitsRow<T, 16, 8, 5>>{});
  }
  f(gpu::Tag<LogitsRow<T, 16, 8>>{});
}

// ---- mining and sums, a block an image ------------------------------------------------------------

// Of one image: priors that count, and their terms, undivided.
struct ImageSums {
  uint32_t positives, negatives;
  double loc, conf;
};

struct Workspace {
  ImageSums* sums;   // [B]
  unsigned* ticket;  // of the images that are summed; rank_kernel makes it 0
  size_t bytes;

  Workspace(void* base, const Loss& loss) {
    gpu::Scratch scratch{base};
    sums = scratch.take<ImageSums>(loss.mining.batch);
    ticket = scratch.take<unsigned>(1);
    bytes = scratch.bytes;
  }
};

// A [batch, num_priors, 4] tensor; `aligned`: each row is one access.
struct Fours {
  const char* data;
  DType dtype;
  Strides bytes;
  bool aligned;
};

template <class T>
__device__ __forceinline__ void load_four(const char* row, int64_t stride, bool aligned, double (&to)[4]) {
  gpu::Four<T> four;
  if (aligned) {
    four = *reinterpret_cast<const gpu::Four<T>*>(row);
  } else {
#pragma unroll
    for (int d = 0; d < 4; ++d) four.v[d] = *reinterpret_cast<const T*>(row + d * stride);
  }
#pragma unroll
  for (int d = 0; d < 4; ++d) to[d] = double(gpu::Compute<T>(four.v[d]));
}

__device__ __forceinline__ void load_four(const Fours& from, int64_t image, int64_t prior, double (&to)[4]) {
  const char* const row = from.data + image * from.bytes.image + prior * from.bytes.prior;
  switch (from.dtype) {
    case DType::f32:
      return load_four<float>(row, from.bytes.last, from.aligned, to);
    case DType::f64:
      return load_four<double>(row, from.bytes.last, from.aligned, to);
    case DType::f16:
      return load_four<__half>(row, from.bytes.last, from.aligned, to);
    default:
      return load_four<__nv_bfloat16>(row, from.bytes.last, from.aligned, to);
  }
}

// Smooth L1 of a positive prior.
__device__ __forceinline__ double loc_term(const Fours& deltas, const Fours& targets, int64_t image, int64_t prior,
                                           double beta) {
  double delta[4], target[4], term = 0;
  load_four(deltas, image, prior, delta);
  load_four(targets, image, prior, target);
#pragma unroll
  for (int d = 0; d < 4; ++d) term += smooth_l1(delta[d] - target[d], beta);
  return term;
}

struct Scalar {
  void* data;
  DType dtype;
};
__device__ void store_scalar(const Scalar& to, double value) {
  if (to.dtype == DType::f64) {
    *static_cast<double*>(to.data) = value;
  } else {
    *static_cast<float*>(to.data) = float(value);
  }
}

// warp_sum() of both.
__device__ __forceinline__ void add_up(double& loc, double& conf) {
#pragma unroll 1
  for (int offset = gpu::kWarp / 2; offset > 0; offset /= 2) {
    loc += __shfl_xor_sync(gpu::kFullMask, loc, offset);
    conf += __shfl_xor_sync(gpu::kFullMask, conf, offset);
  }
}

// Writes the divisors and the losses, of the sums of all images, by one warp.
__device__ void finish(const ImageSums* sums, const Loss& loss, int64_t* divisors, const Scalar& loc,
                       const Scalar& conf) {
  const int64_t batch = loss.mining.batch;
  const int lane = int(threadIdx.x) % gpu::kWarp;
  Counts all{};
#pragma unroll 1
  for (int64_t b = lane; b < batch; b += gpu::kWarp) all.positives += gpu::load_written(&sums[b].positives);
  all.positives = gpu::warp_sum(all.positives);
  if (all.positives == 0) {
#pragma unroll 1
    for (int64_t b = lane; b < batch; b += gpu::kWarp) all.negatives += gpu::load_written(&sums[b].negatives);
    all.negatives = gpu::warp_sum(all.negatives);
  }
  double all_loc = 0, all_conf = 0;  // of kWarp partial sums, from the one numbered kWarp * lane on
#pragma unroll 1
  for (int64_t first = 0; first < min_of<int64_t>(batch, kSums); first += gpu::kWarp) {
    double own_loc = 0, own_conf = 0;
#pragma unroll 1
    for (int64_t b = first + lane; b < batch; b += kSums) {
      const Counts image{gpu::load_written(&sums[b].positives), gpu::load_written(&sums[b].negatives)};
      const int64_t divisor = divisor_of(image, all, loss);
      divisors[b] = divisor;
      own_loc += gpu::load_written(&sums[b].loc) / double(divisor);
      own_conf += gpu::load_written(&sums[b].conf) / double(divisor);
    }
    add_up(own_loc, own_conf);
    if (first == lane * gpu::kWarp) {
      all_loc = own_loc;
      all_conf = own_conf;
    }
  }
  if (batch > gpu::kWarp) add_up(all_loc, all_conf);  // else all other partial sums are 0
  if (lane == 0) {
    store_scalar(loc, loss.alpha * all_loc);
    store_scalar(conf, all_conf);
  }
}

// Which priors of a thread's batch are kept: bit e of that number e.
struct Kept {
  unsigned all, positives;
};

// Ranks of the batch's priors that are not kept become the least.
template <class Keys, class Rank>
__device__ Kept keep(const Keys& keys, const typename Keys::Key* batch, int size,
                     const typename gpu::Cut<typename Keys::Key>::OfBatch& cut, Rank* ranks) {
  Kept kept{0, 0};
#pragma unroll
  for (int e = 0; e < Keys::kEach; ++e) {
    const int place = keys.place_of(e);
    const bool is_positive = batch[e] == gpu::kPositiveKey, is_kept = is_positive | cut.takes(batch[e], place);
    kept.all |= is_kept ? 1u << e : 0u;
    kept.positives |= is_positive ? 1u << e : 0u;
    if (place < size && !is_kept) ranks[place] = std::numeric_limits<Rank>::min();
  }
  return kept;
}

// The terms of a batch of priors. Few priors are kept, and terms take long: all kept ones are listed, so that full
// warps compute their terms, and whoever keeps a prior adds its own.
struct Terms {
  // Kept priors of each warp, and in the upper half those of them that are positive.
  unsigned of_warps[gpu::kSelectWarps];
  int prior[kSums];  // of a term, from the batch's first on
  double value[kSums];
};

// f(place, e) for the set bits e of `bits` whose places, counted from `place` on, are in 0 .. kSums - 1.
template <class F>
__device__ __forceinline__ void for_each_place(unsigned bits, int place, const F& f) {
#pragma unroll 1
  for (; bits; bits &= bits - 1, ++place) {
    if (unsigned(place) < unsigned(kSums)) f(place, __ffs(int(bits)) - 1);
  }
}

// Adds the terms of a thread's kept priors, in rising order, to its sums. All threads of the block call it.
template <class ConfTerm, class LocTerm>
__device__ __forceinline__ void add_terms(const Kept& kept, Terms& terms, const ConfTerm& conf_term,
                                          const LocTerm& loc_term, double& conf_sum, double& loc_sum) {
  const int thread = int(threadIdx.x), lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;
  const unsigned own = __popc(kept.all) | __popc(kept.positives) << 16, of_warp = gpu::warp_sum(own);
  __syncthreads();  // everybody has read those of the last batch
  if (lane == 0) terms.of_warps[warp] = of_warp;
  __syncthreads();  // those of the warps are written
  const unsigned other = terms.of_warps[lane], all = gpu::warp_sum(other);
  const unsigned before = gpu::warp_sum(lane < warp ? other : 0) + gpu::sum_before(own, lane);
  // First the terms of conf, then those of loc.
  const int confs = int(all & 0xffff), count = confs + int(all >> 16);
  int conf_place = int(before & 0xffff), loc_place = confs + int(before >> 16);
#pragma unroll 1
  for (int first = 0; first < count; first += kSums, conf_place -= kSums, loc_place -= kSums) {
    const auto list = [&](int place, int e) { terms.prior[place] = e * kSums + thread; };
    for_each_place(kept.all, conf_place, list);
    for_each_place(kept.positives, loc_place, list);
    __syncthreads();  // the priors are listed
    if (const int term = first + thread; term < count) {
      const int prior = terms.prior[thread];
      terms.value[thread] = term < confs ? conf_term(prior) : loc_term(prior);
    }
    __syncthreads();  // the terms are there
    for_each_place(kept.all, conf_place, [&](int place, int) { conf_sum += terms.value[place]; });
    for_each_place(kept.positives, loc_place, [&](int place, int) { loc_sum += terms.value[place]; });
  }
}

template <class C, bool kHeld>
__global__ void __launch_bounds__(gpu::kSelectThreads, 1)
    settle_kernel(IntOf<C>* ranks,                     // [B, P]
                  const int64_t* __restrict__ labels,  // [B, P]
                  Fours deltas, Fours targets, Loss loss, Workspace workspace, int64_t* __restrict__ divisors,
                  Scalar loc, Scalar conf) {
  using Key = decltype(radix_key(IntOf<C>{}));
  __shared__ gpu::Selection<Key> selection;
  __shared__ Terms terms;
  __shared__ double locs[gpu::kSelectWarps], confs[gpu::kSelectWarps];  // of each warp
  const int lane = int(threadIdx.x) % gpu::kWarp, warp = int(threadIdx.x) / gpu::kWarp;
  const int64_t n = loss.mining.num_priors, image = blockIdx.x;
  if (image < loss.mining.batch) {  // a batch of none has a block, too
    // 1. The hardest negatives are cut off.
    IntOf<C>* const rank = ranks + image * n;
    const int64_t* const label = labels + image * n;
    const auto make = [=](int64_t i) { return gpu::key_of(label[i], radix_key(rank[i])); };
    const gpu::ImageKeys<Key, kHeld, decltype(make)> keys(make, n);
    Counts counts{};
    const auto wanted = [&](int64_t positives, int64_t negatives) {
      counts = {positives, negatives_to_mark(positives, negatives, loss.mining)};
      return counts.negatives;
    };
    const gpu::Cut<Key> cut = gpu::cut_negatives(keys, wanted, selection);
    // 2. What is kept is summed up, prior p in partial sum p % kSums, in rising order.
    double loc_sum = 0, conf_sum = 0;
    keys.for_each_batch([&](int64_t first, int size, const Key* batch) {
      const Kept kept = keep(keys, batch, size, cut.of_batch(first, size), rank + first);
      const auto conf_term = [&](int prior) { return loss_of_rank<C>(rank[first + prior]); };
      const auto term = [&](int prior) { return loc_term(deltas, targets, image, first + prior, loss.beta); };
      add_terms(kept, terms, conf_term, term, conf_sum, loc_sum);
    });
    add_up(loc_sum, conf_sum);
    if (lane == 0) {
      locs[warp] = loc_sum;
      confs[warp] = conf_sum;
    }
    __syncthreads();  // the sums of the warps are written
    if (warp != 0) return;
    loc_sum = locs[lane];
    conf_sum = confs[lane];
    add_up(loc_sum, conf_sum);
    if (lane == 0) workspace.sums[image] = {uint32_t(counts.positives), uint32_t(counts.negatives), loc_sum, conf_sum};
  }
  // 3. The last one to come so far ends what all have summed.
  if (warp == 0 && gpu::is_last_warp(workspace.ticket, gridDim.x)) {
    finish(workspace.sums, loss, divisors, loc, conf);
  }
}

// ---- backward ------------------------------------------------------------------------------------

constexpr int kTileRows = 64;  // a tile of a dense gradient begins at a multiple of 16 bytes, whatever C is

// Where row first + i of the rows of all images is; i < kTileRows.
struct Place {
  int64_t image, prior;
};
__device__ Place place_of(const mining::Mining& sizes, int64_t first, int i) {
  const int64_t n = sizes.num_priors;
  Place at{int64_t(uint64_t(first) / uint64_t(n)), i};
  for (at.prior += first - at.image * n; at.prior >= n; at.prior -= n) ++at.image;
  return at;
}

// A row of a tile whose loss is part of the sum, and what its gradient takes beside its logits.
template <class C>
struct KeptRow {
  Place at;
  IntOf<C> rank;
  C scale;  // of the gradient of its loss
  unsigned y;
};

template <class C>
struct KeptRows {
  KeptRow<C> row[kTileRows];
  int count;
};

// Lists the kept rows of a tile, by the first warp.
template <class C>
__device__ void list_kept(int64_t first, int rows, const IntOf<C>* ranks, const int64_t* labels,
                          const int64_t* divisors, C grad_conf, const Loss& loss, KeptRows<C>& kept) {
  constexpr int kEach = kTileRows / gpu::kWarp;
  const int lane = int(threadIdx.x);
  IntOf<C> rank[kEach];
  const auto rank_at = [&](int i) { return i < rows ? ranks[first + i] : kAbsent<C>; };
#pragma unroll
  for (int j = 0; j < kEach; ++j) rank[j] = rank_at(j * gpu::kWarp + lane);
  int count = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const bool is_kept = rank[j] != kAbsent<C>;
    const unsigned found = __ballot_sync(gpu::kFullMask, is_kept);
    if (is_kept) {
      const int i = j * gpu::kWarp + lane;
      const int64_t label = labels[first + i];
      const bool known = label < loss.classes;
      const Place at = place_of(loss.mining, first, i);
      const C scale = known ? C(double(grad_conf) / double(divisors[at.image])) : std::numeric_limits<C>::quiet_NaN();
      kept.row[count + gpu::count_before(found, lane)] = {at, rank[j], scale, known && label > 0 ? unsigned(label) : 0};
    }
    count += __popc(found);
  }
  if (lane == 0) kept.count = count;
}

// Writes zeros to n elements that lie side by side, the first at a multiple of 16 bytes.
template <class T>
__device__ void clear(T* to, int64_t n) {
  constexpr int kEach = 16 / int(sizeof(T));
  struct alignas(16) Wide {
    T v[kEach];
  };
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n / kEach; i += kThreads) reinterpret_cast<Wide*>(to)[i] = Wide{};
#pragma unroll 1
  for (int64_t i = n / kEach * kEach + threadIdx.x; i < n; i += kThreads) to[i] = T(0.0f);
}

// kDense: the gradient is contiguous.
template <class T, bool kDense>
__global__ void __launch_bounds__(kThreads)
    logits_gradient_kernel(const gpu::Compute<T>* __restrict__ grad_conf, const T* __restrict__ logits, Strides strides,
                           const int64_t* __restrict__ labels,    // [B, P]
                           const Rank<T>* __restrict__ ranks,     // [B, P]
                           const int64_t* __restrict__ divisors,  // [B]
                           Loss loss, T* __restrict__ gradient, Strides gradient_strides) {
  using C = gpu::Compute<T>;
  __shared__ KeptRows<C> kept;
  const int64_t first = int64_t(blockIdx.x) * kTileRows, all = loss.mining.batch * loss.mining.num_priors;
  const int rows = int(min_of<int64_t>(all - first, kTileRows));
  // 1. A warp lists the kept rows of the tile, and all clear it.
  if (threadIdx.x < gpu::kWarp) list_kept(first, rows, ranks, labels, divisors, *grad_conf, loss, kept);
  if constexpr (kDense) {
    clear(gradient + first * loss.classes, rows * loss.classes);
  } else if (int(threadIdx.x) % kTileRows < rows) {
    const Place at = place_of(loss.mining, first, int(threadIdx.x) % kTileRows);
    T* const to = gradient + at.image * gradient_strides.image + at.prior * gradient_strides.prior;
    for (int64_t c = threadIdx.x / kTileRows; c < loss.classes; c += kThreads / kTileRows) {
      to[c * gradient_strides.last] = T(0.0f);
    }
  }
  __syncthreads();  // list and zeros are written

  // 2. Half a warp a row writes the gradients of the kept ones.
  const int lane = int(threadIdx.x) % kWays, half = int(threadIdx.x) % gpu::kWarp / kWays;
  for (int i = int(threadIdx.x) / gpu::kWarp * 2; i < kept.count; i += kThreads / kWays) {
    const bool inside = i + half < kept.count;  // else both halves have the same row, and one stores it
    const KeptRow<C>& own = kept.row[inside ? i + half : i];
    const Place at = own.at;
    const Rank<T> rank = own.rank;
    const C scale = own.scale;
    const unsigned y = own.y;
    const LogitsRow<T, kWays, 8> row(logits + at.image * strides.image + at.prior * strides.prior, strides.last,
                                     loss.classes);
    const C background = row[0], sum = sum_of_rank<C>(rank);
    C base = row[y], factor = scale / (1 + sum), at_label = -sum * factor;
    if (__any_sync(gpu::kFullMask, rank >= 0)) {
      const C top = row.top(background), total = row.foreground(top) + exp(background - top);
      if (rank >= 0) {
        factor = scale / total;
        at_label = exp(base - top) * factor - scale;
        base = top;
      }
    }
    if (!inside) continue;
    T* const to = gradient + at.image * gradient_strides.image + at.prior * gradient_strides.prior;
    const auto store = [&](unsigned c, C x) {
      to[c * gradient_strides.last] = T(c == y ? at_label : exp(x - base) * factor);
    };
    if (lane == 0) store(0, background);
    row.for_each_class([&](int, unsigned c, C x) {
      if (c < unsigned(loss.classes)) store(c, x);
    });
  }
}

// kDense: the gradient is contiguous.
template <class T, bool kDense>
__global__ void __launch_bounds__(kThreads, 1)
    deltas_gradient_kernel(const gpu::Compute<T>* __restrict__ grad_loc, Fours deltas, Fours targets,
                           const int64_t* __restrict__ labels,    // [B, P]
                           const int64_t* __restrict__ divisors,  // [B]
                           Loss loss, T* __restrict__ gradient, Strides strides) {
  using C = gpu::Compute<T>;
  for_rows<1>(loss.mining, [&](int64_t image, unsigned prior, bool inside) {
    if (!inside) return;
    const int64_t at = image * loss.mining.num_priors + prior;
    const double grad = double(*grad_loc), divisor = double(divisors[image]);
    C value[4] = {};
    if (labels[at] > 0) {
      double delta[4], target[4];
      load_four(deltas, image, prior, delta);
      load_four(targets, image, prior, target);
      const double scale = loss.alpha * grad / divisor;
#pragma unroll
      for (int d = 0; d < 4; ++d) value[d] = C(scale * smooth_l1_slope(delta[d] - target[d], loss.beta));
    }
    if constexpr (kDense) {
      gpu::store_four(gradient, at, value[0], value[1], value[2], value[3]);
    } else {
      T* const to = gradient + image * strides.image + prior * strides.prior;
#pragma unroll
      for (int d = 0; d < 4; ++d) to[d * strides.last] = T(value[d]);
    }
  });
}

// Whether a [B, P, columns] tensor is contiguous; one that is not is dense, but of another order.
bool is_contiguous(const mining::Mining& sizes, int64_t columns, const Strides& strides) {
  return strides.last == 1 && strides.prior == columns && strides.image == sizes.num_priors * columns;
}

Fours fours_of(const Rows& rows) {
  const bool half = rows.dtype == DType::f16 || rows.dtype == DType::bf16;
  const int64_t element = half ? 2 : rows.dtype == DType::f64 ? 8 : 4, access = half ? 8 : 16;
  const Strides bytes{rows.strides.image * element, rows.strides.prior * element, rows.strides.last * element};
  const bool aligned = bytes.last == element && bytes.prior % access == 0 && bytes.image % access == 0 &&
                       reinterpret_cast<uintptr_t>(rows.data) % access == 0;
  return {static_cast<const char*>(rows.data), rows.dtype, bytes, aligned};
}

}  // namespace

size_t workspace_bytes(const Loss& loss) { return Workspace(nullptr, loss).bytes; }

void multibox_loss_cuda(const Rows& logits, const Rows& deltas, const Rows& targets, const int64_t* labels,
                        const Loss& loss, void* loc, void* conf, void* ranks, int64_t* divisors, void* workspace,
                        Stream stream) {
  const Workspace w(workspace, loss);
  if (loss.mining.num_priors == 0) gpu::clear(w.ticket, sizeof *w.ticket, stream);  // else rank_kernel does
  gpu::dispatch(logits.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = gpu::Compute<T>;
    using Key = decltype(radix_key(IntOf<C>{}));
    IntOf<C>* const rank = static_cast<IntOf<C>*>(ranks);
    with_row<T>(logits.strides, loss.classes, [&](auto row) {
      using Row = typename decltype(row)::type;
      gpu::launch(rank_kernel<Row>, grid_for(loss.mining, Row::kLanes), dim3(kThreads), 0, stream,
                  static_cast<const T*>(logits.data), logits.strides, labels, loss, rank, w.ticket);
    });
    gpu::launch(gpu::are_held<Key>(loss.mining.num_priors) ? settle_kernel<C, true> : settle_kernel<C, false>,
                dim3(unsigned(max_of<int64_t>(loss.mining.batch, 1))), dim3(gpu::kSelectThreads), 0, stream, rank,
                labels, fours_of(deltas), fours_of(targets), loss, w, divisors, Scalar{loc, deltas.dtype},
                Scalar{conf, logits.dtype});
  });
}

void logits_gradient_cuda(const void* grad_conf, const Rows& logits, const int64_t* labels, const void* ranks,
                          const int64_t* divisors, const Loss& loss, void* gradient, const Strides& strides,
                          Stream stream) {
  const int64_t rows = loss.mining.batch * loss.mining.num_priors;
  const bool dense = is_contiguous(loss.mining, loss.classes, strides);
  gpu::dispatch(logits.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gpu::launch(dense ? logits_gradient_kernel<T, true> : logits_gradient_kernel<T, false>,
                dim3(unsigned((rows + kTileRows - 1) / kTileRows)), dim3(kThreads), 0, stream,
                static_cast<const gpu::Compute<T>*>(grad_conf), static_cast<const T*>(logits.data), logits.strides,
                labels, static_cast<const Rank<T>*>(ranks), divisors, loss, static_cast<T*>(gradient), strides);
  });
}

void deltas_gradient_cuda(const void* grad_loc, const Rows& deltas, const Rows& targets, const int64_t* labels,
                          const int64_t* divisors, const Loss& loss, void* gradient, const Strides& strides,
                          Stream stream) {
  const bool dense = is_contiguous(loss.mining, 4, strides);
  gpu::dispatch(deltas.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gpu::launch(dense ? deltas_gradient_kernel<T, true> : deltas_gradient_kernel<T, false>, grid_for(loss.mining, 1),
                dim3(kThreads), 0, stream, static_cast<const gpu::Compute<T>*>(grad_loc), fours_of(deltas),
                fours_of(targets), labels, divisors, loss, static_cast<T*>(gradient), strides);
  });
}

}  // namespace ssd_ext::multibox_loss

// Ladder: microseconds on an H100, SSD300, B = 32, C = 81, float32. All are predictions; nothing is measured yet.
//
// rank_kernel, which reads all logits, 90.5 MB: 31 at least.
//   85-110  half a warp a row, each logit loaded when it is needed: 1 load in flight, 423 instructions a pair of rows
//   40      logits, background and label of a row loaded before the first is used: 7 loads in flight, 239 instructions
//   37      exponentials without bounds, scaled in one step, where none can over- or underflow: 224 instructions
//   Now instructions (34) and bytes (31) bind it about alike.
#include "multibox_loss/multibox_loss.h"

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
// first. kWhole: there are no more; they lie side by side, stay in registers, and only the last may be missing. All
// lanes of a warp call these functions together.
template <class Stored, int kGroup, int kEach, bool kWhole>
class LogitsRow {
 public:
  using T = Stored;
  using C = gpu::Compute<T>;
  static constexpr int kLanes = kGroup;
  static constexpr bool kInRegisters = kWhole;

  __device__ LogitsRow(const T* x, int64_t stride, int64_t classes)
      : x_(x), stride_(stride), classes_(unsigned(classes)), lane_(threadIdx.x % kLanes) {
    if constexpr (kWhole) load(1, values_);
  }

  __device__ C operator[](unsigned c) const { return C(kWhole ? x_[c] : x_[c * stride_]); }

  // Whether foreground_near() may be called.
  __device__ bool is_near(C base) const {
    bool near = true;
    for_each_class([&](int j, unsigned c, C x) { near &= !is_class(j, c) || std::abs(x - base) <= kNearExponent<C>; });
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

 private:
  static constexpr C kNothing = -std::numeric_limits<C>::infinity();  // of a missing class: its exponential is 0

  __device__ bool is_class(int j, unsigned c) const { return (kWhole && j < kEach - 1) || c < classes_; }

  __device__ void load(unsigned first, C* values) const {
    const int64_t stride = kWhole ? 1 : stride_;
    int64_t at = (first + lane_) * stride;
#pragma unroll
    for (int j = 0; j < kEach; ++j, at += kLanes * stride) {
      values[j] = is_class(j, first + j * kLanes + lane_) ? C(x_[at]) : kNothing;
    }
  }

  // f(j, c, x) for the classes c of this lane, in rising order, and after the last as if missing ones followed it.
  template <class F>
  __device__ void for_each_class(const F& f) const {
    const auto visit = [&](unsigned first, const C* values) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) f(j, first + j * kLanes + lane_, values[j]);
    };
    if constexpr (kWhole) {
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
  C values_[kWhole ? kEach : 1];
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
                Loss loss, Rank<typename Row::T>* __restrict__ ranks) {
  using C = typename Row::C;
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

// f(a null pointer to the LogitsRow that suits this layout and number of classes).
template <class T, int kEach = 1, class F>
void with_row(const Strides& strides, int64_t classes, const F& f) {
  constexpr int most = 8;
  if constexpr (kEach == 1) {
    if (is_class_major(strides)) return f(static_cast<LogitsRow<T, 4, 8, false>*>(nullptr));
    if (strides.last != 1) return f(static_cast<LogitsRow<T, kWays, 4, false>*>(nullptr));
  }
  if (classes - 1 <= kWays * kEach) return f(static_cast<LogitsRow<T, kWays, kEach, true>*>(nullptr));
  if constexpr (kEach < most) {
    with_row<T, kEach + 1>(strides, classes, f);
  } else {
    f(static_cast<LogitsRow<T, kWays, most, false>*>(nullptr));
  }
}

// ---- one image: mining, sums ---------------------------------------------------------------------

// The keys of one image: made once into shared memory where they fit, else anew for each pass.
template <class C, bool kCached>
struct KeyRow {
  using Key = decltype(radix_key(IntOf<C>{}));
  const IntOf<C>* ranks;  // [n]
  const int64_t* labels;  // [n]
  Key* cache;             // [n] if kCached

  __device__ Key made(int64_t i, int64_t label) const {
    return label == 0 ? radix_key(ranks[i]) : Key(gpu::kAbsentKey);
  }
  __device__ Key operator()(int64_t i) const {
    if constexpr (kCached) return cache[i];
    return made(i, labels[i]);
  }
};

__device__ double element(const Rows& rows, int64_t i) {
  switch (rows.dtype) {
    case DType::f32:
      return double(static_cast<const float*>(rows.data)[i]);
    case DType::f64:
      return static_cast<const double*>(rows.data)[i];
    case DType::f16:
      return double(float(static_cast<const __half*>(rows.data)[i]));
    default:
      return double(float(static_cast<const __nv_bfloat16*>(rows.data)[i]));
  }
}

// Error of coordinate d of a prior's delta.
__device__ double delta_error(const Rows& deltas, const Rows& targets, int64_t image, int64_t prior, int d) {
  const auto at = [&](const Strides& s) { return image * s.image + prior * s.prior + d * s.last; };
  return element(deltas, at(deltas.strides)) - element(targets, at(targets.strides));
}

template <class C, bool kCached>
__global__ void __launch_bounds__(gpu::kSelectThreads, 1) mine_kernel(IntOf<C>* ranks,                     // [B, P]
                                                                      const int64_t* __restrict__ labels,  // [B, P]
                                                                      mining::Mining mining) {
  using Key = typename KeyRow<C, kCached>::Key;
  const int64_t n = mining.num_priors;
  gpu::Smem smem;
  gpu::Selection<Key>& shared = *smem.take<gpu::Selection<Key>>(1);
  Key* const cache = smem.take<Key>(kCached ? n : 0);

  const int64_t image = blockIdx.x;
  IntOf<C>* const rank = ranks + image * n;
  const int64_t* const label = labels + image * n;
  const KeyRow<C, kCached> row{rank, label, cache};

  int64_t positives = 0, negatives = 0;
  for (int64_t i = threadIdx.x; i < n; i += gpu::kSelectThreads) {
    positives += label[i] > 0;
    negatives += label[i] == 0;
    if constexpr (kCached) cache[i] = row.made(i, label[i]);
  }
  positives = gpu::block_sum(positives, shared.positives);  // whose barrier publishes the cache, too
  negatives = gpu::block_sum(negatives, shared.negatives);
  const int64_t k = negatives_to_mark(positives, negatives, mining);
  const gpu::Cut<Key> cut = gpu::find_cut(row, n, k, negatives, shared);
  gpu::mark_largest(row, n, cut, shared, [&](int64_t i, bool largest) {
    if (!largest && label[i] <= 0) rank[i] = kAbsent<C>;
  });
}

template <class C>
__global__ void __launch_bounds__(gpu::kSelectThreads, 1) sum_kernel(const IntOf<C>* __restrict__ ranks,  // [B, P]
                                                                     const int64_t* __restrict__ labels,  // [B, P]
                                                                     Rows deltas, Rows targets, Loss loss,
                                                                     ImageSums* __restrict__ sums) {  // [B]
  __shared__ int64_t counts[gpu::kSelectWarps];
  __shared__ double locs[gpu::kSelectWarps], confs[gpu::kSelectWarps];
  const int64_t n = loss.mining.num_priors;
  const int64_t image = blockIdx.x;
  int64_t positives = 0;
  double loc = 0, conf = 0;
#pragma unroll 1  // copies of all that a term takes would spill registers
  for (int64_t i = threadIdx.x; i < n; i += kSums) {
    const IntOf<C> rank = ranks[image * n + i];
    if (rank == kAbsent<C>) continue;
    conf += loss_of_rank<C>(rank);
    if (labels[image * n + i] <= 0) continue;
    ++positives;
    double term = 0;
#pragma unroll 1
    for (int d = 0; d < 4; ++d) term += smooth_l1(delta_error(deltas, targets, image, i, d), loss.beta);
    loc += term;
  }
  positives = gpu::block_sum(positives, counts);
  loc = gpu::block_sum(loc, locs);
  conf = gpu::block_sum(conf, confs);
  if (threadIdx.x == 0) sums[image] = {positives, loc, conf};
}

// ---- all images ----------------------------------------------------------------------------------

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

__global__ void __launch_bounds__(gpu::kSelectThreads, 1)
    finish_kernel(const ImageSums* __restrict__ sums,  // [B]
                  Loss loss, int64_t* __restrict__ divisors, Scalar loc, Scalar conf) {
  __shared__ int64_t counts[gpu::kSelectWarps];
  __shared__ double locs[gpu::kSelectWarps], confs[gpu::kSelectWarps];
  int64_t positives = 0;
  for (int64_t b = threadIdx.x; b < loss.mining.batch; b += kSums) positives += sums[b].positives;
  positives = gpu::block_sum(positives, counts);
  double all_loc = 0, all_conf = 0;
  for (int64_t b = threadIdx.x; b < loss.mining.batch; b += kSums) {
    const ImageSums image = sums[b];
    const int64_t divisor = divisor_of(image.positives, positives, loss);
    divisors[b] = divisor;
    all_loc += image.loc / double(divisor);
    all_conf += image.conf / double(divisor);
  }
  all_loc = gpu::block_sum(all_loc, locs);
  all_conf = gpu::block_sum(all_conf, confs);
  if (threadIdx.x == 0) {
    store_scalar(loc, loss.alpha * all_loc);
    store_scalar(conf, all_conf);
  }
}

// ---- backward ------------------------------------------------------------------------------------

template <class Row>
__global__ void __launch_bounds__(kThreads, 1)
    logits_gradient_kernel(const typename Row::C* __restrict__ grad_conf, const typename Row::T* __restrict__ logits,
                           Strides strides,
                           const int64_t* __restrict__ labels,               // [B, P]
                           const Rank<typename Row::T>* __restrict__ ranks,  // [B, P]
                           const int64_t* __restrict__ divisors,             // [B]
                           Loss loss, typename Row::T* __restrict__ gradient, Strides gradient_strides) {
  using T = typename Row::T;
  using C = typename Row::C;
  const unsigned lane = threadIdx.x % Row::kLanes, classes = unsigned(loss.classes);
  for_rows<Row::kLanes>(loss.mining, [&](int64_t image, unsigned prior, bool inside) {
    const int64_t at = image * loss.mining.num_priors + prior;
    const Rank<T> rank = ranks[at];
    T* const to = gradient + image * gradient_strides.image + prior * gradient_strides.prior;
    const bool kept = inside && rank != kAbsent<C>;
    if (!__any_sync(gpu::kFullMask, kept)) {
      for (unsigned c = lane; inside && c < classes; c += Row::kLanes) to[c * gradient_strides.last] = T(C(0));
      return;
    }
    const int64_t label = labels[at];
    const bool known = label < loss.classes;
    const unsigned y = known && label > 0 ? unsigned(label) : 0;
    const Row row(logits + image * strides.image + prior * strides.prior, strides.last, loss.classes);
    const C sum = sum_of_rank<C>(rank), scale = C(double(*grad_conf) / double(divisors[image]));
    C base = row[y], factor = scale / (1 + sum), at_label = -sum * factor;
    if (__any_sync(gpu::kFullMask, kept && rank >= 0)) {
      const C background = row[0], top = row.top(background), all = row.foreground(top) + exp(background - top);
      if (rank >= 0) {
        base = top;
        factor = scale / all;
        at_label = exp(row[y] - base) * factor - scale;
      }
    }
    for (unsigned c = lane; inside && c < classes; c += Row::kLanes) {
      C value = 0;
      if (kept) value = c == y ? at_label : exp(row[c] - base) * factor;
      if (kept && !known) value = std::numeric_limits<C>::quiet_NaN();
      to[c * gradient_strides.last] = T(value);
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    deltas_gradient_kernel(const gpu::Compute<T>* __restrict__ grad_loc, Rows deltas, Rows targets,
                           const int64_t* __restrict__ labels,    // [B, P]
                           const int64_t* __restrict__ divisors,  // [B]
                           Loss loss, T* __restrict__ gradient, Strides strides) {
  using C = gpu::Compute<T>;
  for_rows<1>(loss.mining, [&](int64_t image, unsigned prior, bool inside) {
    if (!inside) return;
    T* const to = gradient + image * strides.image + prior * strides.prior;
    const bool positive = labels[image * loss.mining.num_priors + prior] > 0;
    for (int d = 0; d < 4; ++d) {
      C value = 0;
      if (positive) {
        const double slope = smooth_l1_slope(delta_error(deltas, targets, image, prior, d), loss.beta);
        value = C(loss.alpha * double(*grad_loc) / double(divisors[image]) * slope);
      }
      to[d * strides.last] = T(value);
    }
  });
}

template <class C>
void settle_images(const Rows& deltas, const Rows& targets, const int64_t* labels, const Loss& loss, void* ranks,
                   ImageSums* sums, Stream stream) {
  using Key = typename KeyRow<C, true>::Key;
  const size_t n = size_t(loss.mining.num_priors), bare = gpu::Smem::end_of<gpu::Selection<Key>>(0, 1);
  const bool cached = n <= gpu::kMostCachedBytes / sizeof(Key);
  const dim3 grid(unsigned(loss.mining.batch)), block(gpu::kSelectThreads);
  gpu::launch(cached ? mine_kernel<C, true> : mine_kernel<C, false>, grid, block,
              cached ? gpu::Smem::end_of<Key>(bare, n) : bare, stream, static_cast<IntOf<C>*>(ranks), labels,
              loss.mining);
  gpu::launch(sum_kernel<C>, grid, block, 0, stream, static_cast<const IntOf<C>*>(ranks), labels, deltas, targets, loss,
              sums);
}

}  // namespace

void multibox_loss_cuda(const Rows& logits, const Rows& deltas, const Rows& targets, const int64_t* labels,
                        const Loss& loss, void* loc, void* conf, void* ranks, int64_t* divisors, ImageSums* scratch,
                        Stream stream) {
  gpu::dispatch(logits.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_row<T>(logits.strides, loss.classes, [&](auto* suited) {
      using Row = std::remove_pointer_t<decltype(suited)>;
      gpu::launch(rank_kernel<Row>, grid_for(loss.mining, Row::kLanes), dim3(kThreads), 0, stream,
                  static_cast<const T*>(logits.data), logits.strides, labels, loss, static_cast<Rank<T>*>(ranks));
    });
    settle_images<gpu::Compute<T>>(deltas, targets, labels, loss, ranks, scratch, stream);
  });
  gpu::launch(finish_kernel, dim3(1), dim3(gpu::kSelectThreads), 0, stream, scratch, loss, divisors,
              Scalar{loc, deltas.dtype}, Scalar{conf, logits.dtype});
}

void logits_gradient_cuda(const void* grad_conf, const Rows& logits, const int64_t* labels, const void* ranks,
                          const int64_t* divisors, const Loss& loss, void* gradient, const Strides& strides,
                          Stream stream) {
  gpu::dispatch(logits.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto go = [&](auto* suited) {
      using Row = std::remove_pointer_t<decltype(suited)>;
      gpu::launch(logits_gradient_kernel<Row>, grid_for(loss.mining, Row::kLanes), dim3(kThreads), 0, stream,
                  static_cast<const gpu::Compute<T>*>(grad_conf), static_cast<const T*>(logits.data), logits.strides,
                  labels, static_cast<const Rank<T>*>(ranks), divisors, loss, static_cast<T*>(gradient), strides);
    };
    if (is_class_major(strides)) {
      go(static_cast<LogitsRow<T, 4, 8, false>*>(nullptr));
    } else {
      go(static_cast<LogitsRow<T, kWays, 8, false>*>(nullptr));
    }
  });
}

void deltas_gradient_cuda(const void* grad_loc, const Rows& deltas, const Rows& targets, const int64_t* labels,
                          const int64_t* divisors, const Loss& loss, void* gradient, const Strides& strides,
                          Stream stream) {
  gpu::dispatch(deltas.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gpu::launch(deltas_gradient_kernel<T>, grid_for(loss.mining, 1), dim3(kThreads), 0, stream,
                static_cast<const gpu::Compute<T>*>(grad_loc), deltas, targets, labels, divisors, loss,
                static_cast<T*>(gradient), strides);
  });
}

}  // namespace ssd_ext::multibox_loss

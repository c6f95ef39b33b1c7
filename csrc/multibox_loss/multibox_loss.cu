#include "multibox_loss/multibox_loss.h"

#include "common/gpu_select.h"

namespace ssd_ext::multibox_loss {
namespace {

#include "multibox_loss/rank.inl"

constexpr int kThreads = 256;
constexpr int kRowsEach = 4;  // rows that a group of lanes does one after another

static_assert(kSums == gpu::kSelectThreads && gpu::kWarp * gpu::kWarp == kSums, "a thread has one partial sum");

template <class T>
using Rank = IntOf<gpu::Compute<T>>;
template <class C>
constexpr IntOf<C> kAbsent = std::numeric_limits<IntOf<C>>::min();

// ---- one row of logits, by kLanes neighbouring lanes ---------------------------------------------
//
// kLanes = kWays: one partial sum a lane, for classes that lie side by side. kLanes = 1: a thread holds all
// partial sums, for priors that lie side by side. All lanes of a warp call these functions together.

// Adds each half of the values to the other, down to one, without an index that is not known in advance.
template <int kHalf, class C>
__device__ __forceinline__ void fold(C* values) {
#pragma unroll
  for (int j = 0; j < kHalf; ++j) values[j] += values[j + kHalf];
  if constexpr (kHalf > 1) fold<kHalf / 2>(values);
}

template <class T, int kLanes>
struct LogitsRow {
  using C = gpu::Compute<T>;
  const T* x;
  int64_t stride, classes;
  int lane;  // among kLanes

  __device__ C operator[](int64_t c) const { return C(x[c * stride]); }

  // Sum over c != omitted of exp(x[c] - base), in the order that multibox_loss.h tells; omitted < 0: of all.
  __device__ C sum(C base, int64_t omitted) const {
    constexpr int each = kWays / kLanes;
    C sums[each] = {};
#pragma unroll(kLanes == 1 ? 1 : 4)
    for (int64_t first = 1; first < classes; first += kWays) {
#pragma unroll
      for (int j = 0; j < each; ++j) {
        const int64_t c = first + j * kLanes + lane;
        if (c < classes && c != omitted) sums[j] += exp((*this)[c] - base);
      }
    }
    C total;
    if constexpr (kLanes == 1) {
      fold<each / 2>(sums);
      total = sums[0];
    } else {
      total = sums[0];
      for (int offset = kLanes / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(gpu::kFullMask, total, offset);
    }
    return omitted == 0 ? total : total + exp((*this)[0] - base);
  }

  __device__ C top() const {
    C top = (*this)[0];
    for (int64_t c = 1 + lane; c < classes; c += kLanes) top = max_of((*this)[c], top);
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      top = max_of(__shfl_xor_sync(gpu::kFullMask, top, offset), top);
    }
    return top;
  }
};

// Visits the rows of this block: f(image, prior, inside) by all threads together, each group of kLanes with
// its own prior. Beyond the last prior that is the last one again, and `inside` false.
template <int kLanes, class F>
__device__ void for_rows(const mining::Mining& sizes, const F& f) {
  constexpr int rows = kThreads / kLanes;
  for (int64_t image = blockIdx.y; image < sizes.batch; image += gridDim.y) {
    for (int64_t first = int64_t(blockIdx.x) * rows; first < sizes.num_priors; first += int64_t(gridDim.x) * rows) {
      const int64_t prior = first + int(threadIdx.x) / kLanes;
      const bool inside = prior < sizes.num_priors;
      f(image, inside ? prior : sizes.num_priors - 1, inside);
    }
  }
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 1) rank_kernel(const T* __restrict__ logits, Strides strides,
                                                           const int64_t* __restrict__ labels,  // [B, P]
                                                           Loss loss, Rank<T>* __restrict__ ranks) {
  using C = gpu::Compute<T>;
  const int lane = int(threadIdx.x) % kLanes;
  for_rows<kLanes>(loss.mining, [&](int64_t image, int64_t prior, bool inside) {
    const int64_t at = image * loss.mining.num_priors + prior, label = labels[at];
    const bool known = label < loss.classes;
    const int64_t y = known && label > 0 ? label : 0;
    const LogitsRow<T, kLanes> row{logits + image * strides.image + prior * strides.prior, strides.last, loss.classes,
                                   lane};
    const C at_label = row[y];
    const C sum = row.sum(at_label, y) + (at_label - at_label);
    const bool small = sum <= kLargestSum<C>;
    Rank<T> rank = rank_of_sum(sum);
    if (__any_sync(gpu::kFullMask, !small)) {
      const C top = row.top();
      const Rank<T> large = rank_of_large_loss(top, at_label, row.sum(top, -1));
      if (!small) rank = large;
    }
    if (!known) rank = std::numeric_limits<Rank<T>>::max();
    if (inside && lane == 0) ranks[at] = rank;
  });
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

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 1)
    logits_gradient_kernel(const gpu::Compute<T>* __restrict__ grad_conf, const T* __restrict__ logits, Strides strides,
                           const int64_t* __restrict__ labels,    // [B, P]
                           const Rank<T>* __restrict__ ranks,     // [B, P]
                           const int64_t* __restrict__ divisors,  // [B]
                           Loss loss, T* __restrict__ gradient, Strides gradient_strides) {
  using C = gpu::Compute<T>;
  const int lane = int(threadIdx.x) % kLanes;
  for_rows<kLanes>(loss.mining, [&](int64_t image, int64_t prior, bool inside) {
    const int64_t at = image * loss.mining.num_priors + prior;
    const Rank<T> rank = ranks[at];
    T* const to = gradient + image * gradient_strides.image + prior * gradient_strides.prior;
    const bool kept = inside && rank != kAbsent<C>;
    if (!__any_sync(gpu::kFullMask, kept)) {
      for (int64_t c = lane; inside && c < loss.classes; c += kLanes) to[c * gradient_strides.last] = T(C(0));
      return;
    }
    const int64_t label = labels[at];
    const bool known = label < loss.classes;
    const int64_t y = known && label > 0 ? label : 0;
    const LogitsRow<T, kLanes> row{logits + image * strides.image + prior * strides.prior, strides.last, loss.classes,
                                   lane};
    const C sum = sum_of_rank<C>(rank), scale = C(double(*grad_conf) / double(divisors[image]));
    C base = row[y], factor = scale / (1 + sum), at_label = -sum * factor;
    if (__any_sync(gpu::kFullMask, kept && rank >= 0)) {
      const C top = row.top(), all = row.sum(top, -1);
      if (rank >= 0) {
        base = top;
        factor = scale / all;
        at_label = exp(row[y] - base) * factor - scale;
      }
    }
    for (int64_t c = lane; inside && c < loss.classes; c += kLanes) {
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
  for_rows<1>(loss.mining, [&](int64_t image, int64_t prior, bool inside) {
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

dim3 grid_for(const mining::Mining& sizes, int lanes) {
  const int64_t images = sizes.batch < 65535 ? sizes.batch : 65535;
  return dim3(gpu::blocks_for(sizes.num_priors, kThreads / lanes * kRowsEach), unsigned(images));
}

// Priors lie closer together than classes.
bool is_class_major(const Strides& strides) { return strides.prior < strides.last; }

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
    const bool class_major = is_class_major(logits.strides);
    gpu::launch(class_major ? rank_kernel<T, 1> : rank_kernel<T, kWays>, grid_for(loss.mining, class_major ? 1 : kWays),
                dim3(kThreads), 0, stream, static_cast<const T*>(logits.data), logits.strides, labels, loss,
                static_cast<Rank<T>*>(ranks));
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
    const bool class_major = is_class_major(logits.strides);
    gpu::launch(class_major ? logits_gradient_kernel<T, 1> : logits_gradient_kernel<T, kWays>,
                grid_for(loss.mining, class_major ? 1 : kWays), dim3(kThreads), 0, stream,
                static_cast<const gpu::Compute<T>*>(grad_conf), static_cast<const T*>(logits.data), logits.strides,
                labels, static_cast<const Rank<T>*>(ranks), divisors, loss, static_cast<T*>(gradient), strides);
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

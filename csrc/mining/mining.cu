#include "mining/mining.h"

#include "common/gpu_select.h"

namespace ssd_ext::mining {
namespace {

template <class T>
using RadixKey = decltype(radix_key(IntOf<gpu::Compute<T>>{}));

// The keys of one image: read once into shared memory where they fit, else made anew for each pass.
template <class T, bool kCached>
struct Row {
  using Key = RadixKey<T>;
  const T* loss;          // [n]
  const int64_t* labels;  // [n]
  Key* cache;             // [n] if kCached
  int64_t n;

  __device__ Key made(int64_t i, int64_t label) const {
    return label == 0 ? radix_key(order_key_nan_greatest(gpu::Compute<T>(loss[i]))) : Key(gpu::kAbsentKey);
  }
  __device__ Key operator()(int64_t i) const {
    if constexpr (kCached) return cache[i];
    return made(i, labels[i]);
  }
};

template <class T, bool kCached>
__global__ void __launch_bounds__(gpu::kSelectThreads, 1)
    hard_negatives_kernel(const T* __restrict__ loss,          // [B, P]
                          const int64_t* __restrict__ labels,  // [B, P]
                          bool* __restrict__ mask,             // [B, P]
                          Mining mining) {
  using Key = RadixKey<T>;
  const int64_t n = mining.num_priors;
  gpu::Smem smem;
  gpu::Selection<Key>& shared = *smem.take<gpu::Selection<Key>>(1);
  Key* const cache = smem.take<Key>(kCached ? n : 0);

  const int64_t image = blockIdx.x;
  const Row<T, kCached> row{loss + image * n, labels + image * n, cache, n};
  bool* const marked = mask + image * n;

  int64_t positives = 0, negatives = 0;
  for (int64_t i = threadIdx.x; i < n; i += gpu::kSelectThreads) {
    const int64_t label = row.labels[i];
    positives += label > 0;
    negatives += label == 0;
    if constexpr (kCached) cache[i] = row.made(i, label);
  }
  positives = gpu::block_sum(positives, shared.positives);  // whose barrier publishes the cache, too
  negatives = gpu::block_sum(negatives, shared.negatives);
  const int64_t k = negatives_to_mark(positives, negatives, mining);
  const gpu::Cut<Key> cut = gpu::find_cut(row, n, k, negatives, shared);
  gpu::mark_largest(row, n, cut, shared, [&](int64_t i, bool largest) { marked[i] = largest; });
}

}  // namespace

void hard_negatives_cuda(DType dtype, const void* loss, const int64_t* labels, bool* mask, const Mining& mining,
                         Stream stream) {
  gpu::dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Key = RadixKey<T>;
    const size_t n = size_t(mining.num_priors), bare = gpu::Smem::end_of<gpu::Selection<Key>>(0, 1);
    const bool cached = n <= gpu::kMostCachedBytes / sizeof(Key);
    gpu::launch(cached ? hard_negatives_kernel<T, true> : hard_negatives_kernel<T, false>, dim3(unsigned(mining.batch)),
                dim3(gpu::kSelectThreads), cached ? gpu::Smem::end_of<Key>(bare, n) : bare, stream,
                static_cast<const T*>(loss), labels, mask, mining);
  });
}

}  // namespace ssd_ext::mining

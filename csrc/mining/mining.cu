#include "mining/mining.h"

#include "common/gpu_select.h"

namespace ssd_ext::mining {
namespace {

constexpr int kThreads = 1024;  // of a block; a block does one image at a time
constexpr int kWarps = kThreads / gpu::kWarp;
constexpr size_t kMostCached = 40 * 1024;  // bytes of keys kept in shared memory; P = 8732 in float32 fits

template <class T>
using RadixKey = decltype(radix_key(IntOf<gpu::Compute<T>>{}));

constexpr int kAbsent = 0;  // the radix key of what is no negative: less than that of any loss

// The keys of one image: read once into shared memory where they fit, else made anew for each pass.
template <class T, bool kCached>
struct Row {
  using Key = RadixKey<T>;
  const T* loss;          // [n]
  const int64_t* labels;  // [n]
  Key* cache;             // [n] if kCached
  int64_t n;

  __device__ Key made(int64_t i, int64_t label) const {
    return label == 0 ? radix_key(order_key_nan_greatest(gpu::Compute<T>(loss[i]))) : Key(kAbsent);
  }
  __device__ Key operator()(int64_t i) const {
    if constexpr (kCached) return cache[i];
    return made(i, labels[i]);
  }
};

// What the threads of a block tell each other.
template <class Key>
struct Shared {
  int64_t positives[kWarps], negatives[kWarps], ties[kWarps];  // found by each warp
  gpu::SelectShared<Key> select;
};

template <class T, bool kCached>
__global__ void __launch_bounds__(kThreads, 1) hard_negatives_kernel(const T* __restrict__ loss,          // [B, P]
                                                                     const int64_t* __restrict__ labels,  // [B, P]
                                                                     bool* __restrict__ mask,             // [B, P]
                                                                     Mining mining) {
  using Key = RadixKey<T>;
  const int64_t n = mining.num_priors;
  gpu::Smem smem;
  Shared<Key>& shared = *smem.take<Shared<Key>>(1);
  Key* const cache = smem.take<Key>(kCached ? n : 0);
  const int thread = int(threadIdx.x), lane = thread % gpu::kWarp, warp = thread / gpu::kWarp;

  for (int64_t image = blockIdx.x; image < mining.batch; image += gridDim.x) {
    const Row<T, kCached> row{loss + image * n, labels + image * n, cache, n};
    bool* const marked = mask + image * n;

    int64_t positives = 0, negatives = 0;
    for (int64_t i = thread; i < n; i += kThreads) {
      const int64_t label = row.labels[i];
      positives += label > 0;
      negatives += label == 0;
      if constexpr (kCached) cache[i] = row.made(i, label);
    }
    positives = gpu::warp_sum(positives);
    negatives = gpu::warp_sum(negatives);
    if (lane == 0) {
      shared.positives[warp] = positives;
      shared.negatives[warp] = negatives;
    }
    __syncthreads();  // the counts of the warps and the cache are written
    positives = gpu::warp_sum(shared.positives[lane]);
    negatives = gpu::warp_sum(shared.negatives[lane]);
    const int64_t k = negatives_to_mark(positives, negatives, mining);

    // Every key > cut is marked, and the first `wanted` of those equal to it.
    gpu::Cut<Key> cut{k == 0 ? ~Key(0) : Key(kAbsent), 0};
    if (0 < k && k < negatives) {  // the same in every thread
      cut = gpu::kth_greatest<kThreads, 8 * sizeof(Key), false>(row, n, k, shared.select);
    }

    // Ties go to the lowest prior. Each warp has a run of consecutive priors: it learns how many ties
    // lie in the runs before its own, then walks through it in order.
    const int64_t run = (n + kThreads - 1) / kThreads * gpu::kWarp;
    const int64_t begin = warp * run < n ? warp * run : n, end = begin + run < n ? begin + run : n;
    int64_t ties = 0;
    if (cut.wanted > 0) {
      for (int64_t i = begin + lane; i < end; i += gpu::kWarp) ties += row(i) == cut.key;
    }
    ties = gpu::warp_sum(ties);
    if (lane == 0) shared.ties[warp] = ties;
    __syncthreads();  // the ties of every run are written
    int64_t before = __shfl_sync(gpu::kFullMask, gpu::sum_before(shared.ties[lane], lane), warp);
    for (int64_t first = begin; first < end; first += gpu::kWarp) {
      const int64_t i = first + lane;
      const Key key = i < end ? row(i) : Key(kAbsent);
      const bool tie = i < end && key == cut.key;
      const unsigned tied = __ballot_sync(gpu::kFullMask, tie);
      const int64_t rank = before + __popc(tied & ((1u << lane) - 1));
      if (i < end) marked[i] = key > cut.key || (tie && rank < cut.wanted);
      before += __popc(tied);
    }
    __syncthreads();  // everybody is done with what is shared about this image
  }
}

}  // namespace

void hard_negatives_cuda(DType dtype, const void* loss, const int64_t* labels, bool* mask, const Mining& mining,
                         Stream stream) {
  gpu::dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Key = RadixKey<T>;
    const size_t n = size_t(mining.num_priors), bare = gpu::Smem::end_of<Shared<Key>>(0, 1);
    const bool cached = n <= kMostCached / sizeof(Key);
    gpu::launch(cached ? hard_negatives_kernel<T, true> : hard_negatives_kernel<T, false>,
                dim3(gpu::blocks_for(mining.batch, 1)), dim3(kThreads), cached ? gpu::Smem::end_of<Key>(bare, n) : bare,
                stream, static_cast<const T*>(loss), labels, mask, mining);
  });
}

}  // namespace ssd_ext::mining

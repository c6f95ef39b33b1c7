// Ladder: microseconds on an H100 for SSD300, as long at B = 1 as at B = 32. These are predictions; nothing is
// measured.
//   11  a block for each image: keys in shared memory, a load in flight, four digits of radix selection, then the ties
//   7   eight loads in flight; the first digits are counted while the keys are loaded, most images need two or three,
//       and ties are searched for only where the cut leaves them undecided
// What binds it: the instructions of one multiprocessor. Several blocks for each image would help, but take clusters.
#include "mining/mining.h"

#include "common/gpu_select.h"

namespace ssd_ext::mining {
namespace {

template <class T>
using RadixKey = decltype(radix_key(IntOf<gpu::Compute<T>>{}));

template <class T, bool kCached>
__global__ void __launch_bounds__(gpu::kSelectThreads, 1)
    hard_negatives_kernel(const T* __restrict__ loss,          // [B, P]
                          const int64_t* __restrict__ labels,  // [B, P]
                          bool* __restrict__ mask,             // [B, P]
                          Mining mining) {
  using Key = RadixKey<T>;
  const int64_t n = mining.num_priors, first = blockIdx.x * n;  // prior of this image
  gpu::Smem smem;
  gpu::Selection<Key>& shared = *smem.take<gpu::Selection<Key>>(1);
  Key* const cache = smem.take<Key>(kCached ? n : 0);
  const auto make = [=](int64_t i) {
    return gpu::key_of(labels[first + i], radix_key(order_key_nan_greatest(gpu::Compute<T>(loss[first + i]))));
  };
  const gpu::ImageKeys<Key, kCached, decltype(make)> keys{make, n, cache};
  const auto wanted = [=](int64_t positives, int64_t negatives) {
    return negatives_to_mark(positives, negatives, mining);
  };
  const gpu::Cut<Key> cut = gpu::cut_negatives(keys, wanted, shared);
  for (int64_t i = threadIdx.x; i < n; i += gpu::kSelectThreads) mask[first + i] = cut.takes(keys(i), i);
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

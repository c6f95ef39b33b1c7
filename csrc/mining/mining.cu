// Ladder: microseconds of the kernel for SSD300 at B = 32 and 1, measured on an H200.
//   12.5, 12.1  keys in shared memory, two or three digits of radix selection, whose counting takes a __match_any and
//               an atomic operation for every 32 keys: 50,000 instructions on one multiprocessor
//   10.0, 8.6   keys in registers, bisected in 16 rounds of 600 clocks
//   6.0, 4.7    the range of the keys split a thousandfold, in two rounds of 1,700 clocks; no 64-bit arithmetic
// What binds it: 105 KB through one multiprocessor, which takes 2 us, and its instructions.
#include "mining/mining.h"

#include "common/gpu_select.h"

namespace ssd_ext::mining {
namespace {

template <class T>
using RadixKey = decltype(radix_key(IntOf<gpu::Compute<T>>{}));

template <class T, bool kHeld>
__global__ void __launch_bounds__(gpu::kSelectThreads, 1)
    hard_negatives_kernel(const T* __restrict__ loss,          // [B, P]
                          const int64_t* __restrict__ labels,  // [B, P]
                          bool* __restrict__ mask,             // [B, P]
                          Mining mining) {
  using Key = RadixKey<T>;
  __shared__ gpu::Selection<Key> shared;
  const int64_t n = mining.num_priors, row = blockIdx.x * n;  // of this image
  const auto make = [=](int64_t i) {
    return gpu::key_of(labels[row + i], radix_key(order_key_nan_greatest(gpu::Compute<T>(loss[row + i]))));
  };
  const gpu::ImageKeys<Key, kHeld, decltype(make)> keys(make, n);
  const auto wanted = [=](int64_t positives, int64_t negatives) {
    return negatives_to_mark(positives, negatives, mining);
  };
  const gpu::Cut<Key> cut = gpu::cut_negatives(keys, wanted, shared);
  keys.for_each_batch([&](int64_t first, int size, const Key* batch) {
    const auto of_batch = cut.of_batch(first, size);
#pragma unroll
    for (int e = 0; e < keys.kEach; ++e) {
      const int place = keys.place_of(e);
      if (place < size) mask[row + first + place] = of_batch.takes(batch[e], place);
    }
  });
}

}  // namespace

void hard_negatives_cuda(DType dtype, const void* loss, const int64_t* labels, bool* mask, const Mining& mining,
                         Stream stream) {
  gpu::dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gpu::launch(gpu::are_held<RadixKey<T>>(mining.num_priors) ? hard_negatives_kernel<T, true>
                                                              : hard_negatives_kernel<T, false>,
                dim3(unsigned(mining.batch)), dim3(gpu::kSelectThreads), 0, stream, static_cast<const T*>(loss), labels,
                mask, mining);
  });
}

}  // namespace ssd_ext::mining

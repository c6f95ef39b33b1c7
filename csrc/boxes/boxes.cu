#include "boxes/boxes.h"

#include "common/gpu.h"

namespace ssd_ext::boxes {
namespace {

constexpr int kThreads = 256;

template <class T, class O>
__global__ void __launch_bounds__(kThreads, 1) encode_kernel(const T* __restrict__ boxes,   // [rows, 4]
                                                             const O* __restrict__ priors,  // [num_priors, 4]
                                                             O* __restrict__ deltas,        // [rows, 4]
                                                             Coding coding) {
  using C = gpu::Compute<O>;
  const C center = C(coding.center), size = C(coding.size);
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t r = gpu::global_index(); r < coding.rows; r += stride) {
    const Box<C> b = gpu::load_box<T, C>(boxes, r);
    const CenterBox<C> p = gpu::load_center_box(priors, r % coding.num_priors);
    const CenterBox<C> d = encode_box(b, p, center, size);
    gpu::store_four(deltas, r, d.cx, d.cy, d.w, d.h);
  }
}

template <class T, class O>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const T* __restrict__ deltas,  // [rows, 4]
                                                             const O* __restrict__ priors,  // [num_priors, 4]
                                                             O* __restrict__ boxes,         // [rows, 4]
                                                             Coding coding) {
  using C = gpu::Compute<O>;
  const C center = C(coding.center), size = C(coding.size), clip = C(coding.clip);
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t r = gpu::global_index(); r < coding.rows; r += stride) {
    const CenterBox<C> d = gpu::load_center_box<T, C>(deltas, r);
    const CenterBox<C> p = gpu::load_center_box(priors, r % coding.num_priors);
    const Box<C> b = decode_box(d, p, center, size, clip);
    gpu::store_four(boxes, r, b.x1, b.y1, b.x2, b.y2);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) box_iou_kernel(const T* __restrict__ a,  // [n, 4]
                                                              const T* __restrict__ b,  // [m, 4]
                                                              T* __restrict__ out,      // [n, m]
                                                              int64_t n, int64_t m) {
  const int64_t stride = int64_t(gridDim.x) * kThreads, pairs = n * m;
  const bool is_narrow = pairs <= std::numeric_limits<uint32_t>::max();  // a 64-bit division takes longer than the rest
  for (int64_t i = gpu::global_index(); i < pairs; i += stride) {
    const int64_t row = is_narrow ? int64_t(uint32_t(i) / uint32_t(m)) : i / m;
    const auto one = gpu::load_box(a, row), other = gpu::load_box(b, i - row * m);
    out[i] = T(gpu::iou_of(intersection(one, other), area(one), area(other)));
  }
}

}  // namespace

void encode_cuda(DType from, const void* boxes, DType to, const void* priors, void* deltas, const Coding& coding,
                 Stream stream) {
  gpu::dispatch_promoted(from, to, [&](auto from_tag, auto to_tag) {
    using T = typename decltype(from_tag)::type;
    using O = typename decltype(to_tag)::type;
    gpu::launch(encode_kernel<T, O>, dim3(gpu::blocks_for(coding.rows, kThreads)), dim3(kThreads), 0, stream,
                static_cast<const T*>(boxes), static_cast<const O*>(priors), static_cast<O*>(deltas), coding);
  });
}

void decode_cuda(DType from, const void* deltas, DType to, const void* priors, void* boxes, const Coding& coding,
                 Stream stream) {
  gpu::dispatch_promoted(from, to, [&](auto from_tag, auto to_tag) {
    using T = typename decltype(from_tag)::type;
    using O = typename decltype(to_tag)::type;
    gpu::launch(decode_kernel<T, O>, dim3(gpu::blocks_for(coding.rows, kThreads)), dim3(kThreads), 0, stream,
                static_cast<const T*>(deltas), static_cast<const O*>(priors), static_cast<O*>(boxes), coding);
  });
}

void box_iou_cuda(DType dtype, const void* a, const void* b, void* out, int64_t n, int64_t m, Stream stream) {
  gpu::dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gpu::launch(box_iou_kernel<T>, dim3(gpu::blocks_for(n * m, kThreads)), dim3(kThreads), 0, stream,
                static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out), n, m);
  });
}

}  // namespace ssd_ext::boxes

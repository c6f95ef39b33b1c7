#pragma once
// The one header that every kernel file (.cu) includes. Kernels launch through gpu::launch, carve
// dynamic shared memory with gpu::Smem, use full-mask _sync intrinsics, and never include torch:
// so the emulator can build the very same files for the CPU.
#if defined(SSD_EXT_EMULATE)
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <stdexcept>
#include <string>

#include "common/box.h"
#include "common/dtype.h"

namespace ssd_ext::gpu {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

template <class T>
struct Id {
  using type = T;
};

#if defined(SSD_EXT_EMULATE)
using emulator::launch;
inline void clear(void* memory, size_t bytes, Stream) { emulator::clear(memory, bytes); }
#else
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("ssd_ext: ") + what + " failed: " + cudaGetErrorString(error));
}

// Launches on `stream`, on the current device; an empty grid launches nothing.
template <class... Expected>
void launch(void (*kernel)(Expected...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
            typename Id<Expected>::type... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), "CUDA launch");
}

// Sets memory of the device to zero, in the order of `stream`.
inline void clear(void* memory, size_t bytes, Stream stream) {
  if (bytes > 0) check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

extern __shared__ __align__(16) unsigned char dynamic_shared[];
#endif

// Carves typed arrays off the dynamic shared memory, one after another.
struct Smem {
  size_t offset = 0;

  template <class T>
  SSD_EXT_HD static constexpr size_t end_of(size_t offset, size_t count) {
    return (offset + alignof(T) - 1) / alignof(T) * alignof(T) + count * sizeof(T);
  }

  template <class T>
  __device__ __forceinline__ T* take(size_t count) {
    const size_t end = end_of<T>(offset, count);
    offset = end;
#if defined(SSD_EXT_EMULATE)
    return static_cast<T*>(emulator::carve(end - count * sizeof(T), count * sizeof(T)));
#else
    return reinterpret_cast<T*>(dynamic_shared + end - count * sizeof(T));
#endif
  }
};

// Carves typed arrays off a launcher's scratch memory, one after another; with a null base it only
// counts the bytes.
struct Scratch {
  void* base;
  size_t bytes = 0;

  template <class T>
  T* take(size_t count) {
    bytes = Smem::end_of<T>(bytes, count);
    T* array = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + bytes - count * sizeof(T));
#if defined(SSD_EXT_EMULATE)
    bytes += emulator::declare_array(array, count * sizeof(T), base);
#endif
    return array;
  }
};

// The type that T is computed in, and the tags that dispatch() hands out.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

template <class T>
struct Tag {
  using type = T;
};

template <class F>
void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(Tag<float>{});
    case DType::f64:
      return f(Tag<double>{});
    case DType::f16:
      return f(Tag<__half>{});
    case DType::bf16:
      return f(Tag<__nv_bfloat16>{});
  }
}

// f(Tag<From>{}, Tag<To>{}) where `from` promotes to `to`: the types are equal, or the second is wider.
template <class F>
void dispatch_promoted(DType from, DType to, F&& f) {
  dispatch(from, [&](auto from_tag) {
    dispatch(to, [&](auto to_tag) {
      using From = typename decltype(from_tag)::type;
      using To = typename decltype(to_tag)::type;
      if constexpr (std::is_same_v<From, To> || sizeof(From) < sizeof(To)) f(from_tag, to_tag);
    });
  });
}

// dispatch() in a kernel that computes in C, which holds every number of the type.
template <class C, class F>
__device__ __forceinline__ void dispatch_held(DType dtype, const F& f) {
  if constexpr (sizeof(C) == 8) {
    if (dtype == DType::f64) return f(Tag<double>{});
  }
  if (dtype == DType::f32) return f(Tag<float>{});
  if (dtype == DType::f16) return f(Tag<__half>{});
  f(Tag<__nv_bfloat16>{});
}

// A number of any type in C, which holds it.
template <class C, class T>
__device__ __forceinline__ C widened(T x) {
  return C(Compute<T>(x));
}

// iou_from(), to the bit. Most pairs of boxes lie apart, and their quotient, 0 / total, would take the slow path of the
// division: where iou_from() gives 0 this one divides to -1 or NaN first.
template <class C>
__device__ __forceinline__ C iou_of(C inter, C area_a, C area_b) {
  const C total = area_a + area_b - inter;
  return max_of((inter > C(0) && total > C(0) ? inter : -total) / total, C(0));
}

__device__ __forceinline__ int64_t global_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// Blocks of `threads` that cover n items, for kernels that walk the rest in strides of the grid.
inline unsigned blocks_for(int64_t n, int threads) {
  const int64_t blocks = (n + threads - 1) / threads;
  return unsigned(blocks < 65535 * 16 ? blocks : 65535 * 16);
}

// Four values as one 8- or 16-byte access, or two of 16 bytes.
template <class T>
struct alignas(sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16) Four {
  T v[4];
};

template <class T, class C = Compute<T>>
__device__ __forceinline__ Box<C> load_box(const T* boxes, int64_t i) {
  const Four<T> f = reinterpret_cast<const Four<T>*>(boxes)[i];
  return {widened<C>(f.v[0]), widened<C>(f.v[1]), widened<C>(f.v[2]), widened<C>(f.v[3])};
}

template <class T, class C = Compute<T>>
__device__ __forceinline__ CenterBox<C> load_center_box(const T* priors, int64_t i) {
  const Box<C> b = load_box<T, C>(priors, i);
  return {b.x1, b.y1, b.x2, b.y2};
}

template <class T>
__device__ __forceinline__ void store_four(T* out, int64_t i, Compute<T> a, Compute<T> b, Compute<T> c, Compute<T> d) {
  reinterpret_cast<Four<T>*>(out)[i] = {{T(a), T(b), T(c), T(d)}};
}

}  // namespace ssd_ext::gpu

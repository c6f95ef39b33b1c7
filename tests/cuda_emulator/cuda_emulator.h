#pragma once
// The CUDA C++ that kernels are written in, for the host compiler: common/gpu.h includes this in place
// of the CUDA runtime. Scheduling is in scheduler.cpp, the checks of memory in memory.cpp.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "emulator.h"

// ---- the language -----------------------------------------------------------------------------

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __forceinline__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static  // AddressSanitizer puts red zones round globals only
#else
#define __shared__ static thread_local  // recognised in the symbol table by being thread-local
#endif

#define threadIdx (::emulator::thread_index)
#define blockIdx (::emulator::block_index)
#define blockDim (::emulator::block_size)
#define gridDim (::emulator::grid_size)

namespace emulator {

extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

// ---- launches ---------------------------------------------------------------------------------

template <class T>
struct Id {
  using type = T;
};

// Runs body(arguments) as every thread of the grid; `kernel` only identifies it.
void run(const void* kernel, void (*body)(void*), void* arguments, size_t argument_bytes, dim3 grid, dim3 block,
         size_t shared_bytes);

template <class... Expected>
void launch(void (*kernel)(Expected...), dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/,
            typename Id<Expected>::type... args) {
  struct Call {
    void (*kernel)(Expected...);
    std::tuple<Expected...> args;
  } call{kernel, {args...}};
  const auto body = [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->args); };
  run(reinterpret_cast<const void*>(kernel), body, &call, sizeof(call), grid, block, shared_bytes);
}

// What cudaMemset does.
void clear(void* begin, size_t bytes);

// The dynamic shared memory from `offset` on, as an array with bounds of its own.
void* carve(size_t offset, size_t bytes);

// ---- meetings of threads ----------------------------------------------------------------------

enum class Op {
  syncthreads,
  syncthreads_count,
  syncthreads_and,
  syncthreads_or,
  syncwarp,
  shfl,
  ballot,
  any,
  all,
  match_any,
  reduce_add,
  reduce_min,
  reduce_max,
  reduce_and,
  reduce_or,
};

struct Site {
  const char* file;
  int line;
};

uint64_t meet_block(Op op, uint64_t value, Site site);
uint64_t meet_warp(Op op, unsigned mask, uint64_t value, unsigned source_lane, Site site);

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

// A shuffle reads lane `source` if that is in the caller's group of `width` lanes, else its own.
template <class T>
T shuffle(unsigned mask, T value, int source, bool in_group, Site site) {
  return from_bits<T>(meet_warp(Op::shfl, mask, to_bits(value), in_group ? source : lane(), site));
}

// ---- memory -----------------------------------------------------------------------------------

// An atomic access by the running thread: checked, and perhaps a switch to another thread before it.
void atomic_access(void* address, size_t bytes, const void* code);

void fence();  // of the running thread, for the whole device

// A read that L1 does not answer.
void read_past_l1(const void* address, size_t bytes, const void* code);

#define SSD_EXT_EMULATOR_UNCHECKED __attribute__((no_sanitize("thread"), noinline))

template <class T, class F>
SSD_EXT_EMULATOR_UNCHECKED T atomic(T* p, F new_value) {
  atomic_access(p, sizeof(T), __builtin_return_address(0));
  const T old = *p;
  *p = new_value(old);
  return old;
}

}  // namespace emulator

// ---- barriers, votes, shuffles ----------------------------------------------------------------

#define SSD_EXT_EMULATOR_SITE ::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

inline void ssd_ext_syncthreads(SSD_EXT_EMULATOR_SITE) { ::emulator::meet_block(::emulator::Op::syncthreads, 0, site); }
#define __syncthreads() ssd_ext_syncthreads()  // the CUDA headers declare it already
inline int __syncthreads_count(int p, SSD_EXT_EMULATOR_SITE) {
  return int(::emulator::meet_block(::emulator::Op::syncthreads_count, p != 0, site));
}
inline int __syncthreads_and(int p, SSD_EXT_EMULATOR_SITE) {
  return int(::emulator::meet_block(::emulator::Op::syncthreads_and, p != 0, site));
}
inline int __syncthreads_or(int p, SSD_EXT_EMULATOR_SITE) {
  return int(::emulator::meet_block(::emulator::Op::syncthreads_or, p != 0, site));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SSD_EXT_EMULATOR_SITE) {
  ::emulator::meet_warp(::emulator::Op::syncwarp, mask, 0, 0, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SSD_EXT_EMULATOR_SITE) {
  return ::emulator::shuffle(mask, value, (::emulator::lane() & -width) | (source & (width - 1)), true, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SSD_EXT_EMULATOR_SITE) {
  const int lane = ::emulator::lane(), source = lane ^ bits;
  return ::emulator::shuffle(mask, value, source, (source & -width) <= (lane & -width), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, SSD_EXT_EMULATOR_SITE) {
  const int lane = ::emulator::lane(), source = lane - int(by);
  return ::emulator::shuffle(mask, value, source, source >= (lane & -width), site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, SSD_EXT_EMULATOR_SITE) {
  const int lane = ::emulator::lane(), source = lane + int(by);
  return ::emulator::shuffle(mask, value, source, source < (lane & -width) + width, site);
}

#define SSD_EXT_EMULATOR_WARP(name, Result, Value, op, given)                       \
  inline Result name(unsigned mask, Value value, SSD_EXT_EMULATOR_SITE) {           \
    return Result(::emulator::meet_warp(::emulator::Op::op, mask, given, 0, site)); \
  }
SSD_EXT_EMULATOR_WARP(__ballot_sync, unsigned, int, ballot, value != 0)
SSD_EXT_EMULATOR_WARP(__any_sync, int, int, any, value != 0)
SSD_EXT_EMULATOR_WARP(__all_sync, int, int, all, value != 0)
SSD_EXT_EMULATOR_WARP(__reduce_add_sync, unsigned, unsigned, reduce_add, value)
SSD_EXT_EMULATOR_WARP(__reduce_min_sync, unsigned, unsigned, reduce_min, value)
SSD_EXT_EMULATOR_WARP(__reduce_max_sync, unsigned, unsigned, reduce_max, value)
SSD_EXT_EMULATOR_WARP(__reduce_and_sync, unsigned, unsigned, reduce_and, value)
SSD_EXT_EMULATOR_WARP(__reduce_or_sync, unsigned, unsigned, reduce_or, value)
// Signed integers have the order of the unsigned ones once their sign is inverted.
inline int __reduce_add_sync(unsigned mask, int value, SSD_EXT_EMULATOR_SITE) {
  return int(__reduce_add_sync(mask, unsigned(value), site));
}
inline int __reduce_min_sync(unsigned mask, int value, SSD_EXT_EMULATOR_SITE) {
  return int(__reduce_min_sync(mask, unsigned(value) ^ 0x80000000u, site) ^ 0x80000000u);
}
inline int __reduce_max_sync(unsigned mask, int value, SSD_EXT_EMULATOR_SITE) {
  return int(__reduce_max_sync(mask, unsigned(value) ^ 0x80000000u, site) ^ 0x80000000u);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SSD_EXT_EMULATOR_SITE) {
  return unsigned(::emulator::meet_warp(::emulator::Op::match_any, mask, ::emulator::to_bits(value), 0, site));
}

// ---- atomics ----------------------------------------------------------------------------------

#define SSD_EXT_EMULATOR_ATOMIC(name, expression)                       \
  template <class T>                                                    \
  __forceinline__ T name(T* p, typename ::emulator::Id<T>::type v) {    \
    return ::emulator::atomic(p, [v](T old) { return T(expression); }); \
  }
SSD_EXT_EMULATOR_ATOMIC(atomicAdd, old + v)
SSD_EXT_EMULATOR_ATOMIC(atomicSub, old - v)
SSD_EXT_EMULATOR_ATOMIC(atomicMin, v < old ? v : old)
SSD_EXT_EMULATOR_ATOMIC(atomicMax, v > old ? v : old)
SSD_EXT_EMULATOR_ATOMIC(atomicAnd, old& v)
SSD_EXT_EMULATOR_ATOMIC(atomicOr, old | v)
SSD_EXT_EMULATOR_ATOMIC(atomicXor, old ^ v)
SSD_EXT_EMULATOR_ATOMIC(atomicExch, v)
SSD_EXT_EMULATOR_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
template <class T>
__forceinline__ T atomicCAS(T* p, typename ::emulator::Id<T>::type expected, typename ::emulator::Id<T>::type v) {
  return ::emulator::atomic(p, [=](T old) { return old == expected ? v : old; });
}
inline void __threadfence() { ::emulator::fence(); }
inline void __threadfence_block() {}

// ---- scalar intrinsics ------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)(x)) : 64; }
inline unsigned __float_as_uint(float x) { return unsigned(::emulator::to_bits(x)); }
inline int __float_as_int(float x) { return int(::emulator::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return ::emulator::from_bits<float>(x); }
inline float __int_as_float(int x) { return ::emulator::from_bits<float>(unsigned(x)); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
SSD_EXT_EMULATOR_UNCHECKED T __ldcg(const T* p) {
  ::emulator::read_past_l1(p, sizeof(T), __builtin_return_address(0));
  return *p;
}

// One fault for each tool of compute-sanitizer. kernel_calls.py plants them after its calls, in the
// same process and under the same options, so that the tool's silence about the ops means something.
#include <cuda_runtime.h>

#include <cstdint>

namespace ssd_ext::planted {

constexpr int kThreads = 64;

__global__ void memcheck(float* memory, int64_t count) { memory[count] = 0; }

__global__ void initcheck(float* memory, int64_t) { memory[threadIdx.x] += 1; }

// Each warp reads what the other one writes, without a barrier between.
__global__ void racecheck(float* memory, int64_t) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = memory[threadIdx.x];
  memory[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// A warp and a half arrive at the barrier, the others have not left the kernel.
__global__ void synccheck(float* memory, int64_t) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = memory[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < kThreads * 3 / 4) {
    shared[threadIdx.x] += 1;
    __syncthreads();
  }
  memory[threadIdx.x] = shared[threadIdx.x];
}

}  // namespace ssd_ext::planted

// `memory` holds `count` floats, at least 64. Returns the CUDA error code, 0 for none.
#define PLANT(tool, threads)                                             \
  extern "C" int plant_##tool(float* memory, int64_t count) {            \
    ssd_ext::planted::tool<<<1, threads>>>(memory, count);               \
    const cudaError_t launched = cudaGetLastError();                     \
    return launched != cudaSuccess ? launched : cudaDeviceSynchronize(); \
  }
PLANT(memcheck, 1)
PLANT(initcheck, ssd_ext::planted::kThreads)
PLANT(racecheck, ssd_ext::planted::kThreads)
PLANT(synccheck, ssd_ext::planted::kThreads)

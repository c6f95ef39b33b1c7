// The blocks of a kernel that one multiprocessor of an H100 runs at a time, by NVIDIA's own rules.
#include <cuda_occupancy.h>

extern "C" int blocks_per_multiprocessor(int threads, int registers, int barriers, int static_shared,
                                         int dynamic_shared) {
  cudaOccDeviceProp h100;
  h100.computeMajor = 9;
  h100.computeMinor = 0;
  h100.maxThreadsPerBlock = 1024;
  h100.maxThreadsPerMultiprocessor = 2048;
  h100.regsPerBlock = 64 * 1024;
  h100.regsPerMultiprocessor = 64 * 1024;
  h100.warpSize = 32;
  h100.numSms = 132;
  h100.sharedMemPerBlock = 48 * 1024;
  h100.sharedMemPerBlockOptin = 227 * 1024;
  h100.sharedMemPerMultiprocessor = 228 * 1024;
  h100.reservedSharedMemPerBlock = 1024;

  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = threads;
  kernel.numRegs = registers;
  kernel.numBlockBarriers = barriers;
  kernel.sharedSizeBytes = static_shared;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_DEFAULT;  // 48 KB: gpu::launch asks for no more

  const cudaOccDeviceState state;
  cudaOccResult result;
  const cudaOccError error =
      cudaOccMaxActiveBlocksPerMultiprocessor(&result, &h100, &kernel, &state, threads, dynamic_shared);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}

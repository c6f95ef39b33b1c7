#pragma once

#if defined(__CUDACC__)
#define SSD_EXT_HD __host__ __device__ __forceinline__
#else
#define SSD_EXT_HD inline __attribute__((always_inline))
#endif

#pragma once
// The four floating types of the ops, named without any torch or CUDA header, so that launchers
// on raw pointers can be declared once for the binding and for the kernels.
#include <cstdint>

namespace ssd_ext {

enum class DType { f32, f64, f16, bf16 };

// A cudaStream_t; void* keeps CUDA headers out of the files that a CPU-only build compiles.
using Stream = void*;

}  // namespace ssd_ext

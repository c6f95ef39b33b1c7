#pragma once
// What every binding needs of torch: the LibTorch stable ABI alone (no ATen, no c10), argument
// checks that print the offending value, and the choice of backend.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/dtype.h"
#if defined(SSD_EXT_EMULATE)
#include "emulator.h"
#endif

namespace ssd_ext {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using Tensor = torch::stable::Tensor;

// An op registered for CPU and CUDA alike: one function checks, allocates, then picks the kernel.
#define SSD_EXT_REGISTER(m)                                                  \
  static void ssd_ext_register(torch::stable::detail::StableLibrary&);       \
  STABLE_TORCH_LIBRARY_IMPL(ssd_ext, CPU, cpu) { ssd_ext_register(cpu); }    \
  STABLE_TORCH_LIBRARY_IMPL(ssd_ext, CUDA, cuda) { ssd_ext_register(cuda); } \
  static void ssd_ext_register(torch::stable::detail::StableLibrary& m)

// ---- errors -----------------------------------------------------------------------------------

// Python sees a ValueError. (STD_TORCH_CHECK would prefix the message with file and line.)
template <class... Parts>
[[noreturn]] void raise(const Parts&... parts) {
  std::ostringstream text;
  text << "ssd_ext::";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

std::string shape_of(const Tensor& t);   // "[3, 5]"
std::string device_of(const Tensor& t);  // "cpu", "cuda:0"
const char* name_of(ScalarType type);    // "float32"

// A named argument, for checks that speak of it.
struct Arg {
  const char* name;
  const Tensor& tensor;
};

// All floating, of any dtypes, and on one device.
void check_mixed_floating(const char* op, std::initializer_list<Arg> args);
// All floating, of one dtype and on one device.
void check_floating(const char* op, std::initializer_list<Arg> args);
void check_long(const char* op, const Arg& arg, const Arg& like);  // int64, on the device of `like`
void check_shape(const char* op, const Arg& arg, std::initializer_list<int64_t> shape, const char* expected);
void check_device(const char* op, const Arg& arg, const Arg& like);   // on the device of `like`
void check_fraction(const char* op, const char* name, double value);  // in [0, 1]
void check_variances(const char* op, const std::vector<double>& variances);
void check_rows(const char* op, const Arg& rows);  // [B, P, ...]: no more than CUDA kernels count
void check_mining(const char* op, const Arg& rows, double ratio, int64_t min_negatives);
constexpr int64_t kAny = -1;  // any extent, in check_shape

// ---- data -------------------------------------------------------------------------------------

inline bool is_cuda(const Tensor& t) {
#if defined(SSD_EXT_EMULATE)
  if (emulator::is_on()) return true;
#endif
  return t.device().type() == DeviceType::CUDA;
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline bool is_half(ScalarType t) { return t == ScalarType::Half || t == ScalarType::BFloat16; }

// Of floating types: what torch.promote_types gives, and the type that numbers of a type are computed in.
inline ScalarType promoted(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline ScalarType computed_in(ScalarType t) { return is_half(t) ? ScalarType::Float : t; }

inline Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// The tensor that a CPU kernel reads: contiguous, of the type computed in; float16 and bfloat16 as float32 by default.
inline Tensor compute_input(const Tensor& t, ScalarType type) { return as_contiguous(as_type(t, type)); }
inline Tensor compute_input(const Tensor& t) { return compute_input(t, computed_in(t.scalar_type())); }

// A CPU kernel's result, back in the dtype that the caller gave.
inline Tensor as_dtype_of(const Tensor& result, const Tensor& given) { return as_type(result, given.scalar_type()); }

// Uninitialised memory for kernels to write, on the device of `like` and, by default, of its dtype.
Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                  std::optional<ScalarType> type = {});
Tensor new_output_like(const Tensor& like);  // of its shape too

// The tensor that a CUDA kernel reads: contiguous and aligned for 16-byte loads (a view into the
// middle of another tensor may not be). Kernels touch only these and what new_output() gives: the
// emulator holds them to it.
Tensor cuda_input(const Tensor& t);
// The same for a kernel that takes strides and reads element by element: the tensor as it lies.
Tensor cuda_strided_input(const Tensor& t);

// Calls f with a float or a double that tells the type of a compute_input.
template <class F>
decltype(auto) dispatch_compute(const Tensor& t, F&& f) {
  return t.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

DType dtype_of(ScalarType type);  // a floating one
inline DType dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

// ---- CUDA -------------------------------------------------------------------------------------

// The guard and stream of a launch on t's device. Throws in a build without CUDA.
struct CudaLaunch {
  explicit CudaLaunch(const char* op, const Tensor& t);
#if defined(SSD_EXT_EMULATE)
  CudaLaunch(const CudaLaunch&) = delete;
  ~CudaLaunch() { emulator::forget(); }
#else
  torch::stable::accelerator::DeviceGuard guard;
#endif
  Stream stream;
};

// Runs its argument in a CUDA build; in a CPU-only build nothing refers to the kernels, and
// constructing CudaLaunch has thrown before control comes here.
#if defined(SSD_EXT_WITH_CUDA)
#define SSD_EXT_CUDA_CALL(...) __VA_ARGS__
#else
#define SSD_EXT_CUDA_CALL(...) (void)0
#endif

// Uninitialised scratch memory on the device of t.
inline Tensor byte_workspace(const Tensor& t, size_t bytes) {
  return new_output(t, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

// ---- threads ----------------------------------------------------------------------------------

// The calling thread's rounding, and whether it takes subnormal numbers for 0 (torch.set_flush_denormal).
inline uint64_t floating_point_mode() {
#if defined(__x86_64__)
  return __builtin_ia32_stmxcsr() & ~0x3fu;  // without the flags of what has happened
#elif defined(__aarch64__)
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}
inline void set_floating_point_mode([[maybe_unused]] uint64_t mode) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(unsigned(mode));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(mode));
#endif
}

// f(begin, end) over parts of [0, n), on torch's own threads (torch.set_num_threads), which compute in the caller's
// floating-point mode meanwhile. An exception is carried over here, for torch would lose its text.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain) {
    f(int64_t{0}, n);
    return;
  }
  std::exception_ptr error;
  std::mutex guard;
  const uint64_t mode = floating_point_mode();
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    const uint64_t before = floating_point_mode();
    set_floating_point_mode(mode);
    try {
      f(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
    }
    set_floating_point_mode(before);
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace ssd_ext

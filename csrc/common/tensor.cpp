#include "common/tensor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(SSD_EXT_WITH_CUDA)
// Declared here rather than by USE_CUDA, and weak: it lives in libtorch_cuda.so, and a CUDA build of
// this extension must load under a CPU-only torch too.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace ssd_ext {

std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

std::string device_of(const Tensor& t) {
  return t.device().type() == DeviceType::CPU ? "cpu" : "cuda:" + std::to_string(t.get_device_index());
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

void check_device(const char* op, const Arg& arg, const Arg& like) {
  if (arg.tensor.device() != like.tensor.device()) {
    raise(op, ": ", arg.name, " must be on the device of ", like.name, ", ", device_of(like.tensor), ", got ",
          device_of(arg.tensor));
  }
}

void check_mixed_floating(const char* op, std::initializer_list<Arg> args) {
  for (const Arg& arg : args) {
    check_device(op, arg, *args.begin());
    const ScalarType type = arg.tensor.scalar_type();
    if (type != ScalarType::Float && type != ScalarType::Double && !is_half(type)) {
      raise(op, ": ", arg.name, " must be float32, float64, float16 or bfloat16, got ", name_of(type));
    }
  }
}

void check_floating(const char* op, std::initializer_list<Arg> args) {
  const Arg& first = *args.begin();
  check_mixed_floating(op, {first});
  const ScalarType type = first.tensor.scalar_type();
  for (const Arg& arg : args) {
    check_device(op, arg, first);
    if (arg.tensor.scalar_type() != type) {
      raise(op, ": ", arg.name, " must have the dtype of ", first.name, ", ", name_of(type), ", got ",
            name_of(arg.tensor.scalar_type()));
    }
  }
}

void check_long(const char* op, const Arg& arg, const Arg& like) {
  check_device(op, arg, like);
  if (arg.tensor.scalar_type() != ScalarType::Long) {
    raise(op, ": ", arg.name, " must be int64, got ", name_of(arg.tensor.scalar_type()));
  }
}

void check_shape(const char* op, const Arg& arg, std::initializer_list<int64_t> shape, const char* expected) {
  bool ok = arg.tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t extent : shape) {
    ok = ok && (extent == kAny || arg.tensor.size(i) == extent);
    ++i;
  }
  if (!ok) raise(op, ": ", arg.name, " must be ", expected, ", got ", shape_of(arg.tensor));
}

void check_fraction(const char* op, const char* name, double value) {
  if (!(value >= 0 && value <= 1)) raise(op, ": ", name, " must be in [0, 1], got ", value);
}

void check_variances(const char* op, const std::vector<double>& variances) {
  if (variances.size() != 2) raise(op, ": variances must be (center, size), got ", variances.size(), " values");
  for (const double v : variances) {
    if (!(v > 0 && std::isfinite(v)))
      raise(op, ": variances must be positive and finite, got (", variances[0], ", ", variances[1], ")");
  }
}

void check_rows(const char* op, const Arg& rows) {
  constexpr int64_t images = 0x7fffffff, priors = 0xffffffff;  // a block an image; counts are of 32 bits
  if (is_cuda(rows.tensor) && (rows.tensor.size(0) > images || rows.tensor.size(1) > priors)) {
    raise(op, ": ", rows.name, " must have at most ", images, " images and ", priors, " priors on CUDA, got ",
          shape_of(rows.tensor));
  }
}

void check_mining(const char* op, const Arg& rows, double ratio, int64_t min_negatives) {
  check_rows(op, rows);
  if (!(ratio >= 0 && std::isfinite(ratio))) raise(op, ": neg_to_pos_ratio must be a finite number >= 0, got ", ratio);
  if (min_negatives < 0) raise(op, ": min_negatives must be >= 0, got ", min_negatives);
}

DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      return DType::f32;
  }
}

#if defined(SSD_EXT_EMULATE)

// Elements from the first to the last one in memory.
static int64_t span_of(const Tensor& t) {
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return t.numel() == 0 ? 0 : last + 1;
}

static const Tensor& declared(const Tensor& t, emulator::Content content) {
  emulator::declare(t.const_data_ptr(), static_cast<size_t>(span_of(t) * t.element_size()), content);
  return t;
}
static const Tensor& as_input(const Tensor& t) { return declared(t, emulator::Content::input); }
// Of other content each time, so that a test which calls twice notices what no kernel writes.
static const Tensor& as_output(const Tensor& t) {
  const size_t bytes = static_cast<size_t>(span_of(t) * t.element_size());
  if (bytes != 0) std::memset(t.mutable_data_ptr(), emulator::garbage(), bytes);
  return declared(t, emulator::Content::undefined);
}

CudaLaunch::CudaLaunch(const char*, const Tensor&) : stream(nullptr) {}

#else

static const Tensor& as_input(const Tensor& t) { return t; }
static const Tensor& as_output(const Tensor& t) { return t; }

static Stream current_stream(const char* op, const Tensor& t) {
#if defined(SSD_EXT_WITH_CUDA)
  if (!aoti_torch_get_current_cuda_stream) raise(op, ": this torch has no CUDA support");
  Stream stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
#else
  raise(op, ": got a tensor on ", device_of(t),
        ", but ssd_ext was built without CUDA; reinstall with SSD_EXT_CUDA=ON and nvcc on PATH (or CUDA_HOME set)");
#endif
}

CudaLaunch::CudaLaunch(const char* op, const Tensor& t) : guard(t.get_device_index()), stream(current_stream(op, t)) {}

#endif

Tensor cuda_input(const Tensor& t) {
  const Tensor c = as_contiguous(t);
  return as_input(reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 == 0 ? c : torch::stable::clone(c));
}

Tensor cuda_strided_input(const Tensor& t) { return as_input(t); }

// The first writes to a fresh block of this size take longer in small pages than most ops in all: 33 ms of 90 MB.
static void ask_for_huge_pages([[maybe_unused]] const Tensor& out) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  constexpr int64_t kLeastBytes = 8 << 20;
  const int64_t bytes = out.numel() * out.element_size();
  if (bytes < kLeastBytes) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.const_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: otherwise the pages are small
#endif
}

Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, std::optional<ScalarType> type) {
  if (!is_cuda(like)) {
    const Tensor out = torch::stable::new_empty(like, shape, type);
    ask_for_huge_pages(out);
    return out;
  }
  // The stable new_empty() looks the op up by its name and boxes six arguments: longer than a small kernel takes.
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  const int32_t dtype =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type.value_or(like.scalar_type())));
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  dtype, device, like.get_device_index(), &out));
  return as_output(Tensor(out));
}

Tensor new_output_like(const Tensor& like) {
  if (like.is_contiguous()) return new_output(like, like.sizes());
  const Tensor out = torch::stable::empty_like(like);  // of its strides
  if (is_cuda(like)) return as_output(out);
  ask_for_huge_pages(out);
  return out;
}

}  // namespace ssd_ext

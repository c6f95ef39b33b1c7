#include "boxes/boxes.h"

#include "common/tensor.h"

#define SSD_EXT_SIMD_FILE "boxes/boxes.simd.h"
#include "common/for_each_simd_level.h"

namespace ssd_ext::boxes {
namespace {

constexpr int64_t kGrain = 4096;  // rows worth a thread

// Checks common to encode and decode; `rows` is boxes or deltas, [..., P, 4].
Coding check_coding(const char* op, const Arg& rows, const Arg& priors, const std::vector<double>& variances,
                    double clip) {
  check_mixed_floating(op, {rows, priors});
  check_shape(op, priors, {kAny, 4}, "[P, 4]");
  const Tensor& t = rows.tensor;
  const int64_t num_priors = priors.tensor.size(0);
  if (t.dim() < 2 || t.size(t.dim() - 1) != 4 || t.size(t.dim() - 2) != num_priors) {
    raise(op, ": ", rows.name, " must be [..., ", num_priors, ", 4] to go with ", num_priors, " priors, got ",
          shape_of(t));
  }
  check_variances(op, variances);
  if (clip != clip) raise(op, ": bbox_xform_clip must be a number, got nan");
  return {t.numel() / 4, num_priors, variances[0], variances[1], clip};
}

Tensor encode_op(const Tensor& boxes, const Tensor& priors, std::vector<double> variances) {
  const Coding coding = check_coding("encode", {"boxes", boxes}, {"priors", priors}, variances, 0);
  const ScalarType type = promoted(boxes.scalar_type(), priors.scalar_type()), computed = computed_in(type);
  if (is_cuda(boxes)) {
    const CudaLaunch launch("encode", boxes);
    const Tensor b = cuda_input(boxes), p = cuda_input(as_type(priors, type));
    Tensor deltas = new_output(b, b.sizes(), type);
    SSD_EXT_CUDA_CALL(encode_cuda(dtype_of(b), b.const_data_ptr(), dtype_of(p), p.const_data_ptr(),
                                  deltas.mutable_data_ptr(), coding, launch.stream));
    return deltas;
  }
  const Tensor b = compute_input(boxes, computed), p = compute_input(priors, computed);
  Tensor deltas = new_output_like(b);
  dispatch_compute(b, [&](auto zero) {
    using T = decltype(zero);
    const T *from = b.const_data_ptr<T>(), *prior = p.const_data_ptr<T>();
    T* to = deltas.mutable_data_ptr<T>();
    parallel_for(coding.rows, kGrain, [&](int64_t begin, int64_t end) {
      SSD_EXT_SIMD_CALL(encode<T>, from, prior, to, coding, begin, end);
    });
  });
  return as_type(deltas, type);
}

Tensor decode_op(const Tensor& deltas, const Tensor& priors, std::vector<double> variances, double clip) {
  const Coding coding = check_coding("decode", {"deltas", deltas}, {"priors", priors}, variances, clip);
  const ScalarType type = promoted(deltas.scalar_type(), priors.scalar_type()), computed = computed_in(type);
  if (is_cuda(deltas)) {
    const CudaLaunch launch("decode", deltas);
    const Tensor d = cuda_input(deltas), p = cuda_input(as_type(priors, type));
    Tensor boxes = new_output(d, d.sizes(), type);
    SSD_EXT_CUDA_CALL(decode_cuda(dtype_of(d), d.const_data_ptr(), dtype_of(p), p.const_data_ptr(),
                                  boxes.mutable_data_ptr(), coding, launch.stream));
    return boxes;
  }
  const Tensor d = compute_input(deltas, computed), p = compute_input(priors, computed);
  Tensor boxes = new_output_like(d);
  dispatch_compute(d, [&](auto zero) {
    using T = decltype(zero);
    const T *from = d.const_data_ptr<T>(), *prior = p.const_data_ptr<T>();
    T* to = boxes.mutable_data_ptr<T>();
    parallel_for(coding.rows, kGrain, [&](int64_t begin, int64_t end) {
      SSD_EXT_SIMD_CALL(decode<T>, from, prior, to, coding, begin, end);
    });
  });
  return as_type(boxes, type);
}

Tensor box_iou_op(const Tensor& a, const Tensor& b) {
  const char* op = "box_iou";
  check_floating(op, {{"boxes1", a}, {"boxes2", b}});
  check_shape(op, {"boxes1", a}, {kAny, 4}, "[N, 4]");
  check_shape(op, {"boxes2", b}, {kAny, 4}, "[M, 4]");
  const int64_t n = a.size(0), m = b.size(0);
  if (is_cuda(a)) {
    const CudaLaunch launch(op, a);
    const Tensor ca = cuda_input(a), cb = cuda_input(b);
    Tensor out = new_output(ca, {n, m});
    SSD_EXT_CUDA_CALL(box_iou_cuda(dtype_of(ca), ca.const_data_ptr(), cb.const_data_ptr(), out.mutable_data_ptr(), n, m,
                                   launch.stream));
    return out;
  }
  const Tensor ca = compute_input(a), cb = compute_input(b);
  Tensor out = new_output(ca, {n, m});
  dispatch_compute(ca, [&](auto zero) {
    using T = decltype(zero);
    SSD_EXT_SIMD_CALL(box_iou<T>, ca.const_data_ptr<T>(), cb.const_data_ptr<T>(), out.mutable_data_ptr<T>(), n, m);
  });
  return as_dtype_of(out, a);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssd_ext, m) {
  m.def("encode(Tensor boxes, Tensor priors, float[] variances) -> Tensor");
  m.def("decode(Tensor deltas, Tensor priors, float[] variances, float bbox_xform_clip) -> Tensor");
  m.def("box_iou(Tensor boxes1, Tensor boxes2) -> Tensor");
}

SSD_EXT_REGISTER(m) {
  m.impl("encode", TORCH_BOX(&encode_op));
  m.impl("decode", TORCH_BOX(&decode_op));
  m.impl("box_iou", TORCH_BOX(&box_iou_op));
}

}  // namespace ssd_ext::boxes

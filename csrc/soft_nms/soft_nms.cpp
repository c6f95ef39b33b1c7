#include "soft_nms/soft_nms.h"

#include "common/tensor.h"

#define SSD_EXT_SIMD_FILE "soft_nms/soft_nms.simd.h"
#include "common/for_each_simd_level.h"

namespace ssd_ext::soft_nms {
namespace {

template <class T>
int64_t soft_nms_cpu(const T* boxes, const T* scores, int64_t n, const Params& params, int64_t* keep, T* out_scores) {
  const int64_t count = SSD_EXT_SIMD_CALL(soft_nms<T>, boxes, scores, n, params, keep, out_scores);
  for (int64_t k = count; k < n; ++k) {
    keep[k] = -1;
    out_scores[k] = 0;
  }
  return count;
}

struct Padded {
  Tensor keep, scores, count;
};

Padded padded(const char* op, const Tensor& boxes, const Tensor& scores, const Params& params) {
  check_floating(op, {{"boxes", boxes}, {"scores", scores}});
  check_shape(op, {"boxes", boxes}, {kAny, 4}, "[N, 4]");
  const int64_t n = boxes.size(0);
  if (scores.dim() != 1 || scores.size(0) != n) {
    raise(op, ": scores must be [", n, "] to go with ", n, " boxes, got ", shape_of(scores));
  }
  constexpr int64_t kMost = 0x7fffffff;
  if (is_cuda(boxes) && n > kMost) raise(op, ": at most ", kMost, " boxes on CUDA, got ", n);
  check_fraction(op, "iou_threshold", params.iou_threshold);
  if (!(params.sigma > 0)) raise(op, ": sigma must be positive, got ", params.sigma);
  if (params.score_threshold != params.score_threshold) raise(op, ": score_threshold must be a number, got nan");
  if (params.method != Method::linear && params.method != Method::gaussian) {
    raise(op, ": method must be 0 (linear) or 1 (gaussian), got ", static_cast<int64_t>(params.method));
  }

  Tensor keep = new_output(boxes, {n}, ScalarType::Long);
  Tensor count = new_output(boxes, {}, ScalarType::Long);
  if (is_cuda(boxes)) {
    const CudaLaunch launch(op, boxes);
    const Tensor b = cuda_input(boxes), s = cuda_input(scores);
    Tensor out = new_output_like(s);
    SSD_EXT_CUDA_CALL(
        const Tensor workspace = byte_workspace(boxes, workspace_bytes(dtype_of(b), n));
        soft_nms_cuda(dtype_of(b), b.const_data_ptr(), s.const_data_ptr(), n, params, workspace.mutable_data_ptr(),
                      keep.mutable_data_ptr<int64_t>(), out.mutable_data_ptr(), count.mutable_data_ptr<int64_t>(),
                      launch.stream));
    return {keep, out, count};
  }
  const Tensor b = compute_input(boxes), s = compute_input(scores);
  Tensor out = new_output_like(s);
  dispatch_compute(b, [&](auto zero) {
    using T = decltype(zero);
    *count.mutable_data_ptr<int64_t>() = soft_nms_cpu(b.const_data_ptr<T>(), s.const_data_ptr<T>(), n, params,
                                                      keep.mutable_data_ptr<int64_t>(), out.mutable_data_ptr<T>());
  });
  return {keep, as_dtype_of(out, scores), count};
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_padded_op(const Tensor& boxes, const Tensor& scores, double iou_threshold,
                                                      double sigma, double score_threshold, int64_t method) {
  Padded p = padded("soft_nms_padded", boxes, scores, {Method(method), iou_threshold, sigma, score_threshold});
  return {p.keep, p.scores, p.count};
}

std::tuple<Tensor, Tensor> soft_nms_op(const Tensor& boxes, const Tensor& scores, double iou_threshold, double sigma,
                                       double score_threshold, int64_t method) {
  Padded p = padded("soft_nms", boxes, scores, {Method(method), iou_threshold, sigma, score_threshold});
  const Tensor host = torch::stable::to(p.count, torch::stable::Device(DeviceType::CPU));
  const int64_t count = *host.const_data_ptr<int64_t>();
  return {torch::stable::narrow(p.keep, 0, 0, count), torch::stable::narrow(p.scores, 0, 0, count)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssd_ext, m) {
  m.def(
      "soft_nms_padded(Tensor boxes, Tensor scores, float iou_threshold, float sigma, float score_threshold, "
      "int method) -> (Tensor keep, Tensor scores, Tensor count)");
}

// soft_nms is defined in Python: its tags are beyond the C++ interface.
SSD_EXT_REGISTER(m) {
  m.impl("soft_nms_padded", TORCH_BOX(&soft_nms_padded_op));
  m.impl("soft_nms", TORCH_BOX(&soft_nms_op));
}

}  // namespace ssd_ext::soft_nms

#include "detect/detect.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <functional>

#include "common/tensor.h"

#define SSD_EXT_SIMD_FILE "detect/detect.simd.h"
#include "common/for_each_simd_level.h"

namespace ssd_ext::detect {
namespace {

void check_at_least_one(const char* op, const char* name, int64_t value) {
  if (value < 1) raise(op, ": ", name, " must be at least 1, got ", value);
}

// The greatest number of a half type that is not above x.
template <class Half>
double rounded_down(double x) {
  Half nearest(static_cast<float>(x));
  if (static_cast<float>(nearest) > x) nearest.x += nearest.x & 0x8000 ? 1 : -1;
  return static_cast<float>(nearest);
}

// The largest window of numbers of `type` that lies within; where there is none, that of the numbers around it.
Box<double> inner_window(const Box<double>& window, ScalarType type) {
  if (!is_half(type)) return window;
  const auto down =
      type == ScalarType::Half ? rounded_down<torch::headeronly::Half> : rounded_down<torch::headeronly::BFloat16>;
  return {-down(-window.x1), -down(-window.y1), down(window.x2), down(window.y2)};
}

Params check_params(const char* op, double score_threshold, double iou_threshold, int64_t topk_per_class,
                    int64_t max_detections, bool sigmoid, bool class_agnostic, const std::vector<double>& variances,
                    double clip, const std::optional<std::vector<double>>& window, ScalarType type) {
  check_fraction(op, "score_threshold", score_threshold);
  check_fraction(op, "iou_threshold", iou_threshold);
  check_at_least_one(op, "topk_per_class", topk_per_class);
  check_at_least_one(op, "max_detections", max_detections);
  check_variances(op, variances);
  if (clip != clip) raise(op, ": bbox_xform_clip must be a number, got nan");
  constexpr double inf = std::numeric_limits<double>::infinity();
  std::vector<double> w{-inf, -inf, inf, inf};
  if (window) {
    w = *window;
    if (w.size() != 4) raise(op, ": window must be (x1, y1, x2, y2), got ", w.size(), " values");
    if (!(w[0] <= w[2] && w[1] <= w[3])) {
      raise(op, ": window must have x1 <= x2 and y1 <= y2, got (", w[0], ", ", w[1], ", ", w[2], ", ", w[3], ")");
    }
  }
  const Box<double> box{w[0], w[1], w[2], w[3]};
  return {score_threshold,        iou_threshold, topk_per_class, max_detections, sigmoid,
          class_agnostic,         variances[0],  variances[1],   clip,           box,
          inner_window(box, type)};
}

Sizes check_tensors(const char* op, const Tensor& deltas, const Tensor& logits, const Tensor& priors) {
  check_mixed_floating(op, {{"deltas", deltas}, {"logits", logits}, {"priors", priors}});
  check_shape(op, {"priors", priors}, {kAny, 4}, "[P, 4]");
  const int64_t num_priors = priors.size(0);
  check_shape(op, {"logits", logits}, {kAny, num_priors, kAny},
              ("[B, P, C] with P = " + std::to_string(num_priors) + ", one row for each of priors").c_str());
  const int64_t images = logits.size(0), classes = logits.size(2);
  check_shape(op, {"deltas", deltas}, {images, num_priors, 4},
              ("[B, P, 4] with B = " + std::to_string(images) + " and P = " + std::to_string(num_priors)).c_str());
  if (classes > 0 && num_priors > kMostCandidates / classes) {
    raise(op, ": logits must have at most ", kMostCandidates, " elements an image, got ", shape_of(logits));
  }
  const int64_t blocks = std::max(kMostPartsCuda, num_priors / 64 + 1);  // of an image, where there are many
  if (is_cuda(logits) && images > kMostBlocksCuda / blocks) {
    raise(op, ": ", kMostPartsCuda, " * B and B * (P / 64 + 1) of logits must be at most ", kMostBlocksCuda,
          " on CUDA, got ", shape_of(logits));
  }
  return {images, num_priors, classes};
}

// [..., rows, columns]
Strided as_it_lies(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return {t.const_data_ptr(), dtype_of(t), last > 1 ? t.stride(last - 2) : 0, t.stride(last - 1), t.stride(last)};
}

struct Detections {
  Tensor boxes, scores, labels, counts;

  Detections(const Tensor& like, ScalarType type, const Inputs& in)
      : boxes(new_output(like, {in.sizes.images, in.params.max_detections, 4}, type)),
        scores(new_output(like, {in.sizes.images, in.params.max_detections}, type)),
        labels(new_output(like, {in.sizes.images, in.params.max_detections}, ScalarType::Long)),
        counts(new_output(like, {in.sizes.images}, ScalarType::Long)) {}

  template <class T>
  Outputs<T> of_type() {
    return {static_cast<T*>(boxes.mutable_data_ptr()), static_cast<T*>(scores.mutable_data_ptr()),
            labels.mutable_data_ptr<int64_t>(), counts.mutable_data_ptr<int64_t>()};
  }
};

using Returned = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Returned run_cuda(const char* op, const Tensor& logits, const Tensor& deltas, const Tensor& priors, ScalarType type,
                  const Inputs& in) {
  const CudaLaunch launch(op, logits);
  for (const Tensor* t : {&logits, &deltas, &priors}) cuda_strided_input(*t);
  Detections found(logits, type, in);
  SSD_EXT_CUDA_CALL(
      Tensor workspace = byte_workspace(logits, workspace_bytes(in));
      detect_cuda(in, found.of_type<void>(), workspace.mutable_data_ptr(), launch.stream));
  return {found.boxes, found.scores, found.labels, found.counts};
}

Returned run_cpu(const Tensor& like, ScalarType type, const Inputs& in) {
  Detections found(like, computed_in(type), in);
  dispatch_compute(found.boxes, [&](auto zero) {
    using T = decltype(zero);
    SSD_EXT_SIMD_CALL(detect_images<T>, in, found.of_type<T>());
  });
  return {as_type(found.boxes, type), as_type(found.scores, type), found.labels, found.counts};
}

Returned detect_op(const Tensor& deltas, const Tensor& logits, const Tensor& priors, double score_threshold,
                   double iou_threshold, int64_t topk_per_class, int64_t max_detections, bool sigmoid,
                   std::vector<double> variances, double clip, bool class_agnostic,
                   std::optional<std::vector<double>> window) {
  const char* op = "detect";
  const Sizes sizes = check_tensors(op, deltas, logits, priors);
  const ScalarType type = promoted(promoted(deltas.scalar_type(), logits.scalar_type()), priors.scalar_type());
  const Params params = check_params(op, score_threshold, iou_threshold, topk_per_class, max_detections, sigmoid,
                                     class_agnostic, variances, clip, window, type);
  const Inputs in{dtype_of(type), as_it_lies(logits), as_it_lies(deltas), as_it_lies(priors), sizes, params};
  return is_cuda(logits) ? run_cuda(op, logits, deltas, priors, type, in) : run_cpu(logits, type, in);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssd_ext, m) {
  m.def(
      "detect(Tensor deltas, Tensor logits, Tensor priors, float score_threshold, float iou_threshold, "
      "int topk_per_class, int max_detections, bool sigmoid, float[] variances, float bbox_xform_clip, "
      "bool class_agnostic, float[]? window) -> (Tensor boxes, Tensor scores, Tensor labels, Tensor counts)");
}

SSD_EXT_REGISTER(m) { m.impl("detect", TORCH_BOX(&detect_op)); }

}  // namespace ssd_ext::detect

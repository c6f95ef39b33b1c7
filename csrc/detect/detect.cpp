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

Params check_params(const char* op, double score_threshold, double iou_threshold, int64_t topk_per_class,
                    int64_t max_detections, bool sigmoid, bool class_agnostic, const std::vector<double>& variances,
                    double clip, const std::optional<std::vector<double>>& window) {
  check_fraction(op, "score_threshold", score_threshold);
  check_fraction(op, "iou_threshold", iou_threshold);
  check_at_least_one(op, "topk_per_class", topk_per_class);
  check_at_least_one(op, "max_detections", max_detections);
  check_variances(op, variances);
  if (clip != clip) raise(op, ": clip must be a number, got nan");
  constexpr double inf = std::numeric_limits<double>::infinity();
  std::vector<double> w{-inf, -inf, inf, inf};
  if (window) {
    w = *window;
    if (w.size() != 4) raise(op, ": window must be (x1, y1, x2, y2), got ", w.size(), " values");
    if (!(w[0] <= w[2] && w[1] <= w[3])) {
      raise(op, ": window must have x1 <= x2 and y1 <= y2, got (", w[0], ", ", w[1], ", ", w[2], ", ", w[3], ")");
    }
  }
  return {score_threshold,
          iou_threshold,
          topk_per_class,
          max_detections,
          sigmoid,
          class_agnostic,
          variances[0],
          variances[1],
          clip,
          w[0],
          w[1],
          w[2],
          w[3]};
}

Sizes check_tensors(const char* op, const Tensor& deltas, const Tensor& logits, const Tensor& priors) {
  check_floating(op, {{"deltas", deltas}, {"logits", logits}, {"priors", priors}});
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
  return {images, num_priors, classes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> detect_op(const Tensor& deltas, const Tensor& logits, const Tensor& priors,
                                                     double score_threshold, double iou_threshold,
                                                     int64_t topk_per_class, int64_t max_detections, bool sigmoid,
                                                     std::vector<double> variances, double clip, bool class_agnostic,
                                                     std::optional<std::vector<double>> window) {
  const char* op = "detect";
  const Sizes sizes = check_tensors(op, deltas, logits, priors);
  const Params params = check_params(op, score_threshold, iou_threshold, topk_per_class, max_detections, sigmoid,
                                     class_agnostic, variances, clip, window);
  const Inputs in{dtype_of(logits),
                  {logits.const_data_ptr(), logits.stride(0), logits.stride(1), logits.stride(2)},
                  {deltas.const_data_ptr(), deltas.stride(0), deltas.stride(1), deltas.stride(2)},
                  {priors.const_data_ptr(), 0, priors.stride(0), priors.stride(1)},
                  sizes,
                  params};
  const bool cuda = is_cuda(logits);
  const ScalarType type = logits.scalar_type(), written = !cuda && is_half(type) ? ScalarType::Float : type;
  Tensor boxes = torch::stable::new_empty(logits, {sizes.images, max_detections, 4}, written);
  Tensor scores = torch::stable::new_empty(logits, {sizes.images, max_detections}, written);
  Tensor labels = torch::stable::new_empty(logits, {sizes.images, max_detections}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(logits, {sizes.images}, ScalarType::Long);
  if (cuda) {
    const CudaLaunch launch(op, logits);
    SSD_EXT_CUDA_CALL(
        Tensor workspace = byte_workspace(logits, workspace_bytes(in));
        detect_cuda(in,
                    {boxes.mutable_data_ptr(), scores.mutable_data_ptr(), labels.mutable_data_ptr<int64_t>(),
                     counts.mutable_data_ptr<int64_t>()},
                    workspace.mutable_data_ptr(), launch.stream));
    return {boxes, scores, labels, counts};
  }
  dispatch_compute(boxes, [&](auto zero) {
    using T = decltype(zero);
    const Outputs<T> out{boxes.mutable_data_ptr<T>(), scores.mutable_data_ptr<T>(), labels.mutable_data_ptr<int64_t>(),
                         counts.mutable_data_ptr<int64_t>()};
    SSD_EXT_SIMD_CALL(detect_images<T>, in, out);
  });
  return {as_dtype_of(boxes, logits), as_dtype_of(scores, logits), labels, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssd_ext, m) {
  m.def(
      "detect(Tensor deltas, Tensor logits, Tensor priors, float score_threshold, float iou_threshold, "
      "int topk_per_class, int max_detections, bool sigmoid, float[] variances, float clip, bool class_agnostic, "
      "float[]? window) -> (Tensor boxes, Tensor scores, Tensor labels, Tensor counts)");
}

SSD_EXT_REGISTER(m) { m.impl("detect", TORCH_BOX(&detect_op)); }

}  // namespace ssd_ext::detect

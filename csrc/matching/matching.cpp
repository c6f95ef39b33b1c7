#include "matching/matching.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "common/tensor.h"

#define SSD_EXT_SIMD_FILE "matching/matching.simd.h"
#include "common/for_each_simd_level.h"

namespace ssd_ext::matching {
namespace {

// Everything about one call but the outputs, checked.
struct Call {
  const char* op;
  const Tensor &gt_boxes, &offsets, &priors;
  const Tensor* gt_labels;  // nullptr for match
  Rule rule;
  Sizes sizes;
};

Call check(const char* op, const Tensor& gt_boxes, const Tensor* gt_labels, const Tensor& offsets, const Tensor& priors,
           double iou_threshold, double low_threshold, int64_t force, std::optional<double> min_force_iou,
           const std::vector<double>& variances) {
  const Arg boxes{"ground_truth.boxes", gt_boxes};
  check_floating(op, {boxes, {"priors", priors}});
  check_shape(op, boxes, {kAny, 4}, "[G, 4]");
  check_shape(op, {"priors", priors}, {kAny, 4}, "[P, 4]");
  check_long(op, {"ground_truth.offsets", offsets}, boxes);
  check_shape(op, {"ground_truth.offsets", offsets}, {kAny}, "[B + 1]");
  const int64_t gts = gt_boxes.size(0);
  const int64_t images = offsets.size(0) - 1;
  if (images < 0) raise(op, ": ground_truth.offsets must be [B + 1], got [0]");
  if (gt_labels) {
    check_long(op, {"ground_truth.labels", *gt_labels}, boxes);
    check_shape(op, {"ground_truth.labels", *gt_labels}, {gts}, "[G], one for each box");
  }
  check_fraction(op, "iou_threshold", iou_threshold);
  check_fraction(op, "low_threshold", low_threshold);
  if (low_threshold > iou_threshold) {
    raise(op, ": low_threshold must be at most iou_threshold (", iou_threshold, "), got ", low_threshold);
  }
  if (force < 0 || force > 2) raise(op, ": force must be 0 (none), 1 (last) or 2 (bipartite), got ", force);
  if (min_force_iou) check_fraction(op, "min_force_iou", *min_force_iou);
  check_variances(op, variances);
  constexpr int64_t most = std::numeric_limits<int32_t>::max() - 1024;  // kernels step beyond the end
  if (priors.size(0) > most) raise(op, ": at most ", most, " priors, got ", priors.size(0));
  if (gts > most) raise(op, ": at most ", most, " ground truths, got ", gts);
  if (images > most) raise(op, ": at most ", most, " images, got ", images);
  const Force claims = gts > 0 ? static_cast<Force>(force) : Force::none;  // nobody is there to claim a prior
  return {op,
          gt_boxes,
          offsets,
          priors,
          gt_labels,
          {iou_threshold, low_threshold, claims, min_force_iou.value_or(-1), variances[0], variances[1]},
          {images, priors.size(0), gts}};
}

void check_offsets(const Call& call, const int64_t* offsets) {
  for (int64_t b = 0; b < call.sizes.images; ++b) {
    if (offsets[b + 1] < offsets[b]) {
      raise(call.op, ": ground_truth.offsets must not decrease, got offsets[", b, "] = ", offsets[b], ", offsets[",
            b + 1, "] = ", offsets[b + 1]);
    }
  }
  const int64_t first = offsets[0], last = offsets[call.sizes.images];
  if (first != 0 || last > call.sizes.gts) {
    raise(call.op, ": ground_truth.offsets must begin with 0 and end with at most the number of boxes, ",
          call.sizes.gts, ", got ", first, " to ", last);
  }
}

// Runs the kernels into new tensors: matches, or labels, and deltas.
std::tuple<Tensor, Tensor> run(const Call& call) {
  const bool targets = call.gt_labels;
  const bool cuda = is_cuda(call.gt_boxes);
  std::optional<CudaLaunch> launch;
  if (cuda) launch.emplace(call.op, call.gt_boxes);
  const auto input = [&](const Tensor& t) { return cuda ? cuda_input(t) : compute_input(t); };
  const Tensor boxes = input(call.gt_boxes), priors = input(call.priors), offsets = input(call.offsets);
  const std::optional<Tensor> labels = targets ? std::optional(input(*call.gt_labels)) : std::nullopt;
  const int64_t* gt_labels = targets ? labels->const_data_ptr<int64_t>() : nullptr;
  if (!cuda) check_offsets(call, offsets.const_data_ptr<int64_t>());

  Tensor index = new_output(offsets, {call.sizes.images, call.sizes.priors});
  Tensor deltas = targets ? new_output(boxes, {call.sizes.images, call.sizes.priors, 4}) : index;
  int64_t* out = index.mutable_data_ptr<int64_t>();
  const Outputs outputs{targets ? nullptr : out, targets ? out : nullptr,
                        targets ? deltas.mutable_data_ptr() : nullptr};
  if (call.sizes.images == 0 || call.sizes.priors == 0)
    return {index, targets ? as_dtype_of(deltas, call.gt_boxes) : deltas};
  if (cuda) {
    std::optional<Tensor> scratch;
    SSD_EXT_CUDA_CALL(const size_t bytes = workspace_bytes(dtype_of(boxes), call.sizes, call.rule.force));
    SSD_EXT_CUDA_CALL(scratch = bytes > 0 ? std::optional(byte_workspace(boxes, bytes)) : std::nullopt);
    SSD_EXT_CUDA_CALL(match_cuda(dtype_of(boxes), boxes.const_data_ptr(), gt_labels, offsets.const_data_ptr<int64_t>(),
                                 priors.const_data_ptr(), outputs, call.sizes, call.rule,
                                 scratch ? scratch->mutable_data_ptr() : nullptr, launch->stream));
    return {index, deltas};
  }
  dispatch_compute(boxes, [&](auto zero) {
    using T = decltype(zero);
    SSD_EXT_SIMD_CALL(match_all<T>, boxes.const_data_ptr<T>(), gt_labels, offsets.const_data_ptr<int64_t>(),
                      priors.const_data_ptr<T>(), call.sizes, call.rule, outputs);
  });
  return {index, targets ? as_dtype_of(deltas, call.gt_boxes) : deltas};
}

Tensor match_op(const Tensor& gt_boxes, const Tensor& offsets, const Tensor& priors, double iou_threshold,
                double low_threshold, int64_t force, std::optional<double> min_force_iou) {
  return std::get<0>(run(
      check("match", gt_boxes, nullptr, offsets, priors, iou_threshold, low_threshold, force, min_force_iou, {1, 1})));
}

std::tuple<Tensor, Tensor> assign_targets_op(const Tensor& gt_boxes, const Tensor& gt_labels, const Tensor& offsets,
                                             const Tensor& priors, double iou_threshold, double low_threshold,
                                             int64_t force, std::optional<double> min_force_iou,
                                             std::vector<double> variances) {
  auto [labels, deltas] = run(check("assign_targets", gt_boxes, &gt_labels, offsets, priors, iou_threshold,
                                    low_threshold, force, min_force_iou, variances));
  return {deltas, labels};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssd_ext, m) {
  m.def(
      "match(Tensor gt_boxes, Tensor offsets, Tensor priors, float iou_threshold, float low_threshold, int force, "
      "float? min_force_iou) -> Tensor");
  m.def(
      "assign_targets(Tensor gt_boxes, Tensor gt_labels, Tensor offsets, Tensor priors, float iou_threshold, "
      "float low_threshold, int force, float? min_force_iou, float[] variances) -> (Tensor target_deltas, Tensor "
      "target_labels)");
}

SSD_EXT_REGISTER(m) {
  m.impl("match", TORCH_BOX(&match_op));
  m.impl("assign_targets", TORCH_BOX(&assign_targets_op));
}

}  // namespace ssd_ext::matching

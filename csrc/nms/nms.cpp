#include "nms/nms.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>

#include "common/radix_sort.h"
#include "common/tensor.h"

#define SSD_EXT_SIMD_FILE "nms/nms.simd.h"
#include "common/for_each_simd_level.h"

namespace ssd_ext::nms {
namespace {

struct Call {
  const char* op;
  const Tensor &boxes, &scores;
  const std::optional<Tensor>& class_ids;
  double iou_threshold;
  int64_t n;
};

Call check(const char* op, const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& class_ids,
           double iou_threshold) {
  const Arg box{"boxes", boxes};
  check_floating(op, {box, {"scores", scores}});
  check_shape(op, box, {kAny, 4}, "[N, 4]");
  const int64_t n = boxes.size(0);
  check_shape(op, {"scores", scores}, {n}, "[N], one for each of boxes");
  if (class_ids) {
    check_long(op, {"idxs", *class_ids}, box);
    check_shape(op, {"idxs", *class_ids}, {n}, "[N], one for each of boxes");
  }
  check_fraction(op, "iou_threshold", iou_threshold);
  constexpr int64_t most = std::numeric_limits<int32_t>::max() - 1024;  // kernels step beyond the end
  if (n > most) raise(op, ": at most ", most, " boxes, got ", n);
  return {op, boxes, scores, class_ids, iou_threshold, n};
}

// The order of visiting, without the boxes whose score is NaN.
std::vector<uint32_t> visiting_order(const float* scores, int64_t n) {
  std::vector<uint64_t> entries;
  entries.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = order_key_nan_least(scores[i]);
    if (key == std::numeric_limits<int32_t>::min()) continue;
    entries.push_back(uint64_t(~radix_key(key)) << 32 | uint32_t(i));
  }
  if (!entries.empty()) sort_by_upper_half(entries);
  std::vector<uint32_t> order(entries.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = uint32_t(entries[i]);
  return order;
}
std::vector<uint32_t> visiting_order(const double* scores, int64_t n) {
  std::vector<uint32_t> order;
  order.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    if (scores[i] == scores[i]) order.push_back(uint32_t(i));
  }
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return scores[a] > scores[b]; });
  return order;
}

// Boxes by class.
struct Groups {
  std::vector<uint32_t> of;    // each box: small numbers for class ids, whatever their range
  std::vector<int64_t> sizes;  // of each group

  Groups(const int64_t* ids, int64_t n) : of(n) {
    if (n == 0) return;
    const auto [low, high] = std::minmax_element(ids, ids + n);
    const uint64_t first = uint64_t(*low), range = uint64_t(*high) - first;
    if (range < uint64_t(std::min(4 * n + 1024, int64_t(std::numeric_limits<uint32_t>::max())))) {
      sizes.resize(range + 1);
      for (int64_t i = 0; i < n; ++i) of[i] = uint32_t(uint64_t(ids[i]) - first);
    } else {
      std::vector<int64_t> distinct(ids, ids + n);
      std::sort(distinct.begin(), distinct.end());
      distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
      sizes.resize(distinct.size());
      for (int64_t i = 0; i < n; ++i) {
        of[i] = uint32_t(std::lower_bound(distinct.begin(), distinct.end(), ids[i]) - distinct.begin());
      }
    }
    for (const uint32_t group : of) ++sizes[group];
  }
};

template <class T>
int64_t nms_cpu(const T* boxes, const T* scores, const int64_t* class_ids, int64_t n, T threshold, int64_t* keep) {
  const std::vector<uint32_t> order = visiting_order(scores, n);
  const Groups groups(class_ids, class_ids ? n : 0);
  return SSD_EXT_SIMD_CALL(nms<T>, boxes, order, groups.of, groups.sizes, threshold, keep);
}

// The kept boxes, on the CPU.
std::vector<int64_t> run_cpu(const Call& call) {
  const Tensor boxes = compute_input(call.boxes), scores = compute_input(call.scores);
  const std::optional<Tensor> ids = call.class_ids ? std::optional(as_contiguous(*call.class_ids)) : std::nullopt;
  std::vector<int64_t> keep(call.n);
  dispatch_compute(boxes, [&](auto zero) {
    using T = decltype(zero);
    keep.resize(nms_cpu(boxes.const_data_ptr<T>(), scores.const_data_ptr<T>(),
                        ids ? ids->const_data_ptr<int64_t>() : nullptr, call.n, T(call.iou_threshold), keep.data()));
  });
  return keep;
}

// keep [N], padded with -1, and count [], on the GPU; no host synchronisation.
std::tuple<Tensor, Tensor> run_cuda(const Call& call) {
  const CudaLaunch launch(call.op, call.boxes);
  const Tensor boxes = cuda_input(call.boxes), scores = cuda_input(call.scores);
  const std::optional<Tensor> ids = call.class_ids ? std::optional(cuda_input(*call.class_ids)) : std::nullopt;
  const DType dtype = dtype_of(boxes);
  Tensor keep = new_output(boxes, {call.n}, ScalarType::Long);
  Tensor count = new_output(boxes, {}, ScalarType::Long);
  SSD_EXT_CUDA_CALL(
      Tensor scratch = byte_workspace(boxes, workspace_bytes(dtype, call.n, ids.has_value()));
                    nms_cuda(dtype, boxes.const_data_ptr(), scores.const_data_ptr(),
                             ids ? ids->const_data_ptr<int64_t>() : nullptr, call.n, call.iou_threshold,
                             scratch.mutable_data_ptr(), keep.mutable_data_ptr<int64_t>(),
                             count.mutable_data_ptr<int64_t>(), launch.stream));
  return {keep, count};
}

Tensor nms_op(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs, double iou_threshold) {
  const Call call = check(idxs ? "batched_nms" : "nms", boxes, scores, idxs, iou_threshold);
  if (is_cuda(boxes)) {
    auto [keep, count] = run_cuda(call);
    const Tensor host = torch::stable::to(count, torch::stable::Device(DeviceType::CPU));
    return torch::stable::narrow(keep, 0, 0, *host.const_data_ptr<int64_t>());
  }
  const std::vector<int64_t> kept = run_cpu(call);
  Tensor keep = new_output(boxes, {static_cast<int64_t>(kept.size())}, ScalarType::Long);
  std::copy(kept.begin(), kept.end(), keep.mutable_data_ptr<int64_t>());
  return keep;
}

std::tuple<Tensor, Tensor> nms_padded_op(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                                         double iou_threshold) {
  const Call call = check(idxs ? "batched_nms_padded" : "nms_padded", boxes, scores, idxs, iou_threshold);
  if (is_cuda(boxes)) return run_cuda(call);
  const std::vector<int64_t> kept = run_cpu(call);
  Tensor keep = new_output(boxes, {call.n}, ScalarType::Long);
  Tensor count = new_output(boxes, {}, ScalarType::Long);
  int64_t* out = keep.mutable_data_ptr<int64_t>();
  std::fill(std::copy(kept.begin(), kept.end(), out), out + call.n, int64_t{-1});
  *count.mutable_data_ptr<int64_t>() = static_cast<int64_t>(kept.size());
  return {keep, count};
}

}  // namespace

// The schema of nms, whose output's length depends on the data, is in ops/nms.py, with its tags.
STABLE_TORCH_LIBRARY_FRAGMENT(ssd_ext, m) {
  m.def("nms_padded(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold) -> (Tensor, Tensor)");
}

SSD_EXT_REGISTER(m) {
  m.impl("nms", TORCH_BOX(&nms_op));
  m.impl("nms_padded", TORCH_BOX(&nms_padded_op));
}

}  // namespace ssd_ext::nms

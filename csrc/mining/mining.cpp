#include "mining/mining.h"

#include <algorithm>
#include <memory>

#include "common/tensor.h"

#define SSD_EXT_SIMD_FILE "mining/mining.simd.h"
#include "common/for_each_simd_level.h"

namespace ssd_ext::mining {
namespace {

constexpr int64_t kGrain = 8192;    // priors worth a thread
constexpr int64_t kMostLanes = 16;  // of a vector of keys, at any SIMD level

Mining check_call(const char* op, const Arg& loss, const Arg& labels, double ratio, int64_t min_negatives) {
  check_floating(op, {loss});
  check_shape(op, loss, {kAny, kAny}, "[B, P]");
  const int64_t batch = loss.tensor.size(0), num_priors = loss.tensor.size(1);
  check_long(op, labels, loss);
  check_shape(op, labels, {batch, num_priors}, ("of the shape of loss, " + shape_of(loss.tensor)).c_str());
  check_mining(op, loss, ratio, min_negatives);
  return {batch, num_priors, ratio, min_negatives};
}

Tensor hard_negatives_op(const Tensor& loss, const Tensor& labels, double ratio, int64_t min_negatives) {
  const char* op = "hard_negatives";
  const Mining mining = check_call(op, {"loss", loss}, {"target_labels", labels}, ratio, min_negatives);
  Tensor mask = new_output(loss, {mining.batch, mining.num_priors}, ScalarType::Bool);
  if (mask.numel() == 0) return mask;
  if (is_cuda(loss)) {
    const CudaLaunch launch(op, loss);
    const Tensor x = cuda_input(loss), y = cuda_input(labels);
    SSD_EXT_CUDA_CALL(hard_negatives_cuda(dtype_of(x), x.const_data_ptr(), y.const_data_ptr<int64_t>(),
                                          mask.mutable_data_ptr<bool>(), mining, launch.stream));
    return mask;
  }
  const Tensor x = compute_input(loss), y = as_contiguous(labels);
  dispatch_compute(x, [&](auto zero) {
    using T = decltype(zero);
    using I = IntOf<T>;
    const T* losses = x.const_data_ptr<T>();
    const int64_t *rows = y.const_data_ptr<int64_t>(), n = mining.num_priors;
    bool* marked = mask.mutable_data_ptr<bool>();
    parallel_for(mining.batch, 1 + kGrain / n, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<I[]> keys(new I[n + kMostLanes]), scratch(new I[n + kMostLanes]);
      for (int64_t b = begin; b < end; ++b) {
        SSD_EXT_SIMD_CALL(hard_negatives<T>, losses + b * n, rows + b * n, marked + b * n, mining, keys.get(),
                          scratch.get());
      }
    });
  });
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssd_ext, m) {
  m.def("hard_negatives(Tensor loss, Tensor target_labels, float neg_to_pos_ratio, int min_negatives) -> Tensor");
}

SSD_EXT_REGISTER(m) { m.impl("hard_negatives", TORCH_BOX(&hard_negatives_op)); }

}  // namespace ssd_ext::mining

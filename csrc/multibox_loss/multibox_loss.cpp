#include "multibox_loss/multibox_loss.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/tensor.h"

namespace ssd_ext {
namespace {

using c10::BFloat16;
using c10::Half;

// One image's sums, undivided.
struct ImageSums {
  multibox_loss::Counts counts;
  double loc, conf;
};

// Sum of the terms of up to n indices. Term i goes to partial sum i % kSums, in rising order of i; of each
// 32 partial sums those l and l + 16 are added, then l and l + 8, ... l + 1; then likewise the up to 32 results.
class OrderedSum {
 public:
  explicit OrderedSum(int64_t n) : groups_((std::min<int64_t>(n, multibox_loss::kSums) + 31) / 32) {
    std::fill_n(parts_, 32 * groups_, 0.0);
  }
  void add(int64_t i, double term) { parts_[i % multibox_loss::kSums] += term; }
  double total() {
    double sums[32] = {};
    for (int64_t group = 0; group < groups_; ++group) sums[group] = fold(parts_ + 32 * group);
    return fold(sums);
  }

 private:
  static double fold(double* parts) {
    for (int half = 16; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    }
    return parts[0];
  }

  int64_t groups_;
  double parts_[multibox_loss::kSums];
};
static_assert(multibox_loss::kSums == 32 * 32);

}  // namespace
}  // namespace ssd_ext

#define SSD_EXT_SIMD_FILE "multibox_loss/multibox_loss.simd.h"
#include "common/for_each_simd_level.h"

namespace ssd_ext::multibox_loss {
namespace {

constexpr int64_t kGrain = 256;           // rows worth a thread
constexpr int64_t kGrainBytes = 1 << 18;  // of zeros
constexpr int64_t kMostLanes = 16;        // of a vector of keys, at any SIMD level

template <class F>
void dispatch_stored(const Tensor& t, F&& f) {
  switch (dtype_of(t)) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::f16:
      return f(Half{});
    case DType::bf16:
      return f(BFloat16{});
  }
}

Rows rows_of(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t), {t.stride(0), t.stride(1), t.stride(2)}}; }

ScalarType type_of_ranks(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Long : ScalarType::Int;
}

// Logits and labels, which every op here takes.
Loss check_conf(const char* op, const Tensor& logits, const Tensor& labels) {
  check_floating(op, {{"logits", logits}});
  check_shape(op, {"logits", logits}, {kAny, kAny, kAny}, "[B, P, C]");
  const int64_t batch = logits.size(0), priors = logits.size(1), classes = logits.size(2);
  if (classes < 1) raise(op, ": logits must have at least the background class, got ", shape_of(logits));
  check_long(op, {"target_labels", labels}, {"logits", logits});
  check_shape(op, {"target_labels", labels}, {batch, priors},
              ("[B, P], here [" + std::to_string(batch) + ", " + std::to_string(priors) + "]").c_str());
  constexpr int64_t most = 0x7fffffff;
  if (classes >= most) raise(op, ": logits must have fewer than ", most, " classes, got ", shape_of(logits));
  return {{batch, priors, 0, 0}, classes, 0, 0, false};
}

void check_loc(const char* op, const Tensor& deltas, const Tensor& targets, const Arg& like, int64_t batch,
               int64_t priors) {
  const std::string shape = "[B, P, 4], here [" + std::to_string(batch) + ", " + std::to_string(priors) + ", 4]";
  for (const Arg& arg : {Arg{"deltas", deltas}, Arg{"target_deltas", targets}}) {
    check_floating(op, {arg});
    check_device(op, arg, like);
    check_shape(op, arg, {batch, priors, 4}, shape.c_str());
  }
}

// Not fill_(), which refuses what only float64 holds instead of making it infinite.
void store_scalar(const Tensor& to, double value) {
  if (to.scalar_type() == ScalarType::Double) {
    *to.mutable_data_ptr<double>() = value;
  } else {
    *to.mutable_data_ptr<float>() = static_cast<float>(value);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_op(const Tensor& deltas, const Tensor& logits, const Tensor& targets,
                                                   const Tensor& labels, double ratio, int64_t min_negatives,
                                                   double alpha, double beta, bool per_image) {
  const char* op = "multibox_loss";
  Loss loss = check_conf(op, logits, labels);
  const int64_t batch = loss.mining.batch, n = loss.mining.num_priors;
  check_loc(op, deltas, targets, {"logits", logits}, batch, n);
  check_mining(op, {"logits", logits}, ratio, min_negatives);
  if (!std::isfinite(alpha)) raise(op, ": alpha must be finite, got ", alpha);
  if (!(beta >= 0 && std::isfinite(beta))) raise(op, ": beta must be a finite number >= 0, got ", beta);
  loss.mining.ratio = ratio;
  loss.mining.min_negatives = min_negatives;
  loss.alpha = alpha;
  loss.beta = beta;
  loss.per_image = per_image;

  Tensor loc = new_output(deltas, {}, computed_in(deltas.scalar_type()));
  Tensor conf = new_output(logits, {}, computed_in(logits.scalar_type()));
  Tensor ranks = new_output(logits, {batch, n}, type_of_ranks(logits));
  Tensor divisors = new_output(labels, {batch});
  if (is_cuda(logits)) {
    const CudaLaunch launch(op, logits);
    const Tensor x = cuda_strided_input(logits), d = cuda_strided_input(deltas), t = cuda_strided_input(targets);
    const Tensor y = cuda_input(labels);
    SSD_EXT_CUDA_CALL(
        Tensor workspace = byte_workspace(logits, workspace_bytes(loss));
        multibox_loss_cuda(rows_of(x), rows_of(d), rows_of(t), y.const_data_ptr<int64_t>(), loss,
                           loc.mutable_data_ptr(), conf.mutable_data_ptr(), ranks.mutable_data_ptr(),
                           divisors.mutable_data_ptr<int64_t>(), workspace.mutable_data_ptr(), launch.stream));
    return {loc, conf, ranks, divisors};
  }
  const Tensor y = as_contiguous(labels);
  const int64_t* label = y.const_data_ptr<int64_t>();
  std::vector<ImageSums> sums(batch);
  dispatch_stored(logits, [&](auto zero) {
    using S = decltype(zero);
    using I = IntOf<std::conditional_t<std::is_same_v<S, double>, double, float>>;
    I* rank = ranks.mutable_data_ptr<I>();
    const Rows x = rows_of(logits), d = rows_of(deltas), t = rows_of(targets);
    const auto rank_roughly = [&](int64_t begin, int64_t end) {
      SSD_EXT_SIMD_CALL(rank_roughly<S>, x, loss, begin, end, rank);
    };
    // With images enough for all threads, each is mined while its logits are still in the cache.
    const bool image_by_image = batch >= 2 * int64_t(torch::stable::get_num_threads());
    if (!image_by_image) parallel_for(batch * n, kGrain, rank_roughly);
    parallel_for(batch, 1 + kGrain / (n + 1), [&](int64_t begin, int64_t end) {
      const std::unique_ptr<I[]> keys(new I[2 * (n + kMostLanes)]);
      const std::unique_ptr<int64_t[]> lists(new int64_t[2 * n]);
      for (int64_t b = begin; b < end; ++b) {
        if (image_by_image) rank_roughly(b * n, b * n + n);
        sums[b] = SSD_EXT_SIMD_CALL(sum_image<S>, x, d, t, label + b * n, loss, b, rank + b * n,
                                    {keys.get(), keys.get() + n + kMostLanes, lists.get(), lists.get() + n});
      }
    });
  });
  for (int64_t b = 0; b < batch; ++b) {
    if (sums[b].counts.positives >= 0) continue;
    const int64_t p = -1 - sums[b].counts.positives;
    raise(op, ": target_labels must be below C = ", loss.classes, ", got target_labels[", b, ", ", p,
          "] = ", label[b * n + p]);
  }

  Counts all{};
  for (const ImageSums& image : sums) {
    all.positives += image.counts.positives;
    all.negatives += image.counts.negatives;
  }
  OrderedSum all_loc(batch), all_conf(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t divisor = divisor_of(sums[b].counts, all, loss);
    divisors.mutable_data_ptr<int64_t>()[b] = divisor;
    all_loc.add(b, sums[b].loc / double(divisor));
    all_conf.add(b, sums[b].conf / double(divisor));
  }
  store_scalar(loc, alpha * all_loc.total());
  store_scalar(conf, all_conf.total());
  return {loc, conf, ranks, divisors};
}

// Dense, in the layout of `like`, on the CPU.
Tensor zeros_like(const Tensor& like) {
  Tensor gradient = new_output_like(like);
  const int64_t bytes = gradient.numel() * gradient.element_size();
  char* p = static_cast<char*>(gradient.mutable_data_ptr());
  parallel_for(bytes, kGrainBytes, [&](int64_t begin, int64_t end) { memset(p + begin, 0, end - begin); });
  return gradient;
}

// What the forward saved, and gradients of its outputs.
void check_saved(const char* op, const Arg& arg, std::initializer_list<int64_t> shape, ScalarType type,
                 const Arg& like) {
  check_device(op, arg, like);
  check_shape(op, arg, shape, "as the forward gave it");
  if (arg.tensor.scalar_type() != type)
    raise(op, ": ", arg.name, " must be ", name_of(type), ", got ", name_of(arg.tensor.scalar_type()));
}

double value_of(const Tensor& scalar) {
  return scalar.scalar_type() == ScalarType::Double ? *scalar.const_data_ptr<double>()
                                                    : *scalar.const_data_ptr<float>();
}

Tensor logits_gradient_op(const Tensor& grad_conf, const Tensor& logits, const Tensor& labels, const Tensor& ranks,
                          const Tensor& divisors) {
  const char* op = "multibox_loss_logits_gradient";
  const Loss loss = check_conf(op, logits, labels);
  const int64_t batch = loss.mining.batch, n = loss.mining.num_priors;
  check_saved(op, {"ranks", ranks}, {batch, n}, type_of_ranks(logits), {"logits", logits});
  check_saved(op, {"divisors", divisors}, {batch}, ScalarType::Long, {"logits", logits});
  check_saved(op, {"grad_conf", grad_conf}, {}, computed_in(logits.scalar_type()), {"logits", logits});
  if (is_cuda(logits)) {
    const CudaLaunch launch(op, logits);
    const Tensor grad = cuda_input(grad_conf), x = cuda_strided_input(logits), y = cuda_input(labels);
    const Tensor rank = cuda_input(ranks), divisor = cuda_input(divisors);
    Tensor gradient = new_output_like(logits);
    SSD_EXT_CUDA_CALL(logits_gradient_cuda(grad.const_data_ptr(), rows_of(x), y.const_data_ptr<int64_t>(),
                                           rank.const_data_ptr(), divisor.const_data_ptr<int64_t>(), loss,
                                           gradient.mutable_data_ptr(), rows_of(gradient).strides, launch.stream));
    return gradient;
  }
  Tensor gradient = zeros_like(logits);
  const Tensor y = as_contiguous(labels), rank = as_contiguous(ranks), divisor = as_contiguous(divisors);
  const double scale = value_of(grad_conf);
  dispatch_stored(logits, [&](auto zero) {
    using S = decltype(zero);
    using I = IntOf<std::conditional_t<std::is_same_v<S, double>, double, float>>;
    S* to = static_cast<S*>(gradient.mutable_data_ptr());
    const Rows x = rows_of(logits);
    const Strides strides = rows_of(gradient).strides;
    parallel_for(batch * n, kGrain, [&](int64_t begin, int64_t end) {
      SSD_EXT_SIMD_CALL(logits_gradient<S>, x, y.const_data_ptr<int64_t>(), rank.const_data_ptr<I>(),
                        divisor.const_data_ptr<int64_t>(), loss, scale, begin, end, to, strides);
    });
  });
  return gradient;
}

Tensor deltas_gradient_op(const Tensor& grad_loc, const Tensor& deltas, const Tensor& targets, const Tensor& labels,
                          const Tensor& divisors, double alpha, double beta) {
  const char* op = "multibox_loss_deltas_gradient";
  check_shape(op, {"target_labels", labels}, {kAny, kAny}, "[B, P]");
  Loss loss{{labels.size(0), labels.size(1), 0, 0}, 0, alpha, beta, false};
  const int64_t batch = loss.mining.batch, n = loss.mining.num_priors;
  check_long(op, {"target_labels", labels}, {"deltas", deltas});
  check_loc(op, deltas, targets, {"target_labels", labels}, batch, n);
  check_rows(op, {"target_labels", labels});
  check_saved(op, {"divisors", divisors}, {batch}, ScalarType::Long, {"deltas", deltas});
  check_saved(op, {"grad_loc", grad_loc}, {}, computed_in(deltas.scalar_type()), {"deltas", deltas});
  if (is_cuda(deltas)) {
    const CudaLaunch launch(op, deltas);
    const Tensor grad = cuda_input(grad_loc), d = cuda_strided_input(deltas), t = cuda_strided_input(targets);
    const Tensor y = cuda_input(labels), divisor = cuda_input(divisors);
    Tensor gradient = new_output_like(deltas);
    SSD_EXT_CUDA_CALL(deltas_gradient_cuda(grad.const_data_ptr(), rows_of(d), rows_of(t), y.const_data_ptr<int64_t>(),
                                           divisor.const_data_ptr<int64_t>(), loss, gradient.mutable_data_ptr(),
                                           rows_of(gradient).strides, launch.stream));
    return gradient;
  }
  Tensor gradient = zeros_like(deltas);
  const Tensor y = as_contiguous(labels), divisor = as_contiguous(divisors);
  const double scale = value_of(grad_loc);
  dispatch_stored(deltas, [&](auto zero) {
    using S = decltype(zero);
    S* to = static_cast<S*>(gradient.mutable_data_ptr());
    const Rows d = rows_of(deltas), t = rows_of(targets);
    const Strides strides = rows_of(gradient).strides;
    parallel_for(batch * n, kGrain, [&](int64_t begin, int64_t end) {
      SSD_EXT_SIMD_CALL(deltas_gradient<S>, d, t, y.const_data_ptr<int64_t>(), divisor.const_data_ptr<int64_t>(), loss,
                        scale, begin, end, to, strides);
    });
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ssd_ext, m) {
  m.def(
      "multibox_loss(Tensor deltas, Tensor logits, Tensor target_deltas, Tensor target_labels, float neg_to_pos_ratio, "
      "int min_negatives, float alpha, float beta, bool per_image) -> "
      "(Tensor loc, Tensor conf, Tensor ranks, Tensor divisors)");
  m.def(
      "multibox_loss_logits_gradient(Tensor grad_conf, Tensor logits, Tensor target_labels, Tensor ranks, "
      "Tensor divisors) -> Tensor");
  m.def(
      "multibox_loss_deltas_gradient(Tensor grad_loc, Tensor deltas, Tensor target_deltas, Tensor target_labels, "
      "Tensor divisors, float alpha, float beta) -> Tensor");
}

SSD_EXT_REGISTER(m) {
  m.impl("multibox_loss", TORCH_BOX(&loss_op));
  m.impl("multibox_loss_logits_gradient", TORCH_BOX(&logits_gradient_op));
  m.impl("multibox_loss_deltas_gradient", TORCH_BOX(&deltas_gradient_op));
}

}  // namespace ssd_ext::multibox_loss

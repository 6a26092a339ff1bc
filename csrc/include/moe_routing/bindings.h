// From tensors to a `Call`, with every assumption checked. Host code; the only file that knows
// tvm-ffi besides the two that export functions.
#pragma once
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "call.h"

namespace moe_routing::bindings {

using tvm::ffi::Optional;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

inline std::string shape_of(TensorView tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.ndim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

[[noreturn]] inline void fail(const char* name, const std::string& expected) {
  TVM_FFI_THROW(ValueError) << name << ": expected " << expected;
}

// Takes literals only: a call on a CPU is over in microseconds, so no text is made that none reads.
inline void check(bool holds, const char* name, const char* expected) {
  if (!holds) fail(name, expected);
}

inline void check_dimensions(TensorView tensor, const char* name, int dimensions) {
  if (tensor.ndim() == dimensions) return;
  fail(name, std::to_string(dimensions) + " dimensions, got shape " + shape_of(tensor));
}

inline void check_shape(TensorView tensor, const char* name, std::initializer_list<int64_t> shape) {
  bool fits = tensor.ndim() == static_cast<int>(shape.size());
  int i = 0;
  for (int64_t size : shape) fits = fits && tensor.size(i++) == size;
  if (fits) return;
  std::string wanted;
  for (int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  fail(name, "shape [" + wanted + "], got " + shape_of(tensor));
}

inline bool is(TensorView tensor, DLDataTypeCode code, int bits) {
  return tensor.dtype().code == code && tensor.dtype().bits == bits;
}

inline bool is_contiguous(TensorView tensor) {
  if (tensor.numel() == 0) return true;
  int64_t wanted = 1;
  for (int i = tensor.ndim() - 1; i >= 0; --i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != wanted) return false;
    wanted *= tensor.size(i);
  }
  return true;
}

class Checker {
 public:
  explicit Checker(DLDevice device) : device_(device) {}

  FloatRows floats(TensorView tensor, const char* name, int64_t rows, int64_t columns) const {
    check_rows(tensor, name, rows, columns);
    FloatType type = FloatType::float32;
    if (is(tensor, kDLBfloat, 16)) {
      type = FloatType::bfloat16;
    } else if (is(tensor, kDLFloat, 16)) {
      type = FloatType::float16;
    } else {
      check(is(tensor, kDLFloat, 32), name, "float32, bfloat16 or float16");
    }
    return {tensor.data_ptr(), row_stride(tensor, name), type};
  }

  IdRows ids(TensorView tensor, const char* name, int64_t rows, int64_t columns) const {
    check_rows(tensor, name, rows, columns);
    check(is(tensor, kDLInt, 32) || is(tensor, kDLInt, 64), name, "int32 or int64");
    return {tensor.data_ptr(), row_stride(tensor, name), is(tensor, kDLInt, 64)};
  }

  template <class T>
  T* dense(TensorView tensor, const char* name, DLDataTypeCode code,
           std::initializer_list<int64_t> shape) const {
    check_device(tensor, name);
    check_shape(tensor, name, shape);
    check(is_contiguous(tensor), name, "a contiguous tensor");
    if (!is(tensor, code, 8 * sizeof(T))) {
      fail(name, "elements of " + std::to_string(8 * sizeof(T)) + " bits");
    }
    return static_cast<T*>(tensor.data_ptr());
  }

 private:
  void check_device(TensorView tensor, const char* name) const {
    const DLDevice found = tensor.device();
    check(found.device_type == device_.device_type && found.device_id == device_.device_id, name,
          "the device of the policies");
  }

  void check_rows(TensorView tensor, const char* name, int64_t rows, int64_t columns) const {
    check_device(tensor, name);
    check_shape(tensor, name, {rows, columns});
    const bool is_adjacent = rows == 0 || columns == 1 || tensor.stride(1) == 1;
    check(is_adjacent, name, "adjacent elements in a row (stride 1)");
  }

  static int32_t row_stride(TensorView tensor, const char* name) {
    const int64_t extent = tensor.size(0) * tensor.stride(0);
    check(tensor.stride(0) >= 0 && extent <= INT32_MAX, name, "fewer than 2^31 elements");
    return static_cast<int32_t>(tensor.stride(0));
  }

  DLDevice device_;
};

inline Scoring scoring_of(int64_t value) {
  check(value >= 0 && value < static_cast<int64_t>(Scoring::given), "scoring", "0 to 2");
  return static_cast<Scoring>(value);
}

inline FreeSlots free_slots_of(int64_t value) {
  check(value >= 0 && value <= static_cast<int64_t>(FreeSlots::repeat_first), "free_slots",
        "0 or 1");
  return static_cast<FreeSlots>(value);
}

inline void check_limits(const Call& call) {
  if (call.num_experts < 1 || call.num_experts > kMaxExperts) {
    fail("union", "1 to " + std::to_string(kMaxExperts) + " experts");
  }
  if (call.top_k < 1 || call.top_k > kMaxTopK) {
    fail("top_k", "1 to " + std::to_string(kMaxTopK));
  }
  check(call.top_k <= call.num_experts, "top_k", "at most the number of experts");
  const bool divides = call.num_groups >= 1 && call.num_experts % call.num_groups == 0;
  check(divides && call.num_groups <= kMaxGroups, "num_groups",
        "a divisor of the number of experts, at most 32");
  check(call.top_groups >= 1 && call.top_groups <= call.num_groups, "top_groups",
        "1 to num_groups");
}

// What all calls of one layer have in common, checked once. Owns its tensors.
//
// Shapes: policies [num_policies, steps, 12]; similarity [artifacts, experts, experts];
// out_union [experts]; statistics [parts, 6], of which a call adds to one part or to none.
class Layer {
 public:
  Layer(Tensor policies, Tensor similarity, Tensor out_union, Optional<Tensor> statistics,
        Optional<Tensor> workspace, int64_t workspace_words, int64_t top_k, int64_t scoring,
        int64_t num_groups, int64_t top_groups, bool renormalize, double scale, int64_t free_slots)
      : checker_(policies.device()),
        policies_(std::move(policies)),
        similarity_(std::move(similarity)),
        union_(std::move(out_union)),
        statistics_(std::move(statistics)),
        workspace_(std::move(workspace)) {
    check_dimensions(policies_, "policies", 3);
    check_dimensions(similarity_, "similarity", 3);
    check_dimensions(union_, "union", 1);
    const int64_t experts = union_.size(0);
    const int64_t num_policies = policies_.size(0);
    const int64_t steps = policies_.size(1);
    call_.num_experts = to_int32(experts, "union");
    call_.top_k = to_int32(top_k, "top_k");
    call_.scoring = scoring_of(scoring);
    call_.num_groups = to_int32(num_groups, "num_groups");
    call_.top_groups = to_int32(top_groups, "top_groups");
    call_.renormalize = renormalize;
    call_.scale = static_cast<float>(scale);
    call_.free_slots = free_slots_of(free_slots);
    call_.num_steps = to_int32(steps, "policies");
    call_.num_policies = to_int32(num_policies, "policies");
    call_.policies = reinterpret_cast<const Policy*>(checker_.dense<int32_t>(
        policies_, "policies", kDLInt, {num_policies, steps, kPolicyWords}));
    call_.similarity = checker_.dense<float>(similarity_, "similarity", kDLFloat,
                                             {similarity_.size(0), experts, experts});
    call_.out_union = checker_.dense<uint8_t>(union_, "union", kDLBool, {experts});
    if (statistics_.has_value()) {
      const Tensor sums = *statistics_;
      check_dimensions(sums, "statistics", 2);
      num_parts_ = sums.size(0);
      call_.statistics =
          checker_.dense<int64_t>(sums, "statistics", kDLInt, {num_parts_, kNumStatistics});
    }
    if (workspace_.has_value()) {
      const Tensor words = *workspace_;
      call_.workspace = reinterpret_cast<uint32_t*>(
          checker_.dense<int32_t>(words, "workspace", kDLInt, {workspace_words}));
    }
    check_limits(call_);
  }

  // One call, which writes into topk_ids and topk_weights. Only what may differ between calls is
  // checked; a bias may, because an update of the weights may replace it.
  //
  // Shapes: scores and gates [rows, experts]; topk_ids and topk_weights [rows, top_k];
  // policy_ids [rows]; bias [experts]. With gates, scores are what the router ranks by.
  Call call(TensorView scores, TensorView topk_ids, TensorView topk_weights, TensorView policy_ids,
            int64_t part, const Optional<TensorView>& bias,
            const Optional<TensorView>& gates) const {
    check_dimensions(scores, "scores", 2);
    const int64_t rows = scores.size(0);
    if (rows > kMaxRows) fail("scores", "at most " + std::to_string(kMaxRows) + " rows");
    const int64_t experts = call_.num_experts;
    Call call = call_;
    call.num_rows = static_cast<int32_t>(rows);
    call.scores = checker_.floats(scores, "scores", rows, experts);
    call.topk_ids = checker_.ids(topk_ids, "topk_ids", rows, call.top_k);
    call.topk_weights = checker_.floats(topk_weights, "topk_weights", rows, call.top_k);
    check_apart(call.topk_ids.stride, call, "topk_ids");
    check_apart(call.topk_weights.stride, call, "topk_weights");
    call.out_ids = call.topk_ids;
    call.out_weights = call.topk_weights;
    call.policy_ids = checker_.dense<int32_t>(policy_ids, "policy_ids", kDLInt, {rows});
    if (part < 0) {
      call.statistics = nullptr;
    } else {
      check(part < num_parts_, "part", "one that the statistics have");
      call.statistics += part * kNumStatistics;
    }
    if (bias.has_value()) call.bias = checker_.dense<float>(*bias, "bias", kDLFloat, {experts});
    if (gates.has_value()) {
      call.gates = checker_.floats(*gates, "gates", rows, experts);
      call.scoring = Scoring::given;
      call.num_groups = call.top_groups = 1;
      call.bias = nullptr;
    }
    return call;
  }

  DLDevice device() const { return policies_.device(); }

 private:
  static int32_t to_int32(int64_t value, const char* name) {
    check(value >= 0 && value <= INT32_MAX, name, "fewer than 2^31");
    return static_cast<int32_t>(value);
  }

  static void check_apart(int32_t stride, const Call& call, const char* name) {
    check(call.num_rows <= 1 || stride >= call.top_k, name, "rows that do not overlap");
  }

  Call call_;
  int64_t num_parts_ = 0;
  Checker checker_;
  Tensor policies_;
  Tensor similarity_;
  Tensor union_;
  Optional<Tensor> statistics_;
  Optional<Tensor> workspace_;
};

}  // namespace moe_routing::bindings

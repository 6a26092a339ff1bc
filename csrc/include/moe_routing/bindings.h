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
          "the device of the scores");
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
  check(value >= 0 && value <= static_cast<int64_t>(Scoring::given), "scoring", "0 to 3");
  return static_cast<Scoring>(value);
}

inline FreeSlots free_slots_of(int64_t value) {
  check(value >= 0 && value <= static_cast<int64_t>(FreeSlots::repeat_first), "free_slots",
        "0 or 1");
  return static_cast<FreeSlots>(value);
}

inline void check_limits(const Call& call) {
  check(call.num_experts >= 1 && call.num_experts <= kMaxExperts, "scores", "1 to 1024 experts");
  check(call.top_k >= 1 && call.top_k <= kMaxTopK, "topk_ids", "a top_k of 1 to 32");
  check(call.top_k <= call.num_experts, "topk_ids", "a top_k of at most the number of experts");
  const bool divides = call.num_groups >= 1 && call.num_experts % call.num_groups == 0;
  check(divides && call.num_groups <= kMaxGroups, "num_groups",
        "a divisor of the number of experts, at most 32");
  check(call.top_groups >= 1 && call.top_groups <= call.num_groups, "top_groups",
        "1 to num_groups");
}

// Shapes: scores and gates [rows, experts]; topk_ids, topk_weights, out_ids and out_weights
// [rows, top_k]; policy_ids [rows]; policies [num_policies, steps, 12];
// similarity [artifacts, experts, experts]; bias and out_union [experts]; statistics [6].
inline Call make_call(TensorView scores, Optional<TensorView> gates, Optional<TensorView> bias,
                      TensorView topk_ids, TensorView topk_weights,
                      TensorView policy_ids, TensorView policies, TensorView similarity,
                      TensorView out_ids, TensorView out_weights, TensorView out_union,
                      Optional<TensorView> statistics, int64_t scoring,
                      int64_t num_groups, int64_t top_groups, bool renormalize, double scale,
                      int64_t free_slots) {
  check_dimensions(scores, "scores", 2);
  check_dimensions(out_ids, "out_ids", 2);
  check_dimensions(policies, "policies", 3);
  check_dimensions(similarity, "similarity", 3);
  const Checker checker(scores.device());
  const int64_t rows = scores.size(0);
  const int64_t experts = scores.size(1);
  const int64_t top_k = out_ids.size(1);
  const int64_t num_policies = policies.size(0);
  const int64_t steps = policies.size(1);
  check(rows <= kMaxRows, "scores", "at most 65535 rows");

  Call call;
  call.num_rows = static_cast<int32_t>(rows);
  call.num_experts = static_cast<int32_t>(experts);
  call.top_k = static_cast<int32_t>(top_k);
  call.scores = checker.floats(scores, "scores", rows, experts);
  call.scoring = scoring_of(scoring);
  check(gates.has_value() == (call.scoring == Scoring::given), "gates",
        "a tensor if and only if scoring is 'given'");
  if (gates.has_value()) call.gates = checker.floats(*gates, "gates", rows, experts);
  if (bias.has_value()) call.bias = checker.dense<float>(*bias, "bias", kDLFloat, {experts});
  call.num_groups = static_cast<int32_t>(num_groups);
  call.top_groups = static_cast<int32_t>(top_groups);
  call.renormalize = renormalize;
  call.scale = static_cast<float>(scale);
  call.free_slots = free_slots_of(free_slots);
  call.topk_ids = checker.ids(topk_ids, "topk_ids", rows, top_k);
  call.topk_weights = checker.floats(topk_weights, "topk_weights", rows, top_k);
  call.out_ids = checker.ids(out_ids, "out_ids", rows, top_k);
  call.out_weights = checker.floats(out_weights, "out_weights", rows, top_k);
  check(call.topk_weights.type == call.out_weights.type, "out_weights",
        "the element type of topk_weights");
  call.policy_ids = checker.dense<int32_t>(policy_ids, "policy_ids", kDLInt, {rows});
  call.num_steps = static_cast<int32_t>(steps);
  call.num_policies = static_cast<int32_t>(num_policies);
  call.policies = reinterpret_cast<const Policy*>(
      checker.dense<int32_t>(policies, "policies", kDLInt, {num_policies, steps, kPolicyWords}));
  call.similarity = checker.dense<float>(similarity, "similarity", kDLFloat,
                                         {similarity.size(0), experts, experts});
  call.out_union = checker.dense<uint8_t>(out_union, "out_union", kDLBool, {experts});
  if (statistics.has_value()) {
    call.statistics =
        checker.dense<int64_t>(*statistics, "statistics", kDLInt, {kNumStatistics});
  }
  check_limits(call);
  return call;
}

}  // namespace moe_routing::bindings

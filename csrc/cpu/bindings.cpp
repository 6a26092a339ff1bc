#include "moe_routing/bindings.h"

#include <stdexcept>

#include "experts.h"
#include "instruction_set.h"
#include "route.h"

namespace moe_routing::cpu {
namespace {

using bindings::Optional;
using bindings::Tensor;
using bindings::TensorView;
using tvm::ffi::Function;

// See `bindings::Layer`. A CPU needs no workspace.
Function bind(Tensor policies, Tensor similarity, Tensor out_union, Optional<Tensor> statistics,
              Optional<Tensor> /* workspace */, int64_t top_k, int64_t scoring, int64_t num_groups,
              int64_t top_groups, bool renormalize, double scale, int64_t free_slots) {
  bindings::check(policies.device().device_type == kDLCPU, "policies", "host memory");
  const bindings::Layer layer(policies, similarity, out_union, statistics, {}, 0, top_k, scoring,
                              num_groups, top_groups, renormalize, scale, free_slots);
  return Function::FromTyped([layer](TensorView scores, TensorView topk_ids,
                                     TensorView topk_weights, TensorView policy_ids, int64_t part,
                                     Optional<TensorView> bias, Optional<TensorView> gates) {
    route(layer.call(scores, topk_ids, topk_weights, policy_ids, part, bias, gates));
  });
}

ExpertMatrices matrices_of(TensorView tensor, const char* name, TensorView like, int64_t experts,
                           int64_t rows, int64_t columns) {
  bindings::check_shape(tensor, name, {experts, rows, columns});
  bindings::check(tensor.device().device_type == kDLCPU, name, "host memory");
  bindings::check(
      bindings::is(tensor, static_cast<DLDataTypeCode>(like.dtype().code), like.dtype().bits), name,
      "the element type of hidden_states");
  bindings::check(columns == 1 || tensor.stride(2) == 1, name, "adjacent columns (stride 1)");
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)};
}

FloatRows bias_of(Optional<TensorView> tensor, const char* name, const bindings::Checker& checker,
                  int64_t experts, int64_t columns) {
  if (!tensor.has_value()) return {};
  const FloatRows bias = checker.floats(*tensor, name, experts, columns);
  bindings::check(bias.type != FloatType::float16, name, "float32 or bfloat16");
  return bias;
}

// Shapes: hidden_states and out [rows, hidden]; w13 [experts, 2 * intermediate, hidden];
// w2 [experts, hidden, intermediate]; bias13 [experts, 2 * intermediate]; bias2 [experts, hidden];
// topk_weights and topk_ids [rows, top_k].
void experts(TensorView hidden_states, TensorView w13, TensorView w2, Optional<TensorView> bias13,
             Optional<TensorView> bias2, TensorView topk_weights, TensorView topk_ids,
             TensorView out, int64_t activation, bool is_interleaved, double alpha, double limit,
             int64_t num_threads) {
  bindings::check_dimensions(hidden_states, "hidden_states", 2);
  bindings::check_dimensions(w2, "w2", 3);
  bindings::check_dimensions(topk_ids, "topk_ids", 2);
  const bindings::Checker checker(hidden_states.device());
  const int64_t rows = hidden_states.size(0);
  const int64_t top_k = topk_ids.size(1);
  const int64_t experts = w2.size(0);

  ExpertsCall call;
  call.hidden = hidden_states.size(1);
  call.intermediate = w2.size(2);
  bindings::check(rows <= INT32_MAX, "hidden_states", "fewer than 2^31 rows");
  bindings::check(hidden_states.device().device_type == kDLCPU, "hidden_states", "host memory");
  bindings::check(experts >= 1 && experts <= INT32_MAX, "w2", "at least one expert");
  bindings::check(call.hidden >= 1 && call.intermediate >= 1, "w2", "at least one row and column");
  call.num_rows = static_cast<int32_t>(rows);
  call.num_experts = static_cast<int32_t>(experts);
  call.top_k = static_cast<int32_t>(top_k);
  call.is_bfloat16 = bindings::is(hidden_states, kDLBfloat, 16);
  bindings::check(call.is_bfloat16 || bindings::is(hidden_states, kDLFloat, 32), "hidden_states",
                  "float32 or bfloat16");
  bindings::check(call.hidden == 1 || rows == 0 || hidden_states.stride(1) == 1, "hidden_states",
                  "adjacent elements in a row (stride 1)");
  call.hidden_states = hidden_states.data_ptr();
  call.hidden_stride = hidden_states.stride(0);
  call.w13 = matrices_of(w13, "w13", hidden_states, experts, 2 * call.intermediate, call.hidden);
  call.w2 = matrices_of(w2, "w2", hidden_states, experts, call.hidden, call.intermediate);
  call.bias13 = bias_of(bias13, "bias13", checker, experts, 2 * call.intermediate);
  call.bias2 = bias_of(bias2, "bias2", checker, experts, call.hidden);
  call.topk_weights = checker.floats(topk_weights, "topk_weights", rows, top_k);
  call.topk_ids = checker.ids(topk_ids, "topk_ids", rows, top_k);
  bindings::check_shape(out, "out", {rows, call.hidden});
  bindings::check(bindings::is_contiguous(out) && out.dtype().bits == hidden_states.dtype().bits &&
                      out.dtype().code == hidden_states.dtype().code &&
                      out.device().device_type == kDLCPU,
                  "out", "a contiguous tensor of hidden_states' element type");
  call.out = out.data_ptr();
  bindings::check(activation >= 0 && activation <= static_cast<int64_t>(Activation::clamped_swiglu),
                  "activation", "0 to 2");
  call.activation = static_cast<Activation>(activation);
  call.is_interleaved = is_interleaved;
  call.alpha = static_cast<float>(alpha);
  call.limit = static_cast<float>(limit);
  bindings::check(num_threads >= 1 && num_threads <= INT32_MAX, "num_threads", "at least 1");
  call.num_threads = static_cast<int32_t>(num_threads);
  try {
    run_experts(call);
  } catch (const std::out_of_range& error) {
    TVM_FFI_THROW(ValueError) << error.what();
  }
}

// Shapes: input [rows, in_features]; weight [out_features, in_features]; out [rows, out_features].
void linear(TensorView input, TensorView weight, TensorView out, int64_t num_threads) {
  bindings::check_dimensions(input, "input", 2);
  bindings::check_dimensions(weight, "weight", 2);
  LinearCall call;
  call.in_features = input.size(1);
  call.out_features = weight.size(0);
  call.is_bfloat16 = bindings::is(input, kDLBfloat, 16);
  const auto check_matrix = [&](TensorView tensor, const char* name, int64_t rows,
                                int64_t columns) {
    bindings::check_shape(tensor, name, {rows, columns});
    bindings::check(tensor.device().device_type == kDLCPU, name, "host memory");
    bindings::check(
        call.is_bfloat16 ? bindings::is(tensor, kDLBfloat, 16) : bindings::is(tensor, kDLFloat, 32),
        name, "float32, or bfloat16 in all three");
    bindings::check(rows == 0 || columns == 1 || tensor.stride(1) == 1, name,
                    "adjacent elements in a row (stride 1)");
  };
  bindings::check(input.size(0) <= INT32_MAX, "input", "fewer than 2^31 rows");
  bindings::check(call.in_features >= 1 && call.out_features >= 1, "weight",
                  "at least one row and column");
  call.num_rows = static_cast<int32_t>(input.size(0));
  check_matrix(input, "input", call.num_rows, call.in_features);
  check_matrix(weight, "weight", call.out_features, call.in_features);
  check_matrix(out, "out", call.num_rows, call.out_features);
  bindings::check(bindings::is_contiguous(out), "out", "a contiguous tensor");
  bindings::check(num_threads >= 1 && num_threads <= INT32_MAX, "num_threads", "at least 1");
  call.input = input.data_ptr();
  call.input_stride = input.stride(0);
  call.weight = weight.data_ptr();
  call.weight_stride = weight.stride(0);
  call.out = out.data_ptr();
  call.num_threads = static_cast<int32_t>(num_threads);
  run_linear(call);
}

int64_t read_stream(TensorView tensor, int64_t num_threads) {
  bindings::check(tensor.device().device_type == kDLCPU && bindings::is_contiguous(tensor),
                  "tensor", "a contiguous tensor in host memory");
  const int64_t bytes = tensor.numel() * tensor.dtype().bits / 8;
  return static_cast<int64_t>(stream_read(tensor.data_ptr(), bytes, static_cast<int>(num_threads)));
}

tvm::ffi::String list_instruction_sets() {
  std::string names;
  for (const std::string& name : instruction_sets()) names += (names.empty() ? "" : " ") + name;
  return names;
}

void choose_instruction_set(const tvm::ffi::String& name) {
  if (use_instruction_set(name)) return;
  bindings::fail("instruction set", "one of: " + std::string(list_instruction_sets()));
}

}  // namespace
}  // namespace moe_routing::cpu

TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind, moe_routing::cpu::bind);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(experts, moe_routing::cpu::experts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear, moe_routing::cpu::linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(stream_read, moe_routing::cpu::read_stream);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_sets, moe_routing::cpu::list_instruction_sets);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_instruction_set, moe_routing::cpu::choose_instruction_set);

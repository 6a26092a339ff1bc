#include "moe_routing/bindings.h"

#include "route.h"

namespace moe_routing::cpu {
namespace {

using bindings::Optional;
using bindings::TensorView;

void reroute(TensorView scores, Optional<TensorView> gates, Optional<TensorView> bias,
             Optional<TensorView> topk_ids, Optional<TensorView> topk_weights,
             TensorView policy_ids, TensorView policies, TensorView similarity, TensorView out_ids,
             TensorView out_weights, TensorView out_union, Optional<TensorView> statistics, Optional<TensorView> /* workspace */,
             int64_t scoring, int64_t num_groups, int64_t top_groups, bool renormalize,
             double scale) {
  route(bindings::make_call(scores, gates, bias, topk_ids, topk_weights, policy_ids,
                            policies, similarity, out_ids, out_weights, out_union, statistics,
                            scoring, num_groups, top_groups, renormalize, scale));
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

TVM_FFI_DLL_EXPORT_TYPED_FUNC(reroute, moe_routing::cpu::reroute);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_sets, moe_routing::cpu::list_instruction_sets);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_instruction_set, moe_routing::cpu::choose_instruction_set);

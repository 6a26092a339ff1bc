#include "moe_routing/bindings.h"

#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>

#include "route.cuh"

namespace moe_routing::cuda {
namespace {

using bindings::Optional;
using bindings::TensorView;

void reroute(TensorView scores, Optional<TensorView> gates, Optional<TensorView> bias,
             TensorView topk_ids, TensorView topk_weights,
             TensorView policy_ids, TensorView policies, TensorView similarity, TensorView out_ids,
             TensorView out_weights, TensorView out_union, Optional<TensorView> statistics,
             Optional<TensorView> workspace, int64_t scoring, int64_t num_groups,
             int64_t top_groups, bool renormalize, double scale, int64_t free_slots) {
  Call call = bindings::make_call(scores, gates, bias, topk_ids, topk_weights, policy_ids, policies,
                                  similarity, out_ids, out_weights, out_union, statistics, scoring,
                                  num_groups, top_groups, renormalize, scale, free_slots);
  const DLDevice device = scores.device();
  bindings::check(device.device_type == kDLCUDA, "scores", "a tensor on a CUDA device");
  if (workspace.has_value()) {
    const bindings::Checker checker(device);
    call.workspace = reinterpret_cast<uint32_t*>(
        checker.dense<int32_t>(*workspace, "workspace", kDLInt, {kWorkspaceWords}));
  }
  bindings::check(call.workspace != nullptr || call.num_rows <= kOneBlockRows, "workspace",
                  "a tensor, because there are more than 16 rows");
  tvm::ffi::CUDADeviceGuard guard(device.device_id);
  const auto stream =
      static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  const cudaError_t error = route(call, stream);
  if (error != cudaSuccess) {
    TVM_FFI_THROW(RuntimeError) << "launching the re-routing: " << cudaGetErrorString(error);
  }
}

}  // namespace
}  // namespace moe_routing::cuda

TVM_FFI_DLL_EXPORT_TYPED_FUNC(reroute, moe_routing::cuda::reroute);

#include "moe_routing/bindings.h"

#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>

#include "route.cuh"

namespace moe_routing::cuda {
namespace {

using bindings::Optional;
using bindings::Tensor;
using bindings::TensorView;
using tvm::ffi::Function;

void launch(const Call& call, DLDevice device) {
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

// See `bindings::Layer`.
Function bind(Tensor policies, Tensor similarity, Tensor out_union, Optional<Tensor> statistics,
              Optional<Tensor> workspace, int64_t top_k, int64_t scoring, int64_t num_groups,
              int64_t top_groups, bool renormalize, double scale, int64_t free_slots) {
  bindings::check(policies.device().device_type == kDLCUDA, "policies",
                  "a tensor on a CUDA device");
  const bindings::Layer layer(policies, similarity, out_union, statistics, workspace,
                              kWorkspaceWords, top_k, scoring, num_groups, top_groups, renormalize,
                              scale, free_slots);
  return Function::FromTyped([layer](TensorView scores, TensorView topk_ids,
                                     TensorView topk_weights, TensorView policy_ids, int64_t part,
                                     Optional<TensorView> bias, Optional<TensorView> gates) {
    launch(layer.call(scores, topk_ids, topk_weights, policy_ids, part, bias, gates),
           layer.device());
  });
}

}  // namespace
}  // namespace moe_routing::cuda

TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind, moe_routing::cuda::bind);

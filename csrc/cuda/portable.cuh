// What the kernels' source keeps to so that the same text compiles with nvcc, for a GPU, and with
// g++, for the simulator in tests/kernels/simt. Under nvcc these are a few macros and inline
// functions and nothing else.
//
//   SIMT_SHARED(T, name)        a variable of the block in shared memory; an array type needs an
//                               alias, as in `using Row = float[32]; SIMT_SHARED(Row, row);`
//   SIMT_DYN_SHARED(T, name)    `T* name` to the dynamic shared memory of the launch
//   SIMT_LAUNCH(kernel, grid, block, smem, stream, ...)            launch; gives a cudaError_t
//   SIMT_LAUNCH_DEPENDENT(kernel, grid, block, smem, stream, ...)  programmatic dependent launch:
//                               the grid may start before the one ahead of it in the stream ends
//   simt::grid_dependency_wait()    wait for the grids ahead, their writes included
//   simt::grid_dependency_launch()  let the dependent grid start
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

// The arguments after the kernel are: grid, block, smem, stream, and the kernel's own.
#define SIMT_LAUNCH(kernel, ...) ::simt::launch(::simt::Order::kAfter, (kernel), __VA_ARGS__)
#define SIMT_LAUNCH_DEPENDENT(kernel, ...) \
  ::simt::launch(::simt::Order::kDependent, (kernel), __VA_ARGS__)

namespace simt {

// How a grid relates to the one ahead of it in its stream.
enum class Order { kAfter, kDependent };

}  // namespace simt

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#define SIMT_SHARED(T, name) __shared__ T name
#define SIMT_DYN_SHARED(T, name)                                        \
  extern __shared__ __align__(16) unsigned char simt_dynamic_shared_[]; \
  T* const name = reinterpret_cast<T*>(simt_dynamic_shared_)

namespace simt {

__device__ __forceinline__ void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

__device__ __forceinline__ void grid_dependency_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Whether the code that this device runs for the kernel was compiled for 9.0 or newer. Asking for
// the device's capability is not enough: code compiled for 8.0 also runs there, from its PTX, and
// its grid_dependency_wait() is empty.
inline bool can_wait_for_dependency(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> known;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    return false;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) {
    return found->second;
  }
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) {
    return false;
  }
  return known[{kernel, device}] = attributes.ptxVersion >= 90;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(Order order, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem,
                   cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  if (order == Order::kDependent &&
      can_wait_for_dependency(reinterpret_cast<const void*>(kernel))) {
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace simt

#else
#include "simt/simt.h"
#endif

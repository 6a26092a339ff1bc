// Runs re-routing calls that arrive on stdin, on the simulated GPU or on the CPU, and writes what
// they leave on stdout. Every buffer is a heap block of its exact size, so that AddressSanitizer
// sees one element too far. The layout of a call is that of tests/kernels/driver.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/route.cuh"

#if !defined(ROUTE_DRIVER_NO_CPU)
// One by one: what chooses among them knows the experts' code too.
namespace moe_routing::cpu {
namespace avx512 {
void route(const Call& call);
}
namespace avx2 {
void route(const Call& call);
}
namespace portable {
void route(const Call& call);
}
}  // namespace moe_routing::cpu
#endif

namespace {

using namespace moe_routing;

enum Backend : int32_t { kCuda, kAvx512, kAvx2, kPortable };

struct Header {
  int32_t backend, seed;
  int32_t num_rows, num_experts, top_k;
  int32_t score_type, score_stride, scoring, num_groups, top_groups, renormalize;
  float scale;
  int32_t has_gates, has_bias, ids_are_wide, id_stride, weight_type, weight_stride;
  int32_t num_policies, num_steps, num_artifacts, free_slots, counts;
  int32_t out_gap, in_place;
};

using Bytes = std::unique_ptr<unsigned char[]>;

bool read_exactly(void* to, size_t size) { return std::fread(to, 1, size, stdin) == size; }

Bytes receive(size_t size) {
  Bytes bytes(new unsigned char[size]);
  if (!read_exactly(bytes.get(), size)) std::exit(3);
  return bytes;
}

// What nobody writes keeps these bytes; tests/kernels/driver.py looks for them.
Bytes filled(size_t size) {
  Bytes bytes(new unsigned char[size]);
  std::memset(bytes.get(), 0xEE, size);
  return bytes;
}

template <class T>
T* as(const Bytes& bytes) {
  return reinterpret_cast<T*>(bytes.get());
}

// A matrix whose last row ends with its last column: nothing to read beyond it.
size_t extent(int rows, int columns, int stride) {
  return rows == 0 ? 0 : static_cast<size_t>(rows - 1) * stride + columns;
}

size_t width(int32_t type) { return type == static_cast<int32_t>(FloatType::float32) ? 4 : 2; }

void run(const Header& header, const Call& call) {
  if (header.backend == kCuda) {
    simt::options.seed = static_cast<uint64_t>(header.seed);
    cuda::route(call, nullptr);
    return;
  }
#if defined(ROUTE_DRIVER_NO_CPU)
  std::exit(4);
#else
  if (header.backend == kAvx512) cpu::avx512::route(call);
  if (header.backend == kAvx2) cpu::avx2::route(call);
  if (header.backend == kPortable) cpu::portable::route(call);
#endif
}

void serve(const Header& h) {
  const Bytes scores =
      receive(width(h.score_type) * extent(h.num_rows, h.num_experts, h.score_stride));
  const Bytes gates =
      receive(h.has_gates ? 4 * extent(h.num_rows, h.num_experts, h.num_experts) : 0);
  const Bytes bias = receive(h.has_bias ? 4 * h.num_experts : 0);
  const size_t id_width = h.ids_are_wide ? 8 : 4;
  const size_t ids_size = id_width * extent(h.num_rows, h.top_k, h.id_stride);
  const size_t weights_size = width(h.weight_type) * extent(h.num_rows, h.top_k, h.weight_stride);
  const Bytes ids = receive(ids_size);
  const Bytes weights = receive(weights_size);
  const Bytes policy_ids = receive(4 * h.num_rows);
  const Bytes policies = receive(sizeof(Policy) * h.num_policies * h.num_steps);
  const Bytes similarity = receive(4ull * h.num_artifacts * h.num_experts * h.num_experts);

  const int out_stride = h.top_k + h.out_gap;
  const size_t slots = extent(h.num_rows, h.top_k, out_stride);
  const size_t out_ids_size = h.in_place ? ids_size : id_width * slots;
  const size_t out_weights_size = h.in_place ? weights_size : width(h.weight_type) * slots;
  const Bytes own_ids = filled(id_width * slots);
  const Bytes own_weights = filled(width(h.weight_type) * slots);
  const Bytes out_union(new unsigned char[h.num_experts]);
  const Bytes workspace = filled(4 * cuda::kWorkspaceWords);
  int64_t statistics[kNumStatistics] = {};

  Call call;
  call.num_rows = h.num_rows;
  call.num_experts = h.num_experts;
  call.top_k = h.top_k;
  call.scores = {scores.get(), h.score_stride, static_cast<FloatType>(h.score_type)};
  if (h.has_gates) call.gates = {gates.get(), h.num_experts, FloatType::float32};
  if (h.has_bias) call.bias = as<float>(bias);
  call.scoring = static_cast<Scoring>(h.scoring);
  call.num_groups = h.num_groups;
  call.top_groups = h.top_groups;
  call.renormalize = h.renormalize != 0;
  call.scale = h.scale;
  const FloatType weight_type = static_cast<FloatType>(h.weight_type);
  call.topk_ids = {ids.get(), h.id_stride, h.ids_are_wide != 0};
  call.topk_weights = {weights.get(), h.weight_stride, weight_type};
  call.policy_ids = as<int32_t>(policy_ids);
  call.policies = as<Policy>(policies);
  call.num_policies = h.num_policies;
  call.num_steps = h.num_steps;
  call.similarity = as<float>(similarity);
  call.free_slots = static_cast<FreeSlots>(h.free_slots);
  call.out_ids = {own_ids.get(), out_stride, h.ids_are_wide != 0};
  call.out_weights = {own_weights.get(), out_stride, weight_type};
  if (h.in_place) {
    call.out_ids = call.topk_ids;
    call.out_weights = call.topk_weights;
  }
  call.out_union = out_union.get();
  if (h.counts) call.statistics = statistics;
  call.workspace = as<uint32_t>(workspace);

  const uint64_t launches_before = simt::num_launches;
  run(h, call);
  const int64_t launches = static_cast<int64_t>(simt::num_launches - launches_before);
  std::fwrite(call.out_ids.data, 1, out_ids_size, stdout);
  std::fwrite(call.out_weights.data, 1, out_weights_size, stdout);
  std::fwrite(out_union.get(), 1, h.num_experts, stdout);
  std::fwrite(statistics, 1, sizeof statistics, stdout);
  std::fwrite(&launches, 1, sizeof launches, stdout);
  std::fflush(stdout);
}

}  // namespace

int main() {
  Header header;
  try {
    while (read_exactly(&header, sizeof header)) serve(header);
  } catch (const simt::Error& error) {
    std::fprintf(stderr, "simulator: %s\n", error.what());
    return 2;
  }
}

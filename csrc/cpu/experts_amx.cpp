#if defined(__x86_64__)
#include <immintrin.h>

// Intrinsics stay above: they set targets of their own.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi,bmi2,popcnt")
#pragma GCC target("amx-tile,amx-bf16")
#pragma GCC target("prefer-vector-width=512")
#define MOE_ROUTING_ISA amx
#define MOE_ROUTING_LANES 16
#include "experts_numbers.h"

// The experts by matrix tiles (Intel AMX): 16 weight rows times up to 16 tokens.
//
// A tile of weights is read where it lies, 16 rows of 32 neighbouring elements. The other operand,
// the inputs of up to 16 tokens of one expert (a block), is packed in pairs: [k / 2][t][k % 2].
// A column of a tile product depends on that token alone.
namespace moe_routing::cpu::amx {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileDepth = 32;  // elements of the summed dimension in a tile

using Sums = float[kTileRows][kBlockTokens];  // [weight row][token]

// Tile registers: sums of the first and second matrix for two blocks, weights, inputs.
enum { kSum00, kSum01, kSum10, kSum11, kWeights0, kWeights1, kInputs0, kInputs1 };

// Instead of GCC's intrinsics, which take only digits and hide from the compiler what they read.
template <int tile>
MOE_ROUTING_INLINE void load_tile(const void* from, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                   :
                   : "r"(from), "r"(row_bytes), "i"(tile)
                   : "memory");
}
template <int tile>
MOE_ROUTING_INLINE void store_tile(Sums& to) {
  const int64_t row_bytes = sizeof to[0];
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                   :
                   : "r"(to), "r"(row_bytes), "i"(tile)
                   : "memory");
}
template <int tile>
MOE_ROUTING_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int sum, int weights, int inputs>
MOE_ROUTING_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                   :
                   : "i"(sum), "i"(weights), "i"(inputs));
}

struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct Shape {
  int rows, tokens0, tokens1;
};

// Shapes stay until a thread leaves: most calls of `use` find the right ones.
thread_local Shape current{0, 0, 0};

void use(Shape shape) {
  if (shape.rows == current.rows && shape.tokens0 == current.tokens0 &&
      shape.tokens1 == current.tokens1) {
    return;
  }
  current = shape;
  TileShapes shapes;
  const auto set = [&](int tile, int rows, int bytes) {
    shapes.rows[tile] = static_cast<uint8_t>(rows);
    shapes.row_bytes[tile] = static_cast<uint16_t>(bytes);
  };
  set(kSum00, shape.rows, 4 * shape.tokens0);
  set(kSum10, shape.rows, 4 * shape.tokens0);
  set(kWeights0, shape.rows, 2 * kTileDepth);
  set(kWeights1, shape.rows, 2 * kTileDepth);
  set(kInputs0, kTileDepth / 2, 4 * shape.tokens0);
  if (shape.tokens1 > 0) {
    set(kSum01, shape.rows, 4 * shape.tokens1);
    set(kSum11, shape.rows, 4 * shape.tokens1);
    set(kInputs1, kTileDepth / 2, 4 * shape.tokens1);
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
}

void leave() {
  if (current.rows == 0) return;
  current = {0, 0, 0};
  __asm__ volatile("tilerelease");
}

// Up to 16 tokens of one expert, packed.
struct Block {
  const Bfloat16* inputs;
  int tokens;
};

// 16 rows of one matrix: where they lie, and a copy of their last, incomplete tile.
struct TileRows {
  const Bfloat16* data;
  int64_t stride;  // elements
  alignas(64) Bfloat16 rest[kTileRows][kTileDepth];

  TileRows(const Bfloat16* data, int64_t stride, int rows, int64_t size)
      : data(data), stride(stride) {
    const int64_t whole = size / kTileDepth * kTileDepth;
    if (whole == size) return;
    __builtin_memset(rest, 0, sizeof rest);
    for (int r = 0; r < rows; ++r) {
      __builtin_memcpy(rest[r], data + r * stride + whole, (size - whole) * sizeof(Bfloat16));
    }
  }
};

template <bool has_second_block>
void multiply(const TileRows& first, const TileRows& second, Block block0, Block block1,
              int64_t size, Sums (&sums)[2][2], Prefetcher& prefetcher) {
  const int64_t whole = size / kTileDepth * kTileDepth;
  zero_tile<kSum00>();
  zero_tile<kSum10>();
  if (has_second_block) {
    zero_tile<kSum01>();
    zero_tile<kSum11>();
  }
  const auto step = [&](const Bfloat16* a, int64_t a_stride, const Bfloat16* b, int64_t b_stride,
                        int64_t k) __attribute__((always_inline)) {
    load_tile<kInputs0>(block0.inputs + k * block0.tokens, 4 * block0.tokens);
    load_tile<kWeights0>(a, a_stride);
    multiply_tiles<kSum00, kWeights0, kInputs0>();
    load_tile<kWeights1>(b, b_stride);
    multiply_tiles<kSum10, kWeights1, kInputs0>();
    if (has_second_block) {
      load_tile<kInputs1>(block1.inputs + k * block1.tokens, 4 * block1.tokens);
      multiply_tiles<kSum01, kWeights0, kInputs1>();
      multiply_tiles<kSum11, kWeights1, kInputs1>();
    }
  };
  for (int64_t k = 0; k < whole; k += kTileDepth) {
    step(first.data + k, 2 * first.stride, second.data + k, 2 * second.stride, k);
    prefetcher.advance(2 * kTileRows * 64);
  }
  if (whole < size) step(first.rest[0], 2 * kTileDepth, second.rest[0], 2 * kTileDepth, whole);
  store_tile<kSum00>(sums[0][0]);
  store_tile<kSum10>(sums[1][0]);
  if (has_second_block) {
    store_tile<kSum01>(sums[0][1]);
    store_tile<kSum11>(sums[1][1]);
  }
}

void multiply(const TileRows& first, const TileRows& second, int rows, Block block0, Block block1,
              int64_t size, Sums (&sums)[2][2], Prefetcher& prefetcher) {
  use({rows, block0.tokens, block1.tokens});
  if (block1.tokens > 0) {
    multiply<true>(first, second, block0, block1, size, sums, prefetcher);
  } else {
    multiply<false>(first, second, block0, block1, size, sums, prefetcher);
  }
}

// Rows to columns, of 16 by 16 elements of 32 bits.
MOE_ROUTING_INLINE void transpose(Floats (&rows)[16]) {
  Floats other[16];
  for (int i = 0; i < 16; i += 2) {
    const auto a = reinterpret_cast<__m512>(rows[i]), b = reinterpret_cast<__m512>(rows[i + 1]);
    other[i] = reinterpret_cast<Floats>(_mm512_unpacklo_ps(a, b));
    other[i + 1] = reinterpret_cast<Floats>(_mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const auto a = reinterpret_cast<__m512d>(other[i + j]);
      const auto b = reinterpret_cast<__m512d>(other[i + j + 2]);
      rows[i + 2 * j] = reinterpret_cast<Floats>(_mm512_unpacklo_pd(a, b));
      rows[i + 2 * j + 1] = reinterpret_cast<Floats>(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      const auto a = reinterpret_cast<__m512>(rows[i + j]);
      const auto b = reinterpret_cast<__m512>(rows[i + j + 4]);
      other[i + j] = reinterpret_cast<Floats>(_mm512_shuffle_f32x4(a, b, 0x88));
      other[i + j + 4] = reinterpret_cast<Floats>(_mm512_shuffle_f32x4(a, b, 0xdd));
    }
  }
  for (int j = 0; j < 8; ++j) {
    const auto a = reinterpret_cast<__m512>(other[j]), b = reinterpret_cast<__m512>(other[j + 8]);
    rows[j] = reinterpret_cast<Floats>(_mm512_shuffle_f32x4(a, b, 0x88));
    rows[j + 8] = reinterpret_cast<Floats>(_mm512_shuffle_f32x4(a, b, 0xdd));
  }
}

MOE_ROUTING_INLINE void store_lanes(void* to, Floats values, int count) {
  const __mmask16 lanes = static_cast<__mmask16>((1u << count) - 1u);
  _mm512_mask_storeu_ps(to, lanes, reinterpret_cast<__m512>(values));
}

// Elements of a packed token.
int64_t depth(int64_t size) { return round_up(size, kTileDepth); }

int64_t input_bytes(const Work& work) { return 2 * work.num_pairs * depth(work.input_size); }
int64_t activated_bytes(const Work& work) {
  return 2 * work.num_pairs * depth(work.call->intermediate);
}
int64_t num_packs(const Work& work) { return work.num_blocks; }

int tokens_of(const Work& work, int32_t active, int32_t pair) {
  const int32_t rest = work.first[active + 1] - pair;
  return rest < 0 ? 0 : rest < kBlockTokens ? rest : kBlockTokens;
}

Bfloat16* packed(char* memory, int64_t pair, int64_t size) {
  return reinterpret_cast<Bfloat16*>(memory) + pair * depth(size);
}

Block block_of(const Work& work, char* memory, int64_t size, int32_t active, int32_t pair) {
  const int tokens = tokens_of(work, active, pair);
  return {tokens > 0 ? packed(memory, pair, size) : nullptr, tokens};
}

// The expert and the first pair of a block.
int32_t active_of_block(const Work& work, int64_t block) {
  int32_t low = 0, high = work.num_active;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (work.first_block[middle] <= block ? low : high) = middle;
  }
  return low;
}

// [t][k] to [k / 2][t][k % 2], two elements at a time.
void pack(const Work& work, int64_t block) {
  const ExpertsCall& call = *work.call;
  const int32_t active = active_of_block(work, block);
  const int32_t pair =
      work.first[active] + static_cast<int32_t>(block - work.first_block[active]) * kBlockTokens;
  const int tokens = tokens_of(work, active, pair);
  const int64_t size = work.input_size;
  const Bfloat16* from[kBlockTokens];
  for (int t = 0; t < kBlockTokens; ++t) {
    const int32_t row = work.rows[pair + (t < tokens ? t : 0)];
    from[t] = static_cast<const Bfloat16*>(call.hidden_states) + row * call.hidden_stride;
  }
  Bfloat16* const to = packed(work.inputs, pair, size);
  int64_t k = 0;
  if (tokens == 1) {
    k = size / kTileDepth * kTileDepth;
    __builtin_memcpy(to, from[0], k * sizeof(Bfloat16));
  }
  for (; k + kTileDepth <= size; k += kTileDepth) {
    Floats columns[kTileRows];
    for (int t = 0; t < kTileRows; ++t) columns[t] = load<Floats>(from[t] + k);
    transpose(columns);
    for (int r = 0; r < kTileRows; ++r) {
      store_lanes(to + (k + 2 * r) * tokens, columns[r], tokens);
    }
  }
  for (; k < depth(size); k += 2) {
    for (int t = 0; t < tokens; ++t) {
      to[k * tokens + 2 * t] = k < size ? from[t][k] : Bfloat16{};
      to[k * tokens + 2 * t + 1] = k + 1 < size ? from[t][k + 1] : Bfloat16{};
    }
  }
}

template <Activation activation>
void store_activated(const ExpertsCall& call, int64_t expert, GateUp at, int64_t column,
                     int columns, const Sums& gate, const Sums& up, Bfloat16* to, int tokens) {
  const auto value = [&](int r) __attribute__((always_inline)) {
    if (r >= columns) return Bits{};
    const Floats g = load<Floats>(gate[r]) + bias_at(call.bias13, expert, at.gate + r * at.step);
    const Floats u = load<Floats>(up[r]) + bias_at(call.bias13, expert, at.up + r * at.step);
    return to_bfloat16_bits(activate<activation>(g, u, call.alpha, call.limit));
  };
  const bool is_last = column + columns == call.intermediate;
  const int64_t end = is_last ? depth(call.intermediate) - column : kTileRows;
  for (int r = 0; r < end; r += 2) {  // zeros fill the last tile
    const Bits pairs = value(r) | value(r + 1) << 16;
    store_lanes(to + (column + r) * tokens, reinterpret_cast<Floats>(pairs), tokens);
  }
}

void store_activated(const ExpertsCall& call, int64_t expert, GateUp at, int64_t column,
                     int columns, const Sums& gate, const Sums& up, Bfloat16* to, int tokens) {
  switch (call.activation) {
    case Activation::silu:
      return store_activated<Activation::silu>(call, expert, at, column, columns, gate, up, to,
                                               tokens);
    case Activation::gelu_tanh:
      return store_activated<Activation::gelu_tanh>(call, expert, at, column, columns, gate, up, to,
                                                    tokens);
    case Activation::clamped_swiglu:
      return store_activated<Activation::clamped_swiglu>(call, expert, at, column, columns, gate,
                                                         up, to, tokens);
  }
}

void gate_up(const Work& work, Task task, const Task* next) {
  const ExpertsCall& call = *work.call;
  const auto [active, columns] = task;
  const int64_t expert = work.experts[active];
  const Bfloat16* const weights = matrix<Bfloat16>(call.w13, expert);
  alignas(64) Sums sums[2][2] = {};
  Prefetcher prefetcher;
  for (int64_t column = columns.begin; column < columns.end; column += kTileRows) {
    const int64_t left = columns.end - column;
    const int rows = left < kTileRows ? static_cast<int>(left) : kTileRows;
    const GateUp at = GateUp::at(call, column);
    const int64_t stride = at.step * call.w13.row_stride;
    const TileRows gate(weights + at.gate * call.w13.row_stride, stride, rows, call.hidden);
    const TileRows up(weights + at.up * call.w13.row_stride, stride, rows, call.hidden);
    if (left > kTileRows) {
      prefetch_gate_up<Bfloat16>(work, active, column + kTileRows, kTileRows, prefetcher);
    } else if (next != nullptr) {
      prefetch_gate_up<Bfloat16>(work, next->active, next->columns.begin, kTileRows, prefetcher);
    }
    for (int32_t pair = work.first[active]; pair < work.first[active + 1];
         pair += 2 * kBlockTokens) {
      const Block blocks[2] = {
          block_of(work, work.inputs, call.hidden, active, pair),
          block_of(work, work.inputs, call.hidden, active, pair + kBlockTokens)};
      multiply(gate, up, rows, blocks[0], blocks[1], call.hidden, sums, prefetcher);
      for (int b = 0; b < 2 && blocks[b].tokens > 0; ++b) {
        store_activated(call, expert, at, column, rows, sums[0][b], sums[1][b],
                        packed(work.activated, pair + b * kBlockTokens, call.intermediate),
                        blocks[b].tokens);
      }
    }
  }
}

// Adds 16 output columns of each token of a block to its row's sum.
void add_weighted(const Work& work, int64_t expert, int32_t pair, int tokens, int64_t column,
                  int columns, const Sums& outputs, float* sums, int64_t width) {
  float bias[kTileRows] = {};
  for (int r = 0; r < columns; ++r) bias[r] = bias_at(work.call->bias2, expert, column + r);
  Floats columns_of[kBlockTokens];
  for (int r = 0; r < kTileRows; ++r) columns_of[r] = load<Floats>(outputs[r]);
  transpose(columns_of);
  for (int t = 0; t < tokens; ++t) {
    float* const sum = sums + work.rows[pair + t] * width;
    const Floats output = columns_of[t] + load<Floats>(bias);
    store(sum, load<Floats>(sum) + work.weights[pair + t] * output);
  }
}

// 32 output columns, or an incomplete tile of fewer than 16, of one expert.
void down_block(const Work& work, int32_t active, Columns columns, int64_t column, float* sums,
                int64_t width, Prefetcher& prefetcher) {
  const ExpertsCall& call = *work.call;
  const int64_t expert = work.experts[active];
  const int64_t left = columns.end - column;
  const int rows = left < kTileRows ? static_cast<int>(left) : kTileRows;
  const int64_t second_row = left >= 2 * kTileRows ? kTileRows : 0;
  const Bfloat16* const weights = matrix<Bfloat16>(call.w2, expert) + column * call.w2.row_stride;
  const TileRows first(weights, call.w2.row_stride, rows, call.intermediate);
  const TileRows second(weights + second_row * call.w2.row_stride, call.w2.row_stride, rows,
                        call.intermediate);
  alignas(64) Sums outputs[2][2];
  for (int32_t pair = work.first[active]; pair < work.first[active + 1]; pair += 2 * kBlockTokens) {
    const Block blocks[2] = {
        block_of(work, work.activated, call.intermediate, active, pair),
        block_of(work, work.activated, call.intermediate, active, pair + kBlockTokens)};
    multiply(first, second, rows, blocks[0], blocks[1], call.intermediate, outputs, prefetcher);
    for (int b = 0; b < 2 && blocks[b].tokens > 0; ++b) {
      for (int64_t row = 0; row <= second_row; row += kTileRows) {
        add_weighted(work, expert, pair + b * kBlockTokens, blocks[b].tokens, column + row, rows,
                     outputs[row / kTileRows][b], sums + column + row - columns.begin, width);
      }
    }
  }
}

void down(const Work& work, float* sums, Task task, const Task* next) {
  const ExpertsCall& call = *work.call;
  const Columns columns = task.columns;
  const int64_t width = round_up(columns.end - columns.begin, kBlockColumns);
  __builtin_memset(sums, 0, call.num_rows * width * sizeof(float));
  Prefetcher prefetcher;
  for (int32_t active = 0; active < work.num_active; ++active) {
    for (int64_t column = columns.begin; column < columns.end;) {
      const int64_t left = columns.end - column;
      const int64_t step = left >= 2 * kTileRows ? 2 * kTileRows : kTileRows;
      if (left >= step + 2 * kTileRows) {
        prefetch_down<Bfloat16>(work, active, column + step, 2 * kTileRows, prefetcher);
      } else if (left <= step && active + 1 < work.num_active) {
        prefetch_down<Bfloat16>(work, active + 1, columns.begin, 2 * kTileRows, prefetcher);
      } else if (left <= step && next != nullptr) {
        prefetch_down<Bfloat16>(work, 0, next->columns.begin, 2 * kTileRows, prefetcher);
      }
      down_block(work, active, columns, column, sums, width, prefetcher);
      column += step;
    }
  }
  write_sums<Bfloat16>(call, sums, columns, width);
}

}  // namespace

const ExpertsKernel bfloat16_experts = {
    input_bytes, activated_bytes, num_packs, pack, gate_up, down, leave};

}  // namespace moe_routing::cpu::amx
#endif

// The experts by dot products of vectors.
//
// Compiled once for each instruction set; see experts_numbers.h. A weight row is read where it
// lies, along the dimension that is summed. Every dot product keeps one vector of partial sums and
// adds it up in the same order, however many rows and tokens are worked on at a time.
#pragma once
#include "experts_numbers.h"

namespace moe_routing::cpu::MOE_ROUTING_ISA {

constexpr int kTokens = 32;  // tokens of an expert that share a scratch buffer
constexpr int kStepTokens = 4;
constexpr int kStepRows = MOE_ROUTING_LANES >= 16 ? 4 : 2;  // as many sums as there are registers

template <int value>
struct Constant {
  constexpr operator int() const { return value; }
};

using Tile = float[kTokens][kBlockColumns];

// float32 weights.
struct FloatDot {
  using Weight = float;
  using Input = float;
  static constexpr int kChunk = kLanes;

  template <int rows, int tokens>
  MOE_ROUTING_INLINE void step(Floats (&sums)[tokens][rows], const float* const* weights,
                               const float* const* inputs, int64_t at, int64_t k) {
    for (int r = 0; r < rows; ++r) {
      const Floats weight = load<Floats>(weights[r] + at);
      for (int t = 0; t < tokens; ++t) sums[t][r] += weight * load<Floats>(inputs[t] + k);
    }
  }

  MOE_ROUTING_INLINE void put(float* inputs, int64_t column, float value) {
    inputs[column] = value;
  }
  MOE_ROUTING_INLINE void put_block(float* inputs, int64_t column, const float* values) {
    __builtin_memcpy(inputs + column, values, kBlockColumns * sizeof(float));
  }
};

// bfloat16 weights, widened: the even elements of a chunk come first in the inputs.
struct WideningDot {
  using Weight = Bfloat16;
  using Input = float;
  static constexpr int kChunk = 2 * kLanes;

  template <int rows, int tokens>
  MOE_ROUTING_INLINE void step(Floats (&sums)[tokens][rows], const Bfloat16* const* weights,
                               const float* const* inputs, int64_t at, int64_t k) {
    for (int r = 0; r < rows; ++r) {
      const Bits pairs = load<Bits>(weights[r] + at);
      const Floats even = reinterpret_cast<Floats>(pairs << 16);
      const Floats odd = reinterpret_cast<Floats>(pairs & 0xffff0000u);
      for (int t = 0; t < tokens; ++t) {
        sums[t][r] += even * load<Floats>(inputs[t] + k);
        sums[t][r] += odd * load<Floats>(inputs[t] + k + kLanes);
      }
    }
  }

  MOE_ROUTING_INLINE void put(float* inputs, int64_t column, Bfloat16 value) {
    inputs[place(column)] = to_float(value);
  }
  MOE_ROUTING_INLINE void put_block(float* inputs, int64_t column, const float* values) {
    for (int i = 0; i < kBlockColumns; ++i) inputs[column + place(i)] = values[i];
  }

 private:
  MOE_ROUTING_INLINE int64_t place(int64_t column) {
    const int64_t in_chunk = column % kChunk;
    return column - in_chunk + in_chunk % 2 * kLanes + in_chunk / 2;
  }
};

// Both vectors hold groups of 2 * width partial sums. Adds the halves of each group; the groups of
// `a` come first in the result, then those of `b`.
template <int width>
MOE_ROUTING_INLINE Floats fold(Floats a, Floats b) {
  Ints first;
  for (int i = 0; i < kLanes; ++i) {
    const int in_vector = i % (kLanes / 2);
    first[i] = i / (kLanes / 2) * kLanes + in_vector / width * 2 * width + in_vector % width;
  }
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, first + width);
}

template <int width>
MOE_ROUTING_INLINE Floats fold_rest(Floats v) {
  if constexpr (width == 0) {
    return v;
  } else {
    return fold_rest<width / 2>(fold<width>(v, v));
  }
}

// The sum of each vector, added up in one order whatever their number.
template <int rows>
MOE_ROUTING_INLINE void add_up(const Floats (&sums)[rows], float* out) {
  static_assert(rows == 1 || rows == 2 || rows == 4);
  Floats folded;
  if constexpr (rows == 4) {
    const Floats first = fold<kLanes / 2>(sums[0], sums[1]);
    const Floats second = fold<kLanes / 2>(sums[2], sums[3]);
    folded = fold_rest<kLanes / 8>(fold<kLanes / 4>(first, second));
  } else {
    folded = fold_rest<kLanes / 4>(fold<kLanes / 2>(sums[0], sums[rows - 1]));
  }
  for (int r = 0; r < rows; ++r) out[r] = folded[r];
}

template <class Dot>
class VectorExperts {
  using Weight = typename Dot::Weight;
  using Input = typename Dot::Input;
  static_assert(kBlockColumns % Dot::kChunk == 0, "packed rows end with a whole chunk");

 public:
  static int64_t input_bytes(const Work& work) {
    return work.call->num_rows * stride(work.input_size) * sizeof(Input);
  }
  static int64_t activated_bytes(const Work& work) {
    return work.num_pairs * stride(work.call->intermediate) * sizeof(Input);
  }
  static int64_t num_packs(const Work& work) { return work.call->num_rows; }

  static void pack(const Work& work, int64_t row) {
    const ExpertsCall& call = *work.call;
    const Weight* const from =
        static_cast<const Weight*>(call.hidden_states) + row * call.hidden_stride;
    Input* const to = input_of(work, row);
    for (int64_t k = 0; k < work.input_size; ++k) Dot::put(to, k, from[k]);
    for (int64_t k = work.input_size; k < stride(work.input_size); ++k) {
      Dot::put(to, k, Weight{});
    }
  }

  static void gate_up(const Work& work, Task task, const Task* next) {
    const auto [active, columns] = task;
    Prefetcher prefetcher;
    for (int64_t column = columns.begin; column < columns.end; column += kBlockColumns) {
      const Columns block = at_most(column, columns.end);
      if (block.end < columns.end) {
        prefetch_gate_up<Weight>(work, active, block.end, kBlockColumns, prefetcher);
      } else if (next != nullptr) {
        prefetch_gate_up<Weight>(work, next->active, next->columns.begin, kBlockColumns,
                                 prefetcher);
      }
      for (int32_t pair = work.first[active]; pair < work.first[active + 1]; pair += kTokens) {
        gate_up_block(work, work.experts[active], pair, count(pair, work.first[active + 1]), block,
                      prefetcher);
      }
    }
  }

  static void down(const Work& work, float* sums, Task task, const Task* next) {
    const ExpertsCall& call = *work.call;
    const Columns columns = task.columns;
    const int64_t width = round_up(columns.end - columns.begin, kBlockColumns);
    __builtin_memset(sums, 0, call.num_rows * width * sizeof(float));
    Prefetcher prefetcher;
    for (int32_t active = 0; active < work.num_active; ++active) {
      for (int64_t column = columns.begin; column < columns.end; column += kBlockColumns) {
        const Columns block = at_most(column, columns.end);
        if (block.end < columns.end) {
          prefetch_down<Weight>(work, active, block.end, kBlockColumns, prefetcher);
        } else if (active + 1 < work.num_active) {
          prefetch_down<Weight>(work, active + 1, columns.begin, kBlockColumns, prefetcher);
        } else if (next != nullptr) {
          prefetch_down<Weight>(work, 0, next->columns.begin, kBlockColumns, prefetcher);
        }
        for (int32_t pair = work.first[active]; pair < work.first[active + 1]; pair += kTokens) {
          down_block(work, work.experts[active], pair, count(pair, work.first[active + 1]), block,
                     sums + column - columns.begin, width, prefetcher);
        }
      }
    }
    write_sums<Weight>(call, sums, columns, width);
  }

  static void leave() {}

 private:
  // Elements from one packed row to the next.
  static int64_t stride(int64_t size) { return round_up(size, kBlockColumns); }

  static Input* input_of(const Work& work, int64_t row) {
    return reinterpret_cast<Input*>(work.inputs) + row * stride(work.input_size);
  }
  static Input* activated_of(const Work& work, int64_t pair) {
    return reinterpret_cast<Input*>(work.activated) + pair * stride(work.call->intermediate);
  }

  MOE_ROUTING_INLINE Columns at_most(int64_t begin, int64_t end) {
    return {begin, begin + kBlockColumns < end ? begin + kBlockColumns : end};
  }

  MOE_ROUTING_INLINE int count(int32_t pair, int32_t end) {
    return end - pair < kTokens ? end - pair : kTokens;
  }

  static void gate_up_block(const Work& work, int64_t expert, int32_t pair, int tokens,
                            Columns columns, Prefetcher& prefetcher) {
    const ExpertsCall& call = *work.call;
    const Input* inputs[kTokens];
    for (int t = 0; t < tokens; ++t) inputs[t] = input_of(work, work.rows[pair + t]);
    const Weight* const weights = matrix<Weight>(call.w13, expert);
    const GateUp at = GateUp::at(call, columns.begin);
    const int64_t step = at.step * call.w13.row_stride;
    const int rows = static_cast<int>(columns.end - columns.begin);
    Tile gate, up;
    multiply(weights + at.gate * call.w13.row_stride, step, rows, inputs, tokens, call.hidden, gate,
             prefetcher);
    multiply(weights + at.up * call.w13.row_stride, step, rows, inputs, tokens, call.hidden, up,
             prefetcher);
    float gate_bias[kBlockColumns], up_bias[kBlockColumns];
    for (int r = 0; r < rows; ++r) {
      gate_bias[r] = bias_at(call.bias13, expert, at.gate + r * at.step);
      up_bias[r] = bias_at(call.bias13, expert, at.up + r * at.step);
    }
    for (int t = 0; t < tokens; ++t) {
      for (int r = rows; r < kBlockColumns; ++r) gate[t][r] = up[t][r] = 0.0f;
      for (int r = 0; r < rows; ++r) {
        gate[t][r] += gate_bias[r];
        up[t][r] += up_bias[r];
      }
      activate_row(call, gate[t], up[t]);
      Dot::put_block(activated_of(work, pair + t), columns.begin, gate[t]);
    }
  }

  static void activate_row(const ExpertsCall& call, float* gate, const float* up) {
    switch (call.activation) {
      case Activation::silu:
        return activate_row<Activation::silu>(call, gate, up);
      case Activation::gelu_tanh:
        return activate_row<Activation::gelu_tanh>(call, gate, up);
      case Activation::clamped_swiglu:
        return activate_row<Activation::clamped_swiglu>(call, gate, up);
    }
  }

  template <Activation activation>
  MOE_ROUTING_INLINE void activate_row(const ExpertsCall& call, float* gate, const float* up) {
    for (int r = 0; r < kBlockColumns; r += kLanes) {
      store(gate + r, activate<activation>(load<Floats>(gate + r), load<Floats>(up + r), call.alpha,
                                           call.limit));
    }
  }

  static void down_block(const Work& work, int64_t expert, int32_t pair, int tokens,
                         Columns columns, float* sums, int64_t width, Prefetcher& prefetcher) {
    const ExpertsCall& call = *work.call;
    const Input* inputs[kTokens];
    for (int t = 0; t < tokens; ++t) inputs[t] = activated_of(work, pair + t);
    const Weight* const weights =
        matrix<Weight>(call.w2, expert) + columns.begin * call.w2.row_stride;
    const int rows = static_cast<int>(columns.end - columns.begin);
    Tile outputs;
    multiply(weights, call.w2.row_stride, rows, inputs, tokens, call.intermediate, outputs,
             prefetcher);
    float bias[kBlockColumns];
    for (int r = 0; r < rows; ++r) bias[r] = bias_at(call.bias2, expert, columns.begin + r);
    for (int t = 0; t < tokens; ++t) {
      float* const sum = sums + work.rows[pair + t] * width;
      const float weight = work.weights[pair + t];
      for (int r = 0; r < rows; ++r) sum[r] += weight * (outputs[t][r] + bias[r]);
    }
  }

  // out[t][r] = dot product of weight row r and the input of token t.
  static void multiply(const Weight* weights, int64_t row_stride, int rows,
                       const Input* const* inputs, int tokens, int64_t size, Tile& out,
                       Prefetcher& prefetcher) {
    int r = 0;
    for (; r + kStepRows <= rows; r += kStepRows) {
      multiply_rows<kStepRows>(weights + r * row_stride, row_stride, inputs, tokens, size, out, r,
                               prefetcher);
    }
    for (; r < rows; ++r) {
      multiply_rows<1>(weights + r * row_stride, row_stride, inputs, tokens, size, out, r,
                       prefetcher);
    }
  }

  template <int rows>
  static void multiply_rows(const Weight* weights, int64_t row_stride, const Input* const* inputs,
                            int tokens, int64_t size, Tile& out, int r, Prefetcher& prefetcher) {
    const int64_t whole = size / Dot::kChunk * Dot::kChunk;
    Weight rest[rows][Dot::kChunk] = {};  // the last chunk, padded with zeros as the inputs are
    for (int i = 0; i < rows; ++i) {
      __builtin_memcpy(rest[i], weights + i * row_stride + whole, (size - whole) * sizeof(Weight));
    }
    const auto step = [&](auto tokens_of_step, int t) __attribute__((always_inline)) {
      constexpr int kCount = tokens_of_step;
      multiply_step<rows, kCount>(weights, row_stride, rest, inputs + t, whole, size, out + t, r,
                                  prefetcher);
    };
    int t = 0;
    for (; t + kStepTokens <= tokens; t += kStepTokens) step(Constant<kStepTokens>{}, t);
    switch (tokens - t) {
      case 3:
        return step(Constant<3>{}, t);
      case 2:
        return step(Constant<2>{}, t);
      case 1:
        return step(Constant<1>{}, t);
    }
  }

  template <int rows, int tokens>
  MOE_ROUTING_INLINE void multiply_step(const Weight* weights, int64_t row_stride,
                                        const Weight (&rest)[rows][Dot::kChunk],
                                        const Input* const* inputs, int64_t whole, int64_t size,
                                        float (*out)[kBlockColumns], int r,
                                        Prefetcher& prefetcher) {
    const Weight* at[rows];
    for (int i = 0; i < rows; ++i) at[i] = weights + i * row_stride;
    Floats sums[tokens][rows] = {};
    for (int64_t k = 0; k < whole; k += Dot::kChunk) {
      Dot::template step<rows, tokens>(sums, at, inputs, k, k);
      prefetcher.advance(rows * Dot::kChunk * sizeof(Weight));
    }
    if (whole < size) {
      for (int i = 0; i < rows; ++i) at[i] = rest[i];
      Dot::template step<rows, tokens>(sums, at, inputs, 0, whole);
    }
    for (int t = 0; t < tokens; ++t) add_up(sums[t], &out[t][r]);
  }
};

template <class Dot>
constexpr ExpertsKernel make_kernel() {
  using Experts = VectorExperts<Dot>;
  return {Experts::input_bytes, Experts::activated_bytes, Experts::num_packs,
          Experts::pack,        Experts::gate_up,         Experts::down,
          Experts::leave};
}

}  // namespace moe_routing::cpu::MOE_ROUTING_ISA

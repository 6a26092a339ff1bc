// Random calls of the CPU experts, of linear layers and of `stream_read`, held to plain loops.
//
//   experts_driver SEED COUNT [INSTRUCTION_SET]   COUNT calls of experts, as many of layers
//   experts_driver                                names of the instruction sets, one a line
//
// Every buffer ends where its last row ends: on the heap, where AddressSanitizer watches, or before
// a page without access, which stops what is not instrumented (assembly, masked stores). What a
// call has no business to read is NaN: experts that no row uses, and gaps between rows. Some calls
// run on a thread of their own, whose scratch memory is fresh and of the exact size.
//
// Prints one line for each instruction set; exits with 1 at the first wrong result.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/experts.h"
#include "cpu/instruction_set.h"

namespace {

using namespace moe_routing;
using namespace moe_routing::cpu;

// Largest errors, relative to the sum of what a row's elements were added up from. A bfloat16
// output has 8 bits, and so has the intermediate on some instruction sets.
constexpr double kFloatError = 1e-6;
constexpr double kBfloat16Error = 6e-3;

// Gate and up are sums of numbers around 1 that may cancel: no error is relative to less than this.
constexpr double kCancelled = 0.25;

[[noreturn]] void fail(const std::string& what) {
  std::fflush(stdout);
  std::fprintf(stderr, "wrong: %s\n", what.c_str());
  std::exit(1);
}

// --- random choices ------------------------------------------------------------------------------

class Dice {
 public:
  explicit Dice(uint64_t seed) : engine_(seed) {}

  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  bool chance(double p) { return std::uniform_real_distribution<double>()(engine_) < p; }
  double normal() { return std::normal_distribution<double>()(engine_); }

  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[between(0, static_cast<int64_t>(values.size()) - 1)];
  }

 private:
  std::mt19937_64 engine_;
};

// --- memory --------------------------------------------------------------------------------------

// Memory of an exact size.
class Buffer {
 public:
  Buffer() = default;
  Buffer(int64_t bytes, bool has_guard) : bytes_(bytes) {
    if (!has_guard) {
      data_ = static_cast<char*>(std::malloc(bytes));
      owner_ = std::shared_ptr<void>(data_, std::free);
      return;
    }
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t pages = (bytes + page - 1) / page * page;
    void* const start =
        mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(static_cast<char*>(start) + pages, page, PROT_NONE) != 0) {
      fail("no memory");
    }
    owner_ = std::shared_ptr<void>(start, [=](void* p) { munmap(p, pages + page); });
    data_ = static_cast<char*>(start) + pages - bytes;
  }

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
  std::shared_ptr<void> owner_;
};

uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_from(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The nearest number with 8 significant bits.
float short_float(double value) {
  if (value == 0 || !std::isfinite(value)) return static_cast<float>(value);
  int exponent = 0;
  const double fraction = std::frexp(value, &exponent);
  return static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(fraction, 8)), exponent - 8));
}

int64_t size_of(FloatType type) { return type == FloatType::float32 ? 4 : 2; }

// Elements of one type. Every value that is put must be exact in it.
class Elements {
 public:
  Elements() = default;
  Elements(FloatType type, int64_t count, bool has_guard)
      : type_(type), buffer_(count * size_of(type), has_guard) {
    if (buffer_.bytes() > 0) std::memset(buffer_.data(), 0xff, buffer_.bytes());  // NaN
  }

  void put(int64_t at, float value) {
    char* const to = buffer_.data() + at * size_of(type_);
    if (type_ == FloatType::float32) {
      std::memcpy(to, &value, sizeof value);
      return;
    }
    const uint16_t half = type_ == FloatType::bfloat16
                              ? static_cast<uint16_t>(float_bits(value) >> 16)
                              : float16_bits(value);
    std::memcpy(to, &half, sizeof half);
  }

  float get(int64_t at) const {
    const char* const from = buffer_.data() + at * size_of(type_);
    if (type_ == FloatType::float32) {
      float value;
      std::memcpy(&value, from, sizeof value);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, from, sizeof half);
    return float_from(static_cast<uint32_t>(half) << 16);  // float16 is never read back
  }

  void* data() const { return buffer_.data(); }
  FloatType type() const { return type_; }

 private:
  // Of 0 and of normal numbers with few bits.
  static uint16_t float16_bits(float value) {
    if (value == 0) return 0;
    int exponent = 0;
    const int fraction = static_cast<int>(std::ldexp(std::frexp(std::fabs(value), &exponent), 11));
    const int bits = ((exponent + 14) << 10) | (fraction & 1023);
    return static_cast<uint16_t>(bits | (value < 0 ? 0x8000 : 0));
  }

  FloatType type_ = FloatType::float32;
  Buffer buffer_;
};

// Rows that lie `stride` elements apart, NaN between them. `values` holds what was put.
struct Rows {
  Elements memory;
  int64_t columns = 0, stride = 0;
  std::vector<double> values;

  Rows() = default;
  Rows(FloatType type, int64_t rows, int64_t columns, int64_t stride, bool has_guard)
      : memory(type, rows > 0 ? (rows - 1) * stride + columns : 0, has_guard),
        columns(columns),
        stride(stride),
        values(rows * columns, 0.0) {}

  void put(int64_t row, int64_t column, double value) {
    const float exact =
        memory.type() == FloatType::float32 ? static_cast<float>(value) : short_float(value);
    memory.put(row * stride + column, exact);
    values[row * columns + column] = exact;
  }
  double at(int64_t row, int64_t column) const { return values[row * columns + column]; }

  FloatRows view() const { return {memory.data(), static_cast<int32_t>(stride), memory.type()}; }
};

// Matrices of experts; those of experts that no row uses stay NaN.
struct Matrices {
  Elements memory;
  int64_t rows = 0, columns = 0, row_stride = 0, expert_stride = 0;
  std::vector<double> values;

  Matrices() = default;
  Matrices(FloatType type, int64_t experts, int64_t rows, int64_t columns, int64_t row_gap,
           int64_t expert_gap, bool has_guard)
      : rows(rows),
        columns(columns),
        row_stride(columns + row_gap),
        expert_stride(rows * row_stride + expert_gap),
        values(experts * rows * columns, std::nan("")) {
    memory = Elements(type, (experts - 1) * expert_stride + (rows - 1) * row_stride + columns,
                      has_guard);
  }

  void fill(int64_t expert, double scale, Dice& dice) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        const float value = short_float(scale * dice.normal());
        memory.put(expert * expert_stride + row * row_stride + column, value);
        values[(expert * rows + row) * columns + column] = value;
      }
    }
  }
  const double* row(int64_t expert, int64_t row) const {
    return values.data() + (expert * rows + row) * columns;
  }

  ExpertMatrices view() const { return {memory.data(), expert_stride, row_stride}; }
};

// Ids of either width; the gaps between rows hold no expert's id.
struct Ids {
  Buffer memory;
  int64_t columns = 0, stride = 0;
  bool is_wide = false;
  std::vector<int64_t> values;

  Ids() = default;
  Ids(bool is_wide, int64_t rows, int64_t columns, int64_t stride, bool has_guard)
      : memory((rows > 0 ? (rows - 1) * stride + columns : 0) * (is_wide ? 8 : 4), has_guard),
        columns(columns),
        stride(stride),
        is_wide(is_wide),
        values(rows * columns, -1) {
    if (memory.bytes() > 0) std::memset(memory.data(), 0x55, memory.bytes());
  }

  void put(int64_t row, int64_t column, int64_t id) {
    values[row * columns + column] = id;
    const int64_t at = row * stride + column;
    const int32_t narrow = static_cast<int32_t>(id);
    if (is_wide) {
      std::memcpy(memory.data() + 8 * at, &id, sizeof id);
    } else {
      std::memcpy(memory.data() + 4 * at, &narrow, sizeof narrow);
    }
  }
  int64_t at(int64_t row, int64_t column) const { return values[row * columns + column]; }

  IdRows view() const { return {memory.data(), static_cast<int32_t>(stride), is_wide}; }
};

// Run on a thread of its own, whose scratch memory is fresh, or on this one.
void run_on(bool has_own_thread, const std::function<void()>& run) {
  if (!has_own_thread) return run();
  std::exception_ptr error;
  std::thread([&] {
    try {
      run();
    } catch (...) {
      error = std::current_exception();
    }
  }).join();
  if (error) std::rethrow_exception(error);
}

// --- experts -------------------------------------------------------------------------------------

struct Problem {
  int num_rows, num_experts, top_k;
  int64_t hidden, intermediate;
  bool is_bfloat16;
  Rows hidden_states, topk_weights, bias13, bias2;
  Ids topk_ids;
  Matrices w13, w2;
  bool has_bias13, has_bias2, is_interleaved;
  Activation activation;
  float alpha, limit;
  int num_threads;
  bool has_guard, has_own_thread;

  FloatType type() const { return is_bfloat16 ? FloatType::bfloat16 : FloatType::float32; }

  std::string describe() const {
    std::ostringstream text;
    text << num_rows << " rows, " << num_experts << " experts, top " << top_k << ", " << hidden
         << " x " << intermediate << (is_bfloat16 ? ", bfloat16" : ", float32") << ", activation "
         << static_cast<int>(activation) << (is_interleaved ? ", interleaved" : "")
         << (has_bias13 ? ", bias13" : "") << (has_bias2 ? ", bias2" : "")
         << (topk_ids.is_wide ? ", int64 ids" : "") << ", " << num_threads << " threads, strides "
         << hidden_states.stride << " " << w13.row_stride << " " << w13.expert_stride << " "
         << w2.row_stride << " " << w2.expert_stride << (has_guard ? ", guarded" : "")
         << (has_own_thread ? ", own thread" : "");
    return text.str();
  }

  ExpertsCall call() const {
    ExpertsCall call;
    call.num_rows = num_rows;
    call.num_experts = num_experts;
    call.top_k = top_k;
    call.hidden = hidden;
    call.intermediate = intermediate;
    call.is_bfloat16 = is_bfloat16;
    call.hidden_states = hidden_states.memory.data();
    call.hidden_stride = hidden_states.stride;
    call.topk_weights = topk_weights.view();
    call.topk_ids = topk_ids.view();
    call.w13 = w13.view();
    call.w2 = w2.view();
    if (has_bias13) call.bias13 = bias13.view();
    if (has_bias2) call.bias2 = bias2.view();
    call.is_interleaved = is_interleaved;
    call.activation = activation;
    call.alpha = alpha;
    call.limit = limit;
    call.num_threads = num_threads;
    return call;
  }
};

struct Sizes {
  int64_t rows, experts, top_k, hidden, intermediate;
};

// Mostly small with tails of every kind, so that the sanitizers get through many calls; some large
// enough for several tasks of each step.
Sizes random_sizes(Dice& dice) {
  if (dice.chance(0.04)) {
    return {dice.between(1, 6), dice.between(1, 3), dice.between(1, 2),
            dice.one_of<int64_t>({2081, 4133}), dice.one_of<int64_t>({16, 33})};
  }
  if (dice.chance(0.06)) {
    return {dice.between(1, 8), dice.between(1, 4), dice.between(1, 3),
            dice.one_of<int64_t>({521, 1030}), dice.one_of<int64_t>({130, 290})};
  }
  if (dice.chance(0.04)) {  // inputs that threads pack together
    return {dice.between(60, 70), dice.between(2, 4), dice.between(1, 2),
            dice.one_of<int64_t>({521, 1030}), 33};
  }
  const auto size = [&] {
    return dice.one_of<int64_t>({1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 64, 100, 130});
  };
  const int64_t rows = dice.chance(0.4) ? dice.between(0, 5) : dice.between(0, 70);
  return {rows, dice.between(1, 12), dice.between(1, 8), size(), size()};
}

int64_t random_gap(Dice& dice) { return dice.chance(0.5) ? 0 : dice.between(1, 40); }

void fill_slots(Problem& problem, Dice& dice) {
  const int popular = static_cast<int>(dice.between(0, problem.num_experts - 1));
  const double skew = dice.one_of<double>({0.0, 0.0, 0.6});
  for (int row = 0; row < problem.num_rows; ++row) {
    const bool is_empty = dice.chance(0.05);
    for (int k = 0; k < problem.top_k; ++k) {
      int64_t id = dice.chance(skew) ? popular : dice.between(0, problem.num_experts - 1);
      if (k > 0 && dice.chance(0.1)) id = problem.topk_ids.at(row, k - 1);
      if (is_empty || dice.chance(0.1)) id = -1;
      problem.topk_ids.put(row, k, id);
      // Sixteenths are exact in every type, and so are their sums.
      double weight = static_cast<double>(dice.between(1, 20)) / 16;
      if (dice.chance(0.1)) weight = -weight;
      if (dice.chance(0.1)) weight = 0;
      problem.topk_weights.put(row, k, weight);
    }
  }
}

std::vector<bool> used_experts(const Problem& problem) {
  std::vector<bool> is_used(problem.num_experts);
  for (int row = 0; row < problem.num_rows; ++row) {
    for (int k = 0; k < problem.top_k; ++k) {
      const int64_t id = problem.topk_ids.at(row, k);
      if (id >= 0 && problem.topk_weights.at(row, k) != 0) is_used[id] = true;
    }
  }
  return is_used;
}

Rows random_bias(const Problem& problem, int64_t columns, Dice& dice) {
  Rows bias(dice.one_of({FloatType::float32, FloatType::bfloat16}), problem.num_experts, columns,
            columns + random_gap(dice), problem.has_guard);
  const std::vector<bool> is_used = used_experts(problem);
  for (int expert = 0; expert < problem.num_experts; ++expert) {
    for (int64_t column = 0; column < columns; ++column) {
      bias.put(expert, column, is_used[expert] ? dice.normal() : std::nan(""));
    }
  }
  return bias;
}

Problem random_problem(Dice& dice) {
  Problem problem;
  const Sizes sizes = random_sizes(dice);
  problem.num_rows = static_cast<int>(sizes.rows);
  problem.num_experts = static_cast<int>(sizes.experts);
  problem.top_k = static_cast<int>(sizes.top_k);
  problem.hidden = sizes.hidden;
  problem.intermediate = sizes.intermediate;
  problem.is_bfloat16 = dice.chance(0.6);
  problem.is_interleaved = dice.chance(0.5);
  problem.activation =
      dice.one_of({Activation::silu, Activation::gelu_tanh, Activation::clamped_swiglu});
  problem.alpha = dice.one_of({1.0f, 1.702f});
  problem.limit = dice.one_of({0.75f, 7.0f});
  problem.num_threads = static_cast<int>(dice.between(1, 3));
  problem.has_guard = dice.chance(0.5);
  problem.has_own_thread = dice.chance(0.5);
  const bool has_guard = problem.has_guard;

  problem.hidden_states =
      Rows(problem.type(), sizes.rows, sizes.hidden, sizes.hidden + random_gap(dice), has_guard);
  for (int64_t row = 0; row < sizes.rows; ++row) {
    for (int64_t k = 0; k < sizes.hidden; ++k) problem.hidden_states.put(row, k, dice.normal());
  }
  problem.topk_weights =
      Rows(dice.one_of({FloatType::float32, FloatType::bfloat16, FloatType::float16}), sizes.rows,
           sizes.top_k, sizes.top_k + dice.one_of({0, 3}), has_guard);
  problem.topk_ids =
      Ids(dice.chance(0.5), sizes.rows, sizes.top_k, sizes.top_k + dice.one_of({0, 2}), has_guard);
  fill_slots(problem, dice);

  problem.w13 = Matrices(problem.type(), sizes.experts, 2 * sizes.intermediate, sizes.hidden,
                         random_gap(dice), random_gap(dice), has_guard);
  problem.w2 = Matrices(problem.type(), sizes.experts, sizes.hidden, sizes.intermediate,
                        random_gap(dice), random_gap(dice), has_guard);
  const std::vector<bool> is_used = used_experts(problem);
  for (int expert = 0; expert < problem.num_experts; ++expert) {
    if (!is_used[expert]) continue;
    problem.w13.fill(expert, 1 / std::sqrt(sizes.hidden), dice);
    problem.w2.fill(expert, 1 / std::sqrt(sizes.intermediate), dice);
  }
  problem.has_bias13 = dice.chance(0.5);
  problem.has_bias2 = dice.chance(0.5);
  if (problem.has_bias13) problem.bias13 = random_bias(problem, 2 * sizes.intermediate, dice);
  if (problem.has_bias2) problem.bias2 = random_bias(problem, sizes.hidden, dice);
  return problem;
}

// Results of plain loops, and the magnitude of each row: what its elements were added up from.
struct Expected {
  std::vector<double> values, magnitudes;
};

double naive_sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

double naive_activation(const Problem& problem, double gate, double up) {
  switch (problem.activation) {
    case Activation::silu:
      return gate * naive_sigmoid(gate) * up;
    case Activation::gelu_tanh: {
      const double inner = std::sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate);
      return 0.5 * gate * (1 + std::tanh(inner)) * up;
    }
    case Activation::clamped_swiglu: {
      const double limit = problem.limit;
      if (gate > limit) gate = limit;
      if (up > limit) up = limit;
      if (up < -limit) up = -limit;
      return gate * naive_sigmoid(problem.alpha * gate) * (up + 1);
    }
  }
  return std::nan("");
}

// The intermediate of a row in one expert, and the magnitudes that its errors are relative to.
struct Intermediate {
  std::vector<double> values, magnitudes;
};

Intermediate naive_intermediate(const Problem& problem, int row, int64_t expert) {
  const int64_t size = problem.intermediate;
  std::vector<double> sums(2 * size);
  for (int64_t column = 0; column < 2 * size; ++column) {
    const double* const weights = problem.w13.row(expert, column);
    double sum = problem.has_bias13 ? problem.bias13.at(expert, column) : 0;
    for (int64_t k = 0; k < problem.hidden; ++k) {
      sum += weights[k] * problem.hidden_states.at(row, k);
    }
    sums[column] = sum;
  }
  Intermediate found;
  for (int64_t i = 0; i < size; ++i) {
    const double gate = problem.is_interleaved ? sums[2 * i] : sums[i];
    const double up = problem.is_interleaved ? sums[2 * i + 1] : sums[size + i];
    const double added = problem.activation == Activation::clamped_swiglu ? 1 : 0;
    found.values.push_back(naive_activation(problem, gate, up));
    found.magnitudes.push_back((std::fabs(gate) + kCancelled) *
                               (std::fabs(up) + added + kCancelled));
  }
  return found;
}

void add_naive_row(const Problem& problem, int row, Expected& expected) {
  double* const out = expected.values.data() + row * problem.hidden;
  std::vector<double> magnitudes(problem.hidden);
  for (int64_t expert = 0; expert < problem.num_experts; ++expert) {
    double weight = 0;
    bool is_used = false;
    for (int k = 0; k < problem.top_k; ++k) {
      if (problem.topk_ids.at(row, k) != expert || problem.topk_weights.at(row, k) == 0) continue;
      weight += problem.topk_weights.at(row, k);
      is_used = true;
    }
    if (!is_used) continue;
    const Intermediate activated = naive_intermediate(problem, row, expert);
    for (int64_t column = 0; column < problem.hidden; ++column) {
      const double* const weights = problem.w2.row(expert, column);
      const double bias = problem.has_bias2 ? problem.bias2.at(expert, column) : 0;
      double sum = bias, magnitude = std::fabs(bias);
      for (int64_t i = 0; i < problem.intermediate; ++i) {
        sum += weights[i] * activated.values[i];
        magnitude += std::fabs(weights[i]) * activated.magnitudes[i];
      }
      out[column] += weight * sum;
      magnitudes[column] += std::fabs(weight) * magnitude;
    }
  }
  for (const double magnitude : magnitudes) {
    expected.magnitudes[row] = std::max(expected.magnitudes[row], magnitude);
  }
}

Expected naive_experts(const Problem& problem) {
  Expected expected{std::vector<double>(problem.num_rows * problem.hidden),
                    std::vector<double>(problem.num_rows)};
  for (int row = 0; row < problem.num_rows; ++row) add_naive_row(problem, row, expected);
  return expected;
}

// --- checks --------------------------------------------------------------------------------------

struct Score {
  int64_t num_calls = 0;
  double float32 = 0, bfloat16 = 0;

  double& of(FloatType type) { return type == FloatType::bfloat16 ? bfloat16 : float32; }
};

// Output rows, packed.
using Output = Elements;

bool same_row(const Output& a, int64_t row_a, const Output& b, int64_t row_b, int64_t columns) {
  const int64_t bytes = columns * size_of(a.type());
  return std::memcmp(static_cast<const char*>(a.data()) + row_a * bytes,
                     static_cast<const char*>(b.data()) + row_b * bytes, bytes) == 0;
}

void check_close(const Output& got, const Expected& expected, int64_t rows, int64_t columns,
                 const std::string& what, Score& score) {
  const double limit = got.type() == FloatType::bfloat16 ? kBfloat16Error : kFloatError;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const double value = got.get(row * columns + column);
      const double wanted = expected.values[row * columns + column];
      double error = std::fabs(value - wanted);
      if (error > 0) error /= expected.magnitudes[row];
      if (!(error <= limit)) {
        std::ostringstream text;
        text << "out[" << row << ", " << column << "] = " << value << ", expected " << wanted
             << ", relative error " << error << ": " << what;
        fail(text.str());
      }
      score.of(got.type()) = std::max(score.of(got.type()), error);
    }
  }
}

Output run_problem(const Problem& problem) {
  Output out(problem.type(), problem.num_rows * problem.hidden, problem.has_guard);
  ExpertsCall call = problem.call();
  call.out = out.data();
  run_on(problem.has_own_thread, [&] { run_experts(call); });
  return out;
}

// One row of a problem, in buffers of its own, for one thread.
Problem alone(const Problem& problem, int row) {
  Problem one = problem;
  one.num_rows = 1;
  one.num_threads = 1;
  one.hidden_states = Rows(problem.type(), 1, problem.hidden, problem.hidden, problem.has_guard);
  for (int64_t k = 0; k < problem.hidden; ++k) {
    one.hidden_states.put(0, k, problem.hidden_states.at(row, k));
  }
  one.topk_weights = Rows(FloatType::float32, 1, problem.top_k, problem.top_k, problem.has_guard);
  one.topk_ids = Ids(true, 1, problem.top_k, problem.top_k, problem.has_guard);
  for (int k = 0; k < problem.top_k; ++k) {
    one.topk_weights.put(0, k, problem.topk_weights.at(row, k));
    one.topk_ids.put(0, k, problem.topk_ids.at(row, k));
  }
  return one;
}

void check_alone(const Problem& problem, const Output& out, const std::vector<int>& rows) {
  for (const int row : rows) {
    if (!same_row(run_problem(alone(problem, row)), 0, out, row, problem.hidden)) {
      fail("row " + std::to_string(row) + " differs from that row alone: " + problem.describe());
    }
  }
}

// A row with one hidden state that is not finite, and what becomes of that row.
struct Poison {
  int row;
  Problem problem;
  Expected expected;  // of that row alone
};

Poison random_poison(const Problem& problem, Dice& dice) {
  Poison poison{static_cast<int>(dice.between(0, problem.num_rows - 1)), problem, {}};
  const double infinity = std::numeric_limits<double>::infinity();
  const int64_t column =
      dice.chance(0.5) ? problem.hidden - 1 : dice.between(0, problem.hidden - 1);
  Rows& states = poison.problem.hidden_states;
  states = Rows(problem.type(), problem.num_rows, problem.hidden, states.stride, problem.has_guard);
  for (int row = 0; row < problem.num_rows; ++row) {
    for (int64_t k = 0; k < problem.hidden; ++k) {
      states.put(row, k, problem.hidden_states.at(row, k));
    }
  }
  states.put(poison.row, column, dice.one_of({std::nan(""), infinity, -infinity}));
  poison.expected = naive_experts(alone(poison.problem, poison.row));
  return poison;
}

void check_poison(const Poison& poison, const Output& out) {
  const Problem& problem = poison.problem;
  const Output got = run_problem(problem);
  for (int row = 0; row < problem.num_rows; ++row) {
    if (row != poison.row && !same_row(got, row, out, row, problem.hidden)) {
      fail("row " + std::to_string(row) + " depends on row " + std::to_string(poison.row) +
           ", which is not finite: " + problem.describe());
    }
  }
  for (int64_t column = 0; column < problem.hidden; ++column) {
    const bool is_finite = std::isfinite(got.get(poison.row * problem.hidden + column));
    if (is_finite && !std::isfinite(poison.expected.values[column])) {
      fail("out[" + std::to_string(poison.row) + ", " + std::to_string(column) +
           "] is finite: " + problem.describe());
    }
  }
}

// An id that is no expert's, where it stands.
struct Refusal {
  int row, slot;
  int64_t id;
};

Refusal random_refusal(const Problem& problem, Dice& dice) {
  Refusal refusal{static_cast<int>(dice.between(0, problem.num_rows - 1)),
                  static_cast<int>(dice.between(0, problem.top_k - 1)), problem.num_experts};
  if (dice.chance(0.5)) {
    refusal.id = problem.topk_ids.is_wide
                     ? dice.one_of({int64_t{1} << 32, -(int64_t{1} << 40), INT64_MIN, INT64_MAX})
                     : dice.one_of<int64_t>({INT32_MIN, INT32_MAX});
  } else if (dice.chance(0.5)) {
    refusal.id = -2;
  }
  return refusal;
}

void check_refusal(Problem problem, const Refusal& refusal) {
  const Ids& ids = problem.topk_ids;
  Ids changed(ids.is_wide, problem.num_rows, problem.top_k, ids.stride, problem.has_guard);
  for (int row = 0; row < problem.num_rows; ++row) {
    for (int k = 0; k < problem.top_k; ++k) changed.put(row, k, ids.at(row, k));
  }
  changed.put(refusal.row, refusal.slot, refusal.id);
  problem.topk_ids = changed;
  std::ostringstream text;
  text << "topk_ids[" << refusal.row << ", " << refusal.slot << "] = " << refusal.id << ":";
  const std::string place = text.str();
  try {
    run_problem(problem);
  } catch (const std::out_of_range& error) {
    if (std::string(error.what()).find(place) != std::string::npos) return;
    fail("expected " + place + " in: " + error.what());
  }
  fail(place + " accepted: " + problem.describe());
}

// --- linear layers -------------------------------------------------------------------------------

struct Layer {
  int num_rows;
  Rows input;
  Matrices weight;
  int num_threads;
  bool has_guard, has_own_thread;

  std::string describe() const {
    std::ostringstream text;
    text << "linear, " << num_rows << " rows, " << input.columns << " to " << weight.rows
         << (input.memory.type() == FloatType::bfloat16 ? ", bfloat16, " : ", float32, ")
         << num_threads << " threads, strides " << input.stride << " " << weight.row_stride
         << (has_guard ? ", guarded" : "") << (has_own_thread ? ", own thread" : "");
    return text.str();
  }
};

// A large one takes more scratch memory than a thread keeps.
Layer random_layer(Dice& dice, bool is_large) {
  Layer layer;
  layer.num_rows = is_large ? 4200 : static_cast<int>(dice.between(0, 70));
  layer.num_threads = static_cast<int>(dice.between(1, 3));
  layer.has_guard = dice.chance(0.5);
  layer.has_own_thread = !is_large && dice.chance(0.5);
  const FloatType type =
      is_large ? FloatType::float32 : dice.one_of({FloatType::float32, FloatType::bfloat16});
  const auto size = [&] {
    return dice.chance(0.1) ? dice.between(400, 900)
                            : dice.one_of<int64_t>({1, 2, 7, 15, 16, 17, 31, 33, 48, 100, 130});
  };
  const int64_t columns = is_large ? 2048 : size(), out_columns = is_large ? 3 : size();
  layer.input = Rows(type, layer.num_rows, columns, columns + random_gap(dice), layer.has_guard);
  for (int row = 0; row < layer.num_rows; ++row) {
    for (int64_t k = 0; k < columns; ++k) layer.input.put(row, k, dice.normal());
  }
  layer.weight = Matrices(type, 1, out_columns, columns, random_gap(dice), 0, layer.has_guard);
  layer.weight.fill(0, 1 / std::sqrt(columns), dice);
  return layer;
}

Expected naive_layer(const Layer& layer) {
  Expected expected{{}, std::vector<double>(layer.num_rows)};
  for (int row = 0; row < layer.num_rows; ++row) {
    for (int64_t column = 0; column < layer.weight.rows; ++column) {
      const double* const weights = layer.weight.row(0, column);
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < layer.input.columns; ++k) {
        sum += weights[k] * layer.input.at(row, k);
        magnitude += std::fabs(weights[k] * layer.input.at(row, k));
      }
      expected.values.push_back(sum);
      expected.magnitudes[row] = std::max(expected.magnitudes[row], magnitude);
    }
  }
  return expected;
}

Output run_layer(const Layer& layer) {
  const FloatType type = layer.input.memory.type();
  Output out(type, layer.num_rows * layer.weight.rows, layer.has_guard);
  LinearCall call;
  call.num_rows = layer.num_rows;
  call.in_features = layer.input.columns;
  call.out_features = layer.weight.rows;
  call.is_bfloat16 = type == FloatType::bfloat16;
  call.input = layer.input.memory.data();
  call.input_stride = layer.input.stride;
  call.weight = layer.weight.memory.data();
  call.weight_stride = layer.weight.row_stride;
  call.out = out.data();
  call.num_threads = layer.num_threads;
  run_on(layer.has_own_thread, [&] { run_linear(call); });
  return out;
}

// One row of a layer, or all rows with one element replaced by NaN.
Layer changed(const Layer& layer, std::optional<int> only, std::optional<int> poisoned) {
  Layer copy = layer;
  const int first = only.value_or(0);
  copy.num_rows = only ? 1 : layer.num_rows;
  copy.num_threads = only ? 1 : layer.num_threads;
  copy.input = Rows(layer.input.memory.type(), copy.num_rows, layer.input.columns,
                    layer.input.stride, layer.has_guard);
  for (int row = 0; row < copy.num_rows; ++row) {
    for (int64_t k = 0; k < layer.input.columns; ++k) {
      copy.input.put(row, k, layer.input.at(first + row, k));
    }
  }
  if (poisoned) copy.input.put(*poisoned, layer.input.columns - 1, std::nan(""));
  return copy;
}

void check_layer(const Layer& layer, const Expected& expected, const std::vector<int>& rows,
                 Score& score) {
  const int64_t columns = layer.weight.rows;
  const Output out = run_layer(layer);
  check_close(out, expected, layer.num_rows, columns, layer.describe(), score);
  for (const int row : rows) {
    if (!same_row(run_layer(changed(layer, row, {})), 0, out, row, columns)) {
      fail("row " + std::to_string(row) + " differs from that row alone: " + layer.describe());
    }
  }
  if (rows.empty()) return;
  const Output poisoned = run_layer(changed(layer, {}, rows[0]));
  for (int row = 0; row < layer.num_rows; ++row) {
    if (row != rows[0] && !same_row(poisoned, row, out, row, columns)) {
      fail("row " + std::to_string(row) + " depends on a row that is NaN: " + layer.describe());
    }
  }
  for (int64_t column = 0; column < columns; ++column) {
    if (!std::isnan(poisoned.get(rows[0] * columns + column))) {
      fail("NaN is lost: " + layer.describe());
    }
  }
}

// --- reading memory ------------------------------------------------------------------------------

// Every bit counts: one that changes in memory changes one of the checksum.
void check_stream_read(Dice& dice) {
  const int64_t big = int64_t{1} << 20;
  const int64_t bytes =
      dice.one_of<int64_t>({0, 1, 7, 64, 1000, big - 1, big, big + 13, 2 * big + 65});
  const Buffer memory(bytes, dice.chance(0.5) && bytes % 8 == 0);
  for (int64_t at = 0; at < bytes; ++at) {
    memory.data()[at] = static_cast<char>(dice.between(0, 255));
  }
  const uint64_t sum = stream_read(memory.data(), bytes, 1);
  const std::string what = "stream_read of " + std::to_string(bytes) + " bytes: ";
  for (int threads = 2; threads <= 3; ++threads) {
    if (stream_read(memory.data(), bytes, threads) != sum) fail(what + "threads change the sum");
  }
  if (bytes == 0) return;
  for (const int64_t at : {int64_t{0}, bytes - 1, dice.between(0, bytes - 1)}) {
    const int bit = 1 << dice.between(0, 7);
    memory.data()[at] ^= bit;
    const uint64_t now = stream_read(memory.data(), bytes, 2);
    memory.data()[at] ^= bit;
    if (__builtin_popcountll(now ^ sum) != 1) {
      fail(what + "byte " + std::to_string(at) + " is not read once");
    }
  }
}

// --- all of it -----------------------------------------------------------------------------------

std::vector<int> some_rows(int num_rows, Dice& dice) {
  std::vector<int> rows;
  for (int i = 0; i < 3 && num_rows > 0; ++i) {
    rows.push_back(static_cast<int>(dice.between(0, num_rows - 1)));
  }
  return rows;
}

class Run {
 public:
  explicit Run(const std::vector<std::string>& sets) : sets_(sets), scores_(sets.size()) {}

  void experts(Dice& dice) {
    const Problem problem = random_problem(dice);
    const Expected expected = naive_experts(problem);
    const std::vector<int> rows = some_rows(problem.num_rows, dice);
    std::optional<Poison> poison;
    std::optional<Refusal> refusal;
    if (problem.num_rows > 0 && dice.chance(0.3)) poison = random_poison(problem, dice);
    if (problem.num_rows > 0 && dice.chance(0.2)) refusal = random_refusal(problem, dice);
    for_each_set([&](const std::string& set, Score& score) {
      const Output out = run_problem(problem);
      check_close(out, expected, problem.num_rows, problem.hidden, set + ", " + problem.describe(),
                  score);
      check_alone(problem, out, rows);
      if (poison) check_poison(*poison, out);
      if (refusal) check_refusal(problem, *refusal);
    });
  }

  void layer(Dice& dice, bool is_large) {
    const Layer layer = random_layer(dice, is_large);
    const Expected expected = naive_layer(layer);
    const std::vector<int> rows = some_rows(is_large ? 0 : layer.num_rows, dice);
    for_each_set(
        [&](const std::string&, Score& score) { check_layer(layer, expected, rows, score); });
  }

  void print() const {
    for (size_t i = 0; i < sets_.size(); ++i) {
      std::printf("%s: %lld calls, worst error %.2g of float32, %.2g of bfloat16\n",
                  sets_[i].c_str(), static_cast<long long>(scores_[i].num_calls),
                  scores_[i].float32, scores_[i].bfloat16);
    }
  }

 private:
  void for_each_set(const std::function<void(const std::string&, Score&)>& run) {
    for (size_t i = 0; i < sets_.size(); ++i) {
      if (!use_instruction_set(sets_[i])) fail("no instruction set " + sets_[i]);
      run(sets_[i], scores_[i]);
      ++scores_[i].num_calls;
    }
  }

  std::vector<std::string> sets_;
  std::vector<Score> scores_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 1) {
    for (const std::string& name : instruction_sets()) std::printf("%s\n", name.c_str());
    return 0;
  }
  if (argc < 3 || argc > 4) {
    std::fprintf(stderr, "usage: %s [SEED COUNT [INSTRUCTION_SET]]\n", argv[0]);
    return 2;
  }
  const uint64_t seed = std::strtoull(argv[1], nullptr, 10);
  const int count = std::atoi(argv[2]);
  Run run(argc == 4 ? std::vector<std::string>{argv[3]} : instruction_sets());
  for (int i = 0; i < count; ++i) {
    Dice dice(seed * 1000003 + i);  // a call can be repeated without those before it
    run.experts(dice);
    run.layer(dice, i == count - 1);
    if (i % 20 == 0) check_stream_read(dice);
  }
  run.print();
  return 0;
}

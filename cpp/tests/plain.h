// What the randomised tests share: random numbers, arrays of exactly the documented size, packed weights that own their
// arrays, and the products themselves as plain loops in double precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "secateur_sparse.h"

namespace plain {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t between(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(engine_); }
  bool chance(double part) { return std::uniform_real_distribution<double>(0, 1)(engine_) < part; }
  float number() { return std::normal_distribution<float>(0, 1)(engine_); }
  template <class T>
  T of(std::initializer_list<T> choices) {
    return *(choices.begin() + between(0, static_cast<int64_t>(choices.size()) - 1));
  }

 private:
  std::mt19937_64 engine_;
};

// Floats that end where the allocation ends, so that the address sanitizer sees a read behind the last one, and that
// begin at any multiple of four bytes, so that nothing relies on more.
class Floats {
 public:
  Floats(Random& random, int64_t size) : skip_(random.between(0, 3)), store_(static_cast<size_t>(skip_ + size)) {}
  static Floats numbers(Random& random, int64_t size) {
    Floats out(random, size);
    for (int64_t i = 0; i < size; ++i) out[i] = random.number();
    return out;
  }
  float* data() { return store_.data() + skip_; }
  const float* data() const { return store_.data() + skip_; }
  int64_t size() const { return static_cast<int64_t>(store_.size()) - skip_; }
  float& operator[](int64_t i) { return store_[static_cast<size_t>(skip_ + i)]; }
  float operator[](int64_t i) const { return store_[static_cast<size_t>(skip_ + i)]; }

 private:
  int64_t skip_;
  std::vector<float> store_;
};

inline int64_t current_case = 0;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED in case %lld: %s\n", static_cast<long long>(current_case), what.c_str());
  std::fflush(stderr);
  std::_Exit(1);
}

inline void expect(bool holds, const std::string& what) {
  if (!holds) fail(what);
}

inline void expect_status(int32_t status, int32_t wanted, const std::string& what) {
  if (status != wanted)
    fail(what + ": got '" + secateur_error(status) + "', expected '" + secateur_error(wanted) + "'");
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Dense weights with one of several kinds of zeros.
inline std::vector<float> weights(Random& random, int64_t rows, int64_t columns) {
  std::vector<float> w(static_cast<size_t>(rows * columns));
  const int64_t kind = random.between(0, 6);
  const double density = kind == 0 ? 0.0 : kind == 1 ? 1.0 : random.of({0.5, 0.3, 0.2, 0.1, 0.05, 0.01});
  const int64_t first = random.between(0, columns), last = random.between(first, columns);
  for (int64_t r = 0; r < rows; ++r) {
    const bool row = kind != 2 || random.chance(0.5);  // some rows are empty
    for (int64_t c = 0; c < columns; ++c) {
      const bool column = kind != 3 || (c >= first && c < last);  // some panels are
      const bool lone = kind != 4 || c == (r * 7) % columns;      // one weight in each row
      if (row && column && lone && (kind == 4 || random.chance(density)))
        w[static_cast<size_t>(r * columns + c)] = random.number();
    }
  }
  return w;
}

struct Panelled {
  secateur_panelled header{};
  std::vector<float> values;
  std::vector<unsigned char> indices;
  std::vector<int32_t> order, runs;
  std::vector<int64_t> starts;

  Panelled(const std::vector<float>& w, int64_t rows, int64_t columns, int32_t block_rows, int32_t block_columns,
           int32_t panel, int32_t parts) {
    secateur_panelled& h = header;
    h.rows = rows, h.columns = columns, h.block_rows = block_rows, h.block_columns = block_columns;
    h.panel = panel, h.parts = parts, h.index_bytes = panel / block_columns <= 256 ? 1 : 2;
    expect_status(secateur_panelled_sizes(w.data(), rows, columns, block_rows, block_columns, panel, parts, &h.blocks,
                                          &h.run_count),
                  SECATEUR_OK, "panelled_sizes");
    const int64_t panels = divide_up(columns, panel);
    values.resize(static_cast<size_t>(h.blocks * block_rows * block_columns));
    indices.resize(static_cast<size_t>((h.blocks + SECATEUR_SLACK) * h.index_bytes));
    order.resize(static_cast<size_t>(divide_up(rows, block_rows) * panels));
    runs.resize(static_cast<size_t>(2 * h.run_count));
    starts.resize(static_cast<size_t>(3 * (parts * panels + 1)));
    expect_status(
        secateur_panelled_pack(w.data(), &h, values.data(), indices.data(), order.data(), runs.data(), starts.data()),
        SECATEUR_OK, "panelled_pack");
    point();
  }

  Panelled(const Panelled& other) { *this = other; }
  Panelled& operator=(const Panelled& other) {
    header = other.header, values = other.values, indices = other.indices, order = other.order;
    runs = other.runs, starts = other.starts;
    point();
    return *this;
  }

  void point() {
    header.values = values.data(), header.indices = indices.data(), header.order = order.data();
    header.runs = runs.data(), header.starts = starts.data();
  }

  // As a reader of a file would: lengths are those of the arrays that are there.
  int32_t check() const {
    const int32_t bytes = header.index_bytes == 1 || header.index_bytes == 2 ? header.index_bytes : 1;
    return secateur_panelled_check(&header, static_cast<int64_t>(values.size()),
                                   static_cast<int64_t>(indices.size()) / bytes, static_cast<int64_t>(order.size()),
                                   static_cast<int64_t>(runs.size()), static_cast<int64_t>(starts.size()));
  }
};

struct Bitmask {
  secateur_bitmask header{};
  std::vector<float> values;
  std::vector<uint64_t> bits;
  std::vector<int64_t> offsets;

  Bitmask(const std::vector<float>& w, int64_t rows, int64_t columns) {
    header.rows = rows, header.columns = columns;
    expect_status(secateur_bitmask_count(w.data(), rows, columns, &header.count), SECATEUR_OK, "bitmask_count");
    values.resize(static_cast<size_t>(header.count + SECATEUR_BITMASK_SLACK));
    bits.resize(static_cast<size_t>(rows * divide_up(columns, 64)));
    offsets.resize(static_cast<size_t>(rows + 1));
    expect_status(secateur_bitmask_pack(w.data(), &header, values.data(), bits.data(), offsets.data()), SECATEUR_OK,
                  "bitmask_pack");
    point();
  }

  Bitmask(const Bitmask& other) { *this = other; }
  Bitmask& operator=(const Bitmask& other) {
    header = other.header, values = other.values, bits = other.bits, offsets = other.offsets;
    point();
    return *this;
  }

  void point() { header.values = values.data(), header.bits = bits.data(), header.offsets = offsets.data(); }

  int32_t check() const {
    return secateur_bitmask_check(&header, static_cast<int64_t>(values.size()), static_cast<int64_t>(bits.size()),
                                  static_cast<int64_t>(offsets.size()));
  }
};

inline double activated(double x, int32_t activation) {
  switch (activation) {
    case SECATEUR_RELU: return x < 0 ? 0 : x;
    case SECATEUR_RELU6: return x < 0 ? 0 : x > 6 ? 6 : x;
    case SECATEUR_GELU: return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
    case SECATEUR_GELU_TANH: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case SECATEUR_SILU: return x / (1 + std::exp(-x));
    default: return x;
  }
}

// A sum, and the sum of magnitudes that rounding is relative to.
struct Sum {
  double value = 0, size = 0;
  void add(double term) { value += term, size += std::fabs(term); }
  void multiply(double a, double b) { add(a * b); }
};

inline bool close(const Sum& sum, int32_t activation, float got) {
  const double wanted = activated(sum.value, activation);
  if (std::isnan(wanted)) return std::isnan(got);
  if (std::isinf(wanted)) return static_cast<double>(got) == wanted;
  return std::fabs(wanted - static_cast<double>(got)) <= 1e-5 * sum.size + 1e-5 * std::fabs(wanted) + 1e-30;
}

inline bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() &&
         (a.size() == 0 || std::memcmp(a.data(), b.data(), static_cast<size_t>(a.size()) * 4) == 0);
}

inline std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  std::string name;
  for (const char* c = secateur_usable_isas();; ++c) {
    if (*c != ' ' && *c != '\0') name += *c;
    else if (!name.empty())
      names.push_back(name), name.clear();
    if (*c == '\0') return names;
  }
}

// One vector or image position after the other lies at `step`, one feature after the other at `stride`.
struct Places {
  int64_t step, stride, size;
  int64_t at(int64_t position, int64_t feature) const { return position * step + feature * stride; }
  static Places of(Random& random, int64_t count, int64_t features, bool feature_major) {
    const int64_t gap = random.chance(0.3) ? random.between(1, 9) : 0;
    const int64_t apart = (feature_major ? count : features) + gap;
    const Places p = feature_major ? Places{1, apart, 0} : Places{apart, 1, 0};
    return {p.step, p.stride, count > 0 && features > 0 ? p.at(count - 1, features - 1) + 1 : 0};
  }
};

// The parts of the test; each runs one case from its own random numbers.
void product_case(Random& random);
void convolution_case(Random& random);
void max_pool_case(Random& random);
void depthwise_case(Random& random);
void run_case(Random& random);
void damage_case(Random& random);
void refusals();
void fork_case();
void concurrent_callers(int calls);

}  // namespace plain

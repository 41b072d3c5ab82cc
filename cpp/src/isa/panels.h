// Where the activations of a panel come from, and where finished sums go.
#pragma once

#include "activation.h"
#include "scratch.h"
#include "simd.h"

namespace secateur {
namespace {

// The activations of a product, feature by feature, for a run of positions (vectors, pixels).
class Source {
 public:
  // Gives features [feature, feature + count) of positions [position, position + tile) as rows of `tile` floats: where
  // they are, or written to `buffer`. Of positions from `valid` on anything may come, and nothing is used. Sets
  // `spoiled` where any of the others is infinite or not a number.
  virtual const float* panel(float* buffer, int64_t tile, int64_t position, int64_t valid, int64_t feature, int64_t count,
                             bool* spoiled) const = 0;
  virtual float value(int64_t feature, int64_t position) const = 0;

 protected:
  ~Source() = default;
};

// Takes complete sums of a tile.
class Sink {
 public:
  // `sums` has rows of `tile` floats, of which `valid` count, for rows [row, row + rows) of the output.
  virtual void put(const float* sums, int64_t tile, int64_t position, int64_t valid, int64_t row,
                   int64_t rows) const = 0;
  // Where in the output a whole tile may be stored directly, rows `stride` apart; negative where it may not.
  virtual int64_t direct(int64_t position, int64_t valid, int64_t tile, int64_t* stride) const = 0;
  virtual void spoil(int64_t row, int64_t position) const = 0;  // not a number

 protected:
  ~Sink() = default;
};

// Zero times a finite number is zero, and not a number otherwise.
template <int L>
SECATEUR_INLINE bool any_spoiled(vec<L> sum) {
  float lanes[L];
  store_loose<L>(lanes, sum);
  float total = 0.0f;
  for (int i = 0; i < L; ++i) total += lanes[i];
  return !(total == 0.0f);
}

// Copies rows of `tile` floats; `from(k)` gives the place of row k, of which `valid` may be read.
template <class From>
SECATEUR_INLINE bool copy_rows(float* panel, int64_t tile, int64_t valid, int64_t count, From from) {
  constexpr int L = kWidth;
  if (valid >= tile && tile % L == 0) {
    vec<L> spoiled{};
    for (int64_t k = 0; k < count; ++k) {
      const float* source = from(k);
      float* row = panel + k * tile;
      for (int64_t v = 0; v < tile; v += L) {
        const vec<L> x = load_loose<L>(source + v);
        spoiled += x * 0.0f;
        store<L>(row + v, x);
      }
    }
    return any_spoiled<L>(spoiled);
  }
  const int64_t read = least(valid, tile), whole = read - read % L;
  vec<L> wide{};
  float rest = 0.0f;
  for (int64_t k = 0; k < count; ++k) {
    const float* source = from(k);
    float* row = panel + k * tile;
    for (int64_t v = 0; v < whole; v += L) {
      const vec<L> x = load_loose<L>(source + v);
      wide += x * 0.0f;
      store_loose<L>(row + v, x);
    }
    for (int64_t i = whole; i < read; ++i) rest += (row[i] = source[i]) * 0.0f;
    for (int64_t i = read; i < tile; ++i) row[i] = 0.0f;
  }
  return any_spoiled<L>(wide) || !(rest == 0.0f);
}

// What four vectors have in the same place of a group of four lanes, side by side: groups of turned[i] are from place i.
template <int L>
struct Turned {
  SECATEUR_INLINE Turned(vec<L> a, vec<L> b, vec<L> c, vec<L> d) {
    const vec<L> ab = groups<L, 0, 4, 1, 5>(a, b), cd = groups<L, 0, 4, 1, 5>(c, d);
    const vec<L> ef = groups<L, 2, 6, 3, 7>(a, b), gh = groups<L, 2, 6, 3, 7>(c, d);
    place[0] = groups<L, 0, 1, 4, 5>(ab, cd), place[1] = groups<L, 2, 3, 6, 7>(ab, cd);
    place[2] = groups<L, 0, 1, 4, 5>(ef, gh), place[3] = groups<L, 2, 3, 6, 7>(ef, gh);
  }
  vec<L> place[4];
};

// L vectors of L lanes: lane j of vector i becomes lane i of vector j.
template <int L>
SECATEUR_INLINE void turn(vec<L> (&v)[L]) {
  vec<L> turned[L];
#pragma GCC unroll 4
  for (int quad = 0; quad < L; quad += 4) {
    const Turned<L> four(v[quad], v[quad + 1], v[quad + 2], v[quad + 3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) turned[quad + i] = four.place[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if constexpr (L == 4) {
      v[i] = turned[i];
    } else if constexpr (L == 8) {
      v[i] = whole_groups<L, 0, 0, 0, 0>(turned[i], turned[4 + i]);
      v[4 + i] = whole_groups<L, 1, 0, 1, 0>(turned[i], turned[4 + i]);
    } else {
      const vec<L> a = whole_groups<L, 0, 1, 0, 1>(turned[i], turned[4 + i]);
      const vec<L> b = whole_groups<L, 2, 3, 2, 3>(turned[i], turned[4 + i]);
      const vec<L> c = whole_groups<L, 0, 1, 0, 1>(turned[8 + i], turned[12 + i]);
      const vec<L> d = whole_groups<L, 2, 3, 2, 3>(turned[8 + i], turned[12 + i]);
      v[i] = whole_groups<L, 0, 2, 0, 2>(a, c), v[4 + i] = whole_groups<L, 1, 3, 1, 3>(a, c);
      v[8 + i] = whole_groups<L, 0, 2, 0, 2>(b, d), v[12 + i] = whole_groups<L, 1, 3, 1, 3>(b, d);
    }
  }
}

// Four rows of L floats, `step` apart, become L rows of four, `stride` apart. Returns zero times what was read.
template <int L>
SECATEUR_INLINE vec<L> turn_to_columns(const float* from, int64_t step, float* to, int64_t stride) {
  const vec<L> a = load_loose<L>(from), b = load_loose<L>(from + step);
  const vec<L> c = load_loose<L>(from + 2 * step), d = load_loose<L>(from + 3 * step);
  const Turned<L> turned(a, b, c, d);
#pragma GCC unroll 4
  for (int group = 0; group < L / 4; ++group)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      std::memcpy(to + (4 * group + i) * stride, reinterpret_cast<const char*>(&turned.place[i]) + 16 * group, 16);
  return (a + b + c + d) * 0.0f;
}

// A whole vector of rows as long as one, `step` apart, become as many, `stride` apart. Returns zero times what was read.
SECATEUR_INLINE vec<kWidth> turn_square(const float* from, int64_t step, float* to, int64_t stride) {
  vec<kWidth> rows[kWidth], spoiled{};
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    rows[i] = load_loose<kWidth>(from + i * step);
    spoiled += rows[i] * 0.0f;
  }
  turn<kWidth>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) store_loose<kWidth>(to + i * stride, rows[i]);
  return spoiled;
}

// L rows of four floats, `step` apart, become four rows of L, `stride` apart.
template <int L>
SECATEUR_INLINE void turn_to_rows(const float* from, int64_t step, float* to, int64_t stride) {
  const Turned<L> turned(load_groups<L>(from, 4 * step), load_groups<L>(from + step, 4 * step),
                         load_groups<L>(from + 2 * step, 4 * step), load_groups<L>(from + 3 * step, 4 * step));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) store_loose<L>(to + i * stride, turned.place[i]);
}

// Turns sums [rows][tile], of which `width` count, into vectors `stride` apart, whole cache lines at a time: vectors a
// power of two apart share a few places of a cache, and a line that is filled bit by bit may leave it in between.
inline void turn_sums(const float* sums, int64_t tile, int64_t rows, int64_t width, float* y, int64_t stride) {
  constexpr int64_t some = 64;  // rows that a first-level cache keeps meanwhile
  for (int64_t first = 0; first < rows; first += some) {
    const int64_t last = least(rows, first + some);
    int64_t i = 0;
    for (; i + 4 <= width; i += 4) {
      int64_t r = first;
      for (; r + kWidth <= last; r += kWidth)
        turn_to_rows<kWidth>(sums + r * tile + i, tile, y + i * stride + r, stride);
      for (; r + 4 <= last; r += 4) turn_to_rows<4>(sums + r * tile + i, tile, y + i * stride + r, stride);
      for (; r < last; ++r)
        for (int64_t j = i; j < i + 4; ++j) y[j * stride + r] = sums[r * tile + j];
    }
    for (; i < width; ++i)
      for (int64_t r = first; r < last; ++r) y[i * stride + r] = sums[r * tile + i];
  }
}

// A run of finished sums, stored `at` in the output, after the residual and the activation.
__attribute__((noinline)) inline void put_row(const float* sums, int64_t count, int64_t at, float* y,
                                              const secateur_epilogue& after) {
  int64_t i = 0;
  if (after.residual != nullptr) {
    for (; i + kWidth <= count; i += kWidth)
      store_loose<kWidth>(y + at + i, load_loose<kWidth>(sums + i) + load_loose<kWidth>(after.residual + at + i));
    for (; i < count; ++i) y[at + i] = sums[i] + after.residual[at + i];
  } else {
    for (; i + kWidth <= count; i += kWidth) store_loose<kWidth>(y + at + i, load_loose<kWidth>(sums + i));
    for (; i < count; ++i) y[at + i] = sums[i];
  }
  if (after.activation != SECATEUR_NONE) activate_row(y + at, count, after.activation);
}

// Vectors as they lie in memory: one of `step` and `stride` is 1.
class Vectors final : public Source {
 public:
  Vectors(const float* x, int64_t step, int64_t stride) : x_(x), step_(step), stride_(stride) {}

  const float* panel(float* panel, int64_t tile, int64_t position, int64_t valid, int64_t feature, int64_t count,
                     bool* spoilt) const override {
    const float* x = x_ + position * step_ + feature * stride_;
    if (step_ == 1) {
      *spoilt |= copy_rows(panel, tile, valid, count, [&](int64_t k) { return x + k * stride_; });
      return panel;
    }
    const int64_t read = least(valid, tile);
    vec<kWidth> wide{};
    vec<4> narrow{};
    float rest = 0.0f;
    int64_t i = 0;
    for (; kWidth > 4 && i + kWidth <= read; i += kWidth) {
      int64_t k = 0;
      for (; k + kWidth <= count; k += kWidth)
        wide += turn_square(x + i * step_ + k, step_, panel + k * tile + i, tile);
      for (; k < count; ++k)
        for (int64_t j = i; j < i + kWidth; ++j) rest += (panel[k * tile + j] = x[j * step_ + k]) * 0.0f;
    }
    for (; i + 4 <= read; i += 4) {
      int64_t k = 0;
      for (; k + kWidth <= count; k += kWidth)
        wide += turn_to_columns<kWidth>(x + i * step_ + k, step_, panel + k * tile + i, tile);
      for (; k + 4 <= count; k += 4) narrow += turn_to_columns<4>(x + i * step_ + k, step_, panel + k * tile + i, tile);
      for (; k < count; ++k)
        for (int64_t j = i; j < i + 4; ++j) rest += (panel[k * tile + j] = x[j * step_ + k]) * 0.0f;
    }
    for (; i < read; ++i)
      for (int64_t k = 0; k < count; ++k) rest += (panel[k * tile + i] = x[i * step_ + k]) * 0.0f;
    if (read < tile)
      for (int64_t k = 0; k < count; ++k)
        for (int64_t j = read; j < tile; ++j) panel[k * tile + j] = 0.0f;
    *spoilt |= any_spoiled<kWidth>(wide) || any_spoiled<4>(narrow) || !(rest == 0.0f);
    return panel;
  }

  float value(int64_t feature, int64_t position) const override { return x_[position * step_ + feature * stride_]; }

 private:
  const float* x_;
  int64_t step_, stride_;
};

class VectorsOut final : public Sink {
 public:
  VectorsOut(float* y, int64_t step, int64_t stride, const secateur_epilogue& after)
      : y_(y), step_(step), stride_(stride), after_(after) {}

  int64_t direct(int64_t position, int64_t valid, int64_t tile, int64_t* stride) const override {
    *stride = stride_;
    return step_ == 1 && valid >= tile ? position : -1;
  }

  void put(const float* sums, int64_t tile, int64_t position, int64_t valid, int64_t row,
           int64_t rows) const override {
    const int64_t width = least(valid, tile);
    if (step_ == 1) {
      for (int64_t r = 0; r < rows; ++r) put_row(sums + r * tile, width, (row + r) * stride_ + position, y_, after_);
      return;
    }
    if (after_.residual == nullptr) {  // straight to where it belongs
      float* y = y_ + position * step_ + row;
      turn_sums(sums, tile, rows, width, y, step_);
      for (int64_t i = 0; after_.activation != SECATEUR_NONE && i < width; ++i)
        activate_row(y + i * step_, rows, after_.activation);
      return;
    }
    float turned[4 * kRun];
    for (int64_t first = 0; first < rows; first += kRun) {
      const int64_t count = least(kRun, rows - first);
      for (int64_t i = 0; i < width; i += 4) {
        const int64_t some = least(4, width - i);
        turn_sums(sums + first * tile + i, tile, count, some, turned, kRun);
        for (int64_t j = 0; j < some; ++j)
          put_row(turned + j * kRun, count, (position + i + j) * step_ + row + first, y_, after_);
      }
    }
  }

  void spoil(int64_t row, int64_t position) const override {
    y_[position * step_ + row * stride_] = __builtin_nanf("");
  }

 private:
  static constexpr int64_t kRun = 64;  // features of four vectors that are turned at a time

  float* y_;
  int64_t step_, stride_;
  secateur_epilogue after_;
};

}  // namespace
}  // namespace secateur

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
  // they are, or written to `buffer`, where positions from `valid` on are zero. Sets `spoiled` where any of them is
  // infinite or not a number.
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
  float spoiled = 0.0f;
  const int64_t read = least(valid, tile);
  for (int64_t k = 0; k < count; ++k) {
    const float* source = from(k);
    float* row = panel + k * tile;
    for (int64_t i = 0; i < read; ++i) {
      row[i] = source[i];
      spoiled += source[i] * 0.0f;
    }
    for (int64_t i = read; i < tile; ++i) row[i] = 0.0f;
  }
  return !(spoiled == 0.0f);
}

// Four rows of four floats, rows `step` and `stride` apart, mirrored. Returns zero times what was read.
SECATEUR_INLINE vec<4> turn_four(const float* from, int64_t step, float* to, int64_t stride) {
  const vec<4> a = load_loose<4>(from), b = load_loose<4>(from + step);
  const vec<4> c = load_loose<4>(from + 2 * step), d = load_loose<4>(from + 3 * step);
  const vec<4> ab = SECATEUR_SHUFFLE(a, b, 0, 4, 1, 5), cd = SECATEUR_SHUFFLE(c, d, 0, 4, 1, 5);
  const vec<4> ef = SECATEUR_SHUFFLE(a, b, 2, 6, 3, 7), gh = SECATEUR_SHUFFLE(c, d, 2, 6, 3, 7);
  store_loose<4>(to, SECATEUR_SHUFFLE(ab, cd, 0, 1, 4, 5));
  store_loose<4>(to + stride, SECATEUR_SHUFFLE(ab, cd, 2, 3, 6, 7));
  store_loose<4>(to + 2 * stride, SECATEUR_SHUFFLE(ef, gh, 0, 1, 4, 5));
  store_loose<4>(to + 3 * stride, SECATEUR_SHUFFLE(ef, gh, 2, 3, 6, 7));
  return (a + b + c + d) * 0.0f;
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
    vec<4> spoiled{};
    float rest = 0.0f;
    int64_t i = 0;
    for (; i + 4 <= read; i += 4) {
      int64_t k = 0;
      for (; k + 4 <= count; k += 4) spoiled += turn_four(x + i * step_ + k, step_, panel + k * tile + i, tile);
      for (; k < count; ++k)
        for (int64_t j = i; j < i + 4; ++j) rest += (panel[k * tile + j] = x[j * step_ + k]) * 0.0f;
    }
    for (; i < read; ++i)
      for (int64_t k = 0; k < count; ++k) rest += (panel[k * tile + i] = x[i * step_ + k]) * 0.0f;
    if (read < tile)
      for (int64_t k = 0; k < count; ++k)
        for (int64_t j = read; j < tile; ++j) panel[k * tile + j] = 0.0f;
    *spoilt |= any_spoiled<4>(spoiled) || !(rest == 0.0f);
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
      for (int64_t i = 0; i < width; i += 4) {
        const int64_t some = least(4, width - i);
        int64_t r = 0;
        if (some == 4)
          for (; r + 4 <= rows; r += 4) turn_four(sums + r * tile + i, tile, y + i * step_ + r, step_);
        for (; r < rows; ++r)
          for (int64_t j = i; j < i + some; ++j) y[j * step_ + r] = sums[r * tile + j];
        if (after_.activation != SECATEUR_NONE)
          for (int64_t j = i; j < i + some; ++j) activate_row(y + j * step_, rows, after_.activation);
      }
      return;
    }
    float turned[4 * kRun];
    for (int64_t first = 0; first < rows; first += kRun) {
      const int64_t count = least(kRun, rows - first);
      const float* from = sums + first * tile;
      for (int64_t i = 0; i < width; i += 4) {
        const int64_t some = least(4, width - i);
        int64_t r = 0;
        if (some == 4)
          for (; r + 4 <= count; r += 4) turn_four(from + r * tile + i, tile, turned + r, kRun);
        for (; r < count; ++r)
          for (int64_t j = 0; j < some; ++j) turned[j * kRun + r] = from[r * tile + i + j];
        for (int64_t j = 0; j < some; ++j)
          put_row(turned + j * kRun, count, (position + i + j) * step_ + row + first, y_, after_);
      }
    }
  }

  void spoil(int64_t row, int64_t position) const override {
    y_[position * step_ + row * stride_] = __builtin_nanf("");
  }

 private:
  static constexpr int64_t kRun = 64;  // features of one vector that are turned at a time

  float* y_;
  int64_t step_, stride_;
  secateur_epilogue after_;
};

}  // namespace
}  // namespace secateur

// Depthwise convolutions and maxima: what every channel sees of itself. Images keep their layout around them.
#pragma once

#include "conv.h"

namespace secateur {
namespace {

constexpr int64_t kStrip = 1024;   // positions: rows of the image that two strips need are few beside it
constexpr int64_t kTogether = 32;  // channels that one thread works on at a time

SECATEUR_INLINE ints<kWidth> load_mask(const int32_t* masks) {
  return (ints<kWidth>)load_loose<kWidth>(reinterpret_cast<const float*>(masks));
}

// The larger one; not a number where one of them is not, as in torch.
template <int L>
SECATEUR_INLINE vec<L> larger(vec<L> a, vec<L> b) {
  const ints<L> take = (ints<L>)(b > a) | (ints<L>)(b != b);
  return (vec<L>)(((ints<L>)b & take) | ((ints<L>)a & ~take));
}

// Sums of what a kernel sees, weighted. Beside the image are zeros.
struct Sums {
  static constexpr bool kLowest = false;
  static SECATEUR_INLINE vec<kWidth> see(const float* x, ints<kWidth> there) {
    return (vec<kWidth>)((ints<kWidth>)load_loose<kWidth>(x) & there);
  }
  static SECATEUR_INLINE void add(vec<kWidth>& sum, const float* weights, int64_t tap, vec<kWidth> seen) {
    sum += weights[tap] * seen;
  }
};

// The largest of what a kernel sees. Beside the image is nothing.
template <bool kNumbers>  // no pixel is not a number
struct Largest {
  static constexpr bool kLowest = true;
  static SECATEUR_INLINE vec<kWidth> see(const float* x, ints<kWidth> there) {
    return (vec<kWidth>)(((ints<kWidth>)load_loose<kWidth>(x) & there) |
                         ((ints<kWidth>)splat<kWidth>(-__builtin_inff()) & ~there));
  }
  static SECATEUR_INLINE void add(vec<kWidth>& best, const float*, int64_t, vec<kWidth> seen) {
    best = kNumbers ? (seen > best ? seen : best) : larger<kWidth>(best, seen);
  }
};

// Adds N taps of one column of a kernel, whose pixels lie a row apart, to four vectors.
template <class Op>
struct FourRows {  // of which each is a row further: they share what they see
  static int64_t step(int64_t period) { return period; }

  template <int N>
  static SECATEUR_INLINE void add(const float* x, int64_t period, const float* weights, int64_t tap, int64_t step,
                                  const int32_t* masks,
                                  vec<kWidth> (&sum)[4]) {
    const ints<kWidth> there = load_mask(masks);
#pragma GCC unroll 8
    for (int i = 0; i < N + 3; ++i) {
      const vec<kWidth> seen = Op::see(x + i * period, there);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        if (i - j >= 0 && i - j < N) Op::add(sum[j], weights, tap + (i - j) * step, seen);
    }
  }
};

template <class Op>
struct OneRow {  // that follow each other
  static int64_t step(int64_t) { return kWidth; }

  template <int N>
  static SECATEUR_INLINE void add(const float* x, int64_t period, const float* weights, int64_t tap, int64_t step,
                                  const int32_t* masks,
                                  vec<kWidth> (&sum)[4]) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const ints<kWidth> there = load_mask(masks + v * kWidth);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) Op::add(sum[v], weights, tap + i * step, Op::see(x + i * period + v * kWidth, there));
    }
  }
};

// Taps of one column of a kernel that see rows of the same phase, one after the other; at most four.
struct Run {
  int64_t shift;  // of the first
  const int32_t* masks;
  int64_t tap, count;
};

// All taps of a kernel.
struct Runs {
  explicit Runs(const Geometry& g) : period(g.period) {
    const secateur_convolution& s = g.shape;
    const int64_t apart = s.dilation_height == 1 ? s.stride_height : s.kernel_height;
    step = apart * s.kernel_width;
    Run* run = reinterpret_cast<Run*>(scratch(kPlaces).at_least(g.taps * int64_t{sizeof(Run)} / 4));
    all = run;
    for (int64_t column = 0; column < s.kernel_width; ++column)
      for (int64_t row = 0; row < least(apart, s.kernel_height); ++row)
        for (int64_t left = divide_up(s.kernel_height - row, apart), tap = row * s.kernel_width + column; left > 0;) {
          const int64_t some = left > 4 ? 3 : left;  // five are three and two
          *run++ = {g.shifts[tap], g.masks + column * g.mask_length, tap, some};
          tap += some * step, left -= some;
        }
    count = run - all;
  }

  int64_t period;
  int64_t step;  // from one tap of a run to the next
  const Run* all;
  int64_t count;
};

// Four vectors of what one kernel makes of the image.
template <class Four>
SECATEUR_INLINE void sum_four(const Runs& runs, const float* weights, const float* x, int64_t column, float start,
                              float* out) {
  vec<kWidth> sum[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) sum[v] = splat<kWidth>(start);
  for (const Run *run = runs.all, *end = run + runs.count; run < end; ++run) {
    const float* seen = x + run->shift;
    const int32_t* masks = run->masks + column;
    switch (run->count) {
      case 1: Four::template add<1>(seen, runs.period, weights, run->tap, runs.step, masks, sum); break;
      case 2: Four::template add<2>(seen, runs.period, weights, run->tap, runs.step, masks, sum); break;
      case 3: Four::template add<3>(seen, runs.period, weights, run->tap, runs.step, masks, sum); break;
      default: Four::template add<4>(seen, runs.period, weights, run->tap, runs.step, masks, sum);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) store_loose<kWidth>(out + v * Four::step(runs.period), sum[v]);
}

// Four rows at a time, where there are as many; in narrower images they would leave lanes idle.
inline bool by_rows(int64_t period, int64_t valid) { return period >= kWidth / 2 && valid >= 4 * period; }

// Positions of a strip that are looked at: some are computed in vain.
inline int64_t reach(int64_t period, int64_t valid) {
  return by_rows(period, valid) ? valid + kWidth : divide_up(valid, 4 * kWidth) * 4 * kWidth;
}

// All of one kernel over a strip. What is computed beyond the end of a row belongs to the next one.
template <class Op>
inline void sum_strip(const Runs& runs, const float* weights, const float* x, int64_t column, int64_t valid, float start,
                      float* out) {
  const int64_t rows = 4 * runs.period;
  if (!by_rows(runs.period, valid)) {
    for (int64_t at = 0; at < valid; at += 4 * kWidth)
      sum_four<OneRow<Op>>(runs, weights, x + at, column + at, start, out + at);
    return;
  }
  for (int64_t done = 0; done < valid; done += rows) {
    const int64_t at = least(done, valid - rows);  // the last ones may be computed twice
    for (int64_t i = 0; i < runs.period; i += kWidth)
      sum_four<FourRows<Op>>(runs, weights, x + at + i, column + at + i, start, out + at + i);
  }
}

// Where one channel of the output goes, after the residual and the activation.
inline void put_strip(const float* sums, int64_t position, int64_t valid, int64_t row, const ImageOut& sink, float* y,
                      const secateur_epilogue& after) {
  for (int64_t i = 0; i < valid; i += kImageBlock) {
    int64_t stride = 0;
    const int64_t direct = sink.direct(position + i, valid - i, kImageBlock, &stride);
    if (direct < 0) {
      sink.put(sums + i, kImageBlock, position + i, valid - i, row, 1);
      continue;
    }
    const int64_t at = direct + row * stride;
    for (int64_t lane = 0; lane < kImageBlock; lane += kWidth) {
      vec<kWidth> sum = load<kWidth>(sums + i + lane);
      if (after.residual != nullptr) sum += load_loose<kWidth>(after.residual + at + lane);
      store_loose<kWidth>(y + at + lane, activate<kWidth>(sum, after.activation));
    }
  }
}

// Calls `each` with a strip, what is seen from it, and some channels; `rows` are the output's.
template <bool kLowest, class Each>
inline int32_t for_strips(const secateur_convolution& s, int64_t rows, const float* x, float* y,
                          const secateur_epilogue& after, int32_t threads, Each each) {
  const Geometry geometry(s, kStrip + kImageBlock);
  const Runs runs(geometry);
  const int64_t pixels = geometry.height * geometry.width;
  const int64_t strips = divide_up(geometry.positions(), kStrip), parts = divide_up(s.channels, kTogether);
  const int64_t in = floats_of(s.channels, s.height, s.width, s.x_block);
  const int64_t out = floats_of(rows, geometry.height, geometry.width, s.y_block);
  const int32_t status = in_parallel(s.batch * strips * parts, threads, [&](int64_t i) {
    const int64_t image = i / (strips * parts), position = i / parts % strips * kStrip, first = i % parts * kTogether;
    const int64_t valid = least(kStrip, geometry.positions() - position);
    const secateur_epilogue own = of_image(after, image * out);
    const Taps<kLowest> taps(geometry, x + image * in);
    const ImageOut sink(y + image * out, rows, geometry.height, geometry.width, geometry.period, s.y_block, own);
    const auto view = taps.look(reach(geometry.period, valid), position, valid);
    float* sums = scratch(kTile).at_least(kStrip + kImageBlock);
    for (int64_t channel = first; channel < least(s.channels, first + kTogether); ++channel) {
      bool spoiled = false;
      const float* seen = taps.channel(view, channel, &spoiled);
      each(channel, spoiled, [&](auto op, int64_t row, const float* weights, float start) {
        sum_strip<decltype(op)>(runs, weights, seen, position % geometry.period, valid, start, sums);
        put_strip(sums, position, valid, row, sink, y + image * out, own);
      });
    }
  });
  for (int64_t image = 0; image < s.batch; ++image) clear_beyond(y + image * out, rows, pixels, s.y_block);
  return status;
}

// Kernels are [channels * multiplier][taps].
inline int32_t depthwise2d(const float* kernels, int64_t multiplier, const secateur_convolution& s, const float* x,
                           float* y, const secateur_epilogue& after, const secateur_plan& plan) {
  const int64_t taps = int64_t{s.kernel_height} * s.kernel_width;
  return for_strips<false>(s, s.channels * multiplier, x, y, after, plan.threads, [&](int64_t channel, bool, auto put) {
    for (int64_t row = channel * multiplier; row < (channel + 1) * multiplier; ++row)
      put(Sums{}, row, kernels + row * taps, after.bias != nullptr ? after.bias[row] : 0.0f);
  });
}

inline int32_t max_pool2d(const secateur_convolution& s, const float* x, float* y, const secateur_plan& plan) {
  const secateur_epilogue nothing{};
  return for_strips<true>(s, s.channels, x, y, nothing, plan.threads, [&](int64_t channel, bool spoiled, auto put) {
    const float lowest = -__builtin_inff();
    if (spoiled)
      put(Largest<false>{}, channel, nullptr, lowest);
    else
      put(Largest<true>{}, channel, nullptr, lowest);
  });
}

}  // namespace
}  // namespace secateur

// Depthwise convolution: every channel has kernels of its own, which are dense. Images keep their layout around it.
#pragma once

#include "conv.h"

namespace secateur {
namespace {

constexpr int64_t kStrip = 1024;   // positions: rows of the image that two strips need are few beside it
constexpr int64_t kTogether = 32;  // channels that one thread works on at a time

// Depthwise kernels: [channels * multiplier][taps].
struct Depthwise {
  const float* weights;
  int64_t multiplier;  // outputs of a channel
  const secateur_epilogue& after;
};

SECATEUR_INLINE ints<kWidth> load_mask(const int32_t* masks) {
  return (ints<kWidth>)load_loose<kWidth>(reinterpret_cast<const float*>(masks));
}

SECATEUR_INLINE vec<kWidth> load_seen(const float* x, ints<kWidth> there) {
  return (vec<kWidth>)((ints<kWidth>)load_loose<kWidth>(x) & there);
}

// Adds N taps of one column of a kernel, whose pixels lie a row apart, to four vectors of sums.
struct FourRows {  // of which each is a row further: they share what they see
  static int64_t step(int64_t period) { return period; }

  template <int N>
  static SECATEUR_INLINE void add(const float* x, int64_t period, const float* weights, int64_t step, const int32_t* masks,
                                  vec<kWidth> (&sum)[4]) {
    const ints<kWidth> there = load_mask(masks);
#pragma GCC unroll 8
    for (int i = 0; i < N + 3; ++i) {
      const vec<kWidth> seen = load_seen(x + i * period, there);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        if (i - j >= 0 && i - j < N) sum[j] += weights[(i - j) * step] * seen;
    }
  }
};

struct OneRow {  // that follow each other
  static int64_t step(int64_t) { return kWidth; }

  template <int N>
  static SECATEUR_INLINE void add(const float* x, int64_t period, const float* weights, int64_t step, const int32_t* masks,
                                  vec<kWidth> (&sum)[4]) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const ints<kWidth> there = load_mask(masks + v * kWidth);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) sum[v] += weights[i * step] * load_seen(x + i * period + v * kWidth, there);
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

// Four vectors of one kernel's sums.
template <class Four>
SECATEUR_INLINE void sum_four(const Runs& runs, const float* weights, const float* x, int64_t column, float start,
                              float* out) {
  vec<kWidth> sum[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) sum[v] = splat<kWidth>(start);
  for (const Run *run = runs.all, *end = run + runs.count; run < end; ++run) {
    const float *seen = x + run->shift, *w = weights + run->tap;
    const int32_t* masks = run->masks + column;
    switch (run->count) {
      case 1: Four::template add<1>(seen, runs.period, w, runs.step, masks, sum); break;
      case 2: Four::template add<2>(seen, runs.period, w, runs.step, masks, sum); break;
      case 3: Four::template add<3>(seen, runs.period, w, runs.step, masks, sum); break;
      default: Four::template add<4>(seen, runs.period, w, runs.step, masks, sum);
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

// All sums of one kernel over a strip. What is computed beyond the end of a row belongs to the next one.
inline void sum_strip(const Runs& runs, const float* weights, const float* x, int64_t column, int64_t valid, float start,
                      float* out) {
  const int64_t rows = 4 * runs.period;
  if (!by_rows(runs.period, valid)) {
    for (int64_t at = 0; at < valid; at += 4 * kWidth)
      sum_four<OneRow>(runs, weights, x + at, column + at, start, out + at);
    return;
  }
  for (int64_t done = 0; done < valid; done += rows) {
    const int64_t at = least(done, valid - rows);  // the last ones may be computed twice
    for (int64_t i = 0; i < runs.period; i += kWidth)
      sum_four<FourRows>(runs, weights, x + at + i, column + at + i, start, out + at + i);
  }
}

// Some channels of one strip.
inline void depthwise_strip(const Geometry& g, const Runs& runs, const Depthwise& d, const Taps<false>& taps, const ImageOut& sink,
                            float* y, int64_t position, int64_t first, int64_t last) {
  const int64_t valid = least(kStrip, g.positions() - position);
  float* sums = scratch(kTile).at_least(kStrip + kImageBlock);
  const auto view = taps.look(reach(g.period, valid), position, valid);
  for (int64_t channel = first; channel < last; ++channel) {
    const float* x = taps.channel(view, channel);
    for (int64_t row = channel * d.multiplier; row < (channel + 1) * d.multiplier; ++row) {
      const float start = d.after.bias != nullptr ? d.after.bias[row] : 0.0f;
      sum_strip(runs, d.weights + row * g.taps, x, position % g.period, valid, start, sums);
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
          if (d.after.residual != nullptr) sum += load_loose<kWidth>(d.after.residual + at + lane);
          store_loose<kWidth>(y + at + lane, activate<kWidth>(sum, d.after.activation));
        }
      }
    }
  }
}

inline int32_t depthwise2d(const float* weights, int64_t multiplier, const secateur_convolution& s, const float* x,
                           float* y, const secateur_epilogue& after, const secateur_plan& plan) {
  const Geometry geometry(s, kStrip + kImageBlock);
  const Runs runs(geometry);
  const int64_t rows = s.channels * multiplier, pixels = geometry.height * geometry.width;
  const int64_t strips = divide_up(geometry.positions(), kStrip), parts = divide_up(s.channels, kTogether);
  const int64_t in = floats_of(s.channels, s.height, s.width, s.x_block);
  const int64_t out = floats_of(rows, geometry.height, geometry.width, s.y_block);
  const int32_t status = in_parallel(s.batch * strips * parts, plan.threads, [&](int64_t i) {
    const int64_t image = i / (strips * parts), position = i / parts % strips * kStrip, part = i % parts;
    const secateur_epilogue own = of_image(after, image * out);
    const Taps<false> taps(geometry, x + image * in);
    const ImageOut sink(y + image * out, rows, geometry.height, geometry.width, geometry.period, s.y_block, own);
    depthwise_strip(geometry, runs, {weights, multiplier, own}, taps, sink, y + image * out, position, part * kTogether,
                    least(s.channels, (part + 1) * kTogether));
  });
  for (int64_t image = 0; image < s.batch; ++image) clear_beyond(y + image * out, rows, pixels, s.y_block);
  return status;
}

}  // namespace
}  // namespace secateur

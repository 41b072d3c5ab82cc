// The maximum of what a kernel sees, channel by channel, so that images keep their layout between convolutions.
#pragma once

#include "conv.h"

namespace secateur {
namespace {

// The larger one; not a number where one of them is not, as in torch.
template <int L>
SECATEUR_INLINE vec<L> larger(vec<L> a, vec<L> b) {
  const ints<L> take = (ints<L>)(b > a) | (ints<L>)(b != b);
  return (vec<L>)(((ints<L>)b & take) | ((ints<L>)a & ~take));
}

inline void max_pool_tile(const Geometry& geometry, const Source& source, const Sink& sink, int64_t position) {
  constexpr int64_t tile = kImageBlock;
  const int64_t taps = geometry.taps, channels = geometry.shape.channels;
  const int64_t some = most(1, 64 / taps);  // channels at a time: what they see stays in the first-level cache
  const int64_t valid = least(tile, geometry.positions() - position);
  float* seen = scratch(kPanel).at_least(some * taps * tile);
  float* largest = scratch(kTile).at_least(some * tile);
  for (int64_t first = 0; first < channels; first += some) {
    const int64_t count = least(some, channels - first);
    bool spoiled = false;  // nothing is: maxima of infinities are what they are
    source.panel(seen, tile, position, valid, first * taps, count * taps, &spoiled);
    for (int64_t channel = 0; channel < count; ++channel)
      for (int64_t i = 0; i < tile; i += kWidth) {
        const float* at = seen + channel * taps * tile + i;
        vec<kWidth> best = load<kWidth>(at);
        for (int64_t tap = 1; tap < taps; ++tap) best = larger<kWidth>(best, load<kWidth>(at + tap * tile));
        store<kWidth>(largest + channel * tile + i, best);
      }
    sink.put(largest, tile, position, valid, first, count);
  }
}

inline int32_t max_pool2d(const secateur_convolution& s, const float* x, float* y, const secateur_plan& plan) {
  const Geometry geometry(s, kImageBlock);
  const int64_t pixels = geometry.height * geometry.width, tiles = divide_up(geometry.positions(), kImageBlock);
  const int64_t in = floats_of(s.channels, s.height, s.width, s.x_block);
  const int64_t out = floats_of(s.channels, geometry.height, geometry.width, s.y_block);
  const secateur_epilogue nothing{};
  return in_parallel(s.batch * tiles, plan.threads, [&](int64_t i) {
    const int64_t image = i / tiles, position = i % tiles * kImageBlock;
    const Taps<true> source(geometry, x + image * in);
    float* to = y + image * out;
    if (position == 0) clear_beyond(to, s.channels, pixels, s.y_block);
    const ImageOut sink(to, s.channels, geometry.height, geometry.width, geometry.period, s.y_block, nothing);
    max_pool_tile(geometry, source, sink, position);
  });
}

}  // namespace
}  // namespace secateur

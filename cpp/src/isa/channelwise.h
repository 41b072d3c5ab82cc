// Depthwise convolutions and maxima: what every channel sees of itself. Some channels of an image are laid out pixel by
// pixel, side by side; no pixel is moved twice, and images keep their layout around it.
#pragma once

#include "conv.h"

namespace secateur {
namespace {

constexpr int64_t kAside = 8;    // pixels of the output whose sums are in registers
constexpr int64_t kAtOnce = 64;  // pixels of the output after which they are put where they belong, at least

// Sums of what a kernel sees, weighted. Beside the image are zeros.
struct Sums {
  static SECATEUR_INLINE void add(vec<kWidth>& sum, vec<kWidth> weight, vec<kWidth> seen) { sum += weight * seen; }
};

// The largest of what a kernel sees; not a number where one of them is not, as in torch.
struct Largest {
  static SECATEUR_INLINE void add(vec<kWidth>& best, vec<kWidth>, vec<kWidth> seen) {
    const ints<kWidth> take = (ints<kWidth>)(seen > best) | (ints<kWidth>)(seen != seen);
    best = (vec<kWidth>)(((ints<kWidth>)seen & take) | ((ints<kWidth>)best & ~take));
  }
};

// Rows of the output that are computed before they are put where they belong.
inline int64_t rows_at_once(const Extent& extent) { return divide_up(kAtOnce, extent.width); }

// Rows of kWidth channels of an image, side by side, between the padding; as many rows as are seen at a time.
class Rows {
 public:
  Rows(const secateur_convolution& s, const Extent& extent, float beside)
      : shape_(s),
        image_{s.channels, s.height * s.width, s.x_block},
        pitch_(most(s.pad_left + s.width, (most(extent.width, kAside) - 1) * s.stride_width + extent.reach_width + 1)),
        // Those that are seen, and what is laid out with the last of their pixels.
        count_((rows_at_once(extent) - 1) * s.stride_height + extent.reach_height + 2 +
               divide_up(kWidth, most(s.width, 1))),
        rows_(scratch(kWindow).at_least((count_ + 1) * pitch_ * kWidth)) {
    for (int64_t i = 0; i < (count_ + 1) * pitch_ * kWidth; ++i) rows_[i] = beside;
  }

  // Begins with other channels.
  void look(const float* x, int64_t channel, int64_t lanes) {
    x_ = x, channel_ = channel, lanes_ = lanes;
    next_ = row_ = column_ = 0;
  }

  // Lays out what is seen up to a row.
  void reach(int64_t row) {
    const int64_t end = least(row + 1, shape_.height) * shape_.width;
    for (; next_ < end; next_ += kWidth) lay_out(least(kWidth, image_.pixels - next_));
  }

  // What the kernel's first column sees of a row.
  const float* at(int64_t row) const {
    const bool there = row >= 0 && row < shape_.height;
    return rows_ + (there ? row % count_ : count_) * pitch_ * kWidth;
  }

 private:
  void lay_out(int64_t count) {
    float* to[kWidth];
    for (int64_t i = 0; i < count; ++i) {
      to[i] = rows_ + (row_ * pitch_ + shape_.pad_left + column_) * kWidth;
      if (++column_ == shape_.width) column_ = 0, row_ = row_ + 1 == count_ ? 0 : row_ + 1;
    }
    const float* from = x_ + image_.place(channel_, next_);
    const int64_t step = image_.step();
    if (count < kWidth) {
      for (int64_t lane = 0; lane < lanes_; ++lane)
        for (int64_t i = 0; i < count; ++i) to[i][lane] = from[lane * step + i];
      return;
    }
    vec<kWidth> v[kWidth];
    if (lanes_ == kWidth) {
#pragma GCC unroll 16
      for (int lane = 0; lane < kWidth; ++lane) v[lane] = load_loose<kWidth>(from + lane * step);
    } else {
      for (int lane = 0; lane < kWidth; ++lane)
        v[lane] = lane < lanes_ ? load_loose<kWidth>(from + lane * step) : vec<kWidth>{};
    }
    turn<kWidth>(v);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) store<kWidth>(to[i], v[i]);
  }

  const secateur_convolution& shape_;
  Image image_;
  int64_t pitch_, count_;
  float* rows_;
  const float* x_ = nullptr;
  int64_t channel_ = 0, lanes_ = 0;
  int64_t next_ = 0;              // pixel
  int64_t row_ = 0, column_ = 0;  // of it, among those that are there
};

// One row of the output, for kWidth channels: [width][kWidth]. Where it has fewer than kAside pixels, as many are written
// all the same.
template <class Op, int kStride>
inline void see_row(const secateur_convolution& s, const Extent& extent, const Rows& rows, const float* weights,
                    vec<kWidth> start, int64_t row, float* out) {
  const int64_t across = (kStride > 0 ? kStride : int64_t{s.stride_width}) * kWidth;
  const int64_t aside = int64_t{s.dilation_width} * kWidth;
  for (int64_t done = 0; done < extent.width; done += kAside) {
    const int64_t x = most(0, least(done, extent.width - kAside));  // the last ones may be computed twice
    vec<kWidth> sum[kAside];
#pragma GCC unroll 8
    for (int i = 0; i < kAside; ++i) sum[i] = start;
    const float* weight = weights;
    for (int64_t k = 0; k < s.kernel_height; ++k) {
      const float* seen = rows.at(row * s.stride_height - s.pad_top + k * s.dilation_height) + x * across;
      for (int64_t j = 0; j < s.kernel_width; ++j, seen += aside, weight += kWidth) {
        const vec<kWidth> w = load<kWidth>(weight);
#pragma GCC unroll 8
        for (int i = 0; i < kAside; ++i) Op::add(sum[i], w, load<kWidth>(seen + i * across));
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kAside; ++i) store<kWidth>(out + (x + i) * kWidth, sum[i]);
  }
}

// Where finished pixels go: `lanes` channels of the output, `apart` from each other.
struct Out {
  // Pixels [begin, end), of which `sums` has the first; after the residual and the activation.
  void put(const float* sums, int64_t begin, int64_t end) const {
    for (int64_t pixel = begin; pixel < end;) {
      const bool whole = pixel % kWidth == 0 && pixel + kWidth <= end;
      const float* from = sums + (pixel - begin) * kWidth;
      if (whole) {
        vec<kWidth> v[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) v[i] = load<kWidth>(from + i * kWidth);
        turn<kWidth>(v);
        const int64_t first = image.place(row, pixel), step = apart * image.step();
        if (lanes == kWidth) {
#pragma GCC unroll 16
          for (int lane = 0; lane < kWidth; ++lane) finish(v[lane], first + lane * step);
        } else {
          for (int lane = 0; lane < lanes; ++lane) finish(v[lane], first + lane * step);
        }
        pixel += kWidth;
        continue;
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t at = image.place(row + lane * apart, pixel);
        const float sum = from[lane] + (after.residual != nullptr ? after.residual[at] : 0.0f);
        y[at] = activate<4>(splat<4>(sum), after.activation)[0];
      }
      ++pixel;
    }
  }

  SECATEUR_INLINE void finish(vec<kWidth> sum, int64_t at) const {
    if (after.residual != nullptr) sum += load_loose<kWidth>(after.residual + at);
    if (after.activation == SECATEUR_RELU6) sum = relu6<kWidth>(sum);
    else if (after.activation != SECATEUR_NONE) sum = activate<kWidth>(sum, after.activation);
    store_loose<kWidth>(y + at, sum);
  }

  Image image;
  float* y;
  const secateur_epilogue& after;
  int64_t row, apart, lanes;
};

// All pixels of one output of each of some channels.
template <class Op, int kStride>
inline void see_strided(const secateur_convolution& s, const Extent& extent, Rows& rows, const float* weights,
                        vec<kWidth> start, const Out& out) {
  const int64_t at_a_time = rows_at_once(extent);
  float* sums = scratch(kTile).at_least(((at_a_time + 1) * extent.width + kWidth + kAside) * kWidth);
  int64_t put = 0;  // pixels that are where they belong; whole vectors of them, up to the end
  for (int64_t row = 0; row < extent.height;) {
    const int64_t end = least(row + at_a_time, extent.height);
    rows.reach((end - 1) * s.stride_height - s.pad_top + extent.reach_height);
    for (; row < end; ++row)
      see_row<Op, kStride>(s, extent, rows, weights, start, row, sums + (row * extent.width - put) * kWidth);
    const int64_t there = end * extent.width, ready = end == extent.height ? there : there - there % kWidth;
    out.put(sums, put, ready);
    std::memmove(sums, sums + (ready - put) * kWidth, static_cast<size_t>((there - ready) * kWidth) * 4);
    put = ready;
  }
}

template <class Op>
inline void see_all(const secateur_convolution& s, const Extent& extent, Rows& rows, const float* weights,
                    vec<kWidth> start, const Out& out) {
  if (s.stride_width == 1) return see_strided<Op, 1>(s, extent, rows, weights, start, out);
  if (s.stride_width == 2) return see_strided<Op, 2>(s, extent, rows, weights, start, out);
  see_strided<Op, 0>(s, extent, rows, weights, start, out);
}

// Calls `each(image, channel, lanes, look)` for kWidth channels at a time; `look` begins with their first pixel.
template <class Each>
inline int32_t for_channels(const secateur_convolution& s, const Extent& extent, const float* x, float beside,
                            int32_t threads, Each each) {
  const int64_t parts = divide_up(s.channels, kWidth);
  const int64_t in = floats_of(s.channels, s.height, s.width, s.x_block);
  return in_parallel(s.batch * parts, threads, [&](int64_t i) {
    const int64_t image = i / parts, channel = i % parts * kWidth, lanes = least(kWidth, s.channels - channel);
    Rows rows(s, extent, beside);
    each(image, channel, lanes, [&]() -> Rows& {
      rows.look(x + image * in, channel, lanes);
      return rows;
    });
  });
}

// Kernels are [channels * multiplier][taps].
inline int32_t depthwise2d(const float* kernels, int64_t multiplier, const secateur_convolution& s, const float* x,
                           float* y, const secateur_epilogue& after, const secateur_plan& plan) {
  const Extent extent(s);
  const int64_t taps = int64_t{s.kernel_height} * s.kernel_width;
  const Image image{s.channels * multiplier, extent.height * extent.width, s.y_block};
  const int64_t out = floats_of(image.channels, extent.height, extent.width, s.y_block);
  const int32_t status =
      for_channels(s, extent, x, 0.0f, plan.threads, [&](int64_t b, int64_t channel, int64_t lanes, auto look) {
        const secateur_epilogue own = of_image(after, b * out);
        float* weights = scratch(kVector).at_least(taps * kWidth);
        for (int64_t m = 0; m < multiplier; ++m) {
          vec<kWidth> start{};
          for (int64_t lane = 0; lane < kWidth; ++lane) {
            const int64_t row = (channel + lane) * multiplier + m;
            if (lane < lanes && after.bias != nullptr) start[lane] = after.bias[row];
            for (int64_t tap = 0; tap < taps; ++tap)
              weights[tap * kWidth + lane] = lane < lanes ? kernels[row * taps + tap] : 0.0f;
          }
          see_all<Sums>(s, extent, look(), weights, start,
                        {image, y + b * out, own, channel * multiplier + m, multiplier, lanes});
        }
      });
  for (int64_t b = 0; b < s.batch; ++b) clear_beyond(y + b * out, image.channels, image.pixels, s.y_block);
  return status;
}

inline int32_t max_pool2d(const secateur_convolution& s, const float* x, float* y, const secateur_plan& plan) {
  const Extent extent(s);
  const float lowest = -__builtin_inff();
  const int64_t taps = int64_t{s.kernel_height} * s.kernel_width;
  const Image image{s.channels, extent.height * extent.width, s.y_block};
  const int64_t out = floats_of(s.channels, extent.height, extent.width, s.y_block);
  const secateur_epilogue nothing{};
  const int32_t status =
      for_channels(s, extent, x, lowest, plan.threads, [&](int64_t b, int64_t channel, int64_t lanes, auto look) {
        const float* weights = scratch(kVector).at_least(taps * kWidth);  // of no matter
        see_all<Largest>(s, extent, look(), weights, splat<kWidth>(lowest),
                         {image, y + b * out, nothing, channel, 1, lanes});
      });
  for (int64_t b = 0; b < s.batch; ++b) clear_beyond(y + b * out, s.channels, image.pixels, s.y_block);
  return status;
}

}  // namespace
}  // namespace secateur

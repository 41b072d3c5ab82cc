// Convolution as a product: pixels are the vectors, and what each tap of the kernel sees of them is a feature.
#pragma once

#include "windows.h"

namespace secateur {
namespace {

// An image in blocks, as the kernels like it: a panel is where it is.
class BlocksIn final : public Source {
 public:
  BlocksIn(const float* x, int64_t channels) : x_(x), channels_(channels) {}

  const float* panel(float* buffer, int64_t tile, int64_t position, int64_t, int64_t feature, int64_t count,
                     bool* spoiled) const override {
    const float* rows = x_ + (position / kImageBlock * channels_ + feature) * kImageBlock + position % kImageBlock;
    const auto row = [&](int64_t k) { return rows + k * kImageBlock; };
    // Lanes beyond the last pixel are there; what comes of them is thrown away.
    if (tile != kImageBlock || reinterpret_cast<uintptr_t>(rows) % 64 != 0) {
      *spoiled |= copy_rows(buffer, tile, tile, count, row);
      return buffer;
    }
    vec<kWidth> sum{};
    for (int64_t i = 0; i < count * kImageBlock; i += kWidth) sum += load<kWidth>(rows + i) * 0.0f;
    *spoiled |= any_spoiled<kWidth>(sum);
    return rows;
  }

  float value(int64_t feature, int64_t position) const override {
    return x_[(position / kImageBlock * channels_ + feature) * kImageBlock + position % kImageBlock];
  }

 private:
  const float* x_;
  int64_t channels_;
};

// Where a pixel of a channel is in an image of `channels`, in either layout.
struct Image {
  SECATEUR_INLINE int64_t place(int64_t channel, int64_t pixel) const {
    return block == 0 ? channel * pixels + pixel : (pixel / block * channels + channel) * block + pixel % block;
  }
  int64_t step() const { return block == 0 ? pixels : block; }  // from one channel to the next

  int64_t channels, pixels, block;
};

// Where an output image is, in either layout, while positions count a period per row.
class ImageOut final : public Sink {
 public:
  ImageOut(float* y, int64_t rows, int64_t height, int64_t width, int64_t period, int32_t block,
           const secateur_epilogue& after)
      : y_(y), image_{rows, height * width, block}, width_(width), period_(period), after_(after) {}

  int64_t direct(int64_t position, int64_t valid, int64_t tile, int64_t* stride) const override {
    // A block has room for the lanes beyond the last pixel; `clear_beyond` follows.
    if (period_ != width_ || (valid < tile && image_.block == 0)) return -1;
    *stride = image_.step();
    return image_.place(0, position);
  }

  void put(const float* sums, int64_t tile, int64_t position, int64_t valid, int64_t row,
           int64_t rows) const override {
    const int64_t end = position + least(valid, tile);
    const int64_t line = period_ == width_ ? image_.pixels : width_;  // pixels that follow each other
    const int64_t step = period_ == width_ ? line : period_;          // and positions from one such run to the next
    for (int64_t y = position / step; y * step < end; ++y) {
      const int64_t begin = most(position, y * step), last = least(end, y * step + line);
      for (int64_t at = begin; at < last;) {  // runs of the output
        const int64_t pixel = y * line + (at - y * step);
        const int64_t count = image_.block == 0 ? last - at : least(last - at, image_.block - pixel % image_.block);
        for (int64_t r = 0; r < rows; ++r)
          put_row(sums + r * tile + (at - position), count, image_.place(row + r, pixel), y_, after_);
        at += count;
      }
    }
  }

  void spoil(int64_t row, int64_t position) const override {
    if (position % period_ >= width_) return;
    y_[image_.place(row, position / period_ * width_ + position % period_)] = __builtin_nanf("");
  }

 private:
  float* y_;
  Image image_;
  int64_t width_, period_;
  secateur_epilogue after_;
};

inline bool pointwise(const secateur_convolution& s) {
  return s.kernel_height == 1 && s.kernel_width == 1 && s.stride_height == 1 && s.stride_width == 1 &&
         s.pad_top + s.pad_left + s.pad_bottom + s.pad_right == 0;
}

inline secateur_epilogue of_image(const secateur_epilogue& after, int64_t offset) {
  secateur_epilogue own = after;
  if (own.residual != nullptr) own.residual += offset;
  return own;
}

inline int64_t floats_of(int64_t channels, int64_t height, int64_t width, int32_t block) {
  return channels * (block == 0 ? height * width : divide_up(height * width, block) * block);
}

// Lanes beyond the last pixel of an image in blocks.
inline void clear_beyond(float* y, int64_t rows, int64_t pixels, int32_t block) {
  if (block == 0 || pixels % block == 0) return;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t lane = pixels % block; lane < block; ++lane) y[(pixels / block * rows + row) * block + lane] = 0.0f;
}

// One image; `threads` work on it.
inline int32_t convolve(const secateur_panelled& w, const Geometry& geometry, const float* x, float* y,
                        const secateur_epilogue& after, int32_t tile, int32_t threads) {
  const secateur_convolution& s = geometry.shape;
  const bool direct = pointwise(s);
  const int64_t pixels = geometry.height * geometry.width;
  const ImageOut sink(y, w.rows, geometry.height, geometry.width, geometry.period, s.y_block, after);
  const Vectors plain(x, 1, pixels);
  const BlocksIn blocks(x, s.channels);
  const Taps unfolded(geometry, x);
  const Source& source = !direct ? static_cast<const Source&>(unfolded)
                         : s.x_block == 0 ? static_cast<const Source&>(plain) : blocks;
  const int32_t status = run_product({w, source, sink, y, after, Tiles(w, geometry.positions(), tile)}, threads);
  clear_beyond(y, w.rows, pixels, s.y_block);
  return status;
}

inline int32_t conv2d(const secateur_panelled& w, const secateur_convolution& s, const float* x, float* y,
                      const secateur_epilogue& after, const secateur_plan& plan) {
  int32_t tile = tile_for(w, Extent(s).positions(), plan.tile);
  if ((s.x_block != 0 || s.y_block != 0) && tile > kImageBlock) tile = kImageBlock;
  const Geometry geometry(s, tile);
  const int64_t in = floats_of(s.channels, s.height, s.width, s.x_block);
  const int64_t out = floats_of(w.rows, geometry.height, geometry.width, s.y_block);
  const bool by_image = s.batch >= plan.threads;
  if (!by_image || plan.threads == 1) {
    for (int64_t b = 0; b < s.batch; ++b) {
      const int32_t status =
          convolve(w, geometry, x + b * in, y + b * out, of_image(after, b * out), tile, plan.threads);
      if (status != SECATEUR_OK) return status;
    }
    return SECATEUR_OK;
  }
  std::atomic<int32_t> status{SECATEUR_OK};
  const int32_t whole = in_parallel(s.batch, plan.threads, [&](int64_t b) {
    const int32_t one = convolve(w, geometry, x + b * in, y + b * out, of_image(after, b * out), tile, 1);
    if (one != SECATEUR_OK) status.store(one);
  });
  return whole != SECATEUR_OK ? whole : status.load();
}

}  // namespace
}  // namespace secateur

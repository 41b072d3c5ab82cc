// Convolution as a product: the image is laid out once so that every tap of the kernel is a shift of whole rows.
#pragma once

#include "spmm.h"

namespace secateur {
namespace {

// A padded image, split by stride into phases: plane (a, b) of a channel has the pixels whose padded row is a and whose
// padded column is b, modulo the strides. All taps of one output row are then contiguous in some plane, `period` floats
// per row, and an output position is a shift. Columns of the output from its width to the period are computed and
// thrown away. Where rows are not subsampled, the padding right of a row is that left of the next one. Phases that no
// tap of the kernel meets are left out: a kernel of one tap with a stride of two needs a quarter of the image.
struct Planes {
  explicit Planes(const secateur_convolution& s)
      : shape(s),
        reach_height(int64_t{s.kernel_height - 1} * s.dilation_height),
        reach_width(int64_t{s.kernel_width - 1} * s.dilation_width),
        height((s.height + s.pad_top + s.pad_bottom - reach_height - 1) / s.stride_height + 1),
        width((s.width + s.pad_left + s.pad_right - reach_width - 1) / s.stride_width + 1) {
    const int64_t share = s.stride_width == 1 ? least(least(s.pad_left, s.pad_right), reach_width) : 0;
    period = width + reach_width / s.stride_width - share;
    rows = height + reach_height / s.stride_height;
    slack = kWidestTile + reach_width / s.stride_width;
    plane = rows * period + share + slack;
    phase_columns = least(s.stride_width, reach_width + 1);
    phases = least(s.stride_height, reach_height + 1) * phase_columns;
    taps = int64_t{s.kernel_height} * s.kernel_width;
    int64_t* table = reinterpret_cast<int64_t*>(scratch(kShifts).at_least(2 * taps));
    for (int64_t tap = 0; tap < taps; ++tap) table[tap] = shift_of(tap);
    shifts = table;
  }

  int64_t positions() const { return height * period; }
  int64_t size() const { return shape.channels * phases * plane + slack; }

  // Where a tap of the kernel begins, from the first plane of its channel.
  int64_t shift_of(int64_t tap) const {
    const int64_t dy = tap / shape.kernel_width * shape.dilation_height;
    const int64_t dx = tap % shape.kernel_width * shape.dilation_width;
    const int64_t phase = dy % shape.stride_height * phase_columns + dx % shape.stride_width;
    return phase * plane + dy / shape.stride_height * period + dx / shape.stride_width;
  }

  // Everything of a channel's planes that no pixel is copied to.
  void clear_margins(float* planes) const {
    const secateur_convolution& s = shape;
    if (s.stride_height != 1 || s.stride_width != 1) {  // pixels of a row go to several planes
      std::memset(planes, 0, static_cast<size_t>(phases * plane) * 4);
      return;
    }
    const auto clear = [&](int64_t begin, int64_t end) {
      if (end > begin) std::memset(planes + begin, 0, static_cast<size_t>(end - begin) * 4);
    };
    int64_t end = 0;  // of the pixels of the row before
    for (int64_t y = 0; y < s.height; ++y) {
      const int64_t row = (y + s.pad_top) * period + s.pad_left;
      clear(end, row);
      end = row + s.width;
    }
    clear(end, plane);
  }

  // One row of one channel of the image, to the plane or planes that it belongs to.
  void lay_out(const float* image, int64_t channel, int64_t y, float* planes) const {
    const secateur_convolution& s = shape;
    const int64_t padded = y + s.pad_top, phase_row = padded % s.stride_height;
    if (s.width == 0 || padded / s.stride_height >= rows || phase_row > reach_height) return;
    float* row = planes + phase_row * phase_columns * plane + padded / s.stride_height * period;
    if (s.stride_width == 1) {
      read(image, channel, y * s.width, s.width, row + s.pad_left);
      return;
    }
    const float* from = image + (channel * s.height + y) * s.width;
    if (s.x_block != 0) {
      float* line = scratch(kVector).at_least(s.width);
      read(image, channel, y * s.width, s.width, line);
      from = line;
    }
    for (int64_t phase = 0; phase < phase_columns; ++phase) {
      // Columns x with (x + pad_left) % stride == phase.
      int64_t x = (phase - s.pad_left) % s.stride_width;
      if (x < 0) x += s.stride_width;
      int64_t at = (x + s.pad_left) / s.stride_width;
      float* to = row + phase * plane;
      for (; x < s.width && at < period; x += s.stride_width) to[at++] = from[x];
    }
  }

 private:
  // Copies pixels [begin, begin + count) of a channel: they lie in one run, or in blocks.
  SECATEUR_INLINE void read(const float* image, int64_t channel, int64_t begin, int64_t count, float* to) const {
    if (shape.x_block == 0) {
      std::memcpy(to, image + channel * shape.height * shape.width + begin, static_cast<size_t>(count) * 4);
      return;
    }
    while (count > 0) {
      const int64_t lane = begin % kImageBlock, some = least(count, kImageBlock - lane);
      const float* from = image + (begin / kImageBlock * shape.channels + channel) * kImageBlock + lane;
      std::memcpy(to, from, static_cast<size_t>(some) * 4);
      begin += some, count -= some, to += some;
    }
  }

 public:
  secateur_convolution shape;
  int64_t reach_height, reach_width;
  int64_t height, width;  // of the output
  int64_t period, rows;
  int64_t slack;  // the last tile of a far tap reads beyond the last row
  int64_t plane, phase_columns, phases, taps;
  const int64_t* shifts = nullptr;  // of the taps; in the scratch memory of the thread that made them
};

class Taps final : public Source {
 public:
  Taps(const Planes& planes, const float* data) : planes_(planes), data_(data) {}

  const float* panel(float* buffer, int64_t tile, int64_t position, int64_t, int64_t feature, int64_t count,
                     bool* spoiled) const override {
    const int64_t taps = planes_.taps, step = planes_.phases * planes_.plane;
    const float* channel = data_ + feature / taps * step + position;
    int64_t tap = feature % taps;
    *spoiled |= copy_rows(buffer, tile, tile, count, [&](int64_t) {
      const float* from = channel + planes_.shifts[tap];
      if (++tap == taps) tap = 0, channel += step;
      return from;
    });
    return buffer;
  }

  float value(int64_t feature, int64_t position) const override {
    if (position % planes_.period >= planes_.width) return 0.0f;  // thrown away
    const int64_t taps = planes_.taps;
    return data_[feature / taps * planes_.phases * planes_.plane + planes_.shifts[feature % taps] + position];
  }

 private:
  const Planes& planes_;
  const float* data_;
};

// An image in blocks, as the kernels like it: a panel is where it is.
class BlocksIn final : public Source {
 public:
  BlocksIn(const float* x, int64_t channels) : x_(x), channels_(channels) {}

  const float* panel(float* buffer, int64_t tile, int64_t position, int64_t valid, int64_t feature, int64_t count,
                     bool* spoiled) const override {
    const float* rows = x_ + (position / kImageBlock * channels_ + feature) * kImageBlock + position % kImageBlock;
    const auto row = [&](int64_t k) { return rows + k * kImageBlock; };
    if (tile != kImageBlock || valid < tile || reinterpret_cast<uintptr_t>(rows) % 64 != 0) {
      *spoiled |= copy_rows(buffer, tile, valid, count, row);
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

// Where an output image is, in either layout, while positions count a period per row.
class ImageOut final : public Sink {
 public:
  ImageOut(float* y, int64_t rows, int64_t height, int64_t width, int64_t period, int32_t block,
           const secateur_epilogue& after)
      : y_(y), rows_(rows), height_(height), width_(width), period_(period), block_(block), after_(after) {}

  int64_t direct(int64_t position, int64_t valid, int64_t tile, int64_t* stride) const override {
    if (period_ != width_ || valid < tile) return -1;
    *stride = block_ == 0 ? height_ * width_ : block_;
    return place(0, position);
  }

  void put(const float* sums, int64_t tile, int64_t position, int64_t valid, int64_t row,
           int64_t rows) const override {
    const int64_t end = position + least(valid, tile);
    for (int64_t y = position / period_; y * period_ < end; ++y) {
      const int64_t begin = most(position, y * period_), last = least(end, y * period_ + width_);
      for (int64_t at = begin; at < last;) {  // runs of the output
        const int64_t pixel = y * width_ + (at - y * period_);
        const int64_t count = block_ == 0 ? last - at : least(last - at, block_ - pixel % block_);
        for (int64_t r = 0; r < rows; ++r)
          put_row(sums + r * tile + (at - position), count, place(row + r, pixel), y_, after_);
        at += count;
      }
    }
  }

  void spoil(int64_t row, int64_t position) const override {
    if (position % period_ >= width_) return;
    y_[place(row, position / period_ * width_ + position % period_)] = __builtin_nanf("");
  }

 private:
  SECATEUR_INLINE int64_t place(int64_t row, int64_t pixel) const {
    if (block_ == 0) return row * height_ * width_ + pixel;
    return (pixel / block_ * rows_ + row) * block_ + pixel % block_;
  }

  float* y_;
  int64_t rows_, height_, width_, period_, block_;
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

// One image; `threads` work on it.
inline int32_t convolve(const secateur_panelled& w, const Planes& planes, const float* x, float* y,
                        const secateur_epilogue& after, int32_t tile, int32_t threads) {
  const secateur_convolution& s = planes.shape;
  const bool direct = pointwise(s);
  const int64_t pixels = planes.height * planes.width;
  if (s.y_block != 0)  // lanes beyond the last pixel
    for (int64_t row = 0; pixels % s.y_block != 0 && row < w.rows; ++row)
      for (int64_t lane = pixels % s.y_block; lane < s.y_block; ++lane)
        y[(pixels / s.y_block * w.rows + row) * s.y_block + lane] = 0.0f;
  const int64_t period = direct ? planes.width : planes.period;
  const ImageOut sink(y, w.rows, planes.height, planes.width, period, s.y_block, after);
  const RunCell run = cell_for(w, tile);
  if (direct) {
    const Vectors plain(x, 1, pixels);
    const BlocksIn blocks(x, s.channels);
    const Source& source = s.x_block == 0 ? static_cast<const Source&>(plain) : blocks;
    return run_product({w, source, sink, y, pixels, after, tile, run}, threads);
  }
  float* data = scratch(kPlanes).at_least(planes.size());
  const int64_t step = planes.phases * planes.plane;
  int32_t status;
  if (s.x_block == 0) {
    status = in_parallel(s.channels, threads, [&](int64_t c) {
      planes.clear_margins(data + c * step);
      for (int64_t row = 0; row < s.height; ++row) planes.lay_out(x, c, row, data + c * step);
    });
  } else {  // along the blocks, which hold all channels of some pixels
    for (int64_t c = 0; c < s.channels; ++c) planes.clear_margins(data + c * step);
    status = in_parallel(s.height, threads, [&](int64_t row) {
      for (int64_t c = 0; c < s.channels; ++c) planes.lay_out(x, c, row, data + c * step);
    });
  }
  if (status != SECATEUR_OK) return status;
  for (int64_t i = planes.size() - planes.slack; i < planes.size(); ++i) data[i] = 0.0f;
  const Taps source(planes, data);
  return run_product({w, source, sink, y, planes.positions(), after, tile, run}, threads);
}

inline int32_t conv2d(const secateur_panelled& w, const secateur_convolution& s, const float* x, float* y,
                      const secateur_epilogue& after, const secateur_plan& plan) {
  const Planes planes(s);
  const int64_t positions = pointwise(s) ? s.height * s.width : planes.positions();
  int32_t tile = tile_for(w, positions, plan.tile);
  if ((s.x_block != 0 || s.y_block != 0) && tile > kImageBlock) tile = kImageBlock;
  const int64_t in = floats_of(s.channels, s.height, s.width, s.x_block);
  const int64_t out = floats_of(w.rows, planes.height, planes.width, s.y_block);
  const bool by_image = s.batch >= plan.threads;
  if (!by_image || plan.threads == 1) {
    for (int64_t b = 0; b < s.batch; ++b) {
      const int32_t status =
          convolve(w, planes, x + b * in, y + b * out, of_image(after, b * out), tile, plan.threads);
      if (status != SECATEUR_OK) return status;
    }
    return SECATEUR_OK;
  }
  std::atomic<int32_t> status{SECATEUR_OK};
  const int32_t whole = in_parallel(s.batch, plan.threads, [&](int64_t b) {
    const int32_t one = convolve(w, planes, x + b * in, y + b * out, of_image(after, b * out), tile, 1);
    if (one != SECATEUR_OK) status.store(one);
  });
  return whole != SECATEUR_OK ? whole : status.load();
}

}  // namespace
}  // namespace secateur

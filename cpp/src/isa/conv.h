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
  }

  int64_t positions() const { return height * period; }
  int64_t size() const { return shape.channels * phases * plane + slack; }

  // Where a tap of the kernel begins, from the first plane of its channel.
  int64_t shift(int64_t tap) const {
    const int64_t dy = tap / shape.kernel_width * shape.dilation_height;
    const int64_t dx = tap % shape.kernel_width * shape.dilation_width;
    const int64_t phase = dy % shape.stride_height * phase_columns + dx % shape.stride_width;
    return phase * plane + dy / shape.stride_height * period + dx / shape.stride_width;
  }

  void lay_out(const float* channel, float* planes) const {
    const secateur_convolution& s = shape;
    for (int64_t i = 0; i < phases * plane; ++i) planes[i] = 0.0f;
    if (s.width == 0) return;
    for (int64_t y = 0; y < s.height; ++y) {
      const int64_t padded = y + s.pad_top, phase_row = padded % s.stride_height;
      if (padded / s.stride_height >= rows) break;
      if (phase_row > reach_height) continue;
      float* row = planes + phase_row * phase_columns * plane + padded / s.stride_height * period;
      const float* from = channel + y * s.width;
      if (s.stride_width == 1) {
        std::memcpy(row + s.pad_left, from, static_cast<size_t>(s.width) * 4);
        continue;
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
  }

  secateur_convolution shape;
  int64_t reach_height, reach_width;
  int64_t height, width;  // of the output
  int64_t period, rows;
  int64_t slack;  // the last tile of a far tap reads beyond the last row
  int64_t plane, phase_columns, phases;
};

class Taps final : public Source {
 public:
  Taps(const Planes& planes, const float* data) : planes_(planes), data_(data) {}

  bool fill(float* panel, int64_t tile, int64_t position, int64_t, int64_t feature, int64_t count) const override {
    const int64_t taps = int64_t{planes_.shape.kernel_height} * planes_.shape.kernel_width;
    int64_t channel = feature / taps, tap = feature % taps;
    return copy_rows(panel, tile, tile, count, [&](int64_t) {
      const float* from = data_ + channel * planes_.phases * planes_.plane + planes_.shift(tap) + position;
      if (++tap == taps) tap = 0, ++channel;
      return from;
    });
  }

  float value(int64_t feature, int64_t position) const override {
    if (position % planes_.period >= planes_.width) return 0.0f;  // thrown away
    const int64_t taps = int64_t{planes_.shape.kernel_height} * planes_.shape.kernel_width;
    return data_[feature / taps * planes_.phases * planes_.plane + planes_.shift(feature % taps) + position];
  }

 private:
  const Planes& planes_;
  const float* data_;
};

class ImageOut final : public Sink {
 public:
  ImageOut(const Planes& planes, float* y, const secateur_epilogue& after) : planes_(planes), y_(y), after_(after) {}

  float* direct(int64_t position, int64_t valid, int64_t tile, int64_t* stride) const override {
    if (planes_.period != planes_.width || valid < tile) return nullptr;
    *stride = planes_.positions();
    return y_ + position;
  }

  void put(const float* sums, int64_t tile, int64_t position, int64_t valid, int64_t row,
           int64_t rows) const override {
    const int64_t end = position + least(valid, tile), image = planes_.height * planes_.width;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t y = position / planes_.period; y * planes_.period < end; ++y) {
        const int64_t begin = most(position, y * planes_.period);
        const int64_t count = least(end, y * planes_.period + planes_.width) - begin;
        if (count <= 0) continue;
        const float* from = sums + r * tile + (begin - position);
        const int64_t at = (row + r) * image + y * planes_.width + (begin - y * planes_.period);
        put_row(from, count, at, y_, after_);
      }
  }

  void spoil(int64_t row, int64_t position) const override {
    if (position % planes_.period >= planes_.width) return;
    const int64_t pixel = position / planes_.period * planes_.width + position % planes_.period;
    y_[row * planes_.height * planes_.width + pixel] = __builtin_nanf("");
  }

 private:
  const Planes& planes_;
  float* y_;
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

// One image; `threads` work on it.
inline int32_t convolve(const secateur_panelled& w, const Planes& planes, const float* x, float* y,
                        const secateur_epilogue& after, int32_t tile, int32_t threads) {
  const secateur_convolution& s = planes.shape;
  if (pointwise(s)) {
    const int64_t pixels = s.height * s.width;
    const Vectors source(x, 1, pixels);
    const VectorsOut sink(y, 1, pixels, after);
    return run_product({w, source, sink, pixels, after, tile, cell_for(w, tile)}, threads);
  }
  float* data = scratch(kPlanes).at_least(planes.size());
  parallel_for(s.channels, threads, [&](int64_t c) {
    planes.lay_out(x + c * s.height * s.width, data + c * planes.phases * planes.plane);
  });
  for (int64_t i = planes.size() - planes.slack; i < planes.size(); ++i) data[i] = 0.0f;
  const Taps source(planes, data);
  const ImageOut sink(planes, y, after);
  return run_product({w, source, sink, planes.positions(), after, tile, cell_for(w, tile)}, threads);
}

inline int32_t conv2d(const secateur_panelled& w, const secateur_convolution& s, const float* x, float* y,
                      const secateur_epilogue& after, const secateur_plan& plan) {
  const Planes planes(s);
  const int64_t positions = pointwise(s) ? s.height * s.width : planes.positions();
  const int32_t tile = tile_for(w, positions, plan.tile);
  const int64_t in = s.channels * s.height * s.width, out = w.rows * planes.height * planes.width;
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

// What the cases of the randomised test share: numbers that hurt, what comes behind a sum, packed weights that come back
// as they were, runs on several threads, images.
#pragma once

#include <cinttypes>

#include "plain.h"

namespace plain {

constexpr float kUntouched = -12345.0f;
constexpr int32_t kActivations = 6;

// Now and then something that a dense layer would turn into NaN.
inline void poison(Random& random, Floats& x) {
  if (x.size() == 0 || !random.chance(0.25)) return;
  for (int64_t i = random.between(1, 3); i > 0; --i)
    x[random.between(0, x.size() - 1)] = random.of({NAN, INFINITY, -INFINITY});
}

struct Afterwards {
  Floats bias, residual;
  secateur_epilogue epilogue;

  Afterwards(Random& random, int64_t rows, int64_t outputs)
      : bias(Floats::numbers(random, rows)),
        residual(Floats::numbers(random, outputs)),
        epilogue{random.chance(0.6) ? bias.data() : nullptr, random.chance(0.4) ? residual.data() : nullptr,
                 static_cast<int32_t>(random.between(0, kActivations - 1))} {}
  Afterwards(const Afterwards&) = delete;

  void add(Sum& sum, int64_t row, int64_t at) const {
    if (epilogue.bias != nullptr) sum.add(epilogue.bias[row]);
    if (epilogue.residual != nullptr) sum.add(epilogue.residual[at]);
  }
};

struct Block {
  int32_t rows, columns;
};

inline Panelled packed(Random& random, const std::vector<float>& w, int64_t rows, int64_t columns) {
  const Block block = random.of<Block>({{1, 1}, {4, 1}, {1, 4}});
  const int32_t panel = block.columns * random.of({1, 4, 16, 32, 64, 128, 256, 257, 400, 65536});
  Panelled out(w, rows, columns, block.rows, block.columns, panel, random.of({1, 2, 3, 4, 7, 50}));
  expect_status(out.check(), SECATEUR_OK, "panelled_check");
  std::vector<float> back(w.size(), kUntouched);
  expect_status(secateur_panelled_unpack(&out.header, back.data()), SECATEUR_OK, "panelled_unpack");
  expect(back == w, "a panelled weight comes back as it was");
  return out;
}

inline std::string named(const char* what, const Panelled& w, const std::string& isa, const secateur_plan& plan) {
  const secateur_panelled& h = w.header;
  char text[256];
  std::snprintf(text, sizeof text,
                "%s, %" PRId64 "x%" PRId64 ", blocks %dx%d, panel %d, parts %d, %s, tile %d, %d threads", what, h.rows,
                h.columns, h.block_rows, h.block_columns, h.panel, h.parts, isa.c_str(), plan.tile, plan.threads);
  return text;
}

// Runs on one, two and three threads, which must agree in every bit.
template <class Run>
Floats on_threads(Random& random, int64_t outputs, int32_t tile, const std::string& what, Run run) {
  Floats first(random, outputs);
  for (int32_t threads = 1; threads <= 3; ++threads) {
    Floats y(random, outputs);
    for (int64_t i = 0; i < outputs; ++i) y[i] = kUntouched;
    const secateur_plan plan = {threads, tile};
    expect_status(run(y.data(), plan), SECATEUR_OK, what);
    if (threads == 1) first = y;
    expect(same_bits(first, y), what + ": other bits on " + std::to_string(threads) + " threads");
  }
  return first;
}

// Where the pixels of images are: one run for each channel, or blocks of pixels with all their channels.
struct Images {
  int64_t channels, pixels, block;
  int64_t size() const { return channels * (block == 0 ? pixels : divide_up(pixels, block) * block); }
  int64_t at(int64_t image, int64_t channel, int64_t pixel) const {
    const int64_t inside =
        block == 0 ? channel * pixels + pixel : (pixel / block * channels + channel) * block + pixel % block;
    return image * size() + inside;
  }
};

inline secateur_convolution some_convolution(Random& random) {
  secateur_convolution s{};
  s.batch = random.of<int64_t>({0, 1, 1, 2, 3, 5}), s.channels = random.of<int64_t>({0, 1, 2, 3, 5, 8});
  s.height = random.between(0, 14), s.width = random.of<int64_t>({0, 1, 2, 5, 8, 9, 13, 16, 30, 70});
  s.kernel_height = s.kernel_width = s.stride_height = s.stride_width = s.dilation_height = s.dilation_width = 1;
  s.x_block = random.of({0, secateur_image_block()}), s.y_block = random.of({0, secateur_image_block()});
  if (random.chance(0.2)) return s;  // a product, pixel by pixel
  s.kernel_height = static_cast<int32_t>(random.between(1, 4)),
  s.kernel_width = static_cast<int32_t>(random.between(1, 5));
  s.stride_height = random.of({1, 1, 2, 3}), s.stride_width = random.of({1, 1, 2, 3});
  s.dilation_height = random.of({1, 1, 2, 3}), s.dilation_width = random.of({1, 1, 2, 3});
  for (int32_t* pad : {&s.pad_top, &s.pad_left, &s.pad_bottom, &s.pad_right}) *pad = random.of({0, 1, 1, 2, 5});
  if (random.chance(0.1)) {  // a kernel that reaches far
    s.dilation_width = random.of({200, 431});
    s.width = (s.kernel_width - 1) * s.dilation_width + 3;
  }
  if (random.chance(0.05)) s.pad_left = 700;
  return s;
}

inline std::string named(const secateur_convolution& s) {
  char text[256];
  std::snprintf(text, sizeof text,
                ", image %" PRId64 "x%" PRId64 "x%" PRId64 "x%" PRId64
                ", kernel %dx%d, stride %dx%d, dilation %dx%d, padding %d %d %d %d, blocks %d to %d",
                s.batch, s.channels, s.height, s.width, s.kernel_height, s.kernel_width, s.stride_height,
                s.stride_width, s.dilation_height, s.dilation_width, s.pad_top, s.pad_left, s.pad_bottom, s.pad_right,
                s.x_block, s.y_block);
  return text;
}

// Whether the kernel fits in the image, and then the size of the output.
inline bool fits(const secateur_convolution& s, int64_t* height, int64_t* width) {
  const int64_t span_y = s.height + s.pad_top + s.pad_bottom - int64_t{s.kernel_height - 1} * s.dilation_height;
  const int64_t span_x = s.width + s.pad_left + s.pad_right - int64_t{s.kernel_width - 1} * s.dilation_width;
  if (span_y < 1 || span_x < 1) return false;
  *height = (span_y - 1) / s.stride_height + 1, *width = (span_x - 1) / s.stride_width + 1;
  return true;
}

inline Floats some_images(Random& random, const secateur_convolution& s, const Images& in) {
  Floats x = Floats::numbers(random, s.batch * in.size());
  poison(random, x);
  for (int64_t i = 0; i < s.batch * s.channels; ++i)  // lanes beyond the last pixel hold anything finite
    for (int64_t lane = in.pixels; in.block != 0 && lane < divide_up(in.pixels, in.block) * in.block; ++lane)
      x[in.at(i / s.channels, i % s.channels, lane)] = 3e38f;
  return x;
}

}  // namespace plain

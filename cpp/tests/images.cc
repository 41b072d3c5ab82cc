// Convolutions, depthwise ones, and maxima over images.

#include <algorithm>

#include "cases.h"

namespace plain {
namespace {

struct Output {
  int64_t at;
  Sum sum;
};

void compare_images(const std::vector<Output>& outputs, int32_t activation, const Floats& y, const std::string& what) {
  std::vector<char> seen(static_cast<size_t>(y.size()));
  for (const Output& one : outputs) {
    seen[static_cast<size_t>(one.at)] = 1;
    if (!close(one.sum, activation, y[one.at]))
      fail(what + ": output " + std::to_string(one.at) + " is " + std::to_string(y[one.at]) + ", expected " +
           std::to_string(activated(one.sum.value, activation)));
  }
  for (int64_t i = 0; i < y.size(); ++i)
    expect(seen[static_cast<size_t>(i)] || (std::isfinite(y[i]) && y[i] != kUntouched),
           what + ": lanes beyond the last pixel are left as they were");
}

// One output before its epilogue, of pixels by channel and place.
template <class Seen>
Sum plain_pixel(const secateur_convolution& s, const float* row, Seen seen, int64_t i, int64_t j) {
  Sum sum;
  const int64_t taps = int64_t{s.kernel_height} * s.kernel_width;
  for (int64_t c = 0; c < s.channels * taps; ++c) {
    const int64_t v = i * s.stride_height + c % taps / s.kernel_width * s.dilation_height - s.pad_top;
    const int64_t u = j * s.stride_width + c % s.kernel_width * s.dilation_width - s.pad_left;
    const bool inside = v >= 0 && v < s.height && u >= 0 && u < s.width;
    sum.multiply(row[c], inside ? seen(c / taps, v * s.width + u) : 0.0f);
  }
  return sum;
}

}  // namespace

void convolution_case(Random& random) {
  const secateur_convolution s = some_convolution(random);
  const int64_t rows = random.of<int64_t>({0, 1, 2, 4, 5, 9, 16});
  const int64_t columns = s.channels * s.kernel_height * s.kernel_width;
  const std::vector<float> dense = weights(random, rows, columns);
  const Panelled w = packed(random, dense, rows, columns);
  const Images in = {s.channels, s.height * s.width, s.x_block};
  const Floats x = some_images(random, s, in);
  int64_t height = 0, width = 0;
  if (!fits(s, &height, &width)) {
    expect_status(secateur_conv2d(&w.header, &s, x.data(), nullptr, nullptr, nullptr), SECATEUR_BAD_ARGUMENT,
                  "a kernel larger than the image");
    return;
  }
  const Images out = {rows, height * width, s.y_block};
  const Afterwards after(random, rows, s.batch * out.size());
  std::vector<Output> outputs;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t pixel = 0; pixel < height * width; ++pixel) {
        const auto seen = [&](int64_t channel, int64_t at) { return x[in.at(b, channel, at)]; };
        Output one = {out.at(b, r, pixel),
                      plain_pixel(s, dense.data() + r * columns, seen, pixel / width, pixel % width)};
        after.add(one.sum, r, one.at);
        outputs.push_back(one);
      }
  for (const std::string& isa : usable_isas()) {
    expect_status(secateur_use_isa(isa.c_str()), SECATEUR_OK, isa);
    const int32_t tile = random.of({0, 4, 8, 16, 32, 64, 128, 256});
    const std::string what = named("conv2d", w, isa, {0, tile}) + named(s);
    const Floats y = on_threads(random, s.batch * out.size(), tile, what, [&](float* to, const secateur_plan& plan) {
      return secateur_conv2d(&w.header, &s, x.data(), to, &after.epilogue, &plan);
    });
    compare_images(outputs, after.epilogue.activation, y, what);
  }
}

// Larger images than a sparse convolution has time for: strips of positions end in them.
void depthwise_case(Random& random) {
  secateur_convolution s = some_convolution(random);
  if (random.chance(0.12)) {
    s.batch = random.of({1, 2}), s.channels = random.of({1, 2, 3});
    s.height = random.between(20, 75), s.width = random.between(14, 75);
  } else if (random.chance(0.2)) {
    s.channels = random.of({31, 32, 33, 65}), s.height = s.height % 6;  // of which some go to every thread
  }
  if (random.chance(0.5)) s.kernel_height = static_cast<int32_t>(random.between(1, 9));
  const int64_t multiplier = random.of<int64_t>({1, 1, 1, 2, 3}), rows = s.channels * multiplier;
  const int64_t taps = int64_t{s.kernel_height} * s.kernel_width;
  Floats kernels(random, rows * taps);
  const std::vector<float> dense = weights(random, rows, taps);
  std::copy(dense.begin(), dense.end(), kernels.data());
  const Images in = {s.channels, s.height * s.width, s.x_block};
  Floats x = some_images(random, s, in);
  int64_t height = 0, width = 0;
  if (!fits(s, &height, &width)) {
    expect_status(secateur_depthwise2d(kernels.data(), multiplier, &s, x.data(), nullptr, nullptr, nullptr),
                  SECATEUR_BAD_ARGUMENT, "a kernel larger than the image");
    return;
  }
  const Images out = {rows, height * width, s.y_block};
  const Afterwards after(random, rows, s.batch * out.size());
  secateur_convolution one = s;  // channel, alone
  one.channels = 1;
  std::vector<Output> outputs;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t pixel = 0; pixel < height * width; ++pixel) {
        const int64_t channel = r / multiplier;
        const auto seen = [&](int64_t, int64_t at) { return x[in.at(b, channel, at)]; };
        Output output = {out.at(b, r, pixel), plain_pixel(one, &kernels[r * taps], seen, pixel / width, pixel % width)};
        after.add(output.sum, r, output.at);
        outputs.push_back(output);
      }
  for (const std::string& isa : usable_isas()) {
    expect_status(secateur_use_isa(isa.c_str()), SECATEUR_OK, isa);
    const std::string what =
        "depthwise2d, " + isa + ", " + std::to_string(multiplier) + " outputs of a channel" + named(s);
    const Floats y = on_threads(random, s.batch * out.size(), 0, what, [&](float* to, const secateur_plan& plan) {
      return secateur_depthwise2d(kernels.data(), multiplier, &s, x.data(), to, &after.epilogue, &plan);
    });
    compare_images(outputs, after.epilogue.activation, y, what);
  }
}

void max_pool_case(Random& random) {
  secateur_convolution s = some_convolution(random);
  if (random.chance(0.1)) s.height = random.between(20, 60), s.width = random.between(20, 60);  // several strips
  const Images in = {s.channels, s.height * s.width, s.x_block};
  Floats x = Floats::numbers(random, s.batch * in.size());
  poison(random, x);
  int64_t height = 0, width = 0;
  if (!fits(s, &height, &width)) {
    expect_status(secateur_max_pool2d(&s, x.data(), nullptr, nullptr), SECATEUR_BAD_ARGUMENT,
                  "a kernel larger than the image");
    return;
  }
  const Images out = {s.channels, height * width, s.y_block};
  for (const std::string& isa : usable_isas()) {
    expect_status(secateur_use_isa(isa.c_str()), SECATEUR_OK, isa);
    const std::string what = "max_pool2d, " + isa + named(s);
    const Floats y = on_threads(random, s.batch * out.size(), 0, what, [&](float* to, const secateur_plan& plan) {
      return secateur_max_pool2d(&s, x.data(), to, &plan);
    });
    std::vector<char> seen(static_cast<size_t>(y.size()));
    for (int64_t i = 0; i < s.batch * s.channels * height * width; ++i) {
      const int64_t pixel = i % (height * width), plane = i / (height * width);
      const int64_t image = plane / s.channels, channel = plane % s.channels;
      float best = -INFINITY;
      for (int64_t k = 0; k < int64_t{s.kernel_height} * s.kernel_width; ++k) {
        const int64_t v = pixel / width * s.stride_height + k / s.kernel_width * s.dilation_height - s.pad_top;
        const int64_t u = pixel % width * s.stride_width + k % s.kernel_width * s.dilation_width - s.pad_left;
        if (v < 0 || v >= s.height || u < 0 || u >= s.width) continue;
        const float value = x[in.at(image, channel, v * s.width + u)];
        if (!(value <= best)) best = std::isnan(best) ? best : value;
      }
      const int64_t at = out.at(image, channel, pixel);
      seen[static_cast<size_t>(at)] = 1;
      if (!(y[at] == best || (std::isnan(y[at]) && std::isnan(best))))
        fail(what + ": output " + std::to_string(at) + " is " + std::to_string(y[at]) + ", expected " +
             std::to_string(best));
    }
    for (int64_t i = 0; i < y.size(); ++i)
      expect(seen[static_cast<size_t>(i)] || y[i] == 0.0f, what + ": lanes beyond the last pixel are left as they were");
  }
}

}  // namespace plain

// A randomised test of the C interface: fuzz [CASES [FIRST]]. Every case is made from its own number, so that
// `fuzz 1 N` repeats case N alone. Built with sanitizers it also finds what reads or writes where it must not.

#include <algorithm>
#include <cinttypes>
#include <functional>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include "plain.h"

namespace plain {
namespace {

constexpr float kUntouched = -12345.0f;
constexpr int32_t kActivations = 6;

// Now and then something that a dense layer would turn into NaN.
void poison(Random& random, Floats& x) {
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

int64_t some_size(Random& random, int64_t most) {
  const int64_t size = random.of<int64_t>({0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 200});
  return size <= most ? size : random.between(1, most);
}

struct Block {
  int32_t rows, columns;
};

Panelled packed(Random& random, const std::vector<float>& w, int64_t rows, int64_t columns) {
  const Block block = random.of<Block>({{1, 1}, {4, 1}, {1, 4}});
  const int32_t panel = block.columns * random.of({1, 4, 16, 32, 64, 128, 256, 257, 400, 65536});
  Panelled out(w, rows, columns, block.rows, block.columns, panel, random.of({1, 2, 3, 4, 7, 50}));
  expect_status(out.check(), SECATEUR_OK, "panelled_check");
  std::vector<float> back(w.size(), kUntouched);
  expect_status(secateur_panelled_unpack(&out.header, back.data()), SECATEUR_OK, "panelled_unpack");
  expect(back == w, "a panelled weight comes back as it was");
  return out;
}

std::string named(const char* what, const Panelled& w, const std::string& isa, const secateur_plan& plan) {
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

// Sums of every output and where it lies, for positions in `x` laid out in any way.
std::vector<Sum> plain_product(const std::vector<float>& w, int64_t rows, int64_t columns, const Floats& x,
                               const Places& from, int64_t count) {
  std::vector<Sum> sums(static_cast<size_t>(rows * count));
  for (int64_t i = 0; i < count; ++i)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c)
        sums[static_cast<size_t>(i * rows + r)].multiply(w[static_cast<size_t>(r * columns + c)], x[from.at(i, c)]);
  return sums;
}

void compare(const std::vector<Sum>& sums, int64_t rows, const Places& to, int64_t count, const Afterwards& after,
             const Floats& y, const std::string& what) {
  std::vector<char> written(static_cast<size_t>(y.size()));
  for (int64_t i = 0; i < count; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      Sum sum = sums[static_cast<size_t>(i * rows + r)];
      const int64_t at = to.at(i, r);
      after.add(sum, r, at);
      written[static_cast<size_t>(at)] = 1;
      if (close(sum, after.epilogue.activation, y[at])) continue;
      fail(what + ", activation " + std::to_string(after.epilogue.activation) + ": row " + std::to_string(r) +
           " of vector " + std::to_string(i) + " is " + std::to_string(y[at]) + ", expected " +
           std::to_string(activated(sum.value, after.epilogue.activation)) + " of " + std::to_string(sum.value));
    }
  for (int64_t i = 0; i < y.size(); ++i)
    expect(written[static_cast<size_t>(i)] || y[i] == kUntouched, what + ": wrote between its outputs");
}

void one_vector(Random& random, const std::vector<float>& dense, const Panelled& w, const std::string& isa) {
  const int64_t rows = w.header.rows, columns = w.header.columns;
  Floats x = Floats::numbers(random, columns);
  poison(random, x);
  const Places from = {columns, 1, columns}, to = {rows, 1, rows};
  const Afterwards after(random, rows, rows);
  const std::vector<Sum> sums = plain_product(dense, rows, columns, x, from, 1);
  const std::string what = named("gemv", w, isa, {0, 0});
  compare(sums, rows, to, 1, after,
          on_threads(random, rows, 0, what,
                     [&](float* y, const secateur_plan& plan) {
                       return secateur_gemv(&w.header, x.data(), y, &after.epilogue, &plan);
                     }),
          what);
  const Bitmask bits(dense, rows, columns);
  expect_status(bits.check(), SECATEUR_OK, "bitmask_check");
  std::vector<float> back(dense.size(), kUntouched);
  expect_status(secateur_bitmask_unpack(&bits.header, back.data()), SECATEUR_OK, "bitmask_unpack");
  expect(back == dense, "a bitmask comes back as it was");
  const std::string name = named("gemv_bitmask", w, isa, {0, 0});
  compare(sums, rows, to, 1, after,
          on_threads(random, rows, 0, name,
                     [&](float* y, const secateur_plan& plan) {
                       return secateur_gemv_bitmask(&bits.header, x.data(), y, &after.epilogue, &plan);
                     }),
          name);
}

}  // namespace

void product_case(Random& random) {
  const int64_t rows = some_size(random, 200),
                columns = random.chance(0.1) ? random.between(258, 1200) : some_size(random, 200);
  const int64_t count = some_size(random, columns > 200 ? 20 : 129);
  const std::vector<float> dense = weights(random, rows, columns);
  const Panelled w = packed(random, dense, rows, columns);
  for (int layout = 0; layout < 2; ++layout) {
    const Places from = Places::of(random, count, columns, random.chance(0.5));
    const Places to = Places::of(random, count, rows, random.chance(0.5));
    Floats x = Floats::numbers(random, from.size);
    poison(random, x);
    const Afterwards after(random, rows, to.size);
    const std::vector<Sum> sums = plain_product(dense, rows, columns, x, from, count);
    for (const std::string& isa : usable_isas()) {
      expect_status(secateur_use_isa(isa.c_str()), SECATEUR_OK, isa);
      const int32_t tile = random.of({0, 1, 4, 8, 16, 32, 64, 128, 256});
      const std::string what = named("spmm", w, isa, {0, tile}) + ", " + std::to_string(count) + " vectors, x " +
                               std::to_string(from.step) + " y " + std::to_string(to.step);
      const Floats y = on_threads(random, to.size, tile, what, [&](float* out, const secateur_plan& plan) {
        return secateur_spmm(&w.header, x.data(), from.step, from.stride, out, to.step, to.stride, count,
                             &after.epilogue, &plan);
      });
      compare(sums, rows, to, count, after, y, what);
      if (layout == 0) one_vector(random, dense, w, isa);
    }
  }
}

namespace {

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

secateur_convolution some_convolution(Random& random) {
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

std::string named(const secateur_convolution& s) {
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
bool fits(const secateur_convolution& s, int64_t* height, int64_t* width) {
  const int64_t span_y = s.height + s.pad_top + s.pad_bottom - int64_t{s.kernel_height - 1} * s.dilation_height;
  const int64_t span_x = s.width + s.pad_left + s.pad_right - int64_t{s.kernel_width - 1} * s.dilation_width;
  if (span_y < 1 || span_x < 1) return false;
  *height = (span_y - 1) / s.stride_height + 1, *width = (span_x - 1) / s.stride_width + 1;
  return true;
}

Floats some_images(Random& random, const secateur_convolution& s, const Images& in) {
  Floats x = Floats::numbers(random, s.batch * in.size());
  poison(random, x);
  for (int64_t i = 0; i < s.batch * s.channels; ++i)  // lanes beyond the last pixel hold anything finite
    for (int64_t lane = in.pixels; in.block != 0 && lane < divide_up(in.pixels, in.block) * in.block; ++lane)
      x[in.at(i / s.channels, i % s.channels, lane)] = 3e38f;
  return x;
}

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

namespace {

// Images in a list of steps.
struct Value {
  int64_t channels, height, width;
  int32_t block;
  Images images() const { return {channels, height * width, block}; }
  bool operator==(const Value& v) const {
    return channels == v.channels && height == v.height && width == v.width && block == v.block;
  }
};

// Steps of which each works on what any earlier one left, and what they point to.
struct Steps {
  int64_t batch;
  std::vector<Value> values;
  std::vector<secateur_step> steps;
  std::vector<Panelled> packed;
  std::vector<Floats> kernels, biases;

  explicit Steps(Random& random) : batch(random.of<int64_t>({0, 1, 1, 2, 3})) {
    const int64_t count = random.between(0, 7);
    packed.reserve(8), kernels.reserve(8), biases.reserve(8);  // steps point to them
    const bool large = random.chance(0.06);
    const Value first = {random.between(1, 6), random.between(1, large ? 60 : 13), random.between(1, large ? 60 : 40),
                         0};
    for (int64_t i = random.between(1, 2); i > 0; --i) {
      values.push_back(first);
      values.back().block = random.of({0, secateur_image_block()});
    }
    for (int64_t i = 0; i < count; ++i) add(random);
  }
  Steps(const Steps&) = delete;

  void add(Random& random) {
    secateur_step step{};
    const int64_t last = static_cast<int64_t>(values.size()) - 1;
    step.x = static_cast<int32_t>(random.between(last > 2 ? last - 2 : 0, last)), step.residual = -1;
    step.y = static_cast<int32_t>(last + 1);
    const Value x = values[static_cast<size_t>(step.x)];
    Value y = {x.channels, 0, 0, random.of({0, secateur_image_block()})};
    secateur_convolution& s = step.shape;
    s = {batch, x.channels, x.height, x.width, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, x.block, y.block};
    if (random.chance(0.6)) {
      s.kernel_height = s.kernel_width = 3, s.stride_height = s.stride_width = random.of({1, 1, 1, 2});
      s.pad_top = s.pad_left = s.pad_bottom = s.pad_right = 1;
      if (random.chance(0.2)) s.pad_top = s.pad_left = 0;
    }
    step.kind = static_cast<int32_t>(random.between(SECATEUR_CONV2D, SECATEUR_MAX_POOL2D));
    step.activation = static_cast<int32_t>(random.between(0, kActivations - 1));
    if (step.kind == SECATEUR_MAX_POOL2D) step.activation = SECATEUR_NONE;
    if (!fits(s, &y.height, &y.width)) return;
    const int64_t taps = int64_t{s.kernel_height} * s.kernel_width;
    if (step.kind == SECATEUR_CONV2D) {
      y.channels = random.chance(0.5) ? x.channels : random.between(1, 9);
      const std::vector<float> dense = weights(random, y.channels, x.channels * taps);
      packed.push_back(plain::packed(random, dense, y.channels, x.channels * taps));
      step.weight = &packed.back().header, step.tile = random.of({0, 8, 64});
    } else if (step.kind == SECATEUR_DEPTHWISE2D) {
      step.multiplier = random.of<int64_t>({1, 1, 2});
      y.channels *= step.multiplier;
      kernels.push_back(Floats::numbers(random, y.channels * taps));
      step.kernels = kernels.back().data();
    }
    if (step.kind != SECATEUR_MAX_POOL2D) {
      biases.push_back(Floats::numbers(random, y.channels));
      if (random.chance(0.6)) step.bias = biases.back().data();
      for (int32_t i = 0; i <= last; ++i)
        if (values[static_cast<size_t>(i)] == y && random.chance(0.5)) step.residual = i;
    }
    values.push_back(y), steps.push_back(step);
  }

  // Every value in memory of its own, with the same inputs each time.
  std::vector<Floats> buffers(Random& random, const std::vector<Floats>& inputs) const {
    std::vector<Floats> all = inputs;
    for (size_t i = inputs.size(); i < values.size(); ++i) {
      all.emplace_back(random, batch * values[i].images().size());
      for (int64_t k = 0; k < all.back().size(); ++k) all.back()[k] = kUntouched;
    }
    return all;
  }

  // What one step does, called by itself.
  int32_t alone(const secateur_step& step, std::vector<Floats>& all) const {
    const auto at = [&](int32_t i) { return all[static_cast<size_t>(i)].data(); };
    const secateur_epilogue after = {step.bias, step.residual < 0 ? nullptr : at(step.residual), step.activation};
    const secateur_plan plan = {1, step.tile};
    if (step.kind == SECATEUR_CONV2D)
      return secateur_conv2d(step.weight, &step.shape, at(step.x), at(step.y), &after, &plan);
    if (step.kind == SECATEUR_DEPTHWISE2D)
      return secateur_depthwise2d(step.kernels, step.multiplier, &step.shape, at(step.x), at(step.y), &after, &plan);
    return secateur_max_pool2d(&step.shape, at(step.x), at(step.y), &plan);
  }
};

int32_t run(const std::vector<secateur_step>& steps, std::vector<Floats>& all, int32_t threads) {
  std::vector<float*> places;
  for (Floats& one : all) places.push_back(one.data());
  return secateur_run(steps.data(), static_cast<int64_t>(steps.size()), places.data(),
                      static_cast<int64_t>(places.size()), threads);
}

// One step that cannot be: nothing beyond it runs, and nothing is read or written where it must not.
void refused_run(Random& random, const Steps& steps, const std::vector<Floats>& inputs) {
  const int32_t count = static_cast<int32_t>(steps.values.size());
  const std::function<void(secateur_step&)> wrong[] = {
      [&](secateur_step& s) { s.x = random.of({-1, -2, count, INT32_MAX, INT32_MIN}); },
      [&](secateur_step& s) { s.y = random.of({-1, -2, count, INT32_MAX, INT32_MIN}); },
      [&](secateur_step& s) { s.residual = random.of({-2, count, INT32_MAX, INT32_MIN}); },
      [&](secateur_step& s) { s.kind = random.of({-1, 3, INT32_MAX, INT32_MIN}); },
      [&](secateur_step& s) { s.tile = s.kind == SECATEUR_CONV2D ? 24 : 0, s.kind = s.tile == 0 ? 7 : s.kind; },
      [&](secateur_step& s) { s.activation = s.kind == SECATEUR_MAX_POOL2D ? 0 : 6, s.shape.stride_width = 0; },
      [&](secateur_step& s) { s.weight = nullptr, s.multiplier = 0, s.shape.channels = -1; },
      [&](secateur_step& s) { s.shape.pad_left = -1; },
  };
  const size_t at = static_cast<size_t>(random.between(0, static_cast<int64_t>(steps.steps.size()) - 1));
  std::vector<secateur_step> bad = steps.steps;
  wrong[random.between(0, static_cast<int64_t>(std::size(wrong)) - 1)](bad[at]);
  std::vector<Floats> all = steps.buffers(random, inputs);
  expect_status(run(bad, all, 2), SECATEUR_BAD_ARGUMENT, "a step that cannot be");
  for (size_t i = inputs.size() + at; i < all.size(); ++i)
    for (int64_t k = 0; k < all[i].size(); ++k) expect(all[i][k] == kUntouched, "a step ran after one that cannot be");
}

}  // namespace

void run_case(Random& random) {
  const Steps steps(random);
  std::vector<Floats> inputs;
  for (size_t i = 0; i + steps.steps.size() < steps.values.size(); ++i) {
    const Value& v = steps.values[i];
    secateur_convolution s{};
    s.batch = steps.batch, s.channels = v.channels;
    inputs.push_back(some_images(random, s, v.images()));
  }
  const std::vector<std::string> isas = usable_isas();  // which has nothing to do with the order of the steps
  const std::string isa = isas[static_cast<size_t>(random.between(0, static_cast<int64_t>(isas.size()) - 1))];
  expect_status(secateur_use_isa(isa.c_str()), SECATEUR_OK, isa);
  std::vector<Floats> expected = steps.buffers(random, inputs);
  for (const secateur_step& step : steps.steps) expect_status(steps.alone(step, expected), SECATEUR_OK, "a step alone");
  for (int32_t threads = 1; threads <= 3; ++threads) {
    std::vector<Floats> found = steps.buffers(random, inputs);
    expect_status(run(steps.steps, found, threads), SECATEUR_OK, "a run");
    for (size_t i = 0; i < found.size(); ++i)
      expect(same_bits(found[i], expected[i]), "a run on " + isa + " and " + std::to_string(threads) +
                                                   " threads has other bits in value " + std::to_string(i));
  }
  if (!steps.steps.empty()) refused_run(random, steps, inputs);
  std::vector<Floats> all = steps.buffers(random, inputs);
  std::vector<float*> places(all.size());
  for (size_t i = 0; i < all.size(); ++i) places[i] = all[i].data();
  const int64_t count = static_cast<int64_t>(steps.steps.size()), buffers = static_cast<int64_t>(places.size());
  const auto refused = [](int32_t status, const char* what) { expect_status(status, SECATEUR_BAD_ARGUMENT, what); };
  refused(secateur_run(steps.steps.data(), -1, places.data(), buffers, 1), "a negative number of steps");
  expect_status(secateur_run(nullptr, 0, nullptr, 0, 1), SECATEUR_OK, "no steps");
  if (count == 0) return;
  refused(secateur_run(nullptr, count, places.data(), buffers, 1), "steps that are nowhere");
  refused(secateur_run(steps.steps.data(), count, nullptr, buffers, 1), "buffers that are nowhere");
  refused(secateur_run(steps.steps.data(), count, places.data(), 0, 1), "no buffers");
  refused(secateur_run(steps.steps.data(), count, places.data(), -1, 1), "a negative number of buffers");
  refused(secateur_run(steps.steps.data(), count, places.data(), buffers, -1), "a negative number of threads");
}

}  // namespace plain

#if defined(__SANITIZE_ADDRESS__)
// Memory that nobody has written is not a number, so that whoever computes with it is found out.
extern "C" const char* __asan_default_options() { return "max_malloc_fill_size=1000000000:malloc_fill_byte=255"; }
#endif

int main(int argc, char** argv) {
  using namespace plain;
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 400, first = argc > 2 ? std::atoll(argv[2]) : 0;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "in case %lld\n", static_cast<long long>(current_case)); });
#endif
  for (int64_t& i = current_case = first; i < first + cases; ++i) {
    Random random(static_cast<uint64_t>(i));
    product_case(random);
    convolution_case(random);
    max_pool_case(random);
    depthwise_case(random);
    run_case(random);
    damage_case(random);
  }
  refusals();
  fork_case();
  concurrent_callers(static_cast<int>(cases));
  std::printf("%" PRId64 " cases on %s: all equal to the plain loops\n", cases, secateur_usable_isas());
  return 0;
}

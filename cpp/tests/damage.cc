// Packed weights as a damaged or hostile file would have them: refused, or the same as what they unpack to.

#include <algorithm>
#include <functional>

#include "plain.h"

namespace plain {
namespace {

// Bytes of a field or an array that may be damaged.
struct Target {
  void* data;
  size_t bytes, item;
};

template <class T>
Target whole(std::vector<T>& array) {
  return {array.data(), array.size() * sizeof(T), sizeof(T)};
}
template <class T>
Target field(T& value) {
  return {&value, sizeof(T), sizeof(T)};
}

// A flipped bit, a changed byte, or a whole number that is likely to hurt.
void damage(Random& random, const Target& target) {
  if (target.bytes == 0) return;
  const size_t at = static_cast<size_t>(random.between(0, static_cast<int64_t>(target.bytes) - 1));
  unsigned char* bytes = static_cast<unsigned char*>(target.data);
  switch (random.between(0, 2)) {
    case 0: bytes[at] ^= static_cast<unsigned char>(1u << random.between(0, 7)); return;
    case 1: bytes[at] = static_cast<unsigned char>(random.between(0, 255)); return;
    default: {
      const int64_t hurting =
          random.of<int64_t>({-1, 0, 1, 2, 3, 4, 255, 256, 65535, 65536, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN,
                              int64_t{1} << 40, (int64_t{1} << 40) + 1, int64_t{1} << 62});
      std::memcpy(bytes + at / target.item * target.item, &hurting, target.item);
    }
  }
}

// Everything that may be called once a check has passed: with memory that is as large as the header says, and the same
// answers as the matrix that it unpacks to.
void run_panelled(Random& random, const secateur_panelled& h) {
  if (h.rows > 4096 || h.columns > 65536 * 4) return;  // nobody has that much memory; refused before
  std::vector<float> dense(static_cast<size_t>(h.rows * h.columns), 7.0f);
  expect_status(secateur_panelled_unpack(&h, dense.data()), SECATEUR_OK, "unpacking what was checked");
  const int64_t count = random.between(1, 5);
  const Floats x = Floats::numbers(random, count * h.columns);
  Floats y(random, count * h.rows), one(random, h.rows);
  const secateur_plan plan = {static_cast<int32_t>(random.between(1, 2)), 0};
  expect_status(secateur_spmm(&h, x.data(), h.columns, 1, y.data(), h.rows, 1, count, nullptr, &plan), SECATEUR_OK,
                "spmm with what was checked");
  expect_status(secateur_gemv(&h, x.data(), one.data(), nullptr, &plan), SECATEUR_OK, "gemv with what was checked");
  for (int64_t i = 0; i < count; ++i)
    for (int64_t r = 0; r < h.rows; ++r) {
      Sum sum;
      for (int64_t c = 0; c < h.columns; ++c)
        sum.multiply(dense[static_cast<size_t>(r * h.columns + c)], x[i * h.columns + c]);
      if (sum.size > 1e37) continue;  // a damaged value may overflow in single precision
      expect(close(sum, SECATEUR_NONE, y[i * h.rows + r]), "spmm of a damaged weight differs from what it unpacks to");
      if (i == 0) expect(close(sum, SECATEUR_NONE, one[r]), "gemv of a damaged weight differs from what it unpacks to");
    }
  if (h.columns % 9 != 0) return;
  const secateur_convolution s = {1, h.columns / 9, 5, 6, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0};
  const Floats image = Floats::numbers(random, s.channels * s.height * s.width);
  Floats out(random, h.rows * s.height * s.width);
  expect_status(secateur_conv2d(&h, &s, image.data(), out.data(), nullptr, &plan), SECATEUR_OK,
                "conv2d with what was checked");
}

void run_bitmask(Random& random, const secateur_bitmask& h) {
  if (h.rows > 4096 || h.columns > 65536) return;
  std::vector<float> dense(static_cast<size_t>(h.rows * h.columns), 7.0f);
  expect_status(secateur_bitmask_unpack(&h, dense.data()), SECATEUR_OK, "unpacking a bitmask that was checked");
  const Floats x = Floats::numbers(random, h.columns);
  Floats y(random, h.rows);
  expect_status(secateur_gemv_bitmask(&h, x.data(), y.data(), nullptr, nullptr), SECATEUR_OK,
                "gemv_bitmask with what was checked");
  for (int64_t r = 0; r < h.rows; ++r) {
    Sum sum;
    for (int64_t c = 0; c < h.columns; ++c) sum.multiply(dense[static_cast<size_t>(r * h.columns + c)], x[c]);
    expect(sum.size > 1e37 || close(sum, SECATEUR_NONE, y[r]), "a damaged bitmask differs from what it unpacks to");
  }
}

}  // namespace

void damage_case(Random& random) {
  const int64_t rows = random.between(0, 12), columns = random.of<int64_t>({0, 1, 5, 9, 18, 63, 64, 65, 300});
  const std::vector<float> dense = weights(random, rows, columns);
  const int32_t width = random.of({1, 1, 4});
  const int32_t panel = random.of({4, 16, 64, 256, 2048});
  const Panelled sound(dense, rows, columns, width == 1 ? random.of({1, 4}) : 1, width, panel, random.of({1, 2, 5}));
  for (int i = 0; i < 60; ++i) {
    Panelled w = sound;
    secateur_panelled& h = w.header;
    const Target targets[] = {field(h.rows),      field(h.columns), field(h.block_rows),  field(h.block_columns),
                              field(h.panel),     field(h.parts),   field(h.index_bytes), field(h.blocks),
                              field(h.run_count), whole(w.values),  whole(w.indices),     whole(w.order),
                              whole(w.runs),      whole(w.starts)};
    for (int64_t n = random.of<int64_t>({1, 1, 1, 2, 3}); n > 0; --n)
      damage(random, targets[random.between(0, static_cast<int64_t>(std::size(targets)) - 1)]);
    const int32_t status = w.check();
    expect(status == SECATEUR_OK || status == SECATEUR_CORRUPT, "panelled_check has two answers");
    if (status == SECATEUR_OK) run_panelled(random, h);
  }
  const Bitmask whole_bits(dense, rows, columns);
  for (int i = 0; i < 30; ++i) {
    Bitmask w = whole_bits;
    secateur_bitmask& h = w.header;
    const Target targets[] = {field(h.rows),   field(h.columns), field(h.count),
                              whole(w.values), whole(w.bits),    whole(w.offsets)};
    damage(random, targets[random.between(0, static_cast<int64_t>(std::size(targets)) - 1)]);
    const int32_t status = w.check();
    expect(status == SECATEUR_OK || status == SECATEUR_CORRUPT, "bitmask_check has two answers");
    if (status == SECATEUR_OK) run_bitmask(random, h);
  }
}

// Arguments that no kernel may see.
void refusals() {
  Random random(1);
  const std::vector<float> dense(6 * 10, 1.0f);
  const Panelled w(dense, 6, 10, 1, 1, 8, 2);
  const Bitmask bits(dense, 6, 10);
  const Floats x = Floats::numbers(random, 100);
  Floats y(random, 100);
  const auto refused = [](int32_t status, const char* what) { expect_status(status, SECATEUR_BAD_ARGUMENT, what); };
  const auto spmm = [&](int64_t x_step, int64_t x_stride, int64_t y_step, int64_t y_stride, int64_t count,
                        const secateur_epilogue* after = nullptr, const secateur_plan* plan = nullptr) {
    return secateur_spmm(&w.header, x.data(), x_step, x_stride, y.data(), y_step, y_stride, count, after, plan);
  };
  expect_status(spmm(10, 1, 6, 1, 3), SECATEUR_OK, "a plain product");
  refused(spmm(10, 1, 6, 1, -1), "a negative count");
  refused(spmm(10, 2, 6, 1, 3), "inputs that are contiguous in no direction");
  refused(spmm(10, 1, 6, 2, 3), "outputs that are contiguous in no direction");
  refused(spmm(10, 1, 5, 1, 3), "output vectors that overlap");
  refused(spmm(10, 1, 1, 2, 3), "output features that overlap");
  refused(spmm(10, 1, -6, 1, 3), "output vectors that run backwards");
  for (const secateur_plan& plan :
       {secateur_plan{-1, 0}, secateur_plan{1, -8}, secateur_plan{1, 24}, secateur_plan{1, 512}})
    refused(spmm(10, 1, 6, 1, 3, nullptr, &plan), "threads or a tile out of range");
  const secateur_plan many = {INT32_MAX, 4};
  expect_status(spmm(10, 1, 6, 1, 3, nullptr, &many), SECATEUR_OK, "as many threads as it likes");
  for (int32_t activation : {-1, 6, INT32_MAX}) {
    const secateur_epilogue after = {nullptr, nullptr, activation};
    refused(spmm(10, 1, 6, 1, 3, &after), "an activation that is none");
  }
  refused(secateur_spmm(nullptr, x.data(), 10, 1, y.data(), 6, 1, 3, nullptr, nullptr), "no weight");
  refused(secateur_gemv(nullptr, x.data(), y.data(), nullptr, nullptr), "no weight");
  refused(secateur_gemv_bitmask(nullptr, x.data(), y.data(), nullptr, nullptr), "no weight");
  refused(secateur_max_pool2d(nullptr, x.data(), y.data(), nullptr), "no shape");
  refused(secateur_conv2d(&w.header, nullptr, x.data(), y.data(), nullptr, nullptr), "no shape");
  int64_t count = 0, runs = 0;
  refused(secateur_bitmask_count(dense.data(), -1, 10, &count), "negative rows");
  refused(secateur_bitmask_count(dense.data(), int64_t{1} << 40, int64_t{1} << 40, &count),
          "more weights than there are");
  refused(secateur_panelled_sizes(dense.data(), 6, 10, 2, 2, 8, 1, &count, &runs),
          "blocks that there are no kernels for");
  refused(secateur_panelled_sizes(dense.data(), 6, 10, 1, 4, 6, 1, &count, &runs), "a panel that cuts a block");
  refused(secateur_panelled_sizes(dense.data(), 6, 10, 1, 1, 65537, 1, &count, &runs), "a panel that is too wide");
  refused(secateur_panelled_sizes(dense.data(), 6, 10, 1, 1, 8, 0, &count, &runs), "no parts");
  refused(secateur_panelled_sizes(dense.data(), int64_t{1} << 40, int64_t{1} << 40, 1, 1, 8, 1, &count, &runs),
          "too large");
  const secateur_convolution fits = {1, 10, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0};
  expect_status(secateur_conv2d(&w.header, &fits, x.data(), y.data(), nullptr, nullptr), SECATEUR_OK,
                "a plain convolution");
  const std::function<void(secateur_convolution&)> wrong[] = {
      [](secateur_convolution& s) { s.batch = -1; },
      [](secateur_convolution& s) { s.height = INT64_MAX; },
      [](secateur_convolution& s) { s.width = int64_t{1} << 60; },
      [](secateur_convolution& s) { s.kernel_height = 0; },
      [](secateur_convolution& s) { s.stride_width = 0; },
      [](secateur_convolution& s) { s.pad_left = -1; },
      [](secateur_convolution& s) { s.dilation_width = 0; },
      [](secateur_convolution& s) { s.height = 0; },
      [](secateur_convolution& s) { s.x_block = 32; },
      [](secateur_convolution& s) { s.y_block = -64; },
      [](secateur_convolution& s) { s.kernel_height = 2, s.dilation_height = INT32_MAX; },
  };
  for (const auto& change : wrong) {
    secateur_convolution s = fits;
    change(s);
    refused(secateur_conv2d(&w.header, &s, x.data(), y.data(), nullptr, nullptr), "a convolution that cannot be");
    refused(secateur_max_pool2d(&s, x.data(), y.data(), nullptr), "a maximum that cannot be");
    refused(secateur_depthwise2d(x.data(), 1, &s, x.data(), y.data(), nullptr, nullptr),
            "a depthwise convolution that cannot be");
  }
  expect_status(secateur_depthwise2d(x.data(), 1, &fits, x.data(), y.data(), nullptr, nullptr), SECATEUR_OK,
                "a plain depthwise convolution");
  refused(secateur_depthwise2d(x.data(), 1, nullptr, x.data(), y.data(), nullptr, nullptr), "no shape");
  for (int64_t multiplier : {int64_t{0}, int64_t{-1}, INT64_MIN, INT64_MAX, int64_t{1} << 40})
    refused(secateur_depthwise2d(x.data(), multiplier, &fits, x.data(), y.data(), nullptr, nullptr),
            "outputs of a channel that cannot be");
  for (int64_t channels : {int64_t{9}, 10 + (int64_t{1} << 62)}) {
    secateur_convolution s = fits;
    s.channels = channels, s.kernel_height = channels == 9 ? 1 : 4;
    refused(secateur_conv2d(&w.header, &s, x.data(), y.data(), nullptr, nullptr), "a weight that does not fit");
  }
  secateur_convolution apart = fits;  // strides beyond the image: one output
  apart.stride_height = apart.stride_width = INT32_MAX, apart.dilation_height = apart.dilation_width = INT32_MAX;
  expect_status(secateur_conv2d(&w.header, &apart, x.data(), y.data(), nullptr, nullptr), SECATEUR_OK, "wide strides");
  expect_status(secateur_use_isa("none such"), SECATEUR_UNKNOWN_ISA, "an unknown instruction set");
  expect_status(secateur_use_isa(nullptr), SECATEUR_UNKNOWN_ISA, "no instruction set");
  expect(secateur_abi() == SECATEUR_ABI, "the interface's number");
}

}  // namespace plain

// For every tile of output pixels, what each tap of a kernel sees, laid out in rows.
#pragma once

#include "spmm.h"

namespace secateur {
namespace {

inline int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
inline int64_t floor_modulo(int64_t a, int64_t b) { return a - floor_divide(a, b) * b; }

// Sizes of the output, in which positions count `period` to a row: at least as many as there are pixels in it, of the
// input too; what is computed in between is thrown away.
struct Extent {
  explicit Extent(const secateur_convolution& s)
      : reach_height(int64_t{s.kernel_height - 1} * s.dilation_height),
        reach_width(int64_t{s.kernel_width - 1} * s.dilation_width),
        height((s.height + s.pad_top + s.pad_bottom - reach_height - 1) / s.stride_height + 1),
        width((s.width + s.pad_left + s.pad_right - reach_width - 1) / s.stride_width + 1),
        period(most(width, divide_up(s.width, s.stride_width))) {}

  int64_t positions() const { return height * period; }

  int64_t reach_height, reach_width;
  int64_t height, width;
  int64_t period;
};

// Where the taps of a kernel find their pixels. Input pixels that lie a stride apart form a phase, laid out
// with the same period: what a tap sees from consecutive positions is then consecutive in its phase, but for columns
// beside the image, which a mask removes.
struct Geometry : Extent {
  Geometry(const secateur_convolution& s, int64_t tile)
      : Extent(s),
        shape(s),
        pixels(s.height * s.width),
        linear(s.stride_height == 1 && s.stride_width == 1 && period == s.width),
        spanned((tile + period - 2) / period + 1),
        first_row(floor_divide(-int64_t{s.pad_top}, s.stride_height)),
        rows(spanned + floor_divide(reach_height - s.pad_top, s.stride_height) - first_row),
        phase_size(rows * period + 2 * kWidth),
        taps(int64_t{s.kernel_height} * s.kernel_width),
        mask_length(period + kWidestTile) {
    const int64_t numbers = taps + s.kernel_height + s.kernel_width;
    int64_t* shift = reinterpret_cast<int64_t*>(scratch(kTaps).at_least(2 * numbers + s.kernel_width * mask_length));
    int32_t* mask = reinterpret_cast<int32_t*>(shift + numbers);
    row_phases = {shift + taps, 0}, column_phases = {shift + taps + s.kernel_height, 0};
    for (int64_t k = 0; k < s.kernel_height; ++k) row_phases.add(floor_modulo(row_of(k), s.stride_height));
    for (int64_t k = 0; k < s.kernel_width; ++k) column_phases.add(floor_modulo(column_of(k), s.stride_width));
    shifts = shift;
    masks = mask;
    for (int64_t tap = 0; tap < taps; ++tap) *shift++ = shift_of(tap);
    for (int64_t k = 0; k < s.kernel_width; ++k, mask += mask_length) {
      for (int64_t i = 0; i < least(period, mask_length); ++i) {
        const int64_t column = i * s.stride_width + column_of(k);
        mask[i] = column >= 0 && column < s.width ? -1 : 0;
      }
      for (int64_t i = period; i < mask_length; ++i) mask[i] = mask[i - period];
    }
  }

  // Rows (or columns) of the image modulo the stride, those that the kernel meets: one of two, where it has one tap and
  // a stride of two.
  struct Phases {
    int64_t find(int64_t phase) const {
      for (int64_t i = 0; i < count; ++i)
        if (all[i] == phase) return i;
      return -1;
    }
    void add(int64_t phase) {
      if (find(phase) < 0) all[count++] = phase;
    }
    int64_t* all;
    int64_t count;
  };

  secateur_convolution shape;
  int64_t pixels;     // of the input
  bool linear;        // the image itself is its only phase
  int64_t spanned;    // output rows that a tile touches, at most
  int64_t first_row;  // of a phase that a tile sees, from the row of the tile's first position
  int64_t rows;       // of a phase that a tile sees, at most
  Phases row_phases, column_phases;
  int64_t phase_size;
  int64_t taps;
  int64_t mask_length;
  const int64_t* shifts;  // where a tap's pixels begin, from those of a tile's first position
  const int32_t* masks;   // of the kernel's columns: [kernel width][mask_length]

 private:
  // What a row or a column of the kernel sees from the output's first.
  int64_t row_of(int64_t k) const { return k * shape.dilation_height - shape.pad_top; }
  int64_t column_of(int64_t k) const { return k * shape.dilation_width - shape.pad_left; }

  int64_t shift_of(int64_t tap) const {
    const int64_t y = row_of(tap / shape.kernel_width), x = column_of(tap % shape.kernel_width);
    if (linear) return y * period + x;
    const int64_t phase = row_phases.find(floor_modulo(y, shape.stride_height)) * column_phases.count +
                          column_phases.find(floor_modulo(x, shape.stride_width));
    const int64_t row = floor_divide(y, shape.stride_height) - first_row;
    return phase * phase_size + row * period + floor_divide(x, shape.stride_width);
  }
};

// What the taps of a kernel see; zeros beside the image.
class Taps final : public Source {
 public:
  Taps(const Geometry& geometry, const float* image) : g_(geometry), image_(image) {}

  const float* panel(float* buffer, int64_t tile, int64_t position, int64_t valid, int64_t feature, int64_t count,
                     bool* spoiled) const override {
    View view = look(tile, position, least(valid, tile));
    const int64_t columns = g_.shape.kernel_width;
    const int32_t* masks = lay_masks(position % g_.period, tile);
    const int32_t* whole = masks + columns * tile;
    vec<kWidth> wide{};
    float rest = 0.0f;
    for (int64_t done = 0; done < count;) {
      const int64_t channel = (feature + done) / g_.taps, first = (feature + done) % g_.taps;
      const int64_t last = least(g_.taps, first + count - done);
      copy_blocks(view, channel, &wide, &rest);
      if (!g_.linear) split(view);
      for (int64_t tap = first, column = first % columns; tap < last; ++tap, ++done) {
        const int32_t* mask = whole[column] ? nullptr : masks + column * tile;
        see(view.origin + g_.shifts[tap], mask, tile, buffer + done * tile);
        if (++column == columns) column = 0;
      }
    }
    *spoiled |= any_spoiled<kWidth>(wide) || !(rest == 0.0f);
    return buffer;
  }

  float value(int64_t feature, int64_t position) const override {
    const secateur_convolution& s = g_.shape;
    if (position % g_.period >= g_.width) return 0.0f;  // thrown away
    const int64_t tap = feature % g_.taps;
    const int64_t y = position / g_.period * s.stride_height + tap / s.kernel_width * s.dilation_height - s.pad_top;
    const int64_t x = position % g_.period * s.stride_width + tap % s.kernel_width * s.dilation_width - s.pad_left;
    if (y < 0 || y >= s.height || x < 0 || x >= s.width) return 0.0f;
    const int64_t pixel = y * s.width + x;
    return block(feature / g_.taps, pixel / kImageBlock)[pixel % kImageBlock];
  }

 private:
  // The part of the image that a tile sees, one channel at a time.
  struct View {
    int64_t top, bottom;  // output rows, both included
    int64_t left, right;  // input columns
    int64_t first_block;  // of the window
    int64_t* blocks;      // that are seen, in order
    int64_t block_count;
    float* window;        // pixels of one channel from the first block on
    float* split;         // the same, in phases
    const float* origin;  // what a tap with no shift sees
  };

  View look(int64_t tile, int64_t position, int64_t valid) const {
    const secateur_convolution& s = g_.shape;
    View v{};
    v.top = position / g_.period, v.bottom = (position + valid - 1) / g_.period;
    v.right = s.width;
    if (v.top == v.bottom) {
      v.left = most(0, position % g_.period * s.stride_width - s.pad_left);
      v.right = least(s.width, (position % g_.period + valid - 1) * s.stride_width - s.pad_left + g_.reach_width + 1);
    }
    int64_t low, high;  // pixels, beyond the image too where it is its own phase
    if (g_.linear) {
      low = position - s.pad_top * s.width - s.pad_left;
      high = low + g_.reach_height * s.width + g_.reach_width + tile;
    } else {
      low = most(0, v.top * s.stride_height - s.pad_top) * s.width;
      high = most(low, least(s.height, v.bottom * s.stride_height - s.pad_top + g_.reach_height + 1) * s.width);
    }
    v.first_block = floor_divide(low, kImageBlock);
    const int64_t blocks = floor_divide(high, kImageBlock) - v.first_block + 1;
    v.blocks = reinterpret_cast<int64_t*>(scratch(kBlocks).at_least(2 * blocks));
    v.window = scratch(kWindow).at_least(blocks * kImageBlock + 4 * kWidth);
    // What is seen from positions that do not count must not be left to chance: subnormal numbers are slow.
    clear(v.window + blocks * kImageBlock, 4 * kWidth);
    if (g_.linear) {
      for (int64_t k = 0; k < s.kernel_height; ++k) {
        const int64_t from = low + k * s.dilation_height * s.width;
        add_blocks(v, from, from + g_.reach_width + tile);
      }
      v.origin = v.window + (position - v.first_block * kImageBlock);
      return v;
    }
    for (int64_t y = low / most(s.width, 1); y * s.width < high; ++y)
      if (v.right > v.left && g_.row_phases.find(y % s.stride_height) >= 0)
        add_blocks(v, y * s.width + v.left, y * s.width + v.right);
    const int64_t before = divide_up(s.pad_left, kWidth) * kWidth;
    const int64_t phases = g_.row_phases.count * g_.column_phases.count;
    const int64_t size = before + phases * g_.phase_size + g_.reach_width + 2 * kWidth;
    v.split = scratch(kPhases).at_least(size) + before;
    clear(v.split - before, size);
    v.origin = v.split + position % g_.period;
    return v;
  }

  static void add_blocks(View& v, int64_t from, int64_t to) {
    int64_t i = floor_divide(from, kImageBlock);
    if (v.block_count > 0) i = most(i, v.blocks[v.block_count - 1] + 1);
    for (; i <= floor_divide(to - 1, kImageBlock); ++i) v.blocks[v.block_count++] = i;
  }

  const float* block(int64_t channel, int64_t i) const {
    return image_ + (g_.shape.x_block != 0 ? (i * g_.shape.channels + channel) * kImageBlock
                                           : channel * g_.pixels + i * kImageBlock);
  }

  void copy_blocks(const View& v, int64_t channel, vec<kWidth>* wide, float* rest) const {
    for (int64_t n = 0; n < v.block_count; ++n) {
      const int64_t i = v.blocks[n], there = least(g_.pixels - i * kImageBlock, kImageBlock);
      float* to = v.window + (i - v.first_block) * kImageBlock;
      if (i < 0 || there <= 0) {
        clear(to, kImageBlock);
        continue;
      }
      const float* from = block(channel, i);
      int64_t lane = 0;
      for (; lane + kWidth <= there; lane += kWidth) {
        const vec<kWidth> x = load_loose<kWidth>(from + lane);
        *wide += x * 0.0f;
        store<kWidth>(to + lane, x);
      }
      for (; lane < there; ++lane) *rest += (to[lane] = from[lane]) * 0.0f;
      if (lane < kImageBlock) clear(to + lane, kImageBlock - lane);
    }
  }

  static void clear(float* to, int64_t count) {
    if (count > 0) std::memset(to, 0, static_cast<size_t>(count) * 4);
  }

  // Lays the rows of the window out in phases. What is written beyond the end of a row, the next one overwrites.
  void split(const View& v) const {
    const secateur_convolution& s = g_.shape;
    const int64_t begin = v.left / s.stride_width, end = divide_up(v.right, s.stride_width);
    const int64_t rows = g_.rows - g_.spanned + v.bottom - v.top + 1;
    const int64_t seen = v.top * s.stride_height - s.pad_top;  // rows before that are in the way of other phases only
    const int64_t unseen = v.bottom * s.stride_height - s.pad_top + g_.reach_height + 1;
    const Geometry::Phases columns = g_.column_phases;
    for (int64_t a = 0; a < g_.row_phases.count; ++a) {
      float* phases = v.split + a * columns.count * g_.phase_size;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t y = (v.top + g_.first_row + i) * s.stride_height + g_.row_phases.all[a];
        float* to = phases + i * g_.period;
        if (y < seen || y >= unseen) continue;
        if (y < 0 || y >= s.height) {
          for (int64_t b = 0; b < columns.count; ++b) clear(to + b * g_.phase_size + begin, end - begin);
          continue;
        }
        const float* from = v.window + (y * s.width - v.first_block * kImageBlock);
        if (s.stride_width == 2) {
          const int64_t even = columns.find(0), odd = columns.find(1);
          split_in_two(from, begin, end, even < 0 ? nullptr : to + even * g_.phase_size,
                       odd < 0 ? nullptr : to + odd * g_.phase_size);
          continue;
        }
        for (int64_t b = 0; b < columns.count; ++b, to += g_.phase_size)
          for (int64_t j = begin; j < end && j * s.stride_width + columns.all[b] < s.width; ++j)
            to[j] = from[j * s.stride_width + columns.all[b]];
      }
    }
  }

  static void split_in_two(const float* from, int64_t begin, int64_t end, float* even, float* odd) {
    for (int64_t j = begin; j < end; j += kWidth) {
      const vec<kWidth> a = load_loose<kWidth>(from + 2 * j), b = load_loose<kWidth>(from + 2 * j + kWidth);
      if (even != nullptr) store_loose<kWidth>(even + j, every_second<kWidth, 0>(a, b));
      if (odd != nullptr) store_loose<kWidth>(odd + j, every_second<kWidth, 1>(a, b));
    }
  }

  // The masks of a tile, [kernel width][tile], and for each whether it removes nothing.
  const int32_t* lay_masks(int64_t column, int64_t tile) const {
    const int64_t columns = g_.shape.kernel_width;
    int32_t* masks = reinterpret_cast<int32_t*>(scratch(kMasks).at_least(columns * (tile + 1)));
    for (int64_t k = 0; k < columns; ++k) {
      const float* from = reinterpret_cast<const float*>(g_.masks + k * g_.mask_length + column);
      ints<4> all = ~ints<4>{};
      for (int64_t i = 0; i < tile; i += 4) {
        const vec<4> mask = load_loose<4>(from + i);
        all &= (ints<4>)mask;
        store<4>(reinterpret_cast<float*>(masks + k * tile + i), mask);
      }
      masks[columns * tile + k] = all[0] & all[1] & all[2] & all[3];
    }
    return masks;
  }

  static SECATEUR_INLINE void see(const float* from, const int32_t* mask, int64_t tile, float* to) {
    if (tile == 4 * kWidth)
      see_some<kWidth>(from, mask, 4, to);
    else if (tile % kWidth == 0)
      see_some<kWidth>(from, mask, tile / kWidth, to);
    else
      see_some<4>(from, mask, tile / 4, to);
  }

  template <int L>
  static SECATEUR_INLINE void see_some(const float* from, const int32_t* mask, int64_t count, float* to) {
    if (mask == nullptr) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < count; ++i) store<L>(to + i * L, load_loose<L>(from + i * L));
      return;
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < count; ++i) {
      const ints<L> there = *reinterpret_cast<const ints<L>*>(mask + i * L);
      store<L>(to + i * L, (vec<L>)((ints<L>)load_loose<L>(from + i * L) & there));
    }
  }

  const Geometry& g_;
  const float* image_;
};

}  // namespace
}  // namespace secateur

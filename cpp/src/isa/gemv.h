// One vector: every weight is used once, so that reading the weights is all that counts.
#pragma once

#include "spmm.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace secateur {
namespace {

constexpr int64_t kAhead = 512;  // weights, two kilobytes, that are asked for before they are needed

template <int R, int C, class Index>
SECATEUR_INLINE void dot(const float* x, const Index* index, const float* value, int64_t count, float* out) {
  if (R == 1 && C == 1) {
    float sum[8] = {};
    int64_t e = 0;
    for (; e + 8 <= count; e += 8) {
      __builtin_prefetch(value + e + kAhead);
      __builtin_prefetch(index + e + 2 * kAhead);
#pragma GCC unroll 8
      for (int s = 0; s < 8; ++s) sum[s] += value[e + s] * x[index[e + s]];
    }
    for (; e < count; ++e) sum[0] += value[e] * x[index[e]];
    out[0] += ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    return;
  }
  vec<4> sum[4] = {};
  int64_t e = 0;
  auto one = [&](int64_t at) __attribute__((always_inline)) {
    const vec<4> w = load_loose<4>(value + 4 * at);
    return R == 4 ? w * x[index[at]] : w * load_loose<4>(x + 4 * int64_t{index[at]});
  };
  for (; e + 4 <= count; e += 4) {
    __builtin_prefetch(value + 4 * e + kAhead);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) sum[s] += one(e + s);
  }
  for (; e < count; ++e) sum[0] += one(e);
  const vec<4> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  if (R == 4)
    for (int r = 0; r < 4; ++r) out[r] += all[r];
  else
    out[0] += (all[0] + all[1]) + (all[2] + all[3]);
}

template <int R, int C, class Index>
void gemv_part(const secateur_panelled& w, const Layout& layout, int64_t part, const float* x, float* sums) {
  for (int64_t panel = 0; panel < layout.panels; ++panel) {
    const Cell cell = cell_at(w, layout, part, panel);
    const int32_t* order = cell.order;
    const Index* index = static_cast<const Index*>(cell.indices);
    const float* value = cell.values;
    const float* here = x + panel * w.panel;
    for (int64_t run = cell.run; run < cell.last_run; ++run) {
      const int64_t count = w.runs[2 * run];
      for (int64_t i = 0; i < w.runs[2 * run + 1]; ++i) {
        dot<R, C, Index>(here, index, value, count, sums + *order++ * R);
        index += count;
        value += count * R * C;
      }
    }
  }
}

using GemvPart = void (*)(const secateur_panelled&, const Layout&, int64_t, const float*, float*);

template <class Index>
GemvPart gemv_part_for(const secateur_panelled& w) {
  if (w.block_rows == 4) return gemv_part<4, 1, Index>;
  if (w.block_columns == 4) return gemv_part<1, 4, Index>;
  return gemv_part<1, 1, Index>;
}

SECATEUR_INLINE bool any_spoiled(const float* x, int64_t count) {
  vec<4> spoiled{};
  float rest = 0.0f;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) spoiled += load_loose<4>(x + i) * 0.0f;
  for (; i < count; ++i) rest += x[i] * 0.0f;
  return any_spoiled<4>(spoiled) || !(rest == 0.0f);
}

SECATEUR_INLINE float with_bias(float sum, const secateur_epilogue& after, int64_t row) {
  return after.bias != nullptr ? sum + after.bias[row] : sum;
}

inline int32_t gemv(const secateur_panelled& w, const float* x, float* y, const secateur_epilogue& after,
                    const secateur_plan& plan) {
  const Layout layout(w);
  const GemvPart run = w.index_bytes == 1 ? gemv_part_for<uint8_t>(w) : gemv_part_for<uint16_t>(w);
  const float* padded = x;
  if (w.columns % 4 != 0 && w.block_columns == 4) {  // the last block sticks out
    float* copy = scratch(kVector).at_least(w.columns + 4);
    for (int64_t i = 0; i < w.columns; ++i) copy[i] = x[i];
    for (int64_t i = w.columns; i < w.columns + 4; ++i) copy[i] = 0.0f;
    padded = copy;
  }
  const bool spoiled = any_spoiled(x, w.columns);
  const Vectors source(x, w.columns, 1);
  const VectorsOut sink(y, w.rows, 1, after);
  return in_parallel(layout.parts, plan.threads, [&](int64_t part) {
    const int64_t row = layout.part_begin(part) * w.block_rows;
    const int64_t size = layout.part_size(part) * w.block_rows;
    float* sums = scratch(kTile).at_least(size + 1);
    for (int64_t r = 0; r < size; ++r) sums[r] = 0.0f;
    run(w, layout, part, padded, sums);
    const int64_t count = least(size, w.rows - row);
    for (int64_t r = 0; r < count; ++r) sums[r] = with_bias(sums[r], after, row + r);
    put_row(sums, count, row, y, after);
    if (spoiled) spoil(w, source, sink, part, 0, 1);
  });
}

// Spreads the next weights of a stream over the lanes whose bit is set.
#if defined(__AVX512F__)
SECATEUR_INLINE vec<16> spread(const float* value, uint64_t bits) {
  return (vec<16>)_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), _mm512_loadu_ps(value));
}
#else
// For every pattern of bits, which of the next weights each lane takes, and all bits set in the lanes that take one.
struct Spreads {
  Spreads() {
    for (int pattern = 0; pattern < 1 << kWidth; ++pattern) {
      int next = 0;
      for (int lane = 0; lane < kWidth; ++lane) {
        const bool there = (pattern >> lane) & 1;
        from[pattern][lane] = there ? next++ : 0;
        taken[pattern][lane] = there ? -1 : 0;
      }
    }
  }
  alignas(32) int32_t from[1 << kWidth][kWidth];
  alignas(32) int32_t taken[1 << kWidth][kWidth];
};
inline const Spreads& spreads() {
  static const Spreads table;
  return table;
}

// The compilers have no common way to choose lanes by numbers that are not known before.
SECATEUR_INLINE vec<kWidth> chosen(const float* value, const int32_t* from) {
#if defined(__AVX2__)
  return (vec<8>)_mm256_permutevar8x32_ps(_mm256_loadu_ps(value), *reinterpret_cast<const __m256i*>(from));
#else
  return vec<4>{value[from[0]], value[from[1]], value[from[2]], value[from[3]]};
#endif
}

SECATEUR_INLINE vec<kWidth> spread(const float* value, uint64_t bits, const Spreads& table) {
  const ints<kWidth> kept = *reinterpret_cast<const ints<kWidth>*>(table.taken[bits]);
  return (vec<kWidth>)((ints<kWidth>)chosen(value, table.from[bits]) & kept);
}
#endif

inline int32_t gemv_bitmask(const secateur_bitmask& w, const float* x, float* y, const secateur_epilogue& after,
                            const secateur_plan& plan) {
  const int64_t words = divide_up(w.columns, 64);
  const float* padded = x;
  if (w.columns % 64 != 0) {
    float* copy = scratch(kVector).at_least(64 * words);
    for (int64_t i = 0; i < w.columns; ++i) copy[i] = x[i];
    for (int64_t i = w.columns; i < 64 * words; ++i) copy[i] = 0.0f;
    padded = copy;
  }
  constexpr int64_t kRows = 64;  // of one task
  return in_parallel(divide_up(w.rows, kRows), plan.threads, [&](int64_t task) {
#if !defined(__AVX512F__)
    const Spreads& table = spreads();
#endif
    const int64_t first = task * kRows, last = least(w.rows, first + kRows);
    float sums[kRows];
    for (int64_t row = first; row < last; ++row) {
      const float* value = w.values + w.offsets[row];
      const uint64_t* bits = w.bits + row * words;
      vec<kWidth> sum[4] = {};
      for (int64_t i = 0; i < words; ++i) {
        const uint64_t word = bits[i];
        __builtin_prefetch(value + kAhead);
        __builtin_prefetch(value + kAhead + 16);
#pragma GCC unroll 16
        for (int part = 0; part < 64 / kWidth; ++part) {
          const int shift = part * kWidth;
          const float* from = value + __builtin_popcountll(word & ((uint64_t{1} << shift) - 1));
          const uint64_t here = (word >> shift) & ((uint64_t{1} << kWidth) - 1);
          const vec<kWidth> a = load_loose<kWidth>(padded + 64 * i + shift);
#if defined(__AVX512F__)
          sum[part % 4] += spread(from, here) * a;
#else
          sum[part % 4] += spread(from, here, table) * a;
#endif
        }
        value += __builtin_popcountll(word);
      }
      float lanes[kWidth];
      store_loose<kWidth>(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
      float total = 0.0f;
      for (int lane = 0; lane < kWidth; ++lane) total += lanes[lane];
      sums[row - first] = with_bias(total, after, row);
    }
    put_row(sums, last - first, first, y, after);
  });
}

}  // namespace
}  // namespace secateur

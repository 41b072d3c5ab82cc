// The innermost loops: the blocks of one part and one panel, times a panel of activations.
#pragma once

#include "activation.h"
#include "layout.h"
#include "simd.h"

namespace secateur {
namespace {

// One part and panel of a weight, the activations it meets, and where the sums go.
struct Cell {
  const secateur_panelled* weight;
  int64_t run, last_run;
  const int32_t* order;
  const float* values;
  const void* indices;
  const float* x;   // [columns of the panel][tile], aligned
  float* sums;      // [rows of the part][tile], aligned
  bool first;       // sums start with the bias
  const float* bias;
  int64_t row;      // of the part's first group
  // With `finish`, sums are complete after this panel and go straight out, a whole tile wide.
  bool finish;
  float* y;
  int64_t y_stride;
  const float* residual;
  int32_t activation;
};

// Four indices with one load.
SECATEUR_INLINE uint64_t four(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}
SECATEUR_INLINE uint64_t four(const uint16_t* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}

// G row groups with the same number of blocks, side by side, so that there are enough independent sums in flight.
template <int L, int V, int R, int C, int G, class Index>
SECATEUR_INLINE void multiply(const float* x, const Index* index, const float* value, int64_t count,
                              vec<L> (&sum)[G][R][V]) {
  constexpr int64_t tile = int64_t{L} * V;
  constexpr int bits = 8 * sizeof(Index);
  auto one = [&](int g, int64_t e, uint64_t column) __attribute__((always_inline)) {
    const float* xp = in_register(x + column * (C * tile));
    const float* w = value + (g * count + e) * (R * C);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const vec<L> activations = load<L>(xp + c * tile + v * L);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[g][r][v] += w[r * C + c] * activations;
      }
    }
  };
  int64_t e = 0;
  for (; e + 4 <= count; e += 4) {
    uint64_t columns[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) columns[g] = four(index + g * count + e);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s)
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) one(g, e + s, (columns[g] >> (s * bits)) & ((uint64_t{1} << bits) - 1));
  }
#pragma GCC unroll 1
  for (; e < count; ++e)
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) one(g, e, index[g * count + e]);
}

template <int L, int V, int R, int C, int G, class Index>
SECATEUR_INLINE void take(const Cell& cell, const int32_t* order, const Index* index, const float* value,
                          int64_t count) {
  constexpr int64_t tile = int64_t{L} * V;
  vec<L> sum[G][R][V];
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) {
    const float* old = cell.sums + order[g] * (R * tile);
    const int64_t row = cell.row + int64_t{order[g]} * R;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const bool there = cell.bias != nullptr && (R == 1 || row + r < cell.weight->rows);
      const vec<L> start = splat<L>(cell.first && there ? cell.bias[row + r] : 0.0f);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[g][r][v] = cell.first ? start : load<L>(old + r * tile + v * L);
    }
  }
  multiply<L, V, R, C, G, Index>(cell.x, index, value, count, sum);
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) {
    float* out = cell.sums + order[g] * (R * tile);
    const int64_t row = cell.row + int64_t{order[g]} * R;
    if (!cell.finish) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store<L>(out + r * tile + v * L, sum[g][r][v]);
      continue;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (R > 1 && row + r >= cell.weight->rows) break;
      const int64_t at = (row + r) * cell.y_stride;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        vec<L> s = sum[g][r][v];
        if (cell.residual != nullptr) s += load_loose<L>(cell.residual + at + v * L);
        if (cell.activation == SECATEUR_RELU) s = relu<L>(s);
        store_loose<L>(cell.y + at + v * L, s);
      }
      if (cell.activation > SECATEUR_RELU) activate_row(cell.y + at, tile, cell.activation);
    }
  }
}

// Takes `left` groups with the same number of blocks: as many side by side as there can be, the rest by half as many,
// and so on. One alone waits for its own sums.
template <int L, int V, int R, int C, int G, class Index>
SECATEUR_INLINE void take_run(const Cell& cell, const int32_t*& order, const Index*& index, const float*& value,
                              int64_t count, int64_t left) {
  for (; left >= G; left -= G) {
    take<L, V, R, C, G, Index>(cell, order, index, value, count);
    order += G;
    index += G * count;
    value += G * count * R * C;
  }
  if constexpr (G > 1)
    if (left > 0) take_run<L, V, R, C, G / 2, Index>(cell, order, index, value, count, left);
}

template <int L, int V, int R, int C, int G, class Index>
void run_cell(const Cell& given) {
  const Cell cell = given;  // what is written into the output might be a part of one that others see
  const int32_t *order = cell.order, *runs = cell.weight->runs;
  const Index* index = static_cast<const Index*>(cell.indices);
  const float* value = cell.values;
  for (int64_t run = cell.run; run < cell.last_run; ++run) {
    const int32_t* pair = runs + 2 * run;
    take_run<L, V, R, C, G, Index>(cell, order, index, value, pair[0], pair[1]);
  }
}

using RunCell = void (*)(const Cell&);

// Row groups side by side: eight independent sums hide the latency of a fused multiply-add.
template <int L, int V, int R>
constexpr int side_by_side() {
  return V * R >= 8 ? 1 : 8 / (V * R);
}

template <int L, int V, int R, int C>
RunCell cell_for(int32_t index_bytes) {
  constexpr int G = side_by_side<L, V, R>();
  // Panels too wide for one byte are made for single vectors; several are served, but not at full speed.
  return index_bytes == 1 ? run_cell<L, V, R, C, G, uint8_t> : run_cell<L, V, R, C, 1, uint16_t>;
}

template <int L, int V>
RunCell cell_for(const secateur_panelled& w) {
  if (w.block_rows == 4) return cell_for<L, V, 4, 1>(w.index_bytes);
  if (w.block_columns == 4) return cell_for<L, V, 1, 4>(w.index_bytes);
  return cell_for<L, V, 1, 1>(w.index_bytes);
}

constexpr int64_t kWidestTile = 128;

// The widest tile whose sums fit the registers: blocks of four rows need four times as many.
inline int32_t widest_tile(const secateur_panelled& w) {
  if (kWidth == 16) return w.block_rows == 4 ? 64 : 128;
  return w.block_rows == 4 ? 2 * kWidth : 8 * kWidth;
}

// Tiles are powers of two from half a vector (the narrowest that pays) up.
inline RunCell cell_for(const secateur_panelled& w, int32_t tile) {
#if defined(__AVX512F__)
  switch (tile) {
    case 8: return cell_for<8, 1>(w);
    case 16: return cell_for<16, 1>(w);
    case 32: return cell_for<16, 2>(w);
    case 64: return cell_for<16, 4>(w);
    default: return cell_for<16, 8>(w);
  }
#elif defined(__AVX2__)
  switch (tile) {
    case 4: return cell_for<4, 1>(w);
    case 8: return cell_for<8, 1>(w);
    case 16: return cell_for<8, 2>(w);
    case 32: return cell_for<8, 4>(w);
    default: return cell_for<8, 8>(w);
  }
#else
  switch (tile) {
    case 4: return cell_for<4, 1>(w);
    case 8: return cell_for<4, 2>(w);
    case 16: return cell_for<4, 4>(w);
    default: return cell_for<4, 8>(w);
  }
#endif
}

inline int32_t narrowest_tile() { return kWidth == 16 ? 8 : 4; }

}  // namespace
}  // namespace secateur

// Sparse weight times panels of activations, over tiles of positions and parts of rows.
#pragma once

#include <atomic>

#include "cell.h"
#include "panels.h"
#include "pool.h"

namespace secateur {
namespace {

struct Product {
  const secateur_panelled& weight;
  const Source& source;
  const Sink& sink;
  float* y;
  int64_t positions;
  const secateur_epilogue& after;
  int32_t tile;
  RunCell run;
};

inline Cell cell_at(const secateur_panelled& w, const Layout& layout, int64_t part, int64_t panel) {
  const int64_t* start = w.starts + 3 * (part * layout.panels + panel);
  Cell cell{};
  cell.weight = &w;
  cell.run = start[0];
  cell.last_run = start[3];
  cell.order = w.order + start[1];
  cell.values = w.values + start[2] * w.block_rows * w.block_columns;
  cell.indices = static_cast<const char*>(w.indices) + start[2] * w.index_bytes;
  cell.row = layout.part_begin(part) * w.block_rows;
  return cell;
}

inline int64_t index_of(const secateur_panelled& w, const void* indices, int64_t i) {
  return w.index_bytes == 1 ? static_cast<const uint8_t*>(indices)[i] : static_cast<const uint16_t*>(indices)[i];
}

// A dense layer multiplies infinities and NaN by its zeros too, and gets NaN; the blocks that are not stored do not.
// Slow, and rare: every column with such an activation is looked for in all rows.
inline void spoil(const Product& p, int64_t part, int64_t position, int64_t valid) {
  const secateur_panelled& w = p.weight;
  const Layout layout(w);
  const int64_t groups = layout.part_size(part), first = layout.part_begin(part);
  char* there = reinterpret_cast<char*>(scratch(kMarks).at_least(groups / 4 + 1));
  for (int64_t column = 0; column < w.columns; ++column) {
    bool bad = false;
    for (int64_t i = position; i < position + valid && !bad; ++i) bad = !(p.source.value(column, i) * 0.0f == 0.0f);
    if (!bad) continue;
    const int64_t panel = column / w.panel, wanted = column % w.panel / w.block_columns;
    std::memset(there, 0, static_cast<size_t>(groups));
    const Cell cell = cell_at(w, layout, part, panel);
    int64_t group = 0, block = 0;
    for (int64_t run = cell.run; run < cell.last_run; ++run)
      for (int64_t i = 0; i < w.runs[2 * run + 1]; ++i, ++group)
        for (int64_t e = 0; e < w.runs[2 * run]; ++e, ++block)
          if (index_of(w, cell.indices, block) == wanted) there[cell.order[group]] = 1;
    for (int64_t i = position; i < position + valid; ++i) {
      if (p.source.value(column, i) * 0.0f == 0.0f) continue;
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t r = (first + g) * w.block_rows; !there[g] && r < least((first + g + 1) * w.block_rows, w.rows); ++r)
          p.sink.spoil(r, i);
    }
  }
}

// All panels of one tile, for some of the parts.
inline void run_tile(const Product& p, int64_t position, int64_t part_begin, int64_t part_end) {
  const secateur_panelled& w = p.weight;
  const Layout layout(w);
  const int64_t tile = p.tile, valid = least(tile, p.positions - position);
  const int64_t base = layout.part_begin(part_begin);
  const int64_t groups = layout.part_begin(part_end) - base;
  float* panel_x = scratch(kPanel).at_least(least(w.panel, divide_up(w.columns, w.block_columns) * w.block_columns) * tile + 64);
  float* sums = scratch(kTile).at_least(groups * w.block_rows * tile + 64);
  int64_t stride = 0;
  const int64_t direct = p.sink.direct(position, valid, tile, &stride);
  bool spoiled = false;
  for (int64_t panel = 0; panel < most(layout.panels, 1); ++panel) {
    const int64_t feature = panel * w.panel, count = least(w.panel, w.columns - feature);
    const float* x = p.source.panel(panel_x, tile, position, valid, feature, count, &spoiled);
    const int64_t end = divide_up(count, w.block_columns) * w.block_columns;
    if (end != count) {  // the last block sticks out over the last feature: its weights are zero, and so are these
      if (x != panel_x) std::memcpy(panel_x, x, static_cast<size_t>(count * tile) * 4);
      for (int64_t i = count * tile; i < end * tile; ++i) panel_x[i] = 0.0f;
      x = panel_x;
    }
    for (int64_t part = part_begin; part < part_end && layout.panels > 0; ++part) {
      Cell cell = cell_at(w, layout, part, panel);
      cell.x = x;
      cell.sums = sums + (layout.part_begin(part) - base) * w.block_rows * tile;
      cell.first = panel == 0;
      cell.bias = p.after.bias;
      cell.finish = direct >= 0 && panel == layout.panels - 1;
      cell.y = direct < 0 ? nullptr : p.y + direct;
      cell.y_stride = stride;
      cell.residual = direct < 0 || p.after.residual == nullptr ? nullptr : p.after.residual + direct;
      cell.activation = p.after.activation;
      p.run(cell);
    }
  }
  if (layout.panels == 0)  // no columns: nothing but the bias
    for (int64_t r = 0; r < groups * w.block_rows; ++r)
      for (int64_t i = 0; i < tile; ++i) {
        const int64_t row = base * w.block_rows + r;
        sums[r * tile + i] = p.after.bias != nullptr && row < w.rows ? p.after.bias[row] : 0.0f;
      }
  if (direct < 0 || layout.panels == 0) {
    const int64_t row = base * w.block_rows;
    p.sink.put(sums, tile, position, valid, row, least(groups * w.block_rows, w.rows - row));
  }
  if (spoiled)
    for (int64_t part = part_begin; part < part_end; ++part) spoil(p, part, position, valid);
}

// Runs tasks that may run out of memory, on several threads.
template <class Task>
inline int32_t in_parallel(int64_t count, int32_t threads, Task task) {
  std::atomic<int32_t> status{SECATEUR_OK};
  parallel_for(count, threads, [&](int64_t i) {
    try {
      task(i);
    } catch (const std::bad_alloc&) {
      status.store(SECATEUR_NO_MEMORY);
    }
  });
  return status.load();
}

inline int32_t run_product(const Product& p, int32_t threads) {
  const Layout layout(p.weight);
  if (p.positions == 0 || p.weight.rows == 0) return SECATEUR_OK;
  const int64_t tiles = divide_up(p.positions, p.tile);
  // Few tiles: rows are divided too, each thread copying the activations for itself.
  const int64_t shares = tiles % threads == 0 || tiles >= 4 * threads ? 1 : least(layout.parts, threads);
  return in_parallel(tiles * shares, threads, [&](int64_t i) {
    const int64_t share = i % shares;
    run_tile(p, i / shares * p.tile, layout.parts * share / shares, layout.parts * (share + 1) / shares);
  });
}

// A tile that fits the positions and the registers.
inline int32_t tile_for(const secateur_panelled& w, int64_t positions, int32_t asked) {
  const int32_t widest = widest_tile(w);
  int32_t tile = asked != 0 ? asked : 4 * kWidth;
  if (tile > widest) tile = widest;
  while (tile > narrowest_tile() && tile / 2 >= positions) tile /= 2;
  return tile < narrowest_tile() ? narrowest_tile() : tile;
}

inline int32_t spmm(const secateur_panelled& w, const float* x, int64_t x_step, int64_t x_stride, float* y,
                    int64_t y_step, int64_t y_stride, int64_t count, const secateur_epilogue& after,
                    const secateur_plan& plan) {
  const Vectors source(x, x_step, x_stride);
  const VectorsOut sink(y, y_step, y_stride, after);
  const int32_t tile = tile_for(w, count, plan.tile);
  return run_product({w, source, sink, y, count, after, tile, cell_for(w, tile)}, plan.threads);
}

}  // namespace
}  // namespace secateur

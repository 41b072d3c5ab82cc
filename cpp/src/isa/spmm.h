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
  int64_t begin, positions;  // the first of them, and the end
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

// Some tiles of positions, and the activations of some panels in front of them: as much as a second-level cache keeps
// while parts of the weight pass by, so that every weight is read once for all of them. A part has so few rows that its
// sums stay in the first-level cache through all panels.
struct Chunk {
  int64_t position, tiles;
  int64_t first_panel, last_panel;
  bool last;          // no panels follow
  float* x;           // [tiles][features][tile]: what is not used where it lies
  const float** at;   // [tiles][panels], where the activations are
  bool* spoiled;      // [tiles]
  float* sums;        // [tiles][all rows][tile]; null where one chunk has all panels
};

// Lays out the activations of one tile.
inline void gather(const Product& p, const Chunk& chunk, int64_t i) {
  const secateur_panelled& w = p.weight;
  const int64_t tile = p.tile, position = chunk.position + i * tile, valid = least(tile, p.positions - position);
  const int64_t panels = chunk.last_panel - chunk.first_panel;
  const int64_t features = panels * w.panel;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t feature = (chunk.first_panel + panel) * w.panel, count = least(w.panel, w.columns - feature);
    float* own = chunk.x + (i * features + panel * w.panel) * tile;
    const float* x = p.source.panel(own, tile, position, valid, feature, count, &chunk.spoiled[i]);
    const int64_t end = divide_up(count, w.block_columns) * w.block_columns;
    if (end != count) {  // the last block sticks out over the last feature: its weights are zero, and so are these
      if (x != own) std::memcpy(own, x, static_cast<size_t>(count * tile) * 4);
      std::memset(own + count * tile, 0, static_cast<size_t>((end - count) * tile) * 4);
      x = own;
    }
    chunk.at[i * panels + panel] = x;
  }
}

// One part of the rows, over a chunk.
inline void run_part(const Product& p, const Chunk& chunk, int64_t part) {
  const secateur_panelled& w = p.weight;
  const Layout layout(w);
  const int64_t tile = p.tile, rows = layout.part_size(part) * w.block_rows;
  const int64_t row = layout.part_begin(part) * w.block_rows, all = layout.groups * w.block_rows;
  const int64_t panels = chunk.last_panel - chunk.first_panel;
  float* own = chunk.sums != nullptr ? nullptr : scratch(kTile).at_least(rows * tile + 64);
  for (int64_t i = 0; i < chunk.tiles; ++i) {
    const int64_t position = chunk.position + i * tile, valid = least(tile, p.positions - position);
    float* sums = own != nullptr ? own : chunk.sums + (i * all + row) * tile;
    int64_t stride = 0;
    const int64_t direct = p.sink.direct(position, valid, tile, &stride);
    for (int64_t panel = 0; panel < panels; ++panel) {
      Cell cell = cell_at(w, layout, part, chunk.first_panel + panel);
      cell.x = chunk.at[i * panels + panel];
      cell.sums = sums;
      cell.first = chunk.first_panel + panel == 0;
      cell.bias = p.after.bias;
      cell.finish = direct >= 0 && chunk.last && panel == panels - 1;
      cell.y = direct < 0 ? nullptr : p.y + direct;
      cell.y_stride = stride;
      cell.residual = direct < 0 || p.after.residual == nullptr ? nullptr : p.after.residual + direct;
      cell.activation = p.after.activation;
      p.run(cell);
    }
    if (panels == 0)  // no columns: nothing but the bias
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < tile; ++k)
          sums[r * tile + k] = p.after.bias != nullptr && row + r < w.rows ? p.after.bias[row + r] : 0.0f;
    if (!chunk.last) continue;
    if (direct < 0 || panels == 0) p.sink.put(sums, tile, position, valid, row, least(rows, w.rows - row));
    if (chunk.spoiled[i]) spoil(p, part, position, valid);
  }
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

constexpr int64_t kResident = 512 * 1024 / 4;  // floats that a second-level cache keeps: of a chunk's activations,
constexpr int64_t kNear = 256 * 1024 / 4;      // or of a tile's sums

// How a product is divided. Where a tile's sums stay near, its activations are used panel by panel, as soon as each is
// laid out, by all rows; else all of them are laid out first, for as many tiles as there is room, and parts of the rows
// take turns. Each row adds up the same numbers in the same order either way.
struct Division {
  Division(const Product& p, const Layout& layout, int32_t threads) : tiles(divide_up(p.positions - p.begin, p.tile)) {
    const int64_t sums = layout.groups * p.weight.block_rows * p.tile;
    divide(p, layout, sums <= kNear);
    if (sums <= kNear && together(threads)) divide(p, layout, false);
  }

  // Whether chunks are so few that threads work on the parts of one together.
  bool together(int32_t threads) const { return threads > 1 && chunks % threads != 0 && chunks < 4 * threads; }

  int64_t tiles;
  int64_t panels, steps;  // panels of a chunk, and how many times as many there are
  int64_t chunk, chunks;  // tiles of a chunk, and chunks for all positions
  int64_t x;              // floats of a chunk's activations

 private:
  void divide(const Product& p, const Layout& layout, bool panel_by_panel) {
    const int64_t panel = p.weight.panel * p.tile;
    panels = panel_by_panel ? 1 : most(1, least(layout.panels, 2 * kResident / panel));
    steps = most(1, divide_up(layout.panels, panels));
    chunk = steps > 1 || panel_by_panel ? 1 : most(1, least(tiles, kResident / (panels * panel)));
    chunks = divide_up(tiles, chunk);
    x = chunk * panels * panel;
  }
};

// Calls `each` for one run of tiles, panels after panels.
template <class Each>
inline void run_chunk(const Product& p, const Layout& layout, const Division& d, int64_t i, Each each) {
  const int64_t all = layout.groups * p.weight.block_rows;
  Chunk chunk{};
  chunk.position = p.begin + i * d.chunk * p.tile;
  chunk.tiles = least(d.chunk, d.tiles - i * d.chunk);
  chunk.x = scratch(kPanel).at_least(d.x + 64);
  int64_t* places = reinterpret_cast<int64_t*>(scratch(kPlaces).at_least(2 * d.chunk * (d.panels + 1)));
  chunk.at = reinterpret_cast<const float**>(places);
  chunk.spoiled = reinterpret_cast<bool*>(places + d.chunk * d.panels);
  for (int64_t t = 0; t < chunk.tiles; ++t) chunk.spoiled[t] = false;
  if (d.steps > 1) chunk.sums = scratch(kSums).at_least(chunk.tiles * all * p.tile + 64);
  for (int64_t step = 0; step < d.steps; ++step) {
    chunk.first_panel = step * d.panels;
    chunk.last_panel = least(layout.panels, (step + 1) * d.panels);
    chunk.last = step == d.steps - 1;
    each(chunk);
  }
}

inline int32_t run_product(const Product& p, int32_t threads) {
  const Layout layout(p.weight);
  if (p.positions <= p.begin || p.weight.rows == 0) return SECATEUR_OK;
  const Division d(p, layout, threads);
  if (!d.together(threads))
    return in_parallel(d.chunks, threads, [&](int64_t i) {
      run_chunk(p, layout, d, i, [&](const Chunk& chunk) {
        for (int64_t t = 0; t < chunk.tiles; ++t) gather(p, chunk, t);
        for (int64_t part = 0; part < layout.parts; ++part) run_part(p, chunk, part);
      });
    });
  int32_t status = SECATEUR_OK;
  const auto together = [&](int64_t count, auto task) {
    if (status == SECATEUR_OK) status = in_parallel(count, threads, task);  // what failed is not built upon
  };
  for (int64_t i = 0; i < d.chunks; ++i)
    run_chunk(p, layout, d, i, [&](const Chunk& chunk) {
      together(chunk.tiles, [&](int64_t t) { gather(p, chunk, t); });
      together(layout.parts, [&](int64_t part) { run_part(p, chunk, part); });
    });
  return status;
}

// A tile that fits the positions and the registers.
inline int32_t tile_for(const secateur_panelled& w, int64_t positions, int32_t asked) {
  const int32_t widest = widest_tile(w);
  int32_t tile = asked != 0 ? asked : 4 * kWidth;
  if (tile > widest) tile = widest;
  while (tile > narrowest_tile() && tile / 2 >= positions) tile /= 2;
  return tile < narrowest_tile() ? narrowest_tile() : tile;
}

// All positions; what is left over after whole tiles gets a tile of its own, where half of one would be idle.
inline int32_t run_tiles(const secateur_panelled& w, const Source& source, const Sink& sink, float* y,
                         int64_t positions, const secateur_epilogue& after, int32_t tile, int32_t threads) {
  const int64_t whole = positions - positions % tile, end = 2 * (positions - whole) <= tile ? whole : positions;
  const int32_t status = run_product({w, source, sink, y, 0, end, after, tile, cell_for(w, tile)}, threads);
  if (status != SECATEUR_OK || end == positions) return status;
  const int32_t rest = tile_for(w, positions - end, tile);
  return run_product({w, source, sink, y, end, positions, after, rest, cell_for(w, rest)}, threads);
}

inline int32_t spmm(const secateur_panelled& w, const float* x, int64_t x_step, int64_t x_stride, float* y,
                    int64_t y_step, int64_t y_stride, int64_t count, const secateur_epilogue& after,
                    const secateur_plan& plan) {
  const Vectors source(x, x_step, x_stride);
  const VectorsOut sink(y, y_step, y_stride, after);
  const int32_t tile = tile_for(w, count, plan.tile);
  return run_tiles(w, source, sink, y, count, after, tile, plan.threads);
}

}  // namespace
}  // namespace secateur

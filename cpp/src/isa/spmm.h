// Sparse weight times panels of activations, over tiles of positions and parts of rows.
#pragma once

#include <atomic>

#include "cell.h"
#include "panels.h"
#include "pool.h"

namespace secateur {
namespace {

// A tile that fits the positions and the registers.
inline int32_t tile_for(const secateur_panelled& w, int64_t positions, int32_t asked) {
  const int32_t widest = widest_tile(w);
  int32_t tile = asked != 0 ? asked : 4 * kWidth;
  if (tile > widest) tile = widest;
  while (tile > narrowest_tile() && tile / 2 >= positions) tile /= 2;
  return tile < narrowest_tile() ? narrowest_tile() : tile;
}

// All positions, a tile at a time; what is left over after whole tiles gets a narrower one, where half of a whole one
// would be idle.
struct Tiles {
  Tiles(const secateur_panelled& w, int64_t all, int32_t tile)
      : positions(all),
        count(divide_up(all, tile)),
        widest(tile),
        last(2 * (all % tile) <= tile ? tile_for(w, all % tile, tile) : tile),
        run_widest(cell_for(w, tile)),
        run_last(cell_for(w, last)) {}

  bool whole(int64_t i) const { return (i + 1) * widest <= positions; }
  int64_t begin(int64_t i) const { return i * widest; }
  int64_t width(int64_t i) const { return whole(i) ? widest : last; }
  int64_t valid(int64_t i) const { return least(width(i), positions - begin(i)); }
  RunCell run(int64_t i) const { return whole(i) ? run_widest : run_last; }

  int64_t positions, count;
  int32_t widest, last;
  RunCell run_widest, run_last;
};

struct Product {
  const secateur_panelled& weight;
  const Source& source;
  const Sink& sink;
  float* y;
  const secateur_epilogue& after;
  Tiles tiles;
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
inline void spoil(const secateur_panelled& w, const Source& source, const Sink& sink, int64_t part, int64_t position,
                  int64_t valid) {
  const Layout layout(w);
  const int64_t groups = layout.part_size(part), first = layout.part_begin(part);
  char* there = reinterpret_cast<char*>(scratch(kMarks).at_least(groups / 4 + 1));
  for (int64_t column = 0; column < w.columns; ++column) {
    bool bad = false;
    for (int64_t i = position; i < position + valid && !bad; ++i) bad = !(source.value(column, i) * 0.0f == 0.0f);
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
      if (source.value(column, i) * 0.0f == 0.0f) continue;
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t r = (first + g) * w.block_rows; !there[g] && r < least((first + g + 1) * w.block_rows, w.rows); ++r)
          sink.spoil(r, i);
    }
  }
}

// Some tiles of positions, and the activations of some panels in front of them: as much as a second-level cache keeps
// while parts of the weight pass by, so that every weight is read once for all of them. A part has so few rows that its
// sums stay near through all panels.
struct Chunk {
  int64_t first_tile, tiles;
  int64_t first_panel, panels;
  int64_t most_panels;
  bool last;         // no panels follow
  int64_t first_row, rows;  // that sums are kept of: those of some parts
  float* x;          // [tiles][most panels][panel][widest tile]: what is not used where it lies
  const float** at;  // [tiles][most panels], where the activations are
  bool* spoiled;     // [tiles][most panels], of any panels so far
  float* sums;       // [tiles][rows][widest tile]; null where one chunk has all panels
};

// Lays out the activations of one tile and panel.
inline void gather(const Product& p, const Chunk& chunk, int64_t tile, int64_t panel) {
  const secateur_panelled& w = p.weight;
  const int64_t i = chunk.first_tile + tile, width = p.tiles.width(i), place = tile * chunk.most_panels + panel;
  const int64_t feature = (chunk.first_panel + panel) * w.panel, count = least(w.panel, w.columns - feature);
  float* own = chunk.x + place * w.panel * p.tiles.widest;
  const float* x = p.source.panel(own, width, p.tiles.begin(i), p.tiles.valid(i), feature, count, &chunk.spoiled[place]);
  const int64_t end = divide_up(count, w.block_columns) * w.block_columns;
  if (end != count) {  // the last block sticks out over the last feature: its weights are zero, and so are these
    if (x != own) std::memcpy(own, x, static_cast<size_t>(count * width) * 4);
    std::memset(own + count * width, 0, static_cast<size_t>((end - count) * width) * 4);
    x = own;
  }
  chunk.at[place] = x;
}

// One part of the rows, over one tile of a chunk.
inline void run_part(const Product& p, const Chunk& chunk, int64_t part, int64_t tile) {
  const secateur_panelled& w = p.weight;
  const Layout layout(w);
  const int64_t i = chunk.first_tile + tile, width = p.tiles.width(i), position = p.tiles.begin(i);
  const int64_t row = layout.part_begin(part) * w.block_rows, rows = layout.part_size(part) * w.block_rows;
  float* sums = chunk.sums != nullptr
                    ? chunk.sums + (tile * chunk.rows + row - chunk.first_row) * p.tiles.widest
                    : scratch(kTile).at_least(rows * width + 64);
  int64_t stride = 0;
  const int64_t direct = p.sink.direct(position, p.tiles.valid(i), width, &stride);
  const RunCell run = p.tiles.run(i);
  for (int64_t panel = 0; panel < chunk.panels; ++panel) {
    Cell cell = cell_at(w, layout, part, chunk.first_panel + panel);
    cell.x = chunk.at[tile * chunk.most_panels + panel];
    cell.sums = sums;
    cell.first = chunk.first_panel + panel == 0;
    cell.bias = p.after.bias;
    cell.finish = direct >= 0 && chunk.last && panel == chunk.panels - 1;
    cell.y = direct < 0 ? nullptr : p.y + direct;
    cell.y_stride = stride;
    cell.residual = direct < 0 || p.after.residual == nullptr ? nullptr : p.after.residual + direct;
    cell.activation = p.after.activation;
    run(cell);
  }
  if (chunk.panels == 0)  // no columns: nothing but the bias
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < width; ++k)
        sums[r * width + k] = p.after.bias != nullptr && row + r < w.rows ? p.after.bias[row + r] : 0.0f;
  if (!chunk.last) return;
  const int64_t valid = p.tiles.valid(i);
  if (direct < 0 || chunk.panels == 0) p.sink.put(sums, width, position, valid, row, least(rows, w.rows - row));
  bool spoiled = false;
  for (int64_t n = 0; n < chunk.most_panels; ++n) spoiled |= chunk.spoiled[tile * chunk.most_panels + n];
  if (spoiled) spoil(w, p.source, p.sink, part, position, valid);
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
// laid out, by all rows of a group; else all of them are laid out first, for as many tiles as there is room, and parts of
// the rows take turns. Each row adds up the same numbers in the same order either way.
//
// Threads take chunks of positions; where there are too few of them, one group of a chunk's parts each. Every group lays
// the chunk's activations out for itself: what another core has written comes more slowly than it is made again.
struct Division {
  Division(const Product& p, const Layout& layout, int32_t threads) {
    const int64_t panel = p.weight.panel * p.tiles.widest;
    const bool panel_by_panel = layout.groups * p.weight.block_rows * p.tiles.widest <= kNear;
    panels = panel_by_panel ? 1 : most(1, least(layout.panels, 2 * kResident / panel));
    steps = most(1, divide_up(layout.panels, panels));
    chunk = steps > 1 || panel_by_panel ? 1 : most(1, least(p.tiles.count, kResident / (panels * panel)));
    chunks = divide_up(p.tiles.count, chunk);
    x = chunk * panels * panel;
    groups = 1;
    for (int64_t more = 2; more <= least(threads, layout.parts); ++more)
      if (time(p, layout, threads, more) < time(p, layout, threads, groups)) groups = more;
  }

  int64_t panels, steps;  // panels of a chunk, and how many times as many there are
  int64_t chunk, chunks;  // tiles of a chunk, and chunks for all positions
  int64_t x;              // floats of a chunk's activations
  int64_t groups;         // of parts

 private:
  // What the thread with the most to do needs for so many groups, in times that a whole chunk is multiplied. To lay the
  // activations out takes an eighth of that or so.
  double time(const Product& p, const Layout& layout, int32_t threads, int64_t some) const {
    constexpr double laying_out = 0.125;
    const int64_t positions = chunk * p.tiles.widest, left = p.tiles.positions % positions;
    const int64_t whole = p.tiles.positions / positions * some, idle = (threads - whole % threads) % threads;
    const int64_t more = left == 0 ? 0 : divide_up(most(0, some - idle), threads);  // of what is left over
    const double tasks = divide_up(whole, threads) + more * static_cast<double>(left) / positions;
    return tasks * (static_cast<double>(divide_up(layout.parts, some)) / layout.parts + laying_out);
  }
};

// Multiplies the parts from `begin` to `end` with one run of tiles, panels after panels.
inline void run_chunk(const Product& p, const Layout& layout, const Division& d, int64_t i, int64_t begin, int64_t end) {
  const int64_t places = d.chunk * d.panels;
  Chunk chunk{};
  chunk.first_row = layout.part_begin(begin) * p.weight.block_rows;
  chunk.rows = layout.part_begin(end) * p.weight.block_rows - chunk.first_row;
  chunk.first_tile = i * d.chunk;
  chunk.tiles = least(d.chunk, p.tiles.count - i * d.chunk);
  chunk.most_panels = d.panels;
  chunk.x = scratch(kPanel).at_least(d.x + 64);
  int64_t* place = reinterpret_cast<int64_t*>(scratch(kPlaces).at_least(2 * (places + divide_up(places, 8))));
  chunk.at = reinterpret_cast<const float**>(place);
  chunk.spoiled = reinterpret_cast<bool*>(place + places);
  for (int64_t n = 0; n < places; ++n) chunk.spoiled[n] = false;
  if (d.steps > 1) chunk.sums = scratch(kSums).at_least(chunk.tiles * chunk.rows * p.tiles.widest + 64);
  for (int64_t step = 0; step < d.steps; ++step) {
    chunk.first_panel = step * d.panels;
    chunk.panels = least(layout.panels - chunk.first_panel, d.panels);
    chunk.last = step == d.steps - 1;
    for (int64_t tile = 0; tile < chunk.tiles; ++tile)
      for (int64_t panel = 0; panel < chunk.panels; ++panel) gather(p, chunk, tile, panel);
    for (int64_t part = begin; part < end; ++part)
      for (int64_t tile = 0; tile < chunk.tiles; ++tile) run_part(p, chunk, part, tile);
  }
}

inline int32_t run_product(const Product& p, int32_t threads) {
  const Layout layout(p.weight);
  if (p.tiles.count == 0 || p.weight.rows == 0) return SECATEUR_OK;
  const Division d(p, layout, threads);
  return in_parallel(d.groups * d.chunks, threads, [&](int64_t i) {
    const int64_t group = i / d.chunks;
    run_chunk(p, layout, d, i % d.chunks, layout.parts * group / d.groups, layout.parts * (group + 1) / d.groups);
  });
}

inline int32_t spmm(const secateur_panelled& w, const float* x, int64_t x_step, int64_t x_stride, float* y,
                    int64_t y_step, int64_t y_stride, int64_t count, const secateur_epilogue& after,
                    const secateur_plan& plan) {
  const Vectors source(x, x_step, x_stride);
  const VectorsOut sink(y, y_step, y_stride, after);
  const int32_t tile = tile_for(w, count, plan.tile);
  return run_product({w, source, sink, y, after, Tiles(w, count, tile)}, plan.threads);
}

}  // namespace
}  // namespace secateur

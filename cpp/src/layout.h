// Sizes that follow from a packed weight's header, in one place for packing, checking and running.
#pragma once

#include <cstdint>

#include "secateur_sparse.h"

namespace secateur {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int32_t kImageBlock = 64;  // a multiple of every tile that images in blocks are worked on with

// Of rows, columns, weights and blocks: far beyond any memory, and sums and products of a few of them stay in 64 bits.
constexpr int64_t kMost = int64_t{1} << 40;

// Whether a matrix can be computed with at all.
inline bool countable(int64_t rows, int64_t columns) {
  if (rows < 0 || columns < 0 || rows > kMost || columns > kMost) return false;
  return columns == 0 || rows <= kMost / columns;
}

struct Layout {
  explicit Layout(const secateur_panelled& w)
      : block_rows(w.block_rows),
        block_columns(w.block_columns),
        groups(divide_up(w.rows, w.block_rows)),
        block_panel(w.panel / w.block_columns),
        panels(divide_up(w.columns, w.panel)),
        parts(w.parts),
        part_groups(divide_up(groups, w.parts)) {}

  int64_t part_begin(int64_t part) const { return part * part_groups < groups ? part * part_groups : groups; }
  int64_t part_size(int64_t part) const { return part_begin(part + 1) - part_begin(part); }
  int64_t cells() const { return parts * panels; }

  int64_t block_rows, block_columns;
  int64_t groups;       // of rows
  int64_t block_panel;  // blocks of columns in a whole panel
  int64_t panels;
  int64_t parts;
  int64_t part_groups;  // row groups of each part but the last ones
};

inline int32_t index_bytes_of(int64_t block_panel) { return block_panel <= 256 ? 1 : 2; }

// Whether the header can be computed with at all; contents are checked elsewhere.
inline bool sound(const secateur_panelled* w) {
  if (w == nullptr || !countable(w->rows, w->columns)) return false;
  const bool block = (w->block_rows == 1 && w->block_columns == 1) || (w->block_rows == 4 && w->block_columns == 1) ||
                     (w->block_rows == 1 && w->block_columns == 4);
  if (!block || w->panel < w->block_columns || w->panel % w->block_columns != 0 || w->parts < 1) return false;
  if (w->panel / w->block_columns > 65536 || w->parts > 65536) return false;
  // Rows of a part are counted in 32 bits.
  if (divide_up(divide_up(w->rows, w->block_rows), w->parts) * w->block_rows > INT32_MAX) return false;
  return w->index_bytes == index_bytes_of(w->panel / w->block_columns);
}

}  // namespace secateur

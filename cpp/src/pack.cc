// Packing, checking and unpacking of sparse weights: no vector code, so that it is the same on every processor.

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

#include "layout.h"
#include "pack.h"
#include "secateur_sparse.h"

namespace secateur {
namespace {

// The weights of one matrix as blocks: which are there, and what is in them. Rows and columns may not divide evenly.
class Blocks {
 public:
  Blocks(const float* weights, const secateur_panelled& w)
      : weights_(weights), rows_(w.rows), columns_(w.columns), height_(w.block_rows), width_(w.block_columns) {}

  bool any(int64_t group, int64_t column) const {
    for (int64_t r = group * height_; r < std::min(rows_, (group + 1) * height_); ++r)
      for (int64_t c = column * width_; c < std::min(columns_, (column + 1) * width_); ++c)
        if (weights_[r * columns_ + c] != 0.0f) return true;  // NaN is not zero
    return false;
  }

  void copy(int64_t group, int64_t column, float* out) const {
    for (int64_t i = 0; i < height_; ++i)
      for (int64_t j = 0; j < width_; ++j) {
        const int64_t r = group * height_ + i, c = column * width_ + j;
        *out++ = r < rows_ && c < columns_ ? weights_[r * columns_ + c] : 0.0f;
      }
  }

 private:
  const float* weights_;
  int64_t rows_, columns_, height_, width_;
};

// Block columns of every row group of one part and panel, with the groups in the order in which they are stored.
struct Cell {
  std::vector<std::vector<int64_t>> columns;
  std::vector<int32_t> order;
};

Cell cell_of(const Blocks& blocks, const Layout& layout, const secateur_panelled& w, int64_t part, int64_t panel) {
  Cell cell;
  const int64_t first = layout.part_begin(part), size = layout.part_size(part);
  const int64_t begin = panel * layout.block_panel;
  const int64_t end = std::min(begin + layout.block_panel, divide_up(w.columns, w.block_columns));
  cell.columns.resize(static_cast<size_t>(size));
  for (int64_t g = 0; g < size; ++g)
    for (int64_t c = begin; c < end; ++c)
      if (blocks.any(first + g, c)) cell.columns[static_cast<size_t>(g)].push_back(c - begin);
  cell.order.resize(static_cast<size_t>(size));
  std::iota(cell.order.begin(), cell.order.end(), 0);
  std::stable_sort(cell.order.begin(), cell.order.end(), [&](int32_t a, int32_t b) {
    return cell.columns[static_cast<size_t>(a)].size() > cell.columns[static_cast<size_t>(b)].size();
  });
  return cell;
}

template <class Visit>
void for_cells(const float* weights, const secateur_panelled& w, Visit visit) {
  const Layout layout(w);
  const Blocks blocks(weights, w);
  for (int64_t part = 0; part < layout.parts; ++part)
    for (int64_t panel = 0; panel < layout.panels; ++panel)
      visit(blocks, layout, part, panel, cell_of(blocks, layout, w, part, panel));
}

// Whether what a block has outside of the matrix is zero: kernels multiply it all the same.
bool clean_outside(const secateur_panelled& w, int64_t block, int64_t row, int64_t column) {
  if (row + w.block_rows <= w.rows && column + w.block_columns <= w.columns) return true;
  const float* value = w.values + block * w.block_rows * w.block_columns;
  for (int64_t r = row; r < row + w.block_rows; ++r)
    for (int64_t c = column; c < column + w.block_columns; ++c, ++value)
      if ((r >= w.rows || c >= w.columns) && *value != 0.0f) return false;
  return true;
}

int64_t index_at(const secateur_panelled& w, int64_t i) {
  return w.index_bytes == 1 ? static_cast<const uint8_t*>(w.indices)[i] : static_cast<const uint16_t*>(w.indices)[i];
}

}  // namespace

int32_t panelled_sizes(const float* weights, const secateur_panelled& w, int64_t* blocks, int64_t* runs) {
  *blocks = *runs = 0;
  for_cells(weights, w, [&](const Blocks&, const Layout&, int64_t, int64_t, const Cell& cell) {
    size_t before = SIZE_MAX;
    for (int32_t g : cell.order) {
      const size_t count = cell.columns[static_cast<size_t>(g)].size();
      *blocks += static_cast<int64_t>(count);
      *runs += count != before;
      before = count;
    }
  });
  return SECATEUR_OK;
}

int32_t panelled_pack(const float* weights, const secateur_panelled& w, float* values, void* indices, int32_t* order,
                      int32_t* runs, int64_t* starts) {
  int64_t block = 0, run = 0, group = 0;
  const int64_t block_size = int64_t{w.block_rows} * w.block_columns;
  for_cells(weights, w, [&](const Blocks& source, const Layout& layout, int64_t part, int64_t panel, const Cell& cell) {
    *starts++ = run;
    *starts++ = group;
    *starts++ = block;
    size_t before = SIZE_MAX;
    for (int32_t g : cell.order) {
      const auto& columns = cell.columns[static_cast<size_t>(g)];
      if (columns.size() != before) {
        runs[2 * run] = static_cast<int32_t>(columns.size());
        runs[2 * run + 1] = 0;
        before = columns.size();
        ++run;
      }
      ++runs[2 * run - 1];
      order[group++] = g;
      for (int64_t c : columns) {
        source.copy(layout.part_begin(part) + g, panel * layout.block_panel + c, values + block * block_size);
        if (w.index_bytes == 1)
          static_cast<uint8_t*>(indices)[block] = static_cast<uint8_t>(c);
        else
          static_cast<uint16_t*>(indices)[block] = static_cast<uint16_t>(c);
        ++block;
      }
    }
  });
  *starts++ = run;
  *starts++ = group;
  *starts++ = block;
  std::memset(static_cast<char*>(indices) + block * w.index_bytes, 0, size_t{SECATEUR_SLACK} * w.index_bytes);
  return SECATEUR_OK;
}

int32_t panelled_check(const secateur_panelled& w, int64_t values, int64_t indices, int64_t order, int64_t runs,
                       int64_t starts) {
  const Layout layout(w);
  if (w.blocks < 0 || w.run_count < 0 || w.blocks > kMost || w.run_count > kMost) return SECATEUR_CORRUPT;
  if (values != w.blocks * w.block_rows * w.block_columns || indices != w.blocks + SECATEUR_SLACK ||
      order != layout.groups * layout.panels || runs != 2 * w.run_count || starts != 3 * (layout.cells() + 1))
    return SECATEUR_CORRUPT;
  int64_t run = 0, group = 0, block = 0;
  std::vector<char> seen;
  for (int64_t part = 0; part < layout.parts; ++part)
    for (int64_t panel = 0; panel < layout.panels; ++panel) {
      const int64_t* start = w.starts + 3 * (part * layout.panels + panel);
      if (start[0] != run || start[1] != group || start[2] != block) return SECATEUR_CORRUPT;
      const int64_t last_run = start[3], size = layout.part_size(part);
      const int64_t columns = std::min(layout.block_panel, divide_up(w.columns, w.block_columns) -
                                                               panel * layout.block_panel);
      if (last_run < run || last_run > w.run_count) return SECATEUR_CORRUPT;
      seen.assign(static_cast<size_t>(size), 0);
      int64_t left = size, before = columns;
      for (; run < last_run; ++run) {
        const int64_t count = w.runs[2 * run], groups = w.runs[2 * run + 1];
        if (count < 0 || count > before || groups < 1 || groups > left) return SECATEUR_CORRUPT;
        before = count;
        left -= groups;
        for (int64_t i = 0; i < groups; ++i) {
          const int32_t g = w.order[group++];
          if (g < 0 || g >= size || seen[static_cast<size_t>(g)]++) return SECATEUR_CORRUPT;
          if (count > w.blocks - block) return SECATEUR_CORRUPT;
          int64_t last = -1;
          for (int64_t e = 0; e < count; ++e) {
            const int64_t c = index_at(w, block);
            if (c <= last || c >= columns) return SECATEUR_CORRUPT;
            const int64_t row = (layout.part_begin(part) + g) * w.block_rows;
            if (!clean_outside(w, block++, row, panel * w.panel + c * w.block_columns)) return SECATEUR_CORRUPT;
            last = c;
          }
        }
      }
      if (left != 0) return SECATEUR_CORRUPT;
    }
  const int64_t* end = w.starts + 3 * layout.cells();
  const bool whole = end[0] == run && end[1] == group && end[2] == block && run == w.run_count && block == w.blocks;
  return whole ? SECATEUR_OK : SECATEUR_CORRUPT;
}

int32_t panelled_unpack(const secateur_panelled& w, float* weights) {
  const Layout layout(w);
  std::fill(weights, weights + w.rows * w.columns, 0.0f);
  int64_t run = 0, group = 0, block = 0;
  const float* value = w.values;
  for (int64_t part = 0; part < layout.parts; ++part)
    for (int64_t panel = 0; panel < layout.panels; ++panel) {
      const int64_t last_run = w.starts[3 * (part * layout.panels + panel + 1)];
      for (; run < last_run; ++run)
        for (int64_t i = 0; i < w.runs[2 * run + 1]; ++i) {
          const int64_t row = (layout.part_begin(part) + w.order[group++]) * w.block_rows;
          for (int64_t e = 0; e < w.runs[2 * run]; ++e) {
            const int64_t column = panel * w.panel + index_at(w, block++) * w.block_columns;
            for (int64_t r = row; r < row + w.block_rows; ++r)
              for (int64_t c = column; c < column + w.block_columns; ++c, ++value)
                if (r < w.rows && c < w.columns) weights[r * w.columns + c] = *value;
          }
        }
    }
  return SECATEUR_OK;
}

int32_t bitmask_count(const float* weights, int64_t rows, int64_t columns, int64_t* count) {
  *count = rows * columns - std::count(weights, weights + rows * columns, 0.0f);
  return SECATEUR_OK;
}

int32_t bitmask_pack(const float* weights, const secateur_bitmask& w, float* values, uint64_t* bits,
                     int64_t* offsets) {
  const float* first = values;
  for (int64_t r = 0; r < w.rows; ++r) {
    *offsets++ = values - first;
    for (int64_t c = 0; c < w.columns; c += 64) {
      uint64_t word = 0;
      for (int64_t i = 0; i < std::min<int64_t>(64, w.columns - c); ++i) {
        const float weight = weights[r * w.columns + c + i];
        if (weight == 0.0f) continue;
        word |= uint64_t{1} << i;
        *values++ = weight;
      }
      *bits++ = word;
    }
  }
  *offsets = values - first;
  std::fill(values, values + SECATEUR_BITMASK_SLACK, 0.0f);
  return SECATEUR_OK;
}

int32_t bitmask_check(const secateur_bitmask& w, int64_t values, int64_t bits, int64_t offsets) {
  const int64_t words = divide_up(w.columns, 64);
  if (w.count < 0 || w.count > kMost) return SECATEUR_CORRUPT;
  if (bits != w.rows * words || offsets != w.rows + 1 || values != w.count + SECATEUR_BITMASK_SLACK)
    return SECATEUR_CORRUPT;
  int64_t at = 0;
  for (int64_t r = 0; r < w.rows; ++r) {
    if (w.offsets[r] != at) return SECATEUR_CORRUPT;
    for (int64_t i = 0; i < words; ++i) {
      uint64_t word = w.bits[r * words + i];
      const int64_t columns = w.columns - 64 * i;
      if (columns < 64 && (word >> columns) != 0) return SECATEUR_CORRUPT;
      for (; word != 0; word &= word - 1) ++at;
    }
  }
  return w.offsets[w.rows] == at && at == w.count ? SECATEUR_OK : SECATEUR_CORRUPT;
}

int32_t bitmask_unpack(const secateur_bitmask& w, float* weights) {
  const float* value = w.values;
  const int64_t words = divide_up(w.columns, 64);
  for (int64_t r = 0; r < w.rows; ++r)
    for (int64_t c = 0; c < w.columns; ++c) {
      const bool there = (w.bits[r * words + c / 64] >> (c % 64)) & 1;
      weights[r * w.columns + c] = there ? *value++ : 0.0f;
    }
  return SECATEUR_OK;
}

}  // namespace secateur

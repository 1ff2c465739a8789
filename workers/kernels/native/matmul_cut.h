// How a matrix product is cut into items for the PEs: some panels times a block of rows each.
//
// Neighbouring items share panels, not rows, so that a panel comes from memory once.
#pragma once

#include <algorithm>

#include "kernel_table.h"
#include "matrix.h"

namespace furiosa {

// Items per PE in a job that is cut evenly: enough for a held-up PE's share to move elsewhere, and
// for all to end at nearly the same time.
constexpr int kItemsPerPe = 24;

// How many rows of a step are multiplied at a time: blocks are about equal, since a small one would wait
// for memory. Whole 16, which the AMX family takes at once.
inline int rows_per_block(int num_rows) {
  const int num_blocks = (num_rows + kMaxMatmulRows - 1) / kMaxMatmulRows;
  const int even = (num_rows + num_blocks - 1) / num_blocks;
  return (even + 15) / 16 * 16;
}

// How many rows are multiplied together with this one.
inline int rows_in_block_of(int row, int num_rows) {
  const int block = rows_per_block(num_rows);
  return std::min(block, num_rows - row / block * block);
}

struct MatmulCut {
  struct Part {
    int panel_begin, panel_end, row_begin, row_end;
  };

  MatmulCut(const Matrix& w, int num_rows, int num_pes)
      : num_rows(num_rows),
        num_panels(w.num_panels),
        block_rows(rows_per_block(num_rows)),
        num_row_blocks((num_rows + block_rows - 1) / block_rows) {
    const int num_stretches = std::max(1, num_pes * kItemsPerPe / num_row_blocks);
    panels_per_item = (num_panels + num_stretches - 1) / num_stretches;
    panels_per_item += panels_per_item % 2;  // a family may multiply two at a time
    num_items = (num_panels + panels_per_item - 1) / panels_per_item * num_row_blocks;
  }

  Part part(int item) const {
    const int panel = item / num_row_blocks * panels_per_item;
    const int row = item % num_row_blocks * block_rows;
    return {panel, std::min(panel + panels_per_item, num_panels), row,
            std::min(row + block_rows, num_rows)};
  }

  int num_rows, num_panels, block_rows, num_row_blocks;
  int panels_per_item, num_items;
};

}  // namespace furiosa

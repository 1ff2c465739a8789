// Room for the left operand of a matmul.
#pragma once

#include "kernel_table.h"
#include "mapped_memory.h"

namespace furiosa {

// For up to `num_rows` rows of up to `cols` inputs.
inline Activations take_activations(Arena& arena, int64_t num_rows, int64_t cols) {
  const int64_t num_groups = num_rows * ((cols + kGroupSize - 1) / kGroupSize);
  const int64_t tile_rows = whole_row_blocks(num_rows);
  Activations x;
  x.num_rows = static_cast<int>(num_rows);
  x.cols = static_cast<int>(cols);
  x.values = arena.take<float>(num_rows * cols);
  x.halves = arena.take<uint16_t>(tile_rows * cols);
  x.quants = arena.take<int8_t>(num_rows * cols);
  x.scales = arena.take<float>(num_groups);
  x.scaled_sums = arena.take<float>(num_groups);
  x.offsets = arena.take<int32_t>(num_groups);
  x.word_sums = arena.take<int32_t>(num_groups);
  x.group_offsets = arena.take<int32_t>(num_groups);
  x.tile_quants = arena.take<int8_t>(tile_rows * cols);
  x.tile_scales = arena.take<float>(tile_rows * cols / kGroupSize);
  x.tile_scaled_sums = arena.take<float>(tile_rows * cols / kGroupSize);
  return x;
}

}  // namespace furiosa

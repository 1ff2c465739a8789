// How the AMX family rounds inputs: into the order in which tiles take them.
// Included inside the family's namespace, after matmul_bf16_amx.h.

// `first`'s 16 numbers, then `second`'s, rounded half to even.
SIMD_INLINE __m512i bf16_from_floats(__m512 first, __m512 second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

// Where the tiles have what belongs to a row and its index-th inputs of `count`: (rows/16, count, 16).
SIMD_INLINE int64_t place_of_row(int row, int index, int count) {
  return (int64_t{row / kTileRows} * count + index) * kTileRows + row % kTileRows;
}

#if !defined(FS_EMULATE_ISA)
// Rows that only tiles take have the others' fields not filled.
template <bool IsForTilesOnly>
void quantize_pairs_for_tiles(const float* values, const Activations& x, const Matrix& weights, int row,
                              int col_begin, int col_end) {
  with_pairs_of(weights, [&](auto pairs) __attribute__((always_inline)) {
    constexpr int kPairs = decltype(pairs)::value, kInputs = kPairs * kPairSize;
    for (int col = col_begin; col < col_end; col += kInputs, values += kInputs) {
      const Quants16<kPairs> quants = quantized16<kPairs>(values, weights);
      for (int pair = 0; pair < kPairs; ++pair) {
        const int64_t place = place_of_row(row, col / kPairSize + pair, x.cols / kPairSize);
        _mm512_storeu_si512(x.tile_quants + place * kPairSize, quants.bytes(pair));
      }
      x.tile_scales[place_of_row(row, col / kInputs, x.cols / kInputs)] = quants.scale;
      if (!IsForTilesOnly) put_quants(quants, x, weights.dtype == kNested4, row, col);
    }
  });
}
#endif

void quantize_for_tiles(const float* values, const Activations& x, const Matrix& weights, int row,
                        int col_begin, int col_end) {
  const int group = weights.scale_group;
#if !defined(FS_EMULATE_ISA)
  if (group != kGroupSize) {
    const bool is_in_whole_block = row < x.num_rows / kTileRows * kTileRows;
    (is_in_whole_block ? quantize_pairs_for_tiles<true> : quantize_pairs_for_tiles<false>)(
        values, x, weights, row, col_begin, col_end);
    return;
  }
#endif
  quantize16(values, x, weights, row, col_begin, col_end);
  const int tile = tile_inputs(weights), num_scales = x.cols / group;
  const int8_t* quants = x.quants + int64_t{row} * x.cols + col_begin;
  int8_t* to = x.tile_quants + place_of_row(row, col_begin / tile, x.cols / tile) * tile;
  for (int col = col_begin; col < col_end; col += tile, to += kTileRows * tile) {
    for (int i = 0; i < tile; i += kGroupSize, quants += kGroupSize) std::memcpy(to + i, quants, kGroupSize);
  }
  for (int g = col_begin / group; g < col_end / group; ++g) {
    const int64_t place = place_of_row(row, g, num_scales), index = int64_t{row} * num_scales + g;
    x.tile_scales[place] = x.scales[index];
    if (weights.has_min) x.tile_scaled_sums[place] = x.scaled_sums[index];
  }
}

// As the AVX-512 family's, and what tiles take: for bf16 weights instead, for quantised ones as well.
void quantize_amx(const float* values, const Activations& x, const Matrix& weights, int row,
                  int col_begin, int col_end) {
  if (weights.is_quantized()) {
    quantize_for_tiles(values, x, weights, row, col_begin, col_end);
    return;
  }
  int col = col_begin;
  for (; col + kTileInputs <= col_end; col += kTileInputs, values += kTileInputs) {
    _mm512_storeu_si512(x.halves + place_in_tiles(row, col, x.cols),
                        bf16_from_floats(_mm512_loadu_ps(values), _mm512_loadu_ps(values + 16)));
  }
  if (col == col_end) return;
  uint16_t halves[kTileInputs];  // not read: these inputs fill no tile
  round_to_bf16(halves, x.values + static_cast<int64_t>(row) * x.cols + col, values, col_end - col);
}

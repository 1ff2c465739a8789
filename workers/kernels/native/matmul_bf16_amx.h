// bf16 products of the AMX family: up to two blocks of 16 rows by two panels in tiles.
//
// The tiles sum over all inputs in their own order: over 32 inputs the even and the odd ones, then the
// two, then onto the sum; inputs past a multiple of 32 follow from left to right, each one FMA. Any
// number of rows is done so, since an output's bits depend on its own row of a tile alone.
// Included inside the family's namespace, after matmul_amx.h.

constexpr int kTileInputs = 32;  // bfloat16 inputs of one tile product
constexpr int kTileHalves = kTileRows * kTileInputs;

// Where Activations::halves has an input: (rows/16, cols/32, 16, 32), so that a tile's lines follow
// each other.
SIMD_INLINE int64_t place_in_tiles(int row, int col, int cols) {
  const int64_t num_tiles = int64_t{row / kTileRows} * (cols / kTileInputs) + col / kTileInputs;
  return num_tiles * kTileHalves + row % kTileRows * kTileInputs + col % kTileInputs;
}

// Tiles 0 to 3: sums, of the first block of rows times both panels, then of the second; 4 and 5: a
// block's inputs each; 6 and 7: a panel's weights each.
constexpr TileConfig bf16_tiles(int rows) {
  TileConfig config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {}};
  for (int tile = 0; tile < 6; ++tile) config.rows[tile] = static_cast<uint8_t>(rows);
  config.rows[6] = config.rows[7] = kTileInputs / 2;
  return config;
}

constexpr int kSums = kTileRows * kPanelRows;
constexpr int kRowsAtOnce = 2 * kTileRows;

// sums: (Blocks, 2, 16, 16). inputs: of the blocks, `block_stride` apart.
template <int Blocks, int Panels>
SIMD_INLINE void multiply_tiles(float* sums, const uint16_t* inputs, int64_t block_stride,
                                const uint16_t* const (&weights)[2], int num_tiles,
                                PanelFetch& fetch) {
  TILE_ZERO(0);
  if (Panels == 2) TILE_ZERO(1);
  if (Blocks == 2) TILE_ZERO(2);
  if (Blocks * Panels == 4) TILE_ZERO(3);
  for (int64_t place = 0; place < int64_t{num_tiles} * kTileHalves; place += kTileHalves) {
    fetch.advance_to_second();
    TILE_LOAD(4, inputs + place, 64);
    TILE_LOAD(6, weights[0] + place, 64);
    if (Blocks == 2) TILE_LOAD(5, inputs + block_stride + place, 64);
    if (Panels == 2) TILE_LOAD(7, weights[1] + place, 64);
    TILE_DOT_BF16(0, 4, 6);
    if (Blocks == 2) TILE_DOT_BF16(2, 5, 6);
    if (Panels == 2) TILE_DOT_BF16(1, 4, 7);
    if (Blocks * Panels == 4) TILE_DOT_BF16(3, 5, 7);
  }
  TILE_STORE(0, sums, 64);
  if (Panels == 2) TILE_STORE(1, sums + kSums, 64);
  if (Blocks == 2) TILE_STORE(2, sums + 2 * kSums, 64);
  if (Blocks * Panels == 4) TILE_STORE(3, sums + 3 * kSums, 64);
}

// From the sums of some rows of a block to the outputs, with the inputs that fill no tile.
SIMD_INLINE void finish_rows(const Matrix& w, int panel, const Activations& x, int row, int count,
                             const float* sums, const Output& out) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int m = 0; m < count; ++m, sums += kPanelRows) {
    __m512 acc = _mm512_loadu_ps(sums);
    const float* values = x.values + static_cast<int64_t>(row + m) * w.cols;
    for (int k = w.cols / kTileInputs * kTileInputs; k < w.cols; k += 2) {
      const __m512i pairs = load_quad(w.panel(panel) + k * kPanelRows * 2);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
      acc = _mm512_fmadd_ps(splat16(values[k]), even, acc);
      acc = _mm512_fmadd_ps(splat16(values[k + 1]), odd, acc);
    }
    store_outputs(acc, w, panel, row + m, out);
  }
}

// Up to 32 rows times `Panels` panels.
template <int Panels>
SIMD_INLINE void multiply_rows(const Matrix& w, int panel, const Activations& x, int row,
                               int row_end, const Output& out, PanelFetch& fetch) {
  alignas(64) float sums[4 * kSums];
  const int num_tiles = w.cols / kTileInputs;
  const int64_t block_stride = int64_t{num_tiles} * kTileHalves;
  const uint16_t* inputs = x.halves + place_in_tiles(row, 0, w.cols);
  const uint16_t* const weights[2] = {
      reinterpret_cast<const uint16_t*>(w.panel(panel)),
      reinterpret_cast<const uint16_t*>(w.panel(panel + Panels - 1))};
  if (row_end - row > kTileRows) {
    multiply_tiles<2, Panels>(sums, inputs, block_stride, weights, num_tiles, fetch);
  } else {
    multiply_tiles<1, Panels>(sums, inputs, block_stride, weights, num_tiles, fetch);
  }
  for (int first = 0; row + first < row_end && first < kRowsAtOnce; first += kTileRows) {
    const int count = std::min(kTileRows, row_end - row - first);
    for (int i = 0; i < Panels; ++i) {
      const float* of_panel = sums + (first / kTileRows * 2 + i) * kSums;
      finish_rows(w, panel + i, x, row + first, count, of_panel, out);
    }
  }
}

// Rows past the last, up to a whole tile, are multiplied as they lie in x.halves, and not stored.
void matmul_amx_bf16(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                     int row_begin, int row_end, const Output& out, void*) {
  const TileConfig config = bf16_tiles(std::min(row_end - row_begin, kTileRows));
  const int num_rounds = (row_end - row_begin + kRowsAtOnce - 1) / kRowsAtOnce;
  load_tile_config(config);
  for (int panel = panel_begin; panel < panel_end; panel += 2) {
    const int count = std::min(2, panel_end - panel);
    PanelFetch fetch(w, panel + count, 2, int64_t{num_rounds} * (w.cols / kTileInputs + 1));
    for (int row = row_begin; row < row_end; row += kRowsAtOnce) {
      if (count == 2) {
        multiply_rows<2>(w, panel, x, row, row_end, out, fetch);
      } else {
        multiply_rows<1>(w, panel, x, row, row_end, out, fetch);
      }
    }
  }
  release_tiles();
}

// Matrix products of the AMX family: blocks of 16 rows by one panel in tiles.
//
// int8 and int4: a group is one tile product of 16 rows x 32 inputs by 32 inputs x 16 outputs, which
// a panel's int8 data are as they lie. The sums are the integers that vpdpbusd gives, and the
// floating-point part is the AVX-512 family's, so that fewer than 16 rows, and the rows that are
// left over, go through its kernels with the same bits. Half a tile's depth stays empty: a group has
// a scale of its own, and what bounds the loop is scaling (three operations a row), not the tiles.
//
// bf16: the tiles sum over all inputs in their own order: over 32 inputs the even and the odd ones,
// then the two, then onto the sum; inputs past a multiple of 32 follow from left to right, each one
// FMA. Any number of rows is done so, since an output's bits depend on its own row of a tile alone.
// Three blocks of rows share a panel's tiles, and hide the latency of a tile product.
// Included inside the family's namespace, after matmul_avx512.h.

constexpr int kTileRows = 16;

template <bool HasMin>
SIMD_INLINE void add_group(__m512 (&acc)[kTileRows], const int32_t* dots, const uint16_t* scales,
                           const uint16_t* mins, const Activations& x, int64_t first, int groups) {
  const __m512 scale = load16_half(scales);
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m) {
    const __m512 dot = _mm512_cvtepi32_ps(_mm512_loadu_si512(dots + m * kPanelRows));
    const __m512 input_scale = splat16(x.scales[first + static_cast<int64_t>(m) * groups]);
    acc[m] = _mm512_fmadd_ps(dot, _mm512_mul_ps(input_scale, scale), acc[m]);
  }
  if (HasMin) {
    const __m512 min = load16_half(mins);
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; ++m) {
      const float sum = x.scaled_sums[first + static_cast<int64_t>(m) * groups];
      acc[m] = _mm512_fmadd_ps(splat16(sum), min, acc[m]);
    }
  }
}

// A panel as the tiles take it.
struct TilePanel {
  const int8_t* values;  // [cols/32][8][16][4]
  const uint16_t *scales, *mins;  // mins: null without
};

// Rows [row, row + 16) times a panel; only those from `first_stored` on are stored. Two groups at a
// time, so that one is scaled while the other is in the tiles.
template <bool HasMin>
void tile_block(const Matrix& w, int panel, const TilePanel& data, const Activations& x, int row,
                int first_stored, const Output& out) {
  alignas(64) int32_t dots[2][kTileRows * kPanelRows];
  const int groups = w.num_groups();
  const int8_t* quants = x.quants + static_cast<int64_t>(row) * w.cols;
  const int64_t first = static_cast<int64_t>(row) * groups;
  __m512 acc[kTileRows];
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m) acc[m] = splat16(0.0f);
  const auto add = [&](int buffer, int g) __attribute__((always_inline)) {
    add_group<HasMin>(acc, dots[buffer], data.scales + g * kPanelRows,
                      HasMin ? data.mins + g * kPanelRows : nullptr, x, first + g, groups);
  };
  int g = 0;
  for (; g + 2 <= groups; g += 2) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_LOAD(2, quants + g * kGroupSize, w.cols);
    TILE_LOAD(4, data.values + g * 512, 64);
    TILE_DOT_INT8(0, 2, 4);
    TILE_LOAD(3, quants + (g + 1) * kGroupSize, w.cols);
    TILE_LOAD(5, data.values + (g + 1) * 512, 64);
    TILE_DOT_INT8(1, 3, 5);
    TILE_STORE(0, dots[0], 64);
    TILE_STORE(1, dots[1], 64);
    add(0, g);
    add(1, g + 1);
  }
  if (g < groups) {
    TILE_ZERO(0);
    TILE_LOAD(2, quants + g * kGroupSize, w.cols);
    TILE_LOAD(4, data.values + g * 512, 64);
    TILE_DOT_INT8(0, 2, 4);
    TILE_STORE(0, dots[0], 64);
    add(0, g);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m) {
    if (row + m >= first_stored) store_outputs(acc[m], w, panel, row + m, out);
  }
}

// Fewer rows than this are faster without tiles; so many left over are done by a block that begins
// among the rows before them.
constexpr int kMinLeftOver = 6;

constexpr TileConfig kInt8Tiles = {
    1, 0, {}, {64, 64, 32, 32, 64, 64}, {kTileRows, kTileRows, kTileRows, kTileRows, 8, 8}};

// `Few` multiplies fewer than 16 rows without tiles.
template <bool HasMin, template <int> class Few>
SIMD_INLINE void tile_panel(const Matrix& w, int panel, const TilePanel& data, const Activations& x,
                            int row, int row_end, const Output& out) {
  for (; row + kTileRows <= row_end; row += kTileRows) {
    tile_block<HasMin>(w, panel, data, x, row, row, out);
  }
  if (row_end - row >= kMinLeftOver) {
    tile_block<HasMin>(w, panel, data, x, row_end - kTileRows, row, out);
  } else {
    run_panel16<Few>(w, panel, x, row, row_end, out);
  }
}

void matmul_amx_int8(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                     int row_begin, int row_end, const Output& out, void* scratch) {
  if (row_end - row_begin < kTileRows) {
    matmul16_int8(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch);
    return;
  }
  load_tile_config(kInt8Tiles);
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    TilePanel data;
    data.values = reinterpret_cast<const int8_t*>(w.panel(panel));
    data.scales = reinterpret_cast<const uint16_t*>(data.values + w.cols * kPanelRows);
    data.mins = nullptr;
    tile_panel<false, Tile16Int8>(w, panel, data, x, row_begin, row_end, out);
  }
  release_tiles();
}

// Nibbles as the signed bytes that they stand for: 0 to 15 with mins, -8 to 7 without.
SIMD_INLINE void unpack_nibbles(int8_t* values, const uint8_t* panel, int groups, bool has_min) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i offset = has_min ? _mm512_setzero_si512() : _mm512_set1_epi8(8);
  for (int g = 0; g < groups; ++g, values += 512, panel += 256) {
    for (int quad = 0; quad < 4; ++quad) {
      const __m512i packed = load_quad(panel + quad * 64);
      const __m512i low = _mm512_and_si512(packed, nibble);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
      _mm512_storeu_si512(values + quad * 64, _mm512_sub_epi8(low, offset));
      _mm512_storeu_si512(values + (quad + 4) * 64, _mm512_sub_epi8(high, offset));
    }
  }
}

void matmul_amx_int4(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                     int row_begin, int row_end, const Output& out, void* scratch) {
  if (row_end - row_begin < kTileRows) {
    matmul16_int4(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch);
    return;
  }
  int8_t* values = static_cast<int8_t*>(scratch);
  load_tile_config(kInt8Tiles);
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    const uint8_t* packed = w.panel(panel);
    unpack_nibbles(values, packed, w.num_groups(), w.has_min);
    TilePanel data;
    data.values = values;
    data.scales = reinterpret_cast<const uint16_t*>(packed + w.cols * kPanelRows / 2);
    data.mins = data.scales + w.num_groups() * kPanelRows;
    if (w.has_min) {
      tile_panel<true, Tile16Int4Min>(w, panel, data, x, row_begin, row_end, out);
    } else {
      tile_panel<false, Tile16Int4Plain>(w, panel, data, x, row_begin, row_end, out);
    }
  }
  release_tiles();
}

constexpr int kTileDepth = 32;  // bfloat16 inputs of one tile product
constexpr int kMaxBlocks = 3;

// Tiles 0, 1, 2: sums of a block of rows each; 3, 4, 5: its inputs; 6: weights. A block without rows
// is set up like a whole one, and not used.
constexpr TileConfig bf16_tiles(int num_rows) {
  TileConfig config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64}, {}};
  for (int block = 0; block < kMaxBlocks; ++block) {
    const int left = num_rows - block * kTileRows;
    const int rows = left <= 0 || left > kTileRows ? kTileRows : left;
    config.rows[block] = config.rows[kMaxBlocks + block] = static_cast<uint8_t>(rows);
  }
  config.rows[2 * kMaxBlocks] = kTileRows;
  return config;
}

// What is left of `w.cols` past `depth`, and the store. sums: (rows, 16 outputs).
SIMD_INLINE void finish_bf16(const Matrix& w, int panel, const Activations& x, int row, int rows,
                             int depth, const float* sums, const Output& out) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int m = 0; m < rows; ++m, sums += kPanelRows) {
    const float* values = x.values + static_cast<int64_t>(row + m) * w.cols;
    __m512 acc = _mm512_loadu_ps(sums);
    for (int k = depth; k < w.cols; k += 2) {
      const __m512i pairs = load_quad(w.panel(panel) + k * kPanelRows * 2);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
      acc = _mm512_fmadd_ps(splat16(values[k]), even, acc);
      acc = _mm512_fmadd_ps(splat16(values[k + 1]), odd, acc);
    }
    store_outputs(acc, w, panel, row + m, out);
  }
}

void matmul_amx_bf16(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                     int row_begin, int row_end, const Output& out, void*) {
  constexpr int kBlock = kTileRows * kPanelRows, kMaxRows = kMaxBlocks * kTileRows;
  alignas(64) float sums[kMaxBlocks * kBlock];
  const int depth = w.cols / kTileDepth * kTileDepth, stride = w.cols * 2;
  for (int row = row_begin; row < row_end; row += kMaxRows) {
    const int rows = row_end - row < kMaxRows ? row_end - row : kMaxRows;
    const uint16_t* first = x.halves + static_cast<int64_t>(row) * w.cols;
    const uint16_t *second = first + kTileRows * w.cols, *third = second + kTileRows * w.cols;
    const bool has_second = rows > kTileRows, has_third = rows > 2 * kTileRows;
    const TileConfig config = bf16_tiles(rows);
    load_tile_config(config);
    for (int panel = panel_begin; panel < panel_end; ++panel) {
      const uint8_t* weights = w.panel(panel);
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      for (int k = 0; k < depth; k += kTileDepth) {
        TILE_LOAD(6, weights + k * kPanelRows * 2, 64);
        TILE_LOAD(3, first + k, stride);
        TILE_DOT_BF16(0, 3, 6);
        if (has_second) {
          TILE_LOAD(4, second + k, stride);
          TILE_DOT_BF16(1, 4, 6);
        }
        if (has_third) {
          TILE_LOAD(5, third + k, stride);
          TILE_DOT_BF16(2, 5, 6);
        }
      }
      TILE_STORE(0, sums, 64);
      TILE_STORE(1, sums + kBlock, 64);
      TILE_STORE(2, sums + 2 * kBlock, 64);
      finish_bf16(w, panel, x, row, rows, depth, sums, out);
    }
    release_tiles();
  }
}

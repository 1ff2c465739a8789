// Matrix products of the AMX family: blocks of 16 rows by one panel in tiles.
//
// int8 and int4: the inputs that share a scale are one tile product of 16 rows x 32 or 64 inputs by so
// many inputs x 16 outputs, which a panel's int8 data are as they lie. The sums are the integers that
// vpdpbusd gives, and the floating-point part is the AVX-512 family's, so that fewer than 16 rows, and
// the rows that are left over, go through its kernels with the same bits. 64 fill a tile; with 32, half
// of it stays empty.
//
// bf16: the tiles sum over all inputs in their own order: over 32 inputs the even and the odd ones,
// then the two, then onto the sum; inputs past a multiple of 32 follow from left to right, each one
// FMA. Any number of rows is done so, since an output's bits depend on its own row of a tile alone.
// Included inside the family's namespace, after matmul_avx512.h.

constexpr int kTileRows = 16;

// What a panel's sums are multiplied by.
struct PanelScales {
  const uint16_t *scales, *mins;  // (scales of a row, 16); mins: null without

  PanelScales(const Matrix& w, const uint8_t* place, bool has_min)
      : scales(reinterpret_cast<const uint16_t*>(place)),
        mins(has_min ? scales + w.num_scales() * kPanelRows : nullptr) {}
};

// An int32 below 2^22 in size, as a float: as mantissa of 1.5 * 2^23, which is then taken off.
//
// For some time after an instruction on tiles one of the two units for 512 bits takes no multiplication
// and no conversion, but additions (measured on an Emerald Rapids): two of these are faster then.
SIMD_INLINE __m512 float_by_adding(__m512i x) {
  const __m512i raised = _mm512_add_epi32(x, _mm512_set1_epi32(0x4b400000));
  return _mm512_sub_ps(_mm512_castsi512_ps(raised), splat16(0x1.8p23f));
}

// Sums of a group's products for 16 rows, scaled, onto `acc`. scales, sums: the rows' inputs'.
template <bool HasMin>
SIMD_INLINE void add_group(__m512 (&acc)[kTileRows], const int32_t* dots, const PanelScales& data,
                           int g, const float* scales, const float* sums) {
  const __m512 scale = load16_half(data.scales + g * kPanelRows);
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m) {
    const __m512 dot = float_by_adding(_mm512_loadu_si512(dots + m * kPanelRows));
    acc[m] = _mm512_fmadd_ps(dot, _mm512_mul_ps(splat16(scales[m]), scale), acc[m]);
  }
  if (HasMin) {
    const __m512 min = load16_half(data.mins + g * kPanelRows);
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; ++m) acc[m] = _mm512_fmadd_ps(splat16(sums[m]), min, acc[m]);
  }
}

// Asks for the lines that a block's outputs will be written to: other PEs have read or written them since,
// and stores that wait for them would hold up those of tiles.
SIMD_INLINE void own_outputs(int panel, int row, int count, const Output& out) {
  const float* y = out.values + row * out.stride + panel * kPanelRows;
  for (int m = 0; m < count; ++m, y += out.stride) asm volatile("prefetchw %0" : : "m"(*y));
}

// `count` rows' outputs of a panel; a block's are mostly whole and written without masks.
SIMD_INLINE void store_block(__m512 (&acc)[kTileRows], const Matrix& w, int panel, int row, int count,
                             const Output& out) {
  const int first = panel * kPanelRows;
  if (count < kTileRows || first + kPanelRows > w.rows) {
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; ++m) {
      if (m < count) store_outputs(acc[m], w, panel, row + m, out);
    }
    return;
  }
  const int64_t stride = out.stride;
  float* y = out.values + row * stride + first;
  if (out.bias != nullptr) {
    const __m512 bias = _mm512_loadu_ps(out.bias + first);
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; ++m) acc[m] = _mm512_add_ps(acc[m], bias);
  }
  if (out.accumulate) {
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; ++m) acc[m] = _mm512_add_ps(_mm512_loadu_ps(y + m * stride), acc[m]);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m) _mm512_storeu_ps(y + m * stride, acc[m]);
}

// Tile 0: sums; 1: inputs; 2: weights.
constexpr TileConfig int8_tiles(int num_inputs) {
  TileConfig config = {1, 0, {}, {64, 0, 64}, {kTileRows, kTileRows, 0}};
  config.row_nbytes[1] = static_cast<uint16_t>(num_inputs);
  config.rows[2] = static_cast<uint8_t>(num_inputs / 4);
  return config;
}

// The products of blocks of 16 rows, `Inputs` of the inputs at a time, with one panel after the other.
//
// What is begun is read two turns later: in the turn between, the tile is stored and the next product
// begun, so that none waits for another. (A CPU renames tiles, as it does registers.)
template <int Inputs, class Values>
class TileProducts {
 public:
  // What tiles store. Not within the object: what the compiler sees handed to assembly it cannot keep
  // in registers.
  struct alignas(64) Dots {
    int32_t of[2][kTileRows * kPanelRows];
  };

  // values(panel): the panel as the tiles take it, until it is called for the one after the next.
  TileProducts(const Matrix& w, int panel, int panel_end, const int8_t* inputs, int num_blocks,
               const Values& values, Dots& dots)
      : w_(w),
        values_(values),
        inputs_(inputs),
        num_scales_(w.num_scales()),
        num_blocks_(num_blocks),
        panel_(panel),
        panel_end_(panel_end),
        stored_(dots.of[0]),
        read_(dots.of[1]) {
    enter_panel();
    turn();
    turn();
  }

  // Goes on; returns the sums (16 rows, 16 outputs) of the product that was begun two turns before.
  SIMD_INLINE const int32_t* turn() {
    std::swap(stored_, read_);
    TILE_STORE(0, stored_, 64);
    if (panel_ < panel_end_) {
      fetch_.template advance<2>();  // few panels fit into the first-level cache beside the rest
      TILE_LOAD(1, input_, Inputs);
      TILE_LOAD(2, weights_, 64);
      TILE_ZERO(0);
      TILE_DOT_INT8(0, 1, 2);
      input_ += kTileRows * Inputs;
      weights_ += kPanelRows * Inputs;
      if (--scales_left_ == 0) enter_block();
    }
    return read_;
  }

 private:
  SIMD_INLINE void enter_block() {
    scales_left_ = num_scales_;
    weights_ = begin_;
    if (--blocks_left_ > 0) return;
    if (++panel_ < panel_end_) enter_panel();
  }
  SIMD_INLINE void enter_panel() {
    begin_ = weights_ = values_(panel_);
    input_ = inputs_;
    scales_left_ = num_scales_;
    blocks_left_ = num_blocks_;
    fetch_ = PanelFetch(w_, panel_ + 1, 1, int64_t{num_scales_} * num_blocks_);
  }

  const Matrix& w_;
  const Values& values_;
  const int8_t* inputs_;
  const int num_scales_, num_blocks_;
  int panel_, panel_end_, scales_left_, blocks_left_;
  const int8_t *begin_, *weights_, *input_;
  int32_t *stored_, *read_;
  PanelFetch fetch_;
};

// Panels times blocks of 16 rows from `row` to `row_end`, the last one perhaps in part. values(panel):
// as for TileProducts; scales_of(panel): what its sums are multiplied by.
template <bool HasMin, int Inputs, class Values, class Scales>
void multiply_blocks(const Matrix& w, int panel, int panel_end, const Activations& x, int row_begin,
                     int row_end, const Output& out, const Values& values, const Scales& scales_of) {
  if (row_begin >= row_end || panel >= panel_end) return;
  const int num_scales = w.num_scales();
  const int num_blocks = (row_end - row_begin + kTileRows - 1) / kTileRows;
  const int64_t first = int64_t{row_begin / kTileRows} * num_scales * kTileRows;
  typename TileProducts<Inputs, Values>::Dots dots;
  TileProducts<Inputs, Values> products(w, panel, panel_end, x.tile_quants + first * Inputs,
                                        num_blocks, values, dots);
  for (; panel < panel_end; ++panel) {
    const PanelScales data = scales_of(panel);
    const float *scales = x.tile_scales + first, *sums = x.tile_scaled_sums + first;
    for (int row = row_begin; row < row_end; row += kTileRows) {
      const int count = std::min(row_end - row, kTileRows);
      own_outputs(panel, row, count, out);
      __m512 acc[kTileRows];
#pragma GCC unroll 16
      for (int m = 0; m < kTileRows; ++m) acc[m] = splat16(0.0f);
      for (int g = 0; g < num_scales; ++g, scales += kTileRows, sums += kTileRows) {
        add_group<HasMin>(acc, products.turn(), data, g, scales, sums);
      }
      store_block(acc, w, panel, row, count, out);
    }
  }
}

// Fewer rows than this are faster without tiles.
constexpr int kMinLeftOver = 6;

// Panels times a range of rows, of which those that fill too little of a tile go to `few`, a kernel that
// gives the same bits. values_nbytes: of a panel before its scales; unpack(values, panel): writes int8
// (cols/32, 8, 16, 4) to `values` and returns where they are, which may be elsewhere.
template <bool HasMin, int Inputs, class Unpack>
SIMD_INLINE void multiply_int8(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                               int row_begin, int row_end, const Output& out, void* scratch,
                               MatmulKernel few, int64_t values_nbytes, const Unpack& unpack) {
  static constexpr TileConfig config = int8_tiles(Inputs);
  const int left_over = (row_end - row_begin) % kTileRows;
  const int tiles_end = left_over < kMinLeftOver ? row_end - left_over : row_end;
  if (row_end - row_begin >= kTileRows) {
    // A panel is unpacked while the one before is still multiplied.
    const int64_t panel_nbytes = int64_t{w.cols} * kPanelRows;
    const auto values = [&](int panel) __attribute__((always_inline)) {
      return unpack(static_cast<int8_t*>(scratch) + panel % 2 * panel_nbytes, panel);
    };
    const auto scales = [&](int panel) __attribute__((always_inline)) {
      return PanelScales(w, w.panel(panel) + values_nbytes, HasMin);
    };
    load_tile_config(config);
    multiply_blocks<HasMin, Inputs>(w, panel_begin, panel_end, x, row_begin, tiles_end, out, values, scales);
    release_tiles();
    row_begin = tiles_end;
  }
  if (row_begin < row_end) few(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch);
}

void matmul_amx_int8(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                     int row_begin, int row_end, const Output& out, void* scratch) {
  const auto values = [&](int8_t*, int panel) __attribute__((always_inline)) {
    return reinterpret_cast<const int8_t*>(w.panel(panel));
  };
  const int64_t values_nbytes = int64_t{w.cols} * kPanelRows;
  const auto multiply = w.scale_group == kGroupSize
                            ? multiply_int8<false, kGroupSize, decltype(values)>
                            : multiply_int8<false, 2 * kGroupSize, decltype(values)>;
  multiply(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch, matmul16_int8,
           values_nbytes, values);
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
  const auto unpack = [&](int8_t* values, int panel) __attribute__((always_inline)) {
    unpack_nibbles(values, w.panel(panel), w.num_groups(), w.has_min);
    return static_cast<const int8_t*>(values);
  };
  const int64_t values_nbytes = int64_t{w.cols} * kPanelRows / 2;
  const auto multiply = w.has_min ? multiply_int8<true, kGroupSize, decltype(unpack)>
                                  : multiply_int8<false, kGroupSize, decltype(unpack)>;
  multiply(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch, matmul16_int4,
           values_nbytes, unpack);
}

void matmul_amx_nested4(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                        int row_begin, int row_end, const Output& out, void* scratch) {
  const auto unpack = [&](int8_t* values, int panel) __attribute__((always_inline)) {
    unpack_nested(reinterpret_cast<uint8_t*>(values), w, panel, 0);
    return static_cast<const int8_t*>(values);
  };
  const int64_t values_nbytes = int64_t{w.cols} * kPanelRows / 2;
  multiply_int8<false, 2 * kGroupSize>(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch,
                                       matmul16_nested4, values_nbytes, unpack);
}

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
    fetch.template advance<2>();
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

// `first`'s 16 numbers, then `second`'s, rounded half to even.
SIMD_INLINE __m512i bf16_from_floats(__m512 first, __m512 second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

// Where the tiles have a row's scale: (rows/16, num_scales, 16), and of as many quants likewise.
SIMD_INLINE int64_t place_of_scale(int row, int scale, int num_scales) {
  return (int64_t{row / kTileRows} * num_scales + scale) * kTileRows + row % kTileRows;
}

#if !defined(FS_EMULATE_ISA)
// Pairs of groups. Rows that only tiles take have the others' fields not filled.
template <bool IsForTilesOnly>
void quantize_pairs_for_tiles(const float* values, const Activations& x, const Matrix& weights, int row,
                              int col_begin, int col_end) {
  constexpr int kInputs = 2 * kGroupSize;
  for (int col = col_begin; col < col_end; col += kInputs, values += kInputs) {
    const Pair16 pair = quantized_pair(values, weights);
    const int64_t place = place_of_scale(row, col / kInputs, x.cols / kInputs);
    _mm512_storeu_si512(x.tile_quants + place * kInputs, pair.bytes());
    x.tile_scales[place] = pair.scale;
    if (!IsForTilesOnly) put_pair(pair, x, weights.dtype == kNested4, row, col);
  }
}
#endif

void quantize_for_tiles(const float* values, const Activations& x, const Matrix& weights, int row,
                        int col_begin, int col_end) {
  const int group = weights.scale_group, num_scales = x.cols / group;
#if !defined(FS_EMULATE_ISA)
  if (group != kGroupSize) {
    const bool is_in_whole_block = row < x.num_rows / kTileRows * kTileRows;
    (is_in_whole_block ? quantize_pairs_for_tiles<true> : quantize_pairs_for_tiles<false>)(
        values, x, weights, row, col_begin, col_end);
    return;
  }
#endif
  quantize16(values, x, weights, row, col_begin, col_end);
  const int64_t first = int64_t{row} * num_scales;
  for (int g = col_begin / group; g < col_end / group; ++g) {
    const int64_t place = place_of_scale(row, g, num_scales);
    std::memcpy(x.tile_quants + place * group, x.quants + (first + g) * group,
                static_cast<size_t>(group));
    x.tile_scales[place] = x.scales[first + g];
    if (weights.has_min) x.tile_scaled_sums[place] = x.scaled_sums[first + g];
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

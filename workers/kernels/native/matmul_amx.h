// int8 and int4 products of the AMX family: blocks of 16 rows by one panel in tiles.
//
// A tile product is 16 rows x 64 inputs by 64 inputs x 16 outputs, which a panel's int8 data
// are as they lie; where scales are of 32 inputs, half of a tile stays empty. What shares a scale is
// summed up in tiles. The sums are the integers that vpdpbusd gives, and the floating-point part is the
// AVX-512 family's, so that fewer than 16 rows, and the rows that are left over, go through its
// kernels with the same bits.
// Included inside the family's namespace, after matmul_avx512.h.

constexpr int kTileRows = 16;

// How many of the inputs a tile takes.
SIMD_INLINE int tile_inputs(const Matrix& w) { return std::min(w.scale_group, kPairSize); }

// What a panel's sums are multiplied by.
struct PanelScales {
  const uint16_t *scales, *mins;  // (scales of a row, 16); mins: null without

  PanelScales(const uint16_t* scales, const uint16_t* mins) : scales(scales), mins(mins) {}
  PanelScales(const Matrix& w, const uint8_t* place, bool has_min)
      : scales(reinterpret_cast<const uint16_t*>(place)),
        mins(has_min ? scales + w.num_scales() * kPanelRows : nullptr) {}
};

// An int32 below 2^22 in size, as sums of 192 products of bytes are, as a float: as mantissa of
// 1.5 * 2^23, which is then taken off.
//
// For some time after an instruction on tiles one of the two units for 512 bits takes no multiplication
// and no conversion, but additions (measured on an Emerald Rapids): two of these are faster then.
SIMD_INLINE __m512 float_by_adding(__m512i x) {
  const __m512i raised = _mm512_add_epi32(x, _mm512_set1_epi32(0x4b400000));
  return _mm512_sub_ps(_mm512_castsi512_ps(raised), splat16(0x1.8p23f));
}

// What a tile has summed up for 16 rows, scaled, onto `acc`. scales, sums: the rows' inputs'.
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

// Blocks that are multiplied side by side at most.
constexpr int kMostBlocks = 4;

// Tiles 0 to 3: sums, of a block of rows each; 4 and 5: inputs; 6: weights.
constexpr TileConfig int8_tiles(int num_inputs) {
  const uint16_t nbytes = static_cast<uint16_t>(num_inputs);
  const uint8_t quads = static_cast<uint8_t>(num_inputs / 4);
  return {1, 0, {}, {64, 64, 64, 64, nbytes, nbytes, 64},
          {kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, quads}};
}

// The products of panels with one block of 16 rows after the other, `Inputs` of the inputs at a time.
//
// A turn multiplies what shares a scale, and its sums are read two turns later: in the turn between, the
// tile is stored and the next products begun, so that none waits for another. (A CPU renames tiles, as it does
// registers.) So a block's sums stay in registers over all its inputs.
template <int Inputs, class Values>
class BlockAfterBlock {
 public:
  // What tiles store. Not within the object: what the compiler sees handed to assembly it cannot keep
  // in registers.
  struct alignas(64) Dots {
    int32_t of[2][kTileRows * kPanelRows];
  };

  // values: see multiply_one_by_one.
  BlockAfterBlock(const Matrix& w, int panel, int panel_end, const int8_t* inputs, int num_blocks,
               const Values& values, Dots& dots)
      : w_(w),
        values_(values),
        inputs_(inputs),
        num_scales_(w.num_scales()),
        num_blocks_(num_blocks),
        tiles_per_scale_(w.scale_group / Inputs),
        panel_(panel),
        panel_end_(panel_end),
        stored_(dots.of[0]),
        read_(dots.of[1]) {
    enter_panel();
    turn();
    turn();
  }

  // Goes on; returns the sums (16 rows, 16 outputs) of what was begun two turns before.
  SIMD_INLINE const int32_t* turn() {
    std::swap(stored_, read_);
    TILE_STORE(0, stored_, 64);
    if (panel_ < panel_end_) {
      TILE_ZERO(0);
      const int num_tiles = Inputs == kGroupSize ? 1 : tiles_per_scale_;  // one alone: no loop
      for (int tile = 0; tile < num_tiles; ++tile) {
        fetch_.advance_to_second();
        TILE_LOAD(4, input_, Inputs);
        TILE_LOAD(6, weights_, 64);
        TILE_DOT_INT8(0, 4, 6);
        input_ += kTileRows * Inputs, weights_ += kPanelRows * Inputs;
      }
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
    fetch_ = PanelFetch(w_, panel_ + 1, 1, int64_t{w_.cols / Inputs} * num_blocks_);
  }

  const Matrix& w_;
  const Values& values_;
  const int8_t* inputs_;
  const int num_scales_, num_blocks_, tiles_per_scale_;
  int panel_, panel_end_, scales_left_, blocks_left_;
  const int8_t *begin_, *weights_, *input_;
  int32_t *stored_, *read_;
  PanelFetch fetch_;
};

// Panels times blocks of 16 rows from `row` to `row_end`, the last one perhaps in part. values(panel):
// the panel as the tiles take it, until it is called for the one after the next; scales_of(panel): what its sums are
// multiplied by.
template <bool HasMin, int Inputs, class Values, class Scales>
void multiply_one_by_one(const Matrix& w, int panel, int panel_end, const Activations& x, int row_begin,
                     int row_end, const Output& out, const Values& values, const Scales& scales_of) {
  if (row_begin >= row_end || panel >= panel_end) return;
  const int num_scales = w.num_scales();
  const int num_blocks = (row_end - row_begin + kTileRows - 1) / kTileRows;
  const int64_t first = int64_t{row_begin / kTileRows} * num_scales * kTileRows;  // of scales
  typename BlockAfterBlock<Inputs, Values>::Dots dots;
  BlockAfterBlock<Inputs, Values> products(w, panel, panel_end, x.tile_quants + first * w.scale_group,
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

// The products of panels with four blocks of 16 rows side by side, `Inputs` of the inputs at a time: weights
// are loaded once for all of them.
//
// What shares a scale is summed up in tiles, which are stored then. Those sums are scaled between the
// products that follow, of the next inputs, blocks or panel: until then they are `pending_`. In between, sums
// of the inputs so far wait in memory.
template <bool HasMin, int Inputs>
class BlocksSideBySide {
 public:
  // Not within the object: what the compiler sees handed to assembly it cannot keep in registers.
  struct alignas(64) Room {
    int32_t dots[kMostBlocks][kTileRows * kPanelRows];  // what tiles stored
    float sums[kMostBlocks][kTileRows * kPanelRows];    // scaled, of the inputs so far
  };

  BlocksSideBySide(const Matrix& w, const Activations& x, int row_end, const Output& out, Room& room)
      : w_(w),
        x_(x),
        out_(out),
        room_(room),
        row_end_(row_end),
        num_scales_(w.num_scales()),
        tiles_per_scale_(w.scale_group / Inputs) {}

  // Of `Blocks` blocks from `row` on. values: the panel as the tiles take it; scales: what its sums
  // are multiplied by; fetch goes on with every tile of the panel's.
  template <int Blocks>
  void multiply(int panel, int row, const int8_t* values, const PanelScales& scales, PanelFetch& fetch) {
    const int64_t block_stride = int64_t{w_.cols} * kTileRows;
    const int8_t* inputs = x_.tile_quants + row / kTileRows * block_stride;
    for (int g = 0; g < num_scales_; ++g) {
      TILE_ZERO(0);
      if (Blocks > 1) TILE_ZERO(1);
      if (Blocks > 2) TILE_ZERO(2);
      if (Blocks > 3) TILE_ZERO(3);
      int num_scaled = 0;
      for (int step = 1; step <= tiles_per_scale_; ++step) {
        fetch.advance_to_second();
        TILE_LOAD(6, values, 64);
        TILE_LOAD(4, inputs, Inputs);
        TILE_DOT_INT8(0, 4, 6);
        if (Blocks > 1) TILE_LOAD(5, inputs + block_stride, Inputs);
        if (Blocks > 1) TILE_DOT_INT8(1, 5, 6);
        if (Blocks > 2) TILE_LOAD(4, inputs + 2 * block_stride, Inputs);
        if (Blocks > 2) TILE_DOT_INT8(2, 4, 6);
        if (Blocks > 3) TILE_LOAD(5, inputs + 3 * block_stride, Inputs);
        if (Blocks > 3) TILE_DOT_INT8(3, 5, 6);
        values += kPanelRows * Inputs, inputs += kTileRows * Inputs;
        const int due = step * pending_.num_blocks / tiles_per_scale_;
        for (; num_scaled < due; ++num_scaled) scale_block(num_scaled);
      }
      TILE_STORE(0, room_.dots[0], 64);
      if (Blocks > 1) TILE_STORE(1, room_.dots[1], 64);
      if (Blocks > 2) TILE_STORE(2, room_.dots[2], 64);
      if (Blocks > 3) TILE_STORE(3, room_.dots[3], 64);
      pending_ = {panel, row, Blocks, g, scales};
    }
  }
  // After the last.
  void finish() {
    for (int block = 0; block < pending_.num_blocks; ++block) scale_block(block);
    pending_.num_blocks = 0;
  }

 private:
  struct Pending {
    int panel, row, num_blocks, g;
    PanelScales scales;
  };

  // Onto the block's sums, which go to the outputs with the last of the inputs.
  SIMD_INLINE void scale_block(int block) {
    const int row = pending_.row + block * kTileRows, g = pending_.g;
    const int count = std::min(row_end_ - row, kTileRows);
    const int64_t place = (int64_t{row / kTileRows} * num_scales_ + g) * kTileRows;
    float* sums = room_.sums[block];
    __m512 acc[kTileRows];
    if (g == 0) {
      own_outputs(pending_.panel, row, count, out_);
#pragma GCC unroll 16
      for (int m = 0; m < kTileRows; ++m) acc[m] = splat16(0.0f);
    } else {
#pragma GCC unroll 16
      for (int m = 0; m < kTileRows; ++m) acc[m] = _mm512_loadu_ps(sums + m * kPanelRows);
    }
    add_group<HasMin>(acc, room_.dots[block], pending_.scales, g, x_.tile_scales + place, x_.tile_scaled_sums + place);
    if (g + 1 == num_scales_) {
      store_block(acc, w_, pending_.panel, row, count, out_);
      return;
    }
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; ++m) _mm512_storeu_ps(sums + m * kPanelRows, acc[m]);
  }

  const Matrix& w_;
  const Activations& x_;
  const Output& out_;
  Room& room_;
  const int row_end_, num_scales_, tiles_per_scale_;
  Pending pending_ = {0, 0, 0, 0, {nullptr, nullptr}};
};

// The same.
template <bool HasMin, int Inputs, class Values, class Scales>
void multiply_side_by_side(const Matrix& w, int panel, int panel_end, const Activations& x, int row_begin,
                     int row_end, const Output& out, const Values& values, const Scales& scales_of) {
  if (row_begin >= row_end) return;
  const int num_blocks = (row_end - row_begin + kTileRows - 1) / kTileRows;
  const int num_turns = (num_blocks + kMostBlocks - 1) / kMostBlocks;
  typename BlocksSideBySide<HasMin, Inputs>::Room room;
  BlocksSideBySide<HasMin, Inputs> products(w, x, row_end, out, room);
  for (; panel < panel_end; ++panel) {
    const int8_t* of_panel = values(panel);
    const PanelScales scales = scales_of(panel);
    PanelFetch fetch(w, panel + 1, 1, int64_t{w.cols / Inputs} * num_turns);
    for (int row = row_begin; row < row_end; row += kMostBlocks * kTileRows) {
      switch ((row_end - row + kTileRows - 1) / kTileRows) {
        case 1: products.template multiply<1>(panel, row, of_panel, scales, fetch); break;
        case 2: products.template multiply<2>(panel, row, of_panel, scales, fetch); break;
        case 3: products.template multiply<3>(panel, row, of_panel, scales, fetch); break;
        default: products.template multiply<kMostBlocks>(panel, row, of_panel, scales, fetch); break;
      }
    }
  }
  products.finish();
}

// From more rows than this on, blocks side by side are faster, where several tiles share a scale. Sums of one tile
// each would have to be fetched and put back too often.
constexpr int kMostOneByOne = 64;

template <bool HasMin, int Inputs, class Values, class Scales>
void multiply_blocks(const Matrix& w, int panel, int panel_end, const Activations& x, int row_begin,
                     int row_end, const Output& out, const Values& values, const Scales& scales_of) {
  const bool is_one_by_one = row_end - row_begin <= kMostOneByOne || w.scale_group == Inputs;
  (is_one_by_one ? multiply_one_by_one<HasMin, Inputs, Values, Scales>
                 : multiply_side_by_side<HasMin, Inputs, Values, Scales>)(
      w, panel, panel_end, x, row_begin, row_end, out, values, scales_of);
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
  const auto multiply = tile_inputs(w) == kGroupSize ? multiply_int8<false, kGroupSize, decltype(values)>
                                                     : multiply_int8<false, kPairSize, decltype(values)>;
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
  multiply_int8<false, kPairSize>(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch,
                                  matmul16_nested4, values_nbytes, unpack);
}

void matmul_amx_int6(const Matrix& w, int panel_begin, int panel_end, const Activations& x, int row_begin,
                     int row_end, const Output& out, void* scratch) {
  const auto unpack = [&](int8_t* values, int panel) __attribute__((always_inline)) {
    unpack_int6(values, w, panel);
    return static_cast<const int8_t*>(values);
  };
  const int64_t values_nbytes = int64_t{w.num_groups()} * Int6Panel::kGroupNbytes;
  multiply_int8<false, kPairSize>(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch,
                                  matmul16_int6, values_nbytes, unpack);
}

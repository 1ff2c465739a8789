// nested4 products of the AVX-512 family: of few rows as nibbles, of many as bytes that they share.
// Included inside the family's namespace, after matmul_avx512.h.

// From so many rows on, unpacking a panel pays.
constexpr int kManyNestedRows = 12;

// What belongs to a pair of groups of nested4, an output in each 32-bit lane.
struct NestedWords {
  __m512i shifts;   // two words: the first group's, the second's
  __m512i factors;  // two nibbles likewise

  NestedWords(const NestedPanel& parts, int pair) {
    const int8_t* from = parts.shifts + pair * kPanelRows * 2;
    const uint8_t* bytes = parts.factors + pair * kPanelRows;
    shifts = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    factors = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  SIMD_INLINE __m512i factors_of(int group) const {
    const __m512i half = group == 0 ? factors : _mm512_srli_epi32(factors, 4);
    return _mm512_and_si512(half, _mm512_set1_epi32(15));
  }
  // In the low byte; the others are of no meaning.
  SIMD_INLINE __m512i shifts_of(int group) const {
    return group == 0 ? shifts : _mm512_srli_epi32(shifts, 16);
  }
};

// Makes weights of the nibbles of 32 inputs, a register of four inputs of 16 outputs at a time.
struct NestedBytes {
  __m512i factors, start;  // a weight's, in words and in bytes

  // `offset` is added to the weights.
  NestedBytes(const NestedWords& words, int group, int offset) {
    const __m512i factor = words.factors_of(group);
    const __m512i raised = _mm512_add_epi32(words.shifts_of(group), _mm512_set1_epi32(offset));
    const __m512i least = _mm512_sub_epi32(raised, _mm512_slli_epi32(factor, 3));  // of nibble 0
    factors = _mm512_add_epi32(factor, _mm512_slli_epi32(factor, 16));
    alignas(64) static constexpr uint32_t kLowBytes[16] = {
        0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c,
        0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c};
    start = _mm512_shuffle_epi8(least, _mm512_loadu_si512(kLowBytes));
  }
  // A product is at most 15 * 15, so that the two in a word stay apart.
  SIMD_INLINE __m512i weights(__m512i nibbles) const {
    return _mm512_add_epi8(_mm512_mullo_epi16(nibbles, factors), start);
  }
};

// values (cols/32, 8, 16, 4) = the panel's weights + offset, as bytes.
SIMD_INLINE void unpack_nested(uint8_t* values, const Matrix& w, int panel, int offset) {
  const NestedPanel parts(w, w.panel(panel));
  const uint8_t* nibbles = parts.nibbles;
  for (int pair = 0; pair < w.cols / kPairSize; ++pair) {
    const NestedWords words(parts, pair);
    for (int i = 0; i < 2; ++i, values += 512, nibbles += 256) {
      const NestedBytes bytes(words, i, offset);
      for (int quad = 0; quad < 4; ++quad) {
        const __m512i packed = load_quad(nibbles + quad * 64);
        _mm512_storeu_si512(values + quad * 64, bytes.weights(low_nibbles(packed)));
        _mm512_storeu_si512(values + (quad + 4) * 64, bytes.weights(high_nibbles(packed)));
      }
    }
  }
}

// Few rows: nibbles are multiplied as they are, as int4's are, and each group's sums of products,
// which 16 bits hold, by its factors:
//     x . (factor (q - 8) + shift) = factor (x . (q - 8)) + shift (sum of x)
template <int Rows, int Panels>
struct Tile16Nested4 {
  static SIMD_INLINE void run(Tile16<Rows, Panels>& acc, const Matrix& w, int panel,
                              const Activations& x, int row, PanelFetch& fetch) {
    static_assert(Panels == 1);
    const NestedPanel parts(w, w.panel(panel));
    const int num_scales = w.num_scales(), pairs_per_scale = w.scale_group / kPairSize;
    const int num_pairs = w.cols / kPairSize;
    const uint8_t* nibbles = parts.nibbles;
    TileRows quants(x.quants + int64_t{row} * w.cols, w.cols);
    TileRows input_scales(x.scales + int64_t{row} * num_scales, num_scales);
    TileRows word_sums(x.word_sums + int64_t{row} * num_pairs, num_pairs);
    TileRows offsets(x.group_offsets + int64_t{row} * 2 * num_pairs, 2 * num_pairs);
    for (int g = 0; g < num_scales; ++g) {
      __m512i sums[Rows] = {};
      for (int pair = 0; pair < pairs_per_scale; ++pair, word_sums.advance(4)) {
        const NestedWords words(parts, g * pairs_per_scale + pair);
        unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
          dot_words<m.value>(sums[m.value], words.shifts, word_sums);
        });
        for (int i = 0; i < 2; ++i, nibbles += 256) {
          fetch.advance();
          __m512i dot[1][Rows];
          unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
            dot[0][m.value] = splat_int<m.value>(offsets);
          });
          unrolled<4>([&](auto quad) __attribute__((always_inline)) {
            const __m512i packed = load_quad(nibbles + quad.value * 64);
            const __m512i low[1] = {low_nibbles(packed)}, high[1] = {high_nibbles(packed)};
            add_tile_products<quad.value * 4>(dot, low, quants);
            add_tile_products<quad.value * 4 + 16>(dot, high, quants);
          });
          const __m512i factors = words.factors_of(i);
          for (int m = 0; m < Rows; ++m) sums[m] = _mm512_dpwssd_epi32(sums[m], dot[0][m], factors);
          quants.advance(kGroupSize), offsets.advance(4);
        }
      }
      add_scaled(acc[0], sums, load16_half(parts.scales + g * kPanelRows), input_scales);
      input_scales.advance(4);
    }
  }
};

// Many rows of nested4 share one unpacking of the panels.
template <int Panels>
SIMD_INLINE void run_unpacked16(const Matrix& w, int panel, const Activations& x, int row,
                                int row_end, const Output& out, uint8_t* scratch) {
  const int64_t stride = int64_t{w.cols} * kPanelRows;
  for (int p = 0; p < Panels; ++p) unpack_nested(scratch + p * stride, w, panel + p, 128);
  const TilePanels<Panels> values(scratch, stride), scales(w, panel, w.cols * kPanelRows / 2);
  PanelFetch fetch = fetch_after<Panels>(w, panel, row_end - row);
  for_tiles(row, row_end, [&](int first, auto rows) __attribute__((always_inline)) {
    run_tile16<decltype(rows)::value, Panels>(
        w, panel, first, out, [&](auto& acc) __attribute__((always_inline)) {
          multiply_bytes<false>(acc, values, scales, w, x, first, fetch);
        });
  });
}

void matmul16_nested4(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                      int row_begin, int row_end, const Output& out, void* scratch) {
  uint8_t* unpacked = static_cast<uint8_t*>(scratch);
  const bool is_many = row_end - row_begin >= kManyNestedRows;
  int panel = panel_begin;
  for (; is_many && panel + 2 <= panel_end; panel += 2) {
    run_unpacked16<2>(w, panel, x, row_begin, row_end, out, unpacked);
  }
  for (; panel < panel_end; ++panel) {
    if (is_many) {
      run_unpacked16<1>(w, panel, x, row_begin, row_end, out, unpacked);
    } else {
      run_panels16<Tile16Nested4, 1>(w, panel, x, row_begin, row_end, out);
    }
  }
}

// int6 products of the AVX-512 family. However many rows, a tile makes bytes of the panel in registers: 12 to 24 rows
// take less time so than from bytes that they share, and steps of more as much (docs/decisions/014).
// Included inside the family's namespace, after matmul_avx512.h.

SIMD_INLINE __m512i masked(__m512i bytes, char mask) { return _mm512_and_si512(bytes, _mm512_set1_epi8(mask)); }

// Four quads, half of a group's weights, + 32: four inputs of 16 outputs each.
SIMD_INLINE void load_int6(__m512i (&quads)[4], const uint8_t* half) {
  const __m512i a = load_quad(half), b = load_quad(half + 64), c = load_quad(half + 128);
  quads[0] = masked(a, 63), quads[1] = masked(b, 63), quads[2] = masked(c, 63);
  const __m512i lower = _mm512_or_si512(masked(_mm512_srli_epi16(a, 6), 3), masked(_mm512_srli_epi16(b, 4), 12));
  quads[3] = _mm512_or_si512(lower, masked(_mm512_srli_epi16(c, 2), 48));
}

template <int Rows, int Panels>
struct Tile16Int6 {
  static SIMD_INLINE void run(Tile16<Rows, Panels>& acc, const Matrix& w, int panel, const Activations& x,
                              int row, PanelFetch& fetch) {
    const int num_scales = w.num_scales(), groups_per_scale = w.scale_group / kGroupSize;
    const int64_t first = int64_t{row} * num_scales;
    TilePanels<Panels> groups(w, panel, 0), scales(w, panel, w.num_groups() * Int6Panel::kGroupNbytes);
    TileRows quants(x.quants + int64_t{row} * w.cols, w.cols);
    TileRows input_scales(x.scales + first, num_scales), offsets(x.offsets + first, num_scales);
    for (int g = 0; g < num_scales; ++g) {
      __m512i dot[Panels][Rows];
      unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
        const __m512i offset = _mm512_srai_epi32(splat_int<m.value>(offsets), 2);  // -32 times the inputs' sum
        for (int p = 0; p < Panels; ++p) dot[p][m.value] = offset;
      });
      for (int i = 0; i < groups_per_scale; ++i) {
        fetch.advance();
        unrolled<2>([&](auto half) __attribute__((always_inline)) { add_half<half.value * 16>(dot, groups, quants); });
        quants.advance(kGroupSize);
      }
      for (int p = 0; p < Panels; ++p) add_scaled(acc[p], dot[p], scales.halves(p), input_scales);
      scales.advance(kPanelRows * 2), input_scales.advance(4), offsets.advance(4);
    }
  }

 private:
  // First: of its inputs in the group.
  template <int First>
  static SIMD_INLINE void add_half(__m512i (&dot)[Panels][Rows], TilePanels<Panels>& groups, const TileRows& quants) {
    __m512i quads[Panels][4];
    for (int p = 0; p < Panels; ++p) load_int6(quads[p], groups.first + p * groups.stride);
    unrolled<4>([&](auto quad) __attribute__((always_inline)) {
      __m512i weights[Panels];
      for (int p = 0; p < Panels; ++p) weights[p] = quads[p][quad.value];
      add_tile_products<First + quad.value * 4>(dot, weights, quants);
    });
    groups.advance(Int6Panel::kGroupNbytes / 2);
  }
};

constexpr MatmulKernel matmul16_int6 = matmul16<Tile16Int6>;

// values (cols/32, 8, 16, 4) = the panel's weights, as signed bytes. For the AMX family.
SIMD_INLINE void unpack_int6(int8_t* values, const Matrix& w, int panel) {
  const uint8_t* half = w.panel(panel);
  for (int i = 0; i < 2 * w.num_groups(); ++i, half += Int6Panel::kGroupNbytes / 2, values += 256) {
    __m512i quads[4];
    load_int6(quads, half);
    for (int quad = 0; quad < 4; ++quad) {
      _mm512_storeu_si512(values + quad * 64, _mm512_sub_epi8(quads[quad], _mm512_set1_epi8(32)));
    }
  }
}

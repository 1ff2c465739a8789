// Matrix products of the AVX-512 family, in register tiles of `Rows` rows by one panel, whose 16
// outputs are one register, or by two: then inputs, of which a row's are loaded anew for each product,
// are loaded half as often, which is what bounds CPUs that begin two products a cycle.
//
// Order of sums: as in the AVX2 family (matmul_avx2.h), lane for lane and operation for operation,
// so that both give the same bits: an output is one lane; fp32 and bf16 take inputs from left to
// right, each one FMA; integers take what shares a scale from left to right, the sum inside being
// exact: acc = fma(dot, input scale * weight scale, acc), then fma(scaled sum, min, acc). How an
// integer sum is split is free, since it is exact. Only bf16 on a CPU with instructions for it goes
// another way.
// Included inside the family's namespace, after tiles_avx512.h.

// A row's 16 outputs of a panel, of which only those that the matrix has are read and written.
SIMD_INLINE void store_outputs(__m512 acc, const Matrix& w, int panel, int row,
                               const Output& out) {
  const int first = panel * kPanelRows;
  float* y = out.values + row * out.stride + first;
  if (first + kPanelRows <= w.rows) {
    if (out.bias != nullptr) acc = _mm512_add_ps(acc, _mm512_loadu_ps(out.bias + first));
    if (out.accumulate) acc = _mm512_add_ps(_mm512_loadu_ps(y), acc);
    out.is_streamed ? _mm512_stream_ps(y, acc) : _mm512_storeu_ps(y, acc);
    return;
  }
  const __mmask16 present = static_cast<__mmask16>((1u << (w.rows - first)) - 1);
  if (out.bias != nullptr) acc = _mm512_add_ps(acc, _mm512_maskz_loadu_ps(present, out.bias + first));
  if (out.accumulate) acc = _mm512_add_ps(_mm512_maskz_loadu_ps(present, y), acc);
  _mm512_mask_storeu_ps(y, present, acc);
}

template <int Rows, int Panels>
using Tile16 = __m512[Panels][Rows];

// A tile's panels, which follow each other: the same place in each.
template <int Panels>
struct TilePanels {
  const uint8_t* first;
  int64_t stride;

  TilePanels(const uint8_t* first, int64_t stride) : first(first), stride(stride) {}
  TilePanels(const Matrix& w, int panel, int64_t nbytes)
      : TilePanels(w.panel(panel) + nbytes, static_cast<int64_t>(w.panel_stride)) {}
  SIMD_INLINE void load(__m512i (&weights)[Panels], int nbytes) const {
    for (int p = 0; p < Panels; ++p) weights[p] = load_quad(first + p * stride + nbytes);
  }
  SIMD_INLINE __m512 halves(int p) const {
    return load16_half(reinterpret_cast<const uint16_t*>(first + p * stride));
  }
  SIMD_INLINE void advance(int nbytes) { first += nbytes; }
};

template <int Rows, int Panels>
struct Tile16Fp32 {
  static SIMD_INLINE void run(Tile16<Rows, Panels>& acc, const Matrix& w, int panel,
                              const Activations& x, int row, PanelFetch& fetch) {
    TilePanels<Panels> values(w, panel, 0);
    const float* inputs = x.values + static_cast<int64_t>(row) * w.cols;
    for (int k = 0; k < w.cols; ++k, values.advance(64)) {
      if (k % kGroupSize == 0) fetch.advance();
      __m512i weights[Panels];
      values.load(weights, 0);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        const __m512 input = splat16(inputs[static_cast<int64_t>(m) * w.cols + k]);
        for (int p = 0; p < Panels; ++p) {
          acc[p][m] = _mm512_fmadd_ps(input, _mm512_castsi512_ps(weights[p]), acc[p][m]);
        }
      }
    }
  }
};

template <int Rows, int Panels>
struct Tile16Bf16 {
  static SIMD_INLINE void run(Tile16<Rows, Panels>& acc, const Matrix& w, int panel,
                              const Activations& x, int row, PanelFetch& fetch) {
    TilePanels<Panels> values(w, panel, 0);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const float* inputs = x.values + static_cast<int64_t>(row) * w.cols;
    for (int k = 0; k < w.cols; k += 2, values.advance(64)) {
      if (k % kGroupSize == 0) fetch.advance();
      // A 32-bit lane holds input k (low half) and input k + 1 (high half) of one output.
      __m512i pairs[Panels];
      values.load(pairs, 0);
      for (int p = 0; p < Panels; ++p) {
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[p], 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs[p], upper));
#pragma GCC unroll 8
        for (int m = 0; m < Rows; ++m) {
          const float* input = inputs + static_cast<int64_t>(m) * w.cols + k;
          acc[p][m] = _mm512_fmadd_ps(splat16(input[0]), even, acc[p][m]);
          acc[p][m] = _mm512_fmadd_ps(splat16(input[1]), odd, acc[p][m]);
        }
      }
    }
  }
};

// acc[m] += dot[m] in units of the row's and the outputs' scales.
template <int Rows>
SIMD_INLINE void add_scaled(__m512 (&acc)[Rows], const __m512i (&dot)[Rows], __m512 scale,
                            const TileRows& input_scales) {
  unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
    const __m512 factor = times_float<m.value>(scale, input_scales);
    acc[m.value] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m.value]), factor, acc[m.value]);
  });
}

#if !defined(FS_EMULATE_ISA)
// For CPUs with AVX512-BF16. Unlike the other products', its sums are not the AVX2 family's: the
// instruction adds two products at a time, and rounds them in its own way.
template <int Rows, int Panels>
struct Tile16Bf16Dot {
  static SIMD_INLINE void run(Tile16<Rows, Panels>& acc, const Matrix& w, int panel,
                              const Activations& x, int row, PanelFetch& fetch) {
    TilePanels<Panels> values(w, panel, 0);
    TileRows halves(x.halves + int64_t{row} * w.cols, w.cols);
    int k = 0;
    for (; k + kGroupSize <= w.cols; k += kGroupSize, values.advance(kGroupSize * kPanelRows * 2)) {
      fetch.advance();
      unrolled<kGroupSize / 2>([&](auto pair) __attribute__((always_inline)) {
        add_pair<pair.value>(acc, values, halves);
      });
      halves.advance(kGroupSize * 2);
    }
    for (; k < w.cols; k += 2, values.advance(64), halves.advance(4)) {
      add_pair<0>(acc, values, halves);
    }
  }

 private:
  template <int Pair>
  static SIMD_INLINE void add_pair(Tile16<Rows, Panels>& acc, const TilePanels<Panels>& values,
                                   const TileRows& halves) {
    __m512i weights[Panels];
    values.load(weights, Pair * 64);
    add_tile_products<Pair * 4>(acc, weights, halves);
  }
};
#endif

// vpdpbusd multiplies unsigned by signed bytes: weights go in as w + 128, and the sum starts at -128
// times the sum of the inputs (Activations::offsets). With `Signed` the weights lie there as w.
template <bool Signed, int Rows, int Panels>
SIMD_INLINE void multiply_bytes(Tile16<Rows, Panels>& acc, TilePanels<Panels> values,
                                TilePanels<Panels> scales, const Matrix& w, const Activations& x,
                                int row, PanelFetch& fetch) {
  const int num_scales = w.num_scales(), groups_per_scale = w.scale_group / kGroupSize;
  const int64_t first = int64_t{row} * num_scales;
  TileRows quants(x.quants + int64_t{row} * w.cols, w.cols);
  TileRows input_scales(x.scales + first, num_scales), offsets(x.offsets + first, num_scales);
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int g = 0; g < num_scales; ++g) {
    __m512i dot[Panels][Rows];
    unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
      for (int p = 0; p < Panels; ++p) dot[p][m.value] = splat_int<m.value>(offsets);
    });
    for (int i = 0; i < groups_per_scale; ++i, values.advance(512), quants.advance(kGroupSize)) {
      fetch.advance();
      unrolled<8>([&](auto quad) __attribute__((always_inline)) {
        __m512i weights[Panels];
        values.load(weights, quad.value * 64);
        for (int p = 0; p < Panels && Signed; ++p) weights[p] = _mm512_xor_si512(weights[p], sign);
        add_tile_products<quad.value * 4>(dot, weights, quants);
      });
    }
    for (int p = 0; p < Panels; ++p) add_scaled(acc[p], dot[p], scales.halves(p), input_scales);
    scales.advance(kPanelRows * 2), input_scales.advance(4), offsets.advance(4);
  }
}

template <int Rows, int Panels>
struct Tile16Int8 {
  static SIMD_INLINE void run(Tile16<Rows, Panels>& acc, const Matrix& w, int panel,
                              const Activations& x, int row, PanelFetch& fetch) {
    const TilePanels<Panels> values(w, panel, 0), scales(w, panel, w.cols * kPanelRows);
    multiply_bytes<true>(acc, values, scales, w, x, row, fetch);
  }
};

SIMD_INLINE __m512i low_nibbles(__m512i packed) {
  return _mm512_and_si512(packed, _mm512_set1_epi8(15));
}
SIMD_INLINE __m512i high_nibbles(__m512i packed) {
  return low_nibbles(_mm512_srli_epi16(packed, 4));
}

// Nibbles are unsigned as they are; without mins they stand for the value 8 lower.
template <bool HasMin, int Rows, int Panels>
struct Tile16Int4 {
  static SIMD_INLINE void run(Tile16<Rows, Panels>& acc, const Matrix& w, int panel,
                              const Activations& x, int row, PanelFetch& fetch) {
    const int groups = w.num_groups();
    const int64_t first = int64_t{row} * groups;
    TilePanels<Panels> values(w, panel, 0), scales(w, panel, w.cols * kPanelRows / 2);
    TilePanels<Panels> mins(w, panel, w.cols * kPanelRows / 2 + groups * kPanelRows * 2);
    TileRows quants(x.quants + first * kGroupSize, w.cols);
    TileRows input_scales(x.scales + first, groups), offsets(x.group_offsets + first, groups);
    TileRows scaled_sums(x.scaled_sums + first, groups);
    for (int g = 0; g < groups; ++g, values.advance(256)) {
      fetch.advance();
      __m512i dot[Panels][Rows];
      unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
        for (int p = 0; p < Panels; ++p) {
          dot[p][m.value] = HasMin ? _mm512_setzero_si512() : splat_int<m.value>(offsets);
        }
      });
      unrolled<4>([&](auto quad) __attribute__((always_inline)) {
        __m512i packed[Panels], low[Panels], high[Panels];
        values.load(packed, quad.value * 64);
        for (int p = 0; p < Panels; ++p) {
          low[p] = low_nibbles(packed[p]), high[p] = high_nibbles(packed[p]);
        }
        add_tile_products<quad.value * 4>(dot, low, quants);
        add_tile_products<quad.value * 4 + 16>(dot, high, quants);
      });
      for (int p = 0; p < Panels; ++p) {
        add_scaled(acc[p], dot[p], scales.halves(p), input_scales);
        if constexpr (HasMin) {
          const __m512 min = mins.halves(p);
          unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
            const __m512 sum = _mm512_castsi512_ps(splat_int<m.value>(scaled_sums));
            acc[p][m.value] = _mm512_fmadd_ps(sum, min, acc[p][m.value]);
          });
        }
      }
      quants.advance(kGroupSize), scales.advance(kPanelRows * 2), mins.advance(kPanelRows * 2);
      input_scales.advance(4), offsets.advance(4), scaled_sums.advance(4);
    }
  }
};

template <int Rows, int Panels>
using Tile16Int4Min = Tile16Int4<true, Rows, Panels>;
template <int Rows, int Panels>
using Tile16Int4Plain = Tile16Int4<false, Rows, Panels>;

// Rows [row, row + Rows) of `Panels` panels; multiply(acc) adds the products to zeros.
template <int Rows, int Panels, class Multiply>
SIMD_INLINE void run_tile16(const Matrix& w, int panel, int row, const Output& out,
                            const Multiply& multiply) {
  Tile16<Rows, Panels> acc;
  for (auto& of_panel : acc) {
    for (__m512& sums : of_panel) sums = splat16(0.0f);
  }
  multiply(acc);
  for (int p = 0; p < Panels; ++p) {
    for (int m = 0; m < Rows; ++m) store_outputs(acc[p][m], w, panel + p, row + m, out);
  }
}

// For `num_rows` rows times `Panels` panels from `panel` on: fetches the panels after those.
template <int Panels>
SIMD_INLINE PanelFetch fetch_after(const Matrix& w, int panel, int num_rows) {
  if (num_rows <= kFewFloatRows && !w.is_quantized()) return PanelFetch();
  const int num_tiles = num_rows / 8 + (num_rows % 8 >= 4) + (num_rows % 4 != 0);  // for_tiles()
  const int num_groups = (w.cols + kGroupSize - 1) / kGroupSize;
  if (num_tiles == 1) return PanelFetch::of_one_tile(w, panel, num_groups);
  return PanelFetch(w, panel + Panels, Panels, int64_t{num_tiles} * num_groups);
}

// `Panels` panels times rows [row, row_end): eight rows a tile, whose sums fill half or all of the
// registers and hide the latency of vpdpbusd.
template <template <int, int> class Kernel, int Panels>
SIMD_INLINE void run_panels16(const Matrix& w, int panel, const Activations& x, int row,
                              int row_end, const Output& out) {
  if (row == row_end) return;
  PanelFetch fetch = fetch_after<Panels>(w, panel, row_end - row);
  for_tiles(row, row_end, [&](int first, auto rows) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows)::value;
    run_tile16<kRows, Panels>(w, panel, first, out, [&](auto& acc) __attribute__((always_inline)) {
      Kernel<kRows, Panels>::run(acc, w, panel, x, first, fetch);
    });
  });
}

// From so many rows on a product is bound by arithmetic, and two panels at once are faster than one
// after the other; with fewer, which wait for memory, they are slower.
constexpr int kManyRows = 16;

// All rows of the range against one or two panels after the other: those stay in the cache.
template <template <int, int> class Kernel>
void matmul16(const Matrix& w, int panel_begin, int panel_end, const Activations& x, int row_begin,
              int row_end, const Output& out, void*) {
  int panel = panel_begin;
  for (; row_end - row_begin >= kManyRows && panel + 2 <= panel_end; panel += 2) {
    run_panels16<Kernel, 2>(w, panel, x, row_begin, row_end, out);
  }
  for (; panel < panel_end; ++panel) run_panels16<Kernel, 1>(w, panel, x, row_begin, row_end, out);
}

constexpr MatmulKernel matmul16_fp32 = matmul16<Tile16Fp32>;

constexpr MatmulKernel matmul16_int8 = matmul16<Tile16Int8>;

void matmul16_bf16(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                   int row_begin, int row_end, const Output& out, void* scratch) {
#if defined(FS_EMULATE_ISA)
  const MatmulKernel kernel = matmul16<Tile16Bf16>;
#else
  const MatmulKernel kernel =
      has_fast_bf16_dot() ? matmul16<Tile16Bf16Dot> : matmul16<Tile16Bf16>;
#endif
  kernel(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch);
}

void matmul16_int4(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                   int row_begin, int row_end, const Output& out, void* scratch) {
  const MatmulKernel kernel = w.has_min ? matmul16<Tile16Int4Min> : matmul16<Tile16Int4Plain>;
  kernel(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch);
}

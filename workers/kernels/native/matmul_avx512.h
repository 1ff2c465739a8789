// Matrix products of the AVX-512 family, in register tiles of `Rows` rows by one panel: a panel's
// 16 outputs are one register.
//
// Order of sums: as in the AVX2 family (matmul_avx2.h), lane for lane and operation for operation,
// so that both give the same bits: an output is one lane; fp32 and bf16 take inputs from left to
// right, each one FMA; int8 and int4 take groups of 32 from left to right, the sum inside a group
// being exact in integers: acc = fma(dot, input scale * weight scale, acc), then
// fma(scaled sum, min, acc). How an integer sum is split is free, since it is exact. Only bf16 on a
// CPU with instructions for it goes another way.
// Included inside the family's namespace, after <immintrin.h>.

SIMD_INLINE __m512 splat16(float x) { return _mm512_set1_ps(x); }
SIMD_INLINE __m512 load16_half(const uint16_t* halves) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
}
SIMD_INLINE __m512i load_quad(const uint8_t* bytes) {
  return _mm512_loadu_si512(reinterpret_cast<const void*>(bytes));
}

// A row's 16 outputs of a panel, of which only those that the matrix has are read and written.
SIMD_INLINE void store_outputs(__m512 acc, const Matrix& w, int panel, int row,
                               const Output& out) {
  const int first = panel * kPanelRows;
  const int count = w.rows - first < kPanelRows ? w.rows - first : kPanelRows;
  const __mmask16 present = static_cast<__mmask16>((1u << count) - 1);
  float* y = out.values + row * out.stride + first;
  if (out.bias != nullptr) acc = _mm512_add_ps(acc, _mm512_maskz_loadu_ps(present, out.bias + first));
  if (out.accumulate) acc = _mm512_add_ps(_mm512_maskz_loadu_ps(present, y), acc);
  _mm512_mask_storeu_ps(y, present, acc);
}

template <int Rows>
struct Tile16Fp32 {
  static SIMD_INLINE void run(__m512 (&acc)[Rows], const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row, PanelFetch& fetch) {
    const float* values = reinterpret_cast<const float*>(panel);
    const float* inputs = x.values + static_cast<int64_t>(row) * w.cols;
    for (int k = 0; k < w.cols; ++k, values += kPanelRows) {
      if (k % kGroupSize == 0) fetch.advance();
      const __m512 weights = _mm512_loadu_ps(values);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        const __m512 input = splat16(inputs[static_cast<int64_t>(m) * w.cols + k]);
        acc[m] = _mm512_fmadd_ps(input, weights, acc[m]);
      }
    }
  }
};

template <int Rows>
struct Tile16Bf16 {
  static SIMD_INLINE void run(__m512 (&acc)[Rows], const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row, PanelFetch& fetch) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const float* inputs = x.values + static_cast<int64_t>(row) * w.cols;
    for (int k = 0; k < w.cols; k += 2, panel += 64) {
      if (k % kGroupSize == 0) fetch.advance();
      // A 32-bit lane holds input k (low half) and input k + 1 (high half) of one output.
      const __m512i pairs = load_quad(panel);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        const float* input = inputs + static_cast<int64_t>(m) * w.cols + k;
        acc[m] = _mm512_fmadd_ps(splat16(input[0]), even, acc[m]);
        acc[m] = _mm512_fmadd_ps(splat16(input[1]), odd, acc[m]);
      }
    }
  }
};

// The same place in each row of a tile. An instruction addresses any of eight rows from two pointers
// and two strides; left to itself, GCC 12 keeps a pointer for every row and runs out of registers.
struct TileRows {
  const char *first, *sixth;
  int64_t stride, stride3;  // bytes

  template <class T>
  TileRows(const T* first_row, int64_t elements)
      : first(reinterpret_cast<const char*>(first_row)),
        sixth(first + 5 * elements * static_cast<int64_t>(sizeof(T))),
        stride(elements * static_cast<int64_t>(sizeof(T))),
        stride3(3 * stride) {}
  SIMD_INLINE void advance(int nbytes) { first += nbytes, sixth += nbytes; }
};

// CASE(row, its place, and what follows CASE) for each row.
#define FOR_TILE_ROWS(CASE, ...)                                \
  CASE(0, "(%[first])", __VA_ARGS__)                            \
  CASE(1, "(%[first],%[stride])", __VA_ARGS__)                  \
  CASE(2, "(%[first],%[stride],2)", __VA_ARGS__)                \
  CASE(3, "(%[first],%[stride3])", __VA_ARGS__)                 \
  CASE(4, "(%[first],%[stride],4)", __VA_ARGS__)                \
  CASE(5, "(%[sixth])", __VA_ARGS__)                            \
  CASE(6, "(%[first],%[stride3],2)", __VA_ARGS__)               \
  CASE(7, "(%[sixth],%[stride],2)", __VA_ARGS__)
#define TILE_ROW(ROWS)                                                                   \
  [first] "r"(ROWS.first), [sixth] "r"(ROWS.sixth), [stride] "r"(ROWS.stride),           \
      [stride3] "r"(ROWS.stride3)

#if defined(FS_EMULATE_ISA)
template <class T>
SIMD_INLINE T at_row(const TileRows& rows, int row, int offset) {
  T value;
  std::memcpy(&value, rows.first + row * rows.stride + offset, sizeof value);
  return value;
}
template <int Row, int Offset>
SIMD_INLINE void dot_quad(__m512i& dot, __m512i weights, const TileRows& quants) {
  dot = _mm512_dpbusd_epi32(dot, weights, _mm512_set1_epi32(at_row<int32_t>(quants, Row, Offset)));
}
template <int Row>
SIMD_INLINE __m512i splat_int(const TileRows& ints) {
  return _mm512_set1_epi32(at_row<int32_t>(ints, Row, 0));
}
template <int Row>
SIMD_INLINE __m512 times_float(__m512 factor, const TileRows& floats) {
  return _mm512_mul_ps(splat16(at_row<float>(floats, Row, 0)), factor);
}
#else
// The instructions on one row, in assembly, since GCC 12 would load its numbers by one of their own.
// Nothing that is inlined together with these functions writes what they read, but in
// attention_dots_avx512.h, which takes care of it.
#define TILE_DOT(ROW, PLACE, INSTRUCTION)                                          \
  if constexpr (Row == ROW) {                                                      \
    asm volatile(INSTRUCTION " %c[offset]" PLACE "%{1to16%}, %[weights], %[sums]"  \
                 : [sums] "+v"(sums)                                               \
                 : [weights] "v"(weights), [offset] "i"(Offset), TILE_ROW(inputs)); \
  }
#define TILE_SPLAT(ROW, PLACE, INSTRUCTION)                                                 \
  if constexpr (Row == ROW) {                                                               \
    asm volatile(INSTRUCTION " " PLACE ", %[splat]" : [splat] "=v"(splat) : TILE_ROW(ints)); \
  }
#define TILE_TIMES(ROW, PLACE, INSTRUCTION)                                    \
  if constexpr (Row == ROW) {                                                  \
    asm volatile(INSTRUCTION " " PLACE "%{1to16%}, %[factor], %[product]"      \
                 : [product] "=v"(product)                                     \
                 : [factor] "v"(factor), TILE_ROW(floats));                    \
  }

// sums += 16 outputs' weights times the row's four quants at `Offset`.
template <int Row, int Offset>
SIMD_INLINE void dot_quad(__m512i& sums, __m512i weights, const TileRows& inputs) {
  FOR_TILE_ROWS(TILE_DOT, "vpdpbusd")
}

// sums += 16 outputs' weights of two inputs times the row's two at `Offset`, bfloat16.
template <int Row, int Offset>
SIMD_INLINE void dot_pair(__m512& sums, __m512i weights, const TileRows& inputs) {
  FOR_TILE_ROWS(TILE_DOT, "vdpbf16ps")
}

// The row's int in every lane.
template <int Row>
SIMD_INLINE __m512i splat_int(const TileRows& ints) {
  __m512i splat;
  FOR_TILE_ROWS(TILE_SPLAT, "vpbroadcastd")
  return splat;
}

// The row's float times `factor`.
template <int Row>
SIMD_INLINE __m512 times_float(__m512 factor, const TileRows& floats) {
  __m512 product;
  FOR_TILE_ROWS(TILE_TIMES, "vmulps")
  return product;
}
#endif

// Calls body(Count<0>()), ..., body(Count<N - 1>()).
template <int N, int First = 0, class Body>
SIMD_INLINE void unrolled(const Body& body) {
  if constexpr (First < N) {
    body(Count<First>());
    unrolled<N, First + 1>(body);
  }
}

// dot[m] += 16 outputs' weights times four quants of row m.
template <int Rows, int Offset>
SIMD_INLINE void dot_quads(__m512i (&dot)[Rows], __m512i weights, const TileRows& quants) {
  unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
    dot_quad<m.value, Offset>(dot[m.value], weights, quants);
  });
}

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
// Whether bfloat16 products take vdpbf16ps, and read Activations::halves, or FMAs, and read `values`;
// and whether attention to a bf16 cache takes it. Intel's processors do it at half the rate of FMAs,
// which leaves nothing to gain in products; attention was not tried there.
SIMD_INLINE bool has_fast_bf16_dot() {
  static const bool is_fast = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
  return is_fast;
}

// For CPUs with AVX512-BF16. Unlike the other products', its sums are not the AVX2 family's: the
// instruction adds two products at a time, and rounds them in its own way.
template <int Rows>
struct Tile16Bf16Dot {
  static SIMD_INLINE void run(__m512 (&acc)[Rows], const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row, PanelFetch& fetch) {
    TileRows halves(x.halves + int64_t{row} * w.cols, w.cols);
    int k = 0;
    for (; k + kGroupSize <= w.cols; k += kGroupSize, panel += kGroupSize * kPanelRows * 2) {
      fetch.advance();
      unrolled<kGroupSize / 2>([&](auto pair) __attribute__((always_inline)) {
        add_pair<Rows, pair.value * 4>(acc, load_quad(panel + pair.value * 64), halves);
      });
      halves.advance(kGroupSize * 2);
    }
    for (; k < w.cols; k += 2, panel += 64, halves.advance(4)) {
      add_pair<Rows, 0>(acc, load_quad(panel), halves);
    }
  }

 private:
  template <int N, int Offset>
  static SIMD_INLINE void add_pair(__m512 (&acc)[N], __m512i weights, const TileRows& halves) {
    unrolled<N>([&](auto m) __attribute__((always_inline)) {
      dot_pair<m.value, Offset>(acc[m.value], weights, halves);
    });
  }
};
#endif

// vpdpbusd multiplies unsigned by signed bytes: the weights go in as w + 128, and the sum starts at
// -128 times the sum of the inputs (Activations::offsets). One or two groups share a scale.
template <int Rows, int Groups>
struct Tile16Int8Groups {
  static SIMD_INLINE void run(__m512 (&acc)[Rows], const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row, PanelFetch& fetch) {
    const int num_scales = w.num_scales();
    const int64_t first = int64_t{row} * num_scales;
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + w.cols * kPanelRows);
    TileRows quants(x.quants + int64_t{row} * w.cols, w.cols);
    TileRows input_scales(x.scales + first, num_scales), offsets(x.offsets + first, num_scales);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int g = 0; g < num_scales; ++g, scales += kPanelRows) {
      __m512i dot[Rows];
      unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
        dot[m.value] = splat_int<m.value>(offsets);
      });
      for (int i = 0; i < Groups; ++i, panel += 512, quants.advance(kGroupSize)) {
        fetch.advance();
        unrolled<8>([&](auto quad) __attribute__((always_inline)) {
          const __m512i weights = _mm512_xor_si512(load_quad(panel + quad.value * 64), sign);
          dot_quads<Rows, quad.value * 4>(dot, weights, quants);
        });
      }
      add_scaled<Rows>(acc, dot, load16_half(scales), input_scales);
      input_scales.advance(4), offsets.advance(4);
    }
  }
};

template <int Rows>
using Tile16Int8 = Tile16Int8Groups<Rows, 1>;
template <int Rows>
using Tile16Int8Pairs = Tile16Int8Groups<Rows, 2>;

// Nibbles are unsigned as they are; without mins they stand for the value 8 lower.
template <int Rows, bool HasMin>
struct Tile16Int4 {
  static SIMD_INLINE void run(__m512 (&acc)[Rows], const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row, PanelFetch& fetch) {
    const int groups = w.num_groups();
    const int64_t first = int64_t{row} * groups;
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + w.cols * kPanelRows / 2);
    const uint16_t* mins = scales + groups * kPanelRows;
    TileRows quants(x.quants + first * kGroupSize, w.cols);
    TileRows input_scales(x.scales + first, groups), sums(x.sums + first, groups);
    TileRows scaled_sums(x.scaled_sums + first, groups);
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int g = 0; g < groups; ++g, panel += 256) {
      fetch.advance();
      __m512i dot[Rows];
      unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
        dot[m.value] = _mm512_setzero_si512();
        if constexpr (!HasMin) {
          const __m512i eight_sums = _mm512_slli_epi32(splat_int<m.value>(sums), 3);
          dot[m.value] = _mm512_sub_epi32(dot[m.value], eight_sums);
        }
      });
      unrolled<4>([&](auto quad) __attribute__((always_inline)) {
        const __m512i packed = load_quad(panel + quad.value * 64);
        const __m512i low = _mm512_and_si512(packed, nibble);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
        dot_quads<Rows, quad.value * 4>(dot, low, quants);
        dot_quads<Rows, quad.value * 4 + 16>(dot, high, quants);
      });
      add_scaled<Rows>(acc, dot, load16_half(scales + g * kPanelRows), input_scales);
      if constexpr (HasMin) {
        const __m512 min = load16_half(mins + g * kPanelRows);
        unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
          const __m512 sum = _mm512_castsi512_ps(splat_int<m.value>(scaled_sums));
          acc[m.value] = _mm512_fmadd_ps(sum, min, acc[m.value]);
        });
      }
      quants.advance(kGroupSize), input_scales.advance(4), sums.advance(4), scaled_sums.advance(4);
    }
  }
};

template <int Rows>
using Tile16Int4Min = Tile16Int4<Rows, true>;
template <int Rows>
using Tile16Int4Plain = Tile16Int4<Rows, false>;

template <template <int> class Kernel, int Rows>
SIMD_INLINE void run_tile16(const Matrix& w, int panel, const Activations& x, int row,
                            const Output& out, PanelFetch& fetch) {
  __m512 acc[Rows];
  for (int m = 0; m < Rows; ++m) acc[m] = splat16(0.0f);
  Kernel<Rows>::run(acc, w.panel(panel), w, x, row, fetch);
  for (int m = 0; m < Rows; ++m) store_outputs(acc[m], w, panel, row + m, out);
}

// Calls body(first, Count<N>()) for tiles of 8, 4 and fewer of the rows [row, row_end).
template <class Body>
SIMD_INLINE void for_tiles(int row, int row_end, const Body& body) {
  for (; row + 8 <= row_end; row += 8) body(row, Count<8>());
  if (row + 4 <= row_end) body(row, Count<4>()), row += 4;
  switch (row_end - row) {
    case 3: body(row, Count<3>()); break;
    case 2: body(row, Count<2>()); break;
    case 1: body(row, Count<1>()); break;
    default: break;
  }
}

// One panel times rows [row, row_end): eight rows a tile, whose sums and products fill half of the
// registers and hide the latency of vpdpbusd.
template <template <int> class Kernel>
SIMD_INLINE void run_panel16(const Matrix& w, int panel, const Activations& x, int row, int row_end,
                             const Output& out) {
  if (row == row_end) return;
  const int num_tiles = (row_end - row + 7) / 8;  // or one more
  PanelFetch fetch(w, panel + 1, 1, int64_t{num_tiles} * ((w.cols + kGroupSize - 1) / kGroupSize));
  for_tiles(row, row_end, [&](int first, auto rows) __attribute__((always_inline)) {
    run_tile16<Kernel, decltype(rows)::value>(w, panel, x, first, out, fetch);
  });
}

// All rows of the range against one panel after the other: a panel stays in the first-level cache.
template <template <int> class Kernel>
void matmul16(const Matrix& w, int panel_begin, int panel_end, const Activations& x, int row_begin,
              int row_end, const Output& out, void*) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    run_panel16<Kernel>(w, panel, x, row_begin, row_end, out);
  }
}

constexpr MatmulKernel matmul16_fp32 = matmul16<Tile16Fp32>;

void matmul16_int8(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                   int row_begin, int row_end, const Output& out, void* scratch) {
  const MatmulKernel kernel =
      w.scale_group == kGroupSize ? matmul16<Tile16Int8> : matmul16<Tile16Int8Pairs>;
  kernel(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch);
}

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

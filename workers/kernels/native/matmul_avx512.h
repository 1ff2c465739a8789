// Matrix products of the AVX-512 family, in register tiles of `Rows` rows by one panel, whose 16
// outputs are one register, or by two: then inputs, of which a row's are loaded anew for each product,
// are loaded half as often, which is what bounds CPUs that begin two products a cycle.
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
template <int Row, int Offset = 0>
SIMD_INLINE __m512i splat_int(const TileRows& ints) {
  return _mm512_set1_epi32(at_row<int32_t>(ints, Row, Offset));
}
SIMD_INLINE void dot_quad(__m512i& sums, __m512i weights, __m512i quad) {
  sums = _mm512_dpbusd_epi32(sums, weights, quad);
}
template <int Row, int Offset>
SIMD_INLINE void dot_quad(__m512i& sums, __m512i weights, const TileRows& quants) {
  dot_quad(sums, weights, splat_int<Row, Offset>(quants));
}
template <int Row>
SIMD_INLINE void dot_words(__m512i& sums, __m512i weights, const TileRows& words) {
  sums = _mm512_dpwssd_epi32(sums, weights, splat_int<Row>(words));
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
#define TILE_SPLAT(ROW, PLACE, INSTRUCTION)                                 \
  if constexpr (Row == ROW) {                                               \
    asm volatile(INSTRUCTION " %c[offset]" PLACE ", %[splat]"               \
                 : [splat] "=v"(splat)                                      \
                 : [offset] "i"(Offset), TILE_ROW(ints));                   \
  }
#define TILE_TIMES(ROW, PLACE, INSTRUCTION)                                    \
  if constexpr (Row == ROW) {                                                  \
    asm volatile(INSTRUCTION " " PLACE "%{1to16%}, %[factor], %[product]"      \
                 : [product] "=v"(product)                                     \
                 : [factor] "v"(factor), TILE_ROW(floats));                    \
  }

// The row's int at `Offset` in every lane.
template <int Row, int Offset = 0>
SIMD_INLINE __m512i splat_int(const TileRows& ints) {
  __m512i splat;
  FOR_TILE_ROWS(TILE_SPLAT, "vpbroadcastd")
  return splat;
}

// sums += 16 outputs' weights times the row's four quants at `Offset`.
template <int Row, int Offset>
SIMD_INLINE void dot_quad(__m512i& sums, __m512i weights, const TileRows& inputs) {
  FOR_TILE_ROWS(TILE_DOT, "vpdpbusd")
}
SIMD_INLINE void dot_quad(__m512i& sums, __m512i weights, __m512i quad) {
  asm volatile("vpdpbusd %[quad], %[weights], %[sums]" : [sums] "+v"(sums) : [weights] "v"(weights), [quad] "v"(quad));
}

// sums += 16 outputs' weights of two inputs times the row's two at `Offset`, bfloat16.
template <int Row, int Offset>
SIMD_INLINE void dot_pair(__m512& sums, __m512i weights, const TileRows& inputs) {
  FOR_TILE_ROWS(TILE_DOT, "vdpbf16ps")
}
SIMD_INLINE void dot_pair(__m512& sums, __m512i weights, __m512i pair) {
  asm volatile("vdpbf16ps %[pair], %[weights], %[sums]" : [sums] "+v"(sums) : [weights] "v"(weights), [pair] "v"(pair));
}

// sums += two words of each of 16 outputs times the row's two.
template <int Row>
SIMD_INLINE void dot_words(__m512i& sums, __m512i weights, const TileRows& inputs) {
  constexpr int Offset = 0;
  FOR_TILE_ROWS(TILE_DOT, "vpdpwssd")
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

// dot[p][m] += 16 outputs' weights times four quants of row m.
template <int Offset, int Rows, int Panels>
SIMD_INLINE void dot_quads(__m512i (&dot)[Panels][Rows], const __m512i (&weights)[Panels],
                           const TileRows& quants) {
  unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
    if constexpr (Panels == 1) {
      dot_quad<m.value, Offset>(dot[0][m.value], weights[0], quants);
    } else {
      const __m512i quad = splat_int<m.value, Offset>(quants);
      for (int p = 0; p < Panels; ++p) dot_quad(dot[p][m.value], weights[p], quad);
    }
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
    unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
      if constexpr (Panels == 1) {
        dot_pair<m.value, Pair * 4>(acc[0][m.value], weights[0], halves);
      } else {
        const __m512i pair = splat_int<m.value, Pair * 4>(halves);
        for (int p = 0; p < Panels; ++p) dot_pair(acc[p][m.value], weights[p], pair);
      }
    });
  }
};
#endif

// vpdpbusd multiplies unsigned by signed bytes: weights go in as w + 128, and the sum starts at -128
// times the sum of the inputs (Activations::offsets). One or two groups share a scale. With `Signed`
// the weights lie there as w.
template <int Groups, bool Signed, int Rows, int Panels>
SIMD_INLINE void multiply_bytes(Tile16<Rows, Panels>& acc, TilePanels<Panels> values,
                                TilePanels<Panels> scales, const Matrix& w, const Activations& x,
                                int row, PanelFetch& fetch) {
  const int num_scales = w.num_scales();
  const int64_t first = int64_t{row} * num_scales;
  TileRows quants(x.quants + int64_t{row} * w.cols, w.cols);
  TileRows input_scales(x.scales + first, num_scales), offsets(x.offsets + first, num_scales);
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int g = 0; g < num_scales; ++g) {
    __m512i dot[Panels][Rows];
    unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
      for (int p = 0; p < Panels; ++p) dot[p][m.value] = splat_int<m.value>(offsets);
    });
    for (int i = 0; i < Groups; ++i, values.advance(512), quants.advance(kGroupSize)) {
      fetch.advance();
      unrolled<8>([&](auto quad) __attribute__((always_inline)) {
        __m512i weights[Panels];
        values.load(weights, quad.value * 64);
        for (int p = 0; p < Panels && Signed; ++p) weights[p] = _mm512_xor_si512(weights[p], sign);
        dot_quads<quad.value * 4>(dot, weights, quants);
      });
    }
    for (int p = 0; p < Panels; ++p) add_scaled(acc[p], dot[p], scales.halves(p), input_scales);
    scales.advance(kPanelRows * 2), input_scales.advance(4), offsets.advance(4);
  }
}

template <int Groups, int Rows, int Panels>
struct Tile16Int8Groups {
  static SIMD_INLINE void run(Tile16<Rows, Panels>& acc, const Matrix& w, int panel,
                              const Activations& x, int row, PanelFetch& fetch) {
    const TilePanels<Panels> values(w, panel, 0), scales(w, panel, w.cols * kPanelRows);
    multiply_bytes<Groups, true>(acc, values, scales, w, x, row, fetch);
  }
};

template <int Rows, int Panels>
using Tile16Int8 = Tile16Int8Groups<1, Rows, Panels>;
template <int Rows, int Panels>
using Tile16Int8Pairs = Tile16Int8Groups<2, Rows, Panels>;

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
    const __m512i nibble = _mm512_set1_epi8(15);
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
          low[p] = _mm512_and_si512(packed[p], nibble);
          high[p] = _mm512_and_si512(_mm512_srli_epi16(packed[p], 4), nibble);
        }
        dot_quads<quad.value * 4>(dot, low, quants);
        dot_quads<quad.value * 4 + 16>(dot, high, quants);
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

// What belongs to two groups of nested4 that share a scale, an output in each 32-bit lane.
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
    factors = _mm512_mullo_epi32(factor, _mm512_set1_epi32(0x10001));
    start = _mm512_mullo_epi32(_mm512_and_si512(least, _mm512_set1_epi32(255)),
                               _mm512_set1_epi32(0x1010101));
  }
  // A product is at most 15 * 15, so that the two in a word stay apart.
  SIMD_INLINE __m512i weights(__m512i nibbles) const {
    return _mm512_add_epi8(_mm512_mullo_epi16(nibbles, factors), start);
  }
};

SIMD_INLINE __m512i low_nibbles(__m512i packed) {
  return _mm512_and_si512(packed, _mm512_set1_epi8(15));
}
SIMD_INLINE __m512i high_nibbles(__m512i packed) {
  return low_nibbles(_mm512_srli_epi16(packed, 4));
}

// values (cols/32, 8, 16, 4) = the panel's weights + offset, as bytes.
SIMD_INLINE void unpack_nested(uint8_t* values, const Matrix& w, int panel, int offset) {
  const NestedPanel parts(w, w.panel(panel));
  const uint8_t* nibbles = parts.nibbles;
  for (int g = 0; g < w.num_scales(); ++g) {
    const NestedWords words(parts, g);
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

// Few rows: nibbles are multiplied as they are, as int4's are, and both groups' sums of products, which 16
// bits hold, by their factors: x . (factor (q - 8) + shift) = factor (x . (q - 8)) + shift (sum of x).
template <int Rows, int Panels>
struct Tile16Nested4 {
  static SIMD_INLINE void run(Tile16<Rows, Panels>& acc, const Matrix& w, int panel,
                              const Activations& x, int row, PanelFetch& fetch) {
    static_assert(Panels == 1);
    const NestedPanel parts(w, w.panel(panel));
    const int num_scales = w.num_scales();
    const int64_t first = int64_t{row} * num_scales;
    const uint8_t* nibbles = parts.nibbles;
    TileRows quants(x.quants + int64_t{row} * w.cols, w.cols);
    TileRows input_scales(x.scales + first, num_scales), word_sums(x.word_sums + first, num_scales);
    TileRows offsets(x.group_offsets + 2 * first, 2 * num_scales);
    for (int g = 0; g < num_scales; ++g) {
      const NestedWords words(parts, g);
      __m512i sums[Rows];
      unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
        sums[m.value] = _mm512_setzero_si512();
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
          dot_quads<quad.value * 4>(dot, low, quants);
          dot_quads<quad.value * 4 + 16>(dot, high, quants);
        });
        const __m512i factors = words.factors_of(i);
        for (int m = 0; m < Rows; ++m) sums[m] = _mm512_dpwssd_epi32(sums[m], dot[0][m], factors);
        quants.advance(kGroupSize), offsets.advance(4);
      }
      add_scaled(acc[0], sums, load16_half(parts.scales + g * kPanelRows), input_scales);
      input_scales.advance(4), word_sums.advance(4);
    }
  }
};

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

// For `num_rows` rows times `Panels` panels from `panel` on: fetches the panels after those.
template <int Panels>
SIMD_INLINE PanelFetch fetch_after(const Matrix& w, int panel, int num_rows) {
  const int num_tiles = (num_rows + 7) / 8;  // or one more
  const int num_groups = (w.cols + kGroupSize - 1) / kGroupSize;
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
          multiply_bytes<2, false>(acc, values, scales, w, x, first, fetch);
        });
  });
}

// From so many rows on a product is bound by arithmetic, and two panels at once are faster than one after
// the other; with fewer, which wait for memory, they are slower.
constexpr int kManyRows = 16;
// From so many rows on, unpacking a panel of nested4 pays.
constexpr int kManyNestedRows = 12;

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

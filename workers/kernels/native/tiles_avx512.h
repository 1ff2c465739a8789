// What tiles of the AVX-512 family are made of: rows that instructions address, products with a
// number of a row, and loops that are unrolled.
// Included inside the family's namespace, after <immintrin.h>.

SIMD_INLINE __m512 splat16(float x) { return _mm512_set1_ps(x); }
SIMD_INLINE __m512 load16_half(const uint16_t* halves) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
}
SIMD_INLINE __m512i load_quad(const uint8_t* bytes) {
  return _mm512_loadu_si512(reinterpret_cast<const void*>(bytes));
}

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
SIMD_INLINE void add_products(__m512i& sums, __m512i weights, __m512i quad) {
  sums = _mm512_dpbusd_epi32(sums, weights, quad);
}
template <int Row, int Offset>
SIMD_INLINE void add_products(__m512i& sums, __m512i weights, const TileRows& quants) {
  add_products(sums, weights, splat_int<Row, Offset>(quants));
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

// sums += 16 outputs' weights times the row's inputs at `Offset`: integers take four quants ...
template <int Row, int Offset>
SIMD_INLINE void add_products(__m512i& sums, __m512i weights, const TileRows& inputs) {
  FOR_TILE_ROWS(TILE_DOT, "vpdpbusd")
}
SIMD_INLINE void add_products(__m512i& sums, __m512i weights, __m512i quad) {
  asm volatile("vpdpbusd %[quad], %[weights], %[sums]"
               : [sums] "+v"(sums)
               : [weights] "v"(weights), [quad] "v"(quad));
}
// ... and floats two bfloat16.
template <int Row, int Offset>
SIMD_INLINE void add_products(__m512& sums, __m512i weights, const TileRows& inputs) {
  FOR_TILE_ROWS(TILE_DOT, "vdpbf16ps")
}
SIMD_INLINE void add_products(__m512& sums, __m512i weights, __m512i pair) {
  asm volatile("vdpbf16ps %[pair], %[weights], %[sums]"
               : [sums] "+v"(sums)
               : [weights] "v"(weights), [pair] "v"(pair));
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

// sums[b][m] += block b's 16 outputs' (or keys') weights times row m's inputs. Eight rows' inputs are
// loaded once for all blocks, since loads bound a CPU that begins two products a cycle; of fewer rows
// each instruction loads its own, for they wait for memory, and such instructions are fewer.
template <int Offset, class Sum, int Rows, int Blocks>
SIMD_INLINE void add_tile_products(Sum (&sums)[Blocks][Rows], const __m512i (&weights)[Blocks],
                                   const TileRows& inputs) {
  if constexpr (Rows == 8 && Blocks > 1) {
    unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
      const __m512i input = splat_int<m.value, Offset>(inputs);
      for (int b = 0; b < Blocks; ++b) add_products(sums[b][m.value], weights[b], input);
    });
  } else {
    for (int b = 0; b < Blocks; ++b) {
      unrolled<Rows>([&](auto m) __attribute__((always_inline)) {
        add_products<m.value, Offset>(sums[b][m.value], weights[b], inputs);
      });
    }
  }
}

#if !defined(FS_EMULATE_ISA)
// Whether bfloat16 products take vdpbf16ps, and read Activations::halves, or FMAs, and read `values`;
// and whether attention to a bf16 cache takes it. Intel's processors do it at half the rate of FMAs,
// which leaves nothing to gain in products; attention was not tried there.
SIMD_INLINE bool has_fast_bf16_dot() {
  static const bool is_fast = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
  return is_fast;
}
#endif

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

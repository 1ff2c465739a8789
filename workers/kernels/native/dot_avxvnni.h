// The innermost loops of the AVX-VNNI family's integer products: half a group of 32 inputs, 16 outputs
// and 1 to 6 rows, in assembly, since the register tile (12 sums, 2 weights, 1 input, 1 constant) fills
// all 16 registers. vpdpbusd multiplies unsigned by signed bytes and adds four products to each sum.
//
// A macro per row and one per quad (4 inputs of all rows) expand to the half. X: the address of a
// row's inputs; D: the number of its sums. Weights of quad Q: outputs 0-7 at 64 Q, 8-15 32 further.
// Included inside the family's namespace, after simd_avx2.h.

// Rows of a tile at most.
constexpr int kMaxTileRows = 6;

#if defined(FS_EMULATE_ISA)
// dot += weights(half, quad) times the rows' inputs at place(quad), for each quad of a half.
template <int Rows, class Weights, class Place>
SIMD_INLINE void dot_half(__m256i (&dot)[Rows][2], const int8_t* x, int64_t stride, const Weights& weights,
                          const Place& place, int num_quads) {
  for (int quad = 0; quad < num_quads; ++quad) {
    for (int m = 0; m < Rows; ++m) {
      int32_t inputs;
      std::memcpy(&inputs, x + m * stride + place(quad), sizeof inputs);
      for (int half = 0; half < 2; ++half) {
        dot[m][half] = _mm256_dpbusd_avx_epi32(dot[m][half], weights(half, quad), _mm256_set1_epi32(inputs));
      }
    }
  }
}
SIMD_INLINE __m256i quad_half(const uint8_t* weights, int half, int quad) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + quad * 64 + half * 32));
}
template <int Rows>
SIMD_INLINE void dot_bytes_half(__m256i (&dot)[Rows][2], const uint8_t* weights, const int8_t* x,
                                int64_t stride) {
  dot_half<Rows>(dot, x, stride, [&](int half, int quad) { return quad_half(weights, half, quad); },
                 [](int quad) { return 4 * quad; }, 4);
}
template <int Rows>
SIMD_INLINE void dot_signed_half(__m256i (&dot)[Rows][2], const uint8_t* weights, const int8_t* x,
                                 int64_t stride) {
  const __m256i sign = _mm256_set1_epi8(-128);
  dot_half<Rows>(
      dot, x, stride,
      [&](int half, int quad) { return _mm256_xor_si256(quad_half(weights, half, quad), sign); },
      [](int quad) { return 4 * quad; }, 4);
}
template <int Rows>
SIMD_INLINE void dot_nibbles_half(__m256i (&dot)[Rows][2], const uint8_t* weights, const int8_t* x,
                                  int64_t stride) {
  const __m256i nibble = _mm256_set1_epi8(15);
  dot_half<Rows>(
      dot, x, stride,
      [&](int half, int quad) {
        const __m256i packed = quad_half(weights, half, quad / 2);
        return _mm256_and_si256(quad % 2 == 0 ? packed : _mm256_srli_epi16(packed, 4), nibble);
      },
      [](int quad) { return quad / 2 * 4 + quad % 2 * 16; }, 4);
}
#else
#define DOT_ROWS_1(ROW, Q) ROW(Q, "(%[x])", "0")
#define DOT_ROWS_2(ROW, Q) DOT_ROWS_1(ROW, Q) ROW(Q, "(%[x],%[stride])", "1")
#define DOT_ROWS_3(ROW, Q) DOT_ROWS_2(ROW, Q) ROW(Q, "(%[x],%[stride],2)", "2")
#define DOT_ROWS_4(ROW, Q) DOT_ROWS_3(ROW, Q) ROW(Q, "(%[fourth])", "3")
#define DOT_ROWS_6(ROW, Q) \
  DOT_ROWS_4(ROW, Q) ROW(Q, "(%[fourth],%[stride])", "4") ROW(Q, "(%[fourth],%[stride],2)", "5")

#define DOT_SUMS_1 [low0] "+x"(dot[0][0]), [high0] "+x"(dot[0][1])
#define DOT_SUMS_2 DOT_SUMS_1, [low1] "+x"(dot[1][0]), [high1] "+x"(dot[1][1])
#define DOT_SUMS_3 DOT_SUMS_2, [low2] "+x"(dot[2][0]), [high2] "+x"(dot[2][1])
#define DOT_SUMS_4 DOT_SUMS_3, [low3] "+x"(dot[3][0]), [high3] "+x"(dot[3][1])
#define DOT_SUMS_6                                                   \
  DOT_SUMS_4, [low4] "+x"(dot[4][0]), [high4] "+x"(dot[4][1]),       \
      [low5] "+x"(dot[5][0]), [high5] "+x"(dot[5][1])

// Defines NAME<Rows>(dot, weights, x, stride): HALF(Rows) adds to `dot`. The input and both weights are in
// registers of their own, since an assembly statement has no room for more operands.
#define DEFINE_DOT_CASE(ROWS, HALF, CONSTANT)                                          \
  if constexpr (Rows == ROWS) {                                                        \
    asm volatile(HALF(DOT_ROWS_##ROWS)                                                 \
                 : DOT_SUMS_##ROWS                                                     \
                 : [w] "r"(weights), [x] "r"(x), [fourth] "r"(x + 3 * stride),         \
                   [stride] "r"(stride), [constant] "x"(CONSTANT)                      \
                 : "memory", "xmm13", "xmm14", "xmm15");                               \
  }
#define DEFINE_DOT(NAME, HALF, CONSTANT)                                                  \
  template <int Rows>                                                                     \
  SIMD_INLINE void NAME(__m256i (&dot)[Rows][2], const uint8_t* weights, const int8_t* x, \
                        int64_t stride) {                                                 \
    DEFINE_DOT_CASE(1, HALF, CONSTANT)                                                    \
    DEFINE_DOT_CASE(2, HALF, CONSTANT)                                                    \
    DEFINE_DOT_CASE(3, HALF, CONSTANT)                                                    \
    DEFINE_DOT_CASE(4, HALF, CONSTANT)                                                    \
    DEFINE_DOT_CASE(6, HALF, CONSTANT)                                                    \
  }

#define DOT_PRODUCTS(OFFSET, X, D)                           \
  "vpbroadcastd " OFFSET X ", %%ymm13\n\t"                   \
  "%{vex%} vpdpbusd %%ymm13, %%ymm14, %[low" D "]\n\t"         \
  "%{vex%} vpdpbusd %%ymm13, %%ymm15, %[high" D "]\n\t"

// Signed weights as they are packed: + 128, they are unsigned. The caller starts from -128 times the sum of
// the inputs, with bytes of `dot_bytes` too, which have the 128 in them.
#define DOT_ROW(Q, X, D) DOT_PRODUCTS(#Q "*4", X, D)
#define DOT_SIGNED_QUAD(ROWS, Q)                       \
  "vpxor " #Q "*64(%[w]), %[constant], %%ymm14\n\t"    \
  "vpxor " #Q "*64+32(%[w]), %[constant], %%ymm15\n\t" ROWS(DOT_ROW, Q)
#define DOT_BYTES_QUAD(ROWS, Q)           \
  "vmovdqa " #Q "*64(%[w]), %%ymm14\n\t"  \
  "vmovdqa " #Q "*64+32(%[w]), %%ymm15\n\t" ROWS(DOT_ROW, Q)

// Nibbles as they are packed: quad Q in the low halves of its bytes, quad Q + 4 in the high ones.
#define DOT_HIGH_NIBBLE_ROW(Q, X, D) DOT_PRODUCTS(#Q "*4+16", X, D)
#define DOT_NIBBLE_QUADS(ROWS, Q)                              \
  "vpand " #Q "*64(%[w]), %[constant], %%ymm14\n\t"            \
  "vpand " #Q "*64+32(%[w]), %[constant], %%ymm15\n\t"         \
  ROWS(DOT_ROW, Q)                                             \
  "vmovdqa " #Q "*64(%[w]), %%ymm14\n\t"                       \
  "vmovdqa " #Q "*64+32(%[w]), %%ymm15\n\t"                    \
  "vpsrlw $4, %%ymm14, %%ymm14\n\t"                            \
  "vpsrlw $4, %%ymm15, %%ymm15\n\t"                            \
  "vpand %[constant], %%ymm14, %%ymm14\n\t"                    \
  "vpand %[constant], %%ymm15, %%ymm15\n\t" ROWS(DOT_HIGH_NIBBLE_ROW, Q)

#define DOT_SIGNED_HALF(ROWS)                          \
  DOT_SIGNED_QUAD(ROWS, 0) DOT_SIGNED_QUAD(ROWS, 1)    \
  DOT_SIGNED_QUAD(ROWS, 2) DOT_SIGNED_QUAD(ROWS, 3)
#define DOT_BYTES_HALF(ROWS)                         \
  DOT_BYTES_QUAD(ROWS, 0) DOT_BYTES_QUAD(ROWS, 1)    \
  DOT_BYTES_QUAD(ROWS, 2) DOT_BYTES_QUAD(ROWS, 3)
#define DOT_NIBBLES_HALF(ROWS) DOT_NIBBLE_QUADS(ROWS, 0) DOT_NIBBLE_QUADS(ROWS, 1)

DEFINE_DOT(dot_signed_half, DOT_SIGNED_HALF, _mm256_set1_epi8(-128))
DEFINE_DOT(dot_bytes_half, DOT_BYTES_HALF, _mm256_setzero_si256())
DEFINE_DOT(dot_nibbles_half, DOT_NIBBLES_HALF, _mm256_set1_epi8(15))
#endif

// Sums of `Rows` rows and 16 outputs. A tile of few rows adds up the halves of a group apart, which bounds it
// less by how long a product takes; the sum is exact either way.
template <int Rows>
struct DotSums {
  static constexpr bool kIsSplit = Rows <= 2;
  __m256i first[Rows][2], second[kIsSplit ? Rows : 1][2];

  // start(m): what row m's sums begin with.
  template <class Start>
  SIMD_INLINE explicit DotSums(const Start& start) {
#pragma GCC unroll 6
    for (int m = 0; m < Rows; ++m) {
      first[m][0] = first[m][1] = start(m);
      if (kIsSplit) second[m][0] = second[m][1] = _mm256_setzero_si256();
    }
  }
  SIMD_INLINE auto& of_half(int half) {
    if constexpr (kIsSplit) {
      return half == 0 ? first : second;
    } else {
      return first;
    }
  }
  SIMD_INLINE void add_signed(const uint8_t* weights, const int8_t* x, int64_t stride) {
    dot_signed_half<Rows>(of_half(0), weights, x, stride);
    dot_signed_half<Rows>(of_half(1), weights + 256, x + 16, stride);
  }
  SIMD_INLINE void add_bytes(const uint8_t* weights, const int8_t* x, int64_t stride) {
    dot_bytes_half<Rows>(of_half(0), weights, x, stride);
    dot_bytes_half<Rows>(of_half(1), weights + 256, x + 16, stride);
  }
  SIMD_INLINE void add_nibbles(const uint8_t* weights, const int8_t* x, int64_t stride) {
    dot_nibbles_half<Rows>(of_half(0), weights, x, stride);
    dot_nibbles_half<Rows>(of_half(1), weights + 128, x + 8, stride);
  }
  SIMD_INLINE void total(__m256i (&dot)[Rows][2]) const {
#pragma GCC unroll 6
    for (int m = 0; m < Rows; ++m) {
      for (int half = 0; half < 2; ++half) {
        dot[m][half] = kIsSplit ? _mm256_add_epi32(first[m][half], second[m][half]) : first[m][half];
      }
    }
  }
};

// sums += pairs of words, in each of eight lanes, times the other's.
SIMD_INLINE void add_word_products(__m256i* sums, __m256i words, __m256i others) {
  *sums = _mm256_dpwssd_avx_epi32(*sums, words, others);
}

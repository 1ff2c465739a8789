// The innermost loops of the AVX-VNNI family's integer products: one group of 32 inputs, 16 outputs
// and 1 to 6 rows, in assembly, since the register tile (12 sums, 2 weights, 1 input, 1 constant) fills
// all 16 registers. vpdpbusd multiplies unsigned by signed bytes and adds four products to each sum.
//
// A macro per row and one per quad (4 inputs of all rows) expand to the group. X: the address of a
// row's inputs; D: the number of its sums. Weights of quad Q: outputs 0-7 at 64 Q, 8-15 32 further.
// Included inside the family's namespace, after simd_avx2.h.

// Rows of a tile at most.
constexpr int kMaxTileRows = 6;

#if defined(FS_EMULATE_ISA)
// dot += weights(half, quad) times the rows' inputs at place(quad), for each of the group's eight quads.
template <int Rows, class Weights, class Place>
SIMD_INLINE void dot_quads(__m256i (&dot)[Rows][2], const int8_t* x, int64_t stride, const Weights& weights,
                          const Place& place) {
  for (int quad = 0; quad < 8; ++quad) {
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
SIMD_INLINE void dot_bytes(__m256i (&dot)[Rows][2], const uint8_t* weights, const int8_t* x,
                                int64_t stride) {
  dot_quads<Rows>(dot, x, stride, [&](int half, int quad) { return quad_half(weights, half, quad); },
                 [](int quad) { return 4 * quad; });
}
template <int Rows>
SIMD_INLINE void dot_signed(__m256i (&dot)[Rows][2], const uint8_t* weights, const int8_t* x,
                                 int64_t stride) {
  const __m256i sign = _mm256_set1_epi8(-128);
  dot_quads<Rows>(
      dot, x, stride,
      [&](int half, int quad) { return _mm256_xor_si256(quad_half(weights, half, quad), sign); },
      [](int quad) { return 4 * quad; });
}
template <int Rows>
SIMD_INLINE void dot_nibbles(__m256i (&dot)[Rows][2], const uint8_t* weights, const int8_t* x,
                                  int64_t stride) {
  const __m256i nibble = _mm256_set1_epi8(15);
  dot_quads<Rows>(
      dot, x, stride,
      [&](int half, int quad) {
        const __m256i packed = quad_half(weights, half, quad / 2);
        return _mm256_and_si256(quad % 2 == 0 ? packed : _mm256_srli_epi16(packed, 4), nibble);
      },
      [](int quad) { return quad / 2 * 4 + quad % 2 * 16; });
}
template <int Rows>
SIMD_INLINE void dot_int6(__m256i (&dot)[Rows][2], const uint8_t* weights, const int8_t* x, int64_t stride) {
  const auto masked = [](__m256i bytes, char mask) { return _mm256_and_si256(bytes, _mm256_set1_epi8(mask)); };
  dot_quads<Rows>(
      dot, x, stride,
      [&](int half, int quad) {
        const uint8_t* quads = weights + quad / 4 * 192;
        if (quad % 4 < 3) return masked(quad_half(quads, half, quad % 4), 63);
        const __m256i lower = masked(_mm256_srli_epi16(quad_half(quads, half, 0), 6), 3);
        const __m256i middle = masked(_mm256_srli_epi16(quad_half(quads, half, 1), 4), 12);
        const __m256i upper = masked(_mm256_srli_epi16(quad_half(quads, half, 2), 2), 48);
        return _mm256_or_si256(_mm256_or_si256(lower, middle), upper);
      },
      [](int quad) { return 4 * quad; });
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

// Defines NAME<Rows>(dot, weights, x, stride): GROUP(Rows) adds to `dot`. The input and both weights are in
// registers of their own, since an assembly statement has no room for more operands.
#define DEFINE_DOT_CASE(ROWS, GROUP, CONSTANT)                                          \
  if constexpr (Rows == ROWS) {                                                        \
    asm volatile(GROUP(DOT_ROWS_##ROWS)                                                 \
                 : DOT_SUMS_##ROWS                                                     \
                 : [w] "r"(weights), [x] "r"(x), [fourth] "r"(x + 3 * stride),         \
                   [stride] "r"(stride), [constant] "x"(CONSTANT)                      \
                 : "memory", "xmm13", "xmm14", "xmm15");                               \
  }
#define DEFINE_DOT(NAME, GROUP, CONSTANT)                                                  \
  template <int Rows>                                                                     \
  SIMD_INLINE void NAME(__m256i (&dot)[Rows][2], const uint8_t* weights, const int8_t* x, \
                        int64_t stride) {                                                 \
    DEFINE_DOT_CASE(1, GROUP, CONSTANT)                                                    \
    DEFINE_DOT_CASE(2, GROUP, CONSTANT)                                                    \
    DEFINE_DOT_CASE(3, GROUP, CONSTANT)                                                    \
    DEFINE_DOT_CASE(4, GROUP, CONSTANT)                                                    \
    DEFINE_DOT_CASE(6, GROUP, CONSTANT)                                                    \
  }

#define DOT_PRODUCTS(OFFSET, X, D)                            \
  "vpbroadcastd " OFFSET X ", %%ymm13\n\t"                    \
  "%{vex%} vpdpbusd %%ymm13, %%ymm14, %[low" D "]\n\t"        \
  "%{vex%} vpdpbusd %%ymm13, %%ymm15, %[high" D "]\n\t"

// Bytes: weights + 128, which is added here to signed ones as they are packed. The caller starts from -128
// times the sum of the inputs.
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

// int6 as it is packed (matrix.h), each weight + 32: of a half at byte W three quads in the lower bits, the fourth in
// the upper. The caller starts from -32 times the sum of the inputs.
#define DOT_LOWER_BITS_QUAD(ROWS, Q, W)                \
  "vpand " #W "(%[w]), %[constant], %%ymm14\n\t"      \
  "vpand " #W "+32(%[w]), %[constant], %%ymm15\n\t" ROWS(DOT_ROW, Q)
#define DOT_UPPER_BITS(W, TO)                             \
  "vpandn " #W "(%[w]), %[constant], %%" TO "\n\t"       \
  "vpandn " #W "+64(%[w]), %[constant], %%ymm13\n\t"     \
  "vpsrlw $2, %%" TO ", %%" TO "\n\t"                    \
  "vpor %%ymm13, %%" TO ", %%" TO "\n\t"                 \
  "vpandn " #W "+128(%[w]), %[constant], %%ymm13\n\t"    \
  "vpsrlw $4, %%" TO ", %%" TO "\n\t"                    \
  "vpsrlw $2, %%ymm13, %%ymm13\n\t"                      \
  "vpor %%ymm13, %%" TO ", %%" TO "\n\t"
#define DOT_UPPER_BITS_QUAD(ROWS, Q, W) \
  DOT_UPPER_BITS(W, "ymm14") DOT_UPPER_BITS(W + 32, "ymm15") ROWS(DOT_ROW, Q)

#define DOT_ALL_QUADS(QUAD, ROWS)                                       \
  QUAD(ROWS, 0) QUAD(ROWS, 1) QUAD(ROWS, 2) QUAD(ROWS, 3) QUAD(ROWS, 4) \
  QUAD(ROWS, 5) QUAD(ROWS, 6) QUAD(ROWS, 7)
#define DOT_SIGNED_GROUP(ROWS) DOT_ALL_QUADS(DOT_SIGNED_QUAD, ROWS)
#define DOT_BYTES_GROUP(ROWS) DOT_ALL_QUADS(DOT_BYTES_QUAD, ROWS)
#define DOT_NIBBLES_GROUP(ROWS)                            \
  DOT_NIBBLE_QUADS(ROWS, 0) DOT_NIBBLE_QUADS(ROWS, 1)      \
  DOT_NIBBLE_QUADS(ROWS, 2) DOT_NIBBLE_QUADS(ROWS, 3)

#define DOT_INT6_GROUP(ROWS)                                              \
  DOT_LOWER_BITS_QUAD(ROWS, 0, 0) DOT_LOWER_BITS_QUAD(ROWS, 1, 64)        \
  DOT_LOWER_BITS_QUAD(ROWS, 2, 128) DOT_UPPER_BITS_QUAD(ROWS, 3, 0)       \
  DOT_LOWER_BITS_QUAD(ROWS, 4, 192) DOT_LOWER_BITS_QUAD(ROWS, 5, 256)     \
  DOT_LOWER_BITS_QUAD(ROWS, 6, 320) DOT_UPPER_BITS_QUAD(ROWS, 7, 192)

DEFINE_DOT(dot_signed, DOT_SIGNED_GROUP, _mm256_set1_epi8(-128))
DEFINE_DOT(dot_bytes, DOT_BYTES_GROUP, _mm256_setzero_si256())
DEFINE_DOT(dot_nibbles, DOT_NIBBLES_GROUP, _mm256_set1_epi8(15))
DEFINE_DOT(dot_int6, DOT_INT6_GROUP, _mm256_set1_epi8(63))
#endif

// sums += pairs of words, in each of eight lanes, times the other's.
SIMD_INLINE void add_word_products(__m256i* sums, __m256i words, __m256i others) {
  *sums = _mm256_dpwssd_avx_epi32(*sums, words, others);
}

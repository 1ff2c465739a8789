// The innermost loops of the AVX2 family's integer products: one group of 32 inputs, 16 outputs and
// 1 to 4 rows, in assembly.
//
// Such a loop is bound by the four vector pipes, and its register tile (8 sums, 2 weights, 1 input,
// 1 or 2 constants, 2 products) fills all 16 registers. From intrinsics GCC 12 makes a tenth to a
// fifth more instructions of it (copies of sums, spills), which costs as much time; written out, it
// runs at 85-90 % of what the pipes allow. Sums are exact integers, so that order does not matter.
//
// A macro per row and one per quad (4 inputs of all rows) expand to a group. X: the address of a
// row's inputs; D: the number of its sums. Weights of quad Q: outputs 0-7 at 64 Q, 8-15 32 further.
// Included inside the family's namespace, after simd_avx2.h.

// Rows of a tile at most.
constexpr int kMaxTileRows = 4;

#define DOT_ROWS_1(ROW, Q) ROW(Q, "(%[x])", "0")
#define DOT_ROWS_2(ROW, Q) DOT_ROWS_1(ROW, Q) ROW(Q, "(%[x],%[stride])", "1")
#define DOT_ROWS_3(ROW, Q) DOT_ROWS_2(ROW, Q) ROW(Q, "(%[x],%[stride],2)", "2")
#define DOT_ROWS_4(ROW, Q) DOT_ROWS_3(ROW, Q) ROW(Q, "(%[x],%[stride3])", "3")

#define DOT_SUMS_1(SUM) [low0] SUM(dot[0][0]), [high0] SUM(dot[0][1])
#define DOT_SUMS_2(SUM) DOT_SUMS_1(SUM), [low1] SUM(dot[1][0]), [high1] SUM(dot[1][1])
#define DOT_SUMS_3(SUM) DOT_SUMS_2(SUM), [low2] SUM(dot[2][0]), [high2] SUM(dot[2][1])
#define DOT_SUMS_4(SUM) DOT_SUMS_3(SUM), [low3] SUM(dot[3][0]), [high3] SUM(dot[3][1])

// Defines NAME<Rows>(dot, weights, x, stride): GROUP(Rows) adds to `dot`, or sets it, as SUM ("+x" or
// "=&x") says. CONSTANT and SIGN are registers that are only read.
#define DEFINE_DOT_CASE(ROWS, SUM, GROUP, CONSTANT, SIGN)                                         \
  if constexpr (Rows == ROWS) {                                                                   \
    asm volatile(GROUP(DOT_ROWS_##ROWS)                                                           \
                 : DOT_SUMS_##ROWS(SUM), [in] "=&x"(in), [t] "=&x"(t), [low] "=&x"(low),          \
                   [high] "=&x"(high)                                                             \
                 : [w] "r"(weights), [x] "r"(x), [stride] "r"(stride), [stride3] "r"(3 * stride), \
                   [constant] "x"(CONSTANT), [sign] "x"(SIGN)                                     \
                 : "memory");                                                                     \
  }
#define DEFINE_DOT(NAME, SUM, GROUP, CONSTANT, SIGN)                                      \
  template <int Rows>                                                                     \
  SIMD_INLINE void NAME(__m256i (&dot)[Rows][2], const uint8_t* weights, const int8_t* x, \
                        int64_t stride) {                                                 \
    __m256i in, t, low, high;                                                             \
    DEFINE_DOT_CASE(1, SUM, GROUP, CONSTANT, SIGN)                                        \
    DEFINE_DOT_CASE(2, SUM, GROUP, CONSTANT, SIGN)                                        \
    DEFINE_DOT_CASE(3, SUM, GROUP, CONSTANT, SIGN)                                        \
    DEFINE_DOT_CASE(4, SUM, GROUP, CONSTANT, SIGN)                                        \
  }

#define DOT_INPUT(OFFSET, X) "vpbroadcastd " OFFSET X ", %[in]\n\t"

// Sums of products, in pairs of 16 bits, to the sums in 32.
#define DOT_WIDEN(D)                          \
  "vpmaddwd %[constant], %[t], %[t]\n\t"    \
  "vpmaddwd %[constant], %[in], %[in]\n\t"  \
  "vpaddd %[t], %[low" D "], %[low" D "]\n\t" \
  "vpaddd %[in], %[high" D "], %[high" D "]\n\t"

// Bytes times bytes as magnitude times signed input: |w| <= 128, so that a pair of products is at
// most 2 * 128 * 127, which 16 bits hold.
#define DOT_PAIRS(D)                        \
  "vpmaddubsw %[t], %[low], %[t]\n\t"       \
  "vpmaddubsw %[in], %[high], %[in]\n\t"    \
  DOT_WIDEN(D)

// Signed weights as they are packed.
#define DOT_INT8_ROW(Q, X, D)                \
  DOT_INPUT(#Q "*4", X)                      \
  "vpsignb " #Q "*64(%[w]), %[in], %[t]\n\t" \
  "vpsignb " #Q "*64+32(%[w]), %[in], %[in]\n\t" DOT_PAIRS(D)
#define DOT_INT8_QUAD(ROWS, Q)               \
  "vpabsb " #Q "*64(%[w]), %[low]\n\t"       \
  "vpabsb " #Q "*64+32(%[w]), %[high]\n\t" ROWS(DOT_INT8_ROW, Q)

// Magnitudes, and 512 bytes further on the signs as masks. x ^ mask is x or -x - 1: the caller
// starts from the sum of the magnitudes of negative weights. An xor runs on any of the four pipes,
// vpsignb on two only.
#define DOT_SPLIT_ROW(Q, X, D)                   \
  DOT_INPUT(#Q "*4", X)                          \
  "vpxor " #Q "*64+512(%[w]), %[in], %[t]\n\t"   \
  "vpxor " #Q "*64+544(%[w]), %[in], %[in]\n\t" DOT_PAIRS(D)
#define DOT_SPLIT_QUAD(ROWS, Q)                  \
  "vmovdqa " #Q "*64(%[w]), %[low]\n\t"          \
  "vmovdqa " #Q "*64+32(%[w]), %[high]\n\t" ROWS(DOT_SPLIT_ROW, Q)

// Weights + 128, unsigned, times inputs of at most 64, so that no sign has to be moved: a pair of
// products is at most 2 * 255 * 64. The caller starts from -128 times the sum of the inputs.
#define DOT_OFFSET_ROW(Q, X, D)             \
  DOT_INPUT(#Q "*4", X)                     \
  "vpmaddubsw %[in], %[low], %[t]\n\t"      \
  "vpmaddubsw %[in], %[high], %[in]\n\t"    \
  DOT_WIDEN(D)
#define DOT_OFFSET_QUAD(ROWS, Q)                  \
  "vpxor " #Q "*64(%[w]), %[sign], %[low]\n\t"    \
  "vpxor " #Q "*64+32(%[w]), %[sign], %[high]\n\t" ROWS(DOT_OFFSET_ROW, Q)

// int6 as it is packed (matrix.h), each weight + 32: of a half at byte W three quads in the lower bits, the fourth in
// the upper. A pair of products is at most 2 * 63 * 127. The caller starts from -32 times the sum of the inputs.
#define DOT_LOWER_BITS_QUAD(ROWS, Q, W)               \
  "vpand " #W "(%[w]), %[sign], %[low]\n\t"          \
  "vpand " #W "+32(%[w]), %[sign], %[high]\n\t" ROWS(DOT_OFFSET_ROW, Q)
#define DOT_UPPER_BITS(W, TO)                         \
  "vpandn " #W "(%[w]), %[sign], %[" TO "]\n\t"      \
  "vpsrlw $6, %[" TO "], %[" TO "]\n\t"              \
  "vpandn " #W "+64(%[w]), %[sign], %[t]\n\t"        \
  "vpandn " #W "+128(%[w]), %[sign], %[in]\n\t"      \
  "vpsrlw $4, %[t], %[t]\n\t"                        \
  "vpsrlw $2, %[in], %[in]\n\t"                      \
  "vpor %[t], %[" TO "], %[" TO "]\n\t"              \
  "vpor %[in], %[" TO "], %[" TO "]\n\t"
#define DOT_UPPER_BITS_QUAD(ROWS, Q, W) \
  DOT_UPPER_BITS(W, "low") DOT_UPPER_BITS(W + 32, "high") ROWS(DOT_OFFSET_ROW, Q)

// Nibbles as bytes: at most 15, so that a lane's 16 products of a group are at most 15 * 127 * 16 =
// 30480 and the whole group stays in 16 bits. The first quad's products are where the sums begin.
#define DOT_NIBBLE_FIRST_ROW(Q, X, D)          \
  DOT_INPUT(#Q "*4", X)                        \
  "vpmaddubsw %[in], %[low], %[low" D "]\n\t"  \
  "vpmaddubsw %[in], %[high], %[high" D "]\n\t"
#define DOT_NIBBLE_PRODUCTS(D)                \
  "vpmaddubsw %[in], %[low], %[t]\n\t"        \
  "vpmaddubsw %[in], %[high], %[in]\n\t"      \
  "vpaddw %[t], %[low" D "], %[low" D "]\n\t" \
  "vpaddw %[in], %[high" D "], %[high" D "]\n\t"
#define DOT_NIBBLE_ROW(Q, X, D) DOT_INPUT(#Q "*4", X) DOT_NIBBLE_PRODUCTS(D)
#define DOT_NIBBLE_QUAD(ROWS, Q, ROW)   \
  "vmovdqa " #Q "*64(%[w]), %[low]\n\t" \
  "vmovdqa " #Q "*64+32(%[w]), %[high]\n\t" ROWS(ROW, Q)

// Nibbles as they are packed: quad Q in the low halves of its bytes, quad Q + 4 in the high ones.
#define DOT_HIGH_NIBBLE_ROW(Q, X, D) DOT_INPUT(#Q "*4+16", X) DOT_NIBBLE_PRODUCTS(D)
#define DOT_INT4_QUADS(ROWS, Q, ROW)                                \
  "vpand " #Q "*64(%[w]), %[constant], %[low]\n\t"                  \
  "vpand " #Q "*64+32(%[w]), %[constant], %[high]\n\t" ROWS(ROW, Q) \
  "vmovdqa " #Q "*64(%[w]), %[low]\n\t"                             \
  "vmovdqa " #Q "*64+32(%[w]), %[high]\n\t"                         \
  "vpsrlw $4, %[low], %[low]\n\t"                                   \
  "vpsrlw $4, %[high], %[high]\n\t"                                 \
  "vpand %[constant], %[low], %[low]\n\t"                           \
  "vpand %[constant], %[high], %[high]\n\t" ROWS(DOT_HIGH_NIBBLE_ROW, Q)

#define DOT_ALL_QUADS(QUAD, ROWS)                                               \
  QUAD(ROWS, 0) QUAD(ROWS, 1) QUAD(ROWS, 2) QUAD(ROWS, 3) QUAD(ROWS, 4)         \
  QUAD(ROWS, 5) QUAD(ROWS, 6) QUAD(ROWS, 7)
#define DOT_INT8_GROUP(ROWS) DOT_ALL_QUADS(DOT_INT8_QUAD, ROWS)
#define DOT_OFFSET_GROUP(ROWS) DOT_ALL_QUADS(DOT_OFFSET_QUAD, ROWS)
#define DOT_INT6_GROUP(ROWS)                                              \
  DOT_LOWER_BITS_QUAD(ROWS, 0, 0) DOT_LOWER_BITS_QUAD(ROWS, 1, 64)        \
  DOT_LOWER_BITS_QUAD(ROWS, 2, 128) DOT_UPPER_BITS_QUAD(ROWS, 3, 0)       \
  DOT_LOWER_BITS_QUAD(ROWS, 4, 192) DOT_LOWER_BITS_QUAD(ROWS, 5, 256)     \
  DOT_LOWER_BITS_QUAD(ROWS, 6, 320) DOT_UPPER_BITS_QUAD(ROWS, 7, 192)
#define DOT_SPLIT_GROUP(ROWS) DOT_ALL_QUADS(DOT_SPLIT_QUAD, ROWS)
#define DOT_NIBBLE_GROUP(ROWS)                                                                    \
  DOT_NIBBLE_QUAD(ROWS, 0, DOT_NIBBLE_FIRST_ROW) DOT_NIBBLE_QUAD(ROWS, 1, DOT_NIBBLE_ROW)         \
  DOT_NIBBLE_QUAD(ROWS, 2, DOT_NIBBLE_ROW) DOT_NIBBLE_QUAD(ROWS, 3, DOT_NIBBLE_ROW)               \
  DOT_NIBBLE_QUAD(ROWS, 4, DOT_NIBBLE_ROW) DOT_NIBBLE_QUAD(ROWS, 5, DOT_NIBBLE_ROW)               \
  DOT_NIBBLE_QUAD(ROWS, 6, DOT_NIBBLE_ROW) DOT_NIBBLE_QUAD(ROWS, 7, DOT_NIBBLE_ROW)
#define DOT_INT4_GROUP(ROWS)                                                                      \
  DOT_INT4_QUADS(ROWS, 0, DOT_NIBBLE_FIRST_ROW) DOT_INT4_QUADS(ROWS, 1, DOT_NIBBLE_ROW)           \
  DOT_INT4_QUADS(ROWS, 2, DOT_NIBBLE_ROW) DOT_INT4_QUADS(ROWS, 3, DOT_NIBBLE_ROW)

DEFINE_DOT(dot_int8, "+x", DOT_INT8_GROUP, _mm256_set1_epi16(1), _mm256_setzero_si256())
DEFINE_DOT(dot_split_int8, "+x", DOT_SPLIT_GROUP, _mm256_set1_epi16(1), _mm256_setzero_si256())
DEFINE_DOT(dot_offset_int8, "+x", DOT_OFFSET_GROUP, _mm256_set1_epi16(1), _mm256_set1_epi8(-128))
DEFINE_DOT(dot_int6, "+x", DOT_INT6_GROUP, _mm256_set1_epi16(1), _mm256_set1_epi8(63))
DEFINE_DOT(dot_int4, "=&x", DOT_INT4_GROUP, _mm256_set1_epi8(15), _mm256_setzero_si256())
DEFINE_DOT(dot_nibbles, "=&x", DOT_NIBBLE_GROUP, _mm256_setzero_si256(), _mm256_setzero_si256())

// sums += pairs of words, in each of eight lanes, times the other's. As intrinsics GCC 12 would add up in an
// order of its own and keep sums in memory.
SIMD_INLINE void add_word_products(__m256i* sums, __m256i words, __m256i others) {
  __m256i products;
  asm("vpmaddwd %[words], %[others], %[products]\n\tvpaddd %[products], %[sums], %[sums]"
      : [sums] "+x"(*sums), [products] "=&x"(products)
      : [words] "x"(words), [others] "x"(others));
}

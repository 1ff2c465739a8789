// How the families with 256 bits multiply words for attention_words.h.
// Included inside the family's namespace, after soften_words.h.

struct Words {
  __m256i halves[2];
};
struct WordSums {
  __m256i halves[2];
};

SIMD_INLINE WordSums no_words() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
SIMD_INLINE Words load_words(const int8_t* bytes) {
  const __m128i* from = reinterpret_cast<const __m128i*>(bytes);
  return {{_mm256_cvtepi8_epi16(_mm_loadu_si128(from)), _mm256_cvtepi8_epi16(_mm_loadu_si128(from + 1))}};
}
SIMD_INLINE void add_words(WordSums* sums, const Words& words, int32_t two) {
  const __m256i both = _mm256_set1_epi32(two);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
#if defined(FS_HAS_AVX_VNNI)
    sums->halves[half] = _mm256_dpwssd_avx_epi32(sums->halves[half], words.halves[half], both);
#else
    __m256i products;
    asm("vpmaddwd %[words], %[both], %[products]\n\tvpaddd %[products], %[sum], %[sum]"
        : [sum] "+x"(sums->halves[half]), [products] "=&x"(products)
        : [words] "x"(words.halves[half]), [both] "x"(both));
#endif
  }
}
SIMD_INLINE F8 floats_of(const WordSums& sums, int half) { return _mm256_cvtepi32_ps(sums.halves[half]); }

constexpr auto soften_piece = soften_to_words;

template <class Body>
SIMD_INLINE void for_rows(int num_queries, const Body& body) {
  for_queries(0, num_queries, body);
}
template <int Rows>
constexpr int kWordBlocks = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;

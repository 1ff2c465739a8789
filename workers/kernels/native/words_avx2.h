// How the families with 256 bits multiply words for attention_words.h.
// Included inside the family's namespace, after soften_words.h and the family's dot_*.h.

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
  for (int half = 0; half < 2; ++half) add_word_products(&sums->halves[half], words.halves[half], both);
}
SIMD_INLINE void store_word_scores(float* scores, const WordSums& sums, float query_scale,
                                   const float* key_scales) {
  for (int half = 0; half < 2; ++half, scores += 8, key_scales += 8) {
    const F8 scales = mul(splat(query_scale), load(key_scales));
    store(scores, mul(_mm256_cvtepi32_ps(sums.halves[half]), scales));
  }
}
SIMD_INLINE void add_word_values(float* acc, float correction, const WordSums& sums, float scale) {
  for (int half = 0; half < 2; ++half, acc += 8) {
    const F8 before = mul(load(acc), splat(correction));
    store(acc, fma(_mm256_cvtepi32_ps(sums.halves[half]), splat(scale), before));
  }
}

constexpr auto soften_piece = soften_to_words;
constexpr bool kSoftensMany = false;

template <class Body>
SIMD_INLINE void for_query_tiles(int num_queries, const Body& body) {
  for_queries(0, num_queries, body);
}
template <int Rows>
constexpr int kWordBlocks = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;

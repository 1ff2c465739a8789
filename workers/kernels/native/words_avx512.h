// How the AVX-512 families multiply words for attention_words.h.
// Included inside the family's namespace, after soften_words.h and softmax16_avx512.h.

using Words = __m512i;
using WordSums = __m512i;

SIMD_INLINE WordSums no_words() { return _mm512_setzero_si512(); }
SIMD_INLINE Words load_words(const int8_t* bytes) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
}
SIMD_INLINE void add_words(WordSums* sums, const Words& words, int32_t two) {
  *sums = _mm512_dpwssd_epi32(*sums, words, _mm512_set1_epi32(two));
}
SIMD_INLINE void store_word_scores(float* scores, const WordSums& sums, float query_scale,
                                   const float* key_scales) {
  const __m512 scales = _mm512_mul_ps(splat16(query_scale), _mm512_loadu_ps(key_scales));
  _mm512_storeu_ps(scores, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scales));
}
SIMD_INLINE void add_word_values(float* acc, float correction, const WordSums& sums, float scale) {
  const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(acc), splat16(correction));
  _mm512_storeu_ps(acc, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), splat16(scale), before));
}

template <class Body>
SIMD_INLINE void for_query_tiles(int num_queries, const Body& body) {
  for_tiles(0, num_queries, body);
}
template <int Rows>
constexpr int kWordBlocks = Rows > 4 ? 2 : 4;

#if defined(FS_EMULATE_ISA)
constexpr auto soften_piece = soften_to_words;
constexpr bool kSoftensMany = false;
#else
constexpr bool kSoftensMany = true;

// `soften_to_words` with 16 lanes and the same bits.
SIMD_INLINE float soften_piece(const QueryState& state, int query, int begin, int end, int num_keys,
                               const float* value_scales, int16_t* words) {
  begin = begin > 0 ? begin : 0, end = end < num_keys ? end : num_keys;
  if (begin >= end) {
    std::memset(words, 0, static_cast<size_t>(num_keys) * sizeof(int16_t));
    state.corrections[query] = 1.0f;
    return 0.0f;
  }
  const float* scores = state.scores + query * kPieceSize;
  const uint64_t visible = ~uint64_t{0} >> (kPieceSize - end) & ~uint64_t{0} << begin;
  __m512 p[4];
  for (int i = 0; i < 4; ++i) {
    const __mmask16 lanes = static_cast<__mmask16>(visible >> (16 * i));
    p[i] = _mm512_mask_loadu_ps(splat16(-INFINITY), lanes, scores + 16 * i);
  }
  const __m512 highest = _mm512_max_ps(_mm512_max_ps(p[0], p[1]), _mm512_max_ps(p[2], p[3]));
  const float before = state.largest[query], piece_max = _mm512_reduce_max_ps(highest);
  const float largest = before > piece_max ? before : piece_max;
  for (__m512& x : p) x = exp16(_mm512_sub_ps(x, splat16(largest)));
  const __m512 total = _mm512_add_ps(_mm512_add_ps(_mm512_add_ps(p[0], p[1]), p[2]), p[3]);
  const float correction = _mm512_cvtss_f32(exp16(splat16(before - largest)));
  state.corrections[query] = correction;
  const F8 eight = add(_mm512_castps512_ps256(total), _mm512_extractf32x8_ps(total, 1));
  state.totals[query] = state.totals[query] * correction + sum(eight);
  state.largest[query] = largest;

  __m512i sizes = _mm512_setzero_si512();
  for (int i = 0; i < 4; ++i) {
    p[i] = _mm512_mul_ps(p[i], _mm512_loadu_ps(value_scales + 16 * i));
    sizes = _mm512_max_epi32(sizes, _mm512_castps_si512(_mm512_abs_ps(p[i])));
  }
  const int largest_bits = _mm512_reduce_max_epi32(sizes);
  const float largest_word = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(largest_bits)));
  if (largest_word < kLeastScale) {
    std::memset(words, 0, kPieceSize * sizeof(int16_t));
    return 0.0f;
  }
  const __m512 inverse = splat16(kWordLevels / largest_word);
  for (int i = 0; i < 4; ++i) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(p[i], inverse));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 16 * i), _mm512_cvtsepi32_epi16(rounded));
  }
  return largest_word / kWordLevels;
}

// `soften_piece` for 16 queries at a time, from the first on, with the same bits; returns how many are done.
template <class Visible>
SIMD_INLINE int soften_many(const QueryState& state, int num_queries, const float* value_scales,
                            const Visible& visible, int16_t* words, float* word_scales) {
  const auto larger_bits = [&](__m512 x, __m512 y) __attribute__((always_inline)) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(x), _mm512_castps_si512(y)));
  };
  int first = 0;
  for (; num_queries - first >= kManySoftened && first + 16 <= kMaxQueries; first += 16) {
    const Seen16 seen(state, first, visible);
    const __m512 fall = _mm512_sub_ps(seen.before, seen.largest);
    const __m512 corrections = _mm512_mask_mov_ps(splat16(1.0f), seen.any, exp16(fall));
    _mm512_storeu_ps(state.largest + first, seen.largest);
    _mm512_storeu_ps(state.corrections + first, corrections);

    float* weighted = state.scores + first * kPieceSize;  // in place of scores
    __m512 each[16], each_size[16];
    for (int i = 0; i < 16; ++i) {
      const __m512 largest = splat16(state.largest[first + i]);
      __m512 p[4], sizes[4];
      for (int j = 0; j < 4; ++j) {
        p[j] = exp16(_mm512_sub_ps(seen.seen_scores(i, j), largest));
        const __m512 x = _mm512_mul_ps(p[j], _mm512_loadu_ps(value_scales + 16 * j));
        _mm512_storeu_ps(weighted + i * kPieceSize + 16 * j, x);
        sizes[j] = _mm512_abs_ps(x);
      }
      each[i] = _mm512_add_ps(_mm512_add_ps(_mm512_add_ps(p[0], p[1]), p[2]), p[3]);
      each_size[i] = larger_bits(larger_bits(sizes[0], sizes[1]), larger_bits(sizes[2], sizes[3]));
    }
    const __m512 totals = _mm512_loadu_ps(state.totals + first);
    _mm512_storeu_ps(state.totals + first,
                     _mm512_add_ps(_mm512_mul_ps(totals, corrections), sum_of_each(each)));

    const __m512 sizes = fold_each(each_size, larger_bits);
    const __mmask16 is_small = _mm512_cmp_ps_mask(sizes, splat16(kLeastScale), _CMP_LT_OQ);
    const __mmask16 is_kept = static_cast<__mmask16>(seen.any & ~is_small);
    alignas(64) float inverses[16];
    _mm512_store_ps(inverses, _mm512_maskz_div_ps(is_kept, splat16(kWordLevels), sizes));
    _mm512_storeu_ps(word_scales + first, _mm512_maskz_div_ps(is_kept, sizes, splat16(kWordLevels)));
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 4; ++j) {
        const __m512 x = _mm512_loadu_ps(weighted + i * kPieceSize + 16 * j);
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(x, splat16(inverses[i])));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + (first + i) * kPieceSize + 16 * j),
                            _mm512_cvtsepi32_epi16(rounded));
      }
    }
  }
  return first;
}
#endif

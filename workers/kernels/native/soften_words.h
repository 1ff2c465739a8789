// Floats to words of 16 bits, and the softmax that ends in such, for attention_words.h; on F8.
// Included inside the family's namespace, after attention_kernel.h.

constexpr float kWordLevels = 32767.0f;

// words = x / scale, rounded, the largest 32767 in size; n a multiple of 8. Returns the scale; where x is not
// finite, nor is that.
SIMD_INLINE float words_from_floats(int16_t* words, const float* x, int n) {
  __m256i highest = _mm256_setzero_si256();  // bits order as sizes do, and a NaN's are the highest
  for (int i = 0; i < n; i += 8) highest = _mm256_max_epi32(highest, _mm256_castps_si256(abs(load(x + i))));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(highest), _mm256_extracti128_si256(highest, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  const float largest = _mm_cvtss_f32(_mm_castsi128_ps(four));
  if (largest < kLeastScale) {
    std::memset(words, 0, static_cast<size_t>(n) * sizeof(int16_t));
    return 0.0f;
  }
  const F8 inverse = splat(kWordLevels / largest);
  for (int i = 0; i < n; i += 8) {
    const __m256i rounded = _mm256_cvtps_epi32(mul(load(x + i), inverse));
    const __m128i eight =
        _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words + i), eight);
  }
  return largest / kWordLevels;
}

// `soften` for a piece of num_keys positions, a multiple of 16, whose result is words:
// words = probability * value scale / the returned scale. Probabilities are summed up in 16 lanes.
SIMD_INLINE float soften_to_words(const QueryState& state, int query, int begin, int end, int num_keys,
                                  const float* value_scales, int16_t* words) {
  begin = begin > 0 ? begin : 0, end = end < num_keys ? end : num_keys;
  if (begin >= end) {
    std::memset(words, 0, static_cast<size_t>(num_keys) * sizeof(int16_t));
    state.corrections[query] = 1.0f;
    return 0.0f;
  }
  float* scores = state.scores + query * kPieceSize;
  for (int key = 0; key < begin; ++key) scores[key] = -INFINITY;
  for (int key = end; key < num_keys; ++key) scores[key] = -INFINITY;
  F8 highest = load(scores);
  for (int key = 8; key < num_keys; key += 8) highest = max(highest, load(scores + key));
  const float before = state.largest[query], piece_max = max_lane(highest);
  const float largest = before > piece_max ? before : piece_max;
  F8 totals[2] = {splat(0.0f), splat(0.0f)};
  for (int key = 0; key < num_keys; key += 16) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* eight = scores + key + 8 * half;
      const F8 p = exp(sub(load(eight), splat(largest)));
      totals[half] = add(totals[half], p);
      store(eight, mul(p, load(value_scales + key + 8 * half)));
    }
  }
  float correction[8];
  store(correction, exp(splat(before - largest)));
  state.corrections[query] = correction[0];
  state.totals[query] = state.totals[query] * correction[0] + sum(add(totals[0], totals[1]));
  state.largest[query] = largest;
  return words_from_floats(words, scores, num_keys);
}

// Eight floats at a time with AVX2 and FMA; simd_portable.h says what each name means.
//
// Included inside the family's namespace and under its target, after <immintrin.h>.

#define SIMD_INLINE inline __attribute__((always_inline))

using F8 = __m256;

SIMD_INLINE F8 splat(float x) { return _mm256_set1_ps(x); }
SIMD_INLINE F8 load(const float* p) { return _mm256_loadu_ps(p); }
SIMD_INLINE F8 load(const uint16_t* bf16) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
SIMD_INLINE F8 load(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
SIMD_INLINE void store(float* p, F8 x) { _mm256_storeu_ps(p, x); }

SIMD_INLINE F8 add(F8 a, F8 b) { return _mm256_add_ps(a, b); }
SIMD_INLINE F8 sub(F8 a, F8 b) { return _mm256_sub_ps(a, b); }
SIMD_INLINE F8 mul(F8 a, F8 b) { return _mm256_mul_ps(a, b); }
SIMD_INLINE F8 div(F8 a, F8 b) { return _mm256_div_ps(a, b); }
SIMD_INLINE F8 fma(F8 a, F8 b, F8 c) { return _mm256_fmadd_ps(a, b, c); }

SIMD_INLINE F8 max(F8 a, F8 b) { return _mm256_max_ps(a, b); }
SIMD_INLINE F8 abs(F8 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
SIMD_INLINE F8 round(F8 x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SIMD_INLINE F8 exp2_integral(F8 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
SIMD_INLINE F8 zero_below(F8 x, F8 at_least, float limit) {
  return _mm256_and_ps(x, _mm256_cmp_ps(at_least, splat(limit), _CMP_GE_OQ));
}

// Four sums at once, each in the order of `sum`.
SIMD_INLINE __m128 sums_of(F8 a, F8 b, F8 c, F8 d) {
  const auto fold = [](F8 x) __attribute__((always_inline)) {
    return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  };
  const __m128 a4 = fold(a), b4 = fold(b), c4 = fold(c), d4 = fold(d);
  const __m128 ab = _mm_add_ps(_mm_movelh_ps(a4, b4), _mm_movehl_ps(b4, a4));
  const __m128 cd = _mm_add_ps(_mm_movelh_ps(c4, d4), _mm_movehl_ps(d4, c4));
  return _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd));
}
SIMD_INLINE void sum4(float* out, F8 a, F8 b, F8 c, F8 d) {
  _mm_storeu_ps(out, sums_of(a, b, c, d));
}
SIMD_INLINE float sum(F8 x) { return _mm_cvtss_f32(sums_of(x, x, x, x)); }
SIMD_INLINE float max_lane(F8 x) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

SIMD_INLINE F8 swap_ones(F8 x) { return _mm256_permute_ps(x, 0xb1); }
SIMD_INLINE F8 swap_pairs(F8 x) { return _mm256_permute_ps(x, 0x4e); }
SIMD_INLINE F8 swap_halves(F8 x) { return _mm256_permute2f128_ps(x, x, 1); }

SIMD_INLINE int32_t quantize_group(int8_t* q, const F8 (&group)[4], float inverse) {
  __m256i words[4];
  for (int i = 0; i < 4; ++i) words[i] = _mm256_cvtps_epi32(mul(group[i], splat(inverse)));
  // The packs work within 128-bit halves; the permutation puts the order right.
  const __m256i low = _mm256_packs_epi32(words[0], words[1]);
  const __m256i high = _mm256_packs_epi32(words[2], words[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), bytes);

  const __m256i total = _mm256_add_epi32(_mm256_add_epi32(words[0], words[1]),
                                         _mm256_add_epi32(words[2], words[3]));
  __m128i four =
      _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

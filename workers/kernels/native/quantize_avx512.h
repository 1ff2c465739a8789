// Quantising inputs with 16 lanes: number for number what `quantize` of row_kernels.h does, in half
// the instructions. A group of 32 is two registers.
// Included inside the family's namespace, after row_kernels.h.

// -1 in the lanes of `negative`, 1 in the others.
SIMD_INLINE __m512 signs16(__mmask16 negative) {
  return _mm512_mask_blend_ps(negative, splat16(1.0f), splat16(-1.0f));
}

// H times a group, as rotate_group: the distances 1, 2, 4, 8 within a register, then 16.
SIMD_INLINE void rotate_group16(__m512 (&group)[2]) {
  const __m512 ones = signs16(0xaaaa), pairs = signs16(0xcccc), quads = signs16(0xf0f0);
  const __m512 halves = signs16(0xff00);
  for (__m512& x : group) {
    x = _mm512_fmadd_ps(x, ones, _mm512_permute_ps(x, 0xb1));
    x = _mm512_fmadd_ps(x, pairs, _mm512_permute_ps(x, 0x4e));
    x = _mm512_fmadd_ps(x, quads, _mm512_shuffle_f32x4(x, x, 0xb1));
    x = _mm512_fmadd_ps(x, halves, _mm512_shuffle_f32x4(x, x, 0x4e));
  }
  const __m512 sum = _mm512_add_ps(group[0], group[1]);
  group[1] = _mm512_sub_ps(group[0], group[1]);
  group[0] = sum;
}

SIMD_INLINE float max_lane16(__m512 x) {
  return max_lane(max(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}

// The quants, and their sum.
SIMD_INLINE int32_t quantize_group16(int8_t* q, const __m512 (&group)[2], float inverse) {
  __m128i halves[2];
  for (int i = 0; i < 2; ++i) {
    const __m512i words = _mm512_cvtps_epi32(_mm512_mul_ps(group[i], splat16(inverse)));
    halves[i] = _mm512_cvtsepi32_epi8(words);
  }
  const __m256i bytes = _mm256_set_m128i(halves[1], halves[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), bytes);
  const __m256i quads =
      _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), bytes);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return _mm_cvtsi128_si32(four);
}

// Of `offsets` only int8's are filled: int4 takes what it needs from `sums`.
void quantize16(const float* values, const Activations& x, const Matrix& weights, int row,
                int col_begin, int col_end) {
  if (!weights.is_quantized()) return quantize(values, x, weights, row, col_begin, col_end);
  const int64_t first_group = static_cast<int64_t>(row) * (x.cols / kGroupSize);
  const float levels = static_cast<float>(weights.input_levels());
  const float factor = weights.is_rotated ? 0.125f : 1.0f;  // a power of two: exact
  // Nothing here overlaps; told so, the compiler keeps the addresses in registers.
  const float* __restrict from = values;
  int8_t* __restrict quants = x.quants + static_cast<int64_t>(row) * x.cols;
  float *__restrict scales = x.scales + first_group, *__restrict scaled = x.scaled_sums + first_group;
  int32_t *__restrict totals = x.sums + first_group, *__restrict offsets = x.offsets + first_group;
  const bool is_rotated = weights.is_rotated;
  for (int col = col_begin; col < col_end; col += kGroupSize, from += kGroupSize) {
    __m512 group[2] = {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
    if (is_rotated) rotate_group16(group);
    const float largest = max_lane16(_mm512_max_ps(_mm512_abs_ps(group[0]), _mm512_abs_ps(group[1])));
    float scale = largest / levels;
    int32_t total = 0;
    if (scale < kLeastScale) {
      scale = 0.0f;
      std::memset(quants + col, 0, kGroupSize);
    } else {
      total = quantize_group16(quants + col, group, levels / largest);
    }
    const int index = col / kGroupSize;
    scales[index] = scale * factor;
    totals[index] = total;
    scaled[index] = scale * factor * static_cast<float>(total);
    offsets[index] = -128 * total;
  }
}

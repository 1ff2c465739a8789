// Row kernels with 16 lanes, the same bits as those of row_kernels.h: every operation here is one on
// single elements, or exact.
// Included inside the family's namespace, after row_kernels.h and tiles_avx512.h.

SIMD_INLINE __m512 exp16(__m512 x) {
  const __m512 clamped = _mm512_max_ps(x, splat16(-87.0f));
  const __m512 scaled = _mm512_mul_ps(clamped, splat16(1.44269504088896341f));
  const __m512 n = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fmadd_ps(n, splat16(-0.693359375f), clamped);
  r = _mm512_fmadd_ps(n, splat16(2.12194440e-4f), r);
  __m512 y = splat16(1.9875691500e-4f);
  y = _mm512_fmadd_ps(y, r, splat16(1.3981999507e-3f));
  y = _mm512_fmadd_ps(y, r, splat16(8.3334519073e-3f));
  y = _mm512_fmadd_ps(y, r, splat16(4.1665795894e-2f));
  y = _mm512_fmadd_ps(y, r, splat16(1.6666665459e-1f));
  y = _mm512_fmadd_ps(y, r, splat16(5.0000001201e-1f));
  y = _mm512_add_ps(_mm512_fmadd_ps(y, _mm512_mul_ps(r, r), r), splat16(1.0f));
  const __mmask16 is_large = _mm512_cmp_ps_mask(x, splat16(-87.0f), _CMP_GE_OQ);
  return _mm512_maskz_scalef_ps(is_large, y, n);
}

void swiglu16(float* y, const float* gate, const float* up, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 g = _mm512_loadu_ps(gate + i);
    const __m512 exp_minus = exp16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_max_ps(g, splat16(-87.0f))));
    const __m512 sigmoid = _mm512_div_ps(g, _mm512_add_ps(splat16(1.0f), exp_minus));
    _mm512_storeu_ps(y + i, _mm512_mul_ps(sigmoid, _mm512_loadu_ps(up + i)));
  }
  swiglu(y + i, gate + i, up + i, n - i);
}

// -1 in the lanes of the mask, 1 in the others.
SIMD_INLINE __m512 minus_one_in(int mask) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(mask), splat16(1.0f), splat16(-1.0f));
}

// `rotate_group` for a group in two registers.
SIMD_INLINE void rotate_group16(__m512 (&group)[2]) {
  for (__m512& x : group) {
    x = _mm512_fmadd_ps(x, minus_one_in(0xaaaa), _mm512_permute_ps(x, 0xb1));
    x = _mm512_fmadd_ps(x, minus_one_in(0xcccc), _mm512_permute_ps(x, 0x4e));
    x = _mm512_fmadd_ps(x, minus_one_in(0xf0f0), _mm512_shuffle_f32x4(x, x, 0xb1));
    x = _mm512_fmadd_ps(x, minus_one_in(0xff00), _mm512_shuffle_f32x4(x, x, 0x4e));
  }
  const __m512 sum = _mm512_add_ps(group[0], group[1]);
  group[1] = _mm512_sub_ps(group[0], group[1]);
  group[0] = sum;
}

// Inputs that share a scale, quantised: `Pairs` times 64.
template <int Pairs>
struct Quants16 {
  __m512i words[4 * Pairs];  // 16 in each
  float scale;               // what a quant stands for

  SIMD_INLINE __m512i bytes(int pair) const {
    const __m512i* from = words + 4 * pair;
    __m512i all = _mm512_castsi128_si512(_mm512_cvtepi32_epi8(from[0]));
    all = _mm512_inserti32x4(all, _mm512_cvtepi32_epi8(from[1]), 1);
    all = _mm512_inserti32x4(all, _mm512_cvtepi32_epi8(from[2]), 2);
    return _mm512_inserti32x4(all, _mm512_cvtepi32_epi8(from[3]), 3);
  }
  // Of the sums over the pair's two groups.
  SIMD_INLINE void sum_up(int pair, int (&totals)[2]) const {
    const __m512i* from = words + 4 * pair;
    for (int i = 0; i < 2; ++i) {
      totals[i] = _mm512_reduce_add_epi32(_mm512_add_epi32(from[2 * i], from[2 * i + 1]));
    }
  }
};

template <int Pairs>
SIMD_INLINE Quants16<Pairs> quantized16(const float* values, const Matrix& weights) {
  static_assert(!kAddsPairsInWords);
  __m512 groups[2 * Pairs][2], highest = _mm512_setzero_ps();
#pragma GCC unroll 6
  for (int i = 0; i < 2 * Pairs; ++i) {
    for (int half = 0; half < 2; ++half) groups[i][half] = _mm512_loadu_ps(values + 32 * i + 16 * half);
    if (weights.is_rotated) rotate_group16(groups[i]);
    highest = _mm512_max_ps(highest, _mm512_max_ps(_mm512_abs_ps(groups[i][0]), _mm512_abs_ps(groups[i][1])));
  }
  const float largest = _mm512_reduce_max_ps(highest);
  const float scale = largest / kInputLevels;
  const bool is_zero = scale < kLeastScale;
  const __m512 inverse = splat16(is_zero ? 0.0f : kInputLevels / largest);
  Quants16<Pairs> quants;
#pragma GCC unroll 12
  for (int i = 0; i < 4 * Pairs; ++i) {
    quants.words[i] = _mm512_cvtps_epi32(_mm512_mul_ps(groups[i / 2][i % 2], inverse));
  }
  quants.scale = is_zero ? 0.0f : scale * (weights.is_rotated ? 0.125f : 1.0f);
  return quants;
}

// Calls body(Count<N>()) for weights of which N times 64 share a scale.
template <class Body>
SIMD_INLINE void with_pairs_of(const Matrix& weights, const Body& body) {
  switch (weights.scale_group / kPairSize) {
    case 1: body(Count<1>()); break;
    case 2: body(Count<2>()); break;
    default: body(Count<3>()); break;
  }
}

// Whether the row is one of few, whose nibbles are multiplied as they are (matmul_nested4_avx512.h).
SIMD_INLINE bool needs_sums_of_groups(const Activations& x, const Matrix& weights, int row) {
  return weights.dtype == kNested4 && rows_in_block_of(row, x.num_rows) < kManyNestedRows;
}

// As quantize_groups, but for what the products of these weights do not read: PEs that fill columns of
// the same rows write lines that each other holds.
template <int Pairs>
SIMD_INLINE void put_quants(const Quants16<Pairs>& quants, const Activations& x, bool needs_sums, int row,
                            int col) {
  const int64_t place = int64_t{row} * x.cols + col;
  const int64_t index = place / (Pairs * kPairSize);
  __m512i sums = _mm512_setzero_si512();
#pragma GCC unroll 3
  for (int pair = 0; pair < Pairs; ++pair) {
    _mm512_storeu_si512(x.quants + place + pair * kPairSize, quants.bytes(pair));
    for (int i = 0; i < 4; ++i) sums = _mm512_add_epi32(sums, quants.words[4 * pair + i]);
    if (!needs_sums) continue;
    int totals[2];
    quants.sum_up(pair, totals);
    x.word_sums[place / kPairSize + pair] = two_words(totals[0], totals[1]);
    for (int i = 0; i < 2; ++i) x.group_offsets[place / kGroupSize + 2 * pair + i] = -8 * totals[i];
  }
  x.scales[index] = quants.scale;
  x.offsets[index] = -128 * _mm512_reduce_add_epi32(sums);
}

void quantize_pairs16(const float* values, const Activations& x, const Matrix& weights, int row,
                      int col_begin, int col_end) {
  const bool needs_sums = needs_sums_of_groups(x, weights, row);
  with_pairs_of(weights, [&](auto pairs) __attribute__((always_inline)) {
    constexpr int kPairs = decltype(pairs)::value, kInputs = kPairs * kPairSize;
    for (int col = col_begin; col < col_end; col += kInputs) {
      put_quants(quantized16<kPairs>(values + (col - col_begin), weights), x, needs_sums, row, col);
    }
  });
}

// 16 numbers as `bf16_from_float` makes them.
SIMD_INLINE __m256i halves_of(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values), half = _mm512_srli_epi32(bits, 16);
  const __m512i is_odd = _mm512_and_si512(half, _mm512_set1_epi32(1));
  const __m512i raised = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), is_odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_or_epi32(_mm512_srli_epi32(raised, 16), is_nan, half,
                                               _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(rounded);
}

void bf16_from_float16(uint16_t* y, const float* x, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), halves_of(_mm512_loadu_ps(x + i)));
  }
  bf16_from_float(y + i, x + i, n - i);
}

// For bf16 weights `quantize` writes `halves` and `values`, where products read one of them.
void quantize16(const float* values, const Activations& x, const Matrix& weights, int row,
                int col_begin, int col_end) {
  if (weights.dtype == kBf16 && has_fast_bf16_dot()) {
    bf16_from_float16(x.halves + int64_t{row} * x.cols + col_begin, values, col_end - col_begin);
    return;
  }
  const bool has_pairs = weights.is_quantized() && weights.scale_group != kGroupSize;
  (has_pairs ? quantize_pairs16 : quantize)(values, x, weights, row, col_begin, col_end);
}

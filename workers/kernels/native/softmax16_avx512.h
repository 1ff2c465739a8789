// What softmaxes of 16 queries at once have in common: what is one number for each query is made for all of
// them in one register.
// Included inside the family's namespace, after attention_kernel.h and tiles_avx512.h.

// From so many queries of up to 16 on that pays; the softmax of fewer goes on query by query, each beside the
// others'.
constexpr int kManySoftened = 9;

// Lane i: the lanes of each[i] folded into one, those 8, 4, 2 and 1 apart in turn, as _mm512_reduce_* does.
template <class Fold>
SIMD_INLINE __m512 fold_each(const __m512 (&each)[16], const Fold& fold) {
  __m512 eights[8], fours[4], twos[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = each[2 * i], b = each[2 * i + 1];
    eights[i] = fold(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 4; ++i) {  // a 128-bit lane for each
    const __m512 a = eights[2 * i], b = eights[2 * i + 1];
    fours[i] = fold(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = fours[2 * i], b = fours[2 * i + 1];
    twos[i] = fold(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  const __m512 all = fold(_mm512_shuffle_ps(twos[0], twos[1], 0x88),
                          _mm512_shuffle_ps(twos[0], twos[1], 0xdd));
  // Lane 4 c + j has what belongs to each[4 j + c].
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(order, all);
}

SIMD_INLINE __m512 largest_of_each(const __m512 (&each)[16]) {
  return fold_each(each, [&](__m512 x, __m512 y) __attribute__((always_inline)) { return _mm512_max_ps(x, y); });
}
SIMD_INLINE __m512 sum_of_each(const __m512 (&each)[16]) {
  return fold_each(each, [&](__m512 x, __m512 y) __attribute__((always_inline)) { return _mm512_add_ps(x, y); });
}

// What queries [first, first + 16) see of a piece, and their largest scores with it; a lane for each query. A
// task has room for more queries than it has: what is there may be anything, and nothing comes of it.
struct Seen16 {
  const float* scores;       // (16, 64)
  uint64_t positions[16];    // a query's, a bit for each
  __mmask16 any;             // who sees anything
  __mmask16 rises;           // whose largest score may be a new one; a NaN's is
  __m512 before, largest;

  template <class Visible>
  SIMD_INLINE Seen16(const QueryState& state, int first, const Visible& visible)
      : scores(state.scores + first * kPieceSize), any(0) {
    __m512 each[16];
    for (int i = 0; i < 16; ++i) {
      int begin, end;
      visible(first + i, &begin, &end);
      begin = begin > 0 ? begin : 0, end = end < kPieceSize ? end : kPieceSize;
      positions[i] = begin < end ? ~uint64_t{0} >> (kPieceSize - end) & ~uint64_t{0} << begin : 0;
      if (positions[i] != 0) any = static_cast<__mmask16>(any | 1u << i);
      each[i] = _mm512_max_ps(_mm512_max_ps(seen_scores(i, 0), seen_scores(i, 1)),
                              _mm512_max_ps(seen_scores(i, 2), seen_scores(i, 3)));
    }
    before = _mm512_loadu_ps(state.largest + first);
    const __m512 highest = largest_of_each(each);
    rises = static_cast<__mmask16>(any & ~_mm512_cmp_ps_mask(before, highest, _CMP_GT_OQ));
    largest = _mm512_mask_mov_ps(before, rises, highest);
  }
  // Of positions [16 j, 16 j + 16).
  SIMD_INLINE __mmask16 lanes(int query, int j) const {
    return static_cast<__mmask16>(positions[query] >> (16 * j));
  }
  SIMD_INLINE __m512 seen_scores(int query, int j) const {
    return _mm512_mask_loadu_ps(splat16(-INFINITY), lanes(query, j), scores + query * kPieceSize + 16 * j);
  }
};

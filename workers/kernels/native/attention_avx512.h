// Attention of many queries with 16 lanes: tiles of queries and keys or values, in the sums of
// attention_kernel.h, bit for bit. A register of scores' sums holds the eight lanes of two keys; one
// of values' sums holds 16 dimensions, each of which is a sum of its own.
//
// Half the instructions of the eight-lane tiles: a prompt of 4,096 took a twelfth less time on a
// Zen 4, where multiplying was then half of its attention, and adding up lanes and exp a quarter. (A
// bf16 cache goes another way there by now, attention_halves.h.)
// Included inside the family's namespace, after attention_kernel.h.

struct AttentionTiles {
  template <class Kv>
  static constexpr bool kTakesPieces = false;
  // The scores of the first queries, as many as there are whole tiles of; returns their number.
  static SIMD_INLINE int score(const QueryState& state, int num_queries, int head_dim,
                               const Piece<float>& piece) {
    const int count = num_queries / kScoreQueries * kScoreQueries;
    for (int query = 0; query < count; query += kScoreQueries) {
      for (int key = piece.begin & ~7; key < piece.end; key += 8) {
        const float* keys[8];
        for (int j = 0; j < 8; ++j) {  // those outside the piece are masked by the caller
          keys[j] = piece.rows[0][std::clamp(key + j, piece.begin, piece.end - 1)];
        }
        score_tile(state.scores + query * kPieceSize + key, state.q + query * head_dim, head_dim,
                   keys);
      }
    }
    return count;
  }

  // Likewise for acc = acc * correction + sum over keys of p[key] * value[key].
  static SIMD_INLINE int add(const QueryState& state, int num_queries, int head_dim,
                             const Piece<float>& piece) {
    if (head_dim % kDims != 0) return 0;
    const int count = num_queries / kAddQueries * kAddQueries;
    for (int query = 0; query < count; query += kAddQueries) {
      for (int d = 0; d < head_dim; d += kDims) {
        add_tile(state.acc + query * head_dim + d, head_dim, state.corrections + query,
                 state.scores + query * kPieceSize, piece, d);
      }
    }
    return count;
  }

 private:
  static constexpr int kScoreQueries = 4, kAddQueries = 6, kDims = 64;

  static SIMD_INLINE void score_tile(float* scores, const float* q, int head_dim,
                                     const float* const (&keys)[8]) {
    __m512 acc[kScoreQueries][4];  // of two keys each
    for (auto& of_query : acc) {
      for (__m512& sums : of_query) sums = _mm512_setzero_ps();
    }
    for (int d = 0; d < head_dim; d += 8) {
      __m512 pairs[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512 first = _mm512_castps256_ps512(load(keys[2 * j] + d));
        pairs[j] = _mm512_insertf32x8(first, load(keys[2 * j + 1] + d), 1);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kScoreQueries; ++i) {
        const __m512 query = _mm512_broadcast_f32x8(load(q + i * head_dim + d));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_fmadd_ps(query, pairs[j], acc[i][j]);
      }
    }
    // Each sum over eight lanes in the order of `sum4`: 128-bit halves, then lanes 0 + 2 and 1 + 3,
    // then those two. A 128-bit lane below is a key's.
    __m512 sums[2];  // keys 0-3 and 4-7: four queries each
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512 folded[kScoreQueries];
#pragma GCC unroll 4
      for (int i = 0; i < kScoreQueries; ++i) {
        const __m512 a = acc[i][2 * half], b = acc[i][2 * half + 1];
        folded[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
      }
      const __m512 first = add_lanes(folded[0], folded[1]), second = add_lanes(folded[2], folded[3]);
      sums[half] = _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x88),
                                 _mm512_shuffle_ps(first, second, 0xdd));
    }
    // From (key, query) to (query, key).
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i order_of_others = _mm512_add_epi32(order, _mm512_set1_epi32(2));
    store_two(scores, _mm512_permutex2var_ps(sums[0], order, sums[1]));
    store_two(scores + 2 * kPieceSize, _mm512_permutex2var_ps(sums[0], order_of_others, sums[1]));
  }

  // Lanes 0 + 2 and 1 + 3 of a, then of b, in each 128 bits.
  static SIMD_INLINE __m512 add_lanes(__m512 a, __m512 b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }

  // Eight scores of one query, eight of the next.
  static SIMD_INLINE void store_two(float* scores, __m512 both) {
    store(scores, _mm512_castps512_ps256(both));
    store(scores + kPieceSize, _mm512_extractf32x8_ps(both, 1));
  }

  static SIMD_INLINE void add_tile(float* acc, int stride, const float* corrections, const float* p,
                                   const Piece<float>& piece, int d) {
    __m512 total[kAddQueries][kDims / 16];
    for (int i = 0; i < kAddQueries; ++i) {
      for (int c = 0; c < kDims / 16; ++c) {
        total[i][c] = _mm512_mul_ps(_mm512_loadu_ps(acc + i * stride + 16 * c),
                                    _mm512_set1_ps(corrections[i]));
      }
    }
    for (int key = piece.begin; key < piece.end; ++key) {
      const float* v = piece.rows[1][key] + d;
      __m512 values[kDims / 16];
      for (int c = 0; c < kDims / 16; ++c) values[c] = _mm512_loadu_ps(v + 16 * c);
#pragma GCC unroll 6
      for (int i = 0; i < kAddQueries; ++i) {
        const __m512 weight = _mm512_set1_ps(p[i * kPieceSize + key]);
#pragma GCC unroll 4
        for (int c = 0; c < kDims / 16; ++c) {
          total[i][c] = _mm512_fmadd_ps(weight, values[c], total[i][c]);
        }
      }
    }
    for (int i = 0; i < kAddQueries; ++i) {
      for (int c = 0; c < kDims / 16; ++c) {
        _mm512_storeu_ps(acc + i * stride + 16 * c, total[i][c]);
      }
    }
  }
};

// Attention to a bf16 cache by the AVX2 family, in float32.
//
// 32 bits of a paired cache (kv_cache.h) are two dimensions of a key, and a register has eight keys' side by
// side, so that no score is added up over lanes; or two positions of one dimension of values. Either half
// becomes float32 with one instruction. Of another cache a piece is brought into that order first, once for
// all queries of a task, with the same bits.
// Order: a score adds up its even dimensions and its odd ones apart, each from left to right, then both;
// acc takes positions in ascending order. So a query's bits do not depend on the others of its task.
// Included inside the family's namespace, after paired_piece.h and attention_words.h.

// The innermost products: one to three queries times 16 pairs, in assembly. They take all 16 registers: 12
// sums, the mask and, by name, the halves of 16 pairs and a query's factor. From intrinsics, or given a choice
// of these, GCC 12 keeps some sums in memory, which takes up to 1.4 times as long. I: the query, S:
// which sums, X: the address of the factor.
#define PAIRS_QUERY(I, S, X)                           \
  "vbroadcastss " X ", %%ymm15\n\t"                    \
  "vfmadd231ps %%ymm13, %%ymm15, %[sum" #S #I "0]\n\t" \
  "vfmadd231ps %%ymm14, %%ymm15, %[sum" #S #I "1]\n\t"
#define PAIRS_QUERIES_1(S, OFFSET) PAIRS_QUERY(0, S, OFFSET "(%[x])")
#define PAIRS_QUERIES_2(S, OFFSET) \
  PAIRS_QUERIES_1(S, OFFSET) PAIRS_QUERY(1, S, OFFSET "(%[x],%[stride])")
#define PAIRS_QUERIES_3(S, OFFSET) \
  PAIRS_QUERIES_2(S, OFFSET) PAIRS_QUERY(2, S, OFFSET "(%[x],%[stride],2)")

#define PAIRS_FIRST(OFFSET)                      \
  "vmovdqu " OFFSET "(%[pairs]), %%ymm13\n\t"    \
  "vmovdqu " OFFSET "+32(%[pairs]), %%ymm14\n\t" \
  "vpslld $16, %%ymm13, %%ymm13\n\t"             \
  "vpslld $16, %%ymm14, %%ymm14\n\t"
#define PAIRS_SECOND(OFFSET)                             \
  "vpand " OFFSET "(%[pairs]), %[upper], %%ymm13\n\t"    \
  "vpand " OFFSET "+32(%[pairs]), %[upper], %%ymm14\n\t"

// Eight dimensions of 16 keys.
#define PAIRS_SCORE_TWO(QUERIES, PAIR)            \
  PAIRS_FIRST(#PAIR "*64") QUERIES(0, #PAIR "*8") \
  PAIRS_SECOND(#PAIR "*64") QUERIES(1, #PAIR "*8+4")
#define PAIRS_SCORE(QUERIES)                              \
  PAIRS_SCORE_TWO(QUERIES, 0) PAIRS_SCORE_TWO(QUERIES, 1) \
  PAIRS_SCORE_TWO(QUERIES, 2) PAIRS_SCORE_TWO(QUERIES, 3)
// 32 dimensions of values, at the first of two positions or both.
#define PAIRS_ADD_FIRST(QUERIES) PAIRS_FIRST("0") QUERIES(0, "0") PAIRS_FIRST("64") QUERIES(1, "0")
#define PAIRS_ADD_BOTH(QUERIES)                    \
  PAIRS_ADD_FIRST(QUERIES)                         \
  PAIRS_SECOND("0") QUERIES(0, "4") PAIRS_SECOND("64") QUERIES(1, "4")

#define PAIRS_SUMS_OF(I)                                              \
  [sum0##I##0] "+x"(sums[0][I][0]), [sum0##I##1] "+x"(sums[0][I][1]), \
  [sum1##I##0] "+x"(sums[1][I][0]), [sum1##I##1] "+x"(sums[1][I][1])
#define PAIRS_SUMS_1 PAIRS_SUMS_OF(0)
#define PAIRS_SUMS_2 PAIRS_SUMS_1, PAIRS_SUMS_OF(1)
#define PAIRS_SUMS_3 PAIRS_SUMS_2, PAIRS_SUMS_OF(2)
#define PAIRS_CASE(N, PRODUCTS)                                                                \
  if constexpr (Queries == N) {                                                                \
    asm volatile(PRODUCTS(PAIRS_QUERIES_##N)                                                   \
                 : PAIRS_SUMS_##N                                                              \
                 : [pairs] "r"(pairs), [x] "r"(x), [stride] "r"(stride), [upper] "x"(upper)    \
                 : "xmm13", "xmm14", "xmm15", "memory");                                       \
  }
// Defines NAME: sums += the queries' factors, from x on and `stride` bytes apart, times `pairs`. Sums: of keys'
// even dimensions and of their odd ones, or of values' dimensions 0-15 and 16-31. upper: upper_halves().
#define DEFINE_PAIRS(NAME, PRODUCTS)                                                           \
  template <int Queries>                                                                       \
  SIMD_INLINE void NAME(F8 (&sums)[2][Queries][2], const uint16_t* pairs, const float* x,      \
                        int64_t stride, __m256i upper) {                                       \
    PAIRS_CASE(1, PRODUCTS)                                                                    \
    PAIRS_CASE(2, PRODUCTS)                                                                    \
    PAIRS_CASE(3, PRODUCTS)                                                                    \
  }
DEFINE_PAIRS(score_eight, PAIRS_SCORE)
DEFINE_PAIRS(add_first, PAIRS_ADD_FIRST)
DEFINE_PAIRS(add_both, PAIRS_ADD_BOTH)

SIMD_INLINE __m256i upper_halves() { return _mm256_set1_epi32(static_cast<int>(0xffff0000u)); }

// A group as a paired cache has it, from the rows of its positions.
SIMD_INLINE void pair_keys(uint16_t* pairs, const uint16_t* const (&rows)[kKeyBlock], int head_dim) {
  for (int d = 0; d < head_dim; d += 8, pairs += 8 * kKeyBlock) {
    for (int key = 0; key < kKeyBlock; key += 4) {
      __m128 four[4];
      for (int i = 0; i < 4; ++i) four[i] = _mm_loadu_ps(reinterpret_cast<const float*>(rows[key + i] + d));
      _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
      for (int i = 0; i < 4; ++i) {
        _mm_storeu_ps(reinterpret_cast<float*>(pairs + 2 * (i * kKeyBlock + key)), four[i]);
      }
    }
  }
}
SIMD_INLINE void pair_values(uint16_t* pairs, const uint16_t* const (&rows)[kKeyBlock], int head_dim) {
  for (int key = 0; key < kKeyBlock; key += 2) {
    for (int d = 0; d < head_dim; d += 8, pairs += 16) {
      const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[key] + d));
      const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[key + 1] + d));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(pairs), _mm_unpacklo_epi16(first, second));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(pairs + 8), _mm_unpackhi_epi16(first, second));
    }
  }
}

struct PairsAttention : NoTiles {
  template <class Kv>
  static constexpr bool kTakesPieces = sizeof(Kv) == sizeof(uint16_t);
  static bool takes(int head_dim) { return head_dim % kDims == 0; }
  static void begin(const QueryState&, int, int, float*) {}
  static void end() {}

  template <class Visible>
  static void attend(const AttentionTask& task, const QueryState& state, int num_queries,
                     const Span& span, FetchAhead* ahead, const Visible& visible, float* room) {
    const int head_dim = task.head_dim;
    HalvesPiece piece(task, span);
    if (!piece.is_paired) pair_rows(&piece, head_dim, reinterpret_cast<uint16_t*>(room));
    for_queries(0, num_queries, [&](int query, auto count) __attribute__((always_inline)) {
      for (int group = span.begin / kKeyBlock; group < piece.num_groups; ++group) {
        score_group<decltype(count)::value>(
            state.scores + query * kPieceSize + group * kKeyBlock, state.q + query * head_dim,
            piece.keys.at[group], head_dim, query == 0 ? ahead : nullptr);
      }
    });
    for (int query = 0; query < num_queries; ++query) {
      int begin, end;
      visible(query, &begin, &end);
      if (num_queries <= kMostFew) ahead->advance(kAskedBetween);
      soften(state, query, begin, end, span.end);
    }
    for_queries(0, num_queries, [&](int query, auto count) __attribute__((always_inline)) {
      for (int d = 0; d < head_dim; d += kDims) {
        add_span<decltype(count)::value>(
            state.acc + query * head_dim + d, state.corrections + query,
            state.scores + query * kPieceSize, piece, 2 * d, head_dim,
            query == 0 ? ahead : nullptr);
      }
    });
  }

 private:
  static constexpr int kDims = 32;  // of values, which are added up in one go
  // What is asked for in bursts a Zen 4 drops, so that it is asked for evenly: so many positions while 16 are
  // scored, and added up, for the first queries; and before each softmax of few queries.
  static constexpr int kAsked = 8, kAskedBetween = 2, kMostFew = 8;

  // Finds the groups of a piece that is in rows, made of these in `room`.
  static void pair_rows(HalvesPiece* piece, int head_dim, uint16_t* room) {
    const int group_size = kKeyBlock * head_dim;
    for (int group = piece->span.begin / kKeyBlock; group < piece->num_groups; ++group) {
      const uint16_t *keys[kKeyBlock], *values[kKeyBlock];
      for (int i = 0; i < kKeyBlock; ++i) {
        keys[i] = row_of(*piece, 0, group * kKeyBlock + i);
        values[i] = row_of(*piece, 1, group * kKeyBlock + i);
      }
      pair_keys(room, keys, head_dim);
      pair_values(room + group_size, values, head_dim);
      piece->keys.at[group] = room, piece->values.at[group] = room + group_size;
      room += 2 * group_size;
    }
  }

  // Scores of N queries with a group's keys.
  template <int N>
  static SIMD_INLINE void score_group(float* scores, const float* q, const uint16_t* keys,
                                      int head_dim, FetchAhead* ahead) {
    const __m256i upper = upper_halves();
    F8 sums[2][N][2];
    for (auto& of_dimensions : sums) {
      for (auto& of_query : of_dimensions) of_query[0] = of_query[1] = splat(0.0f);
    }
    EvenFetch fetch(ahead, 8 * kAsked, head_dim);
    for (int d = 0; d < head_dim; d += 8, keys += 8 * kKeyBlock) {
      fetch.turn();
      score_eight<N>(sums, keys, q + d, head_dim * int64_t{sizeof(float)}, upper);
    }
    for (int i = 0; i < N; ++i) {
      for (int half = 0; half < 2; ++half) {
        store(scores + i * kPieceSize + 8 * half, _mm256_add_ps(sums[0][i][half], sums[1][i][half]));
      }
    }
  }

  // acc = acc * corrections + p times values: of N queries, 32 dimensions, whose pairs begin at `place` in
  // those of two positions.
  template <int N>
  static SIMD_INLINE void add_span(float* acc, const float* corrections, const float* p,
                                   const HalvesPiece& piece, int place, int head_dim, FetchAhead* ahead) {
    constexpr int64_t kStride = kPieceSize * sizeof(float);
    const __m256i upper = upper_halves();
    F8 sums[2][N][2];
    for (int i = 0; i < N; ++i) {
      for (int c = 0; c < 4; ++c) {
        sums[c / 2][i][c % 2] = mul(load(acc + i * head_dim + 8 * c), splat(corrections[i]));
      }
    }
    EvenFetch fetch(ahead, kDims * kAsked, head_dim * kKeyBlock / 2);
    const Span span = piece.span;
    for (int group = span.begin / kKeyBlock; group < piece.num_groups; ++group) {
      const int base = group * kKeyBlock, end = std::min(span.end, base + kKeyBlock);
      const uint16_t* pairs = piece.values.at[group] + place;
      const auto pair_of = [&](int key) { return pairs + (key - base) * head_dim; };
      // Of the first pair the span may have the second position only; no query sees the other, so p = 0.
      int key = std::max(span.begin, base) / 2 * 2;
      for (; key + 2 <= end; key += 2) {
        fetch.turn();
        add_both<N>(sums, pair_of(key), p + key, kStride, upper);
      }
      // The second position of the last pair may have been another sequence's, and hold NaN.
      if (key < end) add_first<N>(sums, pair_of(key), p + key, kStride, upper);
    }
    for (int i = 0; i < N; ++i) {
      for (int c = 0; c < 4; ++c) store(acc + i * head_dim + 8 * c, sums[c / 2][i][c % 2]);
    }
  }
};

bool takes_pairs(FsDtype kv_dtype, int head_dim) {
  return (kv_dtype == kBf16 && PairsAttention::takes(head_dim)) ||
         (kv_dtype == kInt8 && WordAttention<NoTiles>::takes(head_dim));
}

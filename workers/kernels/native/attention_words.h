// Attention over an int8 cache in products of integers: queries and probabilities become words of 16 bits,
// by a scale for each query, and for each query and piece. What is kept between pieces stays float32.
//
// Words are multiplied in pairs: two dimensions of 16 keys, two positions of 16 dimensions. So a paired
// cache has them (kv_cache.h); of another a piece is brought into that order first, with the same bits.
//     score = (query . key) * query scale * key scale;  p and l as in attention_kernel.h;
//     acc = acc e^(m - m') + (w . value) * scale,  w = p * value scale / scale rounded, |w| <= 32767
// Sums of words' products are exact in 32 bits, so that all families have the same bits, and a query's do not
// depend on the others of its task.
// Included inside the family's namespace, after paired_piece.h and words_*.h, which say how a family multiplies:
//   Words: 16 lanes of two words; WordSums: 16 sums; no_words(): zeros;
//   load_words(bytes): 32 int8 as Words; add_words(&sums, words, two): sums += words times the same two;
//   store_word_scores, add_word_values: what becomes of 16 sums;
//   for_query_tiles(num, body): calls body(first, Count<N>()) for tiles of queries;
//   kWordBlocks<N>: blocks of 16 keys or dimensions in one go;
//   soften_piece: soften_words.h's soften_to_words; soften_many, if kSoftensMany: of as many of the first queries
//     as it returns.

// In the task's scratch.
struct WordRoom {
  float *query_scales, *probability_scales;  // (queries,)
  int16_t* queries;                     // (queries, head_dim)
  int16_t* probabilities;               // (queries, 64): times the values' scales
  int8_t* groups;                       // (2, 64, head_dim): pairs of a cache in rows

  WordRoom(float* room, int head_dim)
      : query_scales(room),
        probability_scales(room + kMaxQueries),
        queries(reinterpret_cast<int16_t*>(room + 2 * kMaxQueries)),
        probabilities(queries + kMaxQueries * head_dim),
        groups(reinterpret_cast<int8_t*>(probabilities + kMaxQueries * kPieceSize)) {}
};

SIMD_INLINE int32_t two_words_at(const int16_t* words) {
  int32_t two;
  std::memcpy(&two, words, sizeof two);
  return two;
}

// Where head_dim is no multiple of 16, int8 becomes float32 and is attended to with `Tiles`.
template <class Tiles>
struct WordAttention : Tiles {
  template <class Kv>
  static constexpr bool kTakesPieces = sizeof(Kv) == sizeof(int8_t);

  // Sums of head_dim products of a word and a byte fit 32 bits.
  static bool takes(int head_dim) { return head_dim % 16 == 0 && head_dim <= 512; }

  static void begin(const QueryState& state, int num_queries, int head_dim, float* room) {
    const WordRoom words(room, head_dim);
    for (int query = 0; query < num_queries; ++query) {
      const int64_t first = int64_t{query} * head_dim;
      words.query_scales[query] = words_from_floats(words.queries + first, state.q + first, head_dim);
    }
  }
  static void end() {}

  template <class Visible>
  static void attend(const AttentionTask& task, const QueryState& state, int num_queries,
                     const Span& span, FetchAhead* ahead, const Visible& visible, float* room) {
    const int head_dim = task.head_dim;
    const WordRoom words(room, head_dim);
    PairedPiece<int8_t> piece(task, span);
    if (!piece.is_paired) pair_rows(&piece, head_dim, words.groups);
    const int first_group = span.begin / kKeyBlock, num_keys = piece.num_groups * kKeyBlock;
    for_query_tiles(num_queries, [&](int query, auto rows) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::value;
      for_blocks<kWordBlocks<kRows>>(
          first_group, piece.num_groups, [&](int group, auto count) __attribute__((always_inline)) {
            score_tile<kRows, decltype(count)::value>(state.scores, words, query, piece, group, head_dim,
                                                      query == 0 ? ahead : nullptr);
          });
    });
    const int fetched = num_queries <= kMostFew ? kAskedBetween / num_queries : 0;
    int query = 0;
    if constexpr (kSoftensMany) {
      query = soften_many(state, num_queries, piece.rows.scales[1], visible, words.probabilities,
                          words.probability_scales);
    }
    for (; query < num_queries; ++query) {
      int begin, end;
      visible(query, &begin, &end);
      ahead->advance(fetched);
      words.probability_scales[query] =
          soften_piece(state, query, begin, end, num_keys, piece.rows.scales[1],
                       words.probabilities + query * kPieceSize);
    }
    for_query_tiles(num_queries, [&](int query, auto rows) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::value;
      for_blocks<kWordBlocks<kRows>>(
          0, head_dim / 16, [&](int block, auto count) __attribute__((always_inline)) {
            add_tile<kRows, decltype(count)::value>(state, words, query, piece, first_group, 16 * block,
                                                    head_dim, query == 0 ? ahead : nullptr);
          });
    });
  }

 private:
  // As in attention_dots_avx512.h: positions that scoring or adding up 16 positions asks for, and what few
  // queries ask for between.
  static constexpr int kAsked = 6, kAskedBetween = 16, kMostFew = 8;

  // sums[b][m] += `Pairs` pairs of row m's words times block b's, whose pairs lie `stride` apart.
  template <int Pairs, int Rows, int Blocks>
  static SIMD_INLINE void multiply(WordSums (&sums)[Blocks][Rows], const int16_t* rows, int64_t row_stride,
                                   const int8_t* (&blocks)[Blocks], int64_t stride) {
#pragma GCC unroll 4
    for (int pair = 0; pair < Pairs; ++pair) {
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b) {
        const Words of_block = load_words(blocks[b] + pair * stride);
#pragma GCC unroll 8
        for (int m = 0; m < Rows; ++m) {
          add_words(&sums[b][m], of_block, two_words_at(rows + m * row_stride + 2 * pair));
        }
      }
    }
    for (int b = 0; b < Blocks; ++b) blocks[b] += Pairs * stride;
  }

  // Scores of rows [query, query + Rows) with `Blocks` groups of keys.
  template <int Rows, int Blocks>
  static SIMD_INLINE void score_tile(float* scores, const WordRoom& words, int query,
                                     const PairedPiece<int8_t>& piece, int group, int head_dim,
                                     FetchAhead* ahead) {
    WordSums sums[Blocks][Rows];
    for (auto& of_block : sums) {
      for (WordSums& sum : of_block) sum = no_words();
    }
    const int8_t* blocks[Blocks];
    for (int b = 0; b < Blocks; ++b) blocks[b] = piece.keys.at[group + b];
    const int16_t* queries = words.queries + int64_t{query} * head_dim;
    constexpr int kPairs = 4;
    EvenFetch fetch(ahead, kAsked * Blocks * 2 * kPairs, head_dim);
    for (int d = 0; d < head_dim; d += 2 * kPairs) {
      fetch.turn();
      multiply<kPairs>(sums, queries + d, head_dim, blocks, 2 * kKeyBlock);
    }
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
      const int first_key = (group + b) * kKeyBlock;
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        store_word_scores(scores + (query + m) * kPieceSize + first_key, sums[b][m],
                          words.query_scales[query + m], piece.rows.scales[0] + first_key);
      }
    }
  }

  // acc of rows [query, query + Rows), `Blocks` times 16 dimensions from d on.
  template <int Rows, int Blocks>
  static SIMD_INLINE void add_tile(const QueryState& state, const WordRoom& words, int query,
                                   const PairedPiece<int8_t>& piece, int first_group, int d, int head_dim,
                                   FetchAhead* ahead) {
    WordSums sums[Blocks][Rows];
    for (auto& of_block : sums) {
      for (WordSums& sum : of_block) sum = no_words();
    }
    const int16_t* probabilities = words.probabilities + query * kPieceSize + first_group * kKeyBlock;
    constexpr int kPairs = 4, kTurns = kKeyBlock / (2 * kPairs);
    EvenFetch fetch(ahead, kAsked * Blocks * 16, head_dim * kTurns);
    for (int group = first_group; group < piece.num_groups; ++group) {
      const int8_t* blocks[Blocks];
      for (int b = 0; b < Blocks; ++b) blocks[b] = piece.values.at[group] + 2 * (d + 16 * b);
      for (int turn = 0; turn < kTurns; ++turn, probabilities += 2 * kPairs) {
        fetch.turn();
        multiply<kPairs>(sums, probabilities, kPieceSize, blocks, 2 * head_dim);
      }
    }
    // Unrolled, or GCC 12 would keep the sums in memory all along.
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        add_word_values(state.acc + (query + m) * head_dim + d + 16 * b, state.corrections[query + m],
                        sums[b][m], words.probability_scales[query + m]);
      }
    }
  }

  // Finds the groups of a piece that is in rows, made of these in `room`.
  static void pair_rows(PairedPiece<int8_t>* piece, int head_dim, int8_t* room) {
    const int group_size = kKeyBlock * head_dim;
    for (int group = piece->span.begin / kKeyBlock; group < piece->num_groups; ++group) {
      int8_t *keys = room, *values = room + group_size;
      for (int i = 0; i < kKeyBlock; ++i) {
        const int8_t* key = row_of(*piece, 0, group * kKeyBlock + i);
        const int8_t* value = row_of(*piece, 1, group * kKeyBlock + i);
        for (int d = 0; d < head_dim; d += 2) std::memcpy(keys + d * kKeyBlock + 2 * i, key + d, 2);
        int8_t* own = values + i / 2 * 2 * head_dim + i % 2;
        for (int d = 0; d < head_dim; ++d) own[2 * d] = value[d];
      }
      piece->keys.at[group] = keys, piece->values.at[group] = values;
      room += 2 * group_size;
    }
  }
};

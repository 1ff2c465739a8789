// How AVX512-BF16 multiplies for attention_halves.h: up to eight queries by blocks of 16 keys or
// dimensions, one block a register, as in tiles_avx512.h.
// Included inside the family's namespace, after attention_halves.h and tiles_avx512.h.

// The assembly of a product reads queries and probabilities unknown to the compiler: what is written
// before must be in its place by then, and must not be written anew too early.
SIMD_INLINE void memory_fence() { asm volatile("" : : : "memory"); }

struct AttentionProducts {
  // A Zen 4 drops what it is asked for in bursts: a piece's share is asked for evenly, while the first
  // queries are multiplied and, of few queries, softened.
  static constexpr int kKeysPerFetch = 0, kValuesPerFetch = 0;
  static int fetched_between(int num_queries) {
    return num_queries <= kMostFew ? (16 + num_queries) / (2 * num_queries + 2) : 0;
  }

  static SIMD_INLINE __m512i from_floats(__m512 first, __m512 second) {
    __m512i both;
    asm("vcvtne2ps2bf16 %[first], %[second], %[both]"
        : [both] "=v"(both)
        : [first] "v"(first), [second] "v"(second));
    return both;
  }

  static void begin(const HalvesRoom&, int, int) {}
  static void end() {}

  static void score(float* scores, const HalvesRoom& room, int num_queries, const HalvesPiece& piece,
                    int head_dim, FetchAhead* ahead) {
    const Groups keys = piece.is_paired ? from_first_of(piece.span, piece.keys)
                                        : packed_groups(room.keys, head_dim);
    if (!piece.is_paired) pack_keys<kKeysPerFetch>(room.keys, piece, head_dim, ahead);
    memory_fence();
    for_tiles(0, num_queries, [&](int query, auto rows) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::value;
      float* of_tile = scores + query * kPieceSize;
      const uint16_t* queries = room.queries + query * head_dim;
      FetchAhead* const of_first = query == 0 ? ahead : nullptr;
      for_blocks<kBlocks<kRows>>(0, piece.num_groups, [&](int block, auto count) __attribute__((always_inline)) {
        score_tile<kRows, decltype(count)::value>(of_tile, queries, keys, block, head_dim, of_first);
      });
    });
    memory_fence();
  }

  static void take_scores(float*, const HalvesRoom&, int, int, int) {}

  static void add(float* acc, const HalvesRoom& room, int num_queries, const Groups& values,
                  int num_groups, int head_dim, FetchAhead* ahead) {
    memory_fence();
    for_tiles(0, num_queries, [&](int query, auto rows) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::value;
      float* of_tile = acc + query * head_dim;
      const uint16_t* probabilities = room.probabilities + query * kPieceSize;
      FetchAhead* const of_first = query == 0 ? ahead : nullptr;
      for_blocks<kBlocks<kRows>>(0, head_dim / 16, [&](int block, auto count) __attribute__((always_inline)) {
        add_tile<kRows, decltype(count)::value>(of_tile, probabilities, values, num_groups, 16 * block,
                                                head_dim, of_first);
      });
    });
    memory_fence();
  }

 private:
  static constexpr int kMostFew = 8;
  // Blocks in one go: enough sums to hide the latency of a product, in less than all registers.
  template <int Rows>
  static constexpr int kBlocks = Rows > 4 ? 2 : 4;

  // Positions that scoring or adding up 16 positions asks for.
  static constexpr int kAsked = 6;

  // sums[b][m] += `Pairs` pairs of row m times block b's, whose pairs lie `stride` halves apart; goes on
  // to the next pairs.
  template <int Pairs, int Rows, int Blocks>
  static SIMD_INLINE void multiply(__m512 (&sums)[Blocks][Rows], TileRows& rows,
                                   const uint16_t* (&blocks)[Blocks], int64_t stride) {
    unrolled<Pairs>([&](auto pair) __attribute__((always_inline)) {
      __m512i of_blocks[Blocks];
      for (int b = 0; b < Blocks; ++b) {
        of_blocks[b] = _mm512_loadu_si512(blocks[b] + pair.value * stride);
        asm volatile("" : "+v"(of_blocks[b]));  // GCC 12 would load it for every row
      }
      add_tile_products<pair.value * 4>(sums, of_blocks, rows);
    });
    for (int b = 0; b < Blocks; ++b) blocks[b] += Pairs * stride;
    rows.advance(4 * Pairs);
  }

  template <int Rows, int Blocks>
  static SIMD_INLINE void score_tile(float* scores, const uint16_t* queries, const Groups& keys,
                                     int block, int head_dim, FetchAhead* ahead) {
    __m512 sums[Blocks][Rows];
    const uint16_t* blocks[Blocks];
    for (int b = 0; b < Blocks; ++b) {
      for (__m512& sum : sums[b]) sum = _mm512_setzero_ps();
      blocks[b] = keys.at[block + b];
    }
    TileRows rows(queries, head_dim);
    constexpr int kPairs = 4;
    EvenFetch fetch(ahead, kAsked * Blocks * 2 * kPairs, head_dim);
    for (int d = 0; d < head_dim; d += 2 * kPairs) {
      fetch.turn();
      multiply<kPairs>(sums, rows, blocks, 2 * kKeyBlock);
    }
    for (int b = 0; b < Blocks; ++b) {
      for (int m = 0; m < Rows; ++m) {
        _mm512_storeu_ps(scores + m * kPieceSize + (block + b) * kKeyBlock, sums[b][m]);
      }
    }
  }

  template <int Rows, int Blocks>
  static SIMD_INLINE void add_tile(float* acc, const uint16_t* probabilities, const Groups& values,
                                   int num_groups, int d, int head_dim, FetchAhead* ahead) {
    __m512 sums[Blocks][Rows];
    for (int b = 0; b < Blocks; ++b) {
      for (int m = 0; m < Rows; ++m) sums[b][m] = _mm512_loadu_ps(acc + m * head_dim + d + 16 * b);
    }
    TileRows rows(probabilities, kPieceSize);
    constexpr int kPairs = 4, kTurns = kKeyBlock / (2 * kPairs);
    EvenFetch fetch(ahead, kAsked * Blocks * 16, head_dim * kTurns);
    for (int group = 0; group < num_groups; ++group) {
      const uint16_t* blocks[Blocks];
      for (int b = 0; b < Blocks; ++b) blocks[b] = values.at[group] + 2 * (d + 16 * b);
      for (int turn = 0; turn < kTurns; ++turn) {
        fetch.turn();
        multiply<kPairs>(sums, rows, blocks, 2 * head_dim);
      }
    }
    for (int b = 0; b < Blocks; ++b) {
      for (int m = 0; m < Rows; ++m) _mm512_storeu_ps(acc + m * head_dim + d + 16 * b, sums[b][m]);
    }
  }
};

// How AVX512-BF16 multiplies for attention_halves.h: up to eight queries by blocks of 16 keys or
// dimensions, one block a register, as in tiles_avx512.h.
// Included inside the family's namespace, after attention_halves.h and tiles_avx512.h.

// The assembly of a product reads queries and probabilities unknown to the compiler: what is written
// before must be in its place by then, and must not be written anew too early.
SIMD_INLINE void memory_fence() { asm volatile("" : : : "memory"); }

struct AttentionProducts {
  // And likewise while the first queries are multiplied, so that nothing is left to ask for between.
  static constexpr int kKeysPerFetch = 4, kValuesPerFetch = 4;
  static int fetched_between(int) { return 0; }

  static SIMD_INLINE __m512i from_floats(__m512 first, __m512 second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(halves_of(first)), halves_of(second), 1);
  }

  static void begin(const HalvesRoom&, int, int) {}
  static void end() {}

  static void score(float* scores, const HalvesRoom& room, int num_queries,
                    const Piece<uint16_t>& piece, int num_blocks, int head_dim, FetchAhead* ahead) {
    pack_keys<kKeysPerFetch>(room.keys, piece, num_blocks, head_dim, ahead);
    memory_fence();
    for_tiles(0, num_queries, [&](int query, auto rows) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::value;
      float* of_tile = scores + query * kPieceSize;
      const uint16_t* queries = room.queries + query * head_dim;
      FetchAhead* const of_first = query == 0 ? ahead : nullptr;
      int block = 0;
      for (; block + kBlocks<kRows> <= num_blocks; block += kBlocks<kRows>) {
        score_tile<kRows, kBlocks<kRows>>(of_tile, queries, room.keys, block, head_dim,
                                        of_first);
      }
      for (; block < num_blocks; ++block) {
        score_tile<kRows, 1>(of_tile, queries, room.keys, block, head_dim, of_first);
      }
    });
    memory_fence();
  }

  static void take_scores(float*, const HalvesRoom&, int, int, int) {}

  static void add(float* acc, const HalvesRoom& room, int num_queries, int num_steps,
                  int head_dim, FetchAhead* ahead) {
    memory_fence();
    for_tiles(0, num_queries, [&](int query, auto rows) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::value;
      float* of_tile = acc + query * head_dim;
      const uint16_t* probabilities = room.probabilities + query * kPieceSize;
      FetchAhead* const of_first = query == 0 ? ahead : nullptr;
      int d = 0;
      for (; d + 16 * kBlocks<kRows> <= head_dim; d += 16 * kBlocks<kRows>) {
        add_tile<kRows, kBlocks<kRows>>(of_tile, probabilities, room.values, num_steps, d, head_dim,
                                        of_first);
      }
      for (; d < head_dim; d += 16) {
        add_tile<kRows, 1>(of_tile, probabilities, room.values, num_steps, d, head_dim, of_first);
      }
    });
    memory_fence();
  }

 private:
  // Blocks in one go: enough sums to hide the latency of a product, in less than all registers.
  template <int Rows>
  static constexpr int kBlocks = Rows > 4 ? 2 : 4;

  // sums[b][m] += the step's 16 pairs of row m times block b's, whose pairs lie `stride` halves apart.
  template <int Rows, int Blocks>
  static SIMD_INLINE void multiply(__m512 (&sums)[Blocks][Rows], const TileRows& rows,
                                   const uint16_t* blocks, int64_t block_stride, int64_t stride) {
    unrolled<kStep / 2>([&](auto pair) __attribute__((always_inline)) {
      __m512i of_blocks[Blocks];
      for (int b = 0; b < Blocks; ++b) {
        of_blocks[b] = _mm512_loadu_si512(blocks + b * block_stride + pair.value * stride);
      }
      add_tile_products<pair.value * 4>(sums, of_blocks, rows);
    });
  }

  template <int Rows, int Blocks>
  static SIMD_INLINE void score_tile(float* scores, const uint16_t* queries, const uint16_t* keys,
                                     int block, int head_dim, FetchAhead* ahead) {
    __m512 sums[Blocks][Rows];
    for (auto& of_block : sums) {
      for (__m512& sum : of_block) sum = _mm512_setzero_ps();
    }
    const int64_t block_stride = int64_t{kKeyBlock} * head_dim;
    const uint16_t* blocks = keys + block * block_stride;
    TileRows rows(queries, head_dim);
    for (int d = 0; d < head_dim; d += kStep, blocks += kKeyBlock * kStep, rows.advance(2 * kStep)) {
      if (ahead != nullptr) {
        constexpr int kCount = Blocks * kKeyBlock / kKeysPerFetch;
        ahead->advance((d + kStep) * kCount / head_dim - d * kCount / head_dim);
      }
      multiply(sums, rows, blocks, block_stride, 2 * kKeyBlock);
    }
    for (int b = 0; b < Blocks; ++b) {
      for (int m = 0; m < Rows; ++m) {
        _mm512_storeu_ps(scores + m * kPieceSize + (block + b) * kKeyBlock, sums[b][m]);
      }
    }
  }

  template <int Rows, int Blocks>
  static SIMD_INLINE void add_tile(float* acc, const uint16_t* probabilities,
                                   const uint16_t* values, int num_steps, int d, int head_dim,
                                   FetchAhead* ahead) {
    __m512 sums[Blocks][Rows];
    for (int b = 0; b < Blocks; ++b) {
      for (int m = 0; m < Rows; ++m) sums[b][m] = _mm512_loadu_ps(acc + m * head_dim + d + 16 * b);
    }
    TileRows rows(probabilities, kPieceSize);
    const uint16_t* blocks = values + 2 * d;
    for (int step = 0; step < num_steps; ++step, blocks += kStep * head_dim, rows.advance(2 * kStep)) {
      if (ahead != nullptr && d == 0) ahead->advance(kStep / kValuesPerFetch);
      multiply(sums, rows, blocks, 32, 2 * head_dim);
    }
    for (int b = 0; b < Blocks; ++b) {
      for (int m = 0; m < Rows; ++m) _mm512_storeu_ps(acc + m * head_dim + d + 16 * b, sums[b][m]);
    }
  }
};

// How AMX multiplies for attention_halves.h: in tiles, as in matmul_bf16_amx.h.
// Included inside the family's namespace, after attention_halves.h and quantize_amx.h.

struct AttentionProducts {
  static_assert(kKeyBlock == kTileRows && kStep == kTileInputs);
  static constexpr int kKeysPerFetch = 2, kValuesPerFetch = 4;
  // With few queries memory is what they wait for. Asked for evenly, it is read while they are attended to; in one go,
  // a core waits for it, since it has room for 16 lines on their way, which hold up those from its own caches.
  static int fetched_between(int num_queries) { return num_queries <= kMostFew ? 3 : 0; }

  static SIMD_INLINE __m512i from_floats(__m512 first, __m512 second) {
    return bf16_from_floats(first, second);
  }

  static void begin(const HalvesRoom& room, int num_queries, int head_dim) {
    const bool is_few = num_queries <= kMostFew;
    if (is_few) pack_few_queries(few_queries_in(room), room.queries, num_queries, head_dim);
    const TileConfig config = is_few ? few_config(num_queries) : kManyConfig;
    load_tile_config(config);
  }
  static void end() { release_tiles(); }

  static void score(float* scores, const HalvesRoom& room, int num_queries, const HalvesPiece& piece,
                    int head_dim, FetchAhead* ahead) {
    if (num_queries <= kMostFew) {
      score_few(room, num_queries, piece, head_dim, ahead);
      return;
    }
    pack_keys<kKeysPerFetch>(room.keys, piece, head_dim, ahead);
    for (int query = 0; query < num_queries; query += kTileRows) {
      float* of_tile = scores + query * kPieceSize;
      const uint16_t* queries = room.queries + query * head_dim;
      switch (piece.num_groups) {
        case 1: multiply_keys<1>(of_tile, queries, room.keys, head_dim); break;
        case 2: multiply_keys<2>(of_tile, queries, room.keys, head_dim); break;
        case 3: multiply_keys<3>(of_tile, queries, room.keys, head_dim); break;
        default: multiply_keys<4>(of_tile, queries, room.keys, head_dim); break;
      }
    }
  }

  // Those of few queries, from (keys, queries) to (queries, 64). The scores of 16 keys with all queries are
  // as many registers as there are queries, each of which has some of a query's.
  static void take_scores(float* scores, const HalvesRoom& room, int num_queries, int num_blocks,
                          int head_dim) {
    if (num_queries > kMostFew) return;
    const float* few_scores = few_scores_in(room, head_dim);
    alignas(64) static constexpr int32_t kLanes[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                       8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i places =
        _mm512_mullo_epi32(_mm512_loadu_si512(kLanes), _mm512_set1_epi32(num_queries));
    for (int query = 0; query < num_queries; ++query) {
      const __m512i of_query = _mm512_add_epi32(places, _mm512_set1_epi32(query));
      const __m512i registers = _mm512_srli_epi32(of_query, 4);
      for (int block = 0; block < num_blocks; ++block) {
        const float* of_block = few_scores + block * kKeyBlock * num_queries;
        __m512 of_keys = splat16(0.0f);
        for (int i = 0; i < num_queries; ++i) {
          const __mmask16 lanes = _mm512_cmpeq_epi32_mask(registers, _mm512_set1_epi32(i));
          of_keys = _mm512_mask_permutexvar_ps(of_keys, lanes, of_query,
                                               _mm512_loadu_ps(of_block + 16 * i));
        }
        _mm512_storeu_ps(scores + query * kPieceSize + block * kKeyBlock, of_keys);
      }
    }
  }

  static void add(float* acc, const HalvesRoom& room, int num_queries, const Groups&, int num_groups,
                  int head_dim, FetchAhead*) {
    const int num_steps = (num_groups * kKeyBlock + kStep - 1) / kStep;
    if (num_queries <= kMostFew) {
      add_few(acc, room.probabilities, room.values, num_steps, head_dim);
      return;
    }
    for (int query = 0; query < num_queries; query += kTileRows) {
      float* of_tile = acc + query * head_dim;
      const uint16_t* probabilities = room.probabilities + query * kPieceSize;
      for (int d = 0; d < head_dim; d += 2 * kTileInputs) {
        const uint16_t* values = room.values + 2 * d;
        if (head_dim - d > kTileInputs) {
          add_values_to<4>(of_tile + d, probabilities, values, num_steps, head_dim);
        } else {
          add_values_to<2>(of_tile + d, probabilities, values, num_steps, head_dim);
        }
      }
    }
  }

 private:
  // A task of so many queries, as a decode step has, takes keys as they lie: scores of 16 keys with
  // all queries, not of queries with keys, whose products and sums are the same.
  static constexpr int kMostFew = 8;

  // In the place of keys: (head_dim/32, 16 pairs of dimensions, queries, 2).
  static uint16_t* few_queries_in(const HalvesRoom& room) { return room.keys; }
  // And after them: (64, queries).
  static float* few_scores_in(const HalvesRoom& room, int head_dim) {
    return reinterpret_cast<float*>(room.keys + kMostFew * head_dim);
  }

  // Of many queries. Tiles 0 to 3: sums; 4: inputs, queries or probabilities; 5 to 7: keys or values.
  static constexpr TileConfig kManyConfig = {
      1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

  // Of few. Tile 0: scores; 1: keys; 2: queries; 3: probabilities; 4 and 5: acc; 6 and 7: values.
  static constexpr TileConfig few_config(int num_queries) {
    const uint16_t nbytes = static_cast<uint16_t>(num_queries * 4);
    const uint8_t rows = static_cast<uint8_t>(num_queries);
    return {1, 0, {}, {nbytes, 64, nbytes, 64, 64, 64, 64, 64}, {16, 16, 16, rows, rows, rows, 16, 16}};
  }

  static void pack_few_queries(uint16_t* pairs, const uint16_t* queries, int num_queries,
                               int head_dim) {
    for (int d = 0; d < head_dim; d += 2) {
      for (int query = 0; query < num_queries; ++query, pairs += 2) {
        std::memcpy(pairs, queries + query * head_dim + d, 4);
      }
    }
  }

  static void score_few(const HalvesRoom& room, int num_queries, const HalvesPiece& piece, int head_dim,
                        FetchAhead* ahead) {
    const int query_stride = num_queries * 4;
    for (int block = piece.span.begin / kTileRows; block < piece.num_groups; ++block) {
      const int first = block * kTileRows;
      const int known = std::max(first, piece.span.begin);
      const uint16_t* keys = row_of(piece, 0, known) - (known - first) * head_dim;
      if (piece.rows.block_size % kTileRows != 0) {  // the values' place is free until they are packed
        for (int i = 0; i < kTileRows; ++i) {
          std::memcpy(room.values + i * head_dim, row_of(piece, 0, first + i),
                      static_cast<size_t>(head_dim) * 2);
        }
        keys = room.values;
      }
      TILE_ZERO(0);
      for (int d = 0; d < head_dim; d += kTileInputs) {
        ahead->advance(kTileRows / 4 * kTileInputs / head_dim);
        TILE_LOAD(1, keys + d, head_dim * 2);
        TILE_LOAD(2, few_queries_in(room) + d * num_queries, query_stride);
        TILE_DOT_BF16(0, 1, 2);
      }
      TILE_STORE(0, few_scores_in(room, head_dim) + block * kTileRows * num_queries, query_stride);
    }
  }

  static void add_few(float* acc, const uint16_t* probabilities, const uint16_t* values,
                      int num_tiles, int head_dim) {
    const int stride = head_dim * 4;
    for (int d = 0; d < head_dim; d += kTileInputs, acc += kTileInputs, values += 2 * kTileInputs) {
      TILE_LOAD(4, acc, stride);
      TILE_LOAD(5, acc + 16, stride);
      for (int tile = 0; tile < num_tiles; ++tile) {
        const uint16_t* of_tile = values + tile * kTileInputs * head_dim;
        TILE_LOAD(3, probabilities + tile * kTileInputs, kPieceSize * 2);
        TILE_LOAD(6, of_tile, stride);
        TILE_DOT_BF16(4, 3, 6);
        TILE_LOAD(7, of_tile + 32, stride);
        TILE_DOT_BF16(5, 3, 7);
      }
      TILE_STORE(4, acc, stride);
      TILE_STORE(5, acc + 16, stride);
    }
  }

  // scores: of 16 queries with N blocks of 16 keys.
  template <int N>
  static void multiply_keys(float* scores, const uint16_t* queries, const uint16_t* keys, int head_dim) {
    const int num_steps = head_dim / kTileInputs, block = num_steps * kTileHalves;
    TILE_ZERO(0);
    if (N > 1) TILE_ZERO(1);
    if (N > 2) TILE_ZERO(2);
    if (N > 3) TILE_ZERO(3);
    for (int step = 0; step < num_steps; ++step, queries += kTileInputs, keys += kTileHalves) {
      TILE_LOAD(4, queries, head_dim * 2);
      TILE_LOAD(5, keys, 64);
      TILE_DOT_BF16(0, 4, 5);
      if (N > 1) TILE_LOAD(6, keys + block, 64);
      if (N > 1) TILE_DOT_BF16(1, 4, 6);
      if (N > 2) TILE_LOAD(7, keys + 2 * block, 64);
      if (N > 2) TILE_DOT_BF16(2, 4, 7);
      if (N > 3) TILE_LOAD(5, keys + 3 * block, 64);
      if (N > 3) TILE_DOT_BF16(3, 4, 5);
    }
    TILE_STORE(0, scores, kPieceSize * 4);
    if (N > 1) TILE_STORE(1, scores + 16, kPieceSize * 4);
    if (N > 2) TILE_STORE(2, scores + 32, kPieceSize * 4);
    if (N > 3) TILE_STORE(3, scores + 48, kPieceSize * 4);
  }

  // acc: 16 N dimensions of 16 queries, += probabilities times values.
  template <int N>
  static void add_values_to(float* acc, const uint16_t* probabilities, const uint16_t* values, int num_tiles,
                  int head_dim) {
    const int stride = head_dim * 4;
    TILE_LOAD(0, acc, stride);
    TILE_LOAD(1, acc + 16, stride);
    if (N > 2) TILE_LOAD(2, acc + 32, stride);
    if (N > 2) TILE_LOAD(3, acc + 48, stride);
    for (int tile = 0; tile < num_tiles; ++tile) {
      const uint16_t* of_tile = values + tile * kTileInputs * head_dim;
      TILE_LOAD(4, probabilities + tile * kTileInputs, kPieceSize * 2);
      TILE_LOAD(5, of_tile, stride);
      TILE_DOT_BF16(0, 4, 5);
      TILE_LOAD(6, of_tile + 32, stride);
      TILE_DOT_BF16(1, 4, 6);
      if (N > 2) TILE_LOAD(7, of_tile + 64, stride);
      if (N > 2) TILE_DOT_BF16(2, 4, 7);
      if (N > 2) TILE_LOAD(5, of_tile + 96, stride);
      if (N > 2) TILE_DOT_BF16(3, 4, 5);
    }
    TILE_STORE(0, acc, stride);
    TILE_STORE(1, acc + 16, stride);
    if (N > 2) TILE_STORE(2, acc + 32, stride);
    if (N > 2) TILE_STORE(3, acc + 48, stride);
  }
};

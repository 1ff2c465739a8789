// Attention over a bf16 cache in tiles: queries and probabilities are rounded to bfloat16, as keys and
// values are, and multiplied as in matmul_amx.h. What is kept between pieces stays float32.
//
// A piece's keys are put into tiles by transposing pairs of dimensions, its values by interleaving
// two positions; both once for all queries of a task. Order: a score sums over head_dim as a tile
// product does, 32 dimensions at a time; acc takes 32 positions at a time, of which those that a
// query must not see have p = 0. So a query's bits depend neither on the other queries of its task
// nor on how much of a piece they see.
// Included inside the family's namespace, after attention_kernel.h, matmul_amx.h and
// row_kernels_avx512.h.

struct TileAttention : AttentionTiles {
  template <class Kv>
  static constexpr bool kTakesPieces = sizeof(Kv) == sizeof(uint16_t);
  static bool takes(int head_dim) { return head_dim % kTileInputs == 0; }

  // Before the first piece: `state.q` as tiles take it, and the tiles' shapes.
  static void begin(const QueryState& state, int num_queries, int head_dim, float* room) {
    const Room halves(room, head_dim);
    for (int i = 0; i < num_queries * head_dim; i += kTileInputs) {
      _mm512_storeu_si512(halves.queries + i, bf16_from_floats(_mm512_loadu_ps(state.q + i),
                                                               _mm512_loadu_ps(state.q + i + 16)));
    }
    if (num_queries <= kMostFew) pack_few_queries(halves.few_queries, halves.queries, num_queries, head_dim);
    const TileConfig config = num_queries <= kMostFew ? few_config(num_queries) : kManyConfig;
    load_tile_config(config);
  }
  static void end() { release_tiles(); }

  template <class Visible>
  static void attend(const QueryState& state, int num_queries, int head_dim,
                     const Piece<uint16_t>& piece, FetchAhead* ahead, const Visible& visible,
                     float* room) {
    const Room halves(room, head_dim);
    const bool is_few = num_queries <= kMostFew;
    const int num_key_blocks = (piece.end + kTileRows - 1) / kTileRows;
    const int num_value_tiles = (piece.end + kTileInputs - 1) / kTileInputs;
    if (is_few) {
      score_few(halves, num_queries, piece, num_key_blocks, head_dim, ahead);
    } else {
      pack_keys(halves.keys, piece, num_key_blocks, head_dim, ahead);
    }
    for (int query = 0; !is_few && query < num_queries; query += kTileRows) {
      float* scores = state.scores + query * kPieceSize;
      const uint16_t* queries = halves.queries + query * head_dim;
      switch (num_key_blocks) {
        case 1: multiply_keys<1>(scores, queries, halves.keys, head_dim); break;
        case 2: multiply_keys<2>(scores, queries, halves.keys, head_dim); break;
        case 3: multiply_keys<3>(scores, queries, halves.keys, head_dim); break;
        default: multiply_keys<4>(scores, queries, halves.keys, head_dim); break;
      }
    }
    // By the time this is done, scores are in the cache.
    pack_values(halves.values, piece, num_value_tiles * kTileInputs, head_dim, ahead);
    if (is_few) take_few_scores(state.scores, halves, num_queries, num_key_blocks * kTileRows);
    for (int query = 0; query < num_queries; ++query) {
      int begin, end;
      visible(query, &begin, &end);
      soften_to_halves(state, query, begin > 0 ? begin : 0, end < kPieceSize ? end : kPieceSize,
                       halves.probabilities + query * kPieceSize);
      correct(state.acc + query * head_dim, state.corrections[query], head_dim);
    }
    for (int query = 0; query < num_queries; query += kTileRows) {
      float* acc = state.acc + query * head_dim;
      const uint16_t* probabilities = halves.probabilities + query * kPieceSize;
      if (is_few) {
        add_few(acc, probabilities, halves.values, num_value_tiles, head_dim);
        break;
      }
      for (int d = 0; d < head_dim; d += 2 * kTileInputs) {
        if (head_dim - d > kTileInputs) {
          add_values_to<4>(acc + d, probabilities, halves.values + 2 * d, num_value_tiles, head_dim);
        } else {
          add_values_to<2>(acc + d, probabilities, halves.values + 2 * d, num_value_tiles, head_dim);
        }
      }
    }
  }

 private:
  // bfloat16 in the task's scratch.
  struct Room {
    uint16_t* queries;        // (queries, head_dim)
    uint16_t* keys;           // (64/16, head_dim/32) tiles: (16 pairs of dimensions, 16 keys, 2)
    uint16_t* values;         // (64/2, head_dim, 2)
    uint16_t* probabilities;  // (queries, 64)
    uint16_t* few_queries;    // in the place of keys: (head_dim/32, 16 pairs of dimensions, queries, 2)
    float* few_scores;        // and after them: (64, queries)

    Room(float* room, int head_dim)
        : queries(reinterpret_cast<uint16_t*>(room)),
          keys(queries + kMaxQueries * head_dim),
          values(keys + kPieceSize * head_dim),
          probabilities(values + kPieceSize * head_dim),
          few_queries(keys),
          few_scores(reinterpret_cast<float*>(keys + kMostFew * head_dim)) {}
  };

  // A task of so many queries, as a decode step has, takes keys as they lie: scores of 16 keys with
  // all queries, not of queries with keys, whose products and sums are the same.
  static constexpr int kMostFew = 8;

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

  static void score_few(const Room& room, int num_queries, const Piece<uint16_t>& piece,
                        int num_blocks, int head_dim, FetchAhead* ahead) {
    const int query_stride = num_queries * 4;
    for (int block = 0; block < num_blocks; ++block) {
      const uint16_t* keys = row_of(piece, 0, block * kTileRows);
      bool is_one_run = true;
      for (int i = 1; i < kTileRows; ++i) {
        is_one_run &= row_of(piece, 0, block * kTileRows + i) == keys + i * head_dim;
      }
      if (!is_one_run) {  // the values' place is free until they are packed
        for (int i = 0; i < kTileRows; ++i) {
          std::memcpy(room.values + i * head_dim, row_of(piece, 0, block * kTileRows + i),
                      static_cast<size_t>(head_dim) * 2);
        }
        keys = room.values;
      }
      TILE_ZERO(0);
      for (int d = 0; d < head_dim; d += kTileInputs) {
        ahead->advance(kTileRows / 2 * kTileInputs / head_dim);
        TILE_LOAD(1, keys + d, head_dim * 2);
        TILE_LOAD(2, room.few_queries + d * num_queries, query_stride);
        TILE_DOT_BF16(0, 1, 2);
      }
      TILE_STORE(0, room.few_scores + block * kTileRows * num_queries, query_stride);
    }
  }

  // From (keys, queries) to (queries, 64).
  static void take_few_scores(float* scores, const Room& room, int num_queries, int num_keys) {
    for (int query = 0; query < num_queries; ++query) {
      for (int key = 0; key < num_keys; ++key) {
        scores[query * kPieceSize + key] = room.few_scores[key * num_queries + query];
      }
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

  // The place of a position outside the piece is one inside: what is there is not seen, but finite.
  static const uint16_t* row_of(const Piece<uint16_t>& piece, int part, int key) {
    return piece.rows[part][std::clamp(key, piece.begin, piece.end - 1)];
  }

  static void pack_keys(uint16_t* tiles, const Piece<uint16_t>& piece, int num_blocks, int head_dim,
                        FetchAhead* ahead) {
    for (int first = 0; first < num_blocks * kTileRows; first += kTileRows) {
      const uint16_t* rows[kTileRows];
      for (int i = 0; i < kTileRows; ++i) rows[i] = row_of(piece, 0, first + i);
      for (int d = 0; d < head_dim; d += kTileInputs, tiles += kTileHalves) {
        ahead->advance(kTileRows / 2 * kTileInputs / head_dim);
        transpose_pairs(tiles, rows, d);
      }
    }
  }

  static void pack_values(uint16_t* pairs, const Piece<uint16_t>& piece, int num_positions,
                          int head_dim, FetchAhead* ahead) {
    for (int key = 0; key < num_positions; key += 2, pairs += 2 * head_dim) {
      ahead->advance(1);
      const uint16_t *first = row_of(piece, 1, key), *second = row_of(piece, 1, key + 1);
      for (int d = 0; d < head_dim; d += kTileInputs) interleave(pairs + 2 * d, first + d, second + d);
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

  static void correct(float* acc, float correction, int head_dim) {
    if (correction == 1.0f) return;
    for (int d = 0; d < head_dim; d += 8) store(acc + d, mul(load(acc + d), splat(correction)));
  }

#if defined(FS_EMULATE_ISA)
  static void transpose_pairs(uint16_t* tile, const uint16_t* const (&rows)[kTileRows], int d) {
    for (int pair = 0; pair < kTileInputs / 2; ++pair) {
      for (int key = 0; key < kTileRows; ++key) {
        std::memcpy(tile + (pair * kTileRows + key) * 2, rows[key] + d + 2 * pair, 4);
      }
    }
  }
  static void interleave(uint16_t* pairs, const uint16_t* first, const uint16_t* second) {
    for (int d = 0; d < kTileInputs; ++d) pairs[2 * d] = first[d], pairs[2 * d + 1] = second[d];
  }
  static void soften_to_halves(const QueryState& state, int query, int begin, int end,
                               uint16_t* probabilities) {
    soften(state, query, begin, end);
    bf16_from_float(probabilities, state.scores + query * kPieceSize, kPieceSize);
  }
#else
  // From 16 keys' pairs of dimensions to 16 pairs' keys.
  static SIMD_INLINE void transpose_pairs(uint16_t* tile, const uint16_t* const (&rows)[kTileRows],
                                          int d) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i] + d);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // a 128-bit lane now has four keys of one pair
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
      b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
      b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
      b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      _mm512_storeu_si512(tile + i * 32, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
      _mm512_storeu_si512(tile + (i + 4) * 32, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
      _mm512_storeu_si512(tile + (i + 8) * 32, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
      _mm512_storeu_si512(tile + (i + 12) * 32, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
  }

  static SIMD_INLINE void interleave(uint16_t* pairs, const uint16_t* first,
                                     const uint16_t* second) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                        37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                        11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kOrder);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(pairs + 32, _mm512_permutex2var_epi16(a, high, b));
  }

  // As `soften`, but for the order in which probabilities are summed.
  static SIMD_INLINE void soften_to_halves(const QueryState& state, int query, int begin, int end,
                                           uint16_t* probabilities) {
    if (begin >= end) {
      std::memset(probabilities, 0, kPieceSize * sizeof(uint16_t));
      state.corrections[query] = 1.0f;
      return;
    }
    const float* scores = state.scores + query * kPieceSize;
    const uint64_t visible = ~uint64_t{0} >> (kPieceSize - end) & ~uint64_t{0} << begin;
    __m512 p[4];
    for (int i = 0; i < 4; ++i) {
      const __mmask16 lanes = static_cast<__mmask16>(visible >> (16 * i));
      p[i] = _mm512_mask_loadu_ps(splat16(-INFINITY), lanes, scores + 16 * i);
    }
    const __m512 highest = _mm512_max_ps(_mm512_max_ps(p[0], p[1]), _mm512_max_ps(p[2], p[3]));
    const float before = state.largest[query], piece_max = _mm512_reduce_max_ps(highest);
    const float largest = before > piece_max ? before : piece_max;
    for (__m512& x : p) x = exp16(_mm512_sub_ps(x, splat16(largest)));
    const __m512 total = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
    _mm512_storeu_si512(probabilities, bf16_from_floats(p[0], p[1]));
    _mm512_storeu_si512(probabilities + 32, bf16_from_floats(p[2], p[3]));
    const float correction = before == largest ? 1.0f : _mm512_cvtss_f32(exp16(splat16(before - largest)));
    state.corrections[query] = correction;
    state.totals[query] = state.totals[query] * correction + _mm512_reduce_add_ps(total);
    state.largest[query] = largest;
  }
#endif
};

// Attention over a bf16 cache in products of bfloat16: queries and probabilities are rounded to it, as
// keys and values are. What is kept between pieces stays float32.
//
// Products take keys in blocks of 16, by pairs of dimensions, and values by pairs of positions. So a
// paired cache has them (kv_cache.h); otherwise a piece's keys are transposed and its values
// interleaved, once for all queries of a task, with the same bits. Order: a score sums over head_dim as
// the family's products do, from the first pair on; acc takes pairs of positions likewise, 16 or 32
// positions at a time, of which those that a query must not see have p = 0. So a query's bits depend
// neither on the other queries of its task nor on how much of a piece they see.
// Included inside the family's namespace, after paired_piece.h and softmax16_avx512.h.

constexpr int kStep = 32;      // dimensions or positions, which are multiplied in one go

// bfloat16 in the task's scratch.
struct HalvesRoom {
  uint16_t* queries;        // (queries, head_dim)
  uint16_t* keys;           // (64/16, head_dim/32) blocks: (16 pairs of dimensions, 16 keys, 2)
  uint16_t* values;         // (64/2, head_dim, 2)
  uint16_t* probabilities;  // (queries, 64)

  HalvesRoom(float* room, int head_dim)
      : queries(reinterpret_cast<uint16_t*>(room)),
        keys(queries + kMaxQueries * head_dim),
        values(keys + kPieceSize * head_dim),
        probabilities(values + kPieceSize * head_dim) {}
};

#if defined(FS_EMULATE_ISA)
SIMD_INLINE void transpose_pairs(uint16_t* tile, const uint16_t* const (&rows)[kKeyBlock], int d) {
  for (int pair = 0; pair < kStep / 2; ++pair) {
    for (int key = 0; key < kKeyBlock; ++key) {
      std::memcpy(tile + (pair * kKeyBlock + key) * 2, rows[key] + d + 2 * pair, 4);
    }
  }
}
SIMD_INLINE void interleave(uint16_t* pairs, const uint16_t* first, const uint16_t* second) {
  for (int d = 0; d < kStep; ++d) pairs[2 * d] = first[d], pairs[2 * d + 1] = second[d];
}
#else
// From 16 keys' pairs of dimensions to 16 pairs' keys.
SIMD_INLINE void transpose_pairs(uint16_t* tile, const uint16_t* const (&rows)[kKeyBlock], int d) {
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

SIMD_INLINE void interleave(uint16_t* pairs, const uint16_t* first, const uint16_t* second) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kOrder);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(pairs + 32, _mm512_permutex2var_epi16(a, high, b));
}
#endif

inline Groups packed_groups(const uint16_t* first, int head_dim) {
  const int stride = kKeyBlock * head_dim;
  return {{first, first + stride, first + 2 * stride, first + 3 * stride}};
}

// Products begin with a piece's first group. Where the span begins later, they take the span's first: what
// comes of it is not seen, but finite.
inline Groups from_first_of(const Span& span, Groups groups) {
  const int first = span.begin / kKeyBlock;
  for (int i = 0; i < first; ++i) groups.at[i] = groups.at[first];
  return groups;
}

// `ahead` goes on by one in so many positions; 0: not at all.
template <int KeysPerFetch>
SIMD_INLINE void pack_keys(uint16_t* blocks, const HalvesPiece& piece, int head_dim, FetchAhead* ahead) {
  for (int first = 0; first < piece.num_groups * kKeyBlock; first += kKeyBlock) {
    const uint16_t* rows[kKeyBlock];
    for (int i = 0; i < kKeyBlock; ++i) rows[i] = row_of(piece, 0, first + i);
    if constexpr (KeysPerFetch > 0) ahead->advance(kKeyBlock / KeysPerFetch);
    for (int d = 0; d < head_dim; d += kStep, blocks += kKeyBlock * kStep) {
      transpose_pairs(blocks, rows, d);
    }
  }
}

// Whole steps of 32 positions.
template <int ValuesPerFetch>
SIMD_INLINE void pack_values(uint16_t* pairs, const HalvesPiece& piece, int head_dim, FetchAhead* ahead) {
  const int end = (piece.span.end + kStep - 1) / kStep * kStep;
  for (int key = 0; key < end; key += 2, pairs += 2 * head_dim) {
    if constexpr (ValuesPerFetch > 0) {
      if (key % ValuesPerFetch == 0) ahead->advance(1);
    }
    const uint16_t *first = row_of(piece, 1, key), *second = row_of(piece, 1, key + 1);
    for (int d = 0; d < head_dim; d += kStep) interleave(pairs + 2 * d, first + d, second + d);
  }
}

// kept = the group's values at its positions [begin, end), and zeros for the others.
SIMD_INLINE void keep_values(uint16_t* kept, const uint16_t* group, int begin, int end, int head_dim) {
  const uint32_t is_kept = (end >= kKeyBlock ? 0xffffu : (1u << end) - 1) & 0xffffu << std::max(begin, 0);
  for (int pair = 0; pair < kKeyBlock / 2; ++pair) {
    const uint32_t of_pair = is_kept >> (2 * pair);
    const uint32_t bits = (of_pair & 1 ? 0x0000ffffu : 0) | (of_pair & 2 ? 0xffff0000u : 0);
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(bits));
    for (int i = 0; i < 2 * head_dim; i += 32, group += 32, kept += 32) {
      _mm512_storeu_si512(kept, _mm512_and_si512(mask, _mm512_loadu_si512(group)));
    }
  }
}

// Groups that the piece has only a part of are copied into `room`: probabilities of 0 take what is not
// seen out of a sum only if that is finite.
SIMD_INLINE Groups seen_values(const HalvesPiece& piece, uint16_t* room, int head_dim) {
  Groups groups = piece.values;
  for (int i = piece.span.begin / kKeyBlock; i < piece.num_groups; ++i) {
    const int begin = piece.span.begin - i * kKeyBlock, end = piece.span.end - i * kKeyBlock;
    if (begin <= 0 && end >= kKeyBlock) continue;
    keep_values(room, groups.at[i], begin, end, head_dim);
    groups.at[i] = room;
    room += kKeyBlock * head_dim;
  }
  return from_first_of(piece.span, groups);
}

SIMD_INLINE void correct(float* acc, float correction, int head_dim) {
  if (correction == 1.0f) return;
  for (int d = 0; d < head_dim; d += 16) {
    _mm512_storeu_ps(acc + d, _mm512_mul_ps(_mm512_loadu_ps(acc + d), splat16(correction)));
  }
}

#if !defined(FS_EMULATE_ISA)
constexpr float kLog2e = 1.44269504088896341f;

// 2^x for x <= 0, but at least 2^-126, in `lanes`; 0 in the others. A polynomial of least relative error,
// 3e-6: a thousandth of what rounding the probabilities to bfloat16 takes.
SIMD_INLINE __m512 exp2_16(__m512 x, __mmask16 lanes) {
  const __m512 clamped = _mm512_max_ps(splat16(-126.0f), x);  // a NaN stays one
  const __m512 n = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(clamped, n);
  __m512 y = _mm512_fmadd_ps(splat16(9.582852013e-3f), f, splat16(5.590642989e-2f));
  y = _mm512_fmadd_ps(y, f, splat16(2.402409911e-1f));
  y = _mm512_fmadd_ps(y, f, splat16(6.931241751e-1f));
  y = _mm512_fmadd_ps(y, f, splat16(1.0f));
  return _mm512_maskz_scalef_ps(lanes, y, n);
}
#endif

// How a family multiplies:
//   from_floats(first, second): 32 numbers as bfloat16;
//   kKeysPerFetch, kValuesPerFetch: packing asks for one position ahead in so many; score and add ask for what
//     they like; fetched_between(num_queries): positions that are asked for at every step between those;
//   begin, end: around all pieces of a task;
//   score: of all queries with all groups of keys, which it packs as it likes; they may be elsewhere
//     than in `scores` until take_scores;
//   add: acc += probabilities times values, of all groups.
template <class Products>
struct HalvesAttention : AttentionTiles {
  template <class Kv>
  static constexpr bool kTakesPieces = sizeof(Kv) == sizeof(uint16_t);
  static bool takes(int head_dim) { return head_dim % kStep == 0; }

  // Before the first piece.
  static void begin(const QueryState& state, int num_queries, int head_dim, float* room) {
    const HalvesRoom halves(room, head_dim);
    for (int i = 0; i < num_queries * head_dim; i += kStep) {
      _mm512_storeu_si512(halves.queries + i,
                          Products::from_floats(_mm512_loadu_ps(state.q + i),
                                                _mm512_loadu_ps(state.q + i + 16)));
    }
    Products::begin(halves, num_queries, head_dim);
  }
  static void end() { Products::end(); }

  template <class Visible>
  static void attend(const AttentionTask& task, const QueryState& state, int num_queries,
                     const Span& span, FetchAhead* ahead, const Visible& visible, float* room) {
    const int head_dim = task.head_dim;
    const HalvesRoom halves(room, head_dim);
    const HalvesPiece piece(task, span);
    Products::score(state.scores, halves, num_queries, piece, head_dim, ahead);
    // By the time this is done, scores are in the cache.
    Groups values = packed_groups(halves.values, head_dim);
    if (piece.is_paired) {
      values = seen_values(piece, halves.values, head_dim);
    } else {
      pack_values<Products::kValuesPerFetch>(halves.values, piece, head_dim, ahead);
    }
    Products::take_scores(state.scores, halves, num_queries, piece.num_groups, head_dim);
    const int fetched = Products::fetched_between(num_queries);
    // Products come after all of it: multiplications are slow beside tiles (matmul_amx.h).
    int query = 0;
    // What a task has room for beyond its last query may hold anything, and nothing comes of it.
    for (; num_queries - query >= kMany && query + 16 <= kMaxQueries; query += 16) {
      soften_16(state, halves, query, visible);
      for (int i = query; i < std::min(query + 16, num_queries); ++i) {
        correct(state.acc + i * head_dim, state.corrections[i], head_dim);
      }
    }
    for (; query < num_queries; ++query) {
      int begin, end;
      visible(query, &begin, &end);
      ahead->advance(fetched);
      soften_to_halves(state, query, begin > 0 ? begin : 0, end < kPieceSize ? end : kPieceSize,
                       halves.probabilities + query * kPieceSize);
      ahead->advance(fetched);
      correct(state.acc + query * head_dim, state.corrections[query], head_dim);
    }
    ahead->advance(fetched);
    Products::add(state.acc, halves, num_queries, values, piece.num_groups, head_dim, ahead);
    ahead->advance(fetched);
  }

 private:
#if defined(FS_EMULATE_ISA)
  static constexpr int kMany = kMaxQueries + 1;

  static void soften_to_halves(const QueryState& state, int query, int begin, int end,
                               uint16_t* probabilities) {
    soften(state, query, begin, end, kPieceSize);
    bf16_from_float(probabilities, state.scores + query * kPieceSize, kPieceSize);
  }
  template <class Visible>
  static void soften_16(const QueryState&, const HalvesRoom&, int, const Visible&) {}
#else
  static constexpr int kMany = kManySoftened;

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
    __mmask16 lanes[4];
    __m512 p[4];
    for (int i = 0; i < 4; ++i) {
      lanes[i] = static_cast<__mmask16>(visible >> (16 * i));
      p[i] = _mm512_mask_loadu_ps(splat16(-INFINITY), lanes[i], scores + 16 * i);
    }
    const __m512 highest = _mm512_max_ps(_mm512_max_ps(p[0], p[1]), _mm512_max_ps(p[2], p[3]));
    const float before = state.largest[query], piece_max = _mm512_reduce_max_ps(highest);
    const float largest = before > piece_max ? before : piece_max;
    const __m512 shift = splat16(-largest * kLog2e);
    for (int i = 0; i < 4; ++i) {
      p[i] = exp2_16(_mm512_fmadd_ps(p[i], splat16(kLog2e), shift), lanes[i]);
    }
    const __m512 total = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
    _mm512_storeu_si512(probabilities, Products::from_floats(p[0], p[1]));
    _mm512_storeu_si512(probabilities + 32, Products::from_floats(p[2], p[3]));
    const __m512 fall = splat16((before - largest) * kLog2e);
    const float correction = before == largest ? 1.0f : _mm512_cvtss_f32(exp2_16(fall, 0xffff));
    state.corrections[query] = correction;
    state.totals[query] = state.totals[query] * correction + _mm512_reduce_add_ps(total);
    state.largest[query] = largest;
  }

  // `soften_to_halves` for queries [first, first + 16), with the same bits: what is one number for each is
  // made for all of them at once.
  template <class Visible>
  static SIMD_INLINE void soften_16(const QueryState& state, const HalvesRoom& room, int first,
                                    const Visible& visible) {
    const Seen16 seen(state, first, visible);
    const __m512 fall = _mm512_mul_ps(_mm512_sub_ps(seen.before, seen.largest), splat16(kLog2e));
    const __m512 corrections = _mm512_mask_mov_ps(splat16(1.0f), seen.rises, exp2_16(fall, 0xffff));
    _mm512_storeu_ps(state.largest + first, seen.largest);
    _mm512_storeu_ps(state.corrections + first, corrections);
    alignas(64) float shifts[16];
    _mm512_store_ps(shifts, _mm512_mul_ps(seen.largest, splat16(-kLog2e)));

    __m512 each[16];
    for (int i = 0; i < 16; ++i) {
      uint16_t* probabilities = room.probabilities + (first + i) * kPieceSize;
      __m512 p[4];
      for (int j = 0; j < 4; ++j) {
        const __m512 x = _mm512_loadu_ps(seen.scores + i * kPieceSize + 16 * j);
        p[j] = exp2_16(_mm512_fmadd_ps(x, splat16(kLog2e), splat16(shifts[i])), seen.lanes(i, j));
      }
      each[i] = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
      _mm512_storeu_si512(probabilities, Products::from_floats(p[0], p[1]));
      _mm512_storeu_si512(probabilities + 32, Products::from_floats(p[2], p[3]));
    }
    const __m512 totals = _mm512_loadu_ps(state.totals + first);
    _mm512_storeu_ps(state.totals + first,
                     _mm512_add_ps(_mm512_mul_ps(totals, corrections), sum_of_each(each)));
  }
#endif
};

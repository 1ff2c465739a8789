// Paged attention with an online softmax, written on F8 and compiled once per family.
//
// For each piece of 64 positions, in ascending order, a query keeps the largest score m, the sum l
// and the weighted values acc of what it has seen:
//     m' = max(m, scores);  p = e^(scores - m');
//     l = l e^(m - m') + sum p;  acc = acc e^(m - m') + sum p v
// Order: a score sums over head_dim in 8 lanes; p sums in 8 lanes; acc takes keys in ascending
// order. Keys that a query must not see have p = 0, which changes no sum, so a query's bits do not
// depend on the other queries of its task. Every kPartitionSize positions (m, l, acc) start anew,
// and the partitions' results are merged in ascending order.
// int8: a key's scale multiplies its score, a value's scale its p (not the p that l adds up). The x86 families
// have a way of their own with it (attention_words.h).
// Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022,
// "FlashAttention"; Kwon et al. 2023, "PagedAttention".
// Included inside the family's namespace, after row_kernels.h.

// What of a piece some query of the task sees: positions [base + begin, base + end) of the context.
struct Span {
  int base;  // where the piece begins
  int begin, end;
};

// Its keys and values, one pointer per position.
template <class Kv>
struct Piece {
  int begin, end;                      // within the piece
  int block_size;                      // positions from a multiple of it to the next lie in a row
  const Kv* rows[2][kPieceSize];       // keys, values; valid in [begin, end)
  float scales[2][kPieceSize];         // int8 only; likewise
};

// scores[i][key] for `N` queries that are `stride` floats apart; four keys at a time.
// Meanwhile `ahead` (if not null) goes on, as in add_values: together a position for each key.
template <int N, class Kv>
SIMD_INLINE void score_keys(float* scores, const float* q, int head_dim, const Piece<Kv>& piece,
                            FetchAhead* ahead) {
  for (int key = piece.begin & ~3; key < piece.end; key += 4) {
    if (ahead != nullptr) ahead->advance(2);
    const Kv* k[4];
    for (int j = 0; j < 4; ++j) {  // a quad's keys outside the piece are masked by the caller
      const int clamped = key + j < piece.begin ? piece.begin
                          : key + j < piece.end ? key + j
                                                : piece.end - 1;
      k[j] = piece.rows[0][clamped];
    }
    F8 acc[N][4];
    for (int i = 0; i < N; ++i) {
      for (int j = 0; j < 4; ++j) acc[i][j] = splat(0.0f);
    }
    for (int d = 0; d < head_dim; d += 8) {
      F8 query[N];
      for (int i = 0; i < N; ++i) query[i] = load(q + i * head_dim + d);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const F8 value = load(k[j] + d);
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) acc[i][j] = fma(query[i], value, acc[i][j]);
      }
    }
    for (int i = 0; i < N; ++i) {
      sum4(scores + i * kPieceSize + key, acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    }
  }
}

// acc[i] = acc[i] * correction[i] + sum over keys of p[i][key] * value[key], D lanes of eight at d.
template <int N, int D, class Kv>
SIMD_INLINE void add_values(float* acc, const float* corrections, const float* p, int head_dim,
                            int d, const Piece<Kv>& piece, FetchAhead* ahead) {
  F8 total[N][D];
  for (int i = 0; i < N; ++i) {
    for (int c = 0; c < D; ++c) {
      total[i][c] = mul(load(acc + i * head_dim + d + 8 * c), splat(corrections[i]));
    }
  }
  for (int key = piece.begin; key < piece.end; ++key) {
    const Kv* v = piece.rows[1][key] + d;
    if (ahead != nullptr && key % 2 == 0) ahead->advance(1);
    F8 weight[N];
    for (int i = 0; i < N; ++i) weight[i] = splat(p[i * kPieceSize + key]);
#pragma GCC unroll 4
    for (int c = 0; c < D; ++c) {
      const F8 value = load(v + 8 * c);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) total[i][c] = fma(weight[i], value, total[i][c]);
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int c = 0; c < D; ++c) store(acc + i * head_dim + d + 8 * c, total[i][c]);
  }
}

template <int N, class Kv>
SIMD_INLINE void add_values(float* acc, const float* corrections, const float* p, int head_dim,
                            const Piece<Kv>& piece, FetchAhead* ahead) {
  int d = 0;
  for (; d + 32 <= head_dim; d += 32) {
    add_values<N, 4>(acc, corrections, p, head_dim, d, piece, d == 0 ? ahead : nullptr);
  }
  for (; d < head_dim; d += 8) add_values<N, 1>(acc, corrections, p, head_dim, d, piece, nullptr);
}

// What of a task lives between pieces, all in its scratch.
struct QueryState {
  float* q;            // (queries, head_dim), scaled
  float* acc;          // (queries, head_dim)
  float* scores;       // (queries, 64), then the probabilities
  float* largest;      // (queries,) m
  float* totals;       // (queries,) l
  float* corrections;  // (queries,) of the current piece
};

// scores -> probabilities of one query, which sees [begin, end) of a piece of which no query sees what is
// from `piece_end` on; that becomes anything.
SIMD_INLINE void soften(const QueryState& state, int query, int begin, int end, int piece_end) {
  begin = begin > 0 ? begin : 0, end = end < piece_end ? end : piece_end;
  const int limit = (piece_end + 7) / 8 * 8;
  float* scores = state.scores + query * kPieceSize;
  if (begin >= end) {
    std::memset(scores, 0, kPieceSize * sizeof(float));
    state.corrections[query] = 1.0f;
    return;
  }
  for (int key = 0; key < begin; ++key) scores[key] = -INFINITY;
  for (int key = end; key < limit; ++key) scores[key] = -INFINITY;
  F8 highest = load(scores);
  for (int key = 8; key < limit; key += 8) highest = max(highest, load(scores + key));
  const float before = state.largest[query];
  const float piece_max = max_lane(highest);
  const float largest = before > piece_max ? before : piece_max;
  F8 total = splat(0.0f);
  for (int key = 0; key < limit; key += 8) {
    const F8 p = exp(sub(load(scores + key), splat(largest)));
    store(scores + key, p);
    total = add(total, p);
  }
  float correction[8];
  store(correction, exp(splat(before - largest)));
  state.corrections[query] = correction[0];
  state.totals[query] = state.totals[query] * correction[0] + sum(total);
  state.largest[query] = largest;
}

// Scores of int8 keys times their scales, probabilities times the scales of int8 values.
SIMD_INLINE void apply_scales(float* scores, const float* scales) {
  for (int key = 0; key < kPieceSize; key += 8) {
    store(scores + key, mul(load(scores + key), load(scales + key)));
  }
}

// Calls body(first, count) for runs of 3, 2 or 1 of the queries [query, num_queries); count is a
// compile-time constant.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <class Body>
SIMD_INLINE void for_queries(int query, int num_queries, const Body& body) {
  for (; query + 3 <= num_queries; query += 3) body(query, Count<3>());
  if (num_queries - query == 2) body(query, Count<2>());
  if (num_queries - query == 1) body(query, Count<1>());
}

// How a family scores and adds up tiles of many queries, if it has a way of its own: each returns how
// many of the first queries it has done.
struct NoTiles {
  // Whether whole pieces of this type are the family's, where it `takes` the head_dim.
  template <class Kv>
  static constexpr bool kTakesPieces = false;
  static SIMD_INLINE int score(const QueryState&, int, int, const Piece<float>&) { return 0; }
  static SIMD_INLINE int add(const QueryState&, int, int, const Piece<float>&) { return 0; }
};

// One piece for all queries; `visible(query, &begin, &end)` says what of it a query sees.
template <class Tiles, class Kv, class Visible>
SIMD_INLINE void attend_piece(const QueryState& state, int num_queries, int head_dim,
                              const Piece<Kv>& piece, FetchAhead* ahead, bool has_scales,
                              const Visible& visible) {
  int num_scored = 0, num_added = 0;
  if constexpr (sizeof(Kv) == sizeof(float)) {
    num_scored = Tiles::score(state, num_queries, head_dim, piece);
    if (num_scored > 0) ahead->advance(piece.end - piece.begin);
  }
  FetchAhead* const ahead_of_few = num_scored > 0 ? nullptr : ahead;
  for_queries(num_scored, num_queries, [&](int query, auto count) __attribute__((always_inline)) {
    score_keys<decltype(count)::value>(state.scores + query * kPieceSize,
                                       state.q + query * head_dim, head_dim, piece,
                                       query == 0 ? ahead_of_few : nullptr);
  });
  for (int query = 0; query < num_queries; ++query) {
    int begin, end;
    visible(query, &begin, &end);
    float* scores = state.scores + query * kPieceSize;
    if (has_scales) apply_scales(scores, piece.scales[0]);
    soften(state, query, begin, end, piece.end);
    if (has_scales) apply_scales(scores, piece.scales[1]);
  }
  if constexpr (sizeof(Kv) == sizeof(float)) {
    num_added = Tiles::add(state, num_queries, head_dim, piece);
  }
  for_queries(num_added, num_queries, [&](int query, auto count) __attribute__((always_inline)) {
    add_values<decltype(count)::value>(state.acc + query * head_dim, state.corrections + query,
                                       state.scores + query * kPieceSize, head_dim, piece,
                                       query == 0 ? ahead_of_few : nullptr);
  });
}

// (m, l, acc) of one query: what it has seen of a partition, or of several.
struct Seen {
  float *largest, *total, *acc;
};

// seen = seen and `more`, whose positions come after.
SIMD_INLINE void merge(const Seen& seen, float largest, float total, const float* acc,
                       int head_dim) {
  if (total == 0.0f) return;
  if (*seen.total == 0.0f) {
    *seen.largest = largest, *seen.total = total;
    std::memcpy(seen.acc, acc, static_cast<size_t>(head_dim) * sizeof(float));
    return;
  }
  const float both = *seen.largest > largest ? *seen.largest : largest;
  const F8 before = exp(splat(*seen.largest - both)), after = exp(splat(largest - both));
  for (int d = 0; d < head_dim; d += 8) {
    store(seen.acc + d, fma(load(acc + d), after, mul(load(seen.acc + d), before)));
  }
  float factors[2][8];
  store(factors[0], before), store(factors[1], after);
  *seen.total = *seen.total * factors[0][0] + total * factors[1][0];
  *seen.largest = both;
}

SIMD_INLINE void divide(float* out, const float* acc, float total, int head_dim) {
  for (int d = 0; d < head_dim; d += 8) store(out + d, div(load(acc + d), splat(total)));
}

template <class Kv>
SIMD_INLINE void find_piece(const AttentionTask& task, const Span& span, Piece<Kv>* piece) {
  const auto [base, begin, end] = span;
  piece->begin = begin, piece->end = end, piece->block_size = task.block_size;
  const int head_dim = task.head_dim, block_size = task.block_size;
  // Block by block: a division for every key would take as long as its products.
  int offset = (base + begin) % block_size;
  const int32_t* block_id = task.block_ids + (base + begin) / block_size;
  for (int key = begin; key < end; offset = 0, ++block_id) {
    const int count = block_size - offset < end - key ? block_size - offset : end - key;
    const int64_t first = task.places.of_block(*block_id) + int64_t{offset} * head_dim;
    const Kv* k = static_cast<const Kv*>(task.keys) + first;
    const Kv* v = static_cast<const Kv*>(task.values) + first;
    for (int i = 0; i < count; ++i) {
      piece->rows[0][key + i] = k + i * head_dim;
      piece->rows[1][key + i] = v + i * head_dim;
    }
    if (sizeof(Kv) == 1) {
      const int64_t scale = task.scale_places.of_block(*block_id) + offset;
      const size_t nbytes = static_cast<size_t>(count) * sizeof(float);
      std::memcpy(piece->scales[0] + key, task.key_scales + scale, nbytes);
      std::memcpy(piece->scales[1] + key, task.value_scales + scale, nbytes);
    }
    key += count;
  }
}

// The same piece as fp32, which is exact, in `room` (2 * kPieceSize * head_dim).
template <class Kv>
SIMD_INLINE Piece<float> widened(const Piece<Kv>& piece, int head_dim, float* room) {
  Piece<float> wide;
  wide.begin = piece.begin, wide.end = piece.end, wide.block_size = 1;
  for (int part = 0; part < 2; ++part) {
    for (int key = piece.begin; key < piece.end; ++key, room += head_dim) {
      for (int d = 0; d < head_dim; d += 8) store(room + d, load(piece.rows[part][key] + d));
      wide.rows[part][key] = room;
    }
    std::memcpy(wide.scales[part], piece.scales[part], sizeof piece.scales[part]);
  }
  return wide;
}

template <class Tiles, class Kv>
void attend(const AttentionTask& task) {
  constexpr int kFewQueries = 6;  // more of them share one conversion of the piece
  constexpr bool kHasScales = sizeof(Kv) == 1;
  const int head_dim = task.head_dim, heads = task.heads_per_kv;
  const int num_queries = task.num_tokens * heads;
  QueryState state;
  state.q = task.scratch;
  state.acc = state.q + kMaxQueries * head_dim;
  state.scores = state.acc + kMaxQueries * head_dim;
  state.largest = state.scores + kMaxQueries * kPieceSize;
  state.totals = state.largest + kMaxQueries;
  state.corrections = state.totals + kMaxQueries;
  float* merged_largest = state.corrections + kMaxQueries;
  float* merged_totals = merged_largest + kMaxQueries;
  float* merged_acc = merged_totals + kMaxQueries;
  float* room = merged_acc + kMaxQueries * head_dim;
  for (int query = 0; query < num_queries; ++query) {
    const float* q = task.q + query / heads * task.q_stride + query % heads * head_dim;
    for (int d = 0; d < head_dim; d += 8) {
      store(state.q + query * head_dim + d, mul(load(q + d), splat(task.scale)));
    }
    merged_totals[query] = 0.0f;
  }

  bool is_tiled = false;
  if constexpr (Tiles::template kTakesPieces<Kv>) {
    is_tiled = Tiles::takes(head_dim);
    if (is_tiled) Tiles::begin(state, num_queries, head_dim, room);
  }

  const int window = task.sliding_window;
  const auto first_seen = [window](int position) {
    return window > 0 && position >= window ? position - window + 1 : 0;
  };
  const int task_begin = first_seen(task.first_position);
  const int task_end = task.first_position + task.num_tokens;
  const bool is_whole = task.partials == nullptr;
  const int first_partition = is_whole ? task_begin / kPartitionSize : task.partition_begin;
  const int end_partition =
      is_whole ? (task_end + kPartitionSize - 1) / kPartitionSize : task.partition_end;
  FetchAhead ahead(task, std::max(task_begin, first_partition * kPartitionSize),
                   std::min(task_end, end_partition * kPartitionSize));
  for (int partition = first_partition; partition < end_partition; ++partition) {
    std::memset(state.acc, 0, static_cast<size_t>(num_queries * head_dim) * sizeof(float));
    for (int query = 0; query < num_queries; ++query) {
      state.largest[query] = -INFINITY;
      state.totals[query] = 0.0f;
    }
    const int partition_begin = partition * kPartitionSize;
    const int first = (task_begin > partition_begin ? task_begin : partition_begin) /
                      kPieceSize * kPieceSize;
    const int end = partition_begin + kPartitionSize < task_end
                        ? partition_begin + kPartitionSize : task_end;
    for (int base = first; base < end; base += kPieceSize) {
      const auto visible = [&](int query, int* from, int* to) {
        const int position = task.first_position + query / heads;
        *from = first_seen(position) - base, *to = position + 1 - base;
      };
      const Span span{base, task_begin > base ? task_begin - base : 0,
                      task_end - base < kPieceSize ? task_end - base : kPieceSize};
      if constexpr (Tiles::template kTakesPieces<Kv>) {
        if (is_tiled) {
          ahead.reach(base + kPieceSize);
          Tiles::attend(task, state, num_queries, span, &ahead, visible, room);
          continue;
        }
      }
      Piece<Kv> piece;
      find_piece(task, span, &piece);
      if (sizeof(Kv) == 4 || num_queries <= kFewQueries) {
        attend_piece<Tiles>(state, num_queries, head_dim, piece, &ahead, kHasScales, visible);
      } else {
        const Piece<float> wide = widened(piece, head_dim, room);
        attend_piece<Tiles>(state, num_queries, head_dim, wide, &ahead, kHasScales, visible);
      }
    }
    for (int query = 0; query < num_queries; ++query) {
      const float* acc = state.acc + query * head_dim;
      if (is_whole) {
        merge({merged_largest + query, merged_totals + query, merged_acc + query * head_dim},
              state.largest[query], state.totals[query], acc, head_dim);
      } else {
        const int index = (partition - task.partition_begin) * num_queries + query;
        float* partial = task.partials + int64_t{index} * (head_dim + 2);
        partial[0] = state.largest[query], partial[1] = state.totals[query];
        std::memcpy(partial + 2, acc, static_cast<size_t>(head_dim) * sizeof(float));
      }
    }
  }
  ahead.finish();
  if constexpr (Tiles::template kTakesPieces<Kv>) {
    if (is_tiled) Tiles::end();
  }
  for (int query = 0; is_whole && query < num_queries; ++query) {
    float* out = task.out + query / heads * task.out_stride + query % heads * head_dim;
    divide(out, merged_acc + query * head_dim, merged_totals[query], head_dim);
  }
}

template <class Tiles, class Int8Tiles = Tiles>
void attention(const AttentionTask& task) {
  switch (task.kv_dtype) {
    case kBf16: attend<Tiles, uint16_t>(task); break;
    case kInt8: attend<Int8Tiles, int8_t>(task); break;
    default: attend<Tiles, float>(task); break;
  }
}

void merge_attention(float* out, const float* partials, int64_t stride, int count, int head_dim,
                     float* scratch) {
  float largest = -INFINITY, total = 0.0f;
  for (int i = 0; i < count; ++i, partials += stride) {
    merge({&largest, &total, scratch}, partials[0], partials[1], partials + 2, head_dim);
  }
  divide(out, scratch, total, head_dim);
}

// Paged attention with an online softmax, written on F8 and compiled once per family.
//
// For each piece of 64 positions, in ascending order, a query keeps the largest score m, the sum l
// and the weighted values acc of what it has seen:
//     m' = max(m, scores);  p = e^(scores - m');
//     l = l e^(m - m') + sum p;  acc = acc e^(m - m') + sum p v
// Order: a score sums over head_dim in 8 lanes; p sums in 8 lanes; acc takes keys in ascending
// order. Keys that a query must not see have p = 0, which changes no sum, so a query's bits do not
// depend on the other queries of its task.
// Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022,
// "FlashAttention"; Kwon et al. 2023, "PagedAttention".
// Included inside the family's namespace, after row_kernels.h.

// The keys or values of a piece that some query of the task sees, one pointer per position.
template <class Kv>
struct Piece {
  int begin, end;                      // within the piece
  const Kv* rows[2][kPieceSize];       // keys, values; valid in [begin, end)
};

// scores[i][key] for `N` queries that are `stride` floats apart; four keys at a time.
template <int N, class Kv>
SIMD_INLINE void score_keys(float* scores, const float* q, int head_dim, const Piece<Kv>& piece) {
  for (int key = piece.begin & ~3; key < piece.end; key += 4) {
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
                            int d, const Piece<Kv>& piece) {
  F8 total[N][D];
  for (int i = 0; i < N; ++i) {
    for (int c = 0; c < D; ++c) {
      total[i][c] = mul(load(acc + i * head_dim + d + 8 * c), splat(corrections[i]));
    }
  }
  for (int key = piece.begin; key < piece.end; ++key) {
    const Kv* v = piece.rows[1][key] + d;
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
                            const Piece<Kv>& piece) {
  int d = 0;
  for (; d + 32 <= head_dim; d += 32) add_values<N, 4>(acc, corrections, p, head_dim, d, piece);
  for (; d < head_dim; d += 8) add_values<N, 1>(acc, corrections, p, head_dim, d, piece);
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

// scores -> probabilities of one query, which sees [begin, end) of the piece.
SIMD_INLINE void soften(const QueryState& state, int query, int begin, int end) {
  float* scores = state.scores + query * kPieceSize;
  if (begin >= end) {
    std::memset(scores, 0, kPieceSize * sizeof(float));
    state.corrections[query] = 1.0f;
    return;
  }
  for (int key = 0; key < begin; ++key) scores[key] = -INFINITY;
  for (int key = end; key < kPieceSize; ++key) scores[key] = -INFINITY;
  F8 highest = load(scores);
  for (int key = 8; key < kPieceSize; key += 8) highest = max(highest, load(scores + key));
  const float before = state.largest[query];
  const float piece_max = max_lane(highest);
  const float largest = before > piece_max ? before : piece_max;
  F8 total = splat(0.0f);
  for (int key = 0; key < kPieceSize; key += 8) {
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

template <class Kv>
void attend(const AttentionTask& task) {
  const int head_dim = task.head_dim, heads = task.heads_per_kv;
  const int num_queries = task.num_tokens * heads;
  QueryState state;
  state.q = task.scratch;
  state.acc = state.q + kMaxQueries * head_dim;
  state.scores = state.acc + kMaxQueries * head_dim;
  state.largest = state.scores + kMaxQueries * kPieceSize;
  state.totals = state.largest + kMaxQueries;
  state.corrections = state.totals + kMaxQueries;
  for (int query = 0; query < num_queries; ++query) {
    const float* q = task.q + query / heads * task.q_stride + query % heads * head_dim;
    for (int d = 0; d < head_dim; d += 8) {
      store(state.q + query * head_dim + d, mul(load(q + d), splat(task.scale)));
      store(state.acc + query * head_dim + d, splat(0.0f));
    }
    state.largest[query] = -INFINITY;
    state.totals[query] = 0.0f;
  }

  const int window = task.sliding_window;
  const auto first_seen = [window](int position) {
    return window > 0 && position >= window ? position - window + 1 : 0;
  };
  const int task_begin = first_seen(task.first_position);
  const int task_end = task.first_position + task.num_tokens;
  for (int base = task_begin / kPieceSize * kPieceSize; base < task_end; base += kPieceSize) {
    Piece<Kv> piece;
    piece.begin = task_begin > base ? task_begin - base : 0;
    piece.end = task_end - base < kPieceSize ? task_end - base : kPieceSize;
    for (int key = piece.begin; key < piece.end; ++key) {
      const int position = base + key;
      const int64_t offset = task.block_ids[position / task.block_size] * task.block_stride +
                             static_cast<int64_t>(position % task.block_size) * head_dim;
      piece.rows[0][key] = static_cast<const Kv*>(task.keys) + offset;
      piece.rows[1][key] = static_cast<const Kv*>(task.values) + offset;
    }
    for (int query = 0; query < num_queries;) {
      float* scores = state.scores + query * kPieceSize;
      const float* q = state.q + query * head_dim;
      const int left = num_queries - query;
      if (left >= 3) {
        score_keys<3>(scores, q, head_dim, piece);
        query += 3;
      } else if (left == 2) {
        score_keys<2>(scores, q, head_dim, piece);
        query += 2;
      } else {
        score_keys<1>(scores, q, head_dim, piece);
        query += 1;
      }
    }
    for (int query = 0; query < num_queries; ++query) {
      const int position = task.first_position + query / heads;
      const int begin = first_seen(position) - base, end = position + 1 - base;
      soften(state, query, begin > 0 ? begin : 0, end < kPieceSize ? end : kPieceSize);
    }
    for (int query = 0; query < num_queries;) {
      float* acc = state.acc + query * head_dim;
      const float* p = state.scores + query * kPieceSize;
      const float* corrections = state.corrections + query;
      const int left = num_queries - query;
      if (left >= 3) {
        add_values<3>(acc, corrections, p, head_dim, piece);
        query += 3;
      } else if (left == 2) {
        add_values<2>(acc, corrections, p, head_dim, piece);
        query += 2;
      } else {
        add_values<1>(acc, corrections, p, head_dim, piece);
        query += 1;
      }
    }
  }
  for (int query = 0; query < num_queries; ++query) {
    float* out = task.out + query / heads * task.out_stride + query % heads * head_dim;
    const F8 total = splat(state.totals[query]);
    for (int d = 0; d < head_dim; d += 8) {
      store(out + d, div(load(state.acc + query * head_dim + d), total));
    }
  }
}

void attention(const AttentionTask& task) {
  if (task.kv_dtype == kBf16) {
    attend<uint16_t>(task);
  } else {
    attend<float>(task);
  }
}

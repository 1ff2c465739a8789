// Where a bf16 cache has a piece's keys and values: by rows, or, if it is paired (kv_cache.h), by groups of
// 16 positions.
// Included inside the family's namespace, after attention_kernel.h.

constexpr int kKeyBlock = kPairedPositions;  // keys, whose scores are made together
static_assert(kPieceSize % kKeyBlock == 0);

struct Groups {
  const uint16_t* at[kPieceSize / kKeyBlock];
};

// Those before the span's first are not set.
inline Groups paired_groups(const AttentionTask& task, const void* cache, const Span& span) {
  Groups groups;
  const int first = span.begin / kKeyBlock;
  const int position = span.base + first * kKeyBlock;
  const int32_t* block_id = task.block_ids + position / task.block_size;
  int offset = position % task.block_size;
  for (int i = first; i * kKeyBlock < span.end; ++i, offset += kKeyBlock) {
    if (offset == task.block_size) offset = 0, ++block_id;
    groups.at[i] = static_cast<const uint16_t*>(cache) + task.places.of_block(*block_id) +
                   int64_t{offset} * task.head_dim;
  }
  return groups;
}

// Where a piece is in the cache: by rows, or by groups if that is paired.
struct HalvesPiece {
  Piece<uint16_t> rows;
  Groups keys, values;  // from the span's first group on
  Span span;
  int num_groups;  // that it has a part of, or that come before it
  bool is_paired;

  HalvesPiece(const AttentionTask& task, const Span& span)
      : span(span), num_groups((span.end + kKeyBlock - 1) / kKeyBlock), is_paired(task.is_paired) {
    if (is_paired) {
      keys = paired_groups(task, task.keys, span), values = paired_groups(task, task.values, span);
    } else {
      find_piece(task, span, &rows);
    }
  }
};

// The place of a position outside the piece is one inside: what is there is not seen, but finite.
inline const uint16_t* row_of(const HalvesPiece& piece, int part, int key) {
  return piece.rows.rows[part][std::clamp(key, piece.span.begin, piece.span.end - 1)];
}

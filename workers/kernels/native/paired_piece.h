// Where a bf16 or int8 cache has a piece's keys and values: by rows, or, if it is paired (kv_cache.h), by
// groups of 16 positions.
// Included inside the family's namespace, after attention_kernel.h.

constexpr int kKeyBlock = kPairedPositions;  // keys, whose scores are made together
static_assert(kPieceSize % kKeyBlock == 0);

template <class Kv>
struct GroupsOf {
  const Kv* at[kPieceSize / kKeyBlock];
};

// Those before the span's first are not set.
template <class Kv>
inline GroupsOf<Kv> paired_groups(const AttentionTask& task, const void* cache, const Span& span) {
  GroupsOf<Kv> groups;
  const int first = span.begin / kKeyBlock;
  const int position = span.base + first * kKeyBlock;
  const int32_t* block_id = task.block_ids + position / task.block_size;
  int offset = position % task.block_size;
  for (int i = first; i * kKeyBlock < span.end; ++i, offset += kKeyBlock) {
    if (offset == task.block_size) offset = 0, ++block_id;
    groups.at[i] = static_cast<const Kv*>(cache) + task.places.of_block(*block_id) +
                   int64_t{offset} * task.head_dim;
  }
  return groups;
}

// The scales of a piece's keys and values; zeros where no query sees a position.
inline void find_scales(const AttentionTask& task, const Span& span, float (&scales)[2][kPieceSize]) {
  const float* const caches[] = {task.key_scales, task.value_scales};
  // Of a paired cache whole groups: they are never parted by blocks.
  const int step = task.is_paired ? kKeyBlock : 1;
  int key = span.begin / step * step;
  int offset = (span.base + key) % task.block_size;
  const int32_t* block_id = task.block_ids + (span.base + key) / task.block_size;
  int64_t place = task.scale_places.of_block(*block_id);
  for (; key < span.end; key += step, offset += step) {
    if (offset == task.block_size) offset = 0, place = task.scale_places.of_block(*++block_id);
    for (int part = 0; part < 2; ++part) {
      const float* from = caches[part] + place + offset;
      if (task.is_paired) {
        store(scales[part] + key, load(from)), store(scales[part] + key + 8, load(from + 8));
      } else {
        scales[part][key] = *from;
      }
    }
  }
  for (float(&of_part)[kPieceSize] : scales) {
    for (int i = 0; i < span.begin; ++i) of_part[i] = 0.0f;
    for (int i = span.end; i < kPieceSize; ++i) of_part[i] = 0.0f;
  }
}

// Where a piece is in the cache: by rows, or by groups if that is paired.
template <class Kv>
struct PairedPiece {
  Piece<Kv> rows;
  GroupsOf<Kv> keys, values;  // from the span's first group on
  Span span;
  int num_groups;  // that it has a part of, or that come before it
  bool is_paired;

  PairedPiece(const AttentionTask& task, const Span& span)
      : span(span), num_groups((span.end + kKeyBlock - 1) / kKeyBlock), is_paired(task.is_paired) {
    if (is_paired) {
      keys = paired_groups<Kv>(task, task.keys, span), values = paired_groups<Kv>(task, task.values, span);
    } else {
      find_piece(task, span, &rows);
    }
    if constexpr (sizeof(Kv) == 1) find_scales(task, span, rows.scales);
  }
};

using Groups = GroupsOf<uint16_t>;
using HalvesPiece = PairedPiece<uint16_t>;

// The place of a position outside the piece is one inside: what is there is not seen, but finite.
template <class Kv>
inline const Kv* row_of(const PairedPiece<Kv>& piece, int part, int key) {
  return piece.rows.rows[part][std::clamp(key, piece.span.begin, piece.span.end - 1)];
}

// Calls body(first, Count<N>()) for `Most` of the blocks [block, num_blocks) at a time, or what is left.
template <int Most, class Body>
SIMD_INLINE void for_blocks(int block, int num_blocks, const Body& body) {
  for (; block + Most <= num_blocks; block += Most) body(block, Count<Most>());
  if constexpr (Most > 1) {
    if (block < num_blocks) for_blocks<Most - 1>(block, num_blocks, body);
  }
}

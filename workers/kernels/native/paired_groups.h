// Where a paired cache (kv_cache.h) has a piece's keys or values: 16 positions, a group, at a time.
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

// The paged KV cache, keys and values apart: per layer (clusters, kv_heads, 16 blocks, block_size,
// head_dim). int8 has a float32 scale per head and position besides: (clusters, kv_heads, 16 blocks,
// block_size).
//
// A paired cache (KernelTable::takes_pairs) has its positions by 16, in pairs: keys (head_dim/2 pairs of
// dimensions, 16 positions, 2), values (8 pairs of positions, head_dim, 2), in the place of 16 rows.
//
// What attention reads is of one head. A cluster has a head's blocks of neighbouring ids, as a sequence
// mostly has them, in one stretch, which the processor's own prefetcher follows.
// Blocks take memory when they are first written; the address space of all is reserved at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "api.h"
#include "kernel_table.h"
#include "mapped_memory.h"

namespace furiosa {

class KvCache {
 public:
  KvCache(const FsEngineConfig& config, const KernelTable& kernels)
      : dtype(static_cast<FsDtype>(config.kv_dtype)),
        block_size(config.block_size),
        is_paired_(config.block_size % kPairedPositions == 0 && config.head_dim <= kMostPairedDims &&
                   kernels.takes_pairs != nullptr &&
                   kernels.takes_pairs(dtype, config.head_dim)),
        places_(int64_t{config.block_size} * config.head_dim, config.num_kv_heads),
        scale_places_(config.block_size, config.num_kv_heads),
        head_dim_(config.head_dim),
        value_nbytes_(kv_nbytes(dtype)),
        layer_nbytes_(places_.total(config.num_blocks) * value_nbytes_),
        layer_scales_(dtype == kInt8 ? scale_places_.total(config.num_blocks) : 0),
        keys_(layer_nbytes_ * config.num_layers),
        values_(layer_nbytes_ * config.num_layers),
        key_scales_(layer_scales_ * config.num_layers * 4),
        value_scales_(layer_scales_ * config.num_layers * 4) {}

  // Where block 0 of this layer's head begins.
  uint8_t* keys(int layer, int kv_head) const { return keys_.data() + offset(layer, kv_head); }
  uint8_t* values(int layer, int kv_head) const { return values_.data() + offset(layer, kv_head); }
  // The same of an int8 cache's scales; null for other types.
  float* key_scales(int layer, int kv_head) const { return scales(key_scales_, layer, kv_head); }
  float* value_scales(int layer, int kv_head) const {
    return scales(value_scales_, layer, kv_head);
  }

  // An attention task with the fields that say where this layer's head is; the rest is not set.
  AttentionTask task(int layer, int kv_head) const {
    AttentionTask task;
    task.head_dim = head_dim_;
    task.keys = keys(layer, kv_head);
    task.values = values(layer, kv_head);
    task.key_scales = key_scales(layer, kv_head);
    task.value_scales = value_scales(layer, kv_head);
    task.kv_dtype = dtype;
    task.block_size = block_size;
    task.is_paired = is_paired_;
    task.places = places_;
    task.scale_places = scale_places_;
    task.next = {};
    task.is_fetched = false;
    return task;
  }
  // Positions [begin, end) of a sequence whose blocks `block_ids` names.
  Context context(int layer, int kv_head, const int32_t* block_ids, int begin, int end) const {
    return {keys(layer, kv_head), values(layer, kv_head), key_scales(layer, kv_head),
            value_scales(layer, kv_head), block_ids, begin, end};
  }
  // Writes head_dim values of one head at `slot`, a position counted in positions from block 0 on.
  void put_key(int layer, int kv_head, int64_t slot, const float* head,
               const KernelTable& kernels) const {
    uint8_t* base = keys(layer, kv_head);
    float* scales = key_scales(layer, kv_head);
    if (is_paired_) {
      put_paired(scales, slot, head, kernels, [&](const auto* row) { put_paired_key(base, slot, row); });
    } else {
      put(base, scales, slot, head, kernels);
    }
  }
  void put_value(int layer, int kv_head, int64_t slot, const float* head,
                 const KernelTable& kernels) const {
    uint8_t* base = values(layer, kv_head);
    float* scales = value_scales(layer, kv_head);
    if (is_paired_) {
      put_paired(scales, slot, head, kernels, [&](const auto* row) { put_paired_value(base, slot, row); });
    } else {
      put(base, scales, slot, head, kernels);
    }
  }

  const FsDtype dtype;
  const int block_size;

 private:
  int64_t offset(int layer, int kv_head) const {
    return layer * layer_nbytes_ + places_.of_head(kv_head) * value_nbytes_;
  }
  float* scales(const MappedMemory& memory, int layer, int kv_head) const {
    if (dtype != kInt8) return nullptr;
    return reinterpret_cast<float*>(memory.data()) + layer * layer_scales_ +
           scale_places_.of_head(kv_head);
  }

  float& scale_of(float* scales, int64_t slot) const {
    return scales[scale_places_.of_block(slot / block_size) + slot % block_size];
  }
  // The 16 positions of which `slot` is one.
  template <class Kv>
  Kv* group_of(uint8_t* base, int64_t slot) const {
    const int64_t block = slot / block_size, offset = slot % block_size;
    return reinterpret_cast<Kv*>(base) + places_.of_block(block) +
           (offset - offset % kPairedPositions) * head_dim_;
  }
  int place_in_group(int64_t slot) const {
    return static_cast<int>(slot % block_size % kPairedPositions);
  }

  // Calls put_row(head as the cache has it).
  template <class PutRow>
  void put_paired(float* scales, int64_t slot, const float* head, const KernelTable& kernels,
                  const PutRow& put_row) const {
    if (dtype == kInt8) {
      int8_t row[kMostPairedDims];
      scale_of(scales, slot) = kernels.quantize_head(row, head, head_dim_);
      put_row(row);
    } else {
      uint16_t row[kMostPairedDims];
      kernels.bf16_from_float(row, head, head_dim_);
      put_row(row);
    }
  }
  // Other PEs may be writing other positions of the group: nothing is written but what is the slot's own.
  template <class Kv>
  void put_paired_key(uint8_t* base, int64_t slot, const Kv* head) const {
    Kv* own = group_of<Kv>(base, slot) + 2 * place_in_group(slot);
    for (int d = 0; d < head_dim_; d += 2) {
      std::memcpy(own + d * kPairedPositions, head + d, 2 * sizeof(Kv));
    }
  }
  template <class Kv>
  void put_paired_value(uint8_t* base, int64_t slot, const Kv* head) const {
    const int place = place_in_group(slot);
    Kv* own = group_of<Kv>(base, slot) + place / 2 * 2 * head_dim_ + place % 2;
    for (int d = 0; d < head_dim_; ++d) own[2 * d] = head[d];
  }

  void put(uint8_t* base, float* scales, int64_t slot, const float* head,
           const KernelTable& kernels) const {
    const int64_t block = slot / block_size, offset = slot % block_size;
    uint8_t* place = base + (places_.of_block(block) + offset * head_dim_) * value_nbytes_;
    switch (dtype) {
      case kBf16:
        kernels.bf16_from_float(reinterpret_cast<uint16_t*>(place), head, head_dim_);
        break;
      case kInt8:
        scale_of(scales, slot) =
            kernels.quantize_head(reinterpret_cast<int8_t*>(place), head, head_dim_);
        break;
      default:
        std::memcpy(place, head, static_cast<size_t>(head_dim_) * sizeof(float));
        break;
    }
  }

  static constexpr int kMostPairedDims = 512;

  const bool is_paired_;
  const BlockPlaces places_, scale_places_;
  const int head_dim_;
  const int64_t value_nbytes_, layer_nbytes_, layer_scales_;
  const MappedMemory keys_, values_, key_scales_, value_scales_;
};

}  // namespace furiosa

// The paged KV cache: per layer (blocks, kv_heads, block_size, head_dim), keys and values apart.
//
// Blocks take memory when they are first written; the address space of all is reserved at once.
#pragma once

#include <cstdint>

#include "api.h"
#include "mapped_memory.h"

namespace furiosa {

class KvCache {
 public:
  explicit KvCache(const FsEngineConfig& config)
      : dtype(static_cast<FsDtype>(config.kv_dtype)),
        block_size(config.block_size),
        head_stride(int64_t{config.block_size} * config.head_dim),
        block_stride(head_stride * config.num_kv_heads),
        value_nbytes_(dtype == kBf16 ? 2 : 4),
        layer_nbytes_(block_stride * config.num_blocks * value_nbytes_),
        keys_(layer_nbytes_ * config.num_layers),
        values_(layer_nbytes_ * config.num_layers) {}

  // Where block 0 of this layer's head begins; later blocks are `block_stride` elements apart.
  uint8_t* keys(int layer, int kv_head) const { return keys_.data() + offset(layer, kv_head); }
  uint8_t* values(int layer, int kv_head) const { return values_.data() + offset(layer, kv_head); }

  uint8_t* element(uint8_t* base, int64_t index) const { return base + index * value_nbytes_; }

  const FsDtype dtype;
  const int block_size;
  const int64_t head_stride, block_stride;  // in elements

 private:
  int64_t offset(int layer, int kv_head) const {
    return layer * layer_nbytes_ + kv_head * head_stride * value_nbytes_;
  }

  const int64_t value_nbytes_, layer_nbytes_;
  const MappedMemory keys_, values_;
};

}  // namespace furiosa

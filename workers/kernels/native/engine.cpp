#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "batch.h"
#include "failure.h"

namespace furiosa {

namespace {

// LM head and sampling run on this many rows at a time, which bounds the memory for logits.
constexpr int kLogitsRows = 64;
// Rows of a matmul's left operand that one item covers: they stay in the second-level cache while
// the item's panels go past.
constexpr int kRowBlock = 128;
// Items per PE in a job that is cut evenly: enough for a held-up PE's share to move elsewhere.
constexpr int kItemsPerPe = 12;

int ceil_div(int a, int b) { return (a + b - 1) / b; }

FsEngineConfig checked(const FsEngineConfig& config) {
  const bool is_positive =
      config.vocab_size > 0 && config.hidden_size > 0 && config.intermediate_size > 0 &&
      config.num_layers > 0 && config.num_heads > 0 && config.num_kv_heads > 0 &&
      config.head_dim > 0 && config.num_blocks > 0 && config.block_size > 0 &&
      config.max_num_batched_tokens > 0 && config.num_pes > 0 && config.sliding_window >= 0;
  require(is_positive, kInvalidConfig, "a size is not positive");
  require(config.num_heads % config.num_kv_heads == 0, kInvalidArtifact,
          "num_heads is not a multiple of num_kv_heads");
  require(config.num_heads / config.num_kv_heads <= kMaxQueries, kInvalidArtifact,
          "more than 64 query heads share a key/value head");
  require(config.head_dim % 8 == 0, kInvalidArtifact, "head_dim is not a multiple of 8");
  require(config.kv_dtype == kFp32 || config.kv_dtype == kBf16, kInvalidConfig,
          "the KV cache is fp32 or bf16");
  return config;
}

std::vector<std::vector<int>> cpus_of(const FsEngineConfig& config) {
  std::vector<std::vector<int>> cpus;
  for (int pe = 0; pe < config.num_pes; ++pe) {
    cpus.emplace_back(config.cpus + config.cpu_offsets[pe],
                      config.cpus + config.cpu_offsets[pe + 1]);
  }
  return cpus;
}

}  // namespace

Engine::Buffers Engine::Buffers::from(Arena& arena, const FsEngineConfig& config) {
  const int64_t tokens = config.max_num_batched_tokens;
  const int q_size = config.num_heads * config.head_dim;
  const int qkv_size = q_size + 2 * config.num_kv_heads * config.head_dim;
  const int64_t widest_input =
      std::max({config.hidden_size, q_size, config.intermediate_size});
  const int64_t widest_output = std::max(qkv_size, 2 * config.intermediate_size);
  const int64_t num_groups = (widest_input + kGroupSize - 1) / kGroupSize;
  Buffers buffers;
  buffers.hidden = arena.take<float>(tokens * config.hidden_size);
  buffers.wide = arena.take<float>(tokens * widest_output);
  buffers.input.cols = 0;
  buffers.input.values = arena.take<float>(tokens * widest_input);
  buffers.input.quants = arena.take<int8_t>(tokens * widest_input);
  buffers.input.scales = arena.take<float>(tokens * num_groups);
  buffers.input.sums = arena.take<int32_t>(tokens * num_groups);
  buffers.input.scaled_sums = arena.take<float>(tokens * num_groups);
  buffers.positions = arena.take<int32_t>(tokens);
  buffers.slots = arena.take<int64_t>(tokens);
  buffers.cos = arena.take<float>(tokens * config.head_dim / 2);
  buffers.sin = arena.take<float>(tokens * config.head_dim / 2);
  buffers.sampled = arena.take<int32_t>(kLogitsRows);
  buffers.logits = arena.take<float>(int64_t{kLogitsRows} * config.vocab_size);
  return buffers;
}

namespace {

int64_t scratch_nbytes(const FsEngineConfig& config) {
  Arena arena(nullptr);
  for (int pe = 0; pe < config.num_pes; ++pe) {
    arena.take<float>(attention_scratch_floats(config.head_dim));
    SamplerScratch::from(arena, config.vocab_size);
  }
  return arena.nbytes();
}

}  // namespace

Engine::Engine(const FsEngineConfig& config, const KernelTable& kernels)
    : config_(checked(config)),
      kernels_(kernels),
      weights_(Weights::from(config_)),
      q_size_(config_.num_heads * config_.head_dim),
      kv_size_(config_.num_kv_heads * config_.head_dim),
      qkv_size_(q_size_ + 2 * kv_size_),
      pool_(cpus_of(config_)),
      cache_(config_),
      memory_([this] {
        Arena arena(nullptr);
        Buffers::from(arena, config_);
        return arena.nbytes() + scratch_nbytes(config_);
      }()) {
  Arena arena(memory_.data());
  buffers_ = Buffers::from(arena, config_);
  for (int pe = 0; pe < config_.num_pes; ++pe) {
    attention_scratch_.push_back(arena.take<float>(attention_scratch_floats(config_.head_dim)));
    sampler_scratch_.push_back(SamplerScratch::from(arena, config_.vocab_size));
  }
  query_runs_.reserve(static_cast<size_t>(config_.max_num_batched_tokens));
  sample_errors_.resize(kLogitsRows);
}

void Engine::step(const FsBatch& batch, const FsResult* result, float* logits) {
  check_forward(batch, {config_.vocab_size, config_.num_blocks, config_.block_size,
                        config_.max_num_batched_tokens});
  check_sampling(batch, config_.vocab_size);
  const ThreadPool::CallerBinding binding(pool_);
  forward(batch);
  for (int first = 0; first < batch.num_samples; first += kLogitsRows) {
    const int count = std::min(kLogitsRows, batch.num_samples - first);
    for (int i = 0; i < count; ++i) {
      buffers_.sampled[i] = batch.row_offsets[batch.sample_rows[first + i] + 1] - 1;
    }
    norm_inputs(count, buffers_.sampled, weights_.final_norm, weights_.lm_head);
    float* out = logits == nullptr ? buffers_.logits
                                   : logits + int64_t{first} * config_.vocab_size;
    matmul(weights_.lm_head, count, {out, config_.vocab_size, nullptr, false});
    if (result != nullptr) sample(batch, first, count, *result);
  }
}

template <class Body>
void Engine::for_rows(int num_rows, const Body& body) {
  const int rows_per_item = ceil_div(num_rows, pool_.size() * kItemsPerPe);
  pool_.run(ceil_div(num_rows, rows_per_item), [&](int item, int pe) {
    const int end = std::min((item + 1) * rows_per_item, num_rows);
    for (int row = item * rows_per_item; row < end; ++row) body(row, pe);
  });
}

void Engine::forward(const FsBatch& batch) {
  if (batch.num_tokens == 0) return;
  locate_tokens(batch);
  plan_attention(batch);
  embed(batch);
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    attention_block(batch, layer);
    feed_forward_block(batch.num_tokens, layer);
  }
}

void Engine::locate_tokens(const FsBatch& batch) {
  for (int row = 0; row < batch.num_rows; ++row) {
    const int32_t* blocks = batch.block_ids + batch.block_offsets[row];
    for (int token = batch.row_offsets[row]; token < batch.row_offsets[row + 1]; ++token) {
      const int position = batch.context_lens[row] + token - batch.row_offsets[row];
      buffers_.positions[token] = position;
      buffers_.slots[token] = blocks[position / cache_.block_size] * cache_.block_stride +
                              int64_t{position % cache_.block_size} * config_.head_dim;
    }
  }
  const int half = config_.head_dim / 2;
  for_rows(batch.num_tokens, [&](int token, int) {
    const float position = static_cast<float>(buffers_.positions[token]);
    for (int i = 0; i < half; ++i) {
      const double angle = position * weights_.rope_inv_freq[i];  // the product is float32
      buffers_.cos[int64_t{token} * half + i] = static_cast<float>(std::cos(angle));
      buffers_.sin[int64_t{token} * half + i] = static_cast<float>(std::sin(angle));
    }
  });
}

void Engine::plan_attention(const FsBatch& batch) {
  const int heads_per_kv = config_.num_heads / config_.num_kv_heads;
  const int max_run = std::max(1, kMaxQueries / heads_per_kv);
  query_runs_.clear();
  for (int row = 0; row < batch.num_rows; ++row) {
    const int end = batch.row_offsets[row + 1];
    for (int token = batch.row_offsets[row]; token < end; token += max_run) {
      query_runs_.push_back({row, token, std::min(max_run, end - token)});
    }
  }
}

void Engine::embed(const FsBatch& batch) {
  for_rows(batch.num_tokens, [&](int token, int) {
    unpack_row(weights_.embed, batch.token_ids[token],
               buffers_.hidden + int64_t{token} * config_.hidden_size);
  });
}

void Engine::attention_block(const FsBatch& batch, int layer) {
  const LayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
  norm_inputs(batch.num_tokens, nullptr, weights.attn_norm, weights.qkv);
  matmul(weights.qkv, batch.num_tokens, {buffers_.wide, qkv_size_, weights.qkv_bias, false});
  cache_keys_and_values(batch.num_tokens, layer);
  attend(batch, layer);
  quantize_inputs(batch.num_tokens, weights.o);
  matmul(weights.o, batch.num_tokens, {buffers_.hidden, config_.hidden_size, nullptr, true});
}

void Engine::feed_forward_block(int num_tokens, int layer) {
  const LayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
  norm_inputs(num_tokens, nullptr, weights.ffn_norm, weights.gate_up);
  const int width = config_.intermediate_size;
  matmul(weights.gate_up, num_tokens, {buffers_.wide, int64_t{2} * width, nullptr, false});
  buffers_.input.cols = width;
  for_rows(num_tokens, [&](int token, int) {
    const float* gate = buffers_.wide + int64_t{token} * 2 * width;
    kernels_.swiglu(buffers_.input.values + int64_t{token} * width, gate, gate + width, width);
    if (weights.down.is_quantized()) kernels_.quantize(buffers_.input, token);
  });
  matmul(weights.down, num_tokens, {buffers_.hidden, config_.hidden_size, nullptr, true});
}

// input[i] = norm of hidden[tokens[i]] (of hidden[i] without `tokens`), as `next` wants it.
void Engine::norm_inputs(int num_rows, const int32_t* tokens, const float* weight,
                         const Matrix& next) {
  const int width = config_.hidden_size;
  buffers_.input.cols = width;
  for_rows(num_rows, [&](int row, int) {
    const int64_t token = tokens == nullptr ? row : tokens[row];
    kernels_.rms_norm(buffers_.input.values + int64_t{row} * width,
                      buffers_.hidden + token * width, weight, width, config_.rms_norm_eps);
    if (next.is_quantized()) kernels_.quantize(buffers_.input, row);
  });
}

void Engine::quantize_inputs(int num_rows, const Matrix& next) {
  if (!next.is_quantized()) return;
  for_rows(num_rows, [&](int row, int) { kernels_.quantize(buffers_.input, row); });
}

// Norms (Qwen3) and rotates q and k in place, and writes k and v to the cache.
void Engine::cache_keys_and_values(int num_tokens, int layer) {
  const LayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
  const int head_dim = config_.head_dim;
  const auto finish = [&](float* head, const float* norm, int token) {
    if (norm != nullptr) kernels_.rms_norm(head, head, norm, head_dim, config_.rms_norm_eps);
    const int64_t first = int64_t{token} * (head_dim / 2);
    kernels_.rotate(head, buffers_.cos + first, buffers_.sin + first, head_dim);
  };
  const auto put = [&](uint8_t* base, int token, const float* head) {
    uint8_t* place = cache_.element(base, buffers_.slots[token]);
    if (cache_.dtype == kBf16) {
      kernels_.bf16_from_float(reinterpret_cast<uint16_t*>(place), head, head_dim);
    } else {
      std::memcpy(place, head, static_cast<size_t>(head_dim) * sizeof(float));
    }
  };
  for_rows(num_tokens, [&](int token, int) {
    float* q = buffers_.wide + int64_t{token} * qkv_size_;
    float *k = q + q_size_, *v = k + kv_size_;
    for (int head = 0; head < config_.num_heads; ++head) {
      finish(q + head * head_dim, weights.q_norm, token);
    }
    for (int head = 0; head < config_.num_kv_heads; ++head) {
      finish(k + head * head_dim, weights.k_norm, token);
      put(cache_.keys(layer, head), token, k + head * head_dim);
      put(cache_.values(layer, head), token, v + head * head_dim);
    }
  });
}

void Engine::attend(const FsBatch& batch, int layer) {
  const int heads_per_kv = config_.num_heads / config_.num_kv_heads;
  const int num_runs = static_cast<int>(query_runs_.size());
  buffers_.input.cols = q_size_;
  pool_.run(num_runs * config_.num_kv_heads, [&](int item, int pe) {
    const QueryRun& run = query_runs_[static_cast<size_t>(item / config_.num_kv_heads)];
    const int kv_head = item % config_.num_kv_heads;
    const int first_head = kv_head * heads_per_kv;
    AttentionTask task;
    task.q = buffers_.wide + int64_t{run.first_token} * qkv_size_ + first_head * config_.head_dim;
    task.q_stride = qkv_size_;
    task.out = buffers_.input.values + int64_t{run.first_token} * q_size_ +
               first_head * config_.head_dim;
    task.out_stride = q_size_;
    task.num_tokens = run.num_tokens;
    task.heads_per_kv = heads_per_kv;
    task.head_dim = config_.head_dim;
    task.first_position = buffers_.positions[run.first_token];
    task.sliding_window = config_.sliding_window;
    task.scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
    task.keys = cache_.keys(layer, kv_head);
    task.values = cache_.values(layer, kv_head);
    task.kv_dtype = cache_.dtype;
    task.block_ids = batch.block_ids + batch.block_offsets[run.row];
    task.block_size = cache_.block_size;
    task.block_stride = cache_.block_stride;
    task.scratch = attention_scratch_[static_cast<size_t>(pe)];
    kernels_.attention(task);
  });
}

// An item is some panels times a block of rows. Neighbouring items share panels, not rows, so that
// a panel comes from memory once.
void Engine::matmul(const Matrix& w, int num_rows, const Output& out) {
  const MatmulKernel kernel = kernels_.matmul[w.dtype];
  const int num_blocks = ceil_div(num_rows, kRowBlock);
  const int num_items = std::max(1, pool_.size() * kItemsPerPe / num_blocks);
  const int panels_per_item = ceil_div(w.num_panels, num_items);
  pool_.run(ceil_div(w.num_panels, panels_per_item) * num_blocks, [&](int item, int) {
    const int first_panel = item / num_blocks * panels_per_item;
    const int first_row = item % num_blocks * kRowBlock;
    kernel(w, first_panel, std::min(first_panel + panels_per_item, w.num_panels), buffers_.input,
           first_row, std::min(first_row + kRowBlock, num_rows), out);
  });
}

void Engine::sample(const FsBatch& batch, int first, int count, const FsResult& result) {
  pool_.run(count, [&](int i, int pe) {
    sample_errors_[static_cast<size_t>(i)] = sample_row(
        kernels_, batch, first + i, buffers_.logits + int64_t{i} * config_.vocab_size,
        config_.vocab_size, sampler_scratch_[static_cast<size_t>(pe)], result);
  });
  for (int i = 0; i < count; ++i) {
    throw_if_failed(sample_errors_[static_cast<size_t>(i)], batch.sample_rows[first + i]);
  }
}

}  // namespace furiosa

#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "activations.h"
#include "batch.h"
#include "failure.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace furiosa {

namespace {

// Fewer items than this a PE would leave PEs waiting for the last one.
constexpr int kMinItemsPerPe = 4;
// Up to so many rows, norming or quantising them takes less time than a job of its own would cost.
constexpr int kFewRows = 4;

// What was stored past the caches is not ordered by the count of finished items alone.
void order_streamed_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

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
  require(config.kv_dtype == kFp32 || config.kv_dtype == kBf16 || config.kv_dtype == kInt8,
          kInvalidConfig, "the KV cache is fp32, bf16 or int8");
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
  const auto activations = [&](int64_t cols) { return take_activations(arena, tokens, cols); };
  Buffers buffers;
  buffers.hidden = arena.take<float>(tokens * config.hidden_size);
  buffers.wide = arena.take<float>(tokens * std::max(qkv_size, 2 * config.intermediate_size));
  buffers.input = activations(std::max(config.hidden_size, q_size));
  buffers.inner = activations(config.intermediate_size);
  buffers.positions = arena.take<int32_t>(tokens);
  buffers.slots = arena.take<int64_t>(tokens);
  buffers.cos = arena.take<float>(tokens * config.head_dim / 2);
  buffers.sin = arena.take<float>(tokens * config.head_dim / 2);
  buffers.logits = arena.take<float>(kLogitsRows * logits_stride(config.vocab_size));
  buffers.partials = arena.take<float>(kMaxSharedStates * (config.head_dim + 2));
  return buffers;
}

Engine::PeScratch Engine::PeScratch::from(Arena& arena, const FsEngineConfig& config) {
  const int widest =
      std::max({config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size});
  PeScratch scratch;
  scratch.attention = arena.take<float>(attention_scratch_floats(config.head_dim));
  scratch.matmul = arena.take<uint8_t>(matmul_scratch_nbytes(widest));
  scratch.stretch = arena.take<float>(2 * kMaxMatmulRows * kWidestStretch);
  scratch.likeliest = arena.take<Likeliest>(config.max_num_batched_tokens);
  scratch.sampler = SamplerScratch::from(arena, config.vocab_size);
  return scratch;
}

Engine::Engine(const FsEngineConfig& config, const KernelTable& kernels)
    : config_(checked(config)),
      kernels_(kernels),
      weights_(Weights::from(config_)),
      q_size_(config_.num_heads * config_.head_dim),
      kv_size_(config_.num_kv_heads * config_.head_dim),
      qkv_size_(q_size_ + 2 * kv_size_),
      pool_(cpus_of(config_)),
      cache_(config_, kernels_),
      memory_([this] {
        Arena arena(nullptr);
        Buffers::from(arena, config_);
        for (int pe = 0; pe < config_.num_pes; ++pe) PeScratch::from(arena, config_);
        return arena.nbytes();
      }()) {
  Arena arena(memory_.data());
  buffers_ = Buffers::from(arena, config_);
  for (int pe = 0; pe < config_.num_pes; ++pe) {
    scratch_.push_back(PeScratch::from(arena, config_));
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
  if (batch.num_samples == 0) return;
  if (result == nullptr) {
    norm_inputs(0, batch.num_samples, weights_.final_norm, weights_.lm_head);
    matmul(weights_.lm_head, buffers_.input, batch.num_samples,
           {logits, config_.vocab_size, nullptr, false});
  } else {
    sample(batch, *result);
  }
}

// On return the rows of the residual stream are those of the sampled tokens, in their order.
void Engine::forward(const FsBatch& batch) {
  set_num_rows(batch.num_tokens);
  if (num_rows_ == 0) return;
  locate_tokens(batch);
  plan_attention(batch);
  embed(batch);
  const LayerWeights& first = weights_.layers[0];
  norm_inputs(0, num_rows_, first.attn_norm, first.qkv);
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    attention_block(batch, layer);
    if (num_rows_ == 0) return;  // no token is sampled: the cache is what the step was for
    feed_forward_block(layer);
  }
}

void Engine::set_num_rows(int num_rows) {
  num_rows_ = buffers_.input.num_rows = buffers_.inner.num_rows = num_rows;
}

void Engine::locate_tokens(const FsBatch& batch) {
  for (int row = 0; row < batch.num_rows; ++row) {
    const int32_t* blocks = batch.block_ids + batch.block_offsets[row];
    for (int token = batch.row_offsets[row]; token < batch.row_offsets[row + 1]; ++token) {
      const int position = batch.context_lens[row] + token - batch.row_offsets[row];
      buffers_.positions[token] = position;
      buffers_.slots[token] =
          int64_t{blocks[position / cache_.block_size]} * cache_.block_size +
          position % cache_.block_size;
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

void Engine::embed(const FsBatch& batch) {
  for_rows(batch.num_tokens, [&](int token, int) {
    unpack_row(weights_.embed, batch.token_ids[token],
               buffers_.hidden + int64_t{token} * config_.hidden_size);
  });
}

// `input` holds the normed rows already; on return it holds those of the feed-forward block.
//
// Where each row is one run, the PE that attends to it caches its keys first; where a run needs the
// keys of another, or a context is shared out, caching is a job of its own. So it is in the last
// layer of a step that does not sample all tokens: the others are done with once they are cached.
void Engine::attention_block(const FsBatch& batch, int layer) {
  const LayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
  matmul(weights.qkv, buffers_.input, num_rows_,
         {buffers_.wide, qkv_size_, weights.qkv_bias, false});
  const bool is_narrowed = layer + 1 == config_.num_layers && batch.num_samples < num_rows_;
  const bool is_cached_first = is_narrowed || !is_one_run_a_row_ || is_shared_out_;
  if (is_cached_first) {
    for_rows(num_rows_, [&](int token, int) {
      for (int head = 0; head < config_.num_kv_heads; ++head) cache_tokens(layer, token, 1, head);
    });
  }
  if (is_narrowed) {
    keep_sampled(batch);
    if (num_rows_ == 0) return;
  }
  attend(batch, layer, !is_cached_first);
  matmul_and_norm(weights.o, buffers_.input, num_rows_,
                  {buffers_.hidden, config_.hidden_size, nullptr, true}, weights.ffn_norm,
                  weights.gate_up);
}

// The rows of the residual stream, and of q, become those of the sampled tokens. Each stays or moves
// to the front, for sampled rows ascend; so none overwrites one that is still to be moved.
void Engine::keep_sampled(const FsBatch& batch) {
  set_num_rows(batch.num_samples);
  for (int i = 0; i < num_rows_; ++i) {
    const int token = batch.row_offsets[batch.sample_rows[i] + 1] - 1;
    const auto keep = [&](float* rows, int64_t width) {
      std::memmove(rows + i * width, rows + token * width,
                   static_cast<size_t>(width) * sizeof(float));
    };
    keep(buffers_.hidden, config_.hidden_size);
    keep(buffers_.wide, qkv_size_);
    buffers_.positions[i] = buffers_.positions[token];
  }
  plan_attention_of_sampled(batch);
}

// Likewise; on return `input` holds the rows of the next layer, if there is one.
void Engine::feed_forward_block(int layer) {
  const LayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
  gate_up(num_rows_, weights);
  const Output out{buffers_.hidden, config_.hidden_size, nullptr, true};
  if (layer + 1 == config_.num_layers) {
    matmul(weights.down, buffers_.inner, num_rows_, out);
  } else {
    const LayerWeights& next = weights_.layers[static_cast<size_t>(layer) + 1];
    matmul_and_norm(weights.down, buffers_.inner, num_rows_, out, next.attn_norm, next.qkv);
  }
}

// input[i] = norm of hidden[first + i], as `next` wants it.
void Engine::norm_inputs(int first, int num_rows, const float* weight, const Matrix& next) {
  buffers_.input.cols = config_.hidden_size;
  buffers_.input.num_rows = num_rows;
  for_rows(num_rows, [&](int row, int) { norm_row(row, first + row, weight, next); });
}

// input[row] = norm of hidden[from], as `next` wants it.
void Engine::norm_row(int row, int64_t from, const float* weight, const Matrix& next) {
  const int width = config_.hidden_size;
  kernels_.rms_norm(buffers_.input.values + int64_t{row} * width, buffers_.hidden + from * width,
                    weight, width, config_.rms_norm_eps);
  if (next.rounds_inputs()) quantize(buffers_.input, next, row, 0, width);
}

void Engine::quantize(const Activations& x, const Matrix& next, int row, int col_begin,
                      int col_end) {
  kernels_.quantize(x.values + int64_t{row} * x.cols + col_begin, x, next, row, col_begin, col_end);
}

// inner = silu(gate) * up, as `down` wants it. Gate and up go through a small buffer, a stretch of
// columns at a time, unless up's rows do not begin with a panel. Stretches are whole groups, and
// quantised at once, but where that makes too few of them for the PEs.
void Engine::gate_up(int num_rows, const LayerWeights& weights) {
  const int width = config_.intermediate_size;
  const Matrix& w = weights.gate_up;
  const bool is_rounded = weights.down.rounds_inputs();
  const int group = weights.down.scale_group;
  if (width % group != 0) {
    matmul(w, buffers_.input, num_rows, {buffers_.wide, int64_t{2} * width, nullptr, false});
    for_rows(num_rows, [&](int row, int) {
      const float* gate = buffers_.wide + int64_t{row} * 2 * width;
      kernels_.swiglu(buffers_.inner.values + int64_t{row} * width, gate, gate + width, width);
      if (is_rounded) quantize(buffers_.inner, weights.down, row, 0, width);
    });
    return;
  }
  const MatmulKernel kernel = kernels_.matmul[w.dtype];
  const int block_rows = rows_per_block(num_rows), num_blocks = ceil_div(num_rows, block_rows);
  const bool is_quantized_later = is_rounded && width / group * num_blocks < pool_.size() * kMinItemsPerPe;
  const bool is_quantized_here = is_rounded && !is_quantized_later;
  const int unit = is_quantized_later ? kGroupSize : group;
  const int num_stretches = std::max(1, pool_.size() * kItemsPerPe / num_blocks);
  const int most_units = std::max(1, kStretch / unit);
  const int stretch = std::min(ceil_div(width / unit, num_stretches), most_units) * unit;
  const auto body = [&](int item, int pe) {
    const PeScratch& scratch = scratch_[static_cast<size_t>(pe)];
    const int begin = item / num_blocks * stretch, end = std::min(begin + stretch, width);
    const int first_row = item % num_blocks * block_rows;
    const int end_row = std::min(first_row + block_rows, num_rows);
    const int panel = begin / kPanelRows, num_panels = (end - begin) / kPanelRows;
    float* parts[2];
    for (int part = 0; part < 2; ++part) {
      parts[part] = scratch.stretch + part * kMaxMatmulRows * kWidestStretch;
      const int first = part * (width / kPanelRows) + panel;
      // Outputs are addressed from W's row 0 and the step's row 0.
      float* origin = parts[part] - int64_t{first} * kPanelRows - int64_t{first_row} * stretch;
      kernel(w, first, first + num_panels, buffers_.input, first_row, end_row,
             {origin, stretch, nullptr, false}, scratch.matmul);
    }
    for (int row = first_row; row < end_row; ++row) {
      const int64_t place = int64_t{row - first_row} * stretch;
      float* gate = parts[0] + place;
      float* product =
          is_quantized_here ? gate : buffers_.inner.values + int64_t{row} * width + begin;
      kernels_.swiglu(product, gate, parts[1] + place, end - begin);
      if (is_quantized_here) {
        kernels_.quantize(product, buffers_.inner, weights.down, row, begin, end);
      }
    }
  };
  const int num_items = ceil_div(width, stretch) * num_blocks;
  const auto quantize_row = [&](int row, int) { quantize(buffers_.inner, weights.down, row, 0, width); };
  if (is_quantized_later && num_rows <= kFewRows) {
    pool_.run(num_items, body, [&] {
      for (int row = 0; row < num_rows; ++row) quantize_row(row, 0);
    });
    return;
  }
  pool_.run(num_items, body);
  if (is_quantized_later) for_rows(num_rows, quantize_row);
}

template <class Finish>
void Engine::run_matmul(const Matrix& w, const Activations& x, int num_rows, const Output& out,
                        const Finish& finish) {
  const MatmulKernel kernel = kernels_.matmul[w.dtype];
  const MatmulCut cut(w, num_rows, pool_.size());
  const auto body = [&](int item, int pe) {
    const MatmulCut::Part part = cut.part(item);
    kernel(w, part.panel_begin, part.panel_end, x, part.row_begin, part.row_end, out,
           scratch_[static_cast<size_t>(pe)].matmul);
    if (out.is_streamed) order_streamed_stores();
  };
  pool_.run(cut.num_items, body, finish);
}

void Engine::matmul(const Matrix& w, const Activations& x, int num_rows, const Output& out) {
  run_matmul(w, x, num_rows, out, ThreadPool::NoFinish());
}

void Engine::matmul_and_norm(const Matrix& w, const Activations& x, int num_rows,
                             const Output& out, const float* norm, const Matrix& next) {
  if (num_rows > kFewRows) {
    matmul(w, x, num_rows, out);
    norm_inputs(0, num_rows, norm, next);
    return;
  }
  run_matmul(w, x, num_rows, out, [&] {
    buffers_.input.cols = config_.hidden_size;
    for (int row = 0; row < num_rows; ++row) norm_row(row, row, norm, next);
  });
}

}  // namespace furiosa

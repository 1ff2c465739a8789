// The model, its cache and its threads: one whole step in one call.
//
// A layer is a dozen jobs for the pool (norm + quantise, QKV, rotate + KV write, attention, ...).
// Jobs cut their work over rows, heads and output panels and never over a sum, so that neither the
// number of PEs nor the batch changes a bit. All memory is reserved when the engine is made; a step
// allocates nothing.
#pragma once

#include <vector>

#include "api.h"
#include "kernel_table.h"
#include "kv_cache.h"
#include "mapped_memory.h"
#include "sampler.h"
#include "thread_pool.h"
#include "weights.h"

namespace furiosa {

class Engine {
 public:
  // Throws Failure, std::bad_alloc or std::system_error.
  Engine(const FsEngineConfig& config, const KernelTable& kernels);

  // Exactly one of `result` and `logits` (num_samples, vocab) is given. Throws Failure; a step that
  // fails with kInvalidBatch has not touched the cache.
  void step(const FsBatch& batch, const FsResult* result, float* logits);

 private:
  // Buffers for `max_num_batched_tokens` rows, in one mapping; pages come as they are touched.
  struct Buffers {
    float* hidden;          // (tokens, hidden): the residual stream
    float* wide;            // (tokens, max(qkv, 2 intermediate)): outputs of the widening matmuls
    Activations input;      // left operand of the next matmul, at most (tokens, widest input)
    int32_t* positions;     // (tokens,)
    int64_t* slots;         // (tokens,) element offset of the token in a layer's head
    float *cos, *sin;       // (tokens, head_dim / 2)
    int32_t* sampled;       // (kLogitsRows,) token indices of the rows being sampled
    float* logits;          // (kLogitsRows, vocab)

    static Buffers from(Arena& arena, const FsEngineConfig& config);
  };
  // A run of query tokens of one row, all heads of one KV head: the unit of attention.
  struct QueryRun {
    int row, first_token, num_tokens;
  };

  void forward(const FsBatch& batch);
  void locate_tokens(const FsBatch& batch);
  void plan_attention(const FsBatch& batch);
  void embed(const FsBatch& batch);
  void attention_block(const FsBatch& batch, int layer);
  void feed_forward_block(int num_tokens, int layer);
  void norm_inputs(int num_rows, const int32_t* tokens, const float* weight, const Matrix& next);
  void quantize_inputs(int num_rows, const Matrix& next);
  void cache_keys_and_values(int num_tokens, int layer);
  void attend(const FsBatch& batch, int layer);
  void matmul(const Matrix& w, int num_rows, const Output& out);
  void sample(const FsBatch& batch, int first, int count, const FsResult& result);

  // Runs body(row, pe) for each row, several rows to an item.
  template <class Body>
  void for_rows(int num_rows, const Body& body);

  const FsEngineConfig config_;
  const KernelTable& kernels_;
  const Weights weights_;
  const int q_size_, kv_size_, qkv_size_;
  ThreadPool pool_;
  const KvCache cache_;
  const MappedMemory memory_;
  Buffers buffers_;
  std::vector<float*> attention_scratch_;    // one per PE
  std::vector<SamplerScratch> sampler_scratch_;
  std::vector<QueryRun> query_runs_;         // reserved for the worst case
  std::vector<SampleError> sample_errors_;   // (kLogitsRows,)
};

}  // namespace furiosa

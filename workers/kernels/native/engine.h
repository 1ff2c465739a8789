// The model, its cache and its threads: one whole step in one call.
//
// A layer is a few jobs for the pool: QKV; rotate, KV write and attention; output projection; gate,
// up and SwiGLU; down. What follows per row (norm, quantise) is done by the producer where it has
// the whole row or group, else by a job of its own; the values are the same. Jobs cut their work
// over rows, heads and output panels and never over a sum, so that neither the number of PEs nor
// the batch changes a bit. All memory is reserved when the engine is made; a step allocates none.
#pragma once

#include <algorithm>
#include <vector>

#include "api.h"
#include "kernel_table.h"
#include "kv_cache.h"
#include "mapped_memory.h"
#include "matmul_cut.h"
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
  // Columns of gate and up, or tokens' logits, that are multiplied and used in one go, at most; of gate and
  // up, or as many as share a scale.
  static constexpr int kStretch = 128, kWidestStretch = std::max(kStretch, kMaxScaleGroup);
  // Where logits are kept, LM head and sampling run on this many rows at a time, which bounds the memory.
  static constexpr int kLogitsRows = 64;
  // Floats from one row of logits to the next.
  static constexpr int64_t logits_stride(int64_t vocab_size) { return (vocab_size + 15) / 16 * 16; }
  // States of one query that shared-out contexts may have: 2^18 positions of 64 query heads.
  static constexpr int64_t kMaxSharedStates = 65536;

  // Buffers for `max_num_batched_tokens` rows, in one mapping; pages come as they are touched.
  struct Buffers {
    float* hidden;          // (tokens, hidden): the residual stream
    float* wide;            // (tokens, max(qkv, 2 intermediate)): outputs of the widening matmuls
    Activations input;      // left operand of QKV, output and gate-up: (tokens, max(hidden, q))
    Activations inner;      // left operand of down: (tokens, intermediate)
    int32_t* positions;     // (tokens,)
    int64_t* slots;         // (tokens,) block id * block_size + offset in the block
    float *cos, *sin;       // (tokens, head_dim / 2)
    float* logits;          // (kLogitsRows, vocab)
    float* partials;        // (kMaxSharedStates, head_dim + 2): of contexts that are shared out

    static Buffers from(Arena& arena, const FsEngineConfig& config);
  };
  // Working memory of one PE; aligned, since each writes to its own with every attention task.
  struct alignas(64) PeScratch {
    float* attention;
    void* matmul;
    float* stretch;        // (2, kMaxMatmulRows, up to kWidestStretch): gate and up, or logits
    Likeliest* likeliest;  // (tokens,): of the logits that this PE has seen
    SamplerScratch sampler;
    int fetched_task = -1;  // of attention, whose context this PE has begun to fetch

    static PeScratch from(Arena& arena, const FsEngineConfig& config);
  };
  // A run of query tokens of one row: with one KV head, the unit of attention.
  struct QueryRun {
    int row, first_token, num_tokens;
    int num_parts;        // 1; or the partitions of its context, each a task of its own
    int first_partition;  // num_parts > 1: the first of them ...
    int64_t first_state;  // ... and its place in `partials`, in states of one query
    int first_task;       // of num_parts * num_kv_heads
  };
  // What one task of attention is of its run.
  struct AttentionPart {
    const QueryRun& run;
    int index, kv_head;  // index: of num_parts
  };

  void forward(const FsBatch& batch);
  void set_num_rows(int num_rows);
  void locate_tokens(const FsBatch& batch);
  void plan_attention(const FsBatch& batch);
  void plan_attention_of_sampled(const FsBatch& batch);
  void plan_tasks();
  void share_out(QueryRun& run, int64_t* num_states) const;
  void embed(const FsBatch& batch);
  void attention_block(const FsBatch& batch, int layer);
  void keep_sampled(const FsBatch& batch);
  void feed_forward_block(int layer);
  void norm_inputs(int first, int num_rows, const float* weight, const Matrix& next);
  void norm_row(int row, int64_t from, const float* weight, const Matrix& next);
  void cache_tokens(int layer, int first_token, int num_tokens, int kv_head);
  void attend(const FsBatch& batch, int layer, bool caches);
  AttentionPart part_of(int task) const;
  void attend_part(const FsBatch& batch, int layer, int task_index, const AttentionPart& part,
                   int pe);
  Context context_of(const FsBatch& batch, int layer, const AttentionPart& part) const;
  void merge_parts(const Matrix& next);
  float* states_of(const QueryRun& run, int kv_head) const;
  bool are_heads_whole_groups(const Matrix& next) const;
  void quantize_heads(const QueryRun& run, int kv_head, const Matrix& next);
  // The row's columns from its values, as `next` wants them.
  void quantize(const Activations& x, const Matrix& next, int row, int col_begin, int col_end);
  void gate_up(int num_rows, const LayerWeights& weights);
  void matmul(const Matrix& w, const Activations& x, int num_rows, const Output& out);
  // The same, then the norm of all rows of the residual stream, for `next`.
  void matmul_and_norm(const Matrix& w, const Activations& x, int num_rows, const Output& out,
                       const float* norm, const Matrix& next);
  void sample(const FsBatch& batch, const FsResult& result);
  void sample_rows(const FsBatch& batch, int first, int count, const FsResult& result);
  void take_likeliest(const FsBatch& batch, const FsResult& result);

  // Runs body(row, pe) for each row, several rows to an item.
  template <class Body>
  void for_rows(int num_rows, const Body& body);
  template <class Finish>
  void run_matmul(const Matrix& w, const Activations& x, int num_rows, const Output& out,
                  const Finish& finish);

  const FsEngineConfig config_;
  const KernelTable& kernels_;
  const Weights weights_;
  const int q_size_, kv_size_, qkv_size_;
  ThreadPool pool_;
  const KvCache cache_;
  const MappedMemory memory_;
  Buffers buffers_;
  std::vector<PeScratch> scratch_;           // one per PE
  int num_rows_ = 0;                         // of the residual stream: tokens, at last samples
  std::vector<QueryRun> query_runs_;         // reserved for the worst case
  bool is_one_run_a_row_ = true;             // of the step's rows
  bool is_shared_out_ = false;               // some run has several parts
  int num_tasks_ = 0;
  std::vector<SampleError> sample_errors_;   // (kLogitsRows,)
};

template <class Body>
void Engine::for_rows(int num_rows, const Body& body) {
  const int num_items = std::min(num_rows, pool_.size() * kItemsPerPe);
  const int rows_per_item = num_items == 0 ? 1 : (num_rows + num_items - 1) / num_items;
  pool_.run((num_rows + rows_per_item - 1) / rows_per_item, [&](int item, int pe) {
    const int end = std::min((item + 1) * rows_per_item, num_rows);
    for (int row = item * rows_per_item; row < end; ++row) body(row, pe);
  });
}

}  // namespace furiosa

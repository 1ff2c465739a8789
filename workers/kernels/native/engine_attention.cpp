// The attention of Engine: which tasks a step has, and from q, k and v to the heads' output.
#include <algorithm>
#include <cmath>

#include "engine.h"

namespace furiosa {

namespace {

// Contexts are shared out when a step's attention would otherwise have fewer tasks than this a PE.
constexpr int kMinTasksPerPe = 4;

}  // namespace

void Engine::plan_attention(const FsBatch& batch) {
  const int heads_per_kv = config_.num_heads / config_.num_kv_heads;
  const int max_run = std::max(1, kMaxQueries / heads_per_kv);
  query_runs_.clear();
  is_one_run_a_row_ = true;
  for (int row = 0; row < batch.num_rows; ++row) {
    const int end = batch.row_offsets[row + 1];
    is_one_run_a_row_ = is_one_run_a_row_ && end - batch.row_offsets[row] <= max_run;
    for (int token = batch.row_offsets[row]; token < end; token += max_run) {
      query_runs_.push_back({row, token, std::min(max_run, end - token), 1, 0, 0, 0});
    }
  }
  plan_tasks();
}

// Of a step whose rows are the sampled tokens by now.
void Engine::plan_attention_of_sampled(const FsBatch& batch) {
  query_runs_.clear();
  for (int i = 0; i < batch.num_samples; ++i) {
    query_runs_.push_back({batch.sample_rows[i], i, 1, 1, 0, 0, 0});
  }
  plan_tasks();
}

// Shares contexts out if need be, and numbers the tasks of all runs.
void Engine::plan_tasks() {
  const int num_tasks = static_cast<int>(query_runs_.size()) * config_.num_kv_heads;
  const bool is_short_of_tasks = pool_.size() > 1 && num_tasks < pool_.size() * kMinTasksPerPe;
  int64_t num_states = 0;
  num_tasks_ = 0;
  for (QueryRun& run : query_runs_) {
    if (is_short_of_tasks) share_out(run, &num_states);
    run.first_task = num_tasks_;
    num_tasks_ += run.num_parts * config_.num_kv_heads;
  }
  is_shared_out_ = num_states > 0;
}

// Makes a part of each partition that the run's context has.
void Engine::share_out(QueryRun& run, int64_t* num_states) const {
  const int position = buffers_.positions[run.first_token], window = config_.sliding_window;
  const int begin = window > 0 && position >= window ? position - window + 1 : 0;
  const int end = position + run.num_tokens;
  const int first_partition = begin / kPartitionSize;
  const int num_parts = (end + kPartitionSize - 1) / kPartitionSize - first_partition;
  const int64_t states = int64_t{num_parts} * run.num_tokens * config_.num_heads;
  if (num_parts == 1 || *num_states + states > kMaxSharedStates) return;
  run.num_parts = num_parts;
  run.first_partition = first_partition;
  run.first_state = *num_states;
  *num_states += states;
}

// Norms (Qwen3) and rotates k of one head and q of its query heads, in place, and writes k and v to
// the cache.
void Engine::cache_tokens(int layer, int first_token, int num_tokens, int kv_head) {
  const LayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
  const int head_dim = config_.head_dim, heads_per_kv = config_.num_heads / config_.num_kv_heads;
  for (int token = first_token; token < first_token + num_tokens; ++token) {
    const int64_t angle = int64_t{token} * (head_dim / 2);
    const auto finish = [&](float* head, const float* norm) {
      if (norm != nullptr) kernels_.rms_norm(head, head, norm, head_dim, config_.rms_norm_eps);
      kernels_.rotate(head, buffers_.cos + angle, buffers_.sin + angle, head_dim);
    };
    float* row = buffers_.wide + int64_t{token} * qkv_size_;
    float* q = row + kv_head * heads_per_kv * head_dim;
    float* k = row + q_size_ + kv_head * head_dim;
    for (int head = 0; head < heads_per_kv; ++head) finish(q + head * head_dim, weights.q_norm);
    finish(k, weights.k_norm);
    cache_.put_key(layer, kv_head, buffers_.slots[token], k, kernels_);
    cache_.put_value(layer, kv_head, buffers_.slots[token], k + kv_size_, kernels_);
  }
}

// From q in `wide` to the attention's output in `input`, as the output projection wants it.
//   caches: k and v are in `wide`, too, and not in the cache yet.
void Engine::attend(const FsBatch& batch, int layer, bool caches) {
  const Matrix& next = weights_.layers[static_cast<size_t>(layer)].o;
  buffers_.input.cols = q_size_;
  for (PeScratch& scratch : scratch_) scratch.fetched_task = -1;
  pool_.run(num_tasks_, [&](int task, int pe) {
    const AttentionPart part = part_of(task);
    const QueryRun& run = part.run;
    if (caches) cache_tokens(layer, run.first_token, run.num_tokens, part.kv_head);
    attend_part(batch, layer, task, part, pe);
    if (run.num_parts == 1) quantize_heads(run, part.kv_head, next);
  });
  if (is_shared_out_) merge_parts(next);
  if (!are_heads_whole_groups(next) && next.rounds_inputs()) {
    for_rows(num_rows_, [&](int row, int) {
      quantize(buffers_.input, next, row, 0, q_size_);
    });
  }
}

Engine::AttentionPart Engine::part_of(int task) const {
  const auto after = std::upper_bound(
      query_runs_.begin(), query_runs_.end(), task,
      [](int value, const QueryRun& run) { return value < run.first_task; });
  const QueryRun& run = *(after - 1);
  const int place = task - run.first_task;
  return {run, place / config_.num_kv_heads, place % config_.num_kv_heads};
}

// What of its sequence a part attends to.
Context Engine::context_of(const FsBatch& batch, int layer, const AttentionPart& part) const {
  const QueryRun& run = part.run;
  const int position = buffers_.positions[run.first_token], window = config_.sliding_window;
  Context context = cache_.context(layer, part.kv_head, batch.block_ids + batch.block_offsets[run.row],
                                   window > 0 && position >= window ? position - window + 1 : 0,
                                   position + run.num_tokens);
  if (run.num_parts > 1) {
    const int first = (run.first_partition + part.index) * kPartitionSize;
    context.begin = std::max(context.begin, first);
    context.end = std::min(context.end, first + kPartitionSize);
  }
  return context;
}

// Where the states of a shared-out run's queries begin, for one KV head: (parts, queries).
float* Engine::states_of(const QueryRun& run, int kv_head) const {
  const int num_queries = run.num_tokens * (config_.num_heads / config_.num_kv_heads);
  const int64_t first = run.first_state + int64_t{kv_head} * run.num_parts * num_queries;
  return buffers_.partials + first * (config_.head_dim + 2);
}

void Engine::attend_part(const FsBatch& batch, int layer, int task_index, const AttentionPart& part,
                         int pe) {
  const QueryRun& run = part.run;
  const int kv_head = part.kv_head;
  PeScratch& scratch = scratch_[static_cast<size_t>(pe)];
  const int heads_per_kv = config_.num_heads / config_.num_kv_heads;
  const int head_dim = config_.head_dim, first_head = kv_head * heads_per_kv;
  AttentionTask task = cache_.task(layer, kv_head);
  task.q = buffers_.wide + int64_t{run.first_token} * qkv_size_ + first_head * head_dim;
  task.q_stride = qkv_size_;
  task.out = buffers_.input.values + int64_t{run.first_token} * q_size_ + first_head * head_dim;
  task.out_stride = q_size_;
  task.num_tokens = run.num_tokens;
  task.heads_per_kv = heads_per_kv;
  task.first_position = buffers_.positions[run.first_token];
  task.sliding_window = config_.sliding_window;
  task.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  task.block_ids = batch.block_ids + batch.block_offsets[run.row];
  task.partition_begin = run.first_partition + part.index;
  task.partition_end = task.partition_begin + 1;
  task.partials = nullptr;
  if (run.num_parts > 1) {
    const int64_t state = int64_t{part.index} * run.num_tokens * heads_per_kv;
    task.partials = states_of(run, kv_head) + state * (head_dim + 2);
  }
  task.is_fetched = scratch.fetched_task == task_index;
  // A PE takes its tasks in order, but for those that it takes over from another.
  if (task_index + 1 < num_tasks_) {
    task.next = context_of(batch, layer, part_of(task_index + 1));
    scratch.fetched_task = task_index + 1;
  }
  task.scratch = scratch.attention;
  kernels_.attention(task);
}

void Engine::merge_parts(const Matrix& next) {
  const int num_kv_heads = config_.num_kv_heads, head_dim = config_.head_dim;
  const int heads_per_kv = config_.num_heads / num_kv_heads;
  pool_.run(static_cast<int>(query_runs_.size()) * num_kv_heads, [&](int item, int pe) {
    const QueryRun& run = query_runs_[static_cast<size_t>(item / num_kv_heads)];
    if (run.num_parts == 1) return;
    const int kv_head = item % num_kv_heads, num_queries = run.num_tokens * heads_per_kv;
    const float* states = states_of(run, kv_head);
    for (int query = 0; query < num_queries; ++query) {
      const int token = run.first_token + query / heads_per_kv;
      const int head = kv_head * heads_per_kv + query % heads_per_kv;
      kernels_.merge_attention(buffers_.input.values + int64_t{token} * q_size_ + head * head_dim,
                               states + query * (head_dim + 2),
                               int64_t{num_queries} * (head_dim + 2), run.num_parts, head_dim,
                               scratch_[static_cast<size_t>(pe)].attention);
    }
    quantize_heads(run, kv_head, next);
  });
}

bool Engine::are_heads_whole_groups(const Matrix& next) const {
  return q_size_ / config_.num_kv_heads % next.scale_group == 0;
}

void Engine::quantize_heads(const QueryRun& run, int kv_head, const Matrix& next) {
  if (!next.rounds_inputs() || !are_heads_whole_groups(next)) return;
  const int width = q_size_ / config_.num_kv_heads;
  for (int token = run.first_token; token < run.first_token + run.num_tokens; ++token) {
    quantize(buffers_.input, next, token, kv_head * width, (kv_head + 1) * width);
  }
}

}  // namespace furiosa

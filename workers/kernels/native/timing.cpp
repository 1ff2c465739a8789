// Kernels timed by themselves, on the PEs and with the cut that a step gives them: for
// benchmarks/kernels.py.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "activations.h"
#include "api.h"
#include "guarded.h"
#include "kernel_table.h"
#include "kv_cache.h"
#include "mapped_memory.h"
#include "matmul_cut.h"
#include "thread_pool.h"

using namespace furiosa;

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Seconds of one call in the fastest of several passes that take `min_seconds` together; a pass is
// `num_calls` calls, so that each matrix or layer is used once and leaves the cache again.
template <class Body>
double best_seconds(int num_calls, double min_seconds, const Body& body) {
  const auto pass = [&] {
    const auto start = Clock::now();
    for (int call = 0; call < num_calls; ++call) body(call);
    return seconds_since(start) / num_calls;
  };
  pass();
  double best = pass();
  for (const auto start = Clock::now(); seconds_since(start) < min_seconds;) {
    best = std::min(best, pass());
  }
  return best;
}

// Values of about unit size without a pattern that matters to any kernel.
void fill(float* values, int64_t count) {
  uint32_t state = 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    values[i] = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
  }
}

}  // namespace

int32_t fs_time_matmul(const char* isa, const FsTensor* weights, int32_t num_weights,
                       int32_t num_rows, int32_t num_pes, double min_seconds, double* seconds,
                       FsMessage* message) {
  return guarded(message, [&] {
    const KernelTable& kernels = kernel_table_named(isa);
    std::vector<Matrix> matrices;
    for (int i = 0; i < num_weights; ++i) {
      matrices.push_back(matrix_from(weights[i], "weights", weights[0].rows, weights[0].cols));
    }
    const Matrix& first = matrices[0];
    const auto layout = [&](Arena& arena, Activations* x, float** y, uint8_t** scratch) {
      *x = take_activations(arena, num_rows, first.cols);
      *y = arena.take<float>(int64_t{num_rows} * first.rows);
      *scratch = arena.take<uint8_t>(matmul_scratch_nbytes(first.cols) * num_pes);
    };
    Activations x;
    float* y;
    uint8_t* scratch;
    Arena sizes(nullptr);
    layout(sizes, &x, &y, &scratch);
    const MappedMemory memory(sizes.nbytes());
    Arena arena(memory.data());
    layout(arena, &x, &y, &scratch);
    fill(x.values, int64_t{num_rows} * first.cols);
    for (int row = 0; row < num_rows && first.rounds_inputs(); ++row) {
      kernels.quantize(x.values + int64_t{row} * first.cols, x, first, row, 0, first.cols);
    }

    ThreadPool pool(std::vector<std::vector<int>>(static_cast<size_t>(num_pes)));
    const MatmulCut cut(first, num_rows, num_pes);
    const int64_t scratch_nbytes = matmul_scratch_nbytes(first.cols);
    *seconds = best_seconds(num_weights, min_seconds, [&](int call) {
      const Matrix& w = matrices[static_cast<size_t>(call)];
      pool.run(cut.num_items, [&](int item, int pe) {
        const MatmulCut::Part part = cut.part(item);
        kernels.matmul[w.dtype](w, part.panel_begin, part.panel_end, x, part.row_begin,
                                part.row_end, {y, w.rows, nullptr, false},
                                scratch + pe * scratch_nbytes);
      });
    });
  });
}

int32_t fs_time_attention(const char* isa, const FsEngineConfig* config, int32_t num_sequences,
                          int32_t num_tokens, double min_seconds, double* seconds,
                          FsMessage* message) {
  return guarded(message, [&] {
    const KernelTable& kernels = kernel_table_named(isa);
    const KvCache cache(*config, kernels);
    const int head_dim = config->head_dim, heads = config->num_heads / config->num_kv_heads;
    const int num_blocks = config->num_blocks / num_sequences;
    const int context = num_blocks * config->block_size;
    const int run = std::max(1, kMaxQueries / heads);
    const int num_runs = (num_tokens + run - 1) / run;
    const int64_t row_size = int64_t{config->num_heads} * head_dim;
    std::vector<float> head(static_cast<size_t>(head_dim));
    std::vector<int32_t> blocks(static_cast<size_t>(config->num_blocks));
    fill(head.data(), head_dim);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int32_t>(i);
    for (int layer = 0; layer < config->num_layers; ++layer) {
      for (int kv_head = 0; kv_head < config->num_kv_heads; ++kv_head) {
        for (int slot = 0; slot < config->num_blocks * config->block_size; ++slot) {
          head[static_cast<size_t>(slot % head_dim)] *= -1.0f;
          cache.put_key(layer, kv_head, slot, head.data(), kernels);
          cache.put_value(layer, kv_head, slot, head.data(), kernels);
        }
      }
    }
    const int64_t scratch_floats = attention_scratch_floats(head_dim);
    const int64_t num_values = int64_t{num_sequences} * num_tokens * row_size;
    const MappedMemory memory((2 * num_values + scratch_floats * config->num_pes) * 4 + 64);
    float* q = reinterpret_cast<float*>(memory.data());
    float* scratch = q + (2 * num_values + 15) / 16 * 16;
    fill(q, num_values);

    ThreadPool pool(std::vector<std::vector<int>>(static_cast<size_t>(config->num_pes)));
    *seconds = best_seconds(config->num_layers, min_seconds, [&](int layer) {
      const int num_items = num_sequences * num_runs * config->num_kv_heads;
      pool.run(num_items, [&](int item, int pe) {
        const int kv_head = item % config->num_kv_heads;
        const int first = item / config->num_kv_heads % num_runs * run;
        const int sequence = item / config->num_kv_heads / num_runs;
        const int64_t place = (int64_t{sequence} * num_tokens + first) * row_size +
                              int64_t{kv_head} * heads * head_dim;
        AttentionTask task = cache.task(layer, kv_head);
        task.q = q + place, task.out = q + num_values + place;
        task.q_stride = task.out_stride = row_size;
        task.num_tokens = std::min(run, num_tokens - first);
        task.heads_per_kv = heads;
        task.first_position = context - num_tokens + first;
        task.sliding_window = 0;
        task.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
        task.block_ids = blocks.data() + int64_t{sequence} * num_blocks;
        task.partials = nullptr;
        task.scratch = scratch + pe * scratch_floats;
        task.is_fetched = item > 0;
        if (item + 1 < num_items) {
          const int next_head = (item + 1) % config->num_kv_heads;
          const int next_sequence = (item + 1) / config->num_kv_heads / num_runs;
          const int32_t* next_ids = blocks.data() + int64_t{next_sequence} * num_blocks;
          task.next = cache.context(layer, next_head, next_ids, 0, context);
        }
        kernels.attention(task);
      });
    });
  });
}

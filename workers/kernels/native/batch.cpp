#include "batch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "failure.h"

namespace furiosa {

namespace {

Failure invalid(const std::string& message) { return Failure{kInvalidBatch, message}; }

// offsets (count + 1,) start at 0, never fall, and end at `total` (or within it, if at_most).
void check_offsets(const char* name, const int32_t* offsets, int32_t count, int64_t total,
                   bool at_most) {
  if (offsets[0] != 0) throw invalid(std::string(name) + " does not start at 0");
  for (int32_t i = 0; i < count; ++i) {
    if (offsets[i + 1] < offsets[i]) {
      throw invalid(std::string(name) + " falls at index " + std::to_string(i + 1));
    }
  }
  const int64_t last = offsets[count];
  if (last > total || (!at_most && last != total)) {
    throw invalid(std::string(name) + " ends at " + std::to_string(last) + " of " +
                  std::to_string(total) + " values");
  }
}

void check_ids(const char* what, const int32_t* ids, int64_t count, int32_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= limit) {
      throw invalid(std::string(what) + " " + std::to_string(ids[i]) + " is outside 0 .. " +
                    std::to_string(limit - 1));
    }
  }
}

}  // namespace

void check_forward(const FsBatch& batch, const BatchLimits& limits) {
  if (batch.num_tokens > limits.max_num_tokens) {
    throw invalid("the step has " + std::to_string(batch.num_tokens) +
                  " tokens but the engine takes " + std::to_string(limits.max_num_tokens));
  }
  check_offsets("row_offsets", batch.row_offsets, batch.num_rows, batch.num_tokens, false);
  check_offsets("block_offsets", batch.block_offsets, batch.num_rows, batch.num_block_ids, true);
  check_ids("token id", batch.token_ids, batch.num_tokens, limits.vocab_size);
  check_ids("block id", batch.block_ids, batch.num_block_ids, limits.num_blocks);
  for (int32_t row = 0; row < batch.num_rows; ++row) {
    const int64_t num_new = batch.row_offsets[row + 1] - batch.row_offsets[row];
    const int64_t context = batch.context_lens[row];
    const int64_t room = int64_t{batch.block_offsets[row + 1] - batch.block_offsets[row]} *
                         limits.block_size;
    if (num_new == 0) throw invalid("row " + std::to_string(row) + " has no tokens");
    const int64_t max_len = std::numeric_limits<int32_t>::max();  // positions are 32-bit
    if (context < 0 || context + num_new > std::min(room, max_len)) {
      throw invalid("row " + std::to_string(row) + " has " + std::to_string(context) + " + " +
                    std::to_string(num_new) + " tokens but its blocks hold " +
                    std::to_string(room));
    }
  }
}

void check_sampling(const FsBatch& batch, int32_t vocab_size) {
  check_ids("sample_rows: row", batch.sample_rows, batch.num_samples, batch.num_rows);
  for (int32_t i = 1; i < batch.num_samples; ++i) {
    if (batch.sample_rows[i] <= batch.sample_rows[i - 1]) {
      throw invalid("sample_rows do not ascend at " + std::to_string(i));
    }
  }
  check_offsets("history_offsets", batch.history_offsets, batch.num_samples,
                batch.num_history_ids, true);
  check_offsets("bias_offsets", batch.bias_offsets, batch.num_samples, batch.num_bias_ids, true);
  check_offsets("suppressed_offsets", batch.suppressed_offsets, batch.num_samples,
                batch.num_suppressed_ids, true);
  check_ids("history token id", batch.history_ids, batch.num_history_ids, vocab_size);
  check_ids("biased token id", batch.bias_ids, batch.num_bias_ids, vocab_size);
  check_ids("suppressed token id", batch.suppressed_ids, batch.num_suppressed_ids, vocab_size);
  for (int32_t i = 0; i < batch.num_samples; ++i) {
    const bool is_valid = batch.temperature[i] >= 0 && std::isfinite(batch.temperature[i]) &&
                          batch.top_k[i] >= 0 && batch.top_p[i] >= 0 && batch.min_p[i] >= 0 &&
                          batch.min_p[i] <= 1 && batch.repetition_penalty[i] > 0 &&
                          std::isfinite(batch.repetition_penalty[i]) &&
                          std::isfinite(batch.presence_penalty[i]) &&
                          std::isfinite(batch.frequency_penalty[i]) &&
                          batch.num_logprobs[i] <= batch.max_logprobs;
    if (!is_valid) {
      throw invalid("sampling row " + std::to_string(i) + " has a parameter out of range");
    }
    const int32_t num_history = batch.history_offsets[i + 1] - batch.history_offsets[i];
    if (batch.history_prompt_lens[i] < 0 || batch.history_prompt_lens[i] > num_history) {
      throw invalid("sampling row " + std::to_string(i) + " has " +
                    std::to_string(batch.history_prompt_lens[i]) + " prompt tokens in a history of " +
                    std::to_string(num_history));
    }
    for (int32_t j = batch.bias_offsets[i]; j < batch.bias_offsets[i + 1]; ++j) {
      // Ascending, so that a row edits each token once: the sampler's memory counts on it.
      if ((j > batch.bias_offsets[i] && batch.bias_ids[j] <= batch.bias_ids[j - 1]) ||
          !std::isfinite(batch.bias_values[j])) {
        throw invalid("sampling row " + std::to_string(i) + " has biases that do not ascend by " +
                      "token id, or are not finite");
      }
    }
  }
}

}  // namespace furiosa

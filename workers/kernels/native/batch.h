// Checks of a step's arrays before anything runs, so that nothing behind them need check again.
#pragma once

#include "api.h"

namespace furiosa {

struct BatchLimits {
  int32_t vocab_size;
  int32_t num_blocks, block_size;
  int32_t max_num_tokens;
};

// Throws Failure(kInvalidBatch) with the value at fault.
void check_forward(const FsBatch& batch, const BatchLimits& limits);
void check_sampling(const FsBatch& batch, int32_t vocab_size);

}  // namespace furiosa

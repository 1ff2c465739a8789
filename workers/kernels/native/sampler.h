// From one row of logits to one token. workers/sampler.py is the oracle and says the rules.
//
// Nothing is sorted whole: top-k selects, top-p sorts only what can be in the nucleus, greedy is a
// maximum, and log-probabilities are computed for rows that ask.
#pragma once

#include <cmath>
#include <cstdint>

#include "api.h"
#include "kernel_table.h"
#include "mapped_memory.h"

namespace furiosa {

// Working memory of one PE.
struct SamplerScratch {
  double* weights;    // (vocab,) unnormalised probabilities
  double* block_max;  // (vocab / 64 rounded up,)
  int32_t* ids;       // (vocab,) candidates
  uint8_t* is_seen;   // (vocab,) all zero between rows
  int32_t* counts;    // (vocab,) all zero between rows
  int32_t* edited;    // (3 vocab,) ids whose logit was changed, in order ...
  float* originals;   // (3 vocab,) ... and what it was

  static SamplerScratch from(Arena& arena, int vocab_size);
};

enum class SampleError { kNone, kNotFinite, kAllSuppressed };

// Throws the Failure that an error stands for; `row` is the batch's.
void throw_if_failed(SampleError error, int row);

// The likeliest of some logits of a row: the first of the highest. `is_finite`: all were.
struct Likeliest {
  float logit;
  int32_t id;
  bool is_finite;

  static constexpr Likeliest of_none() { return {-INFINITY, -1, true}; }
  // Of these and of `other`, whose ids may come before or after.
  void add(const Likeliest& other) {
    is_finite = is_finite && other.is_finite;
    if (other.logit > logit || (other.logit == logit && other.id < id)) {
      logit = other.logit, id = other.id;
    }
  }
  // Adds logits of the ids [first, first + count).
  void add(const KernelTable& kernels, const float* logits, int32_t first, int count);
};

// Whether the index-th sampling row asks for nothing but the likeliest token.
bool asks_for_likeliest(const FsBatch& batch, int index);

// Samples the batch's index-th sampling row from `logits` (vocab,), which may be overwritten, into
// the index-th place of `result`. Never allocates or throws.
SampleError sample_row(const KernelTable& kernels, const FsBatch& batch, int index, float* logits,
                       int vocab_size, const SamplerScratch& scratch, const FsResult& result);

}  // namespace furiosa

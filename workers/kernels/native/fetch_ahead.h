// Asks the memory for keys and values some time before attention reads them.
//
// A decode step's contexts lie in short runs all over the cache, far more of them than caches hold,
// and the processor's own prefetcher is no good at such. So a fetch cursor goes kFetchDistance
// positions ahead of the task that reads, and on into the context of the next task.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernel_table.h"

namespace furiosa {

// With 64 dimensions in bf16, 16 KiB of keys and values: on their way to the second-level cache.
constexpr int kFetchDistance = 64;

class FetchAhead {
 public:
  // For a task that will read positions [begin, end) of its context.
  FetchAhead(const AttentionTask& task, int begin, int end)
      : block_size_(task.block_size),
        head_nbytes_(task.head_dim * kv_nbytes(task.kv_dtype)),
        places_(task.places),
        scale_places_(task.scale_places),
        nbytes_(kv_nbytes(task.kv_dtype)),
        stretches_{task.context(begin, end), task.next, task.next} {
    // The first that the next task does is to write its keys and values: in a paired cache, a few bytes to
    // every line of a group.
    Context &newest = stretches_[1], &first = stretches_[2];
    if (task.is_paired && newest.begin < newest.end) {
      newest.begin = (newest.end - 1) / kPairedPositions * kPairedPositions;
      newest.end = newest.begin + kPairedPositions;
    } else {
      newest.end = newest.begin;
    }
    first.end = std::min(first.end, first.begin + kFetchDistance);
    if (task.is_fetched) {
      stretches_[0].begin = std::min(begin + kFetchDistance, end);
    } else {
      advance(kFetchDistance);
    }
  }

  // Another `count` positions, or as many as are left.
  inline __attribute__((always_inline)) void advance(int count) {
    for (; count > 0; --count) {
      if (num_left_ == 0 && !enter_block()) return;
      for (int i = 0; i < head_nbytes_; i += 64) {
        __builtin_prefetch(keys_ + i, 0, 2);
        __builtin_prefetch(values_ + i, 0, 2);
      }
      keys_ += head_nbytes_, values_ += head_nbytes_;
      --num_left_;
    }
  }
  // As many as it takes for all of this task's context before position `end` to be asked for. Until the next
  // call no block of it is entered that begins 2 kFetchDistance or more beyond.
  void reach(int end) {
    limit_ = end + 2 * kFetchDistance;
    end = std::min(end, stretches_[0].end);
    while (current_ == 0 && stretches_[0].begin - num_left_ < end) advance(1);
  }
  void finish() { advance(kFetchDistance + kPairedPositions); }

 private:
  bool enter_block() {
    while (stretches_[current_].begin >= stretches_[current_].end) {
      if (current_ == kNumStretches - 1) return false;
      ++current_;
    }
    Context& context = stretches_[current_];
    if (current_ == 0 && context.begin >= limit_) return false;
    const int offset = context.begin % block_size_;
    const int32_t block_id = context.block_ids[context.begin / block_size_];
    const int64_t place = places_.of_block(block_id) * nbytes_ + int64_t{offset} * head_nbytes_;
    keys_ = static_cast<const char*>(context.keys) + place;
    values_ = static_cast<const char*>(context.values) + place;
    num_left_ = std::min(block_size_ - offset, context.end - context.begin);
    if (context.key_scales != nullptr) {
      const int64_t scale = scale_places_.of_block(block_id) + offset;
      for (int i = 0; i < num_left_; i += 64 / int{sizeof(float)}) {
        __builtin_prefetch(context.key_scales + scale + i, 0, 2);
        __builtin_prefetch(context.value_scales + scale + i, 0, 2);
      }
    }
    context.begin += num_left_;
    return true;
  }

  const int block_size_, head_nbytes_;
  const BlockPlaces places_, scale_places_;
  const int nbytes_;  // of one number
  // What is left of this task's context, of the group that the next writes to, and of what comes first in
  // its context.
  static constexpr int kNumStretches = 3;
  Context stretches_[kNumStretches];
  int current_ = 0, num_left_ = 0;  // positions left in the current block
  int limit_ = std::numeric_limits<int>::max();
  const char *keys_ = nullptr, *values_ = nullptr;
};

// Spreads what a loop asks for over its turns: share / whole positions a turn.
class EvenFetch {
 public:
  EvenFetch(FetchAhead* ahead, int share, int whole) : ahead_(ahead), share_(share), whole_(whole) {}
  inline __attribute__((always_inline)) void turn() {
    if (ahead_ == nullptr) return;
    for (owed_ += share_; owed_ >= whole_; owed_ -= whole_) ahead_->advance(1);
  }

 private:
  FetchAhead* const ahead_;
  const int share_, whole_;
  int owed_ = 0;
};

}  // namespace furiosa

// Asks the memory for the next panel while this one is multiplied.
//
// The processor's own prefetcher stops at every 4 KiB, and would begin with the panel itself.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"

namespace furiosa {

class PanelFetch {
 public:
  // For the panel after `panel`, whoever will multiply it; `advance` will be called `num_steps`
  // times before that.
  PanelFetch(const Matrix& w, int panel, int64_t num_steps) {
    if (panel + 1 == w.num_panels) return;
    const int64_t nbytes = static_cast<int64_t>(w.panel_stride);
    place_ = w.panel(panel + 1);
    end_ = place_ + nbytes;
    step_ = (nbytes / 64 + num_steps) / num_steps * 64;
  }

  // A little more of it.
  inline __attribute__((always_inline)) void advance() {
    const uint8_t* until = place_ + step_;
    for (; place_ < until && place_ < end_; place_ += 64) __builtin_prefetch(place_, 0, 3);
  }

 private:
  const uint8_t *place_ = nullptr, *end_ = nullptr;
  int64_t step_ = 0;
};

}  // namespace furiosa

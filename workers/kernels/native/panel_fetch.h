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
  PanelFetch() = default;  // of nothing
  // For `count` panels from `panel` on, or what there is of them, whoever will multiply them;
  // `advance` will be called `num_steps` times before that.
  PanelFetch(const Matrix& w, int panel, int count, int64_t num_steps) {
    count = panel + count > w.num_panels ? w.num_panels - panel : count;
    if (count <= 0) return;
    const int64_t nbytes = count * static_cast<int64_t>(w.panel_stride);
    place_ = w.panel(panel);
    end_ = place_ + nbytes;
    step_ = (nbytes / 64 + num_steps) / num_steps * 64;
  }

  // A little more of it; Locality: 3 to the first-level cache, 2 to the second.
  template <int Locality = 3>
  inline __attribute__((always_inline)) void advance() {
    const uint8_t* until = place_ + step_;
    for (; place_ < until && place_ < end_; place_ += 64) __builtin_prefetch(place_, 0, Locality);
  }

 private:
  const uint8_t *place_ = nullptr, *end_ = nullptr;
  int64_t step_ = 0;
};

}  // namespace furiosa

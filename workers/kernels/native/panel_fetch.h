// Asks the memory for the next panel while this one is multiplied.
//
// The processor's own prefetcher stops at every 4 KiB, and would begin with the panel itself.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"

namespace furiosa {

// Up to so many rows, products of fp32 and bf16 weights do little else than read: the processor's own
// prefetcher does better alone.
constexpr int kFewFloatRows = 3;

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
    step_ = step_of(nbytes, num_steps);
    is_small_ = nbytes <= kSmallNbytes;
  }
  // For a product whose rows are one tile, so that it goes through `panel` once, in `num_steps`: what lies
  // kAheadNbytes further on. Scales, which are read all along a panel, do not wait for their place behind its values.
  static PanelFetch of_one_tile(const Matrix& w, int panel, int64_t num_steps) {
    if (panel + 1 < w.num_panels) fetch_scales(w, panel + 1);
    PanelFetch fetch;
    fetch.place_ = w.panel(panel) + kAheadNbytes;
    fetch.end_ = w.panel(w.num_panels);
    fetch.step_ = step_of(static_cast<int64_t>(w.panel_stride), num_steps);
    return fetch;
  }

  // A little more of it, to the second-level cache, or to the first if that has room for it beside what is
  // multiplied.
  inline __attribute__((always_inline)) void advance() { is_small_ ? advance_to<3>() : advance_to<2>(); }
  // For AMX, whose inputs, sums and weights leave the first no room even for a small panel.
  inline __attribute__((always_inline)) void advance_to_second() { advance_to<2>(); }

 private:
  static constexpr int64_t kSmallNbytes = 6 << 10;
  // What a core reads in some 200 ns: longer than memory takes to answer.
  static constexpr int64_t kAheadNbytes = 100 * 64;

  static int64_t step_of(int64_t nbytes, int64_t num_steps) { return (nbytes / 64 + num_steps) / num_steps * 64; }

  static inline __attribute__((always_inline)) void fetch_scales(const Matrix& w, int panel) {
    const uint8_t *place = w.panel(panel) + w.values_nbytes(), *end = w.panel(panel + 1);
    for (; place < end; place += 64) __builtin_prefetch(place, 0, 2);
  }

  template <int Locality>
  inline __attribute__((always_inline)) void advance_to() {
    const uint8_t* until = place_ + step_;
    for (; place_ < until && place_ < end_; place_ += 64) __builtin_prefetch(place_, 0, Locality);
  }

  const uint8_t *place_ = nullptr, *end_ = nullptr;
  int64_t step_ = 0;
  bool is_small_ = false;
};

}  // namespace furiosa

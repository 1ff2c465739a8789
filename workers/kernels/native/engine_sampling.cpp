// LM head and sampling. Where rows ask for nothing but the likeliest token, no logits are kept: each PE
// takes the highest of a few while they are in its cache.
#include <algorithm>

#include "engine.h"

namespace furiosa {

namespace {

// Logits of so many bytes or more are stored past the caches.
constexpr int64_t kStreamedNbytes = 2 << 20;

bool ask_for_likeliest(const FsBatch& batch) {
  for (int i = 0; i < batch.num_samples; ++i) {
    if (!asks_for_likeliest(batch, i)) return false;
  }
  return true;
}

}  // namespace

void Engine::sample(const FsBatch& batch, const FsResult& result) {
  if (ask_for_likeliest(batch)) {
    take_likeliest(batch, result);
    return;
  }
  const int64_t stride = logits_stride(config_.vocab_size);
  for (int first = 0; first < batch.num_samples; first += kLogitsRows) {
    const int count = std::min(kLogitsRows, batch.num_samples - first);
    norm_inputs(first, count, weights_.final_norm, weights_.lm_head);
    const bool is_streamed = count * stride * int64_t{sizeof(float)} >= kStreamedNbytes;
    matmul(weights_.lm_head, buffers_.input, count, {buffers_.logits, stride, nullptr, false, is_streamed});
    sample_rows(batch, first, count, result);
  }
}

void Engine::sample_rows(const FsBatch& batch, int first, int count, const FsResult& result) {
  pool_.run(count, [&](int i, int pe) {
    sample_errors_[static_cast<size_t>(i)] = sample_row(
        kernels_, batch, first + i, buffers_.logits + i * logits_stride(config_.vocab_size),
        config_.vocab_size, scratch_[static_cast<size_t>(pe)].sampler, result);
  });
  for (int i = 0; i < count; ++i) {
    throw_if_failed(sample_errors_[static_cast<size_t>(i)], batch.sample_rows[first + i]);
  }
}

void Engine::take_likeliest(const FsBatch& batch, const FsResult& result) {
  const Matrix& head = weights_.lm_head;
  const int num_rows = batch.num_samples, vocab_size = config_.vocab_size;
  norm_inputs(0, num_rows, weights_.final_norm, head);
  for (PeScratch& scratch : scratch_) {
    std::fill_n(scratch.likeliest, num_rows, Likeliest::of_none());
  }
  const MatmulKernel kernel = kernels_.matmul[head.dtype];
  const MatmulCut cut(head, num_rows, pool_.size());
  constexpr int kPanels = kStretch / kPanelRows;
  pool_.run(cut.num_items, [&](int item, int pe) {
    const PeScratch& scratch = scratch_[static_cast<size_t>(pe)];
    const MatmulCut::Part part = cut.part(item);
    for (int panel = part.panel_begin; panel < part.panel_end; panel += kPanels) {
      const int end = std::min(panel + kPanels, part.panel_end), first = panel * kPanelRows;
      // Outputs are addressed from W's row 0 and the step's row 0.
      float* origin = scratch.stretch - first - int64_t{part.row_begin} * kStretch;
      kernel(head, panel, end, buffers_.input, part.row_begin, part.row_end,
             {origin, kStretch, nullptr, false}, scratch.matmul);
      const int count = std::min(end * kPanelRows, vocab_size) - first;
      for (int row = part.row_begin; row < part.row_end; ++row) {
        scratch.likeliest[row].add(kernels_, origin + int64_t{row} * kStretch + first, first, count);
      }
    }
  });
  for (int row = 0; row < num_rows; ++row) {
    Likeliest likeliest = Likeliest::of_none();
    for (const PeScratch& scratch : scratch_) likeliest.add(scratch.likeliest[row]);
    if (!likeliest.is_finite) throw_if_failed(SampleError::kNotFinite, batch.sample_rows[row]);
    result.token_ids[row] = likeliest.id;
  }
}

}  // namespace furiosa

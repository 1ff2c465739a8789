#include "api.h"

#include <algorithm>

#include "activations.h"
#include "batch.h"
#include "engine.h"
#include "failure.h"
#include "guarded.h"
#include "mapped_memory.h"
#include "matmul_cut.h"

using namespace furiosa;

struct FsEngine {
  Engine engine;
};

int32_t fs_abi_version() { return kAbiVersion; }

int64_t fs_struct_size(int32_t which) {
  constexpr int64_t kSizes[] = {sizeof(FsTensor), sizeof(FsEngineConfig), sizeof(FsBatch),
                                sizeof(FsResult), sizeof(FsMessage)};
  return which >= 0 && which < 5 ? kSizes[which] : -1;
}

const char* fs_isa_name(int32_t index) {
  const KernelTable* table = kernel_table(index);
  return table == nullptr ? nullptr : table->isa;
}

int32_t fs_engine_create(const FsEngineConfig* config, const char* isa, FsEngine** engine,
                         FsMessage* message) {
  return guarded(message,
                 [&] { *engine = new FsEngine{Engine(*config, kernel_table_named(isa))}; });
}

void fs_engine_destroy(FsEngine* engine) { delete engine; }

int32_t fs_engine_step(FsEngine* engine, const FsBatch* batch, FsResult* result,
                       FsMessage* message) {
  return guarded(message, [&] { engine->engine.step(*batch, result, nullptr); });
}

int32_t fs_engine_logits(FsEngine* engine, const FsBatch* batch, float* logits,
                         FsMessage* message) {
  return guarded(message, [&] { engine->engine.step(*batch, nullptr, logits); });
}

int32_t fs_matmul(const char* isa, const FsTensor* weights, const float* x, int32_t num_rows,
                  float* y, FsMessage* message) {
  return guarded(message, [&] {
    const KernelTable& kernels = kernel_table_named(isa);
    const Matrix w = matrix_from(*weights, "weights", weights->rows, weights->cols);
    Arena sizes(nullptr);
    take_activations(sizes, num_rows, w.cols);
    const MappedMemory memory(sizes.nbytes());
    Arena arena(memory.data());
    const Activations input = take_activations(arena, num_rows, w.cols);
    std::copy_n(x, int64_t{num_rows} * w.cols, input.values);
    for (int row = 0; row < num_rows && w.rounds_inputs(); ++row) {
      kernels.quantize(input.values + int64_t{row} * w.cols, input, w, row, 0, w.cols);
    }
    const MappedMemory scratch(matmul_scratch_nbytes(w.cols));
    const int block_rows = rows_per_block(num_rows);
    for (int row = 0; row < num_rows; row += block_rows) {
      kernels.matmul[w.dtype](w, 0, w.num_panels, input, row, std::min(row + block_rows, num_rows),
                              {y, w.rows, nullptr, false}, scratch.data());
    }
  });
}

int32_t fs_sample(const char* isa, const FsBatch* batch, int32_t vocab_size, float* logits,
                  FsResult* result, FsMessage* message) {
  return guarded(message, [&] {
    const KernelTable& kernels = kernel_table_named(isa);
    check_sampling(*batch, vocab_size);
    Arena sizes(nullptr);
    SamplerScratch::from(sizes, vocab_size);
    const MappedMemory memory(sizes.nbytes());
    Arena arena(memory.data());
    const SamplerScratch scratch = SamplerScratch::from(arena, vocab_size);
    for (int i = 0; i < batch->num_samples; ++i) {
      float* row = logits + int64_t{i} * vocab_size;
      throw_if_failed(sample_row(kernels, *batch, i, row, vocab_size, scratch, *result),
                      batch->sample_rows[i]);
    }
  });
}

// The C surface of the kernel: all that crosses to Python (workers/kernels/native.py).
//
// Plain structs of numbers and pointers; every struct below is mirrored, field for field, by a
// ctypes.Structure, and `fs_struct_size` lets the loader refuse a library that disagrees. No call
// throws; a call that fails returns a status and writes one sentence into `message`.
#pragma once

#include <cstdint>

#define FS_API extern "C" __attribute__((visibility("default")))

constexpr int32_t kAbiVersion = 2;

enum FsStatus : int32_t {
  kOk = 0,
  kInvalidBatch = 1,     // the step's arrays contradict each other or the engine; nothing has run
  kInvalidArtifact = 2,  // a tensor has the wrong shape, type or size
  kInvalidConfig = 3,    // an argument of fs_engine_create is out of range
  kNotFinite = 4,        // the model produced NaN or infinite logits
  kOutOfMemory = 5,
  kInternal = 6,
};

enum FsDtype : int32_t { kFp32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3, kNested4 = 4, kInt6 = 5 };

// A packed matrix as docs/artifact-format.md lays it out, or (in vector places) plain float32.
struct FsTensor {
  const void* data;  // null: the model has no such tensor
  int64_t nbytes;
  int32_t dtype;  // FsDtype
  int32_t rows;
  int32_t cols;
  int32_t has_min;  // int4 only
  int32_t rotated;  // integers only
};

// Order of the tensor table: these, then the per-layer ones of layer 0, 1, ...
enum FsGlobalTensor { kEmbed, kLmHead, kFinalNorm, kRopeInvFreq, kNumGlobalTensors };
enum FsLayerTensor {
  kAttnNorm, kQkv, kQkvBias, kQNorm, kKNorm, kO, kFfnNorm, kGateUp, kDown, kNumLayerTensors
};

struct FsEngineConfig {
  int32_t vocab_size, hidden_size, intermediate_size, num_layers;
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t sliding_window;  // 0: full attention
  float rms_norm_eps;
  int32_t num_blocks, block_size;
  int32_t kv_dtype;                // kFp32 or kBf16
  int32_t max_num_batched_tokens;  // tokens of one step at most
  int32_t num_pes;
  const int32_t* cpu_offsets;  // (num_pes + 1,): PE i may run on cpus[offsets[i] .. offsets[i+1]];
  const int32_t* cpus;         //   an empty list leaves it unbound
  const FsTensor* tensors;     // kNumGlobalTensors + num_layers * kNumLayerTensors entries
  int64_t num_tensors;
};

// StepBatch of workers/executor.py, which says what each array means.
struct FsBatch {
  int32_t num_tokens, num_rows, num_samples;
  int32_t max_logprobs;  // width of FsResult's top_* arrays
  int64_t num_block_ids, num_history_ids, num_bias_ids, num_suppressed_ids;
  const int32_t* token_ids;
  const int32_t* row_offsets;
  const int32_t* context_lens;
  const int32_t* block_ids;
  const int32_t* block_offsets;
  const int32_t* sample_rows;
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const float* repetition_penalty;
  const float* presence_penalty;
  const float* frequency_penalty;
  const uint64_t* seed;
  const int32_t* choice_index;
  const int32_t* num_logprobs;
  const int32_t* history_ids;
  const int32_t* history_offsets;
  const int32_t* history_prompt_lens;
  const int32_t* bias_ids;
  const float* bias_values;
  const int32_t* bias_offsets;
  const int32_t* suppressed_ids;
  const int32_t* suppressed_offsets;
};

// StepResult of workers/executor.py; the caller owns the arrays.
struct FsResult {
  int32_t* token_ids;
  float* logprobs;
  int32_t* ranks;
  int32_t* top_token_ids;
  float* top_logprobs;
};

struct FsMessage {
  char text[512];  // zero-terminated
};

struct FsEngine;

FS_API int32_t fs_abi_version();
// `which`: 0 FsTensor, 1 FsEngineConfig, 2 FsBatch, 3 FsResult, 4 FsMessage.
FS_API int64_t fs_struct_size(int32_t which);

// Name of the i-th kernel family that this CPU can run, best first; null past the last.
FS_API const char* fs_isa_name(int32_t index);

// The tensors' memory must outlive the engine. `isa` is one of fs_isa_name's.
FS_API int32_t fs_engine_create(const FsEngineConfig* config, const char* isa, FsEngine** engine,
                                FsMessage* message);
FS_API void fs_engine_destroy(FsEngine* engine);

// One whole step: embedding, layers, KV write, and for the sampling rows LM head and sampling.
FS_API int32_t fs_engine_step(FsEngine* engine, const FsBatch* batch, FsResult* result,
                              FsMessage* message);
// The same forward; logits is (num_samples, vocab_size) and nothing is sampled.
FS_API int32_t fs_engine_logits(FsEngine* engine, const FsBatch* batch, float* logits,
                                FsMessage* message);

// Single parts on one thread, for tests and benchmarks.
// y (num_rows, weights->rows) = x (num_rows, weights->cols) * weights^T.
FS_API int32_t fs_matmul(const char* isa, const FsTensor* weights, const float* x,
                         int32_t num_rows, float* y, FsMessage* message);
// Samples from `logits` (num_samples, vocab_size), which it may overwrite.
FS_API int32_t fs_sample(const char* isa, const FsBatch* batch, int32_t vocab_size, float* logits,
                         FsResult* result, FsMessage* message);

// For benchmarks: seconds of one call, the best of several, on `num_pes` threads.
// The products of `num_rows` rows with each of `weights` (num_weights, all of one shape) in turn.
FS_API int32_t fs_time_matmul(const char* isa, const FsTensor* weights, int32_t num_weights,
                              int32_t num_rows, int32_t num_pes, double min_seconds,
                              double* seconds, FsMessage* message);
// One layer's attention: the last `num_tokens` of each of `num_sequences` sequences, which share
// `config`'s blocks evenly and fill them. Of `config` it reads heads, layers, blocks, kv_dtype and
// num_pes; layers are used in turn.
FS_API int32_t fs_time_attention(const char* isa, const FsEngineConfig* config,
                                 int32_t num_sequences, int32_t num_tokens, double min_seconds,
                                 double* seconds, FsMessage* message);

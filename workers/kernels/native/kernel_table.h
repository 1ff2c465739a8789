// What a kernel family (an ISA) must provide: one table of functions. The rest of the library is
// compiled once and is the same for all of them.
//
// Every function computes a row, head or output from that row's or head's inputs alone and in one
// order of operations, so that its bits depend neither on what else is in the step nor on how the
// caller cut the work. Nothing here allocates or throws.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace furiosa {

// The left operand of a matmul. fp32 weights read `values`; bf16 ones `values`, rounded, or `halves`,
// whichever the family's products take, and the other is not to be read then; quantised ones the other
// fields, of which a family fills those that its products of so many rows read. The AMX family has
// `halves` in its own order, in whole blocks of 16 rows.
struct Activations {
  int num_rows;        // of the step
  int cols;
  float* values;       // (rows, cols)
  uint16_t* halves;    // (rows rounded up to 16, cols): values as bfloat16
  int8_t* quants;      // (rows, cols): values / scale, rounded half to even
  // Of as many inputs as share a scale, Matrix::scale_group or, in the AVX2 family, perhaps fewer
  // (row_kernels.h): (rows, cols / so many) each.
  float* scales;       // what a quant stands for
  float* scaled_sums;  // scale * sum of the quants
  int32_t* offsets;    // -128 * sum: what undoes it where weights + 128 are multiplied
  // Of two groups of 32, (rows, cols / 64): the sum of each, two int16.
  int32_t* word_sums;
  // Of each group of 32: (rows, Matrix::num_groups). What undoes it where nibbles are multiplied.
  int32_t* group_offsets;  // -8 * sum
  // For the AMX family, which may fill nothing else for rows in whole blocks of 16: quants as tiles
  // take them, (rows/16, cols/64, 16, 64), or 32 in place of 64 where weights' scales are of 32;
  // (rows/16, num_scales, 16) of scales and scaled sums.
  int8_t* tile_quants;
  float *tile_scales, *tile_scaled_sums;
};

// The result of a matmul and what is folded into it.
struct Output {
  float* values;            // (rows, stride)
  int64_t stride;           // floats from one row to the next
  const float* bias;        // (W.rows,) added to the product, or null
  bool accumulate;          // add to `values` (a residual) instead of overwriting them
  // More than caches hold, to be read when all is there: whole lines may be stored past the caches,
  // which saves reading them first. `values` is 64-byte aligned, the stride a multiple of 16.
  bool is_streamed = false;
};

// `num_rows` as Activations::halves has them.
constexpr int64_t whole_row_blocks(int64_t num_rows) { return (num_rows + 15) / 16 * 16; }

// Rows of the left operand that one call of a matmul kernel gets at most: with K inputs each they
// stay in the second-level cache while panels go past.
constexpr int kMaxMatmulRows = 128;

// Panels [panel_begin, panel_end) of W times rows [row_begin, row_end) of x.
//   scratch: matmul_scratch_nbytes(w.cols), 64-byte aligned, one per PE, contents arbitrary: where
//   a kernel unpacks a panel once for many rows.
using MatmulKernel = void (*)(const Matrix& w, int panel_begin, int panel_end,
                              const Activations& x, int row_begin, int row_end,
                              const Output& out, void* scratch);

constexpr int64_t matmul_scratch_nbytes(int cols) {
  return int64_t{40} * cols + int64_t{kMaxMatmulRows} * kPanelRows * 4 + 8192;
}

// Attention looks at the context in pieces of this many positions, at multiples of it: how the
// online softmax is cut depends on positions alone, not on blocks, chunks or batches.
constexpr int kPieceSize = 64;
// Bytes of one number in the KV cache, whose types these three are.
constexpr int kv_nbytes(FsDtype dtype) { return dtype == kInt8 ? 1 : dtype == kBf16 ? 2 : 4; }

// Query vectors (tokens times the heads that share a KV head) that one task holds at most.
constexpr int kMaxQueries = 64;

// A context is cut into partitions of this many positions, at multiples of it. Each is attended to
// on its own and the results are merged in ascending order, whether one PE did them all or many
// did: so a long context can be shared out without changing a bit.
constexpr int kPartitionSize = 256;

// Positions whose keys and values lie together in a paired cache (kv_cache.h).
constexpr int kPairedPositions = 16;

// Where the blocks of a layer's KV cache are, in numbers: (clusters, heads, 16 blocks, a block).
struct BlockPlaces {
  static constexpr int64_t kClusterBlocks = 16;  // as in scheduler/free_blocks.py
  int64_t block_stride = 0, cluster_stride = 0;

  BlockPlaces() = default;
  // `block`: numbers in a block of one head.
  BlockPlaces(int64_t block, int num_heads)
      : block_stride(block), cluster_stride(kClusterBlocks * block * num_heads) {}

  int64_t of_head(int head) const { return head * kClusterBlocks * block_stride; }
  // From the head's block 0 on.
  int64_t of_block(int64_t id) const {
    return id / kClusterBlocks * cluster_stride + id % kClusterBlocks * block_stride;
  }
  int64_t total(int64_t num_blocks) const {
    return (num_blocks + kClusterBlocks - 1) / kClusterBlocks * cluster_stride;
  }
};

// Positions [begin, end) of a sequence, in the blocks that `block_ids` names; keys and values as in
// AttentionTask.
struct Context {
  const void *keys, *values;
  const float *key_scales, *value_scales;  // null but for int8
  const int32_t* block_ids;
  int begin, end;
};

// Some query tokens of one sequence, all heads of one KV head, against that sequence's cache.
struct AttentionTask {
  const float* q;            // token 0's first head; heads follow each other, head_dim apart
  float* out;                // likewise
  int64_t q_stride, out_stride;  // floats from one token to the next
  int num_tokens;            // num_tokens * heads_per_kv <= kMaxQueries
  int heads_per_kv, head_dim;
  int first_position;        // of token 0; its context is positions 0 .. first_position
  int sliding_window;        // a token sees itself and the window - 1 before it; 0: all
  float scale;
  const void *keys, *values;  // this KV head in block 0: (block_size, head_dim) of kv_dtype
  const float *key_scales, *value_scales;  // this KV head's in block 0: (block_size,); null but for int8
  FsDtype kv_dtype;          // fp32, bf16 or int8
  bool is_paired;            // the cache is, see kv_cache.h
  const int32_t* block_ids;
  int block_size;
  BlockPlaces places, scale_places;
  // Only the partitions [partition_begin, partition_end) are attended to, and the state of each
  // goes to `partials` (partition, query, head_dim + 2), for merge_attention; or, where that is
  // null, all of the context is and the result goes to `out`.
  int partition_begin, partition_end;
  float* partials;
  // What the PE will read after this task (empty: nothing), of which it fetches the beginning; and
  // whether the task before has done so for this one.
  Context next;
  bool is_fetched;
  float* scratch;            // attention_scratch_floats(head_dim), 64-byte aligned

  // Positions [begin, end) of its context.
  Context context(int begin, int end) const {
    return {keys, values, key_scales, value_scales, block_ids, begin, end};
  }
};

constexpr int64_t attention_scratch_floats(int head_dim) {
  return int64_t{kMaxQueries} * (3 * head_dim + kPieceSize + 8) + 2 * kPieceSize * head_dim +
         kMaxQueries * kPieceSize / 2;
}

struct KernelTable {
  const char* isa;
  bool (*is_supported)();
  MatmulKernel matmul[6];  // by FsDtype
  // Row kernels. n, cols, head_dim: any positive number (head_dim: a multiple of 8).
  void (*rms_norm)(float* y, const float* x, const float* weight, int cols, float eps);
  // Rounds one row's inputs as `weights` wants them, which are not fp32: fills the fields that they
  // read, columns [col_begin, col_end), from `values`, which may be x's own. Quantised: both at
  // multiples of weights.scale_group.
  void (*quantize)(const float* values, const Activations& x, const Matrix& weights, int row,
                   int col_begin, int col_end);
  void (*swiglu)(float* y, const float* gate, const float* up, int n);
  void (*rotate)(float* head, const float* cos, const float* sin, int head_dim);
  void (*bf16_from_float)(uint16_t* y, const float* x, int n);
  // y = x / scale rounded half to even, n a multiple of 8. Returns the scale, max|x| / 127.
  float (*quantize_head)(int8_t* y, const float* x, int n);
  void (*attention)(const AttentionTask& task);
  // Whether `attention` wants a cache of this type and head_dim, in blocks of whole 16 positions, to be
  // paired (kv_cache.h); null: it never does.
  bool (*takes_pairs)(FsDtype kv_dtype, int head_dim);
  // The result of one query from its state in partitions 0 .. count: `partials` (count, head_dim +
  // 2), `stride` floats from one partition to the next. scratch: attention_scratch_floats.
  void (*merge_attention)(float* out, const float* partials, int64_t stride, int count,
                          int head_dim, float* scratch);
  // Vocabulary kernels. max_finite: the largest, or NaN when any value is NaN or infinite.
  float (*max_finite)(const float* x, int n);
  // y[i] = exp((x[i] - shift) / temperature) in double, x <= shift; 0 where it is below e^-700.
  void (*exp_double)(double* y, const float* x, int n, double shift, double temperature);
};

extern const KernelTable kPortableKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvxVnniKernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAmxKernels;
#elif defined(__aarch64__)
extern const KernelTable kNeonKernels;
#endif

// The index-th family that this CPU can run, best first; null past the last.
const KernelTable* kernel_table(int index) noexcept;

// The family of that name; throws Failure(kInvalidConfig) when there is none here.
const KernelTable& kernel_table_named(const char* isa);

}  // namespace furiosa

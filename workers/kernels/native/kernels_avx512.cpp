// The AVX-512 kernel family, for CPUs with VNNI. Products, the attention of many queries, rounding,
// quantising and SwiGLU use 16 lanes; the other kernels are those of the AVX2 family, compiled once
// more with 32 registers to keep values in. With AVX512-BF16, bf16 weights and attention to a bf16
// cache take its products where they are fast.
#if defined(__x86_64__)

#if !defined(__clang__)
// GCC 12 takes its own way of leaving a register undefined in these headers for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fetch_ahead.h"
#include "kernel_table.h"
#include "matmul_cut.h"
#include "panel_fetch.h"
#include "target.h"

#if defined(FS_EMULATE_ISA)  // a build for tests: tests/native_emulation
BEGIN_TARGET("avx2,fma,f16c")
#include "emulated_avx512.h"
#else
BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif

namespace furiosa {
namespace avx512 {

#include "simd_avx2.h"

constexpr bool kAddsPairsInWords = false;  // see row_kernels.h
#include "row_kernels.h"

#include "attention_kernel.h"

#include "tiles_avx512.h"

#include "matmul_avx512.h"

#include "matmul_int6_avx512.h"

#include "matmul_nested4_avx512.h"

#if defined(FS_EMULATE_ISA)  // without AVX512-BF16, and what has the same bits in plainer form anyway
using AttentionTiles = NoTiles;
constexpr auto quantize16 = quantize;
constexpr auto swiglu16 = swiglu;
constexpr auto bf16_from_float16 = bf16_from_float;
#else
#include "attention_avx512.h"
#include "row_kernels_avx512.h"

#include "softmax16_avx512.h"
#endif

#include "paired_piece.h"

#include "soften_words.h"

#include "words_avx512.h"

#include "attention_words.h"

using Int8Attention = WordAttention<AttentionTiles>;

#if defined(FS_EMULATE_ISA)
constexpr auto attention16 = attention<AttentionTiles, Int8Attention>;

bool takes_pairs(FsDtype kv_dtype, int head_dim) {
  return kv_dtype == kInt8 && Int8Attention::takes(head_dim);
}
#else
#include "attention_halves.h"

#include "attention_dots_avx512.h"

using Bf16Attention = HalvesAttention<AttentionProducts>;

bool takes_pairs(FsDtype kv_dtype, int head_dim) {
  return (kv_dtype == kBf16 && has_fast_bf16_dot() && Bf16Attention::takes(head_dim)) ||
         (kv_dtype == kInt8 && Int8Attention::takes(head_dim));
}

void attention16(const AttentionTask& task) {
  if (task.kv_dtype == kBf16 && has_fast_bf16_dot()) {
    attend<Bf16Attention, uint16_t>(task);
  } else {
    attention<AttentionTiles, Int8Attention>(task);
  }
}
#endif

}  // namespace avx512
}  // namespace furiosa

END_TARGET

namespace furiosa {

namespace {

bool is_avx512_supported() {
#if defined(FS_EMULATE_ISA)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
}

}  // namespace

const KernelTable kAvx512Kernels = {
    "avx512",
    is_avx512_supported,
    {avx512::matmul16_fp32, avx512::matmul16_bf16, avx512::matmul16_int8, avx512::matmul16_int4,
     avx512::matmul16_nested4, avx512::matmul16_int6},
    avx512::rms_norm,
    avx512::quantize16,
    avx512::swiglu16,
    avx512::rotate,
    avx512::bf16_from_float16,
    avx512::quantize_head,
    avx512::attention16,
    avx512::takes_pairs,
    avx512::merge_attention,
    avx512::max_finite,
    avx512::exp_double,
};

}  // namespace furiosa

#endif

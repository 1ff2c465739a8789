// The AVX-VNNI kernel family, for CPUs with VNNI in 256 bits and without AVX-512: Intel's Core from the
// twelfth generation on and Xeon 6 with efficiency cores. Integer products are its own; all else is the
// AVX2 family's, compiled once more.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fetch_ahead.h"
#include "kernel_table.h"
#include "panel_fetch.h"
#include "target.h"

#if defined(FS_EMULATE_ISA)  // a build for tests: tests/native_emulation
BEGIN_TARGET("avx2,fma,f16c")
#include "emulated_avxvnni.h"
#else
BEGIN_TARGET("avx2,fma,f16c,avxvnni")
#endif

namespace furiosa {
namespace avxvnni {

#include "simd_avx2.h"

constexpr bool kAddsPairsInWords = false;  // see row_kernels.h
#include "row_kernels.h"

#include "attention_kernel.h"

#include "paired_piece.h"

#include "dot_avxvnni.h"

#include "soften_words.h"

#include "words_avx2.h"

#include "attention_words.h"

#include "attention_pairs_avx2.h"

#include "matmul_avx2.h"

#include "int_tiles_avx2.h"

#include "matmul_int_avxvnni.h"

}  // namespace avxvnni
}  // namespace furiosa

END_TARGET

namespace furiosa {

namespace {

bool is_avxvnni_supported() {
#if !defined(FS_EMULATE_ISA)
  if (!__builtin_cpu_supports("avxvnni")) return false;
#endif
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

}  // namespace

const KernelTable kAvxVnniKernels = {
    "avxvnni",
    is_avxvnni_supported,
    {avxvnni::matmul_fp32, avxvnni::matmul_bf16, avxvnni::matmul_int8, avxvnni::matmul_int4,
     avxvnni::matmul_nested4, avxvnni::matmul_int6},
    avxvnni::rms_norm,
    avxvnni::quantize,
    avxvnni::swiglu,
    avxvnni::rotate,
    avxvnni::bf16_from_float,
    avxvnni::quantize_head,
    avxvnni::attention<avxvnni::PairsAttention, avxvnni::WordAttention<avxvnni::NoTiles>>,
    avxvnni::takes_pairs,
    avxvnni::merge_attention,
    avxvnni::max_finite,
    avxvnni::exp_double,
};

}  // namespace furiosa

#endif

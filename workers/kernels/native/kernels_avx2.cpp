// The AVX2 + FMA kernel family.
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

BEGIN_TARGET("avx2,fma,f16c")

namespace furiosa {
namespace avx2 {

#include "simd_avx2.h"

constexpr bool kAddsPairsInWords = true;  // see row_kernels.h
#include "row_kernels.h"

#include "attention_kernel.h"

#include "paired_piece.h"

#include "dot_avx2.h"

#include "soften_words.h"

#include "words_avx2.h"

#include "attention_words.h"

#include "attention_pairs_avx2.h"

#include "matmul_avx2.h"

#include "int_tiles_avx2.h"

#include "matmul_int_avx2.h"

#include "matmul_nested4_avx2.h"

}  // namespace avx2
}  // namespace furiosa

END_TARGET

namespace furiosa {

const KernelTable kAvx2Kernels = {
    "avx2",
    [] {
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    },
    {avx2::matmul_fp32, avx2::matmul_bf16, avx2::matmul_int8, avx2::matmul_int4,
     avx2::matmul_nested4, avx2::matmul_int6},
    avx2::rms_norm,
    avx2::quantize,
    avx2::swiglu,
    avx2::rotate,
    avx2::bf16_from_float,
    avx2::quantize_head,
    avx2::attention<avx2::PairsAttention, avx2::WordAttention<avx2::NoTiles>>,
    avx2::takes_pairs,
    avx2::merge_attention,
    avx2::max_finite,
    avx2::exp_double,
};

}  // namespace furiosa

#endif

// The NEON kernel family, for AArch64 CPUs with the dot product (Armv8.2 and later).
#if defined(__aarch64__)

#include <arm_neon.h>
#include <sys/auxv.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fetch_ahead.h"
#include "kernel_table.h"
#include "target.h"

#if defined(__clang__)
BEGIN_TARGET("dotprod")
#else
BEGIN_TARGET("arch=armv8.2-a+dotprod")
#endif

namespace furiosa {
namespace neon {

#include "simd_neon.h"

constexpr bool kAddsPairsInWords = false;  // see row_kernels.h
#include "row_kernels.h"

#include "attention_kernel.h"

#include "int6_bytes.h"

#include "matmul_neon.h"

}  // namespace neon
}  // namespace furiosa

END_TARGET

namespace furiosa {

const KernelTable kNeonKernels = {
    "neon",
    [] {
      constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
      return (getauxval(AT_HWCAP) & kDotProduct) != 0;
    },
    {neon::matmul_fp32, neon::matmul_bf16, neon::matmul_int8, neon::matmul_int4,
     neon::matmul_nested4, neon::matmul_int6},
    neon::rms_norm,
    neon::quantize,
    neon::swiglu,
    neon::rotate,
    neon::bf16_from_float,
    neon::quantize_head,
    neon::attention<neon::NoTiles>,
    nullptr,
    neon::merge_attention,
    neon::max_finite,
    neon::exp_double,
};

}  // namespace furiosa

#endif

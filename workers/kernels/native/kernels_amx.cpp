// The AMX kernel family: the AVX-512 one, with int8, int4 and bf16 products in tiles.
#if defined(__x86_64__)

#if !defined(__clang__)
// GCC 12 takes its own way of leaving a register undefined in these headers for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fetch_ahead.h"
#include "kernel_table.h"
#include "matmul_cut.h"
#include "panel_fetch.h"
#include "target.h"
#include "tiles_amx.h"

#if defined(FS_EMULATE_ISA)  // a build for tests: tests/native_emulation
BEGIN_TARGET("avx2,fma,f16c")
#include "emulated_avx512.h"
#else
BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#endif

namespace furiosa {
namespace amx {

#include "simd_avx2.h"

constexpr bool kAddsPairsInWords = false;  // see row_kernels.h
#include "row_kernels.h"

#include "attention_kernel.h"

#include "tiles_avx512.h"

#include "matmul_avx512.h"

#include "matmul_int6_avx512.h"

#include "matmul_nested4_avx512.h"

#if defined(FS_EMULATE_ISA)
using AttentionTiles = NoTiles;
constexpr auto quantize16 = quantize;
#else
#include "attention_avx512.h"
#include "row_kernels_avx512.h"

#include "softmax16_avx512.h"
#endif

#include "matmul_amx.h"

#include "matmul_bf16_amx.h"

#include "quantize_amx.h"

#include "paired_piece.h"

#include "soften_words.h"

#include "words_avx512.h"

#include "attention_words.h"

#include "attention_halves.h"

#include "attention_amx.h"

using Int8Attention = WordAttention<AttentionTiles>;

// A bf16 cache's tiles take rows.
bool takes_pairs(FsDtype kv_dtype, int head_dim) {
  return kv_dtype == kInt8 && Int8Attention::takes(head_dim);
}

}  // namespace amx
}  // namespace furiosa

END_TARGET

namespace furiosa {

namespace {

// Whether the CPU has AMX-TILE, -INT8 and -BF16 and AVX512-BF16, and the system lets this process use tiles: their
// state is large, so a process must ask for it, once; its threads then have it too.
bool are_tiles_usable() {
#if defined(FS_EMULATE_ISA)
  return true;
#else
  unsigned eax = 7, ebx, ecx = 0, edx;
  asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kNeeded = kBf16 | kTile | kInt8;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return (edx & kNeeded) == kNeeded && __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}

// All that has no tiles is the AVX-512 family's. Its table is a constant, there before this runs.
KernelTable amx_kernels() {
  KernelTable table = kAvx512Kernels;
  table.isa = "amx";
  table.is_supported = [] {
    static const bool is_supported = kAvx512Kernels.is_supported() && are_tiles_usable();
    return is_supported;
  };
  table.matmul[kBf16] = amx::matmul_amx_bf16;
  table.matmul[kInt8] = amx::matmul_amx_int8;
  table.matmul[kInt4] = amx::matmul_amx_int4;
  table.matmul[kNested4] = amx::matmul_amx_nested4;
  table.matmul[kInt6] = amx::matmul_amx_int6;
  table.quantize = amx::quantize_amx;
  table.takes_pairs = amx::takes_pairs;
  table.attention = amx::attention<amx::HalvesAttention<amx::AttentionProducts>, amx::Int8Attention>;
  return table;
}

}  // namespace

const KernelTable kAmxKernels = amx_kernels();

}  // namespace furiosa

#endif

// AMX tile instructions, each as inline assembly that says what it reads and writes.
//
// The compiler's own intrinsics do not: GCC 12's _tile_loadconfig claims to read 8 of the 64 bytes
// and its _tile_loadd no memory at all, so that stores to what they load may be dropped or moved.
// FS_EMULATE_ISA replaces them by plain C++ for tests on other machines.
#pragma once

#include <cstdint>

namespace furiosa {

// The layout that ldtilecfg reads.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_nbytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "what the instruction reads");

#if defined(FS_EMULATE_ISA)
#include "emulated_amx.h"
#else

inline __attribute__((always_inline)) void load_tile_config(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
inline __attribute__((always_inline)) void release_tiles() { asm volatile("tilerelease" ::); }

// Tile numbers are literals.
#define TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::)
#define TILE_LOAD(tile, base, stride)                                        \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(base),               \
               "r"(static_cast<int64_t>(stride))                             \
               : "memory")
#define TILE_STORE(tile, base, stride)                                       \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(base),           \
               "r"(static_cast<int64_t>(stride))                             \
               : "memory")
// sums += inputs (rows, 4 k) times weights (k, 16, 4), signed bytes.
#define TILE_DOT_INT8(sums, inputs, weights) \
  asm volatile("tdpbssd %%tmm" #weights ", %%tmm" #inputs ", %%tmm" #sums ::)
// sums += inputs (rows, 2 k) times weights (k, 16, 2), bfloat16.
#define TILE_DOT_BF16(sums, inputs, weights) \
  asm volatile("tdpbf16ps %%tmm" #weights ", %%tmm" #inputs ", %%tmm" #sums ::)

#endif

}  // namespace furiosa

// The AMX tile instructions in plain C++: eight tiles a thread, and their configuration.
//
// Written from Intel's description of each instruction. What a program must not do (tiles that were
// not configured, shapes that do not fit) ends the process, as the instruction would.
// Included inside tiles_amx.h, in the namespace furiosa, in place of the instructions.

#include <cmath>
#include <cstdlib>
#include <cstring>

struct EmulatedTiles {
  TileConfig config;
  bool is_configured;
  uint8_t bytes[8][16][64];

  void require(bool condition) const {
    if (!is_configured || !condition) std::abort();
  }
};

inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles = {};
  return tiles;
}

inline void load_tile_config(const TileConfig& config) {
  EmulatedTiles& tiles = emulated_tiles();
  tiles.config = config;
  tiles.is_configured = true;
  tiles.require(config.palette == 1 && config.start_row == 0);
  for (int tile = 0; tile < 8; ++tile) {
    tiles.require(config.rows[tile] <= 16 && config.row_nbytes[tile] <= 64);
  }
  std::memset(tiles.bytes, 0, sizeof(tiles.bytes));
}

inline void release_tiles() { emulated_tiles() = {}; }

inline void emulated_zero(int tile) {
  EmulatedTiles& tiles = emulated_tiles();
  tiles.require(tiles.config.rows[tile] > 0);
  std::memset(tiles.bytes[tile], 0, sizeof(tiles.bytes[tile]));
}

inline void emulated_load(int tile, const void* base, int64_t stride) {
  EmulatedTiles& tiles = emulated_tiles();
  tiles.require(tiles.config.rows[tile] > 0);
  std::memset(tiles.bytes[tile], 0, sizeof(tiles.bytes[tile]));
  for (int row = 0; row < tiles.config.rows[tile]; ++row) {
    std::memcpy(tiles.bytes[tile][row], static_cast<const char*>(base) + row * stride,
                tiles.config.row_nbytes[tile]);
  }
}

inline void emulated_store(int tile, void* base, int64_t stride) {
  EmulatedTiles& tiles = emulated_tiles();
  tiles.require(tiles.config.rows[tile] > 0);
  for (int row = 0; row < tiles.config.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(base) + row * stride, tiles.bytes[tile][row],
                tiles.config.row_nbytes[tile]);
  }
}

// Sums (rows, n) of 4 bytes, inputs (rows, k) of 4 bytes, weights (k, n) of 4 bytes.
inline void require_product(const EmulatedTiles& tiles, int sums, int inputs, int weights) {
  const TileConfig& config = tiles.config;
  tiles.require(sums != inputs && sums != weights && inputs != weights);
  tiles.require(config.rows[sums] > 0 && config.rows[sums] == config.rows[inputs]);
  tiles.require(config.row_nbytes[sums] == config.row_nbytes[weights]);
  tiles.require(config.row_nbytes[inputs] == config.rows[weights] * 4);
}

inline void emulated_dot_int8(int sums, int inputs, int weights) {
  EmulatedTiles& tiles = emulated_tiles();
  require_product(tiles, sums, inputs, weights);
  for (int m = 0; m < tiles.config.rows[sums]; ++m) {
    for (int n = 0; n < tiles.config.row_nbytes[sums] / 4; ++n) {
      int32_t sum;
      std::memcpy(&sum, &tiles.bytes[sums][m][4 * n], 4);
      for (int k = 0; k < tiles.config.rows[weights]; ++k) {
        for (int i = 0; i < 4; ++i) {
          sum += static_cast<int8_t>(tiles.bytes[inputs][m][4 * k + i]) *
                 static_cast<int8_t>(tiles.bytes[weights][k][4 * n + i]);
        }
      }
      std::memcpy(&tiles.bytes[sums][m][4 * n], &sum, 4);
    }
  }
}

inline float float_from_bf16(const uint8_t* bytes) {
  const uint32_t bits = static_cast<uint32_t>(bytes[0]) << 16 | static_cast<uint32_t>(bytes[1]) << 24;
  float value;
  std::memcpy(&value, &bits, 4);
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

inline void emulated_dot_bf16(int sums, int inputs, int weights) {
  EmulatedTiles& tiles = emulated_tiles();
  require_product(tiles, sums, inputs, weights);
  for (int m = 0; m < tiles.config.rows[sums]; ++m) {
    for (int n = 0; n < tiles.config.row_nbytes[sums] / 4; ++n) {
      float even = 0.0f, odd = 0.0f;
      for (int k = 0; k < tiles.config.rows[weights]; ++k) {
        const uint8_t *x = &tiles.bytes[inputs][m][4 * k], *y = &tiles.bytes[weights][k][4 * n];
        even = std::fma(float_from_bf16(x), float_from_bf16(y), even);
        odd = std::fma(float_from_bf16(x + 2), float_from_bf16(y + 2), odd);
      }
      float sum;
      std::memcpy(&sum, &tiles.bytes[sums][m][4 * n], 4);
      sum += even + odd;
      std::memcpy(&tiles.bytes[sums][m][4 * n], &sum, 4);
    }
  }
}

#define TILE_ZERO(tile) emulated_zero(tile)
#define TILE_LOAD(tile, base, stride) emulated_load(tile, base, stride)
#define TILE_STORE(tile, base, stride) emulated_store(tile, base, stride)
#define TILE_DOT_INT8(sums, inputs, weights) emulated_dot_int8(sums, inputs, weights)
#define TILE_DOT_BF16(sums, inputs, weights) emulated_dot_bf16(sums, inputs, weights)

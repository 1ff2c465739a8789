// Random numbers without a stream: Philox4x32-10, a function of a counter and a key, so that a
// sequence that is resumed, moved or recomputed samples the same tokens again.
// Oracle: workers/philox.py. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1,
// 2, 3".
#pragma once

#include <cstdint>

namespace furiosa {

// In [0, 1), of 53 bits: key = seed (low word first), counter = (position, choice_index, 0, 0).
inline double uniform(uint64_t seed, int32_t position, int32_t choice_index) noexcept {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(choice_index), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key[0];
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key[1];
    c[3] = static_cast<uint32_t>(p0);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return static_cast<double>((uint64_t{c[0]} << 32 | c[1]) >> 11) * 0x1p-53;
}

}  // namespace furiosa

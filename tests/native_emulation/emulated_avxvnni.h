// The AVX-VNNI intrinsics that the kernels use, lane by lane in plain C++, so that those kernels can be
// tested on a CPU without them. Written from Intel's description of each instruction.
//
// Included after <immintrin.h>, under the target of the emulating build, instead of the real ones.

#include <cstdint>
#include <cstring>

namespace emulated {

// Four products of an unsigned byte of `a` and a signed byte of `b` onto each sum, no saturation.
inline __m256i dpbusd_256(__m256i sums, __m256i a, __m256i b) {
  int32_t totals[8];
  uint8_t x[32];
  int8_t y[32];
  std::memcpy(totals, &sums, 32), std::memcpy(x, &a, 32), std::memcpy(y, &b, 32);
  for (int i = 0; i < 32; ++i) totals[i / 4] += x[i] * y[i];
  std::memcpy(&sums, totals, 32);
  return sums;
}

// Two products of signed words onto each sum.
inline __m256i dpwssd_256(__m256i sums, __m256i a, __m256i b) {
  int32_t totals[8];
  int16_t x[16], y[16];
  std::memcpy(totals, &sums, 32), std::memcpy(x, &a, 32), std::memcpy(y, &b, 32);
  for (int i = 0; i < 16; ++i) totals[i / 2] += x[i] * y[i];
  std::memcpy(&sums, totals, 32);
  return sums;
}

}  // namespace emulated

#define _mm256_dpbusd_avx_epi32 emulated::dpbusd_256
#define _mm256_dpwssd_avx_epi32 emulated::dpwssd_256

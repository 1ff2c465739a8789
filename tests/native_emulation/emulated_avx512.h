// The AVX-512 intrinsics that the kernels use, lane by lane in plain C++, so that those kernels can be
// tested on a CPU without them. Written from Intel's description of each instruction.
//
// Included after <immintrin.h>, under the target of the emulating build, instead of the real ones.

#include <cmath>
#include <cstdint>
#include <cstring>

// A vector type as a template's argument loses its alignment, which nothing here relies on.
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace emulated {

#define EMULATED inline __attribute__((always_inline))

template <class Lane, class Vector>
struct Lanes {
  static constexpr int kCount = static_cast<int>(sizeof(Vector) / sizeof(Lane));
  Lane lane[kCount];

  explicit Lanes(const Vector& vector) { std::memcpy(lane, &vector, sizeof(Vector)); }
  Lanes() = default;
  template <class Result>
  Result as() const {
    static_assert(sizeof(Result) == sizeof(Vector));
    Result result;
    std::memcpy(&result, lane, sizeof(Result));
    return result;
  }
};

template <class Lane, class Body>
EMULATED __m512i for_ints(const Body& body) {
  Lanes<Lane, __m512i> result;
  for (int i = 0; i < result.kCount; ++i) result.lane[i] = static_cast<Lane>(body(i));
  return result.template as<__m512i>();
}
template <class Body>
EMULATED __m512 for_floats(const Body& body) {
  Lanes<float, __m512> result;
  for (int i = 0; i < 16; ++i) result.lane[i] = body(i);
  return result.as<__m512>();
}

EMULATED __m512 set1_ps(float x) {
  return for_floats([&](int) { return x; });
}
EMULATED __m512i set1_epi8(char x) {
  return for_ints<int8_t>([&](int) { return x; });
}
EMULATED __m512i set1_epi32(int x) {
  return for_ints<int32_t>([&](int) { return x; });
}
EMULATED __m512i setzero_si512() { return set1_epi32(0); }

EMULATED __m512i loadu_si512(const void* place) {
  __m512i x;
  std::memcpy(&x, place, 64);
  return x;
}
EMULATED void storeu_si512(void* place, __m512i x) { std::memcpy(place, &x, 64); }
EMULATED __m512 loadu_ps(const void* place) {
  __m512 x;
  std::memcpy(&x, place, 64);
  return x;
}
EMULATED void storeu_ps(void* place, __m512 x) { std::memcpy(place, &x, 64); }
// Lanes whose mask bit is 0 are not read (zero) and not written.
EMULATED __m512 maskz_loadu_ps(__mmask16 mask, const void* place) {
  const float* from = static_cast<const float*>(place);
  return for_floats([&](int i) { return (mask >> i & 1) != 0 ? from[i] : 0.0f; });
}
EMULATED void mask_storeu_ps(void* place, __mmask16 mask, __m512 x) {
  const Lanes<float, __m512> lanes(x);
  float* to = static_cast<float*>(place);
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) to[i] = lanes.lane[i];
  }
}

EMULATED __m512 add_ps(__m512 a, __m512 b) {
  const Lanes<float, __m512> x(a), y(b);
  return for_floats([&](int i) { return x.lane[i] + y.lane[i]; });
}
EMULATED __m512 sub_ps(__m512 a, __m512 b) {
  const Lanes<float, __m512> x(a), y(b);
  return for_floats([&](int i) { return x.lane[i] - y.lane[i]; });
}
EMULATED __m512 mul_ps(__m512 a, __m512 b) {
  const Lanes<float, __m512> x(a), y(b);
  return for_floats([&](int i) { return x.lane[i] * y.lane[i]; });
}
EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Lanes<float, __m512> x(a), y(b), z(c);
  return for_floats([&](int i) { return std::fma(x.lane[i], y.lane[i], z.lane[i]); });
}
EMULATED __m512 cvtepi32_ps(__m512i a) {
  const Lanes<int32_t, __m512i> x(a);
  return for_floats([&](int i) { return static_cast<float>(x.lane[i]); });
}
EMULATED __mmask16 cmpeq_epi32_mask(__m512i a, __m512i b) {
  const Lanes<int32_t, __m512i> x(a), y(b);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(x.lane[i] == y.lane[i]) << i;
  return static_cast<__mmask16>(mask);
}
// The lanes of `a` at `places`, of which the lowest four bits count; `source`'s where the mask has none.
EMULATED __m512 mask_permutexvar_ps(__m512 source, __mmask16 mask, __m512i places, __m512 a) {
  const Lanes<float, __m512> x(source), y(a);
  const Lanes<int32_t, __m512i> place(places);
  return for_floats(
      [&](int i) { return (mask >> i & 1) != 0 ? y.lane[place.lane[i] & 15] : x.lane[i]; });
}
EMULATED __m512 castsi512_ps(__m512i a) { return Lanes<int32_t, __m512i>(a).as<__m512>(); }
EMULATED __m512 cvtph_ps(__m256i a) {
  const Lanes<uint16_t, __m256i> x(a);
  return for_floats([&](int i) {
    const int exponent = x.lane[i] >> 10 & 31, mantissa = x.lane[i] & 1023;
    float value = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                  : exponent < 31  ? std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25)
                  : mantissa == 0  ? INFINITY
                                   : NAN;
    return (x.lane[i] & 0x8000) != 0 ? -value : value;
  });
}

// The numbers of `low`, then those of `high`, as bfloat16, halves to even; for numbers as they come
// here, neither NaN nor so small that bfloat16 holds them in part.
EMULATED __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
  const Lanes<uint32_t, __m512> x(low), y(high);
  return for_ints<uint16_t>([&](int i) {
    const uint32_t bits = i < 16 ? x.lane[i] : y.lane[i - 16];
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  });
}

EMULATED __m512i and_si512(__m512i a, __m512i b) {
  const Lanes<int32_t, __m512i> x(a), y(b);
  return for_ints<int32_t>([&](int i) { return x.lane[i] & y.lane[i]; });
}
EMULATED __m512i or_si512(__m512i a, __m512i b) {
  const Lanes<int32_t, __m512i> x(a), y(b);
  return for_ints<int32_t>([&](int i) { return x.lane[i] | y.lane[i]; });
}
EMULATED __m512i xor_si512(__m512i a, __m512i b) {
  const Lanes<int32_t, __m512i> x(a), y(b);
  return for_ints<int32_t>([&](int i) { return x.lane[i] ^ y.lane[i]; });
}
// Each 16 bytes for themselves; no index here is negative, which would give 0.
EMULATED __m512i shuffle_epi8(__m512i a, __m512i indices) {
  const Lanes<uint8_t, __m512i> x(a), index(indices);
  return for_ints<uint8_t>([&](int i) { return x.lane[i / 16 * 16 + index.lane[i] % 16]; });
}
EMULATED __m512i sub_epi32(__m512i a, __m512i b) {
  const Lanes<uint32_t, __m512i> x(a), y(b);
  return for_ints<uint32_t>([&](int i) { return x.lane[i] - y.lane[i]; });
}
EMULATED __m512i sub_epi8(__m512i a, __m512i b) {
  const Lanes<int8_t, __m512i> x(a), y(b);
  return for_ints<int8_t>([&](int i) { return x.lane[i] - y.lane[i]; });
}
EMULATED __m512i add_epi32(__m512i a, __m512i b) {
  const Lanes<uint32_t, __m512i> x(a), y(b);
  return for_ints<uint32_t>([&](int i) { return x.lane[i] + y.lane[i]; });
}
EMULATED __m512i add_epi8(__m512i a, __m512i b) {
  const Lanes<uint8_t, __m512i> x(a), y(b);
  return for_ints<uint8_t>([&](int i) { return x.lane[i] + y.lane[i]; });
}
EMULATED __m512i mullo_epi16(__m512i a, __m512i b) {
  const Lanes<uint16_t, __m512i> x(a), y(b);
  return for_ints<uint16_t>([&](int i) { return uint32_t{x.lane[i]} * uint32_t{y.lane[i]}; });
}
EMULATED __m512i mullo_epi32(__m512i a, __m512i b) {
  const Lanes<uint32_t, __m512i> x(a), y(b);
  return for_ints<uint32_t>([&](int i) { return x.lane[i] * y.lane[i]; });
}
EMULATED __m512i cvtepi8_epi16(__m256i a) {
  const Lanes<int8_t, __m256i> x(a);
  return for_ints<int16_t>([&](int i) { return x.lane[i]; });
}
EMULATED __m256i castsi512_si256(__m512i a) {
  __m256i low;
  std::memcpy(&low, &a, 32);
  return low;
}
EMULATED __m256i extracti64x4_epi64(__m512i a, int half) {
  Lanes<int64_t, __m512i> x(a);
  __m256i result;
  std::memcpy(&result, x.lane + 4 * half, 32);
  return result;
}
EMULATED __m512i cvtepu8_epi32(__m128i a) {
  const Lanes<uint8_t, __m128i> x(a);
  return for_ints<int32_t>([&](int i) { return x.lane[i]; });
}
EMULATED __m512i srli_epi32(__m512i a, unsigned count) {
  const Lanes<uint32_t, __m512i> x(a);
  return for_ints<uint32_t>([&](int i) { return x.lane[i] >> count; });
}
EMULATED __m512i srai_epi32(__m512i a, unsigned count) {
  const Lanes<int32_t, __m512i> x(a);
  return for_ints<int32_t>([&](int i) { return x.lane[i] >> count; });
}
EMULATED __m512i srli_epi16(__m512i a, unsigned count) {
  const Lanes<uint16_t, __m512i> x(a);
  return for_ints<uint16_t>([&](int i) { return x.lane[i] >> count; });
}
EMULATED __m512i slli_epi32(__m512i a, unsigned count) {
  const Lanes<uint32_t, __m512i> x(a);
  return for_ints<uint32_t>([&](int i) { return x.lane[i] << count; });
}
// Four products of an unsigned byte of `a` and a signed byte of `b` onto each sum, no saturation.
EMULATED __m512i dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
  const Lanes<int32_t, __m512i> sum(sums);
  const Lanes<uint8_t, __m512i> x(a);
  const Lanes<int8_t, __m512i> y(b);
  return for_ints<int32_t>([&](int i) {
    int32_t total = sum.lane[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) total += int32_t{x.lane[j]} * int32_t{y.lane[j]};
    return total;
  });
}

// Two products of signed words onto each sum.
EMULATED __m512i dpwssd_epi32(__m512i sums, __m512i a, __m512i b) {
  const Lanes<int32_t, __m512i> sum(sums);
  const Lanes<int16_t, __m512i> x(a), y(b);
  return for_ints<int32_t>([&](int i) {
    return sum.lane[i] + x.lane[2 * i] * y.lane[2 * i] + x.lane[2 * i + 1] * y.lane[2 * i + 1];
  });
}

}  // namespace emulated

#undef _mm512_set1_ps
#undef _mm512_srli_epi16
#undef _mm512_srli_epi32
#undef _mm512_slli_epi32
#undef _mm512_srai_epi32
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set1_epi8 emulated::set1_epi8
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_stream_ps emulated::storeu_ps
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm512_add_ps emulated::add_ps
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_castsi512_ps emulated::castsi512_ps
#define _mm512_cmpeq_epi32_mask emulated::cmpeq_epi32_mask
#define _mm512_mask_permutexvar_ps emulated::mask_permutexvar_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_and_si512 emulated::and_si512
#define _mm512_or_si512 emulated::or_si512
#define _mm512_xor_si512 emulated::xor_si512
#define _mm512_shuffle_epi8 emulated::shuffle_epi8
#define _mm512_sub_epi32 emulated::sub_epi32
#define _mm512_sub_epi8 emulated::sub_epi8
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srai_epi32 emulated::srai_epi32
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#define _mm512_dpwssd_epi32 emulated::dpwssd_epi32
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_add_epi8 emulated::add_epi8
#define _mm512_mullo_epi16 emulated::mullo_epi16
#define _mm512_mullo_epi32 emulated::mullo_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_cvtepi8_epi16 emulated::cvtepi8_epi16
#undef _mm512_extracti64x4_epi64
#define _mm512_castsi512_si256 emulated::castsi512_si256
#define _mm512_extracti64x4_epi64 emulated::extracti64x4_epi64
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32

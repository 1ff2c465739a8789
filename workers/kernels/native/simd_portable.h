// Eight floats at a time on any CPU: a pair of 4-lane vectors, which GCC and Clang turn into SSE2,
// NEON or scalar code. The names and their meaning are those of simd_avx2.h; row_kernels.h and
// attention_kernel.h are written on them and compiled once per family.
//
// Included inside that family's namespace, after <cmath>, <cstdint> and <cstring>.

#define SIMD_INLINE inline __attribute__((always_inline))

typedef float V4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

struct F8 {
  V4 lo, hi;
};

SIMD_INLINE F8 splat(float x) { return {V4{x, x, x, x}, V4{x, x, x, x}}; }
SIMD_INLINE F8 load(const float* p) {
  F8 x;
  std::memcpy(&x, p, 32);
  return x;
}
SIMD_INLINE F8 load(const uint16_t* bf16) {
  uint32_t bits[8];
  for (int i = 0; i < 8; ++i) bits[i] = static_cast<uint32_t>(bf16[i]) << 16;
  F8 x;
  std::memcpy(&x, bits, 32);
  return x;
}
SIMD_INLINE F8 load(const int8_t* p) {
  float values[8];
  for (int i = 0; i < 8; ++i) values[i] = static_cast<float>(p[i]);
  return load(values);
}
SIMD_INLINE void store(float* p, F8 x) { std::memcpy(p, &x, 32); }

SIMD_INLINE F8 add(F8 a, F8 b) { return {a.lo + b.lo, a.hi + b.hi}; }
SIMD_INLINE F8 sub(F8 a, F8 b) { return {a.lo - b.lo, a.hi - b.hi}; }
SIMD_INLINE F8 mul(F8 a, F8 b) { return {a.lo * b.lo, a.hi * b.hi}; }
SIMD_INLINE F8 div(F8 a, F8 b) { return {a.lo / b.lo, a.hi / b.hi}; }
SIMD_INLINE F8 fma(F8 a, F8 b, F8 c) { return add(mul(a, b), c); }

SIMD_INLINE V4 select(I4 mask, V4 a, V4 b) { return (V4)((mask & (I4)a) | (~mask & (I4)b)); }
SIMD_INLINE F8 max(F8 a, F8 b) {
  return {select(a.lo > b.lo, a.lo, b.lo), select(a.hi > b.hi, a.hi, b.hi)};
}
SIMD_INLINE F8 abs(F8 a) {
  const I4 mask = {0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff};
  return {(V4)((I4)a.lo & mask), (V4)((I4)a.hi & mask)};
}
// Nearest integer, half to even; |x| < 2^22.
SIMD_INLINE F8 round(F8 x) { return sub(add(x, splat(12582912.0f)), splat(12582912.0f)); }
// 2^n for integral n in -126 .. 127.
SIMD_INLINE F8 exp2_integral(F8 n) {
  const I4 lo = (__builtin_convertvector(n.lo, I4) + 127) << 23;
  const I4 hi = (__builtin_convertvector(n.hi, I4) + 127) << 23;
  return {(V4)lo, (V4)hi};
}
// x where at_least >= limit, else 0.
SIMD_INLINE F8 zero_below(F8 x, F8 at_least, float limit) {
  const F8 bound = splat(limit);
  return {(V4)((I4)x.lo & (at_least.lo >= bound.lo)), (V4)((I4)x.hi & (at_least.hi >= bound.hi))};
}

// Lanes i and i + 4, then i and i + 2, then the two: the order of every family with 8 lanes.
SIMD_INLINE float sum(F8 x) {
  const V4 four = x.lo + x.hi;
  return (four[0] + four[2]) + (four[1] + four[3]);
}
SIMD_INLINE void sum4(float* out, F8 a, F8 b, F8 c, F8 d) {
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}
SIMD_INLINE float max_lane(F8 x) {
  const V4 four = select(x.lo > x.hi, x.lo, x.hi);
  const float even = four[0] > four[2] ? four[0] : four[2];
  const float odd = four[1] > four[3] ? four[1] : four[3];
  return even > odd ? even : odd;
}

// Lanes exchanged with their neighbours at a distance of 1, 2 and 4.
SIMD_INLINE F8 swap_ones(F8 x) {
  return {__builtin_shuffle(x.lo, I4{1, 0, 3, 2}), __builtin_shuffle(x.hi, I4{1, 0, 3, 2})};
}
SIMD_INLINE F8 swap_pairs(F8 x) {
  return {__builtin_shuffle(x.lo, I4{2, 3, 0, 1}), __builtin_shuffle(x.hi, I4{2, 3, 0, 1})};
}
SIMD_INLINE F8 swap_halves(F8 x) { return {x.hi, x.lo}; }

// q = group * inverse rounded half to even; returns their sum. What is not a number becomes anything.
SIMD_INLINE int32_t quantize_group(int8_t* q, const F8 (&group)[4], float inverse) {
  int32_t sum = 0;
  for (int i = 0; i < 32; i += 8) {
    float rounded[8];
    store(rounded, round(mul(group[i / 8], splat(inverse))));
    for (int l = 0; l < 8; ++l) {
      q[i + l] = std::fabs(rounded[l]) <= 127.0f ? static_cast<int8_t>(rounded[l]) : int8_t{0};
      sum += q[i + l];
    }
  }
  return sum;
}

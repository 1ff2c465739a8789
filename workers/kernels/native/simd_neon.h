// Eight floats at a time with NEON: a pair of 4-lane registers. simd_portable.h says what each name
// means.
//
// Included inside the family's namespace, after <arm_neon.h>.

#define SIMD_INLINE inline __attribute__((always_inline))

struct F8 {
  float32x4_t lo, hi;
};

SIMD_INLINE F8 splat(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
SIMD_INLINE F8 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
SIMD_INLINE F8 load(const uint16_t* bf16) {
  const uint16x8_t halves = vld1q_u16(bf16);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)),
          vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(halves), 16))};
}
SIMD_INLINE F8 load(const int8_t* p) {
  const int16x8_t words = vmovl_s8(vld1_s8(p));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))),
          vcvtq_f32_s32(vmovl_s16(vget_high_s16(words)))};
}
SIMD_INLINE void store(float* p, F8 x) {
  vst1q_f32(p, x.lo);
  vst1q_f32(p + 4, x.hi);
}

SIMD_INLINE F8 add(F8 a, F8 b) { return {vaddq_f32(a.lo, b.lo), vaddq_f32(a.hi, b.hi)}; }
SIMD_INLINE F8 sub(F8 a, F8 b) { return {vsubq_f32(a.lo, b.lo), vsubq_f32(a.hi, b.hi)}; }
SIMD_INLINE F8 mul(F8 a, F8 b) { return {vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)}; }
SIMD_INLINE F8 div(F8 a, F8 b) { return {vdivq_f32(a.lo, b.lo), vdivq_f32(a.hi, b.hi)}; }
SIMD_INLINE F8 fma(F8 a, F8 b, F8 c) {
  return {vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)};
}

// A comparison, not vmaxq: what a NaN becomes is then what it becomes elsewhere.
SIMD_INLINE F8 max(F8 a, F8 b) {
  return {vbslq_f32(vcgtq_f32(a.lo, b.lo), a.lo, b.lo),
          vbslq_f32(vcgtq_f32(a.hi, b.hi), a.hi, b.hi)};
}
SIMD_INLINE F8 abs(F8 a) { return {vabsq_f32(a.lo), vabsq_f32(a.hi)}; }
SIMD_INLINE F8 round(F8 x) { return {vrndnq_f32(x.lo), vrndnq_f32(x.hi)}; }
SIMD_INLINE F8 exp2_integral(F8 n) {
  const int32x4_t bias = vdupq_n_s32(127);
  return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.lo), bias), 23)),
          vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.hi), bias), 23))};
}
SIMD_INLINE F8 zero_below(F8 x, F8 at_least, float limit) {
  const float32x4_t bound = vdupq_n_f32(limit), zero = vdupq_n_f32(0.0f);
  return {vbslq_f32(vcgeq_f32(at_least.lo, bound), x.lo, zero),
          vbslq_f32(vcgeq_f32(at_least.hi, bound), x.hi, zero)};
}

SIMD_INLINE float sum(F8 x) {
  const float32x4_t four = vaddq_f32(x.lo, x.hi);
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
SIMD_INLINE void sum4(float* out, F8 a, F8 b, F8 c, F8 d) {
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
}
SIMD_INLINE float max_lane(F8 x) {
  float lanes[8];
  store(lanes, x);
  float largest = lanes[0];
  for (int i = 1; i < 8; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

SIMD_INLINE F8 swap_ones(F8 x) { return {vrev64q_f32(x.lo), vrev64q_f32(x.hi)}; }
SIMD_INLINE F8 swap_pairs(F8 x) { return {vextq_f32(x.lo, x.lo, 2), vextq_f32(x.hi, x.hi, 2)}; }
SIMD_INLINE F8 swap_halves(F8 x) { return {x.hi, x.lo}; }

SIMD_INLINE int32_t quantize_group(int8_t* q, const F8 (&group)[4], float inverse) {
  int32x4_t total = vdupq_n_s32(0);
  for (int i = 0; i < 32; i += 16) {
    const F8 &first = group[i / 8], &second = group[i / 8 + 1];
    const float32x4_t values[4] = {first.lo, first.hi, second.lo, second.hi};
    int32x4_t words[4];
    for (int j = 0; j < 4; ++j) {
      words[j] = vcvtnq_s32_f32(vmulq_n_f32(values[j], inverse));
      total = vaddq_s32(total, words[j]);
    }
    const int16x8_t low = vcombine_s16(vmovn_s32(words[0]), vmovn_s32(words[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(words[2]), vmovn_s32(words[3]));
    vst1q_s8(q + i, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
  }
  return vaddvq_s32(total);
}

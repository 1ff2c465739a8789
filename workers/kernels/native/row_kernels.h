// Kernels over one row of floats, written on F8 and compiled once per family.
//
// Order of sums: eight lanes, lane l taking elements l, l + 8, ... from left to right, then the
// lanes in the order of `sum`; a row that is no multiple of 8 is completed with zeros. One row's
// bits therefore depend on that row alone.
// Included inside the family's namespace, after its simd_*.h.

// exp(x) to 2 units in the last place for x <= 88; exactly 0 below -87.
// Source: Cephes expf: x = n ln 2 + r, a polynomial in r, times 2^n.
SIMD_INLINE F8 exp(F8 x) {
  const F8 clamped = max(x, splat(-87.0f));
  const F8 n = round(mul(clamped, splat(1.44269504088896341f)));
  F8 r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  F8 y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = add(fma(y, mul(r, r), r), splat(1.0f));
  return zero_below(mul(y, exp2_integral(n)), x, -87.0f);
}

// The last n % 8 elements, completed with `fill`.
SIMD_INLINE F8 load_tail(const float* x, int count, float fill = 0.0f) {
  float lanes[8] = {fill, fill, fill, fill, fill, fill, fill, fill};
  for (int i = 0; i < count; ++i) lanes[i] = x[i];
  return load(lanes);
}
SIMD_INLINE void store_tail(float* y, F8 x, int count) {
  float lanes[8];
  store(lanes, x);
  for (int i = 0; i < count; ++i) y[i] = lanes[i];
}

// y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
void rms_norm(float* y, const float* x, const float* weight, int cols, float eps) {
  const int whole = cols & ~7;
  F8 squares = splat(0.0f);
  for (int i = 0; i < whole; i += 8) squares = fma(load(x + i), load(x + i), squares);
  if (whole < cols) {
    const F8 tail = load_tail(x + whole, cols - whole);
    squares = fma(tail, tail, squares);
  }
  const F8 factor = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(cols) + eps));
  for (int i = 0; i < whole; i += 8) {
    store(y + i, mul(mul(load(x + i), factor), load(weight + i)));
  }
  if (whole < cols) {
    const F8 tail = mul(load_tail(x + whole, cols - whole), factor);
    store_tail(y + whole, mul(tail, load_tail(weight + whole, cols - whole)), cols - whole);
  }
}

// y = gate * sigmoid(gate) * up; y may be gate.
SIMD_INLINE F8 swiglu8(F8 gate, F8 up) {
  const F8 exp_minus = exp(sub(splat(0.0f), max(gate, splat(-87.0f))));
  return mul(div(gate, add(splat(1.0f), exp_minus)), up);
}
void swiglu(float* y, const float* gate, const float* up, int n) {
  const int whole = n & ~7;
  for (int i = 0; i < whole; i += 8) store(y + i, swiglu8(load(gate + i), load(up + i)));
  if (whole < n) {
    const F8 last = swiglu8(load_tail(gate + whole, n - whole), load_tail(up + whole, n - whole));
    store_tail(y + whole, last, n - whole);
  }
}

// Rotates the pairs (i, i + head_dim / 2): the half-split convention of Llama checkpoints.
// Source: Su et al. 2021, "RoFormer".
void rotate(float* head, const float* cos, const float* sin, int head_dim) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i] + a * sin[i];
  }
}

// H times a group, at distances 1, 2, 4, 8, 16 in turn: workers/artifact/rotation.py. Products with
// 1 and -1 are exact, so that it is no matter whether a family fuses them.
SIMD_INLINE void rotate_group(F8 (&group)[4]) {
  static const float kSigns[3][8] = {{1, -1, 1, -1, 1, -1, 1, -1},
                                     {1, 1, -1, -1, 1, 1, -1, -1},
                                     {1, 1, 1, 1, -1, -1, -1, -1}};
  for (F8& x : group) {
    x = fma(x, load(kSigns[0]), swap_ones(x));
    x = fma(x, load(kSigns[1]), swap_pairs(x));
    x = fma(x, load(kSigns[2]), swap_halves(x));
  }
  const F8 a = add(group[0], group[1]), b = sub(group[0], group[1]);
  const F8 c = add(group[2], group[3]), d = sub(group[2], group[3]);
  group[0] = add(a, c), group[1] = add(b, d), group[2] = sub(a, c), group[3] = sub(b, d);
}

// Rounded half to even; NaN stays NaN.
void bf16_from_float(uint16_t* y, const float* x, int n) {
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    y[i] = static_cast<uint16_t>(is_nan ? (bits >> 16 | 0x40u) : rounded);
  }
}

// y = x as bfloat16, and `rounded` the same numbers; `rounded` may be x.
SIMD_INLINE void round_to_bf16(uint16_t* y, float* rounded, const float* x, int n) {
  bf16_from_float(y, x, n);
  const int whole = n & ~7;
  for (int i = 0; i < whole; i += 8) store(rounded + i, load(y + i));
  for (int i = whole; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(y[i]) << 16;
    std::memcpy(rounded + i, &bits, 4);
  }
}

// Groups below are taken for zeros: the inverse of their scale would be no float.
constexpr float kLeastScale = 0x1p-100f;

// Two int16 side by side.
constexpr int32_t two_words(int32_t low, int32_t high) {
  return static_cast<int32_t>((static_cast<uint32_t>(low) & 0xffffu) | static_cast<uint32_t>(high) << 16);
}

// Whether products of these weights are added up in 16 bits, two at a time, as the AVX2 family does with
// (w + 128) x: then the largest pair of inputs becomes 127, not the largest input. Rounded, a pair is
// at most 128 in size, and 255 * 128 fits.
SIMD_INLINE bool limits_pairs(const Matrix& weights) {
  return kAddsPairsInWords && weights.dtype == kInt8 && weights.is_rotated;
}

// How many inputs share a scale: as many as weights do, but no more than a pair of groups where their
// pairs are limited, which costs precision.
SIMD_INLINE int input_group(const Matrix& weights) {
  return limits_pairs(weights) ? std::min(weights.scale_group, kPairSize) : weights.scale_group;
}

constexpr float kInputLevels = 127.0f;

// `Parts` groups of 32 share a scale.
template <int Parts>
void quantize_groups(const float* from, const Activations& x, const Matrix& weights, int row, int col_begin,
                     int col_end) {
  constexpr int kSize = Parts * kGroupSize;
  const bool is_rotated = weights.is_rotated, has_limited_pairs = limits_pairs(weights);
  const float factor = is_rotated ? 0.125f : 1.0f;  // a power of two: exact
  const int64_t first = static_cast<int64_t>(row) * x.cols;
  // Nothing here overlaps; told so, the compiler keeps the addresses in registers.
  int8_t* __restrict quants = x.quants + first;
  float *__restrict scales = x.scales + first / kSize, *__restrict scaled = x.scaled_sums + first / kSize;
  int32_t *__restrict offsets = x.offsets + first / kSize;
  int32_t *__restrict word_sums = x.word_sums + first / kPairSize;
  int32_t *__restrict group_offsets = x.group_offsets + first / kGroupSize;
  for (int col = col_begin; col < col_end; col += kSize) {
    F8 groups[Parts][4], highest = splat(0.0f);
    for (int part = 0; part < Parts; ++part, from += kGroupSize) {
      F8(&group)[4] = groups[part];
      for (int i = 0; i < 4; ++i) group[i] = load(from + 8 * i);
      if (is_rotated) rotate_group(group);
      for (int i = 0; i < 4; ++i) {
        const F8 size_of = abs(group[i]);
        highest = max(highest, has_limited_pairs ? add(size_of, swap_ones(size_of)) : size_of);
      }
    }
    const float largest = max_lane(highest);
    float scale = largest / kInputLevels;
    int32_t sums[Parts] = {}, total = 0;
    if (scale < kLeastScale) {
      scale = 0.0f;
      std::memset(quants + col, 0, kSize);
    } else {
      for (int part = 0; part < Parts; ++part) {
        sums[part] = quantize_group(quants + col + part * kGroupSize, groups[part], kInputLevels / largest);
        total += sums[part];
      }
    }
    const int index = col / kSize, group = col / kGroupSize;
    for (int part = 0; part < Parts; ++part) group_offsets[group + part] = -8 * sums[part];
    for (int part = 0; part + 1 < Parts; part += 2) {
      word_sums[(group + part) / 2] = two_words(sums[part], sums[part + 1]);
    }
    scales[index] = scale * factor;
    scaled[index] = scale * factor * static_cast<float>(total);
    offsets[index] = -128 * total;
  }
}

void quantize(const float* values, const Activations& x, const Matrix& weights, int row,
              int col_begin, int col_end) {
  if (weights.dtype == kBf16) {
    const int64_t first = static_cast<int64_t>(row) * x.cols + col_begin;
    round_to_bf16(x.halves + first, x.values + first, values, col_end - col_begin);
  } else {
    decltype(&quantize_groups<1>) quantize_all;
    switch (input_group(weights) / kGroupSize) {
      case 1: quantize_all = quantize_groups<1>; break;
      case 2: quantize_all = quantize_groups<2>; break;
      case 4: quantize_all = quantize_groups<4>; break;
      default: quantize_all = quantize_groups<6>; break;
    }
    quantize_all(values, x, weights, row, col_begin, col_end);
  }
}

float quantize_head(int8_t* y, const float* x, int n) {
  F8 largest = splat(0.0f);
  for (int i = 0; i < n; i += 8) largest = max(largest, abs(load(x + i)));
  const float scale = max_lane(largest) / 127.0f;
  if (scale == 0.0f) {
    std::memset(y, 0, static_cast<size_t>(n));
    return scale;
  }
  for (int i = 0; i < n; i += 8) {
    float rounded[8];
    store(rounded, round(div(load(x + i), splat(scale))));
    for (int l = 0; l < 8; ++l) {
      const float q = rounded[l];  // at most 127 but for a scale that has lost bits to underflow
      y[i + l] = static_cast<int8_t>(q > 127.0f ? 127.0f : q < -127.0f ? -127.0f : q);
    }
  }
  return scale;
}

float max_finite(const float* x, int n) {
  const int whole = n & ~7;
  F8 largest = splat(-INFINITY), poison = splat(0.0f);  // x * 0 is NaN for NaN and infinity
  for (int i = 0; i < whole; i += 8) {
    largest = max(largest, load(x + i));
    poison = fma(load(x + i), splat(0.0f), poison);
  }
  if (whole < n) {
    const F8 tail = load_tail(x + whole, n - whole, x[whole]);
    largest = max(largest, tail);
    poison = fma(tail, splat(0.0f), poison);
  }
  return sum(poison) == 0.0f ? max_lane(largest) : NAN;
}

// Four doubles in whatever registers the family has.
typedef double D4 __attribute__((vector_size(32)));
typedef int64_t L4 __attribute__((vector_size(32)));

// x = n ln 2 + r with |r| <= ln 2 / 2, then the Taylor series of e^r to r^13 (error below 2^-53).
void exp_double(double* y, const float* x, int n, double shift, double temperature) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  constexpr double kInverseFactorials[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800,
                                           1.0 / 3628800,    1.0 / 362880,    1.0 / 40320,
                                           1.0 / 5040,       1.0 / 720,       1.0 / 120,
                                           1.0 / 24,         1.0 / 6,         0.5,
                                           1.0,              1.0};
  for (int i = 0; i < n; i += 4) {
    const int count = n - i < 4 ? n - i : 4;
    D4 exact = {};
    for (int l = 0; l < count; ++l) exact[l] = x[i + l];
    exact = (exact - shift) / temperature;
    const L4 is_tiny = exact < -700.0;
    const D4 z = (D4)((L4)exact & ~is_tiny);
    const D4 shifted = z * 1.4426950408889634 + kMagic;
    const D4 whole = shifted - kMagic;
    const D4 r = (z - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10;
    D4 series = D4{} + kInverseFactorials[0];
#pragma GCC unroll 13
    for (int k = 1; k < 14; ++k) series = series * r + kInverseFactorials[k];
    // The low bits of `shifted` are the integer; moved up and biased they are 2^n.
    const D4 power = (D4)(((L4)shifted << 52) + 0x3ff0000000000000);
    const D4 result = (D4)((L4)(series * power) & ~is_tiny);
    for (int l = 0; l < count; ++l) y[i + l] = result[l];
  }
}

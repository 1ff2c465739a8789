// Matrix products of the NEON family, in register tiles of `Rows` rows by one panel: 16 outputs are
// four registers.
//
// Order of sums: as in every family, an output is one lane; fp32 and bf16 take inputs from left to
// right, each one FMA; int8 and int4 take what shares a scale from left to right, the sum inside
// being exact in integers (sdot): acc = fma(dot, input scale * weight scale, acc), then
// fma(scaled sum, min, acc).
// Included inside the family's namespace, after simd_neon.h.

constexpr int kQuarters = 4;  // registers of a panel's outputs

template <int Rows>
using NeonTile = float32x4_t[Rows][kQuarters];

template <int Rows>
SIMD_INLINE void store_tile(const NeonTile<Rows>& acc, const Matrix& w, int panel, int row,
                            const Output& out) {
  const int first = panel * kPanelRows;
  const int count = w.rows - first < kPanelRows ? w.rows - first : kPanelRows;
  for (int m = 0; m < Rows; ++m) {
    float* y = out.values + (row + m) * out.stride + first;
    float lanes[kPanelRows];
    for (int i = 0; i < kQuarters; ++i) vst1q_f32(lanes + 4 * i, acc[m][i]);
    for (int r = 0; r < count; ++r) {
      const float value = out.bias != nullptr ? lanes[r] + out.bias[first + r] : lanes[r];
      y[r] = out.accumulate ? y[r] + value : value;
    }
  }
}

template <int Rows>
struct NeonFp32 {
  static SIMD_INLINE void run(NeonTile<Rows>& acc, const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row) {
    const float* values = reinterpret_cast<const float*>(panel);
    const float* inputs = x.values + static_cast<int64_t>(row) * w.cols;
    for (int k = 0; k < w.cols; ++k, values += kPanelRows) {
      const float32x4x4_t weights = vld1q_f32_x4(values);
      for (int m = 0; m < Rows; ++m) {
        const float input = inputs[static_cast<int64_t>(m) * w.cols + k];
        for (int i = 0; i < kQuarters; ++i) {
          acc[m][i] = vfmaq_n_f32(acc[m][i], weights.val[i], input);
        }
      }
    }
  }
};

template <int Rows>
struct NeonBf16 {
  static SIMD_INLINE void run(NeonTile<Rows>& acc, const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row) {
    const uint32x4_t upper = vdupq_n_u32(0xffff0000u);
    const float* inputs = x.values + static_cast<int64_t>(row) * w.cols;
    for (int k = 0; k < w.cols; k += 2, panel += 64) {
      // A 32-bit lane holds input k (low half) and input k + 1 (high half) of one output.
      const uint8x16x4_t pairs = vld1q_u8_x4(panel);
      for (int i = 0; i < kQuarters; ++i) {
        const uint32x4_t pair = vreinterpretq_u32_u8(pairs.val[i]);
        const float32x4_t even = vreinterpretq_f32_u32(vshlq_n_u32(pair, 16));
        const float32x4_t odd = vreinterpretq_f32_u32(vandq_u32(pair, upper));
        for (int m = 0; m < Rows; ++m) {
          const float* input = inputs + static_cast<int64_t>(m) * w.cols + k;
          acc[m][i] = vfmaq_n_f32(acc[m][i], even, input[0]);
          acc[m][i] = vfmaq_n_f32(acc[m][i], odd, input[1]);
        }
      }
    }
  }
};

// Four neighbouring quants of a row, in every lane.
SIMD_INLINE int8x16_t splat_quad(const int8_t* quants) {
  int32_t quad;
  std::memcpy(&quad, quants, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

// acc += dots * (the row's scale * the outputs' scales).
SIMD_INLINE void add_scaled(float32x4_t (&acc)[kQuarters], const int32x4_t (&dots)[kQuarters],
                            const uint16_t* scales, float input_scale) {
  const float16_t* halves = reinterpret_cast<const float16_t*>(scales);
  for (int i = 0; i < kQuarters; ++i) {
    const float32x4_t scale = vcvt_f32_f16(vld1_f16(halves + 4 * i));
    acc[i] = vfmaq_f32(acc[i], vcvtq_f32_s32(dots[i]), vmulq_n_f32(scale, input_scale));
  }
}

template <int Rows>
struct NeonInt8 {
  static SIMD_INLINE void run(NeonTile<Rows>& acc, const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row) {
    const int num_scales = w.num_scales();
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + w.cols * kPanelRows);
    const int8_t* quants = x.quants + static_cast<int64_t>(row) * w.cols;
    const float* input_scales = x.scales + static_cast<int64_t>(row) * num_scales;
    for (int g = 0; g < num_scales; ++g, scales += kPanelRows, quants += w.scale_group) {
      int32x4_t dots[Rows][kQuarters] = {};
      for (int quad = 0; quad < w.scale_group / 4; ++quad, panel += 64) {
        const int8x16x4_t weights = vld1q_s8_x4(reinterpret_cast<const int8_t*>(panel));
        for (int m = 0; m < Rows; ++m) {
          const int8x16_t input = splat_quad(quants + static_cast<int64_t>(m) * w.cols + quad * 4);
          for (int i = 0; i < kQuarters; ++i) {
            dots[m][i] = vdotq_s32(dots[m][i], weights.val[i], input);
          }
        }
      }
      for (int m = 0; m < Rows; ++m) {
        add_scaled(acc[m], dots[m], scales, input_scales[static_cast<int64_t>(m) * num_scales + g]);
      }
    }
  }
};

// Without mins a nibble stands for the value 8 lower: a signed byte like any other.
template <int Rows, bool HasMin>
struct NeonInt4 {
  static SIMD_INLINE void run(NeonTile<Rows>& acc, const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row) {
    const int groups = w.num_groups();
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + w.cols * kPanelRows / 2);
    const uint16_t* mins = scales + groups * kPanelRows;
    const int8_t* quants = x.quants + static_cast<int64_t>(row) * w.cols;
    const int64_t first = static_cast<int64_t>(row) * groups;
    const uint8x16_t nibble = vdupq_n_u8(15);
    const int8x16_t offset = vdupq_n_s8(HasMin ? 0 : 8);
    for (int g = 0; g < groups; ++g, scales += kPanelRows, quants += kGroupSize) {
      int32x4_t dots[Rows][kQuarters] = {};
      for (int quad = 0; quad < 4; ++quad, panel += 64) {
        const uint8x16x4_t packed = vld1q_u8_x4(panel);
        for (int i = 0; i < kQuarters; ++i) {
          const uint8x16_t high_bits = vshrq_n_u8(packed.val[i], 4);
          const int8x16_t low =
              vsubq_s8(vreinterpretq_s8_u8(vandq_u8(packed.val[i], nibble)), offset);
          const int8x16_t high = vsubq_s8(vreinterpretq_s8_u8(high_bits), offset);
          for (int m = 0; m < Rows; ++m) {
            const int8_t* input = quants + static_cast<int64_t>(m) * w.cols + quad * 4;
            dots[m][i] = vdotq_s32(dots[m][i], low, splat_quad(input));
            dots[m][i] = vdotq_s32(dots[m][i], high, splat_quad(input + 16));
          }
        }
      }
      for (int m = 0; m < Rows; ++m) {
        const int64_t group = first + static_cast<int64_t>(m) * groups + g;
        add_scaled(acc[m], dots[m], scales, x.scales[group]);
        if (!HasMin) continue;
        const float16_t* halves = reinterpret_cast<const float16_t*>(mins + g * kPanelRows);
        for (int i = 0; i < kQuarters; ++i) {
          const float32x4_t min = vcvt_f32_f16(vld1_f16(halves + 4 * i));
          acc[m][i] = vfmaq_n_f32(acc[m][i], min, x.scaled_sums[group]);
        }
      }
    }
  }
};

// As int8, with weights that are made on the way. Bytes wrap around, and what they come to is one.
template <int Rows>
struct NeonNested4 {
  static SIMD_INLINE void run(NeonTile<Rows>& acc, const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row) {
    const NestedPanel parts(w, panel);
    const int num_scales = w.num_scales();
    const int8_t* quants = x.quants + static_cast<int64_t>(row) * w.cols;
    const float* input_scales = x.scales + static_cast<int64_t>(row) * num_scales;
    const uint8_t* nibbles = parts.nibbles;
    for (int g = 0; g < num_scales; ++g) {
      int32x4_t dots[Rows][kQuarters] = {};
      for (int group = 0; group < w.scale_group / kGroupSize; ++group, quants += kGroupSize, nibbles += 256) {
        const int pair = g * w.scale_group / kPairSize + group / 2;
        const uint8x16_t both = vld1q_u8(parts.factors + pair * kPanelRows);
        const uint8x16_t of_group = group % 2 == 0 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4);
        const int8x16x2_t shifts = vld2q_s8(parts.shifts + pair * kPanelRows * 2);
        for (int i = 0; i < kQuarters; ++i) {
          const uint8x16_t outputs = vaddq_u8(quarter_lanes(), vdupq_n_u8(static_cast<uint8_t>(4 * i)));
          const int8x16_t factor = vreinterpretq_s8_u8(vqtbl1q_u8(of_group, outputs));
          const int8x16_t shift = vqtbl1q_s8(shifts.val[group % 2], outputs);
          const int8x16_t start = vmlsq_s8(shift, factor, vdupq_n_s8(8));
          for (int quad = 0; quad < 4; ++quad) {
            const uint8x16_t packed = vld1q_u8(nibbles + quad * 64 + i * 16);
            const uint8x16_t low_bits = vandq_u8(packed, vdupq_n_u8(15));
            const int8x16_t low = vmlaq_s8(start, vreinterpretq_s8_u8(low_bits), factor);
            const int8x16_t high =
                vmlaq_s8(start, vreinterpretq_s8_u8(vshrq_n_u8(packed, 4)), factor);
            for (int m = 0; m < Rows; ++m) {
              const int8_t* input = quants + static_cast<int64_t>(m) * w.cols + quad * 4;
              dots[m][i] = vdotq_s32(dots[m][i], low, splat_quad(input));
              dots[m][i] = vdotq_s32(dots[m][i], high, splat_quad(input + 16));
            }
          }
        }
      }
      for (int m = 0; m < Rows; ++m) {
        const float input_scale = input_scales[static_cast<int64_t>(m) * num_scales + g];
        add_scaled(acc[m], dots[m], parts.scales + g * kPanelRows, input_scale);
      }
    }
  }

 private:
  // The number of its output in each byte of a register of four.
  static SIMD_INLINE uint8x16_t quarter_lanes() {
    const uint8_t lanes[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    return vld1q_u8(lanes);
  }
};

template <int Rows>
using NeonInt4Min = NeonInt4<Rows, true>;
template <int Rows>
using NeonInt4Plain = NeonInt4<Rows, false>;

template <template <int> class Kernel, int Rows>
SIMD_INLINE void run_tile(const uint8_t* data, const Matrix& w, int panel, const Activations& x, int row,
                          const Output& out) {
  NeonTile<Rows> acc;
  for (int m = 0; m < Rows; ++m) {
    for (int i = 0; i < kQuarters; ++i) acc[m][i] = vdupq_n_f32(0.0f);
  }
  Kernel<Rows>::run(acc, data, w, x, row);
  store_tile<Rows>(acc, w, panel, row, out);
}

// All rows of the range against a panel, whose bytes are at `data`. Three rows' sums, products and weights fill
// the 32 registers.
template <template <int> class Kernel>
SIMD_INLINE void run_panel(const uint8_t* data, const Matrix& w, int panel, const Activations& x, int row,
                           int row_end, const Output& out) {
  for (; row + 3 <= row_end; row += 3) run_tile<Kernel, 3>(data, w, panel, x, row, out);
  if (row_end - row == 2) run_tile<Kernel, 2>(data, w, panel, x, row, out);
  if (row_end - row == 1) run_tile<Kernel, 1>(data, w, panel, x, row, out);
}

// One panel after the other, so that it stays in the first-level cache.
template <template <int> class Kernel>
void matmul(const Matrix& w, int panel_begin, int panel_end, const Activations& x, int row_begin,
            int row_end, const Output& out, void*) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    run_panel<Kernel>(w.panel(panel), w, panel, x, row_begin, row_end, out);
  }
}

constexpr MatmulKernel matmul_fp32 = matmul<NeonFp32>;
constexpr MatmulKernel matmul_bf16 = matmul<NeonBf16>;
constexpr MatmulKernel matmul_int8 = matmul<NeonInt8>;
constexpr MatmulKernel matmul_nested4 = matmul<NeonNested4>;

void matmul_int4(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                 int row_begin, int row_end, const Output& out, void* scratch) {
  const MatmulKernel kernel = w.has_min ? matmul<NeonInt4Min> : matmul<NeonInt4Plain>;
  kernel(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch);
}

// A panel becomes int8's before it is multiplied.
void matmul_int6(const Matrix& w, int panel_begin, int panel_end, const Activations& x, int row_begin,
                 int row_end, const Output& out, void* scratch) {
  uint8_t* values = static_cast<uint8_t*>(scratch);
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    unpack_int6(values, w, panel);
    run_panel<NeonInt8>(values, w, panel, x, row_begin, row_end, out);
  }
}

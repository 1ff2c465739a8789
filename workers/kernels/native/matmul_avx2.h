// Matrix products of the AVX2 family, in register tiles of `Rows` rows by one panel (16 outputs).
//
// Order of sums: an output is one lane; fp32 and bf16 take inputs from left to right, each one FMA;
// int8 and int4 take groups of 32 from left to right, the sum inside a group being exact in
// integers: acc = fma(dot, input scale * weight scale, acc), then fma(min, scaled sum, acc). A tile
// of one row does what a tile of four does, so an output's bits do not depend on the batch.
// Included inside the family's namespace, after simd_avx2.h.

// Keeps the compiler from reordering sums across this point. Left alone, GCC computes all products
// of an unrolled group first, runs out of registers and waits for its own spills.
SIMD_INLINE void pin(__m256i& x, __m256i& y) { asm volatile("" : "+x"(x), "+x"(y)); }

// A tile's sums: two registers, outputs 0-7 and 8-15, per row.
template <int Rows>
using Tile = F8[Rows][2];

template <int Rows>
SIMD_INLINE void store_tile(const Tile<Rows>& acc, const Matrix& w, int panel, int row,
                            const Output& out) {
  const int first = panel * kPanelRows;
  const bool is_whole = first + kPanelRows <= w.rows;
  for (int m = 0; m < Rows; ++m) {
    float* y = out.values + (row + m) * out.stride + first;
    F8 low = acc[m][0], high = acc[m][1];
    if (is_whole) {
      if (out.bias != nullptr) {
        low = add(low, load(out.bias + first));
        high = add(high, load(out.bias + first + 8));
      }
      if (out.accumulate) low = add(load(y), low), high = add(load(y + 8), high);
      store(y, low);
      store(y + 8, high);
      continue;
    }
    float lanes[kPanelRows];
    store(lanes, low);
    store(lanes + 8, high);
    for (int r = 0; r < w.rows - first; ++r) {
      const float value = out.bias != nullptr ? lanes[r] + out.bias[first + r] : lanes[r];
      y[r] = out.accumulate ? y[r] + value : value;
    }
  }
}

SIMD_INLINE F8 load_half(const uint16_t* halves) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}

SIMD_INLINE __m256i load_bytes(const uint8_t* bytes) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
}

// Four neighbouring quants of a row, in every lane.
SIMD_INLINE __m256i splat_quad(const int8_t* quants) {
  int32_t quad;
  std::memcpy(&quad, quants, 4);
  return _mm256_set1_epi32(quad);
}

template <int Rows>
struct TileFp32 {
  static SIMD_INLINE void run(Tile<Rows>& acc, const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row) {
    const float* values = reinterpret_cast<const float*>(panel);
    const float* inputs = x.values + static_cast<int64_t>(row) * w.cols;
    for (int k = 0; k < w.cols; ++k, values += kPanelRows) {
      const F8 low = load(values), high = load(values + 8);
#pragma GCC unroll 6
      for (int m = 0; m < Rows; ++m) {
        const F8 input = splat(inputs[static_cast<int64_t>(m) * w.cols + k]);
        acc[m][0] = fma(input, low, acc[m][0]);
        acc[m][1] = fma(input, high, acc[m][1]);
      }
    }
  }
};

template <int Rows>
struct TileBf16 {
  static SIMD_INLINE void run(Tile<Rows>& acc, const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const float* inputs = x.values + static_cast<int64_t>(row) * w.cols;
    for (int k = 0; k < w.cols; k += 2, panel += 64) {
      // A 32-bit lane holds input k (low half) and input k + 1 (high half) of one output.
      const __m256i low = load_bytes(panel), high = load_bytes(panel + 32);
      const F8 low0 = _mm256_castsi256_ps(_mm256_slli_epi32(low, 16));
      const F8 high0 = _mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
#pragma GCC unroll 6
      for (int m = 0; m < Rows; ++m) {
        const F8 input = splat(inputs[static_cast<int64_t>(m) * w.cols + k]);
        acc[m][0] = fma(input, low0, acc[m][0]);
        acc[m][1] = fma(input, high0, acc[m][1]);
      }
      const F8 low1 = _mm256_castsi256_ps(_mm256_and_si256(low, upper));
      const F8 high1 = _mm256_castsi256_ps(_mm256_and_si256(high, upper));
#pragma GCC unroll 6
      for (int m = 0; m < Rows; ++m) {
        const F8 input = splat(inputs[static_cast<int64_t>(m) * w.cols + k + 1]);
        acc[m][0] = fma(input, low1, acc[m][0]);
        acc[m][1] = fma(input, high1, acc[m][1]);
      }
    }
  }
};

// |w| <= 128 as unsigned times sign(w) x as signed: a pair of products is at most 2 * 128 * 127,
// which 16 bits hold, so that maddubs is exact.
template <int Rows>
struct TileInt8 {
  static SIMD_INLINE void run(Tile<Rows>& acc, const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row) {
    const int groups = w.num_groups();
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + w.cols * kPanelRows);
    const int8_t* quants = x.quants + static_cast<int64_t>(row) * w.cols;
    const float* input_scales = x.scales + static_cast<int64_t>(row) * groups;
    const __m256i ones = _mm256_set1_epi16(1);
    for (int g = 0; g < groups; ++g, panel += 512, scales += kPanelRows, quants += kGroupSize) {
      __m256i dot[Rows][2];
      for (int m = 0; m < Rows; ++m) dot[m][0] = dot[m][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int quad = 0; quad < 8; ++quad) {
        const __m256i low = load_bytes(panel + quad * 64);
        const __m256i high = load_bytes(panel + quad * 64 + 32);
        const __m256i low_abs = _mm256_abs_epi8(low), high_abs = _mm256_abs_epi8(high);
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
          const __m256i input = splat_quad(quants + static_cast<int64_t>(m) * w.cols + quad * 4);
          const __m256i low_pairs = _mm256_maddubs_epi16(low_abs, _mm256_sign_epi8(input, low));
          const __m256i high_pairs = _mm256_maddubs_epi16(high_abs, _mm256_sign_epi8(input, high));
          dot[m][0] = _mm256_add_epi32(dot[m][0], _mm256_madd_epi16(low_pairs, ones));
          dot[m][1] = _mm256_add_epi32(dot[m][1], _mm256_madd_epi16(high_pairs, ones));
          pin(dot[m][0], dot[m][1]);
        }
      }
      const F8 low_scale = load_half(scales), high_scale = load_half(scales + 8);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) {
        const F8 scale = splat(input_scales[static_cast<int64_t>(m) * groups + g]);
        acc[m][0] = fma(_mm256_cvtepi32_ps(dot[m][0]), mul(scale, low_scale), acc[m][0]);
        acc[m][1] = fma(_mm256_cvtepi32_ps(dot[m][1]), mul(scale, high_scale), acc[m][1]);
      }
    }
  }
};

// Nibbles are at most 15, so that a lane's 16 products of a group sum to at most 15 * 127 * 16 =
// 30480: the whole group stays in 16 bits and is widened once.
template <int Rows, bool HasMin>
struct TileInt4 {
  static SIMD_INLINE void run(Tile<Rows>& acc, const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row) {
    const int groups = w.num_groups();
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + w.cols * kPanelRows / 2);
    const uint16_t* mins = scales + groups * kPanelRows;
    const int8_t* quants = x.quants + static_cast<int64_t>(row) * w.cols;
    const int64_t first = static_cast<int64_t>(row) * groups;
    const __m256i ones = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(15);
    for (int g = 0; g < groups; ++g, panel += 256, quants += kGroupSize) {
      __m256i dot[Rows][2];
      for (int m = 0; m < Rows; ++m) dot[m][0] = dot[m][1] = _mm256_setzero_si256();
      // Quads 0-3, then 4-7: the sums and the weights of one quad fill the registers.
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
        for (int quad = 0; quad < 4; ++quad) {
          __m256i low = load_bytes(panel + quad * 64), high = load_bytes(panel + quad * 64 + 32);
          if (half == 1) low = _mm256_srli_epi16(low, 4), high = _mm256_srli_epi16(high, 4);
          low = _mm256_and_si256(low, nibble);
          high = _mm256_and_si256(high, nibble);
          const int8_t* input = quants + quad * 4 + half * 16;
#pragma GCC unroll 4
          for (int m = 0; m < Rows; ++m) {
            const __m256i x4 = splat_quad(input + static_cast<int64_t>(m) * w.cols);
            dot[m][0] = _mm256_add_epi16(dot[m][0], _mm256_maddubs_epi16(low, x4));
            dot[m][1] = _mm256_add_epi16(dot[m][1], _mm256_maddubs_epi16(high, x4));
            pin(dot[m][0], dot[m][1]);
          }
        }
      }
      const F8 low_scale = load_half(scales + g * kPanelRows);
      const F8 high_scale = load_half(scales + g * kPanelRows + 8);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) {
        const int64_t group = first + static_cast<int64_t>(m) * groups + g;
        __m256i low_dot = _mm256_madd_epi16(dot[m][0], ones);
        __m256i high_dot = _mm256_madd_epi16(dot[m][1], ones);
        if (!HasMin) {
          const __m256i offset = _mm256_set1_epi32(8 * x.sums[group]);
          low_dot = _mm256_sub_epi32(low_dot, offset);
          high_dot = _mm256_sub_epi32(high_dot, offset);
        }
        const F8 scale = splat(x.scales[group]);
        acc[m][0] = fma(_mm256_cvtepi32_ps(low_dot), mul(scale, low_scale), acc[m][0]);
        acc[m][1] = fma(_mm256_cvtepi32_ps(high_dot), mul(scale, high_scale), acc[m][1]);
      }
      if (HasMin) {
        const F8 low_min = load_half(mins + g * kPanelRows);
        const F8 high_min = load_half(mins + g * kPanelRows + 8);
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
          const F8 sum = splat(x.scaled_sums[first + static_cast<int64_t>(m) * groups + g]);
          acc[m][0] = fma(sum, low_min, acc[m][0]);
          acc[m][1] = fma(sum, high_min, acc[m][1]);
        }
      }
    }
  }
};

template <int Rows>
using TileInt4Min = TileInt4<Rows, true>;
template <int Rows>
using TileInt4Plain = TileInt4<Rows, false>;

template <template <int> class Kernel, int Rows>
SIMD_INLINE void run_tile(const Matrix& w, int panel, const Activations& x, int row,
                          const Output& out) {
  Tile<Rows> acc;
  for (int m = 0; m < Rows; ++m) acc[m][0] = acc[m][1] = splat(0.0f);
  Kernel<Rows>::run(acc, w.panel(panel), w, x, row);
  store_tile<Rows>(acc, w, panel, row, out);
}

// All rows of the range against one panel after the other: a panel stays in the first-level cache.
template <template <int> class Kernel, int MaxRows>
void matmul(const Matrix& w, int panel_begin, int panel_end, const Activations& x, int row_begin,
            int row_end, const Output& out, void*) {
  static_assert(MaxRows == 4 || MaxRows == 6, "the last rows are 5 at most");
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    int row = row_begin;
    for (; row + MaxRows <= row_end; row += MaxRows) {
      run_tile<Kernel, MaxRows>(w, panel, x, row, out);
    }
    if (row + 4 <= row_end) run_tile<Kernel, 4>(w, panel, x, row, out), row += 4;
    switch (row_end - row) {
      case 3: run_tile<Kernel, 3>(w, panel, x, row, out); break;
      case 2: run_tile<Kernel, 2>(w, panel, x, row, out); break;
      case 1: run_tile<Kernel, 1>(w, panel, x, row, out); break;
      default: break;
    }
  }
}

constexpr MatmulKernel matmul_fp32 = matmul<TileFp32, 6>;
constexpr MatmulKernel matmul_bf16 = matmul<TileBf16, 6>;
constexpr MatmulKernel matmul_int8 = matmul<TileInt8, 4>;

void matmul_int4(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                 int row_begin, int row_end, const Output& out, void* scratch) {
  const MatmulKernel kernel = w.has_min ? matmul<TileInt4Min, 4> : matmul<TileInt4Plain, 4>;
  kernel(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch);
}

// fp32 and bf16 products of the AVX2 family, in register tiles of `Rows` rows by one panel (16
// outputs).
//
// Order of sums: an output is one lane and takes inputs from left to right, each one FMA. A tile of
// one row does what a tile of six does, so an output's bits do not depend on the batch.
// Included inside the family's namespace, after simd_avx2.h.

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

SIMD_INLINE __m256i load_bytes(const uint8_t* bytes) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
}

// Inputs of a tile between two lots of the next panel that are asked for.
constexpr int kInputsPerFetch = 32;

template <int Rows>
struct TileFp32 {
  static SIMD_INLINE void run(Tile<Rows>& acc, const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row, PanelFetch& fetch) {
    const float* values = reinterpret_cast<const float*>(panel);
    const float* inputs = x.values + static_cast<int64_t>(row) * w.cols;
    for (int k = 0; k < w.cols;) {
      fetch.advance();
      for (const int end = std::min(k + kInputsPerFetch, w.cols); k < end; ++k, values += kPanelRows) {
        const F8 low = load(values), high = load(values + 8);
#pragma GCC unroll 6
        for (int m = 0; m < Rows; ++m) {
          const F8 input = splat(inputs[static_cast<int64_t>(m) * w.cols + k]);
          acc[m][0] = fma(input, low, acc[m][0]);
          acc[m][1] = fma(input, high, acc[m][1]);
        }
      }
    }
  }
};

template <int Rows>
struct TileBf16 {
  static SIMD_INLINE void run(Tile<Rows>& acc, const uint8_t* panel, const Matrix& w,
                              const Activations& x, int row, PanelFetch& fetch) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const float* inputs = x.values + static_cast<int64_t>(row) * w.cols;
    for (int k = 0; k < w.cols;) {
      fetch.advance();
      for (const int end = std::min(k + kInputsPerFetch, w.cols); k < end; k += 2, panel += 64) {
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
  }
};

template <template <int> class Kernel, int Rows>
SIMD_INLINE void run_tile(const Matrix& w, int panel, const Activations& x, int row,
                          const Output& out, PanelFetch& fetch) {
  Tile<Rows> acc;
  for (int m = 0; m < Rows; ++m) acc[m][0] = acc[m][1] = splat(0.0f);
  Kernel<Rows>::run(acc, w.panel(panel), w, x, row, fetch);
  store_tile<Rows>(acc, w, panel, row, out);
}

// All rows of the range against one panel after the other: a panel stays in the first-level cache.
template <template <int> class Kernel, int MaxRows>
void matmul(const Matrix& w, int panel_begin, int panel_end, const Activations& x, int row_begin,
            int row_end, const Output& out, void*) {
  static_assert(MaxRows == 6, "the last rows are 5 at most");
  const int64_t num_tiles = (row_end - row_begin + MaxRows - 1) / MaxRows;  // or one more
  // In panels. As a condition around `fetch`, GCC 12 makes it cost bf16 a third of its speed.
  const int num_fetched = row_end - row_begin > kFewFloatRows ? 1 : 0;
  const int64_t num_lots = (w.cols + kInputsPerFetch - 1) / kInputsPerFetch;
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    int row = row_begin;
    PanelFetch fetch(w, panel + 1, num_fetched, num_tiles * num_lots);
    for (; row + MaxRows <= row_end; row += MaxRows) {
      run_tile<Kernel, MaxRows>(w, panel, x, row, out, fetch);
    }
    if (row + 4 <= row_end) run_tile<Kernel, 4>(w, panel, x, row, out, fetch), row += 4;
    switch (row_end - row) {
      case 3: run_tile<Kernel, 3>(w, panel, x, row, out, fetch); break;
      case 2: run_tile<Kernel, 2>(w, panel, x, row, out, fetch); break;
      case 1: run_tile<Kernel, 1>(w, panel, x, row, out, fetch); break;
      default: break;
    }
  }
}

constexpr MatmulKernel matmul_fp32 = matmul<TileFp32, 6>;
constexpr MatmulKernel matmul_bf16 = matmul<TileBf16, 6>;

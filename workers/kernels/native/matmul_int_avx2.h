// int8 and int4 products of the AVX2 family.
// Included inside the family's namespace, after dot_avx2.h and int_tiles_avx2.h.

// From so many rows on, unpacking a panel pays. Measured on Zen 3 and Zen 4.
constexpr int kManyRows = 28;

// An unpacked group of int8.
struct alignas(64) SplitGroup {
  uint8_t magnitudes[512], signs[512];
  int32_t negatives[kPanelRows];  // sum of the magnitudes of an output's negative weights
  float scales[kPanelRows];
};

// An unpacked group of int4.
struct alignas(64) NibbleGroup {
  uint8_t quants[512];
  float scales[kPanelRows], mins[kPanelRows];
};

// Types of weights as they are packed (Packed..., Rotated) or unpacked (Split, Nibbles): int_tiles_avx2.h.

struct PackedInt8 {
  static constexpr bool kHasMin = false;
  static constexpr int inputs() { return kGroupSize; }
  const uint8_t* panel;
  const uint16_t* scales;

  PackedInt8(const Matrix& w, const uint8_t* panel)
      : panel(panel),
        scales(reinterpret_cast<const uint16_t*>(panel + w.cols * kPanelRows)) {}
  SIMD_INLINE Group group(int g) const {
    const uint16_t* first = scales + g * kPanelRows;
    return {panel + g * 512, {load_half(first), load_half(first + 8)}, {}};
  }
  template <int Rows>
  SIMD_INLINE void dots(__m256i (&dot)[Rows][2], const Group& group, int, const Activations& x,
                        int64_t index, PanelFetch& fetch) const {
    fetch.advance();
    for (int m = 0; m < Rows; ++m) dot[m][0] = dot[m][1] = _mm256_setzero_si256();
    dot_int8<Rows>(dot, group.weights, x.quants + index * kGroupSize, x.cols);
  }
};

// Rotated weights, whose inputs' pairs are limited: however many rows, the panel as it is packed. Inputs
// share a scale in ones or twos of groups, weights in as many or more.
template <int Groups>
struct RotatedInt8 : PackedInt8 {
  static constexpr int inputs() { return Groups * kGroupSize; }
  // 2^16 over how many groups of inputs share a scale of the weights (1 to 3), rounded up: g * inverse >> 16 is
  // then g divided by that, for all g below 2^15. A division would cost steps of 16 rows 2 %.
  const int inverse;

  RotatedInt8(const Matrix& w, const uint8_t* panel)
      : PackedInt8(w, panel), inverse(((1 << 16) * inputs() + w.scale_group - 1) / w.scale_group) {}
  SIMD_INLINE Group group(int g) const {
    Group group = PackedInt8::group(g * inverse >> 16);
    group.weights = panel + g * Groups * 512;
    return group;
  }
  template <int Rows>
  SIMD_INLINE void dots(__m256i (&dot)[Rows][2], const Group& group, int, const Activations& x,
                        int64_t index, PanelFetch& fetch) const {
    fetch.advance();
    for (int m = 0; m < Rows; ++m) {
      dot[m][0] = dot[m][1] = _mm256_set1_epi32(x.offsets[index + m * (x.cols / inputs())]);
    }
    for (int i = 0; i < Groups; ++i) {
      const int8_t* quants = x.quants + index * inputs() + i * kGroupSize;
      dot_offset_int8<Rows>(dot, group.weights + i * 512, quants, x.cols);
    }
  }
};

struct SplitInt8 {
  static constexpr bool kHasMin = false;
  static constexpr int inputs() { return kGroupSize; }
  const SplitGroup* groups;
  int per_scale;  // 1

  SIMD_INLINE Group group(int g) const {
    const SplitGroup& group = groups[g];
    return {group.magnitudes, {load(group.scales), load(group.scales + 8)}, {}};
  }
  template <int Rows>
  SIMD_INLINE void dots(__m256i (&dot)[Rows][2], const Group& group, int g, const Activations& x,
                        int64_t index, PanelFetch& fetch) const {
    fetch.advance();
    const __m256i* negatives = reinterpret_cast<const __m256i*>(groups[g].negatives);
    for (int m = 0; m < Rows; ++m) {
      for (int half = 0; half < 2; ++half) dot[m][half] = _mm256_load_si256(negatives + half);
    }
    dot_split_int8<Rows>(dot, group.weights, x.quants + index * kGroupSize, x.cols);
  }
};

// Sums of nibbles in 16 bits -> in 32. Without mins the nibbles' offset of 8 is taken away.
template <bool HasMin, int Rows>
SIMD_INLINE void widen_nibbles(__m256i (&dot)[Rows][2], const Activations& x, int64_t index) {
#pragma GCC unroll 4
  for (int m = 0; m < Rows; ++m) {
    const int64_t group = index + m * (x.cols / kGroupSize);
    const __m256i offset =
        HasMin ? _mm256_setzero_si256() : _mm256_set1_epi32(x.group_offsets[group]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      dot[m][half] = _mm256_madd_epi16(dot[m][half], _mm256_set1_epi16(1));
      if (!HasMin) dot[m][half] = _mm256_add_epi32(dot[m][half], offset);
    }
  }
}

template <bool HasMin>
struct PackedInt4 : Int4Panel<HasMin> {
  using Int4Panel<HasMin>::Int4Panel;
  template <int Rows>
  SIMD_INLINE void dots(__m256i (&dot)[Rows][2], const Group& group, int, const Activations& x,
                        int64_t index, PanelFetch& fetch) const {
    fetch.advance();
    dot_int4<Rows>(dot, group.weights, x.quants + index * kGroupSize, x.cols);
    widen_nibbles<HasMin>(dot, x, index);
  }
};

template <bool HasMin>
struct Nibbles {
  static constexpr bool kHasMin = HasMin;
  static constexpr int inputs() { return kGroupSize; }
  const NibbleGroup* groups;
  int per_scale;  // 1

  SIMD_INLINE Group group(int g) const {
    const NibbleGroup& group = groups[g];
    return {group.quants,
            {load(group.scales), load(group.scales + 8)},
            {load(group.mins), load(group.mins + 8)}};
  }
  template <int Rows>
  SIMD_INLINE void dots(__m256i (&dot)[Rows][2], const Group& group, int, const Activations& x,
                        int64_t index, PanelFetch& fetch) const {
    fetch.advance();
    dot_nibbles<Rows>(dot, group.weights, x.quants + index * kGroupSize, x.cols);
    widen_nibbles<HasMin>(dot, x, index);
  }
};

SIMD_INLINE void unpack_int8(SplitGroup& to, const Group& from) {
  const __m256i zero = _mm256_setzero_si256(), ones = _mm256_set1_epi8(1);
  __m256i negatives[2] = {zero, zero};  // in 16 bits: at most 16 * 128 a lane
  for (int i = 0; i < 16; ++i) {
    const __m256i weights = load_bytes(from.weights + i * 32);
    const __m256i magnitudes = _mm256_abs_epi8(weights);
    const __m256i signs = _mm256_cmpgt_epi8(zero, weights);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_and_si256(magnitudes, signs), ones);
    negatives[i % 2] = _mm256_add_epi16(negatives[i % 2], pairs);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to.magnitudes + i * 32), magnitudes);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to.signs + i * 32), signs);
  }
  for (int half = 0; half < 2; ++half) {
    const __m256i sums = _mm256_madd_epi16(negatives[half], _mm256_set1_epi16(1));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to.negatives + 8 * half), sums);
    store(to.scales + 8 * half, from.scales[half]);
  }
}

SIMD_INLINE void unpack_nibbles(uint8_t* quants, const uint8_t* packed) {
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int i = 0; i < 8; ++i) {
    const __m256i bytes = load_bytes(packed + i * 32);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    __m256i* low = reinterpret_cast<__m256i*>(quants + i * 32);
    _mm256_store_si256(low, _mm256_and_si256(bytes, nibble));
    _mm256_store_si256(low + 8, high);
  }
}

SIMD_INLINE void unpack_int4(NibbleGroup& to, const Group& from) {
  unpack_nibbles(to.quants, from.weights);
  for (int half = 0; half < 2; ++half) {
    store(to.scales + 8 * half, from.scales[half]);
    store(to.mins + 8 * half, from.mins[half]);
  }
}

void matmul_rotated_int8(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                         int row_begin, int row_end, const Output& out, void* scratch) {
  const MatmulKernel kernel =
      w.scale_group == kGroupSize ? matmul_packed<RotatedInt8<1>> : matmul_packed<RotatedInt8<2>>;
  kernel(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch);
}

void matmul_raw_int8(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                     int row_begin, int row_end, const Output& out, void* scratch) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    if (row_end - row_begin < kManyRows) {
      multiply_packed(PackedInt8(w, w.panel(panel)), w, panel, x, row_begin, row_end, out, scratch);
      continue;
    }
    const PackedInt8 packed(w, w.panel(panel));
    multiply_unpacked<SplitInt8, SplitGroup>(
        w, panel, x, row_begin, row_end, out, scratch,
        [&](SplitGroup& to, int g) { unpack_int8(to, packed.group(g)); });
  }
}

void matmul_int8(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                 int row_begin, int row_end, const Output& out, void* scratch) {
  const MatmulKernel kernel = w.is_rotated ? matmul_rotated_int8 : matmul_raw_int8;
  kernel(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch);
}

template <bool HasMin>
void matmul_int4(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                 int row_begin, int row_end, const Output& out, void* scratch) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    if (row_end - row_begin < kManyRows) {
      multiply_packed(PackedInt4<HasMin>(w, w.panel(panel)), w, panel, x, row_begin, row_end, out, scratch);
      continue;
    }
    const PackedInt4<HasMin> packed(w, w.panel(panel));
    multiply_unpacked<Nibbles<HasMin>, NibbleGroup>(
        w, panel, x, row_begin, row_end, out, scratch,
        [&](NibbleGroup& to, int g) { unpack_int4(to, packed.group(g)); });
  }
}

void matmul_int4(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                 int row_begin, int row_end, const Output& out, void* scratch) {
  const MatmulKernel kernel = w.has_min ? matmul_int4<true> : matmul_int4<false>;
  kernel(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch);
}

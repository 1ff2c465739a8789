// int8, int4 and nested4 products of the AVX-VNNI family. Sums and their order are those of the AVX-512
// family (matmul_avx512.h), and so are the bits.
// Included inside the family's namespace, after dot_avxvnni.h and int_tiles_avx2.h.

// From so many rows on, unpacking a panel pays.
constexpr int kManyRows = 12;

// dot[m] = start(m) in all lanes, of which each is an output.
template <int Rows, class Start>
SIMD_INLINE void start_dots(__m256i (&dot)[Rows][2], const Start& start) {
#pragma GCC unroll 6
  for (int m = 0; m < Rows; ++m) dot[m][0] = dot[m][1] = _mm256_set1_epi32(start(m));
}

struct PackedInt8 {
  static constexpr bool kHasMin = false;
  const uint8_t* panel;
  const uint16_t* scales;
  int per_scale;  // groups of 32

  PackedInt8(const Matrix& w, const uint8_t* panel)
      : panel(panel),
        scales(reinterpret_cast<const uint16_t*>(panel + w.cols * kPanelRows)),
        per_scale(w.scale_group / kGroupSize) {}
  int inputs() const { return per_scale * kGroupSize; }
  SIMD_INLINE Group group(int g) const {
    const uint16_t* first = scales + g * kPanelRows;
    return {panel + g * per_scale * 512, {load_half(first), load_half(first + 8)}, {}};
  }
  template <int Rows>
  SIMD_INLINE void dots(__m256i (&dot)[Rows][2], const Group& group, int, const Activations& x,
                        int64_t index, PanelFetch& fetch) const {
    const int64_t num_scales = x.cols / inputs();
    start_dots(dot, [&](int m) __attribute__((always_inline)) { return x.offsets[index + m * num_scales]; });
    const int8_t* quants = x.quants + index * inputs();
    for (int i = 0; i < per_scale; ++i, quants += kGroupSize) {
      if (i % 2 == 0) fetch.advance();
      dot_signed<Rows>(dot, group.weights + i * 512, quants, x.cols);
    }
  }
};

template <bool HasMin>
struct PackedInt4 : Int4Panel<HasMin> {
  using Int4Panel<HasMin>::Int4Panel;
  template <int Rows>
  SIMD_INLINE void dots(__m256i (&dot)[Rows][2], const Group& group, int, const Activations& x,
                        int64_t index, PanelFetch& fetch) const {
    const int64_t num_groups = x.cols / kGroupSize;
    fetch.advance();
    start_dots(dot, [&](int m) __attribute__((always_inline)) {
      return HasMin ? 0 : x.group_offsets[index + m * num_groups];
    });
    dot_nibbles<Rows>(dot, group.weights, x.quants + index * kGroupSize, x.cols);
  }
};

// What belongs to a pair of groups of nested4, an output in each 32-bit lane.
struct NestedWords {
  __m256i shifts[2];   // two words: the first group's, the second's
  __m256i factors[2];  // two nibbles likewise

  SIMD_INLINE NestedWords(const NestedPanel& parts, int pair) {
    for (int half = 0; half < 2; ++half) {
      const int first = pair * kPanelRows + 8 * half;
      const __m128i* from = reinterpret_cast<const __m128i*>(parts.shifts + 2 * first);
      shifts[half] = _mm256_cvtepi8_epi16(_mm_loadu_si128(from));
      factors[half] = _mm256_cvtepu8_epi32(
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(parts.factors + first)));
    }
  }
  SIMD_INLINE __m256i factors_of(int group, int half) const {
    const __m256i shifted = group == 0 ? factors[half] : _mm256_srli_epi32(factors[half], 4);
    return _mm256_and_si256(shifted, _mm256_set1_epi32(15));
  }
  // In the low byte; the others are of no meaning.
  SIMD_INLINE __m256i shifts_of(int group, int half) const {
    return group == 0 ? shifts[half] : _mm256_srli_epi32(shifts[half], 16);
  }
};

// Few rows: nibbles are multiplied as int4's are, and each group's sums of products, which 16 bits hold, by
// its factors:
//     x . (factor (q - 8) + shift) = factor (x . (q - 8)) + shift (sum of x)
struct PackedNested4 {
  static constexpr bool kHasMin = false;
  NestedPanel parts;
  int per_scale;  // pairs of groups

  PackedNested4(const Matrix& w, const uint8_t* panel)
      : parts(w, panel), per_scale(w.scale_group / kPairSize) {}
  int inputs() const { return per_scale * kPairSize; }
  SIMD_INLINE Group group(int g) const {
    const uint16_t* scales = parts.scales + g * kPanelRows;
    return {nullptr, {load_half(scales), load_half(scales + 8)}, {}};
  }
  template <int Rows>
  SIMD_INLINE void dots(__m256i (&dot)[Rows][2], const Group&, int g, const Activations& x, int64_t index,
                        PanelFetch& fetch) const {
    for (int m = 0; m < Rows; ++m) dot[m][0] = dot[m][1] = _mm256_setzero_si256();
    for (int i = 0; i < per_scale; ++i) {
      fetch.advance();
      add_pair<Rows>(dot, g * per_scale + i, x, index * per_scale + i);
    }
  }

 private:
  // index: the place of the first row's pair among all rows' pairs.
  template <int Rows>
  SIMD_INLINE void add_pair(__m256i (&dot)[Rows][2], int pair, const Activations& x, int64_t index) const {
    const int64_t num_pairs = x.cols / kPairSize;
    const NestedWords words(parts, pair);
#pragma GCC unroll 6
    for (int m = 0; m < Rows; ++m) {
      const __m256i sums = _mm256_set1_epi32(x.word_sums[index + m * num_pairs]);
      for (int half = 0; half < 2; ++half) {
        add_word_products(&dot[m][half], words.shifts[half], sums);
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int64_t group = 2 * index + i;
      __m256i products[Rows][2];
      start_dots(products, [&](int m) __attribute__((always_inline)) {
        return x.group_offsets[group + 2 * m * num_pairs];
      });
      const uint8_t* nibbles = parts.nibbles + (2 * pair + i) * 256;
      dot_nibbles<Rows>(products, nibbles, x.quants + group * kGroupSize, x.cols);
#pragma GCC unroll 6
      for (int m = 0; m < Rows; ++m) {
        for (int half = 0; half < 2; ++half) {
          add_word_products(&dot[m][half], products[m][half], words.factors_of(i, half));
        }
      }
    }
  }
};

// A pair of groups that are unpacked to weights + 128.
struct alignas(64) UnpackedPair {
  uint8_t values[2][512];
  float scales[kPanelRows];
};

struct UnpackedNested4 {
  static constexpr bool kHasMin = false;
  const UnpackedPair* pairs;
  int per_scale;

  UnpackedNested4(const UnpackedPair* pairs, int per_scale) : pairs(pairs), per_scale(per_scale) {}
  int inputs() const { return per_scale * kPairSize; }
  SIMD_INLINE Group group(int g) const {
    const float* scales = pairs[g * per_scale].scales;
    return {nullptr, {load(scales), load(scales + 8)}, {}};
  }
  template <int Rows>
  SIMD_INLINE void dots(__m256i (&dot)[Rows][2], const Group&, int g, const Activations& x, int64_t index,
                        PanelFetch& fetch) const {
    const int64_t num_scales = x.cols / inputs();
    start_dots(dot, [&](int m) __attribute__((always_inline)) { return x.offsets[index + m * num_scales]; });
    const int8_t* quants = x.quants + index * inputs();
    for (int i = 0; i < per_scale; ++i, quants += kPairSize) {
      fetch.advance();
      for (int k = 0; k < 2; ++k) {
        dot_bytes<Rows>(dot, pairs[g * per_scale + i].values[k], quants + k * kGroupSize, x.cols);
      }
    }
  }
};

SIMD_INLINE void unpack_nested4(UnpackedPair& to, const NestedPanel& parts, int pair, const Group& group) {
  const __m256i low_bytes = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404,
                                              0x08080808, 0x0c0c0c0c);
  const __m256i nibble = _mm256_set1_epi8(15);
  const NestedWords words(parts, pair);
  for (int i = 0; i < 2; ++i) {
    for (int half = 0; half < 2; ++half) {
      const __m256i factor = words.factors_of(i, half);
      const __m256i raised = _mm256_add_epi32(words.shifts_of(i, half), _mm256_set1_epi32(128));
      const __m256i least = _mm256_sub_epi32(raised, _mm256_slli_epi32(factor, 3));  // of nibble 0
      const __m256i start = _mm256_shuffle_epi8(least, low_bytes);
      const __m256i factors = _mm256_or_si256(factor, _mm256_slli_epi32(factor, 16));
      const uint8_t* from = parts.nibbles + (2 * pair + i) * 256 + half * 32;
      uint8_t* values = to.values[i] + half * 32;
      for (int quad = 0; quad < 4; ++quad) {
        const __m256i packed = load_bytes(from + quad * 64);
        const __m256i low = _mm256_and_si256(packed, nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
        // A product is at most 15 * 15, so that the two in a word stay apart.
        const auto keep = [&](int place, __m256i nibbles) __attribute__((always_inline)) {
          const __m256i bytes = _mm256_add_epi8(_mm256_mullo_epi16(nibbles, factors), start);
          _mm256_store_si256(reinterpret_cast<__m256i*>(values + place * 64), bytes);
        };
        keep(quad, low), keep(quad + 4, high);
      }
    }
  }
  for (int half = 0; half < 2; ++half) store(to.scales + 8 * half, group.scales[half]);
}

constexpr MatmulKernel matmul_int8 = matmul_packed<PackedInt8>;

void matmul_int4(const Matrix& w, int panel_begin, int panel_end, const Activations& x, int row_begin,
                 int row_end, const Output& out, void* scratch) {
  const MatmulKernel kernel = w.has_min ? matmul_packed<PackedInt4<true>> : matmul_packed<PackedInt4<false>>;
  kernel(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch);
}

void matmul_nested4(const Matrix& w, int panel_begin, int panel_end, const Activations& x, int row_begin,
                    int row_end, const Output& out, void* scratch) {
  if (row_end - row_begin < kManyRows) {
    matmul_packed<PackedNested4>(w, panel_begin, panel_end, x, row_begin, row_end, out, scratch);
    return;
  }
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    const PackedNested4 packed(w, w.panel(panel));
    multiply_unpacked<UnpackedNested4, UnpackedPair>(
        w, panel, x, row_begin, row_end, out, scratch,
        [&](UnpackedPair& to, int pair) {
          unpack_nested4(to, packed.parts, pair, packed.group(pair / packed.per_scale));
        },
        packed.per_scale);
  }
}

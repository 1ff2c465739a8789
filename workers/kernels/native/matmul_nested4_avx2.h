// nested4 products of the AVX2 family. Nibbles are multiplied as int4's are; where those sums of 32
// products, in 16 bits, are widened, the factors stand where int4 has ones:
//     x . (factor (q - 8) + shift) = factor (x . q) + (shift - 8 factor) (sum of x)
// The sums of all groups that share a scale, in 32 bits, are exact, and scaled once.
// Included inside the family's namespace, after matmul_int_avx2.h.

// Of two groups and outputs 0-7 and 8-15: what a nibble of 0 stands for in each of both groups, side by
// side; of each group, its factors twice in each lane.
struct NestedPair {
  const uint8_t* weights;
  __m256i zeros[2], factors[2][2];
};

// A pair of unpacked groups.
struct alignas(64) UnpackedPair {
  uint8_t quants[2][512];
  int16_t zeros[2 * kPanelRows], factors[2][2 * kPanelRows];  // as NestedPair has them
  float scales[kPanelRows];
};

// What packed and unpacked weights have in common, for add_groups. Weights: pair(i), the i-th of the row
// or chunk, and per_scale, how many share a scale.
template <class Weights, bool IsUnpacked>
struct NestedProducts {
  static constexpr bool kHasMin = false;
  int inputs() const { return weights().per_scale * kPairSize; }

  template <int Rows>
  SIMD_INLINE void dots(__m256i (&dot)[Rows][2], const Group&, int g, const Activations& x, int64_t index,
                        PanelFetch& fetch) const {
    const int per_scale = weights().per_scale;
    for (int m = 0; m < Rows; ++m) dot[m][0] = dot[m][1] = _mm256_setzero_si256();
    for (int i = 0; i < per_scale; ++i) {
      fetch.advance();
      add_pair<Rows>(dot, weights().pair(g * per_scale + i), x, index * per_scale + i);
    }
  }

 private:
  const Weights& weights() const { return *static_cast<const Weights*>(this); }

  // Not unrolled, GCC keeps sums and factors in memory, and this takes twice as long.
  // index: the place of the first row's pair among all rows' pairs.
  template <int Rows>
  static SIMD_INLINE void add_pair(__m256i (&dot)[Rows][2], const NestedPair& pair, const Activations& x,
                                   int64_t index) {
    const int64_t num_pairs = x.cols / kPairSize;
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) {
      const __m256i sums = _mm256_set1_epi32(x.word_sums[index + m * num_pairs]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        dot[m][half] = _mm256_add_epi32(dot[m][half], _mm256_madd_epi16(sums, pair.zeros[half]));
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __m256i nibbles[Rows][2];
      const int8_t* quants = x.quants + (2 * index + i) * kGroupSize;
      if constexpr (IsUnpacked) {
        dot_nibbles<Rows>(nibbles, pair.weights + i * 512, quants, x.cols);
      } else {
        dot_int4<Rows>(nibbles, pair.weights + i * 256, quants, x.cols);
      }
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i products = _mm256_madd_epi16(nibbles[m][half], pair.factors[i][half]);
          dot[m][half] = _mm256_add_epi32(dot[m][half], products);
        }
      }
    }
  }
};

struct PackedNested4 : NestedProducts<PackedNested4, false> {
  NestedPanel parts;
  int per_scale;

  PackedNested4(const Matrix& w, const uint8_t* panel)
      : parts(w, panel), per_scale(w.scale_group / kPairSize) {}
  SIMD_INLINE Group group(int g) const {
    const uint16_t* scales = parts.scales + g * kPanelRows;
    return {nullptr, {load_half(scales), load_half(scales + 8)}, {}};
  }
  SIMD_INLINE NestedPair pair(int index) const {
    NestedPair pair{parts.nibbles + index * 512, {}, {}};
    for (int half = 0; half < 2; ++half) {
      const int first = index * kPanelRows + 8 * half;
      const __m256i both = _mm256_cvtepu8_epi32(
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(parts.factors + first)));
      const __m256i twice = _mm256_or_si256(both, _mm256_slli_epi32(both, 16));
      const __m256i low = _mm256_and_si256(twice, _mm256_set1_epi16(15));
      const __m256i high = _mm256_srli_epi16(twice, 4);
      pair.factors[0][half] = low, pair.factors[1][half] = high;
      const __m256i side_by_side = _mm256_blend_epi16(low, high, 0xaa);
      const __m128i* shifts = reinterpret_cast<const __m128i*>(parts.shifts + 2 * first);
      pair.zeros[half] = _mm256_sub_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(shifts)),
                                          _mm256_slli_epi16(side_by_side, 3));
    }
    return pair;
  }
};

struct UnpackedNested4 : NestedProducts<UnpackedNested4, true> {
  const UnpackedPair* pairs;
  int per_scale;

  UnpackedNested4(const UnpackedPair* pairs, int per_scale) : pairs(pairs), per_scale(per_scale) {}
  SIMD_INLINE Group group(int g) const {
    const float* scales = pairs[g * per_scale].scales;
    return {nullptr, {load(scales), load(scales + 8)}, {}};
  }
  SIMD_INLINE NestedPair pair(int index) const {
    const UnpackedPair& from = pairs[index];
    NestedPair pair{from.quants[0], {}, {}};
    for (int half = 0; half < 2; ++half) {
      pair.zeros[half] = load_words(from.zeros + 16 * half);
      for (int i = 0; i < 2; ++i) pair.factors[i][half] = load_words(from.factors[i] + 16 * half);
    }
    return pair;
  }

 private:
  static SIMD_INLINE __m256i load_words(const int16_t* words) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(words));
  }
};

SIMD_INLINE void unpack_nested4(UnpackedPair& to, const NestedPair& from, const Group& group) {
  const auto keep = [](int16_t* words, __m256i from) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), from);
  };
  for (int half = 0; half < 2; ++half) {
    store(to.scales + 8 * half, group.scales[half]);
    keep(to.zeros + 16 * half, from.zeros[half]);
    for (int i = 0; i < 2; ++i) keep(to.factors[i] + 16 * half, from.factors[i][half]);
  }
  for (int i = 0; i < 2; ++i) unpack_nibbles(to.quants[i], from.weights + i * 256);
}

void matmul_nested4(const Matrix& w, int panel_begin, int panel_end, const Activations& x,
                    int row_begin, int row_end, const Output& out, void* scratch) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    const PackedNested4 packed(w, w.panel(panel));
    if (row_end - row_begin < kManyRows) {
      multiply_packed(packed, w, panel, x, row_begin, row_end, out, scratch);
    } else {
      multiply_unpacked<UnpackedNested4, UnpackedPair>(
          w, panel, x, row_begin, row_end, out, scratch,
          [&](UnpackedPair& to, int index) {
            unpack_nested4(to, packed.pair(index), packed.group(index / packed.per_scale));
          },
          packed.per_scale);
    }
  }
}

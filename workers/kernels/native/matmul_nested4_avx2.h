// nested4 products of the AVX2 family. Nibbles are multiplied as int4's are; where those sums of 32
// products, in 16 bits, are widened, the factors stand where int4 has ones:
//     x . (factor (q - 8) + shift) = factor (x . q) + (shift - 8 factor) (sum of x)
// The sums of both groups that share a scale, in 32 bits, are exact, and scaled once.
// Included inside the family's namespace, after matmul_int_avx2.h.

// Two unpacked groups that share a scale.
struct alignas(64) NestedGroup {
  uint8_t quants[2][512];
  int16_t zeros[2 * kPanelRows], factors[2][2 * kPanelRows];  // as Group has them
  float scales[kPanelRows];
};

// What packed and unpacked weights have in common, for add_groups.
template <bool IsUnpacked>
struct NestedProducts {
  static constexpr bool kHasMin = false;
  static constexpr int kInputs = 2 * kGroupSize;

  // Not unrolled, GCC keeps sums and factors in memory, and this takes twice as long.
  template <int Rows>
  SIMD_INLINE void dots(__m256i (&dot)[Rows][2], const Group& group, int, const Activations& x,
                        int64_t index) const {
    const int64_t num_scales = x.cols / kInputs;
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) {
      const __m256i sums = _mm256_set1_epi32(x.word_sums[index + m * num_scales]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) dot[m][half] = _mm256_madd_epi16(sums, group.zeros[half]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __m256i nibbles[Rows][2];
      const int8_t* quants = x.quants + (2 * index + i) * kGroupSize;
      if constexpr (IsUnpacked) {
        dot_nibbles<Rows>(nibbles, group.weights + i * 512, quants, x.cols);
      } else {
        dot_int4<Rows>(nibbles, group.weights + i * 256, quants, x.cols);
      }
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i products = _mm256_madd_epi16(nibbles[m][half], group.factors[i][half]);
          dot[m][half] = _mm256_add_epi32(dot[m][half], products);
        }
      }
    }
  }
};

struct PackedNested4 : NestedProducts<false> {
  NestedPanel parts;

  PackedNested4(const Matrix& w, const uint8_t* panel) : parts(w, panel) {}
  SIMD_INLINE Group group(int g) const {
    const int first = g * kPanelRows;
    Group group{parts.nibbles + g * 512,
                {load_half(parts.scales + first), load_half(parts.scales + first + 8)}, {}, {}, {}};
    for (int half = 0; half < 2; ++half) {
      const int8_t* shifts = parts.shifts + 2 * (first + 8 * half);
      const uint8_t* factors = parts.factors + first + 8 * half;
      const __m256i both =
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(factors)));
      const __m256i twice = _mm256_or_si256(both, _mm256_slli_epi32(both, 16));
      const __m256i low = _mm256_and_si256(twice, _mm256_set1_epi16(15));
      const __m256i high = _mm256_srli_epi16(twice, 4);
      group.factors[0][half] = low, group.factors[1][half] = high;
      const __m256i side_by_side = _mm256_blend_epi16(low, high, 0xaa);
      group.zeros[half] = _mm256_sub_epi16(
          _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(shifts))),
          _mm256_slli_epi16(side_by_side, 3));
    }
    return group;
  }
};

struct UnpackedNested4 : NestedProducts<true> {
  const NestedGroup* groups;

  explicit UnpackedNested4(const NestedGroup* groups) : groups(groups) {}
  SIMD_INLINE Group group(int g) const {
    const NestedGroup& from = groups[g];
    Group group{from.quants[0], {load(from.scales), load(from.scales + 8)}, {}, {}, {}};
    for (int half = 0; half < 2; ++half) {
      group.zeros[half] = load_words(from.zeros + 16 * half);
      for (int i = 0; i < 2; ++i) group.factors[i][half] = load_words(from.factors[i] + 16 * half);
    }
    return group;
  }

 private:
  static SIMD_INLINE __m256i load_words(const int16_t* words) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(words));
  }
};

SIMD_INLINE void unpack_nested4(NestedGroup& to, const Group& from) {
  const auto keep = [](int16_t* words, __m256i from) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), from);
  };
  for (int half = 0; half < 2; ++half) {
    store(to.scales + 8 * half, from.scales[half]);
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
      multiply_unpacked<UnpackedNested4, NestedGroup>(
          w, panel, x, row_begin, row_end, out, scratch,
          [&](NestedGroup& to, int g) { unpack_nested4(to, packed.group(g)); });
    }
  }
}

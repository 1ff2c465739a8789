// Integer products of both AVX2 families, in tiles of 1 to kMaxTileRows rows by one panel (16 outputs).
//
// Few rows take the panel as it is packed. Many rows share one unpacking of it, a chunk of groups
// at a time that stays in the first-level cache while all rows go past; between chunks a row's 16
// sums wait in memory. Either way an output's sum goes over the groups from left to right:
//     acc = fma(dot, input scale * weight scale, acc), then fma(scaled sum, min, acc)
// with `dot` exact, so that its bits depend neither on the number of rows nor on the chunks.
// A type of weights, packed or unpacked, has group(g), inputs(), kHasMin, and `dots`: the exact dot products
// of group `g` and `Rows` rows, of inputs() each. `index` is the place of the first row's group among all
// rows' groups.
// Included inside the family's namespace, after matmul_avx2.h, where kMaxTileRows is known.

SIMD_INLINE F8 load_half(const uint16_t* halves) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}

// Weights of a panel that share a scale, with inputs that do, and what their dot products are scaled with.
struct Group {
  const uint8_t* weights;
  F8 scales[2], mins[2];
};

// A panel of int4 as it is packed: all but how a family multiplies it.
template <bool HasMin>
struct Int4Panel {
  static constexpr bool kHasMin = HasMin;
  static constexpr int inputs() { return kGroupSize; }
  const uint8_t* panel;
  const uint16_t *scales, *mins;

  Int4Panel(const Matrix& w, const uint8_t* panel)
      : panel(panel),
        scales(reinterpret_cast<const uint16_t*>(panel + w.cols * kPanelRows / 2)),
        mins(scales + w.num_groups() * kPanelRows) {}
  SIMD_INLINE Group group(int g) const {
    const uint16_t *scale = scales + g * kPanelRows, *min = mins + g * kPanelRows;
    Group group{panel + g * 256, {load_half(scale), load_half(scale + 8)}, {}};
    if (HasMin) group.mins[0] = load_half(min), group.mins[1] = load_half(min + 8);
    return group;
  }
};

// A panel of int6 as it is packed, for any number of rows: bytes are made of it on the way.
struct PackedInt6 {
  static constexpr bool kHasMin = false;
  Int6Panel parts;
  int per_scale;  // groups of 32

  PackedInt6(const Matrix& w, const uint8_t* panel) : parts(w, panel), per_scale(w.scale_group / kGroupSize) {}
  int inputs() const { return per_scale * kGroupSize; }
  SIMD_INLINE Group group(int g) const {
    const uint16_t* scales = parts.scales + g * kPanelRows;
    return {parts.groups + g * per_scale * Int6Panel::kGroupNbytes, {load_half(scales), load_half(scales + 8)}, {}};
  }
  template <int Rows>
  SIMD_INLINE void dots(__m256i (&dot)[Rows][2], const Group& group, int, const Activations& x, int64_t index,
                        PanelFetch& fetch) const {
    const int64_t num_scales = x.cols / inputs();
    for (int m = 0; m < Rows; ++m) {  // -32 times the sum of the inputs
      dot[m][0] = dot[m][1] = _mm256_set1_epi32(x.offsets[index + m * num_scales] / 4);
    }
    const int8_t* quants = x.quants + index * inputs();
    for (int i = 0; i < per_scale; ++i, quants += kGroupSize) {
      if (i % 2 == 0) fetch.advance();
      dot_int6<Rows>(dot, group.weights + i * Int6Panel::kGroupNbytes, quants, x.cols);
    }
  }
};

// Adds groups [0, count) of `weights`, which are the row's groups from `first_group` on, to the
// sums of `Rows` rows (16 floats each).
template <int Rows, class Weights>
SIMD_INLINE void add_groups(float* sums, const Weights& weights, int count, int first_group,
                            const Activations& inputs, int row, PanelFetch& fetch) {
  const Activations x = inputs;  // a copy stays in registers over the stores
  const int64_t num_groups = x.cols / weights.inputs();
  const int64_t first = row * num_groups + first_group;
  for (int g = 0; g < count; ++g) {
    const Group group = weights.group(g);
    __m256i dot[Rows][2];
    weights.template dots<Rows>(dot, group, g, x, first + g, fetch);
#pragma GCC unroll 6
    for (int m = 0; m < Rows; ++m) {
      const int64_t index = first + m * num_groups + g;
      const F8 scale = splat(x.scales[index]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* sum = sums + m * kPanelRows + half * 8;
        F8 acc = fma(_mm256_cvtepi32_ps(dot[m][half]), mul(scale, group.scales[half]), load(sum));
        if (Weights::kHasMin) acc = fma(splat(x.scaled_sums[index]), group.mins[half], acc);
        store(sum, acc);
      }
    }
  }
}

// The same for rows [row_begin, row_end); the sums of the first row come first.
template <class Weights>
SIMD_INLINE void add_groups(float* sums, const Weights& weights, int count, int first_group,
                            const Activations& x, int row_begin, int row_end,
                            PanelFetch& fetch) {
  int row = row_begin;
  for (; row + kMaxTileRows <= row_end; row += kMaxTileRows, sums += kMaxTileRows * kPanelRows) {
    add_groups<kMaxTileRows>(sums, weights, count, first_group, x, row, fetch);
  }
  if (kMaxTileRows > 4 && row + 4 <= row_end) {
    add_groups<4>(sums, weights, count, first_group, x, row, fetch);
    row += 4, sums += 4 * kPanelRows;
  }
  switch (row_end - row) {
    case 3: add_groups<3>(sums, weights, count, first_group, x, row, fetch); break;
    case 2: add_groups<2>(sums, weights, count, first_group, x, row, fetch); break;
    case 1: add_groups<1>(sums, weights, count, first_group, x, row, fetch); break;
    default: break;
  }
}

SIMD_INLINE void store_rows(const float* sums, const Matrix& w, int panel, int row_begin,
                            int row_end, const Output& out) {
  for (int row = row_begin; row < row_end; ++row, sums += kPanelRows) {
    const Tile<1> acc = {{load(sums), load(sums + 8)}};
    store_tile<1>(acc, w, panel, row, out);
  }
}

// It goes on with each group or, where several share a scale, each pair of them.
SIMD_INLINE PanelFetch fetch_next(const Matrix& w, int panel, int num_rows) {
  const int num_steps = w.cols / std::min(w.scale_group, kPairSize);
  const int num_tiles = (num_rows + kMaxTileRows - 1) / kMaxTileRows;  // or one more
  if (num_tiles == 1) return PanelFetch::of_one_tile(w, panel, num_steps);
  return PanelFetch(w, panel + 1, 1, int64_t{num_tiles} * num_steps);
}

// A panel as it is packed; `scratch` holds the sums.
template <class Weights>
SIMD_INLINE void multiply_packed(const Weights& weights, const Matrix& w, int panel,
                                 const Activations& x, int row_begin, int row_end,
                                 const Output& out, void* scratch) {
  float* sums = static_cast<float*>(scratch);
  std::memset(sums, 0, static_cast<size_t>(row_end - row_begin) * kPanelRows * sizeof(float));
  PanelFetch fetch = fetch_next(w, panel, row_end - row_begin);
  add_groups(sums, weights, w.cols / weights.inputs(), 0, x, row_begin, row_end, fetch);
  store_rows(sums, w, panel, row_begin, row_end, out);
}

// Many rows. What shares a scale is unpacked into `per_scale` places of a chunk: unpack(place, i) fills one
// with the i-th of the row.
template <class Weights, class Unpacked, class Unpack>
SIMD_INLINE void multiply_unpacked(const Matrix& w, int panel, const Activations& x,
                                   int row_begin, int row_end, const Output& out, void* scratch,
                                   const Unpack& unpack, int per_scale = 1) {
  // With the inputs of four rows, about what the first-level cache holds.
  const int num_scales_at_once = 24 * 1024 / static_cast<int>(sizeof(Unpacked)) / per_scale;
  float* sums = static_cast<float*>(scratch);
  Unpacked* chunk = reinterpret_cast<Unpacked*>(sums + kMaxMatmulRows * kPanelRows);
  PanelFetch fetch = fetch_next(w, panel, row_end - row_begin);
  std::memset(sums, 0, static_cast<size_t>(row_end - row_begin) * kPanelRows * sizeof(float));
  for (int first = 0; first < w.num_scales(); first += num_scales_at_once) {
    const int count = std::min(w.num_scales() - first, num_scales_at_once);
    for (int i = 0; i < count * per_scale; ++i) unpack(chunk[i], first * per_scale + i);
    add_groups(sums, Weights{chunk, per_scale}, count, first, x, row_begin, row_end, fetch);
  }
  store_rows(sums, w, panel, row_begin, row_end, out);
}

template <class Packed>
void matmul_packed(const Matrix& w, int panel_begin, int panel_end, const Activations& x, int row_begin,
                   int row_end, const Output& out, void* scratch) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    multiply_packed(Packed(w, w.panel(panel)), w, panel, x, row_begin, row_end, out, scratch);
  }
}

constexpr MatmulKernel matmul_int6 = matmul_packed<PackedInt6>;

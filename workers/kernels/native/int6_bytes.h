// int6 for families that multiply it as int8.
// Included inside the family's namespace.

// The panel as it would be of int8, scales included.
SIMD_INLINE void unpack_int6(uint8_t* __restrict values, const Matrix& w, int panel) {
  const Int6Panel parts(w, w.panel(panel));
  const uint8_t* __restrict from = parts.groups;
  for (int half = 0; half < 2 * w.num_groups(); ++half, values += 256, from += Int6Panel::kGroupNbytes / 2) {
    for (int i = 0; i < 64; ++i) {  // with constant bounds, compilers make vectors of it
      const uint8_t a = from[i], b = from[i + 64], c = from[i + 128];
      values[i] = static_cast<uint8_t>((a & 63) - 32);
      values[i + 64] = static_cast<uint8_t>((b & 63) - 32);
      values[i + 128] = static_cast<uint8_t>((c & 63) - 32);
      values[i + 192] = static_cast<uint8_t>((a >> 6 | (b >> 4 & 12) | (c >> 2 & 48)) - 32);
    }
  }
  std::memcpy(values, parts.scales, static_cast<size_t>(w.num_scales()) * kPanelRows * 2);
}

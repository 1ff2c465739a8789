// A packed weight matrix, y = x * W^T, as docs/artifact-format.md lays it out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "api.h"

namespace furiosa {

constexpr int kPanelRows = 16;
constexpr int kGroupSize = 32;  // inputs that are packed together, where weights are integers

inline size_t panel_values_nbytes(FsDtype dtype, int cols) {
  constexpr size_t kBits[] = {32, 16, 8, 4, 4, 6};  // of a weight, by FsDtype
  return kBits[dtype] * static_cast<size_t>(cols) * kPanelRows / 8;
}

struct Matrix {
  const uint8_t* data = nullptr;
  FsDtype dtype = kFp32;
  bool has_min = false;
  bool is_rotated = false;  // groups of 32 went through a Walsh-Hadamard transform; so must inputs
  int rows = 0, cols = 0;
  int num_panels = 0;
  int scale_group = kGroupSize;  // weights of a row that share a scale: one group, or 2, 4 or 6
  size_t panel_stride = 0;  // bytes from one panel to the next

  const uint8_t* panel(int index) const { return data + panel_stride * static_cast<size_t>(index); }
  bool is_quantized() const { return dtype != kFp32 && dtype != kBf16; }
  // Products with bf16 weights take bf16 inputs, as the instructions for them do.
  bool rounds_inputs() const { return dtype != kFp32; }
  int num_groups() const { return cols / kGroupSize; }
  int num_scales() const { return cols / scale_group; }
  // Of a panel, whose scales follow its values.
  size_t values_nbytes() const { return panel_values_nbytes(dtype, cols); }
};

// Two groups of 32, side by side: what the AMX family multiplies at a time, and what kNested4 has
// factors and shifts of in one place.
constexpr int kPairSize = 2 * kGroupSize;
constexpr int kMaxScaleGroup = 3 * kPairSize;

// The parts of a panel of kNested4: w = scale * (factor * (nibble - 8) + shift), and what is in
// parentheses an int8.
struct NestedPanel {
  const uint8_t* nibbles;   // (cols/32, 4, 16, 4)
  const uint16_t* scales;   // (num_scales, 16)
  const int8_t* shifts;     // (cols/64, 16, 2): of both groups of a pair
  const uint8_t* factors;   // (cols/64, 16): of the first group in the low half, 1 to 15

  NestedPanel(const Matrix& w, const uint8_t* panel)
      : nibbles(panel),
        scales(reinterpret_cast<const uint16_t*>(nibbles + w.cols * kPanelRows / 2)),
        shifts(reinterpret_cast<const int8_t*>(scales + w.num_scales() * kPanelRows)),
        factors(reinterpret_cast<const uint8_t*>(shifts + w.cols / kPairSize * kPanelRows * 2)) {}
};

// A panel of kInt6: w = scale * (q - 32), q of 6 bits.
struct Int6Panel {
  static constexpr int kGroupNbytes = 384;
  // (cols/32, 2, 3, 16, 4): the lower six bits of half h's three quads are q of quads 4h, 4h + 1 and 4h + 2; the
  // upper two are those of quad 4h + 3, the lowest first.
  const uint8_t* groups;
  const uint16_t* scales;  // (num_scales, 16)

  Int6Panel(const Matrix& w, const uint8_t* panel)
      : groups(panel),
        scales(reinterpret_cast<const uint16_t*>(groups + w.num_groups() * kGroupNbytes)) {}
};

// Checks the tensor against its shape. Throws Failure(kInvalidArtifact) that names `name`.
Matrix matrix_from(const FsTensor& tensor, const char* name, int rows, int cols);

// The same for a plain float32 vector.
const float* vector_from(const FsTensor& tensor, const char* name, int cols);

// out (cols,) = row `row` of the matrix, as float32.
void unpack_row(const Matrix& matrix, int row, float* out) noexcept;

// IEEE half to float32, exact.
float float_from_half(uint16_t half) noexcept;

}  // namespace furiosa

#include "matrix.h"

#include <cstring>
#include <string>

#include "failure.h"

namespace furiosa {

namespace {

std::string shape_text(int rows, int cols) {
  return std::to_string(rows) + " x " + std::to_string(cols);
}

Failure wrong(const char* name, const std::string& why) {
  return Failure{kInvalidArtifact, std::string("tensor ") + name + ": " + why};
}

void check_shape(const FsTensor& tensor, const char* name, int rows, int cols) {
  if (tensor.data == nullptr) throw wrong(name, "is missing");
  if (tensor.rows != rows || tensor.cols != cols) {
    throw wrong(name, "is " + shape_text(tensor.rows, tensor.cols) + " but the model needs " +
                          shape_text(rows, cols));
  }
}

// The weights of a rotated row: H / 8 times what is stored, in the order of workers/artifact/rotation.py.
void rotate_back(float* row, int cols) {
  for (int distance = 1; distance < kGroupSize; distance *= 2) {
    for (int begin = 0; begin < cols; begin += 2 * distance) {
      for (int i = begin; i < begin + distance; ++i) {
        const float a = row[i], b = row[i + distance];
        row[i] = a + b;
        row[i + distance] = a - b;
      }
    }
  }
  for (int i = 0; i < cols; ++i) row[i] *= 0.125f;
}

// See workers/artifact/sizes.py.
int scale_group_of(const FsTensor& tensor) {
  if (tensor.dtype == kNested4 || tensor.dtype == kInt6 || (tensor.dtype == kInt8 && tensor.rotated)) {
    for (const int size : {kMaxScaleGroup, 2 * kPairSize, kPairSize}) {
      if (tensor.cols % size == 0) return size;
    }
  }
  return kGroupSize;
}

size_t panel_bytes(const FsTensor& tensor) {
  const FsDtype dtype = static_cast<FsDtype>(tensor.dtype);
  const size_t values = panel_values_nbytes(dtype, tensor.cols);
  const size_t num_scales = static_cast<size_t>(tensor.cols / scale_group_of(tensor)) * kPanelRows;
  switch (dtype) {
    case kFp32:
    case kBf16: return values;
    case kInt4: return values + num_scales * (tensor.has_min ? 4 : 2);
    case kNested4: return values + num_scales * 2 + static_cast<size_t>(tensor.cols / kPairSize) * kPanelRows * 3;
    default: return values + num_scales * 2;
  }
}

}  // namespace

Matrix matrix_from(const FsTensor& tensor, const char* name, int rows, int cols) {
  check_shape(tensor, name, rows, cols);
  if (tensor.dtype < kFp32 || tensor.dtype > kInt6) throw wrong(name, "has an unknown dtype");
  const int multiples[] = {1, 2, kGroupSize, kGroupSize, kPairSize, kPairSize};  // by FsDtype
  const int multiple = multiples[tensor.dtype];
  if (cols % multiple != 0) {
    throw wrong(name, "has " + std::to_string(cols) + " columns, not a multiple of " +
                          std::to_string(multiple));
  }
  if (reinterpret_cast<uintptr_t>(tensor.data) % 64 != 0) {
    throw wrong(name, "does not start at a multiple of 64 bytes");
  }
  Matrix matrix;
  matrix.data = static_cast<const uint8_t*>(tensor.data);
  matrix.dtype = static_cast<FsDtype>(tensor.dtype);
  matrix.has_min = tensor.has_min != 0;
  matrix.is_rotated = tensor.rotated != 0;
  matrix.scale_group = scale_group_of(tensor);
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.num_panels = (rows + kPanelRows - 1) / kPanelRows;
  matrix.panel_stride = (panel_bytes(tensor) + 63) / 64 * 64;
  // The padding after the last panel need not be there.
  const size_t needed =
      matrix.panel_stride * static_cast<size_t>(matrix.num_panels - 1) + panel_bytes(tensor);
  if (static_cast<size_t>(tensor.nbytes) < needed) {
    throw wrong(name, "has " + std::to_string(tensor.nbytes) + " bytes but its shape needs " +
                          std::to_string(needed));
  }
  return matrix;
}

const float* vector_from(const FsTensor& tensor, const char* name, int cols) {
  check_shape(tensor, name, 1, cols);
  if (static_cast<size_t>(tensor.nbytes) < static_cast<size_t>(cols) * sizeof(float)) {
    throw wrong(name, "is shorter than its shape");
  }
  return static_cast<const float*>(tensor.data);
}

float float_from_half(uint16_t half) noexcept {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, mantissa = half & 1023;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(mantissa) * 0x1p-24f;  // zero and subnormals
    return sign != 0 ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  const uint32_t bits = sign | wide << 23 | mantissa << 13;
  std::memcpy(&value, &bits, 4);
  return value;
}

void unpack_row(const Matrix& matrix, int row, float* out) noexcept {
  const uint8_t* panel = matrix.panel(row / kPanelRows);
  const int lane = row % kPanelRows, cols = matrix.cols, groups = matrix.num_groups();
  switch (matrix.dtype) {
    case kFp32: {
      const float* values = reinterpret_cast<const float*>(panel) + lane;
      for (int k = 0; k < cols; ++k) out[k] = values[k * kPanelRows];
      return;
    }
    case kBf16: {
      const uint16_t* values = reinterpret_cast<const uint16_t*>(panel) + lane * 2;
      for (int k = 0; k < cols; ++k) {
        const uint32_t bits = static_cast<uint32_t>(values[k / 2 * 32 + k % 2]) << 16;
        std::memcpy(&out[k], &bits, 4);
      }
      return;
    }
    case kInt8: {
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + cols * kPanelRows);
      for (int g = 0; g < groups; ++g) {
        const int index = g * kGroupSize / matrix.scale_group;
        const float scale = float_from_half(scales[index * kPanelRows + lane]);
        for (int i = 0; i < kGroupSize; ++i) {
          const uint8_t byte = panel[g * 512 + i / 4 * 64 + lane * 4 + i % 4];
          out[g * kGroupSize + i] = scale * static_cast<float>(static_cast<int8_t>(byte));
        }
      }
      break;
    }
    case kInt4: {
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + cols * kPanelRows / 2);
      const uint16_t* mins = scales + groups * kPanelRows;
      for (int g = 0; g < groups; ++g) {
        const float scale = float_from_half(scales[g * kPanelRows + lane]);
        const float min = matrix.has_min ? float_from_half(mins[g * kPanelRows + lane]) : 0.0f;
        const int offset = matrix.has_min ? 0 : 8;
        for (int i = 0; i < kGroupSize; ++i) {
          const uint8_t byte = panel[g * 256 + i % 16 / 4 * 64 + lane * 4 + i % 4];
          const int quant = (i < 16 ? byte & 15 : byte >> 4) - offset;
          out[g * kGroupSize + i] = scale * static_cast<float>(quant) + min;
        }
      }
      break;
    }
    case kInt6: {
      const Int6Panel parts(matrix, panel);
      for (int half = 0; half < 2 * groups; ++half, out += 16) {
        const uint8_t* quads = parts.groups + half * (Int6Panel::kGroupNbytes / 2) + lane * 4;
        const int index = half * 16 / matrix.scale_group;
        const float scale = float_from_half(parts.scales[index * kPanelRows + lane]);
        for (int i = 0; i < 4; ++i) {
          const int a = quads[i], b = quads[64 + i], c = quads[128 + i];
          const int values[] = {a & 63, b & 63, c & 63, a >> 6 | b >> 6 << 2 | c >> 6 << 4};
          for (int quad = 0; quad < 4; ++quad) out[4 * quad + i] = scale * static_cast<float>(values[quad] - 32);
        }
      }
      out -= cols;
      break;
    }
    case kNested4: {
      const NestedPanel parts(matrix, panel);
      for (int g = 0; g < groups; ++g) {
        const int pair = g / 2 * kPanelRows + lane;
        const int index = g * kGroupSize / matrix.scale_group;
        const float scale = float_from_half(parts.scales[index * kPanelRows + lane]);
        const int factor = g % 2 == 0 ? parts.factors[pair] & 15 : parts.factors[pair] >> 4;
        for (int i = 0; i < kGroupSize; ++i) {
          const uint8_t byte = parts.nibbles[g * 256 + i % 16 / 4 * 64 + lane * 4 + i % 4];
          const int quant = (i < 16 ? byte & 15 : byte >> 4) - 8;
          out[g * kGroupSize + i] = scale * static_cast<float>(factor * quant + parts.shifts[2 * pair + g % 2]);
        }
      }
      break;
    }
  }
  if (matrix.is_rotated) rotate_back(out, cols);
}

}  // namespace furiosa

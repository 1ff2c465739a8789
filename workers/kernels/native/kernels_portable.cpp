// The kernel family that runs anywhere: plain C++, one output panel and one row at a time.
//
// Order of sums, as in every family: an output is one lane, and takes its inputs (fp32, bf16) or
// its groups of 32 (int8, int4; exact integers inside a group) from left to right.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fetch_ahead.h"
#include "kernel_table.h"

namespace furiosa {
namespace portable {

#include "simd_portable.h"

constexpr bool kAddsPairsInWords = false;  // see row_kernels.h
#include "row_kernels.h"

#include "attention_kernel.h"

#include "int6_bytes.h"

namespace {

SIMD_INLINE void store_panel(const Output& out, const Matrix& w, int panel, int row,
                             const float* acc) {
  const int first = panel * kPanelRows;
  const int count = w.rows - first < kPanelRows ? w.rows - first : kPanelRows;
  float* y = out.values + row * out.stride + first;
  for (int r = 0; r < count; ++r) {
    const float value = out.bias != nullptr ? acc[r] + out.bias[first + r] : acc[r];
    y[r] = out.accumulate ? y[r] + value : value;
  }
}

void dot_fp32(float* acc, const uint8_t* panel, const Matrix& w, const Activations& x, int row) {
  const float* values = reinterpret_cast<const float*>(panel);
  const float* inputs = x.values + static_cast<int64_t>(row) * w.cols;
  for (int k = 0; k < w.cols; ++k) {
    for (int r = 0; r < kPanelRows; ++r) acc[r] += values[k * kPanelRows + r] * inputs[k];
  }
}

void dot_bf16(float* acc, const uint8_t* panel, const Matrix& w, const Activations& x, int row) {
  const uint16_t* values = reinterpret_cast<const uint16_t*>(panel);
  const float* inputs = x.values + static_cast<int64_t>(row) * w.cols;
  for (int k = 0; k < w.cols; ++k) {
    for (int r = 0; r < kPanelRows; ++r) {
      const uint32_t bits = static_cast<uint32_t>(values[k / 2 * 32 + r * 2 + k % 2]) << 16;
      float value;
      std::memcpy(&value, &bits, 4);
      acc[r] += value * inputs[k];
    }
  }
}

// Eight integers at a time: the four inputs of two neighbouring outputs.
typedef int8_t Bytes8 __attribute__((vector_size(8)));
typedef int16_t Words8 __attribute__((vector_size(16)));

SIMD_INLINE Words8 widen(const void* bytes) {
  Bytes8 narrow;
  std::memcpy(&narrow, bytes, 8);
  return __builtin_convertvector(narrow, Words8);
}
SIMD_INLINE Words8 quad_twice(const int8_t* quad) {
  return Words8{quad[0], quad[1], quad[2], quad[3], quad[0], quad[1], quad[2], quad[3]};
}
// Sums of neighbouring words.
SIMD_INLINE I4 add_pairs(Words8 words) {
  const I4 pairs = (I4)words;
  return (pairs >> 16) + ((pairs << 16) >> 16);
}
// Of panel output r: two lanes of the vector that holds it.
SIMD_INLINE int32_t sum_of_output(const I4* sums, int r) {
  return sums[r / 2][r % 2 * 2] + sums[r / 2][r % 2 * 2 + 1];
}

// Two products of bytes (at most 128 * 127 each) fit 16 bits; more are added in 32.
void dot_int8(float* acc, const uint8_t* panel, const Matrix& w, const Activations& x, int row) {
  const int num_scales = w.num_scales();
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + w.cols * kPanelRows);
  const int8_t* inputs = x.quants + static_cast<int64_t>(row) * w.cols;
  for (int g = 0; g < num_scales; ++g) {
    I4 sums[8] = {};
    for (int quad = 0; quad < w.scale_group / 4; quad += 2, panel += 128, inputs += 8) {
      const Words8 first = quad_twice(inputs), second = quad_twice(inputs + 4);
      for (int v = 0; v < 8; ++v) {
        sums[v] += add_pairs(widen(panel + 8 * v) * first + widen(panel + 64 + 8 * v) * second);
      }
    }
    const float input_scale = x.scales[static_cast<int64_t>(row) * num_scales + g];
    for (int r = 0; r < kPanelRows; ++r) {
      const float scale = float_from_half(scales[g * kPanelRows + r]);
      acc[r] += static_cast<float>(sum_of_output(sums, r)) * (input_scale * scale);
    }
  }
}

// Eight products of a nibble (at most 15) and a byte fit 16 bits.
void dot_int4(float* acc, const uint8_t* panel, const Matrix& w, const Activations& x, int row) {
  const int groups = w.num_groups();
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + w.cols * kPanelRows / 2);
  const uint16_t* mins = scales + groups * kPanelRows;
  const int8_t* inputs = x.quants + static_cast<int64_t>(row) * w.cols;
  for (int g = 0; g < groups; ++g, inputs += kGroupSize) {
    Words8 words[8] = {};
    for (int quad = 0; quad < 4; ++quad, panel += 64) {
      const Words8 low = quad_twice(inputs + 4 * quad), high = quad_twice(inputs + 4 * quad + 16);
      for (int v = 0; v < 8; ++v) {
        const Words8 pair = widen(panel + 8 * v);
        words[v] += (pair & 15) * low + (pair >> 4 & 15) * high;
      }
    }
    I4 sums[8];
    for (int v = 0; v < 8; ++v) sums[v] = add_pairs(words[v]);
    const int64_t group = static_cast<int64_t>(row) * groups + g;
    const int32_t offset = w.has_min ? 0 : x.group_offsets[group];
    for (int r = 0; r < kPanelRows; ++r) {
      const int32_t dot = sum_of_output(sums, r) + offset;
      const float scale = float_from_half(scales[g * kPanelRows + r]);
      acc[r] += static_cast<float>(dot) * (x.scales[group] * scale);
      if (w.has_min) acc[r] += float_from_half(mins[g * kPanelRows + r]) * x.scaled_sums[group];
    }
  }
}

// The four numbers of two neighbouring outputs, each four times.
template <class Byte>
SIMD_INLINE Words8 each_four_times(const Byte* first, int stride) {
  const int16_t a = first[0], b = first[stride];
  return Words8{a, a, a, a, b, b, b, b};
}

// As dot_int8, with weights that are made on the way.
void dot_nested4(float* acc, const uint8_t* panel, const Matrix& w, const Activations& x, int row) {
  const NestedPanel parts(w, panel);
  const int num_scales = w.num_scales();
  const int8_t* inputs = x.quants + static_cast<int64_t>(row) * w.cols;
  const uint8_t* nibbles = parts.nibbles;
  for (int g = 0; g < num_scales; ++g) {
    I4 sums[8] = {};
    for (int group = 0; group < w.scale_group / kGroupSize; ++group, inputs += kGroupSize) {
      const int pair = g * w.scale_group / kPairSize + group / 2, half = group % 2;
      Words8 factors[8], shifts[8];
      for (int v = 0; v < 8; ++v) {
        const int output = pair * kPanelRows + 2 * v;
        factors[v] = each_four_times(parts.factors + output, 1) >> (4 * half) & 15;
        shifts[v] = each_four_times(parts.shifts + 2 * output + half, 2);
      }
      for (int quad = 0; quad < 4; ++quad, nibbles += 64) {
        const Words8 low = quad_twice(inputs + 4 * quad), high = quad_twice(inputs + 4 * quad + 16);
        for (int v = 0; v < 8; ++v) {
          const Words8 pair = widen(nibbles + 8 * v);
          const Words8 first = ((pair & 15) - 8) * factors[v] + shifts[v];
          const Words8 second = ((pair >> 4 & 15) - 8) * factors[v] + shifts[v];
          sums[v] += add_pairs(first * low + second * high);
        }
      }
    }
    const float input_scale = x.scales[static_cast<int64_t>(row) * num_scales + g];
    for (int r = 0; r < kPanelRows; ++r) {
      const float scale = float_from_half(parts.scales[g * kPanelRows + r]);
      acc[r] += static_cast<float>(sum_of_output(sums, r)) * (input_scale * scale);
    }
  }
}

using Dot = void (*)(float*, const uint8_t*, const Matrix&, const Activations&, int);

// All rows of the range against a panel, whose bytes are at `data`.
template <Dot dot>
void run_panel(const uint8_t* data, const Matrix& w, int panel, const Activations& x, int row_begin,
               int row_end, const Output& out) {
  for (int row = row_begin; row < row_end; ++row) {
    float acc[kPanelRows] = {};
    dot(acc, data, w, x, row);
    store_panel(out, w, panel, row, acc);
  }
}

template <Dot dot>
void matmul(const Matrix& w, int panel_begin, int panel_end, const Activations& x, int row_begin,
            int row_end, const Output& out, void*) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    run_panel<dot>(w.panel(panel), w, panel, x, row_begin, row_end, out);
  }
}

// A panel becomes int8's before it is multiplied.
void matmul_int6(const Matrix& w, int panel_begin, int panel_end, const Activations& x, int row_begin,
                 int row_end, const Output& out, void* scratch) {
  uint8_t* values = static_cast<uint8_t*>(scratch);
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    unpack_int6(values, w, panel);
    run_panel<dot_int8>(values, w, panel, x, row_begin, row_end, out);
  }
}

}  // namespace
}  // namespace portable

const KernelTable kPortableKernels = {
    "portable",
    [] { return true; },
    {portable::matmul<portable::dot_fp32>, portable::matmul<portable::dot_bf16>,
     portable::matmul<portable::dot_int8>, portable::matmul<portable::dot_int4>,
     portable::matmul<portable::dot_nested4>, portable::matmul_int6},
    portable::rms_norm,
    portable::quantize,
    portable::swiglu,
    portable::rotate,
    portable::bf16_from_float,
    portable::quantize_head,
    portable::attention<portable::NoTiles>,
    nullptr,
    portable::merge_attention,
    portable::max_finite,
    portable::exp_double,
};

}  // namespace furiosa

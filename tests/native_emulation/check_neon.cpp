// The NEON family beside the portable one, on random inputs: a program for an AArch64 machine or qemu.
//
// The two differ in that NEON fuses products and sums, so results are close and not equal; quantised
// inputs and integer sums are equal. Prints what differs and fails, or "all checks passed".
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "activations.h"
#include "kernel_table.h"

using namespace furiosa;

namespace {

int num_failures = 0;
std::mt19937 random_bits(1);

void fail(const char* what) {
  std::printf("differs: %s\n", what);
  ++num_failures;
}

std::vector<float> random_floats(int count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random_bits);
  return values;
}

void expect_close(const std::vector<float>& a, const std::vector<float>& b, const char* what) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::fabs(a[i] - b[i]) <= 2e-5f * (1.0f + std::fabs(b[i])))) return fail(what);
  }
}

template <class Value>
void expect_equal(const std::vector<Value>& a, const std::vector<Value>& b, const char* what) {
  if (a != b) fail(what);
}

struct alignas(64) Line {
  uint8_t bytes[64];
  bool operator!=(const Line& other) const { return std::memcmp(bytes, other.bytes, 64) != 0; }
  bool operator==(const Line& other) const { return !(*this != other); }
};

// Quantised as the family does it.
struct Inputs {
  std::vector<Line> memory;  // all of x
  Activations x;

  Inputs(const KernelTable& kernels, const Matrix& weights, const std::vector<float>& from,
         int rows) {
    Arena sizes(nullptr);
    take_activations(sizes, rows, weights.cols);
    memory.resize(static_cast<size_t>(sizes.nbytes() / 64));
    Arena arena(memory.data()->bytes);
    x = take_activations(arena, rows, weights.cols);
    std::memcpy(x.values, from.data(), from.size() * sizeof(float));
    for (int row = 0; row < rows; ++row) {
      kernels.quantize(x.values + int64_t{row} * weights.cols, x, weights, row, 0, weights.cols);
    }
  }
};

void check_matmul(FsDtype dtype, bool has_min, bool is_rotated, int scale_group = kGroupSize) {
  constexpr int kRows = 37, kCols = 128, kInputs = 7;
  const size_t num_scale_bytes = static_cast<size_t>(kCols / scale_group * kPanelRows * 2);
  const size_t panel_nbytes[] = {kCols * 64, kCols * 32, kCols * 16 + num_scale_bytes,
                                 kCols * 8 + 2 * num_scale_bytes,
                                 kCols * 8 + num_scale_bytes + kCols / kPairSize * kPanelRows * 3,
                                 kCols * 12 + num_scale_bytes};
  Matrix w;
  w.dtype = dtype, w.has_min = has_min, w.is_rotated = is_rotated, w.rows = kRows, w.cols = kCols, w.num_panels = 3;
  w.scale_group = scale_group;
  w.panel_stride = (panel_nbytes[dtype] + 63) / 64 * 64;
  std::vector<uint8_t> data(w.panel_stride * 3 + 64);
  uint8_t* start = data.data() + (64 - reinterpret_cast<uintptr_t>(data.data()) % 64) % 64;
  w.data = start;
  for (size_t i = 0; i + 4 <= w.panel_stride * 3; i += 4) {
    const uint32_t bits = random_bits();
    const float value = static_cast<float>(static_cast<int32_t>(bits)) / 2147483648.0f;
    if (dtype == kFp32) {
      std::memcpy(start + i, &value, 4);
    } else if (dtype == kBf16) {  // exponents from 2^-6 to 2^1
      const uint32_t pair = (bits & 0x83ff83ffu) | 0x3c003c00u;
      std::memcpy(start + i, &pair, 4);
    } else {
      std::memcpy(start + i, &bits, 4);
    }
  }
  for (int panel = 0; panel < 3 && w.is_quantized(); ++panel) {  // scales and mins near 2^-4
    const size_t num_data = dtype == kInt8 ? kCols * 16 : dtype == kInt6 ? kCols * 12 : kCols * 8;
    const size_t end = dtype == kNested4 ? num_data + num_scale_bytes : panel_nbytes[dtype];
    for (size_t i = num_data; i + 2 <= end; i += 2) {
      const uint16_t half = static_cast<uint16_t>(0x2c00 | (random_bits() & 0x3ff));
      std::memcpy(start + panel * w.panel_stride + i, &half, 2);
    }
    for (size_t i = end; i < panel_nbytes[dtype]; ++i) {  // 8 * 15 + 7 is an int8
      const bool is_shift = i < end + kCols / kPairSize * kPanelRows * 2;
      const uint32_t bits = random_bits();
      start[panel * w.panel_stride + i] = static_cast<uint8_t>(is_shift ? bits % 15 - 7 : bits | 0x11);
    }
  }
  const std::vector<float> from = random_floats(kInputs * kCols);
  const std::vector<float> bias = random_floats(kRows);
  std::vector<float> results[2];
  for (int family = 0; family < 2; ++family) {
    const KernelTable& kernels = family == 0 ? kNeonKernels : kPortableKernels;
    Inputs inputs(kernels, w, from, kInputs);
    std::vector<uint8_t> scratch(static_cast<size_t>(matmul_scratch_nbytes(kCols)));
    results[family].assign(kInputs * kRows, 0.5f);
    const Output out{results[family].data(), kRows, bias.data(), true};
    kernels.matmul[dtype](w, 0, 3, inputs.x, 0, kInputs, out, scratch.data());
    for (int row = 0; row < kInputs; ++row) {  // a row alone has the same bits
      std::vector<float> alone(static_cast<size_t>(kInputs * kRows), 0.5f);
      kernels.matmul[dtype](w, 0, 3, inputs.x, row, row + 1, {alone.data(), kRows, bias.data(), true},
                            scratch.data());
      if (std::memcmp(&alone[row * kRows], &results[family][row * kRows], kRows * 4) != 0) {
        fail("a row alone");
      }
    }
  }
  expect_close(results[0], results[1], "matmul");
}

void check_rows() {
  constexpr int kCols = 96 + 5;
  const std::vector<float> x = random_floats(kCols), weight = random_floats(kCols);
  const std::vector<float> whole = random_floats(2 * 96);
  std::vector<float> y[2], swiglu[2], rotated[2];
  std::vector<double> powers[2];
  std::vector<uint16_t> halves[2];
  std::vector<int8_t> head[2];
  float head_scale[2], largest[2];
  const KernelTable* tables[] = {&kNeonKernels, &kPortableKernels};
  for (int family = 0; family < 2; ++family) {
    const KernelTable& kernels = *tables[family];
    y[family].resize(kCols), swiglu[family].resize(kCols), powers[family].resize(kCols);
    halves[family].resize(kCols), head[family].resize(96);
    kernels.rms_norm(y[family].data(), x.data(), weight.data(), kCols, 1e-5f);
    kernels.swiglu(swiglu[family].data(), x.data(), weight.data(), kCols);
    rotated[family] = whole;
    kernels.rotate(rotated[family].data(), x.data(), weight.data(), 96);
    kernels.bf16_from_float(halves[family].data(), x.data(), kCols);
    head_scale[family] = kernels.quantize_head(head[family].data(), x.data(), 96);
    largest[family] = kernels.max_finite(x.data(), kCols);
    kernels.exp_double(powers[family].data(), x.data(), kCols, largest[family], 0.7);
  }
  expect_close(y[0], y[1], "rms_norm");
  expect_close(swiglu[0], swiglu[1], "swiglu");
  expect_close(rotated[0], rotated[1], "rotate");
  expect_equal(halves[0], halves[1], "bf16_from_float");
  expect_equal(head[0], head[1], "quantize_head");
  if (head_scale[0] != head_scale[1]) fail("quantize_head's scale");
  if (largest[0] != largest[1]) fail("max_finite");
  for (int i = 0; i < kCols; ++i) {
    if (!(std::fabs(powers[0][i] - powers[1][i]) <= 1e-14)) return fail("exp_double");
  }
  std::vector<float> poisoned = x;
  poisoned[97] = INFINITY;
  if (!std::isnan(kNeonKernels.max_finite(poisoned.data(), kCols))) fail("max_finite of infinity");
  for (const int scale_group : {0, kGroupSize, 2 * kGroupSize}) {  // 0: not rotated
    Matrix w;
    w.dtype = kInt8, w.is_rotated = scale_group > 0, w.cols = 64;
    if (scale_group > 0) w.scale_group = scale_group;
    const Inputs neon(kNeonKernels, w, whole, 2), portable(kPortableKernels, w, whole, 2);
    expect_equal(neon.memory, portable.memory, "quantize");  // all that it writes
  }
}

// Five tokens at positions 290 to 294: two partitions, and pieces that are not whole.
void check_attention(FsDtype kv_dtype, int window) {
  constexpr int kDim = 40, kHeads = 3, kTokens = 5, kBlock = 16, kBlocks = 20, kFirst = 290;
  const std::vector<float> keys = random_floats(kBlocks * kBlock * kDim);
  const std::vector<float> values = random_floats(kBlocks * kBlock * kDim);
  const std::vector<float> q = random_floats(kTokens * kHeads * kDim);
  std::vector<uint8_t> stored[2];
  std::vector<float> scales[2];
  const std::vector<float>* sources[] = {&keys, &values};
  for (int i = 0; i < 2; ++i) {
    stored[i].resize(keys.size() * 4);
    scales[i].resize(kBlocks * kBlock);
    for (int token = 0; token < kBlocks * kBlock; ++token) {
      const float* from = sources[i]->data() + token * kDim;
      const size_t place = static_cast<size_t>(token * kDim);
      if (kv_dtype == kFp32) std::memcpy(&stored[i][place * 4], from, kDim * 4);
      if (kv_dtype == kBf16) {
        kPortableKernels.bf16_from_float(reinterpret_cast<uint16_t*>(&stored[i][place * 2]), from,
                                         kDim);
      }
      if (kv_dtype == kInt8) {
        scales[i][token] = kPortableKernels.quantize_head(
            reinterpret_cast<int8_t*>(&stored[i][place]), from, kDim);
      }
    }
  }
  std::vector<int32_t> block_ids;
  for (int i = 0; i < kBlocks; ++i) block_ids.push_back((7 * i + 3) % kBlocks);
  std::vector<float> out[2];
  std::vector<float> scratch(static_cast<size_t>(attention_scratch_floats(kDim)) + 16);
  for (int family = 0; family < 2; ++family) {
    out[family].resize(q.size());
    AttentionTask task = {};
    task.q = q.data(), task.out = out[family].data();
    task.q_stride = task.out_stride = kHeads * kDim;
    task.num_tokens = kTokens, task.heads_per_kv = kHeads, task.head_dim = kDim;
    task.first_position = kFirst, task.sliding_window = window;
    task.scale = 1.0f / std::sqrt(static_cast<float>(kDim));
    task.keys = stored[0].data(), task.values = stored[1].data();
    task.key_scales = scales[0].data(), task.value_scales = scales[1].data();
    task.kv_dtype = kv_dtype, task.block_ids = block_ids.data(), task.block_size = kBlock;
    task.places = BlockPlaces(kBlock * kDim, 1), task.scale_places = BlockPlaces(kBlock, 1);
    const uintptr_t place = (reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64;
    task.scratch = reinterpret_cast<float*>(place);
    (family == 0 ? kNeonKernels : kPortableKernels).attention(task);
  }
  expect_close(out[0], out[1], "attention");
}

}  // namespace

int main() {
  if (!kNeonKernels.is_supported()) {
    std::printf("this CPU lacks the dot product\n");
    return 1;
  }
  check_rows();
  for (const FsDtype dtype : {kFp32, kBf16, kInt8, kInt4}) check_matmul(dtype, false, false);
  for (const FsDtype dtype : {kInt8, kInt4}) check_matmul(dtype, false, true);
  for (const int size : {kPairSize, 2 * kPairSize}) check_matmul(kInt8, false, true, size);
  check_matmul(kInt4, true, false);
  for (const int size : {kPairSize, 2 * kPairSize}) check_matmul(kInt6, false, true, size);
  for (const bool is_rotated : {false, true}) {
    for (const int size : {kPairSize, 2 * kPairSize}) check_matmul(kNested4, false, is_rotated, size);
  }
  for (const FsDtype dtype : {kFp32, kBf16, kInt8}) {
    check_attention(dtype, 0);
    check_attention(dtype, 70);
  }
  if (num_failures == 0) std::printf("all checks passed\n");
  return num_failures == 0 ? 0 : 1;
}

#include "weights.h"

#include <string>

#include "failure.h"

namespace furiosa {

Weights Weights::from(const FsEngineConfig& config) {
  const int64_t expected =
      kNumGlobalTensors + int64_t{config.num_layers} * kNumLayerTensors;
  require(config.num_tensors == expected, kInvalidConfig, "the tensor table has the wrong length");
  const int hidden = config.hidden_size, head_dim = config.head_dim;
  const int q_size = config.num_heads * head_dim, kv_size = config.num_kv_heads * head_dim;
  const int qkv_size = q_size + 2 * kv_size;

  Weights weights;
  const FsTensor* table = config.tensors;
  weights.embed = matrix_from(table[kEmbed], "embed", config.vocab_size, hidden);
  weights.lm_head = table[kLmHead].data == nullptr
                        ? weights.embed
                        : matrix_from(table[kLmHead], "lm_head", config.vocab_size, hidden);
  weights.final_norm = vector_from(table[kFinalNorm], "final_norm", hidden);
  weights.rope_inv_freq = vector_from(table[kRopeInvFreq], "rope_inv_freq", head_dim / 2);

  for (int index = 0; index < config.num_layers; ++index) {
    const FsTensor* tensors = table + kNumGlobalTensors + index * kNumLayerTensors;
    const std::string prefix = "layers." + std::to_string(index) + ".";
    const auto matrix = [&](int which, const char* name, int rows, int cols) {
      return matrix_from(tensors[which], (prefix + name).c_str(), rows, cols);
    };
    const auto vector = [&](int which, const char* name, int cols) {
      return vector_from(tensors[which], (prefix + name).c_str(), cols);
    };
    const auto optional = [&](int which, const char* name, int cols) {
      return tensors[which].data == nullptr ? nullptr : vector(which, name, cols);
    };
    LayerWeights layer;
    layer.attn_norm = vector(kAttnNorm, "attn_norm", hidden);
    layer.qkv = matrix(kQkv, "qkv", qkv_size, hidden);
    layer.qkv_bias = optional(kQkvBias, "qkv_bias", qkv_size);
    layer.q_norm = optional(kQNorm, "q_norm", head_dim);
    layer.k_norm = optional(kKNorm, "k_norm", head_dim);
    layer.o = matrix(kO, "o", hidden, q_size);
    layer.ffn_norm = vector(kFfnNorm, "ffn_norm", hidden);
    layer.gate_up = matrix(kGateUp, "gate_up", 2 * config.intermediate_size, hidden);
    layer.down = matrix(kDown, "down", hidden, config.intermediate_size);
    weights.layers.push_back(layer);
  }
  return weights;
}

}  // namespace furiosa

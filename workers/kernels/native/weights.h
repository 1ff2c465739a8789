// The model's tensors, checked once against its configuration.
#pragma once

#include <vector>

#include "matrix.h"

namespace furiosa {

struct LayerWeights {
  const float* attn_norm;
  Matrix qkv;               // the rows of q, then k, then v
  const float* qkv_bias;    // null: none
  const float *q_norm, *k_norm;  // null: none
  Matrix o;
  const float* ffn_norm;
  Matrix gate_up;           // the rows of gate, then up
  Matrix down;
};

struct Weights {
  Matrix embed, lm_head;    // the same one when tied
  const float *final_norm, *rope_inv_freq;
  std::vector<LayerWeights> layers;

  // Throws Failure with the field or the tensor at fault.
  static Weights from(const FsEngineConfig& config);
};

}  // namespace furiosa

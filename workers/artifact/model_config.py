"""What the kernels must know of a model: one decoder family, told apart by flags, not names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A pre-norm decoder with rotary embeddings and a SwiGLU feed-forward.

    Llama, Mistral, Qwen2, Qwen3 and SmolLM2 are all this; the flags say how they differ. The
    rotary frequencies, with whatever scaling the model has, are a tensor of the artifact.
    """

    architecture: str  # e.g. "LlamaForCausalLM"; for display only
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_model_len: int  # positions the model was made for
    sliding_window: int  # 0: full attention
    attention_bias: bool  # biases on q, k and v (Qwen2)
    qk_norm: bool  # RMS norm on each head of q and k before the rotation (Qwen3)
    tied_embeddings: bool  # the LM head is the embedding

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype: str) -> int:
        """KV cache bytes that one token takes over all layers, in fp32, bf16 or int8."""
        head_bytes = {
            "fp32": 4 * self.head_dim,
            "bf16": 2 * self.head_dim,
            "int8": self.head_dim + 4,  # and a float32 scale
        }
        return 2 * self.num_layers * self.num_kv_heads * head_bytes[dtype]

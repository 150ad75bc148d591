"""ModelConfig: sizes and options by which decoders of the families differ."""

import dataclasses

from opo_jax.models.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer with RMSNorm, rotary positions, grouped queries, SwiGLU.

  Attributes:
    vocab_size: rows of the embedding; may exceed the tokenizer's (padded vocabulary).
    width: model width D.
    mlp_width: hidden width F of the gated MLP.
    num_layers: L.
    num_heads: query heads H.
    num_kv_heads: key-value heads K; divides `num_heads`.
    head_dim: width E of one head.
    rope_theta: base of the rotary wavelengths.
    rope_scaling: scaling to a longer context; None: none.
    max_positions: the context length of pretraining, tokens. Not enforced; written to
      config.json, where serving engines read it.
    norm_epsilon: added to the mean square in RMSNorm.
    qkv_bias: bias on query, key and value projections (Qwen2).
    out_bias: bias on the attention's output projection (Llama's `attention_bias`).
    mlp_bias: bias on the MLP's projections.
    qk_norm: RMSNorm on each head's query and key (Qwen3).
    tie_embeddings: the unembedding shares the embedding's parameters.
    sliding_window: tokens that a query of a sliding layer sees, itself included.
    sliding_layers: the layers with a sliding window, counted from 0.
    initializer_range: standard deviation of initial weights.
  """

  vocab_size: int
  width: int
  mlp_width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  max_positions: int = 32_768
  norm_epsilon: float = 1e-6
  qkv_bias: bool = True
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  tie_embeddings: bool = True
  sliding_window: int | None = None
  sliding_layers: tuple[int, ...] = ()
  initializer_range: float = 0.02

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"{self.num_heads} query heads do not divide into {self.num_kv_heads} key-value"
        " heads; use a divisor (--model.num-kv-heads)."
      )
    if self.head_dim % 2:
      raise ValueError(
        f"head_dim {self.head_dim} is odd; rotary positions need an even width"
        " (--model.head-dim)."
      )
    if bool(self.sliding_window) != bool(self.sliding_layers):
      raise ValueError(
        f"A sliding window of {self.sliding_window} and sliding layers"
        f" {self.sliding_layers} need each other; give both or neither."
      )

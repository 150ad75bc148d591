"""The numbers that make a decoder of one family differ from another's."""

import dataclasses


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
    norm_epsilon: added to the mean square in RMSNorm.
    qkv_bias: bias on query, key and value projections (Qwen2 has it).
    tie_embeddings: the unembedding is the embedding.
    initializer_range: standard deviation of a fresh weight.
  """

  vocab_size: int
  width: int
  mlp_width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10_000.0
  norm_epsilon: float = 1e-6
  qkv_bias: bool = True
  tie_embeddings: bool = True
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

"""Rotary position embedding, and its scalings to longer contexts.

A scaling has the fields of `config.json` under the names they have there, so that
reading and writing need no second table. Frequencies are computed on the host in
float64, equal for every backend: at position 30,000 a relative error of 1e-6 would
rotate a head by 2 degrees.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Linear scaling: divides positions by `factor` (https://arxiv.org/abs/2306.15595)."""

  factor: float

  attention_factor = 1.0

  def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
    del theta
    return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Llama 3.1: divides low frequencies by `factor` and keeps high ones.

  A frequency is kept if it makes more than `high_freq_factor` turns within the original
  context, divided below `low_freq_factor` turns, and interpolated in between
  (https://arxiv.org/abs/2407.21783).
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int

  attention_factor = 1.0

  def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
    del theta
    turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - self.low_freq_factor) / (
      self.high_freq_factor - self.low_freq_factor
    )
    kept = np.clip(kept, 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """YaRN: a ramp over frequency indices, and a lower softmax temperature.

  Frequencies of more than `beta_fast` turns within the original context are kept, those
  of less than `beta_slow` turns divided by `factor`. Queries and keys are each
  multiplied by the attention factor (https://arxiv.org/abs/2309.00071).
  """

  factor: float
  original_max_position_embeddings: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True

  def __post_init__(self):
    if self.attention_factor is None:
      factor = self._mscale(1.0)
      if self.mscale and self.mscale_all_dim:
        factor = self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
      object.__setattr__(self, "attention_factor", factor)

  def _mscale(self, mscale):
    return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

  def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
    head_dim = 2 * len(frequencies)

    def index(turns):
      """The index of the frequency with so many turns in the original context."""
      wavelength = self.original_max_position_embeddings / turns
      return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    low, high = index(self.beta_fast), index(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0.0
    divided = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return (1 - divided) * frequencies + divided * frequencies / self.factor


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling

# `rope_type` of config.json -> scaling; "default" has none.
SCALINGS = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}


def rotary(
  positions_BT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
  """cos and sin [B, T, 1, E/2] of the rotary embedding, float32.

  Position p rotates pair e of a head by `p * theta ** (-2 e / E)`, with the
  scaling applied (https://arxiv.org/abs/2104.09864).
  """
  frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
  length = 1.0
  if scaling is not None:
    frequencies = scaling.stretch(frequencies, theta)
    length = scaling.attention_factor
  positions = positions_BT[..., None, None].astype(jnp.float32)
  angles = positions * frequencies.astype(np.float32)
  return length * jnp.cos(angles), length * jnp.sin(angles)


def rotate(x_BTHE: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates pairs (e, e + E/2) of each head: halves, as in Hugging Face models."""
  cos, sin = rotation
  first, second = jnp.split(x_BTHE.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return out.astype(x_BTHE.dtype)

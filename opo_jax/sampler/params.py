"""`SamplingParams`: how to sample, in one description."""

import dataclasses
import operator
from typing import Any

import jax
import numpy as np

from opo_jax.models.transformer import Policy

# Compiled programs take these as data; a new value compiles nothing.
_NUMBERS = ("temperature", "top_k", "top_p", "min_p")
# These, and whether tokens are chosen greedily or filtered, are compiled into them.
_STATIC = ("max_new_tokens", "samples_per_prompt", "eos_ids", "stop")


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
  """How to sample, from config to the compiled decode loop.

  Attributes:
    max_new_tokens: T, the longest response.
    samples_per_prompt: responses to each prompt.
    temperature: divides the logits; 0 is greedy.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: of these, keep the smallest set of most probable tokens with this mass.
    min_p: of these, keep the tokens at least `min_p` times as probable as the most
      probable one.
    eos_ids: tokens that end a response; None takes the policy's own, `()` none. The
      first one sampled belongs to the response.
    stop: token sequences that end a response and belong to it.

  Raises:
    ValueError: a value out of its range.

  >>> SamplingParams(max_new_tokens=8, top_p=0.9).is_policy
  False
  """

  max_new_tokens: int
  samples_per_prompt: int = 1
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  eos_ids: tuple[int, ...] | None = None
  stop: tuple[tuple[int, ...], ...] = ()

  def __post_init__(self):
    for name in ("samples_per_prompt", "max_new_tokens"):
      self._set(name, _count(name, getattr(self, name)))
    # 1 and 1.0 must be one program.
    for name in ("temperature", "top_p", "min_p"):
      self._set(name, float(getattr(self, name)))
    self._set("top_k", operator.index(self.top_k))
    for name, good, wanted in (
      ("temperature", self.temperature >= 0, "0 (greedy) or more"),
      ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all tokens)"),
      ("min_p", 0 <= self.min_p <= 1, "0 (all tokens) to 1"),
    ):
      if not good:
        raise ValueError(f"{name}={getattr(self, name)}; it must be {wanted}.")
    if self.eos_ids is not None:
      self._set("eos_ids", _token_ids("eos_ids", self.eos_ids))
    self._set("stop", tuple(_stop_sequence(sequence) for sequence in self.stop))
    self._set("_is_greedy", self.temperature == 0)
    self._set("_is_filtered", self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

  @property
  def is_greedy(self) -> bool:
    """Whether the most probable token is taken."""
    return self._is_greedy

  @property
  def is_filtered(self) -> bool:
    """Whether top-k, top-p or min-p excludes tokens."""
    return self._is_filtered

  @property
  def is_policy(self) -> bool:
    """Whether tokens are samples of the policy at `temperature`, none excluded."""
    return not (self.is_greedy or self.is_filtered)

  def for_policy(self, policy: Policy) -> "SamplingParams":
    """The same, with the policy's end tokens where `eos_ids` is None.

    Raises:
      ValueError: `top_k` exceeds the policy's vocabulary.
    """
    vocab_size = policy.config.vocab_size
    if self.top_k > vocab_size:
      raise ValueError(
        f"top_k={self.top_k}; it must be 0 (all tokens) to the vocabulary's"
        f" {vocab_size}."
      )
    if self.eos_ids is not None:
      return self
    return dataclasses.replace(self, eos_ids=tuple(policy.eos_ids))

  # A pytree. Inside a jitted function the numbers are traced, so that what depends on
  # their values must be decided before: `is_greedy` and `is_filtered` are static.

  def tree_flatten(self) -> tuple[tuple, tuple]:
    static = (*_STATIC, "_is_greedy", "_is_filtered")
    return (
      tuple(getattr(self, name) for name in _NUMBERS),
      tuple((name, getattr(self, name)) for name in static),
    )

  @classmethod
  def tree_unflatten(cls, static: tuple, numbers: tuple) -> "SamplingParams":
    params = object.__new__(cls)  # unchecked: a tracer has no value to check
    for name, value in (*zip(_NUMBERS, numbers, strict=True), *static):
      params._set(name, value)
    return params

  def _set(self, name: str, value: Any) -> None:
    object.__setattr__(self, name, value)


def _count(name, value):
  if not isinstance(value, (int, np.integer)) or not 1 <= value < 2**32:
    raise ValueError(f"{name}={value}; it must be a whole number from 1 to 2^32 - 1.")
  return int(value)


def _token_ids(name, ids):
  if isinstance(ids, str) or np.ndim(ids) != 1:
    raise ValueError(f"{name}={ids!r}; give a sequence of token ids, () for none.")
  return tuple(map(operator.index, ids))


def _stop_sequence(sequence):
  if isinstance(sequence, str) or np.ndim(sequence) != 1 or not len(sequence):
    raise ValueError(
      f"stop contains {sequence!r}; each entry is a sequence of at least one token id."
    )
  return tuple(map(operator.index, sequence))

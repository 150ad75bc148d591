"""State: the pytrees that the sampler's programs exchange, and their layout.

Every shard of the batch has its own prompts, queue and slots, contiguous in each array,
and counts rows and prompts from its own first one.
"""

import dataclasses

import jax
import jax.numpy as jnp

from opo_jax.devices import sharding
from opo_jax.sampler.params import SamplingParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
  """The prefilled prompts. G counts those of all shards, padding included."""

  keys: jax.Array  # [L, G, K, P, E]
  values: jax.Array  # [L, G, K, P, E]
  hidden: jax.Array  # [G, D] of the last token; predicts the response's first
  lengths: jax.Array  # [G]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
  """The rows to sample. A shard's rows are contiguous, its padding behind them."""

  keys: jax.Array  # [N] random keys
  limits: jax.Array  # [N] longest response
  counts: jax.Array  # [shards] rows without padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """The B responses in progress, those of a shard contiguous."""

  step: jax.Array  # scalar, iterations so far; the ring's next column is `step % S`
  row: jax.Array  # [B] the row of its shard that a slot samples; -1: idle
  length: jax.Array  # [B] tokens sampled for it so far
  hidden: jax.Array  # [B, D], predicts the next token
  keys: jax.Array  # [L, B, K, S, E], a ring of S columns
  values: jax.Array  # [L, B, K, S, E]
  recent: jax.Array  # [B, M] the last tokens, M the longest stop sequence; -1: none
  next_row: jax.Array  # [shards] the first row of each shard that no slot has taken


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Responses:
  """What has been sampled so far; the fields are those of Rollouts."""

  tokens: jax.Array  # [N, T]
  logprobs: jax.Array  # [N, T]
  sampling_logprobs: jax.Array | None  # [N, T]; None: equal to logprobs
  lengths: jax.Array  # [N]
  finished: jax.Array  # [N]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ended:
  """Responses that have ended, returned while others are still sampled."""

  rows: jax.Array  # [n] their rows in Rollouts; -1: padding
  prompt_ids: jax.Array  # [n]
  tokens: jax.Array  # [n, T]
  lengths: jax.Array  # [n]
  finished: jax.Array  # [n]


def prompt_of(row_B, params: SamplingParams):
  """The prompt of each slot, counted within its shard; 0 for an idle slot."""
  return jnp.maximum(row_B, 0) // params.samples_per_prompt


# --- shards: what belongs to one stays on it ------------------------------------------


def by_shard(array, shards):
  """[shards * n, ...] -> [shards, n, ...]."""
  return array.reshape(shards, array.shape[0] // shards, *array.shape[1:])


def take(array, index, shards):
  """`array[index]`, where each shard's indices count from its own first entry."""
  taken = jax.vmap(lambda array, index: array[index])(
    by_shard(array, shards), by_shard(index, shards)
  )
  return taken.reshape(index.size, *array.shape[1:])


def on_mesh(policy, array, *, cache=False):
  """Lays `array` over the mesh."""
  axes = logical_axes(policy.mesh, array.shape, cache=cache)
  return sharding.constrain(array, policy.mesh, *axes)


def logical_axes(mesh, shape, *, cache):
  """Rows lie over the batch axes; keys and values also over their heads."""
  if not cache:
    return ("batch", *(None,) * (len(shape) - 1))
  whole = mesh is None or shape[2] % mesh.shape["tensor"]
  return (None, "batch", None if whole else "kv_heads", None, None)


def slot_bytes(config, mesh, max_new_tokens: int, cache_dtype: str) -> int:
  """Memory of one slot when its response is longest, bytes of one device."""
  parts = 1 if mesh is None else mesh.shape["tensor"]
  heads = config.num_kv_heads
  heads = heads if heads % parts else heads // parts
  column = 2 * config.num_layers * heads * config.head_dim
  column *= jnp.dtype(cache_dtype).itemsize
  # While a ring doubles, the old one of half its size still exists: 3/2. The logits
  # exist about eight times in float32, sorted copies among them.
  return column * max_new_tokens * 3 // 2 + 8 * 4 * config.vocab_size // parts

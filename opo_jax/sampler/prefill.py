"""Prefill: what is computed once for a batch, before the decode loop.

The sampler's own weights, a random key for every row, keys and values of every prompt,
and the first rows in their slots.
"""

import functools

import jax
import jax.numpy as jnp

from opo_jax.devices import sharding
from opo_jax.models.transformer import Policy
from opo_jax.rollouts import prompt_columns
from opo_jax.sampler.params import SamplingParams
from opo_jax.sampler.state import (
  Prompts,
  Queue,
  Responses,
  Slots,
  by_shard,
  on_mesh,
  prompt_of,
  take,
)

# What a shard prefills at a time, at most: tokens, and attention scores.
_PREFILL_TOKENS, _PREFILL_SCORES = 2**14, 2**28


@functools.partial(jax.jit, static_argnames="gathered")
@jax.named_scope("reshard")
def sampling_weights(policy: Policy, gathered: bool) -> Policy:
  """The policy in the layout and dtype that decoding reads, converted once for a batch.

  Args:
    policy: in the learner's layout and dtype.
    gathered: every `fsdp` shard gets whole weights (split over `tensor` only).

  Returns:
    The same values in the compute dtype.
  """
  if policy.mesh is None:
    return policy.in_compute_dtype()
  abstract_policy = jax.eval_shape(Policy.in_compute_dtype, policy)
  rules = sharding.GATHERED if gathered else sharding.RULES
  layout = sharding.tree_shardings(abstract_policy, policy.mesh, rules)

  def convert(array, abstract, layout):
    return jax.lax.with_sharding_constraint(array.astype(abstract.dtype), layout)

  def convert_stacked(array, abstract, layout):
    # Layer by layer: otherwise memory holds both copies of all layers at once.
    layer_layout = layout.update(spec=layout.spec[1:])
    array = jax.lax.map(lambda layer: convert(layer, abstract, layer_layout), array)
    return convert(array, abstract, layout)

  def convert_leaf(path, *leaves):
    stacked = getattr(path[0], "name", None) == "layers"
    return (convert_stacked if stacked else convert)(*leaves)

  return jax.tree_util.tree_map_with_path(convert_leaf, policy, abstract_policy, layout)


@functools.partial(jax.jit, static_argnames="cache_dtype")
def prefill(
  policy: Policy, tokens_GP: jax.Array, lengths_G: jax.Array, cache_dtype: str
) -> Prompts:
  """Keys, values and the last hidden state of every prompt, chunk by chunk."""
  (G, P), shards = tokens_GP.shape, sharding.batch_shards(policy.mesh)
  chunk = _prefill_chunk(G // shards, P, policy.config.num_heads)

  def prefill_chunk(inputs):
    tokens, lengths = inputs
    hidden, (keys, values) = policy.hidden(tokens, *prompt_columns(lengths, P))
    # The prompts' axis first, so that chunks are concatenated along it.
    keys, values = (jnp.moveaxis(x, 1, 0) for x in (keys, values))
    return hidden[:, -1], keys.astype(cache_dtype), values.astype(cache_dtype)

  with jax.named_scope("prefill"):
    inputs = tuple(_chunks(x, chunk, shards) for x in (tokens_GP, lengths_G))
    chunks = jax.lax.map(prefill_chunk, inputs)
    hidden, keys, values = (_from_chunks(x, G, shards) for x in chunks)
  return Prompts(
    keys=on_mesh(policy, jnp.moveaxis(keys, 0, 1), cache=True),
    values=on_mesh(policy, jnp.moveaxis(values, 0, 1), cache=True),
    hidden=on_mesh(policy, hidden),
    lengths=lengths_G,
  )


def _prefill_chunk(count, prompt_tokens, num_heads):
  """How many of a shard's `count` prompts are prefilled at a time, in equal chunks."""
  most = min(_PREFILL_TOKENS, _PREFILL_SCORES // (prompt_tokens * num_heads))
  chunks = -(-count // max(most // prompt_tokens, 1))
  return -(-count // chunks)


def _chunks(array, chunk, shards):
  """[G, ...] -> [chunks, shards * chunk, ...]: each chunk has prompts of every shard.

  Two shards of 3 prompts, a to c and d to f, in chunks of 2: ab de, then cc ff (the
  last prompt of a shard fills its last chunk up).
  """
  array = by_shard(array, shards)
  count = array.shape[1]
  chunks = -(-count // chunk)
  padding = [(0, 0), (0, chunks * chunk - count)]
  array = jnp.pad(array, padding + [(0, 0)] * (array.ndim - 2), mode="edge")
  array = array.reshape(shards, chunks, chunk, *array.shape[2:])
  return array.swapaxes(0, 1).reshape(chunks, shards * chunk, *array.shape[3:])


def _from_chunks(array, count, shards):
  """The inverse of `_chunks`, without its padding: [count, ...], of all shards."""
  chunks, chunk = array.shape[0], array.shape[1] // shards
  array = array.reshape(chunks, shards, chunk, *array.shape[2:]).swapaxes(0, 1)
  array = array.reshape(shards, chunks * chunk, *array.shape[3:])
  return array[:, : count // shards].reshape(count, *array.shape[2:])


@functools.partial(jax.jit, static_argnames="samples_per_prompt")
def row_keys(seeds_N, rows_N, samples_per_prompt):
  """A random key for each row: of (seed, prompt index, sample index), or, with
  `samples_per_prompt` None, of the row's own seed alone."""

  def row_key(seed, row):
    key = jax.random.key(seed)
    if samples_per_prompt is None:
      return key
    prompt, sample = row // samples_per_prompt, row % samples_per_prompt
    return jax.random.fold_in(jax.random.fold_in(key, prompt), sample)

  return jax.vmap(row_key)(seeds_N, rows_N)


@functools.partial(jax.jit, static_argnames=("num_slots", "width"))
def start(
  policy: Policy,
  prompts: Prompts,
  queue: Queue,
  params: SamplingParams,
  num_slots: int,
  width: int,
) -> tuple[Slots, Responses]:
  """The first rows of each shard's queue in its slots; no token sampled yet.

  Args:
    num_slots: of a shard.
    width: columns of the ring.
  """
  config, shards = policy.config, queue.counts.shape[0]
  B, N, T = num_slots * shards, queue.limits.shape[0], params.max_new_tokens
  first = jnp.tile(jnp.arange(num_slots, dtype=jnp.int32), shards)
  row_B = jnp.where(first < jnp.repeat(queue.counts, num_slots), first, -1)

  def empty(shape, dtype):
    return on_mesh(policy, jnp.zeros(shape, dtype))

  ring = (config.num_layers, B, config.num_kv_heads, width, config.head_dim)
  ring = jnp.zeros(ring, prompts.keys.dtype)
  slots = Slots(
    step=jnp.int32(0),
    row=on_mesh(policy, row_B),
    length=empty((B,), jnp.int32),
    hidden=take(prompts.hidden, prompt_of(row_B, params), shards),
    keys=on_mesh(policy, ring, cache=True),
    values=on_mesh(policy, ring, cache=True),
    recent=empty((B, max(map(len, params.stop), default=0)), jnp.int32) - 1,
    next_row=on_mesh(policy, jnp.minimum(num_slots, queue.counts)),
  )
  responses = Responses(
    tokens=empty((N, T), jnp.int32),
    logprobs=empty((N, T), jnp.float32),
    sampling_logprobs=None if params.is_policy else empty((N, T), jnp.float32),
    lengths=empty((N,), jnp.int32),
    finished=empty((N,), bool),
  )
  return slots, responses

"""Log-prob, entropy and logit energy per token, without all logits at once.

The logits of a long batch, `[tokens, V]`, are the largest array of the whole update
and nothing needs them together. Here a block of token positions is projected,
reduced to three numbers a token, and forgotten; the backward pass projects it again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Logits alive at a time. 2^25 float32 are 128 MiB, enough rows for a full matmul.
BLOCK_LOGITS = 2**25


class TokenStats(NamedTuple):
  """Per token, float32: of the distribution `softmax(z / temperature)`.

  Attributes:
    logprob: log pi(target).
    entropy: -sum_v pi(v) log pi(v), in nats.
    energy: ||onehot(target) - pi||^2 = 1 - 2 pi(target) + sum_v pi(v)^2, the squared
      norm of the gradient with respect to the (scaled) logits.
  """

  logprob: jax.Array
  entropy: jax.Array
  energy: jax.Array


def linear_logprobs(
  hidden: jax.Array,
  unembedding: jax.Array,
  targets: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  block_logits: int = BLOCK_LOGITS,
) -> TokenStats:
  """Statistics of the targets under `softmax(hidden @ unembedding.T / temperature)`.

  Args:
    hidden: [..., T, D], any float dtype.
    unembedding: [V, D].
    targets: [..., T] integers in `[0, V)`.
    temperature: the sampler's, above 0: it is part of the distribution.
    block_logits: how many logits may live at a time. Blocks run over T alone, so that
      leading axes stay sharded as they are.

  Returns:
    TokenStats of arrays [..., T], float32.

  Raises:
    ValueError: shapes that do not fit.
  """
  if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != unembedding.shape[-1]:
    raise ValueError(
      "Expected hidden[..., T, D], unembedding[V, D], targets[..., T], got"
      f" {hidden.shape}, {unembedding.shape}, {targets.shape}."
    )
  num_tokens = targets.shape[-1]
  rows = targets.size // max(num_tokens, 1)
  block = max(1, min(num_tokens, block_logits // max(rows * unembedding.shape[0], 1)))
  if block >= num_tokens:
    return _token_stats(hidden, unembedding, targets, temperature)

  @jax.checkpoint
  def stats_of_block(block_inputs):
    hidden, targets = block_inputs
    return _token_stats(hidden, unembedding, targets, temperature)

  blocks = -(-num_tokens // block)
  padding = blocks * block - num_tokens

  def split(array, axis):
    pad = [(0, 0)] * array.ndim
    pad[axis] = (0, padding)
    shape = (*array.shape[:axis], blocks, block, *array.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(array, pad).reshape(shape), axis, 0)

  axis = targets.ndim - 1
  stats = jax.lax.map(stats_of_block, (split(hidden, axis), split(targets, axis)))

  def join(array):
    array = jnp.moveaxis(array, 0, axis)
    return array.reshape(*targets.shape[:-1], blocks * block)[..., :num_tokens]

  return jax.tree.map(join, stats)


def _token_stats(hidden, unembedding, targets, temperature):
  # float32 means float32: accelerators would otherwise round the factors.
  precision = "highest" if hidden.dtype == jnp.float32 else None
  logits = jnp.einsum(
    "...d,vd->...v",
    hidden,
    unembedding,
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  logprobs = jax.nn.log_softmax(logits / temperature, axis=-1)
  probs = jnp.exp(logprobs)
  logprob = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
  return TokenStats(
    logprob=logprob,
    entropy=-jnp.sum(probs * logprobs, axis=-1),
    energy=1.0 - 2.0 * jnp.exp(logprob) + jnp.sum(probs**2, axis=-1),
  )

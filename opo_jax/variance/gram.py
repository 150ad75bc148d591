"""Per-response gradients and their Gram matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opo_jax import learner
from opo_jax.rollouts import Rollouts, rows, select


def row_gradients(
  policy: Any, rollouts: Rollouts, coefficients: jax.Array
) -> tuple[Any, jax.Array]:
  """The gradient `grad sum_t c_t log pi(y_t)` of each row: its score where c = 1.

  Args:
    policy: without a mesh; with one, each single row would be padded to fill it.
    rollouts: N rows.
    coefficients: [N, T]; not read where the mask is False.

  Returns:
    A tree like the policy with arrays [N, ...], and the logit energy [N, T] of tokens.
  """

  def objective(policy, row, tokens, mask, coefficients):
    one = jax.tree.map(lambda x: x[None], row)
    stats = learner.token_stats(policy, one, tokens[None], rollouts.temperature)
    weighted = jnp.where(mask, coefficients * stats.logprob[0], 0.0).sum()
    return weighted, jnp.where(mask, stats.energy[0], 0.0)

  return jax.vmap(jax.grad(objective, has_aux=True), (None, 0, 0, 0, 0))(
    policy, rows(rollouts), rollouts.tokens, rollouts.mask, coefficients
  )


def gram_matrices(
  policy: Any,
  rollouts: Rollouts,
  coefficients: jax.Array | None = None,
  *,
  chunk: int,
  memory_gib: float = 4.0,
) -> tuple[np.ndarray, np.ndarray]:
  """Inner products of the gradients of each prompt's responses.

  At most two chunks of gradients are in memory. Where a prompt has more responses than
  a chunk, Q is computed block by block, on and below the diagonal, and the second chunk
  of a block is differentiated again:

           b0 b1 b2
      a0    x             x: computed, with chunks a and b in memory
      a1    x  x          above the diagonal: the transpose
      a2    x  x  x

  Args:
    policy: an NNX policy; not modified.
    rollouts: G prompts with M consecutive rows each.
    coefficients: [N, T] of `row_gradients`; ones, that is the scores, where it is None.
    chunk: gradients computed together.
    memory_gib: the limit of their memory.

  Returns:
    Q [G, M, M] and the logit energy [G, M, T] of tokens, float32.

  Raises:
    ValueError: gradients that exceed the limit, with the chunk that would fit.
  """
  num_rows, num_tokens = rollouts.tokens.shape
  G, M = rollouts.num_groups, num_rows // rollouts.num_groups
  chunk = min(chunk, M)
  _check_memory(policy, chunk, 1 if chunk == M else 2, memory_gib)
  policy = jax.tree.map(lambda x: x, policy)  # a new module over the same arrays
  policy.mesh = None
  if coefficients is None:
    coefficients = jnp.ones(rollouts.tokens.shape)
  gram = np.zeros((G, M, M), np.float32)
  energy = np.zeros((G, M, num_tokens), np.float32)
  starts = range(0, M, chunk)

  def gradients_of(group, start):
    # The last row is repeated, so that all chunks have one shape and compile once.
    index = group * M + np.minimum(np.arange(start, start + chunk), M - 1)
    return _gradients(policy, rollouts, coefficients, index)

  for group in range(G):
    for a in starts:
      first = second = None  # frees them before the next gradients
      first, energies = gradients_of(group, a)
      energy[group, a : a + chunk] = np.asarray(energies)[: M - a]
      for b in starts[: a // chunk + 1]:
        second = None
        second = first if a == b else gradients_of(group, b)[0]
        block = np.asarray(_inner_products(first, second))[: M - a, : M - b]
        gram[group, a : a + chunk, b : b + chunk] = block
        gram[group, b : b + chunk, a : a + chunk] = block.T
  return gram, energy


@jax.jit
def _gradients(policy, rollouts, coefficients, index):
  return row_gradients(policy, select(rollouts, index), coefficients[index])


@jax.jit
def _inner_products(a, b):
  def of_leaf(x, y):
    x, y = x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1)
    return jnp.matmul(x, y.T, precision="highest")

  return sum(jax.tree.leaves(jax.tree.map(of_leaf, a, b)))


def _check_memory(policy, chunk, chunks, memory_gib):
  size = sum(leaf.size for leaf in jax.tree.leaves(policy))
  one_gib = 4 * size / 2**30
  if chunks * chunk * one_gib > memory_gib:
    fits = int(memory_gib / (2 * one_gib))
    do = f"use --chunk {fits}" if fits else "measure a smaller policy"
    raise ValueError(
      f"{chunks} x {chunk} gradients of {size:,} parameters take"
      f" {chunks * chunk * one_gib:.1f} GiB, more than {memory_gib:g}; {do}, or allow"
      " more (--memory-gib)."
    )

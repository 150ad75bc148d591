"""Computes log-prob, entropy and logit energy per token without storing all logits.

The logits of a long batch, `[tokens, V]`, would be the largest array of the update, and
no result needs all of them. The vocabulary is processed in blocks: each block is
projected and reduced to five sums per token; the sums of all blocks are combined like
log-sum-exps. The backward pass projects each block again.

The vocabulary is blocked, not the tokens: a block of words then gets its whole gradient
from one matmul, so that no array of size [V, D] is read and written per block, and over
a sharded batch the gradient of each word crosses devices once.

A vocabulary of 10 in Z = 2 shards, with 2 blocks of Y = 3 words each. Blocks are laid
out from the end of the shard, so that the first one may overlap the second:

    shard             0              1
    ids           0 1 2 3 4      5 6 7 8 9
    block 0       x x o          x x o            o: projected, but not counted:
    block 1           x x x          x x x           block 1 counts these words
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Logits in memory at a time (2^25 float32 take 128 MiB), and the fewest words of a
# block that still make a large matmul.
BLOCK_LOGITS, MIN_BLOCK = 2**25, 2048
# Larger blocks are whole tiles of the matmul units.
TILE = 128
# The logit of a word that is not counted: its exp is 0, and 0 * -1e9 is 0, where
# 0 * -inf would be NaN.
ABSENT = -1e9


class TokenStats(NamedTuple):
  """Statistics per token, float32, of the distribution `pi = softmax(z / temperature)`.

  Attributes:
    logprob: log pi(target).
    entropy: -sum_v pi(v) log pi(v), in nats.
    energy: ||onehot(target) - pi||^2 = (1 - pi(target))^2 + sum over the other words
      of pi(v)^2, the squared norm of the gradient with respect to the (scaled) logits.
      Exact for confident tokens too, where 1 - 2 pi(target) + sum pi^2 would cancel.
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
  vocab_size: int | None = None,
  vocab_shards: int = 1,
  block_size: int | None = None,
) -> TokenStats:
  """Statistics of the targets under `softmax(hidden @ unembedding.T / temperature)`.

  With z the scaled logits, pi their softmax and y the target, the gradients are

      d logprob / dz_v = [v = y] - pi_v
      d entropy / dz_v = -pi_v (log pi_v + entropy)
      d energy  / dz_v = 2 pi_v (pi_v - sum pi^2) - 2 pi_y ([v = y] - pi_v)

  exact for hidden, unembedding and temperature. Reverse mode (`jax.grad`, `jax.vjp`)
  works under `jit`, `vmap`, `scan` and `checkpoint`; forward mode (`jax.jvp`), and with
  it a second derivative, is not supported.

  Factors in bfloat16 or float16 are multiplied as such and summed in float32, in the
  backward pass as well, where the gradient of the logits is a factor. All else is
  float32, and float32 factors are multiplied at the highest precision.

  Args:
    hidden: [..., D], any float dtype.
    unembedding: [V, D], any float dtype. A tied table is passed here as well: its two
      gradients add up.
    targets: [...] integers in `[0, vocab_size)`. Another one makes its log-prob and
      energy NaN; a loss that masks such tokens with `where` has finite gradients.
    temperature: the sampler's, a number or scalar above 0: part of the distribution.
    vocab_size: rows of the unembedding from this one on are padding, without
      probability or gradient. None: no padding.
    vocab_shards: number of shards Z of the rows of the unembedding, the mesh's size
      along `tensor`. Blocks are cut within each shard, so that no device needs the rows
      of another. Only the time depends on it.
    block_size: words of each shard that are projected at a time. The default is 2^25
      logits, but at least 2,048 words over all shards. Only time and memory depend on
      it.

  Returns:
    TokenStats of arrays [...], float32.

  Raises:
    ValueError: mismatched shapes or dtypes, sizes out of range, and, in NumPy arrays or
      plain numbers, targets or a temperature out of range.

  >>> hidden, unembedding = jnp.ones((2, 3, 4)), jnp.zeros((10, 4))
  >>> stats = linear_logprobs(hidden, unembedding, jnp.zeros((2, 3), int))
  >>> [f"{x[0, 0]:.3f}" for x in stats]  # -log 10, log 10, 1 - 2/10 + 10/100
  ['-2.303', '2.303', '0.900']
  """
  _check(hidden, unembedding, targets, temperature, vocab_size, vocab_shards)
  if block_size is not None and block_size < 1:
    raise ValueError(f"Expected a block_size of at least 1 word, got {block_size}.")
  num_tokens, (num_words, width) = np.size(targets), np.shape(unembedding)
  shard = num_words // vocab_shards
  if block_size is None:
    words = max(MIN_BLOCK, BLOCK_LOGITS // max(num_tokens, 1)) // vocab_shards
    # Blocks of similar size: the overlap of the first two wastes less.
    blocks = -(-shard // max(words, TILE))
    block_size = -(-shard // (blocks * TILE)) * TILE
  block_size = min(block_size, shard)
  blocking = _Blocking(vocab_size or num_words, block_size, -(-shard // block_size))
  dtype = jnp.result_type(hidden, unembedding)
  dtype = dtype if dtype.itemsize == 2 else jnp.float32
  stats = _token_stats(
    blocking,
    jnp.reshape(hidden, (num_tokens, width)).astype(dtype),
    jnp.reshape(unembedding, (vocab_shards, shard, width)).astype(dtype),
    jnp.reshape(targets, num_tokens),
    jnp.asarray(temperature, jnp.float32),
  )
  return jax.tree.map(lambda x: x.reshape(np.shape(targets)), stats)


def _check(hidden, unembedding, targets, temperature, vocab_size, vocab_shards):
  shapes = np.shape(hidden), np.shape(unembedding), np.shape(targets)
  fits = len(shapes[1]) == 2 and shapes[0] == (*shapes[2], shapes[1][1])
  if not fits or not shapes[1][0]:
    raise ValueError(
      "Expected hidden[..., D], unembedding[V, D], targets[...], got"
      f" {shapes[0]}, {shapes[1]}, {shapes[2]}."
    )
  dtypes = [jnp.result_type(x) for x in (hidden, unembedding, targets)]
  kinds = jnp.floating, jnp.floating, jnp.integer
  if not all(map(jnp.issubdtype, dtypes, kinds)):
    raise ValueError(
      "Expected hidden and unembedding of a float dtype and integer targets, got"
      f" {dtypes[0]}, {dtypes[1]}, {dtypes[2]}."
    )
  num_words = shapes[1][0]
  if vocab_size is not None and not 0 < vocab_size <= num_words:
    raise ValueError(
      f"Expected a vocab_size of 1 to {num_words}, the rows of the unembedding"
      f" {shapes[1]}, got {vocab_size}."
    )
  if vocab_shards < 1 or num_words % vocab_shards:
    raise ValueError(
      f"The unembedding {shapes[1]} does not divide into vocab_shards={vocab_shards};"
      " use the size of the mesh axis its rows lie on."
    )
  if isinstance(targets, np.ndarray) and targets.size:
    lowest, highest = targets.min(), targets.max()
    if lowest < 0 or highest >= (vocab_size or num_words):
      raise ValueError(
        f"Expected targets {shapes[2]} in [0, {vocab_size or num_words}), got"
        f" {lowest} to {highest}."
      )
  plain = isinstance(temperature, (int, float, np.number))
  if np.shape(temperature) or (plain and not temperature > 0):
    got = temperature if plain else f"an array of shape {np.shape(temperature)}"
    raise ValueError(f"Expected a scalar temperature above 0, got {got}.")


class _Blocking(NamedTuple):
  vocab_size: int
  block_size: int
  num_blocks: int  # of each shard


class _Sums(NamedTuple):
  """Sums over a set of words of their scaled logits z, each [..., tokens].

  Everything is relative to the largest logit, so that nothing overflows.
  """

  top: jax.Array  # max z
  mass: jax.Array  # sum exp(z - top)
  moment: jax.Array  # sum (z - top) exp(z - top)
  square: jax.Array  # sum exp(2 (z - top)) over the words other than the target
  target: jax.Array  # z of the target, 0 if it is not in the set


def _union(sums: _Sums) -> _Sums:
  """Combines sums [shards, blocks, tokens] into those over all words, [tokens].

  With shift = top_b - top of block b:

      mass    exp(shift) mass_b
      moment  exp(shift) (moment_b + shift mass_b), since z - top = z - top_b + shift
      square  exp(shift)^2 square_b
  """
  axes = (0, 1)
  top = sums.top.max(axes)
  shift = sums.top - top
  scale = jnp.exp(shift)
  return _Sums(
    top,
    mass=(scale * sums.mass).sum(axes),
    moment=(scale * (sums.moment + shift * sums.mass)).sum(axes),
    square=(scale**2 * sums.square).sum(axes),
    target=sums.target.sum(axes),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_stats(blocking, hidden_TD, table_ZVD, targets_T, temperature):
  """`linear_logprobs` of one row of tokens, with the unembedding in Z shards."""
  return _forward(blocking, hidden_TD, table_ZVD, targets_T, temperature)[0]


def _forward(blocking, hidden_TD, table_ZVD, targets_T, temperature):
  def sums_of_shard(table_VD, first_id):
    def sums_of_block(index):
      block = _block(blocking, table_VD, first_id, targets_T, index)
      logits_TY = _logits(hidden_TD, block, temperature)
      top_T = logits_TY.max(1)
      shifted_TY = logits_TY - top_T[:, None]
      mass_TY = jnp.exp(shifted_TY)
      # Without the target, whose square would hide the others': see TokenStats.energy.
      others_TY = jnp.where(block.is_target_TY, 0.0, mass_TY)
      return _Sums(
        top_T,
        mass=mass_TY.sum(1),
        moment=(shifted_TY * mass_TY).sum(1),
        square=(others_TY * others_TY).sum(1),
        target=jnp.where(block.is_target_TY, logits_TY, 0.0).sum(1),
      )

    return jax.lax.map(sums_of_block, jnp.arange(blocking.num_blocks))

  # A block of padding only has top ABSENT and a mass of exp(0) per word; `_union`
  # scales it by exp(ABSENT - top) = 0.
  sums = _union(_per_shard(sums_of_shard, table_ZVD))
  log_mass = jnp.log(sums.mass)
  known = (targets_T >= 0) & (targets_T < blocking.vocab_size)
  # Not target - (top + log_mass): that sum rounds to the ulp of the largest logit.
  logprob = jnp.where(known, (sums.target - sums.top) - log_mass, jnp.nan)
  # others: sum of pi^2 over the words other than the target. 1 - pi(target), as -expm1,
  # keeps its digits where pi(target) is near 1.
  others = sums.square / sums.mass**2
  energy = jnp.expm1(logprob) ** 2 + others
  stats = TokenStats(logprob, log_mass - sums.moment / sums.mass, energy)
  kept = sums.top, log_mass, others, stats
  return stats, (hidden_TD, table_ZVD, targets_T, temperature, kept)


def _backward(blocking, residuals, cotangents):
  hidden_TD, table_ZVD, targets_T, temperature, kept = residuals
  top, log_mass, others, stats = kept
  by_logprob, by_entropy, by_energy = cotangents
  # The gradient with respect to the logits sums the three of `linear_logprobs`:
  #     [v = y] at_target - pi_v (everywhere + by_entropy log pi_v - 2 by_energy pi_v)
  # A target out of range has log-prob NaN; its pi_y counts as 0.
  target_prob = jnp.nan_to_num(jnp.exp(stats.logprob))
  collision = others + target_prob**2
  at_target = by_logprob - 2.0 * by_energy * target_prob
  everywhere = at_target + by_entropy * stats.entropy + 2.0 * by_energy * collision

  def grads_of_shard(table_VD, first_id):
    def grads_of_block(grads, index):
      hidden_grad_TD, table_grad_VD = grads
      block = _block(blocking, table_VD, first_id, targets_T, index)
      logits_TY = _logits(hidden_TD, block, temperature)
      logprobs_TY = (logits_TY - top[:, None]) - log_mass[:, None]
      probs_TY = jnp.exp(logprobs_TY)
      logits_grad_TY = jnp.where(block.is_target_TY, at_target[:, None], 0.0)
      logits_grad_TY -= probs_TY * (
        everywhere[:, None]
        + by_entropy[:, None] * logprobs_TY
        - (2.0 * by_energy)[:, None] * probs_TY
      )
      factor_TY = (logits_grad_TY / temperature).astype(hidden_TD.dtype)
      # The hidden gradient sums over all blocks; the table's is complete per block.
      hidden_grad_TD += _product("tw,wd->td", factor_TY, block.words_YD)
      words_grad_YD = _product("wt,td->wd", _transpose(factor_TY), hidden_TD)
      # Where the first two blocks overlap, the second one counts those words and, being
      # later, overwrites the zeros of the first.
      table_grad_VD = jax.lax.dynamic_update_slice_in_dim(
        table_grad_VD, words_grad_YD.astype(table_VD.dtype), block.start, 0
      )
      return (hidden_grad_TD, table_grad_VD), None

    zeros = jnp.zeros(hidden_TD.shape, jnp.float32), jnp.zeros_like(table_VD)
    return jax.lax.scan(grads_of_block, zeros, jnp.arange(blocking.num_blocks))[0]

  hidden_grad_ZTD, table_grad_ZVD = _per_shard(grads_of_shard, table_ZVD)
  hidden_grad_TD = hidden_grad_ZTD.sum(0)
  # hidden h and temperature t occur only as h / t, so that t df/dt = -<h, df/dh>.
  by_temperature = -jnp.vdot(hidden_grad_TD, hidden_TD.astype(jnp.float32))
  by_temperature /= temperature
  return hidden_grad_TD.astype(hidden_TD.dtype), table_grad_ZVD, None, by_temperature


_token_stats.defvjp(_forward, _backward)


def _per_shard(function: Callable[[jax.Array, Any], Any], table_ZVD):
  """Maps `function(table [V / Z, D], id of its first word)` over shards, stacked."""
  num_shards, shard, _ = table_ZVD.shape
  if num_shards == 1:  # with a leading axis of 1, XLA:CPU runs its loops on one core
    return jax.tree.map(lambda x: x[None], function(table_ZVD[0], 0))
  return jax.vmap(function)(table_ZVD, shard * jnp.arange(num_shards))


class _Block(NamedTuple):
  start: jax.Array  # its first row in the shard
  words_YD: jax.Array
  counts_Y: jax.Array  # neither padding nor counted by the next block
  is_target_TY: jax.Array


def _block(blocking, table_VD, first_id, targets_T, index):
  """Cuts block `index` out of a shard; see the drawing at the top of the module.

  Blocks are laid out backwards from the end of the shard. Block 0 would start below row
  0 where the size does not divide the shard; it starts at 0 and overlaps block 1.
  """
  size = blocking.block_size
  end = table_VD.shape[0] - (blocking.num_blocks - 1 - index) * size
  start = jnp.maximum(end - size, 0)
  row_Y = start + jnp.arange(size)
  counts_Y = (row_Y < end) & (first_id + row_Y < blocking.vocab_size)
  is_target_TY = counts_Y & (first_id + row_Y == targets_T[:, None])
  return _Block(start, _rows(table_VD, start, size), counts_Y, is_target_TY)


def _logits(hidden_TD, block, temperature):
  logits_TY = _product("td,wd->tw", hidden_TD, block.words_YD)
  return jnp.where(block.counts_Y, logits_TY / temperature, ABSENT)


def _product(subscripts, left, right):
  # Accelerators would round float32 factors at the default precision.
  return jnp.einsum(
    subscripts,
    left,
    right,
    precision="highest" if left.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


def _rows(table_VD, start, size):
  def plain(table_VD, start):
    return jax.lax.dynamic_slice_in_dim(table_VD, start, size)

  def as_bits(table_VD, start):
    # XLA:CPU would convert the whole table to float32 to slice 16-bit floats.
    table_VD, start = jax.lax.optimization_barrier((table_VD, start))
    bits = jax.lax.bitcast_convert_type(table_VD, jnp.uint16)
    return jax.lax.bitcast_convert_type(plain(bits, start), table_VD.dtype)

  if table_VD.dtype == jnp.float32:
    return plain(table_VD, start)
  return jax.lax.platform_dependent(table_VD, start, cpu=as_bits, default=plain)


def _transpose(x):
  def written(x):
    # XLA:CPU multiplies a transposed 16-bit factor in float32, at half the speed. The
    # extra axis hides the transpose from the compiler.
    return jax.lax.optimization_barrier(x[None].transpose(0, 2, 1))[0]

  if x.dtype == jnp.float32:
    return x.T
  return jax.lax.platform_dependent(x, cpu=written, default=jnp.transpose)

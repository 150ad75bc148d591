"""From logits to a token: temperature, filters, and the random choice.

Every token comes with two log-probs. `logprob` is the policy's at the temperature; the
learner recomputes it. `sampling_logprob` is that of the distribution that was sampled
from, after the filters. On-policy they are the same.
"""

import math

import jax
import jax.numpy as jnp

from opo_jax.sampler.params import SamplingParams

# A tensor axis of up to this size splits the vocabulary between blocks of tokens, never
# inside one (`_sample_in_blocks`).
_MAX_TENSOR = 16


def sample_token(
  logits_BV: jax.Array, keys_B: jax.Array, params: SamplingParams
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Samples one token for each row.

  Args:
    logits_BV: float32.
    keys_B: a random key for each row.
    params: temperature and filters.

  Returns:
    token [B] int32; its log-prob [B] under the policy at the temperature (at 1 where
    greedy); its log-prob [B] under the distribution that was sampled from: None where
    that is the policy, 0 where greedy, since the choice is certain.
  """
  scaled_BV = logits_BV if params.is_greedy else logits_BV / params.temperature
  scaled_BV -= scaled_BV.max(-1, keepdims=True)
  weights_BV = jnp.exp(scaled_BV)
  kept_BV = weights_BV
  if params.is_filtered:
    kept_BV = jnp.where(filter_logits(scaled_BV, params), weights_BV, 0.0)
  if params.is_greedy:
    token_B = scaled_BV.argmax(-1).astype(jnp.int32)
  else:
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    token_B = _sample_in_blocks(kept_BV, uniform_B2)
  scaled_B = jnp.take_along_axis(scaled_BV, token_B[:, None], axis=1)[:, 0]
  logprob_B = scaled_B - jnp.log(weights_BV.sum(-1))
  if params.is_policy:
    return token_B, logprob_B, None
  if params.is_greedy:
    return token_B, logprob_B, jnp.zeros_like(logprob_B)
  return token_B, logprob_B, scaled_B - jnp.log(kept_BV.sum(-1))


def filter_logits(scaled_BV: jax.Array, params: SamplingParams) -> jax.Array:
  """The tokens that top-k, then top-p, then min-p keep: [B, V] bool.

  Args:
    scaled_BV: logits over temperature, up to a constant in each row.
    params: the filters.
  """
  # All three keep a prefix of the sorted row, so one sort and one threshold decide. The
  # threshold is one of the values it is compared with: no token is lost to rounding.
  sorted_BV = jnp.sort(scaled_BV, axis=-1, descending=True)
  V = sorted_BV.shape[1]
  top_k = jnp.where(params.top_k > 0, params.top_k, V)
  kept_BV = jnp.arange(V) < top_k
  # A token is kept while the mass before it is below top_p: the first always is. At
  # top_p = 1 rounding could push the mass before the last tokens to 1.
  probs_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf))
  before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
  kept_BV &= (before_BV < params.top_p) | (params.top_p >= 1.0)
  kept_BV &= sorted_BV >= sorted_BV[:, :1] + jnp.log(params.min_p)
  threshold_B1 = jnp.where(kept_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
  return scaled_BV >= threshold_B1


def _sample_in_blocks(weights_BV, uniform_B2):
  """Samples a token with probability proportional to its weight.

  Inverts the cumulative distribution twice: over the sums of blocks of tokens, then
  inside the block chosen.

      weights      1 0 2 | 0 3 1 | 2 1 _      blocks of 3, the last one padded
      block sums     3       4       3        first uniform number 0.5: 5 of 10, block 1
      inside                0 3 1             second one 0.8: 3.2 of 4, its token 2
      token          1 * 3 + 2 = 5

  This takes two uniform numbers a row, where Gumbel noise takes one for every token of
  the vocabulary. A block's probability is exact to 2^-23 of the total, a token's inside
  its block to 2^-23 of the block's.

  Args:
    weights_BV: at least one positive in each row.
    uniform_B2: in [0, 1).
  """
  B, V = weights_BV.shape
  size = _block_size(V)
  blocks = jnp.pad(weights_BV, ((0, 0), (0, -V % size))).reshape(B, -1, size)
  block_B = _invert_cdf(blocks.sum(-1), uniform_B2[:, 0])
  inside = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
  token_B = block_B * size + _invert_cdf(inside, uniform_B2[:, 1])
  return jnp.minimum(token_B, V - 1)  # NaN weights would choose the padding


def _block_size(vocab_size: int) -> int:
  """Tokens of a block, near the root of the vocabulary: 64 of 4,096, 1,187 of Qwen2's
  151,936. It depends on nothing else, since rollouts must not depend on the mesh."""
  root = math.isqrt(vocab_size)
  if vocab_size % _MAX_TENSOR:
    return root
  shard = vocab_size // _MAX_TENSOR
  divisors = (n for n in range(1, shard + 1) if shard % n == 0)
  return min(divisors, key=lambda n: abs(math.log(n / root)))


def _invert_cdf(weights, uniform_B):
  """The first index whose cumulative weight exceeds the uniform share of the total.

  Args:
    weights: [B, n].
    uniform_B: in [0, 1).
  """
  positive = weights > 0
  cumulative = jnp.cumsum(weights, axis=-1)
  share_B1 = uniform_B[:, None] * cumulative[:, -1:]
  # Rounding must never choose an index of weight 0. Where it leaves no cumulative
  # weight above the share, take the last index with a positive weight.
  above = (cumulative > share_B1) & positive
  last_B = positive.shape[1] - 1 - positive[:, ::-1].argmax(-1)
  index_B = jnp.where(above.any(-1), above.argmax(-1), last_B)
  return index_B.astype(jnp.int32)

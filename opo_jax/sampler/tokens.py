"""From logits to a token: temperature, filters, and the draw itself.

Two log-probs come with every token. `logprob` is the policy's at the temperature, which
the learner computes again; `sampling_logprob` is that of the distribution the token was
drawn from, after the filters. On-policy they are the same.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

# Blocks of tokens, see `_invert_twice`, do not cross devices when so many share a row.
_MAX_TENSOR = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSampling:
  """How logits become a distribution. New numbers compile nothing, new kinds do.

  Attributes:
    temperature: scalar, divides the logits; 1 where greedy.
    top_k, top_p, min_p: scalars, see `make`.
    greedy: take the most probable token.
    filtered: whether any of the three leaves tokens out.
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  greedy: bool = dataclasses.field(metadata={"static": True})
  filtered: bool = dataclasses.field(metadata={"static": True})

  @property
  def is_policy(self) -> bool:
    """Whether tokens are drawn from the policy itself, none left out."""
    return not (self.greedy or self.filtered)


def make(
  vocab_size: int,
  *,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
) -> TokenSampling:
  """A checked `TokenSampling`.

  Args:
    vocab_size: V.
    temperature: 0 is greedy.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: of these, keep the smallest set of most probable tokens with this mass.
    min_p: of these, keep the tokens at least this times as probable as the first.

  Raises:
    ValueError: a number out of its range.
  """
  for name, value, good, range_ in (
    ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
    ("top_k", top_k, 0 <= top_k <= vocab_size, f"0 (all) to {vocab_size}"),
    ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (all)"),
    ("min_p", min_p, 0 <= min_p <= 1, "0 (all) to 1"),
  ):
    if not good:
      raise ValueError(f"{name}={value} is out of its range, {range_}.")
  return TokenSampling(
    temperature=jnp.float32(temperature or 1.0),
    top_k=jnp.int32(top_k),
    top_p=jnp.float32(top_p),
    min_p=jnp.float32(min_p),
    greedy=temperature == 0,
    filtered=top_k > 0 or top_p < 1 or min_p > 0,
  )


def draw(
  logits_SV: jax.Array, keys_S: jax.Array, distribution: TokenSampling
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """A token for each row.

  Args:
    logits_SV: float32.
    keys_S: a random key for each row.
    distribution: what to draw from.

  Returns:
    tokens [S] int32, their log-probs [S] under the policy at the temperature (at 1
    where greedy), and under what they were drawn from (None where it is the same; 0
    where greedy: the choice is certain).
  """
  scaled_SV = logits_SV / distribution.temperature
  scaled_SV -= scaled_SV.max(-1, keepdims=True)
  weights_SV = jnp.exp(scaled_SV)
  kept_SV = weights_SV
  if distribution.filtered:
    kept_SV = jnp.where(kept(scaled_SV, distribution), weights_SV, 0.0)
  if distribution.greedy:
    token_S = scaled_SV.argmax(-1).astype(jnp.int32)
  else:
    uniform_S2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_S)
    token_S = _invert_twice(kept_SV, uniform_S2)
  scaled_S = jnp.take_along_axis(scaled_SV, token_S[:, None], axis=1)[:, 0]
  logprob_S = scaled_S - jnp.log(weights_SV.sum(-1))
  if distribution.is_policy:
    return token_S, logprob_S, None
  if distribution.greedy:
    return token_S, logprob_S, jnp.zeros_like(logprob_S)
  return token_S, logprob_S, scaled_S - jnp.log(kept_SV.sum(-1))


def _invert_twice(weights_SV, uniform_S2):
  """A token with probability proportional to its weight.

  The inverse of the cumulative distribution, taken twice: once over blocks of tokens
  and once inside the block drawn. That takes two uniform numbers, where Gumbel noise
  takes one for every word of the vocabulary. A block's probability is right to 2^-23 of
  the total, a token's inside of it to 2^-23 of the block's.

  Args:
    weights_SV: at least one positive in each row.
    uniform_S2: in [0, 1).
  """
  S, V = weights_SV.shape
  size = _block_size(V)
  weights = jnp.pad(weights_SV, ((0, 0), (0, -V % size))).reshape(S, -1, size)
  block_S = _invert(weights.sum(-1), uniform_S2[:, 0])
  inside = jnp.take_along_axis(weights, block_S[:, None, None], axis=1)[:, 0]
  token_S = block_S * size + _invert(inside, uniform_S2[:, 1])
  return jnp.minimum(token_S, V - 1)  # NaN logits must not name a word that is none


def _block_size(vocab_size: int) -> int:
  """Near the root of the vocabulary, and of it alone: rollouts must not depend on the
  mesh. 64 for 4,096 words, 1,187 for Qwen2's 151,936."""
  root = math.isqrt(vocab_size)
  if vocab_size % _MAX_TENSOR:
    return root
  shard = vocab_size // _MAX_TENSOR
  divisors = (n for n in range(1, shard + 1) if shard % n == 0)
  return min(divisors, key=lambda n: abs(math.log(n / root)))


def _invert(weights_SN, uniform_S):
  """The first index whose cumulative weight exceeds the uniform share of the total."""
  positive_SN = weights_SN > 0
  cumulative_SN = jnp.cumsum(weights_SN, axis=-1)
  share_S1 = uniform_S[:, None] * cumulative_SN[:, -1:]
  # Rounding must not choose what has no weight, so where it leaves nothing above the
  # share, the last index with any weight is taken.
  above_SN = (cumulative_SN > share_S1) & positive_SN
  last_S = positive_SN.shape[1] - 1 - positive_SN[:, ::-1].argmax(-1)
  index_S = jnp.where(above_SN.any(-1), above_SN.argmax(-1), last_S)
  return index_S.astype(jnp.int32)


def kept(scaled_SV: jax.Array, distribution: TokenSampling) -> jax.Array:
  """Which tokens top-k, then top-p, then min-p leave over: [S, V] bool.

  Args:
    scaled_SV: logits over temperature, up to a constant in each row.
    distribution: the filters.
  """
  # One sort and one threshold, taken from the very values it is compared with.
  sorted_SV = jnp.sort(scaled_SV, axis=-1, descending=True)
  V = sorted_SV.shape[1]
  top_k = jnp.where(distribution.top_k > 0, distribution.top_k, V)
  kept_SV = jnp.arange(V) < top_k
  # A token is kept while the mass before it is below top_p: the first always is.
  probs_SV = jax.nn.softmax(jnp.where(kept_SV, sorted_SV, -jnp.inf))
  before_SV = jnp.cumsum(probs_SV, axis=-1) - probs_SV
  kept_SV &= (before_SV < distribution.top_p) | (distribution.top_p >= 1.0)
  kept_SV &= sorted_SV >= sorted_SV[:, :1] + jnp.log(distribution.min_p)
  threshold_S1 = jnp.where(kept_SV, sorted_SV, jnp.inf).min(-1, keepdims=True)
  return scaled_SV >= threshold_S1

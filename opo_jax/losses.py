"""Losses: log-probs, advantages and a mask become one scalar.

`mask[N, T]` marks the trainable tokens: the end token is one of them, prompt, padding
and tool tokens are not. Advantages are `[N]` or `[N, T]` and never get a gradient.
Losses are to be minimised. Arithmetic is float32.

The denominator of a loss belongs to the *step*, not to the micro-batch. When a step is
split, take `step_normalizer(mask, how)` once over all of it and pass it to every part:
the parts then add up to the loss of the whole, however it was split.
"""

import jax
import jax.numpy as jnp

AGGREGATIONS = (
  "token_mean",
  "sequence_mean_token_sum",
  "sequence_mean_token_mean",
  "constant",
)


def step_normalizer(mask: jax.Array, how: str) -> jax.Array:
  """What `aggregate` divides by: trainable tokens, or rows that have any.

  Args:
    mask: [N, T] bool of the whole optimiser step, over all micro-batches and hosts.
    how: `token_mean` counts tokens; `sequence_mean_*` count rows with a token.

  Returns:
    float32 scalar, at least 1.
  """
  if how == "constant":
    raise ValueError("aggregation 'constant' has no normalizer of its own; pass one.")
  _check_aggregation(how)
  mask = jnp.asarray(mask, bool)
  counted = mask if how == "token_mean" else mask.any(-1)
  return jnp.maximum(counted.sum(dtype=jnp.float32), 1.0)


def aggregate(
  values: jax.Array, mask: jax.Array, how: str, *, normalizer: float | None = None
) -> jax.Array:
  """One scalar from per-token values.

      token_mean                sum of all tokens / number of tokens
      sequence_mean_token_sum   mean over rows of the row's sum
      sequence_mean_token_mean  mean over rows of the row's mean (original GRPO)
      constant                  sum of all tokens / normalizer      (Dr. GRPO)

  Args:
    values: [N, T]. What stands where `mask` is False is not read, NaN included.
    mask: [N, T] bool.
    how: one of `AGGREGATIONS`.
    normalizer: the denominator, where these rows are only a part of the step.

  Returns:
    float32 scalar; 0 where the mask is empty.

  >>> import jax.numpy as jnp
  >>> values = jnp.array([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]])
  >>> mask = jnp.array([[True, True, True], [True, False, False]])
  >>> float(aggregate(values, mask, "token_mean"))
  3.0
  >>> float(aggregate(values, mask, "sequence_mean_token_mean"))
  4.0
  """
  _check_aggregation(how)
  if jnp.shape(values) != jnp.shape(mask):
    raise ValueError(
      f"Expected values and mask of one shape [N, T], got {jnp.shape(values)} and"
      f" {jnp.shape(mask)}."
    )
  mask = jnp.asarray(mask, bool)
  values = jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0)
  if how == "sequence_mean_token_mean":
    values = values / jnp.maximum(mask.sum(-1, keepdims=True), 1)
  if normalizer is None:
    normalizer = step_normalizer(mask, how)
  return values.sum() / normalizer


def policy_gradient(
  logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  aggregation: str = "token_mean",
  normalizer: float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """REINFORCE: the loss whose gradient is `-A grad log pi`.

      loss = aggregate(-A_i log pi(y_t))

  The objective of OPO: on-policy, the ratio to the sampling policy is 1 and any
  clipped objective has this gradient.

  Args:
    logprobs: [N, T] of the policy being trained.
    advantages: [N] or [N, T], taken as constants.
    mask: [N, T] bool, trainable tokens.
    aggregation: one of `AGGREGATIONS`.
    normalizer: see `aggregate`.

  Returns:
    float32 scalar, and an empty dict.
  """
  # Masked before the product: the gradient behind the mask would be 0 * NaN.
  advantages = jnp.where(jnp.asarray(mask, bool), _per_token(advantages, logprobs), 0.0)
  loss = aggregate(-advantages * logprobs, mask, aggregation, normalizer=normalizer)
  return loss, {}


def ppo_clip(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  aggregation: str = "token_mean",
  normalizer: float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """PPO's clipped surrogate, https://arxiv.org/abs/1707.06347, equation 7.

      rho  = exp(log pi - log pi_old)
      loss = aggregate(-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A))

  DAPO (https://arxiv.org/abs/2503.14476) is `clip_low=0.2, clip_high=0.28`.

  Args:
    logprobs: [N, T] of the policy being trained.
    old_logprobs: [N, T] of the policy that sampled, taken as constants.
    advantages: [N] or [N, T], taken as constants.
    mask: [N, T] bool, trainable tokens.
    clip_low, clip_high: how far the ratio may move below and above 1.
    aggregation: one of `AGGREGATIONS`.
    normalizer: see `aggregate`.

  Returns:
    float32 scalar, and `{"ratio": [N, T], "clipped": [N, T] bool}`: `clipped` marks
    the trainable tokens whose gradient the clip cut off.
  """
  advantages = _per_token(advantages, logprobs)
  ratio = importance_ratio(logprobs, old_logprobs, mask)
  bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
  surrogate = jnp.minimum(ratio * advantages, bounded * advantages)
  loss = aggregate(-surrogate, mask, aggregation, normalizer=normalizer)
  clipped = jnp.asarray(mask, bool) & (bounded * advantages < ratio * advantages)
  return loss, {"ratio": ratio, "clipped": clipped}


def importance_ratio(
  logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array
) -> jax.Array:
  """`pi / pi_old` per token, [N, T] float32; 1 where `mask` is False."""
  difference = jnp.asarray(logprobs, jnp.float32) - jax.lax.stop_gradient(
    jnp.asarray(old_logprobs, jnp.float32)
  )
  return jnp.exp(jnp.where(jnp.asarray(mask, bool), difference, 0.0))


def kl(
  logprobs: jax.Array,
  reference_logprobs: jax.Array,
  mask: jax.Array,
  *,
  estimator: str = "k3",
) -> jax.Array:
  """Estimates of KL(pi || reference) per token, from tokens that pi sampled.

      k1 = log pi - log ref        k2 = k1^2 / 2        k3 = exp(-k1) - 1 + k1

  k1 and k3 are unbiased, k3 is never negative. http://joschu.net/blog/kl-approx.html

  Args:
    logprobs: [N, T] of the policy that sampled.
    reference_logprobs: [N, T].
    mask: [N, T] bool.
    estimator: `k1`, `k2` or `k3`.

  Returns:
    [N, T] float32; 0 where `mask` is False.
  """
  if estimator not in ("k1", "k2", "k3"):
    raise ValueError(f"Unknown KL estimator {estimator!r}; there are k1, k2, k3.")
  k1 = jnp.asarray(logprobs, jnp.float32) - jnp.asarray(reference_logprobs, jnp.float32)
  k1 = jnp.where(jnp.asarray(mask, bool), k1, 0.0)
  if estimator == "k1":
    return k1
  return 0.5 * k1**2 if estimator == "k2" else jnp.expm1(-k1) + k1


def _per_token(advantages, logprobs):
  """Advantages as float32 constants that broadcast over the tokens."""
  advantages = jax.lax.stop_gradient(jnp.asarray(advantages, jnp.float32))
  rows = jnp.shape(logprobs)[:1]
  if advantages.shape == rows and jnp.ndim(logprobs) == 2:
    return advantages[:, None]
  if advantages.shape == jnp.shape(logprobs):
    return advantages
  raise ValueError(
    f"Expected advantages [N] or [N, T] for log-probs {jnp.shape(logprobs)}, got"
    f" {advantages.shape}."
  )


def _check_aggregation(how):
  if how not in AGGREGATIONS:
    raise ValueError(
      f"Unknown aggregation {how!r}; there are {', '.join(AGGREGATIONS)}."
    )

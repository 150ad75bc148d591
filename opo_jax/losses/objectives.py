"""Objectives: REINFORCE and OPO, PPO's clip, GSPO and CISPO."""

import jax
import jax.numpy as jnp

from opo_jax.advantages import ESTIMATORS, Estimator
from opo_jax.losses.aggregation import (
  aggregate,
  sequence_lengths,
  sequence_sums,
  to_tokens,
)
from opo_jax.losses.checks import broadcast, check_numbers, trainable
from opo_jax.losses.ratios import importance_ratio, masked_log_ratio

Aux = dict[str, jax.Array]


def policy_gradient(
  logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  aggregation: str = "token_mean",
  normalizer: float | jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  importance_weights: jax.Array | None = None,
  entropy: jax.Array | None = None,
) -> tuple[jax.Array, Aux]:
  """REINFORCE: the loss with gradient `-A grad log pi`.

      loss = aggregate(-A_i log pi(y_t))

  The objective of OPO. On-policy, the ratio to the sampling policy is 1, and every
  clipped objective has this gradient.

  Args:
    logprobs: [N, T] of the trained policy.
    advantages: [N] or [N, T], constants.
    mask: [N, T] bool, trainable tokens.
    aggregation, normalizer, segment_ids, importance_weights, entropy: see the module.

  Returns:
    float32 scalar, and a dict with `entropy` if it was given.

  Raises:
    ValueError: mismatched shapes, an unknown aggregation.

  >>> import jax.numpy as jnp
  >>> logprobs, mask = jnp.array([[-1.0, -3.0]]), jnp.array([[True, True]])
  >>> float(policy_gradient(logprobs, jnp.array([0.5]), mask)[0])
  1.0
  """
  mask = trainable(mask, segment_ids, logprobs=logprobs, entropy=entropy)
  advantages = _per_token(advantages, importance_weights, mask)
  loss = aggregate(
    -advantages * jnp.asarray(logprobs, jnp.float32),
    mask,
    aggregation,
    normalizer=normalizer,
    segment_ids=segment_ids,
  )
  return loss, _mean_entropy(entropy, mask)


def opo_loss(
  logprobs: jax.Array,
  rewards: jax.Array,
  mask: jax.Array,
  group_ids: jax.Array,
  *,
  num_groups: int,
  estimator: str | Estimator = "opo",
  aggregation: str = "token_mean",
  normalizer: float | jax.Array | None = None,
  valid: jax.Array | None = None,
  importance_weights: jax.Array | None = None,
  entropy: jax.Array | None = None,
) -> tuple[jax.Array, Aux]:
  """OPO in one call: from log-probs and rewards to the loss.

      loss = aggregate(-(r_i - b_g) log pi(y_t))        b_g = sum l r / sum l

  Lengths are counted from the mask. The baseline is over the rows of *this call*: if
  micro-batches keep groups whole and pass the step's `normalizer`, their losses add up
  exactly. If groups are cut, or rows packed, compute the advantages of the whole step
  with `advantages.ESTIMATORS` and pass them to `policy_gradient`.

  Args:
    logprobs: [N, T] of the policy being trained, one response per row.
    rewards: [N]; may be NaN where `valid` is False.
    mask: [N, T] bool, trainable tokens.
    group_ids: [N] integers in `[0, num_groups)`: the prompt of each row.
    num_groups: G, static.
    estimator: a name in `advantages.ESTIMATORS`, or a function like them, for example
      `functools.partial(opo, alpha=0.8)`.
    valid: [N] bool; False excludes a row from baseline, loss and normaliser. Compute a
      `normalizer` of your own from `mask & valid[:, None]`.
    aggregation, normalizer, importance_weights, entropy: see the module.

  Returns:
    float32 scalar, and a dict with `advantages` [N], and `entropy` if it was given.

  Raises:
    ValueError: mismatched shapes, unknown names, and the errors of `advantages`.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> logprobs = jnp.full((2, 3), -0.5)
  >>> mask = jnp.array([[True, True, True], [True, False, False]])
  >>> rewards, groups = jnp.array([1.0, 0.0]), jnp.array([0, 0])
  >>> loss = lambda x: opo_loss(x, rewards, mask, groups, num_groups=1)[0]
  >>> jax.grad(loss)(logprobs).tolist()  # the baseline is 3/4
  [[-0.0625, -0.0625, -0.0625], [0.1875, -0.0, -0.0]]
  """
  if isinstance(estimator, str):
    estimator = ESTIMATORS[estimator]
  mask = trainable(mask, logprobs=logprobs)
  if valid is not None:
    if jnp.shape(valid) != mask.shape[:1]:
      raise ValueError(
        f"Expected valid [N] for a mask {mask.shape}, got {jnp.shape(valid)}."
      )
    mask &= jnp.asarray(valid, bool)[:, None]
  advantages = estimator(
    rewards, mask.sum(-1), group_ids, num_groups=num_groups, valid=valid
  )
  loss, aux = policy_gradient(
    logprobs,
    advantages,
    mask,
    aggregation=aggregation,
    normalizer=normalizer,
    importance_weights=importance_weights,
    entropy=entropy,
  )
  return loss, aux | {"advantages": advantages}


def ppo_clip(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  aggregation: str = "token_mean",
  normalizer: float | jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  importance_weights: jax.Array | None = None,
  entropy: jax.Array | None = None,
) -> tuple[jax.Array, Aux]:
  """PPO's clipped surrogate, https://arxiv.org/abs/1707.06347, equation 7.

      rho  = exp(log pi - log pi_old)
      loss = aggregate(-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A))

  GRPO (https://arxiv.org/abs/2402.03300) uses `sequence_mean_token_mean`. DAPO
  (https://arxiv.org/abs/2503.14476) raises the upper bound, which lets rare tokens
  grow: `clip_low=0.2, clip_high=0.28` and `token_mean`.

  Args:
    logprobs: [N, T] of the trained policy.
    old_logprobs: [N, T] of the policy before the updates, constants.
    advantages: [N] or [N, T], constants.
    mask: [N, T] bool, trainable tokens.
    clip_low, clip_high: widths of the clip range below and above 1.
    aggregation, normalizer, segment_ids, importance_weights, entropy: see the module.

  Returns:
    float32 scalar, and `ratio`, `clipped`, `clip_fraction`, `approx_kl` (and
    `entropy`): `clipped` marks the tokens whose gradient the clip zeroed.

  Raises:
    ValueError: mismatched shapes, an unknown aggregation.

  >>> import jax.numpy as jnp
  >>> old, mask = jnp.array([[-1.0, -2.0]]), jnp.array([[True, True]])
  >>> new = old + jnp.log(jnp.array([[0.5, 1.5]]))
  >>> loss, aux = ppo_clip(new, old, jnp.array([1.0]), mask)  # -(0.5 + 1.2) / 2
  >>> round(float(loss), 4), aux["clipped"].tolist(), float(aux["clip_fraction"])
  (-0.85, [[False, True]], 0.5)
  """
  mask = trainable(mask, segment_ids, logprobs=logprobs, entropy=entropy)
  ratio = importance_ratio(logprobs, old_logprobs, mask)
  advantages = _per_token(advantages, importance_weights, mask)
  surrogate, clipped = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
  loss = aggregate(
    -surrogate, mask, aggregation, normalizer=normalizer, segment_ids=segment_ids
  )
  return loss, _measure(logprobs, old_logprobs, mask, ratio, clipped, entropy)


def gspo(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_low: float = 3e-4,
  clip_high: float = 4e-4,
  aggregation: str = "sequence_mean_token_mean",
  normalizer: float | jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  importance_weights: jax.Array | None = None,
  entropy: jax.Array | None = None,
) -> tuple[jax.Array, Aux]:
  """GSPO: one ratio per response, https://arxiv.org/abs/2507.18071, equation 5.

      s_i  = (pi(y_i) / pi_old(y_i)) ^ (1 / l_i) = exp(mean_t log-ratio_t)
      loss = aggregate(-min(s_i A, clip(s_i, 1 - clip_low, 1 + clip_high) A))

  Every token has its response's value, so that `sequence_mean_token_mean` is the
  paper's mean over responses; the other aggregations weight responses by length. The
  gradient flows through the tokens (the paper's GSPO-token): equal to GSPO's for
  advantages per response, and defined for advantages per token.

  Args:
    logprobs: [N, T] of the trained policy.
    old_logprobs: [N, T] of the policy before the updates, constants.
    advantages: [N] or [N, T], constants.
    mask: [N, T] bool, trainable tokens, from which l_i is counted.
    clip_low, clip_high: widths of the clip range below and above 1. A mean over
      tokens varies far less than a token, hence the paper's small values.
    aggregation, normalizer, segment_ids, importance_weights, entropy: see the module.

  Returns:
    float32 scalar, and a dict as from `ppo_clip`; `ratio` is the response's, at each of
    its tokens.

  Raises:
    ValueError: mismatched shapes, an unknown aggregation.

  >>> import jax.numpy as jnp
  >>> old, mask = jnp.array([[-1.0, -2.0]]), jnp.array([[True, True]])
  >>> new = old + jnp.log(jnp.array([[4.0, 0.25]]))  # ratios whose product is 1
  >>> loss, aux = gspo(new, old, jnp.array([1.0]), mask)
  >>> float(loss), aux["ratio"].tolist()
  (-1.0, [[1.0, 1.0]])
  """
  mask = trainable(mask, segment_ids, logprobs=logprobs, entropy=entropy)
  log_ratio = masked_log_ratio(logprobs, old_logprobs, mask)
  total = to_tokens(sequence_sums(log_ratio, segment_ids), segment_ids)
  mean = total / sequence_lengths(mask, segment_ids)
  # The value is the response's ratio, the gradient that of the token's log-prob.
  ratio = jnp.exp(jax.lax.stop_gradient(mean - log_ratio) + log_ratio)
  ratio = jnp.where(mask, ratio, 1.0)
  advantages = _per_token(advantages, importance_weights, mask)
  surrogate, clipped = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
  loss = aggregate(
    -surrogate, mask, aggregation, normalizer=normalizer, segment_ids=segment_ids
  )
  return loss, _measure(logprobs, old_logprobs, mask, ratio, clipped, entropy)


def cispo(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_low: float = 1.0,
  clip_high: float = 4.0,
  aggregation: str = "token_mean",
  normalizer: float | jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  importance_weights: jax.Array | None = None,
  entropy: jax.Array | None = None,
) -> tuple[jax.Array, Aux]:
  """CISPO: REINFORCE with a bounded ratio, https://arxiv.org/abs/2506.13585.

      loss = aggregate(-sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log pi)

  The clip bounds the weight of a token, and zeroes no token's gradient. The paper
  bounds only from above (`clip_low=1.0` is no bound below) and gives no value; ScaleRL
  (https://arxiv.org/abs/2510.13786) and TRL recommend the default bound of 5. With
  `clip_low=1.0` it equals `policy_gradient` with `truncated_importance` of cap `1 +
  clip_high`.

  Args:
    logprobs: [N, T] of the trained policy.
    old_logprobs: [N, T] of the policy before the updates, constants.
    advantages: [N] or [N, T], constants.
    mask: [N, T] bool, trainable tokens.
    clip_low, clip_high: widths of the clip range below and above 1.
    aggregation, normalizer, segment_ids, importance_weights, entropy: see the module.

  Returns:
    float32 scalar, and a dict as from `ppo_clip`; `clipped` marks the tokens with a
    ratio out of bounds.

  Raises:
    ValueError: mismatched shapes, an unknown aggregation.

  >>> import jax.numpy as jnp
  >>> old, mask = jnp.array([[-1.0, -4.0]]), jnp.array([[True, True]])
  >>> new = old + jnp.log(jnp.array([[1.0, 8.0]]))
  >>> loss, aux = cispo(new, old, jnp.array([1.0]), mask)
  >>> aux["clipped"].tolist(), round(float(loss), 3)  # (1 * 1 + 5 * (4 - log 8)) / 2
  ([[False, True]], 5.301)
  """
  mask = trainable(mask, segment_ids, logprobs=logprobs, entropy=entropy)
  check_numbers(zero=True, clip_low=clip_low, clip_high=clip_high)
  ratio = importance_ratio(logprobs, old_logprobs, mask)
  weight = jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high))
  advantages = _per_token(advantages, importance_weights, mask)
  loss = aggregate(
    -weight * advantages * jnp.asarray(logprobs, jnp.float32),
    mask,
    aggregation,
    normalizer=normalizer,
    segment_ids=segment_ids,
  )
  clipped = weight != jax.lax.stop_gradient(ratio)
  return loss, _measure(logprobs, old_logprobs, mask, ratio, clipped, entropy)


def _clipped_surrogate(ratio, advantages, clip_low, clip_high):
  """min(rho A, clip(rho) A), and where the minimum is the clipped term."""
  check_numbers(zero=True, clip_low=clip_low, clip_high=clip_high)
  free = ratio * advantages
  bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
  return jnp.minimum(free, bounded), bounded < free


def _measure(logprobs, old_logprobs, mask, ratio, clipped, entropy):
  measured = {"ratio": ratio, "clipped": clipped}
  measured["clip_fraction"] = aggregate(clipped, mask, "token_mean")
  log_ratio = masked_log_ratio(logprobs, old_logprobs, mask)
  k3 = jnp.expm1(log_ratio) - log_ratio
  measured["approx_kl"] = aggregate(k3, mask, "token_mean")
  return jax.lax.stop_gradient(measured) | _mean_entropy(entropy, mask)


def _mean_entropy(entropy, mask):
  if entropy is None:
    return {}
  return {"entropy": jax.lax.stop_gradient(aggregate(entropy, mask, "token_mean"))}


def _per_token(advantages, importance_weights, mask):
  """Advantages x weights as float32 constants [N, T], 0 where `mask` is False."""
  product = broadcast("advantages", advantages, mask)
  if importance_weights is not None:
    product *= broadcast("importance_weights", importance_weights, mask)
  # Masked before the product with a log-prob, whose gradient would be 0 * NaN.
  return jax.lax.stop_gradient(jnp.where(mask, product, 0.0))

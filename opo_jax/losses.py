"""Losses: log-probs, advantages and a mask -> a scalar to minimise.

`mask[N, T]` marks the trainable tokens: the end token is one of them; prompt, padding
and tool tokens are not. Advantages are `[N]` or `[N, T]` and receive no gradient.
Arithmetic is float32; values where `mask` is False, NaN included, are not read. Every
loss returns `(loss, aux)` and takes these options:

- `aggregation`: how token losses are reduced to a scalar, see `aggregate`.
- `normalizer`: the denominator of a loss belongs to the *step*, not to the micro-batch.
  When a step is split, compute `step_normalizer(mask, how)` once for the whole step and
  pass it for every part: the losses of the parts then add up to that of the step, for
  every split.
- `segment_ids[N, T]`: for packed rows, the response that a token belongs to: 1, 2, ...
  within the row, 0 for padding. A packed response has the same loss as in a row of its
  own; advantages are `[N, T]`.

      segment_ids    1 1 1 2 2 3 3 3 0 0
- `importance_weights`, `[N]` or `[N, T]`: constant factors of the token losses, such as
  those of `truncated_importance`.
- `entropy[N, T]`: measured only; `aux["entropy"]` is its mean.

`aux` describes the trainable tokens of this call: `ratio[N, T]` (1 where `mask` is
False), `clipped[N, T]`, and as means over tokens `clip_fraction`, `approx_kl` (k3 of
the old policy to the new one) and `entropy`.
"""

import difflib

import jax
import jax.numpy as jnp
import numpy as np

from opo_jax.advantages import ESTIMATORS, Estimator

AGGREGATIONS = (
  "token_mean",
  "sequence_mean_token_sum",
  "sequence_mean_token_mean",
  "constant",
)

Aux = dict[str, jax.Array]


def step_normalizer(
  mask: jax.Array, how: str, *, segment_ids: jax.Array | None = None
) -> jax.Array:
  """The denominator of `aggregate`: trainable tokens, or responses with any.

  Args:
    mask: [N, T] bool of the whole optimiser step, over all micro-batches and hosts.
    how: `token_mean` counts tokens; `sequence_mean_*` count responses with a token.
    segment_ids: [N, T] where rows are packed.

  Returns:
    float32 scalar, at least 1.

  Raises:
    ValueError: an unknown name, or `constant`, whose denominator the caller chooses.

  >>> import jax.numpy as jnp
  >>> mask = jnp.array([[True, True, False], [False, False, False]])
  >>> float(step_normalizer(mask, "token_mean"))
  2.0
  >>> float(step_normalizer(mask, "sequence_mean_token_mean"))  # one row has tokens
  1.0
  """
  _check_name("aggregation", how, AGGREGATIONS)
  if how == "constant":
    raise ValueError(
      "aggregation 'constant' has no normalizer of its own; pass one (Dr. GRPO: rows x"
      " longest response)."
    )
  mask = _trainable(mask, segment_ids)
  counted = mask if how == "token_mean" else _sequence_sums(mask, segment_ids) > 0
  return jnp.maximum(counted.sum(dtype=jnp.float32), 1.0)


def aggregate(
  values: jax.Array,
  mask: jax.Array,
  how: str,
  *,
  normalizer: float | jax.Array | None = None,
  segment_ids: jax.Array | None = None,
) -> jax.Array:
  """Reduces per-token values to a scalar.

      token_mean                sum of all tokens / number of tokens  (DAPO)
      sequence_mean_token_sum   mean over responses of their sum
      sequence_mean_token_mean  mean over responses of their mean     (GRPO, GSPO)
      constant                  sum of all tokens / normalizer        (Dr. GRPO)

  Args:
    values: [N, T]; not read where `mask` is False.
    mask: [N, T] bool.
    how: one of `AGGREGATIONS`.
    normalizer: the denominator, if these rows are a part of the step.
    segment_ids: [N, T] where rows are packed.

  Returns:
    float32 scalar; 0 for an empty mask.

  Raises:
    ValueError: an unknown name, shapes that differ, `constant` without a normalizer,
      or a plain number of 0 or less for it.

  >>> import jax.numpy as jnp
  >>> values = jnp.array([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]])
  >>> mask = jnp.array([[True, True, True], [True, False, False]])
  >>> float(aggregate(values, mask, "token_mean"))
  3.0
  >>> float(aggregate(values, mask, "sequence_mean_token_mean"))
  4.0
  """
  _check_name("aggregation", how, AGGREGATIONS)
  mask = _trainable(mask, segment_ids, values=values)
  _check_numbers(normalizer=normalizer)
  if normalizer is None:
    normalizer = step_normalizer(mask, how, segment_ids=segment_ids)
  values = jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0)
  if how == "sequence_mean_token_mean":
    values = values / _sequence_lengths(mask, segment_ids)
  return values.sum() / normalizer


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
  mask = _trainable(mask, segment_ids, logprobs=logprobs, entropy=entropy)
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
  mask = _trainable(mask, logprobs=logprobs)
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
  mask = _trainable(mask, segment_ids, logprobs=logprobs, entropy=entropy)
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
  mask = _trainable(mask, segment_ids, logprobs=logprobs, entropy=entropy)
  log_ratio = _log_ratio(logprobs, old_logprobs, mask)
  total = _to_tokens(_sequence_sums(log_ratio, segment_ids), segment_ids)
  mean = total / _sequence_lengths(mask, segment_ids)
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
  mask = _trainable(mask, segment_ids, logprobs=logprobs, entropy=entropy)
  _check_numbers(zero=True, clip_low=clip_low, clip_high=clip_high)
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


def importance_ratio(
  logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array
) -> jax.Array:
  """`pi / pi_old` per token, [N, T] float32; 1 where `mask` is False.

  Bounded to [exp(-20), exp(20)]: beyond, float32 soon overflows to infinity, and a
  finite loss has a NaN gradient.

  >>> import jax.numpy as jnp
  >>> new, old = jnp.log(jnp.array([[0.5, 0.9]])), jnp.log(jnp.array([[0.25, 0.1]]))
  >>> importance_ratio(new, old, jnp.array([[True, False]])).tolist()
  [[2.0, 1.0]]
  """
  return jnp.exp(_log_ratio(logprobs, old_logprobs, mask))


def truncated_importance(
  logprobs: jax.Array,
  sampling_logprobs: jax.Array,
  mask: jax.Array,
  *,
  cap: float = 2.0,
) -> jax.Array:
  """Truncated importance sampling: corrects for a sampler other than the learner.

      w = min(pi_learner / pi_sampler, cap)

  Pass it to a loss as `importance_weights`. The ratio of `ppo_clip`, `gspo` and `cispo`
  is relative to `old_logprobs`; if those are the learner's own, call this function with
  (old_logprobs, sampling_logprobs). If `old_logprobs` are the sampler's, the ratio
  already corrects, and weights would correct twice.
  https://fengyao.notion.site/off-policy-rl

  Args:
    logprobs: [N, T] of the learner, constants.
    sampling_logprobs: [N, T] under the distribution that the tokens were sampled from.
    mask: [N, T] bool, trainable tokens.
    cap: the largest weight.

  Returns:
    [N, T] float32 without a gradient; 1 where `mask` is False.

  Raises:
    ValueError: shapes that differ, a cap of 0 or less.

  >>> import jax.numpy as jnp
  >>> learner, sampler = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.0, -3.0]])
  >>> truncated_importance(learner, sampler, jnp.array([[True, True]])).tolist()
  [[1.0, 2.0]]
  """
  _check_numbers(cap=cap)
  ratio = jax.lax.stop_gradient(importance_ratio(logprobs, sampling_logprobs, mask))
  return jnp.where(jnp.asarray(mask, bool), jnp.minimum(ratio, cap), 1.0)


def kl(
  logprobs: jax.Array,
  reference_logprobs: jax.Array,
  mask: jax.Array,
  *,
  estimator: str = "k3",
) -> jax.Array:
  """Estimates KL(pi || reference) per token, from tokens that pi sampled.

      k1 = log pi - log ref        k2 = k1^2 / 2        k3 = exp(-k1) - 1 + k1

  The values of k1 and k3 are unbiased. k3 is never negative; its exponent is bounded as
  in `importance_ratio`. http://joschu.net/blog/kl-approx.html

  For a penalty that is differentiated on the policy's own tokens, use `k2`: its
  expected gradient `E[k1 grad log pi]` is that of the KL. The expected gradient of k1
  is zero (`E[grad log pi]`), that of k3 belongs to KL(reference || pi).

  Args:
    logprobs: [N, T] of the policy that sampled.
    reference_logprobs: [N, T].
    mask: [N, T] bool.
    estimator: `k1`, `k2` or `k3`.

  Returns:
    [N, T] float32; 0 where `mask` is False.

  Raises:
    ValueError: an unknown estimator, shapes that differ.

  >>> import jax.numpy as jnp
  >>> new, start = jnp.array([[-1.0, -9.0]]), jnp.array([[-1.5, -1.0]])
  >>> kl(new, start, jnp.array([[True, False]]), estimator="k1").tolist()
  [[0.5, 0.0]]
  """
  _check_name("KL estimator", estimator, ("k1", "k2", "k3"))
  mask = _trainable(mask, logprobs=logprobs, reference_logprobs=reference_logprobs)
  k1 = jnp.asarray(logprobs, jnp.float32) - jnp.asarray(reference_logprobs, jnp.float32)
  k1 = jnp.where(mask, k1, 0.0)
  if estimator == "k1":
    return k1
  if estimator == "k2":
    return 0.5 * k1**2
  k1 = jnp.maximum(k1, -_MAX_LOG_RATIO)
  return jnp.expm1(-k1) + k1


# exp(20) = 5e8. A sampled token with a larger ratio indicates a bug.
_MAX_LOG_RATIO = 20.0


def _log_ratio(logprobs, old_logprobs, mask):
  """[N, T] float32, 0 where `mask` is False, with a gradient for `logprobs` only."""
  mask = _trainable(mask, logprobs=logprobs, old_logprobs=old_logprobs)
  difference = jnp.asarray(logprobs, jnp.float32) - jax.lax.stop_gradient(
    jnp.asarray(old_logprobs, jnp.float32)
  )
  difference = jnp.where(mask, difference, 0.0)
  return jnp.clip(difference, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _clipped_surrogate(ratio, advantages, clip_low, clip_high):
  """min(rho A, clip(rho) A), and where the minimum is the clipped term."""
  _check_numbers(zero=True, clip_low=clip_low, clip_high=clip_high)
  free = ratio * advantages
  bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
  return jnp.minimum(free, bounded), bounded < free


def _measure(logprobs, old_logprobs, mask, ratio, clipped, entropy):
  measured = {"ratio": ratio, "clipped": clipped}
  measured["clip_fraction"] = aggregate(clipped, mask, "token_mean")
  log_ratio = _log_ratio(logprobs, old_logprobs, mask)
  k3 = jnp.expm1(log_ratio) - log_ratio
  measured["approx_kl"] = aggregate(k3, mask, "token_mean")
  return jax.lax.stop_gradient(measured) | _mean_entropy(entropy, mask)


def _mean_entropy(entropy, mask):
  if entropy is None:
    return {}
  return {"entropy": jax.lax.stop_gradient(aggregate(entropy, mask, "token_mean"))}


def _sequence_sums(values, segment_ids):
  """Sums over each response: [N, 1], or [N, T + 1] by segment id."""
  values = jnp.asarray(values, jnp.float32)
  if segment_ids is None:
    return values.sum(-1, keepdims=True)
  # A segment has at least one token, so that ids 1, 2, ... never exceed T.
  num_segments = values.shape[1] + 1
  return jax.vmap(lambda v, i: jax.ops.segment_sum(v, i, num_segments))(
    values, segment_ids
  )


def _to_tokens(sums, segment_ids):
  """Broadcasts `_sequence_sums` to the tokens: an array that broadcasts to [N, T]."""
  if segment_ids is None:
    return sums
  return jnp.take_along_axis(sums, segment_ids, axis=1, mode="clip")


def _sequence_lengths(mask, segment_ids):
  """The number of trainable tokens of each token's response, at least 1."""
  return jnp.maximum(_to_tokens(_sequence_sums(mask, segment_ids), segment_ids), 1.0)


def _trainable(mask, segment_ids=None, **arrays):
  """The mask as bool, without padding; checks that all arrays are [N, T]."""
  arrays = {"mask": mask, "segment_ids": segment_ids, **arrays}
  shapes = {name: jnp.shape(a) for name, a in arrays.items() if a is not None}
  if len(set(shapes.values())) != 1 or len(shapes["mask"]) != 2:
    raise ValueError(f"Expected arrays of one shape [N, T], got {shapes}.")
  mask = jnp.asarray(mask, bool)
  if segment_ids is None:
    return mask
  if not jnp.issubdtype(jnp.result_type(segment_ids), jnp.integer):
    raise ValueError(
      f"Expected segment_ids of an integer type, got {jnp.result_type(segment_ids)}."
    )
  _check_segments(segment_ids)
  return mask & (segment_ids > 0) & (segment_ids <= mask.shape[1])


def _check_segments(segment_ids):
  """Raises ValueError for concrete ids out of range; under `jit` none is concrete."""
  if isinstance(segment_ids, jax.core.Tracer) or not getattr(
    segment_ids, "is_fully_addressable", True
  ):
    return
  ids = np.asarray(jax.device_get(segment_ids))
  if ids.size and (ids.min() < 0 or ids.max() > ids.shape[1]):
    raise ValueError(
      f"segment_ids of rows of {ids.shape[1]} tokens lie in [{ids.min()}, {ids.max()}];"
      " number the segments of each row 1, 2, ... and padding 0."
    )


def _per_token(advantages, importance_weights, mask):
  """Advantages x weights as float32 constants [N, T], 0 where `mask` is False."""
  product = _broadcast("advantages", advantages, mask)
  if importance_weights is not None:
    product *= _broadcast("importance_weights", importance_weights, mask)
  # Masked before the product with a log-prob, whose gradient would be 0 * NaN.
  return jax.lax.stop_gradient(jnp.where(mask, product, 0.0))


def _broadcast(name, values, mask):
  """[N] or [N, T] -> float32 that broadcasts to [N, T]."""
  values = jnp.asarray(values, jnp.float32)
  if values.shape == mask.shape[:1]:
    return values[:, None]
  if values.shape == mask.shape:
    return values
  raise ValueError(
    f"Expected {name} [N] or [N, T] for log-probs {mask.shape}, got {values.shape}."
  )


def _check_numbers(*, zero=False, **numbers):
  """Raises ValueError for plain numbers of 0 or less; arrays are not checked."""
  for name, number in numbers.items():
    plain = isinstance(number, (int, float, np.number))
    if plain and not (number > 0 or (zero and number == 0)):
      bound = "of at least 0" if zero else "above 0"
      raise ValueError(f"Expected {name} {bound}, got {number}.")


def _check_name(kind, name, names):
  if name not in names:
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]}? There" if near else "there"
    raise ValueError(f"Unknown {kind} {name!r}; {hint} are {', '.join(names)}.")

"""Objectives: the losses an update can minimise, by name and with one signature."""

from typing import Protocol

import jax

from opo_jax import losses


class Objective(Protocol):
  """Log-probs and advantages -> the loss of a micro-batch.

  Args:
    logprobs: [N, T] of the policy being trained.
    old_logprobs: [N, T] of the distribution that the tokens were sampled from.
    advantages: [N] or [N, T], taken as constants.
    mask: [N, T] bool, trainable tokens.
    aggregation: one of `losses.AGGREGATIONS`.
    normalizer: the denominator of the whole optimiser step, so that the losses of its
      micro-batches add up.
    segment_ids: [N, T], which response of its row a token belongs to.

  Returns:
    float32 scalar, and a dict in which `clipped` [N, T] marks the tokens whose ratio is
    out of bounds.
  """

  def __call__(
    self,
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    aggregation: str,
    normalizer: jax.Array,
    segment_ids: jax.Array,
  ) -> tuple[jax.Array, losses.Aux]: ...


def policy_gradient(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  aggregation: str,
  normalizer: jax.Array,
  segment_ids: jax.Array,
  importance_weights: jax.Array | None = None,
) -> tuple[jax.Array, losses.Aux]:
  """`losses.policy_gradient` as an Objective.

  The loss itself does not read `old_logprobs`: on-policy the ratio is 1. They serve
  only to measure which tokens PPO with its usual bounds would clip.
  """
  loss, _ = losses.policy_gradient(
    logprobs,
    advantages,
    mask,
    aggregation=aggregation,
    normalizer=normalizer,
    segment_ids=segment_ids,
    importance_weights=importance_weights,
  )
  _, aux = losses.ppo_clip(
    jax.lax.stop_gradient(logprobs), old_logprobs, advantages, mask
  )
  return loss, aux


def tis(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  aggregation: str,
  normalizer: jax.Array,
  segment_ids: jax.Array,
  tis_cap: float = 2.0,
) -> tuple[jax.Array, losses.Aux]:
  """`policy_gradient` with truncated importance sampling.

  Args:
    tis_cap: the largest importance weight of a token.
  """
  weights = losses.truncated_importance(logprobs, old_logprobs, mask, cap=tis_cap)
  return policy_gradient(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    aggregation=aggregation,
    normalizer=normalizer,
    segment_ids=segment_ids,
    importance_weights=weights,
  )


OBJECTIVES: dict[str, Objective] = {
  "policy_gradient": policy_gradient,
  "tis": tis,
  "ppo_clip": losses.ppo_clip,
  "gspo": losses.gspo,
  "cispo": losses.cispo,
}

# The fields of `Algorithm` that an objective takes as keywords beside those of every
# Objective. Each loss has its own default for them: 0.2 of a token's ratio in ppo_clip,
# 3e-4 of a response's in gspo.
OPTIONS: dict[str, tuple[str, ...]] = {
  "tis": ("tis_cap",),
  "ppo_clip": ("clip_low", "clip_high"),
  "gspo": ("clip_low", "clip_high"),
  "cispo": ("clip_low", "clip_high"),
}

"""The settings of an update, and the losses it can minimise, by name.

The losses of `opo_jax/losses/` stand here behind one signature, `Objective`.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Protocol

import jax

from opo_jax import losses
from opo_jax.advantages import ESTIMATORS


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
_OPTIONS: dict[str, tuple[str, ...]] = {
  "tis": ("tis_cap",),
  "ppo_clip": ("clip_low", "clip_high"),
  "gspo": ("clip_low", "clip_high"),
  "cispo": ("clip_low", "clip_high"),
}


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """What is compiled into an update; plain values, so that it can be hashed and shown.

  Attributes:
    estimator: a name in `advantages.ESTIMATORS`.
    objective: a name in `OBJECTIVES`.
    aggregation: one of `losses.AGGREGATIONS`.
    normalizer: the denominator of one optimiser step's loss; None counts the step's
      tokens or responses, as the aggregation says. `constant` needs a number.
    clip_low, clip_high: bounds of the ratio in ppo_clip, gspo and cispo; None: the
      default of the loss. Other objectives do not read them.
    tis_cap: largest importance weight of tis; None: its default.
    updates_per_batch: optimiser steps per batch of rollouts, each on the groups of an
      equal share of the prompts. 1 is exact on-policy.
    micro_batch_tokens: bound on the tokens that are computed at a time, over all
      devices, padding included; the gradients of an optimiser step add up over them.
      0: all at once.
    require_on_policy: refuse rollouts of another policy version.
    remat: what the backward pass computes again, one of `models.transformer.REMAT`.
    share_prompts: compute a prompt once for its group; False repeats it before each
      response, in rows with segment ids, which is what attention kernels take.
    prune: leave out rollouts whose advantage is exactly zero.
    pack: several responses to a row.

  Raises:
    ValueError: an unknown estimator or objective, with the near names.
  """

  estimator: str = "opo"
  objective: str = "policy_gradient"
  aggregation: str = "token_mean"
  normalizer: float | None = None
  clip_low: float | None = None
  clip_high: float | None = None
  tis_cap: float | None = None
  updates_per_batch: int = 1
  micro_batch_tokens: int = 0
  require_on_policy: bool = True
  remat: str = "none"
  share_prompts: bool = True
  prune: bool = True
  pack: bool = True

  def __post_init__(self):
    _check_name("estimator", self.estimator, ESTIMATORS, "--algorithm.advantage")
    _check_name("objective", self.objective, OBJECTIVES, "--algorithm.loss")

  @property
  def objective_options(self) -> dict[str, float]:
    """The options that the objective takes and that are set."""
    options = {name: getattr(self, name) for name in _OPTIONS.get(self.objective, ())}
    return {name: value for name, value in options.items() if value is not None}


def _check_name(kind: str, name: str, table: Iterable[str], flag: str) -> None:
  if name not in table:
    near = difflib.get_close_matches(str(name), table, n=1)
    hint = f"did you mean {near[0]}? There" if near else "there"
    raise ValueError(
      f"Unknown {kind} {name!r}; {hint} are {', '.join(table)} ({flag})."
    )

"""What an update measures: groups and baselines, tokens, packing."""

import jax
import jax.numpy as jnp

from opo_jax.advantages import mean, opo
from opo_jax.learner.packing import Plan
from opo_jax.rollouts import Rollouts


def token_metrics(
  sums: dict[str, jax.Array], rollouts: Rollouts, left_out: jax.Array
) -> dict[str, jax.Array]:
  """Metrics of the whole batch, from sums [optimiser steps] over what was computed.

  Loss and gradient norm are means over optimiser steps. `onpolicy/*` is of the computed
  tokens. `policy/entropy` is exact for these; a rollout that was left out contributes
  -log pi of its tokens, as the sampler recorded them: unbiased, from one sample.
  """
  tokens = jnp.maximum(sums["tokens"].sum(), 1.0)
  rest = rollouts.mask & left_out[:, None]
  entropy = sums["entropy"].sum() - jnp.where(rest, rollouts.logprobs, 0.0).sum()
  all_tokens = jnp.maximum(sums["tokens"].sum() + rest.sum(), 1.0)
  return {
    "loss": sums["loss"].mean(),
    "grad_norm": sums["grad_norm"].mean(),
    "policy/entropy": entropy / all_tokens,
    "onpolicy/logprob_diff_max": sums["diff_max"].max(),
    "onpolicy/logprob_diff_mean": sums["diff"].sum() / tokens,
    "onpolicy/kl": sums["kl"].sum() / tokens,
    "onpolicy/clip_fraction": sums["clipped"].sum() / tokens,
  }


def plan_metrics(plan: Plan) -> dict[str, float]:
  """Tokens that went through the model (padding and prompts included), the share of
  them that has a gradient, and the share of rollouts that was left out."""
  if not plan.tokens:
    return {"update/tokens": 0}
  return {
    "update/tokens": plan.tokens,
    "update/packing_efficiency": plan.tokens_with_gradient / plan.tokens,
    "update/skipped_rollouts_fraction": plan.pruned / plan.counted,
  }


def group_metrics(
  rewards: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  valid: jax.Array,
  rollouts: Rollouts,
) -> dict[str, jax.Array]:
  """Metrics of groups and baselines, over the rows that count."""
  lengths, ids, num_groups = mask.sum(-1), rollouts.prompt_ids, rollouts.num_groups

  def per_group(values):
    return jax.ops.segment_sum(values.astype(jnp.float32), ids, num_groups)

  counted = valid & (lengths > 0)
  sizes = per_group(counted)
  groups = jnp.maximum((sizes > 0).sum(), 1)
  signal = per_group(jnp.abs(advantages)) > 0
  group = dict(num_groups=num_groups, valid=valid)
  # (r - mean) - (r - b) = b - mean
  difference = mean(rewards, lengths, ids, **group) - opo(
    rewards, lengths, ids, **group
  )
  # OPO's defining property: sum_i l_i A_i is 0 in every group.
  weighted_sums = per_group(advantages * lengths) / jnp.maximum(per_group(lengths), 1)
  return {
    "baseline/opo_minus_mean": difference.sum() / jnp.maximum(counted.sum(), 1),
    "groups/zero_advantage_fraction": ((sizes > 0) & ~signal).sum() / groups,
    "groups/single_sample_fraction": (sizes == 1).sum() / groups,
    "advantages/length_weighted_mean_max": jnp.abs(weighted_sums).max(),
  }

"""Learner: rollouts and rewards in, one optimiser step out."""

from opo_jax.learner.update import (
  OBJECTIVES,
  Algorithm,
  TrainState,
  Update,
  check_on_policy,
  kl_to_start,
  policy_gradient,
  response_logprobs,
  tis,
  token_stats,
)

__all__ = [
  "OBJECTIVES",
  "Algorithm",
  "TrainState",
  "Update",
  "check_on_policy",
  "kl_to_start",
  "policy_gradient",
  "response_logprobs",
  "tis",
  "token_stats",
]

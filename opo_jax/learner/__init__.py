"""Learner: rollouts and rewards in, one optimiser step out."""

from opo_jax.learner.algorithm import OBJECTIVES, Algorithm
from opo_jax.learner.forward import kl_to_start, response_logprobs, token_stats
from opo_jax.learner.state import TrainState, abstract_state, init_state
from opo_jax.learner.update import (
  PolicyGradientLearner,
  UpdateMetrics,
  check_on_policy,
)

__all__ = [
  "OBJECTIVES",
  "Algorithm",
  "PolicyGradientLearner",
  "TrainState",
  "UpdateMetrics",
  "abstract_state",
  "check_on_policy",
  "init_state",
  "kl_to_start",
  "response_logprobs",
  "token_stats",
]

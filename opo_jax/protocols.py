"""The three parts of a training step, as Protocols: replace one of them with your own.

    rollouts = sampler.sample(policy, prompts, params, seed=…)
    rewards  = scorer.finish(rollouts)
    state, update = learner.update(state, rollouts, rewards.values)

`loop.train(config, directory, sampler=…, scorer=…, learner=…)` runs with the parts that
are passed. Another engine (vLLM, SGLang) or a multi-turn environment is a `Sampler`, a
judge or a sandbox a `Scorer`, another algorithm a `Learner`. Ours are
`sampler.JaxSampler`, `scorer.VerifierScorer`, `scorer.RewardModelScorer` and
`learner.PolicyGradientLearner`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from opo_jax.data.prompts import Problem
from opo_jax.learner import TrainState, UpdateMetrics
from opo_jax.rollouts import Rollouts
from opo_jax.sampler import Ended, SamplingParams
from opo_jax.scorer import Rewards


class Sampler(Protocol):
  """Prompts in, rollouts out."""

  def sample(
    self,
    policy: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    seed: int,
    first_prompt: int = 0,
    version: int | jax.Array = -1,
    on_ended: Callable[[Ended], None] | None = None,
  ) -> Rollouts:
    """Samples `params.samples_per_prompt` responses to each prompt.

    Args:
      policy: with the parameters to sample from.
      prompts: token ids of G prompts.
      params: how to sample.
      seed: of all random keys; the loop passes a new one every step.
      first_prompt: index of the first prompt in the random keys, so that a list sampled
        in parts gives what the whole list gives.
      version: of the policy; a learner that is exactly on-policy refuses others.
      on_ended: receives rows that have ended while others are still sampled; a sampler
        may ignore it.

    Returns:
      Rows ordered by prompt. `mask` marks the tokens that the policy drew (an
      environment's own tokens are False), `logprobs` are the policy's log-probs of them
      at `params.temperature`.
    """
    ...


class Scorer(Protocol):
  """Rollouts in, rewards out."""

  @property
  def wants_early_rows(self) -> bool:
    """Whether `add` should receive rows while others are still sampled."""
    ...

  def begin(self, problems: Sequence[Problem]) -> None:
    """Starts a batch: `prompt_ids` of the coming rollouts index `problems`."""
    ...

  def add(self, ended: Ended) -> None:
    """Takes rows that have ended, and returns at once."""
    ...

  def finish(self, rollouts: Rollouts) -> Rewards:
    """The rewards of the whole batch, rows given to `add` included.

    Args:
      rollouts: as the host reads them: tokens, lengths, finished and prompt_ids are
        NumPy arrays.
    """
    ...


class Learner(Protocol):
  """Rollouts and rewards in, a new policy out."""

  def init(self, policy: Any) -> TrainState:
    """The state before the first update; `policy` stays the caller's."""
    ...

  def update(
    self, state: TrainState, rollouts: Rollouts, rewards: Any
  ) -> tuple[TrainState, UpdateMetrics]:
    """One batch: advantages, loss, gradients, optimiser.

    Args:
      state: may be donated; use the returned one afterwards.
      rollouts: N rows.
      rewards: [N] float; NaN leaves a row out of baseline, loss and normaliser.

    Returns:
      The new state, whose `step` is one more, and the update's metrics. Their values
      may still be computing.
    """
    ...

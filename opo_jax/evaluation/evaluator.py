"""Evaluator: a policy's responses to held-out problems, and their scores."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from opo_jax import build, metrics
from opo_jax.data import preferences
from opo_jax.evaluation import Response, graded, summarise
from opo_jax.run import Run
from opo_jax.scorer import on_host

# How good a response really is, where that is known: benchmark -> true score. Only the
# evaluation reads it.
TRUE_SCORES = {"preferences": preferences.true_score}


class Evaluator:
  """Samples and scores held-out problems.

  Args:
    run: whose problems are asked.
    sampler: a `protocols.Sampler`.
    scorer: a `protocols.Scorer`; `is_graded` and `final_answer` are read where it has
      them.
  """

  def __init__(self, run: Run, sampler: Any, scorer: Any):
    self.run, self.sampler, self.scorer = run, sampler, scorer

  @property
  def is_graded(self) -> bool:
    """Whether rewards are graded scores, not correct or incorrect."""
    return getattr(self.scorer, "is_graded", False)

  def evaluate(self, policy: Any) -> dict[str, float]:
    """Held-out scores under `eval/<benchmark>/`, and the time they took."""
    timers, row = metrics.Timers(), {}
    with timers.phase("eval"):
      for benchmark in self.run.problems.held_out:
        responses = self.respond(policy, benchmark)
        start = self._start_responses[benchmark] if self.is_graded else ()
        scores = self.summary(responses, start)
        row |= {f"eval/{benchmark}/{name}": value for name, value in scores.items()}
    return row | {"time/eval_s": timers.seconds["eval"]}

  def respond(
    self, policy: Any, benchmark: str, first: int = 0, last: int | None = None
  ) -> list[Response]:
    """Samples and scores responses to problems `first` to `last - 1` of a benchmark.

    A response depends on its problem's place in the benchmark, not on which other
    problems are sampled in the same call.
    """
    run, params = self.run, build.eval_params(self.run.config)
    problems = run.problems.held_out[benchmark][first:last]
    rollouts = self.sampler.sample(
      policy,
      run.gather_prompts(run.encode_local(problems), len(problems)),
      params,
      seed=run.seed("evaluation"),
      first_prompt=first,
    )
    rollouts = on_host(rollouts, run.mesh)
    self.scorer.begin(problems)
    rewards = self.scorer.finish(rollouts)
    truncated_count = run.config.reward.truncated == "scored"
    final_answer = getattr(self.scorer, "final_answer", lambda text: None)
    true_score = TRUE_SCORES.get(benchmark, lambda text, reference: None)
    responses = []
    for i, text in enumerate(rewards.texts):
      problem, verified = problems[i // params.samples_per_prompt], rewards.verified[i]
      counts = rollouts.finished[i] or truncated_count
      responses.append(
        Response(
          id=problem.id,
          sample=i % params.samples_per_prompt,
          response=text,
          reference=problem.answer,
          answer=final_answer(text) if counts else None,
          reward=None if np.isnan(verified) else float(verified),
          length=int(rollouts.lengths[i]),
          finished=bool(rollouts.finished[i]),
          true_score=true_score(text, problem.answer),
        )
      )
    return responses

  def summary(
    self, responses: Sequence[Response], start: Sequence[Response] = ()
  ) -> dict[str, float]:
    """pass@k and the like; of graded rewards, mean scores and win rates.

    Args:
      responses: of a policy.
      start: the start policy's to the same problems, for win rates over it.
    """
    if not self.is_graded:
      return summarise(responses)
    return graded.summary(responses, start)

  @functools.cached_property
  def _start_responses(self) -> dict[str, list[Response]]:
    start = self.run.directory.load_start(self.run.abstract_policy)
    return {name: self.respond(start, name) for name in self.run.problems.held_out}

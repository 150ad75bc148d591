"""`variance`: gradient variance of every estimator on a run's frozen policies."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from opo_jax import build
from opo_jax.config import Config
from opo_jax.run import Run, load_policy
from opo_jax.scorer import on_host
from opo_jax.storage.json_files import write_json


def measure_variance(
  config: Config,
  directory: pathlib.Path,
  measure: Callable[..., dict[str, Any]],
  *,
  steps: Sequence[int],
  prompts: int,
  samples: int,
  seed: int,
) -> list[dict[str, Any]]:
  """Measures frozen policies of a run on training prompts; writes `variance.json`.

  Args:
    config: of the run.
    directory: of the run.
    measure: (policy, rollouts, rewards [N]) -> a row.
    steps: of checkpoints, 0 is the start policy; none: the start, the middle, the last.
    prompts: G, the same for every policy.
    samples: M, responses per prompt.
    seed: of prompts and responses.

  Returns:
    A row for each policy, with its `step`.
  """
  if config.model.lora_rank:
    raise ValueError(
      f"{directory} trained adapters, and `variance` measures the gradient of every"
      " parameter; use a run without --model.lora-rank."
    )
  run = Run(config, directory)
  kept = run.directory.checkpoint_steps()
  if not steps:
    steps = sorted({0, min(kept, key=lambda step: abs(2 * step - kept[-1])), kept[-1]})
  run.directory.check_steps(steps)
  problems = run.problems.stream(run.seed("variance", seed)).take(prompts)
  params = dataclasses.replace(build.rollout_params(config), samples_per_prompt=samples)
  sampler, rows = build.make_sampler(config), []
  progress = run.terminal.progress("policies", done=0, total=len(steps))
  with run.make_scorer() as scorer, progress as advance:
    for step in steps:
      policy = load_policy(run, step)
      rollouts = sampler.sample(
        policy,
        run.encode(problems),
        params,
        seed=run.seed("variance", seed),
        version=step,
      )
      scorer.begin(problems)
      rewards = scorer.finish(on_host(rollouts, run.mesh))
      rows.append({"step": step, **measure(policy, rollouts, rewards.verified)})
      advance()
  write_json(directory / "variance.json", {"policies": rows})
  return rows

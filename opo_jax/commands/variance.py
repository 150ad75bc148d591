"""`variance`: gradient variance of every estimator on a run's frozen policies."""

import dataclasses
import pathlib
from typing import Any

from opo_jax import build, variance
from opo_jax.config import Config
from opo_jax.run import Run, load_policy
from opo_jax.scorer import on_host
from opo_jax.storage.json_files import write_json


def measure_variance(
  config: Config,
  directory: pathlib.Path,
  settings: variance.Settings,
) -> list[dict[str, Any]]:
  """Measures frozen policies of a run on training prompts; writes `variance.json`.

  Args:
    config: of the run.
    directory: of the run.
    settings: which checkpoints (0 is the start policy; none: the start, the middle and
      the last), prompts and samples; the prompts are the same for every policy.

  Returns:
    A row for each policy, with its `step`.
  """
  if config.model.lora_rank:
    raise ValueError(
      f"{directory} trained adapters, and `variance` measures the gradient of every"
      " parameter; use a run without --model.lora-rank."
    )
  run = Run(config, directory)
  kept, steps, seed = run.directory.checkpoint_steps(), settings.steps, settings.seed
  if not steps:
    steps = sorted({0, min(kept, key=lambda step: abs(2 * step - kept[-1])), kept[-1]})
  run.directory.check_steps(steps)
  problems = run.problems.stream(run.seed("variance", seed)).take(settings.prompts)
  params = dataclasses.replace(
    build.rollout_params(config), samples_per_prompt=settings.samples
  )
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
      row = variance.measure(policy, rollouts, rewards.verified, settings)
      rows.append({"step": step, **row})
      advance()
  write_json(directory / "variance.json", {"policies": rows})
  return rows

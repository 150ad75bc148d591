"""`eval`: checkpoints of a run beside its start policy, or any model; resumable."""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from opo_jax import build, evaluation
from opo_jax.config import Config
from opo_jax.evaluation.evaluator import Evaluator
from opo_jax.run import Run, load_policy
from opo_jax.scorer import RewardModelScorer
from opo_jax.storage.checkpoint import fingerprint
from opo_jax.storage.config_file import differences, to_dict
from opo_jax.storage.json_files import read_json, write_json

# What changes no response, and may differ when an evaluation resumes.
_NO_SETTINGS = {
  "eval": ("every", "benchmarks", "problems", "chunk"),
  "rollout": ("prompts_per_step", "group_size", "slots"),
  "reward": ("workers", "memory_gib"),
}


def evaluate_run(
  config: Config, directory: pathlib.Path, out: pathlib.Path, *, steps: Sequence[int]
) -> dict[str, dict[str, float]]:
  """Evaluates checkpoints of a run beside the start policy.

  Args:
    config: the run's, with the evaluation wanted now in `config.eval`.
    directory: of the run.
    out: for the results; docs/evaluation.md lists its files.
    steps: of checkpoints; none: the last.

  Returns:
    Policy -> its scores under `eval/<benchmark>/`, the start policy first.
  """
  run = Run(config, directory)
  kept = run.directory.checkpoint_steps()
  run.directory.check_steps(steps)
  wanted = sorted({*steps, 0} if steps else {0, kept[-1]})
  policies = {
    f"step {step}" if step else "start": functools.partial(load_policy, run, step)
    for step in wanted
  }
  return _evaluate(run, policies, out)


def evaluate_model(config: Config, out: pathlib.Path) -> dict[str, dict[str, float]]:
  """Evaluates the policy that `config.model.path` names, as `evaluate_run` a run."""
  name = pathlib.Path(config.model.path).resolve().name
  run = Run(config, out)
  return _evaluate(run, {name: run.init_policy}, out)


def _evaluate(
  run: Run, policies: dict[str, Callable[[], Any]], out: pathlib.Path
) -> dict[str, dict[str, float]]:
  """Evaluates each policy, and writes the scores and their table."""
  assert run.problems.held_out is not None  # loads them all
  left_out, sampler = run.tell_left_out(), build.make_sampler(run.config)
  rows, start = {}, {}
  with run.make_scorer() as scorer:
    settings, evaluator = _settings(run, scorer), Evaluator(run, sampler, scorer)
    for name, load in policies.items():
      directory = out / name.replace(" ", "_")
      rows[name] = _evaluate_policy(evaluator, name, load(), directory, settings, start)
  results = {"settings": settings, "policies": rows, "data_left_out": left_out}
  write_json(out / "results.json", results)
  table = evaluation.table(rows)
  (out / "results.md").write_text(table + "\n", encoding="utf-8")
  run.terminal.say(f"{table}\n\nresults: {out}")
  return rows


def _evaluate_policy(
  evaluator: Evaluator,
  name: str,
  policy: Any,
  directory: pathlib.Path,
  settings: dict[str, Any],
  start: dict[str, list[evaluation.Response]],
) -> dict[str, float]:
  """Samples and scores the responses that earlier calls have not written yet.

  Writes, in `directory`,

      settings.json               what the responses depend on
      BENCHMARK.responses.jsonl   every response, see `evaluation.Response`
      BENCHMARK.problems.jsonl    how often each problem was solved (not if graded)

  Args:
    evaluator: of the run.
    name: of the policy.
    policy: to sample from.
    directory: of its results.
    settings: what, besides the policy, the responses depend on.
    start: benchmark -> the start policy's responses, which this call adds for it.

  Returns:
    The scores under `eval/<benchmark>/`.

  Raises:
    ValueError: the directory holds responses to other settings.
  """
  _claim(directory, settings | {"policy": fingerprint(policy)})
  run, row = evaluator.run, {}
  for benchmark, problems in run.problems.held_out.items():
    file = directory / re.sub(r"[^\w.@+-]+", "_", benchmark)
    title = f"{name}, {benchmark}"
    with run.terminal.progress(title, done=0, total=len(problems)) as advance:

      def respond(first, last, benchmark=benchmark, advance=advance):
        responses = evaluator.respond(policy, benchmark, first, last)
        for _ in range(first, last):
          advance()
        return responses

      responses = evaluation.collect(
        respond,
        [(problem.id, problem.answer) for problem in problems],
        file.with_name(f"{file.name}.responses.jsonl"),
        samples=run.config.eval.samples,
        chunk=run.config.eval.chunk,
      )
    if name == "start":
      start[benchmark] = responses
    if not evaluator.is_graded:
      solved = [json.dumps(line) + "\n" for line in evaluation.pass_rates(responses)]
      path = file.with_name(f"{file.name}.problems.jsonl")
      path.write_text("".join(solved), encoding="utf-8")
    scores = evaluator.summary(responses, start.get(benchmark, ()))
    row |= {f"eval/{benchmark}/{metric}": scores[metric] for metric in scores}
  return row


def _claim(directory: pathlib.Path, settings: dict[str, Any]) -> None:
  """Writes what the responses there depend on, or compares it with what was written."""
  path = directory / "settings.json"
  written = [file.stat().st_size for file in directory.glob("*.responses.jsonl")]
  if any(written):
    changed = differences(read_json(path), settings)
    if changed:
      raise ValueError(
        f"{directory} holds responses to other settings ({'; '.join(changed)})."
        " Give another OUT= directory, or repeat the settings to resume there."
      )
  directory.mkdir(parents=True, exist_ok=True)
  write_json(path, settings)


def _settings(run: Run, scorer: Any) -> dict[str, Any]:
  """What, besides the policy, a response and its reward depend on."""
  config = run.config
  values = to_dict(config)
  settings = {"seed": values["seed"], "model": {"dtype": values["model"]["dtype"]}}
  for section in ("data", "reward", "rollout", "eval"):
    left_out = _NO_SETTINGS.get(section, ())
    settings[section] = {k: v for k, v in values[section].items() if k not in left_out}
  if isinstance(scorer, RewardModelScorer):  # its path may name another model later
    settings["reward"]["scored_by"] = fingerprint(scorer.model)
  return settings

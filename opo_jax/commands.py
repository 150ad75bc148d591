"""What can be done with a run besides training it: evaluate, export, ask, measure."""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from opo_jax import config as config_lib
from opo_jax import evaluation
from opo_jax.config import Config
from opo_jax.data import decontaminate, sources
from opo_jax.data.prompts import Problem
from opo_jax.run import Run, checkpoint_steps, load_policy
from opo_jax.storage.checkpoint import fingerprint
from opo_jax.storage.metrics import write_json

# What does not change an answer, and may be another when an evaluation goes on.
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
  with Run(config, directory) as run:
    kept = checkpoint_steps(run)
    _check_steps(run, steps, kept)
    wanted = sorted({*steps, 0} if steps else {0, kept[-1]})
    policies = {
      f"step {step}" if step else "start": functools.partial(load_policy, run, step)
      for step in wanted
    }
    return _evaluate(run, policies, out)


def evaluate_model(config: Config, out: pathlib.Path) -> dict[str, dict[str, float]]:
  """Evaluates the policy that `config.model.path` names, as `evaluate_run` a run."""
  name = pathlib.Path(config.model.path).resolve().name
  with Run(config, out) as run:
    return _evaluate(run, {name: run.parts.init}, out)


def _evaluate(
  run: Run, policies: dict[str, Callable[[], Any]], out: pathlib.Path
) -> dict[str, dict[str, float]]:
  """Asks each policy, and writes the scores and the table of them."""
  assert run.problems.held_out is not None  # loads them all
  rows, start, settings, left_out = {}, {}, _settings(run), run.tell_left_out()
  for name, load in policies.items():
    directory = out / name.replace(" ", "_")
    rows[name] = _ask(run, name, load(), directory, settings, start)
  results = {"settings": settings, "policies": rows, "data_left_out": left_out}
  write_json(out / "results.json", results)
  table = evaluation.table(rows)
  (out / "results.md").write_text(table + "\n", encoding="utf-8")
  run.terminal.say(f"{table}\n\nresults: {out}")
  return rows


def _ask(
  run: Run,
  name: str,
  policy: Any,
  directory: pathlib.Path,
  settings: dict[str, Any],
  start: dict[str, list[evaluation.Response]],
) -> dict[str, float]:
  """Asks a policy the problems of each benchmark that it was not asked before.

  Writes, in `directory`,

      settings.json               what the answers depend on
      BENCHMARK.responses.jsonl   every response, see `evaluation.Response`
      BENCHMARK.problems.jsonl    how often each problem was solved, if that is asked

  Args:
    settings: what beside the policy the answers depend on.
    start: benchmark -> the start policy's answers; that policy puts them there.

  Returns:
    The scores under `eval/<benchmark>/`.

  Raises:
    ValueError: the directory holds answers to other settings.
  """
  _claim(directory, settings | {"policy": fingerprint(policy)})
  row = {}
  for benchmark, problems in run.problems.held_out.items():
    file = directory / re.sub(r"[^\w.@+-]+", "_", benchmark)
    title = f"{name}, {benchmark}"
    with run.terminal.progress(title, done=0, total=len(problems)) as advance:

      def answer(first, last, benchmark=benchmark, advance=advance):
        responses = run.respond(policy, benchmark, first, last)
        for _ in range(first, last):
          advance()
        return responses

      responses = evaluation.collect(
        answer,
        [(problem.id, problem.answer) for problem in problems],
        file.with_name(f"{file.name}.responses.jsonl"),
        samples=run.config.eval.samples,
        chunk=run.config.eval.chunk,
      )
    if name == "start":
      start[benchmark] = responses
    if not run.is_graded:
      solved = [json.dumps(line) + "\n" for line in evaluation.pass_rates(responses)]
      path = file.with_name(f"{file.name}.problems.jsonl")
      path.write_text("".join(solved), encoding="utf-8")
    scores = run.summary(responses, start.get(benchmark, ()))
    row |= {f"eval/{benchmark}/{metric}": scores[metric] for metric in scores}
  return row


def _settings(run: Run) -> dict[str, Any]:
  """What, beside the policy, an answer and its reward depend on."""
  config = run.config
  values = config_lib.to_dict(config)
  settings = {"seed": values["seed"], "model": {"dtype": values["model"]["dtype"]}}
  for section in ("data", "reward", "rollout", "eval"):
    left_out = _NO_SETTINGS.get(section, ())
    settings[section] = {k: v for k, v in values[section].items() if k not in left_out}
  if config.reward.verifier == "reward_model":  # whichever lies under its name now
    settings["reward"]["scored_by"] = fingerprint(run.reward_model)
  return settings


def _claim(directory: pathlib.Path, settings: dict[str, Any]) -> None:
  """Writes down what the answers there depend on, or holds it against what was."""
  path = directory / "settings.json"
  answers = [file.stat().st_size for file in directory.glob("*.responses.jsonl")]
  if any(answers):
    changed = config_lib.differences(config_lib.read_json(path), settings)
    if changed:
      raise ValueError(
        f"{directory} holds answers to other settings ({'; '.join(changed)}). Give"
        " another OUT= directory, or repeat the settings to go on there."
      )
  directory.mkdir(parents=True, exist_ok=True)
  write_json(path, settings)


def _check_steps(run: Run, steps: Sequence[int], kept: Sequence[int]) -> None:
  if unknown := sorted(set(steps) - {0, *kept}):
    raise ValueError(
      f"{run.directory} has no checkpoint of step {unknown[0]}; there are 0 (the start)"
      f" and {kept} (--checkpoint.every and --checkpoint.keep say which are kept)."
    )


def export(
  config: Config,
  directory: pathlib.Path,
  out: pathlib.Path,
  *,
  adapter_alone: bool = False,
) -> pathlib.Path:
  """Writes the last checkpoint's policy in the Hugging Face format.

  Its tokenizer with the chat template, generation config and a model card with the
  run's figures lie beside it.

  Args:
    config: the run's.
    directory: of the run.
    out: an empty or missing directory.
    adapter_alone: write what RL trained in PEFT's format, not the whole policy with
      adapters merged in; and the policy it lies beside under `base/`, where the run
      made that itself.
  """
  if adapter_alone and not config.model.lora_rank:
    raise ValueError(
      f"{directory} trained every parameter, and has no adapter for --format peft; use"
      " --format merged."
    )
  if out.exists() and any(out.iterdir()):
    raise ValueError(f"{out} is not empty; give another OUT= directory.")
  with Run(config, directory) as run:
    step = checkpoint_steps(run)[-1]
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    run.parts.export(
      load_policy(run, step),
      out,
      tokenizer=run.tokenizer,
      rows=[row for row in rows if row["step"] <= step],
      run=config_lib.read_json(directory / "run.json"),
      adapter_alone=adapter_alone,
    )
  return out


def sample_run(config: Config, directory: pathlib.Path, question: str) -> Iterator[str]:
  """A response of the last checkpoint's policy, as evaluation would sample it.

  Args:
    config: the run's; `config.eval` says how to sample.
    directory: of the run.
    question: put into the chat template, as a problem's.

  Yields:
    the text, piece by piece as it is sampled.
  """
  with Run(config, directory) as run:
    policy = load_policy(run)
    (prompt,) = run.encode([Problem(id="prompt", question=question, answer="")])
    tokens, shown = [], ""
    for new in run.parts.stream(policy, prompt, config.eval, seed=config.seed):
      tokens += new
      text = run.tokenizer.decode(tokens, skip_special_tokens=True)
      # A character of several tokens may be half there: it comes with the next piece.
      text = text.rstrip("\ufffd")
      yield text[len(shown) :]
      shown = text


def compare_data(train: Sequence[str], held_out: Sequence[str]) -> str:
  """A report of the training problems that are in evaluation sets, exactly or nearly.

  Args:
    train: names of sources with a training split.
    held_out: names of sources with a test split.
  """
  found, sizes = {}, {}
  for name in train:
    problems = list(sources.load(name, "train"))
    for apart in held_out:
      pair = f"{name} in {apart}"
      found[pair] = decontaminate.find(problems, sources.load(apart, "test"))
      sizes[pair] = len(problems)
  return decontaminate.report(found, sizes)


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
    config: the run's.
    directory: of the run.
    measure: (policy, rollouts, rewards [N]) -> a row.
    steps: of checkpoints, 0 is the start policy; none: the start, the middle, the last.
    prompts: G, the same for every policy.
    samples: M, responses to each.
    seed: of prompts and responses.

  Returns:
    A row for each policy, with its `step`.
  """
  if config.model.lora_rank:
    raise ValueError(
      f"{directory} trained adapters, and the variance that is measured is that of the"
      " gradient of every parameter; use a run without --model.lora-rank."
    )
  with Run(config, directory) as run:
    kept = checkpoint_steps(run)
    if not steps:
      steps = sorted(
        {0, min(kept, key=lambda step: abs(2 * step - kept[-1])), kept[-1]}
      )
    _check_steps(run, steps, kept)
    asked = run.problems.stream(run.seed("variance", seed)).take(prompts)
    rows = []
    with run.terminal.progress("policies", done=0, total=len(steps)) as advance:
      for step in steps:
        policy = load_policy(run, step)
        rollouts = run.parts.sample(
          policy,
          run.encode(asked),
          config.rollout,
          samples_per_prompt=samples,
          seed=run.seed("variance", seed),
          version=step,
        )
        _, rewards = run.score(rollouts, asked)
        rows.append({"step": step, **measure(policy, rollouts, rewards)})
        advance()
    write_json(directory / "variance.json", {"policies": rows})
    return rows

"""The commands of `python -m opo_jax`: train, reward-model, eval, sample, report,
compare, variance, export, plan, data.

Each command imports what it needs when it is called, so that `--help` and a mistyped
name respond at once. A user's mistake ends with one line and exit code 2.
"""

import argparse
import importlib
import logging
import os
import pathlib
import sys
from collections.abc import Sequence

from opo_jax.devices import environment


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit code."""
  parser = argparse.ArgumentParser(prog="python -m opo_jax", description=__doc__)
  commands = parser.add_subparsers(dest="command", required=True, metavar="command")
  # `train NAME --help`, `eval RUN --help` and `variance RUN --help` show their flags.
  add = commands.add_parser(
    "train", help="train an experiment, or resume it", add_help=False
  )
  add.add_argument("experiment", help="a name in experiments/, without .py")
  add.add_argument("--run", type=pathlib.Path, help="directory of the run")
  add = commands.add_parser(
    "reward-model", help="train an experiment's reward model alone", add_help=False
  )
  add.add_argument("experiment", help="a name in experiments/, without .py")
  add.add_argument("--run", type=pathlib.Path, help="directory of the run")
  for name, text in (
    ("eval", "evaluate a run beside its start policy, or a model"),
    ("sample", "print a response of a run's policy to a prompt, as it is sampled"),
    ("report", "write report.html and figures of a run"),
    ("variance", "measure the gradient variance of every estimator on a run's policy"),
    ("export", "write a run's policy in the Hugging Face format"),
  ):
    takes_flags = name in ("eval", "sample", "variance")
    add = commands.add_parser(name, help=text, add_help=not takes_flags)
    add.add_argument("run", type=pathlib.Path, help="directory of the run")
    if name == "eval":  # RUN may also be a model in Hugging Face format, or a hub id
      add.add_argument("--step", type=int, nargs="+", default=(), help="checkpoints")
      add.add_argument("--out", type=pathlib.Path, help="directory of the results")
    if name == "sample":
      add.add_argument("prompt", help="the user turn, before the chat template")
    if name == "export":
      add.add_argument("out", type=pathlib.Path, help="directory to write")
      add.add_argument(
        "--format",
        choices=("merged", "peft"),
        default="merged",
        help="the policy with adapters merged in, or only the adapters for PEFT",
      )
  add = commands.add_parser("compare", help="paired differences of runs, and curves")
  add.add_argument(
    "runs",
    type=pathlib.Path,
    nargs="+",
    help="run directories; the first is the baseline",
  )
  add.add_argument("--out", type=pathlib.Path, help="directory of the page")
  add = commands.add_parser(
    "plan", help="does an experiment fit on absent TPUs?", add_help=False
  )
  add.add_argument("experiment", help="a name in experiments/, without .py")
  add.add_argument("topology", help="generation and shape of a slice, v5e:4x8")
  add.add_argument("--search", action="store_true", help="try meshes and micro-batches")
  add.add_argument("--out", type=pathlib.Path, help="file to write")
  add.add_argument(
    "--mean-length", type=int, default=0, help="mean tokens of a response"
  )
  add.add_argument("--prompt-length", type=int, default=0, help="prompt tokens")
  add = commands.add_parser(
    "data", help="report training problems that occur in an evaluation set"
  )
  add.add_argument("train", nargs="+", help="names of sources, as in --data.train")
  add.add_argument("--against", nargs="+", required=True, help="names of test sets")
  # Arguments that a command does not know are flags over the fields of its config.
  known, flags = parser.parse_known_args(arguments)
  if flags and known.command in ("report", "compare", "export", "data"):
    parser.error(f"{known.command} takes no further flags, got {' '.join(flags)}")
  if known.command != "plan":  # which compiles for absent devices
    environment.prepare()
  # Notices of transformers (no torch) and Orbax on which nobody can act.
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  logging.getLogger("absl").setLevel(logging.ERROR)
  try:
    if known.command in FOR_ONE_PROCESS:
      from opo_jax.devices import distributed

      distributed.check_single_process(known.command, flags)
    return COMMANDS[known.command](known, flags)
  except (Exception, KeyboardInterrupt) as error:
    code = _told(error)
    if known.command == "train":  # perhaps as one of several processes
      from opo_jax.devices import distributed

      distributed.abort(error, code)
    if code is None:
      raise
    return code


def _told(error: BaseException) -> int | None:
  """Prints one line about an error of ours, and returns the exit code; else None."""
  if isinstance(error, KeyboardInterrupt):
    print("stopped; the same command resumes from the last checkpoint", file=sys.stderr)
    return 130
  ours = isinstance(error, (ValueError, FloatingPointError, RuntimeError))
  if not ours or not _raised_by_us(error):
    return None
  print(f"error: {error}", file=sys.stderr)
  return 2 if isinstance(error, ValueError) else 1


def _raised_by_us(error: Exception) -> bool:
  """Whether this package raised the error, with a message for the user."""
  trace = error.__traceback__
  while trace.tb_next:
    trace = trace.tb_next
  here = pathlib.Path(__file__).parent
  return pathlib.Path(trace.tb_frame.f_code.co_filename).is_relative_to(here)


def train(known, flags) -> int:
  config = _parse(_experiment(known.experiment), flags)
  directory = known.run or pathlib.Path("runs") / known.experiment
  from opo_jax import loop

  if loop.train(config, directory):
    from opo_jax.reports import report

    print(f"report: {report.report(directory)}")
  return 0


def reward_model(known, flags) -> int:
  config = _parse(_experiment(known.experiment), flags)
  directory = known.run or pathlib.Path("runs") / known.experiment
  from opo_jax import reward_training

  print(f"reward model: {reward_training.train(config, directory)}")
  return 0


def evaluate(known, flags) -> int:
  if known.run.is_dir() and not _is_model(known.run):
    config = _parse(_config_of(known.run), flags)
    from opo_jax.commands.evaluate import evaluate_run

    evaluate_run(config, known.run, known.out or known.run / "eval", steps=known.step)
    return 0
  if known.step:
    raise ValueError(f"{known.run} is no run and has no step {known.step[0]}.")
  owner, *name = known.run.parts
  if not known.run.exists() and (owner == "runs" or len(name) != 1):
    raise ValueError(
      f"There is no {known.run}; give RUN= the directory of a run, or of a model in"
      " Hugging Face format, or a hub id (owner/name)."
    )
  config = _parse(_config_of_model(str(known.run)), flags)
  from opo_jax.commands.evaluate import evaluate_model

  out = pathlib.Path("runs") / f"eval-{known.run.resolve().name}" / "eval"
  evaluate_model(config, known.out or out)
  return 0


def sample(known, flags) -> int:
  config = _parse(_config_of(known.run), flags)
  from opo_jax.commands.sample import sample_run

  for piece in sample_run(config, known.run, known.prompt):
    print(piece, end="", flush=True)
  print()
  return 0


def write_report(known, flags) -> int:
  from opo_jax.reports import report

  print(f"report: {report.report(known.run)}")
  return 0


def compare(known, flags) -> int:
  from opo_jax.reports import compare as comparison

  names = "-".join(run.resolve().name for run in known.runs)
  out = known.out or known.runs[0].parent / f"compare-{names}"
  page = comparison.compare(known.runs, out)
  print(page.with_suffix(".md").read_text(encoding="utf-8"))
  print(f"comparison: {page}")
  return 0


def variance(known, flags) -> int:
  config = _config_of(known.run)
  from opo_jax import variance as gradients
  from opo_jax.commands.variance import measure_variance
  from opo_jax.reports import plots

  settings = _parse(gradients.Settings(), flags)
  rows = measure_variance(config, known.run, settings)
  gradients.show(rows)
  figure = plots.variance_figure(rows, known.run / "figures" / "variance.png")
  print(f"{known.run / 'variance.json'} and {figure}")
  return 0


def export(known, flags) -> int:
  config = _config_of(known.run)
  from opo_jax.commands import export as exporting

  alone = known.format == "peft"
  out = exporting.export(config, known.run, known.out, adapter_alone=alone)
  print(f"exported: {out}")
  return 0


def plan(known, flags) -> int:
  # Compiled on the CPU of this host, whatever else it has.
  os.environ["JAX_PLATFORMS"] = "cpu"
  config = _parse(_experiment(known.experiment), flags)
  from opo_jax.planning import command
  from opo_jax.planning.plan import Assumptions

  assumptions = Assumptions(known.mean_length, known.prompt_length)
  return command.run(
    config, known.topology, assumptions, out=known.out, searching=known.search
  )


def data(known, flags) -> int:
  from opo_jax.commands.data import compare_data

  print(compare_data(known.train, known.against))
  return 0


COMMANDS = {
  "train": train,
  "reward-model": reward_model,
  "eval": evaluate,
  "sample": sample,
  "report": write_report,
  "compare": compare,
  "variance": variance,
  "export": export,
  "plan": plan,
  "data": data,
}


FOR_ONE_PROCESS = ("reward-model", "eval", "sample", "variance", "export")


def _experiment(name: str):
  """The config of `experiments/NAME.py`, from its `get_config()`."""
  roots = (pathlib.Path.cwd(), pathlib.Path(__file__).parents[1])
  root = next((root for root in roots if (root / "experiments").is_dir()), roots[0])
  names = [file.stem for file in (root / "experiments").glob("[a-z]*.py")]
  if name not in names:
    from opo_jax.config import near_names

    raise ValueError(f"There is no experiment {name!r}; {near_names(name, names)}")
  sys.path.insert(0, str(root))  # experiments build on one another
  return importlib.import_module(f"experiments.{name}").get_config()


def _config_of(run: pathlib.Path):
  from opo_jax.storage.config_file import from_dict
  from opo_jax.storage.json_files import read_json

  path = run / "config.json"
  if not path.is_file():
    raise ValueError(f"{run} is no run: it has no config.json; give RUN=directory.")
  return from_dict(read_json(path))


def _is_model(path: pathlib.Path) -> bool:
  """Whether a directory is a model in Hugging Face format: its config.json says so."""
  from opo_jax.storage.json_files import read_json

  file = path / "config.json"
  return file.is_file() and "model_type" in read_json(file)


def _config_of_model(path: str):
  """How a model is evaluated that comes from no run; flags change it."""
  from opo_jax import config

  return config.Config(
    model=config.Model(path=path),
    data=config.Data(
      tokenizer="",  # the model's own
      instruction=(
        "Please reason step by step, and put your final answer within \\boxed{}."
      ),
    ),
    reward=config.Reward(verifier="math", workers=2),
    rollout=config.Rollout(max_prompt_tokens=2048, max_new_tokens=2048),
    eval=config.Eval(benchmarks=("math500",), problems=0),
  )


def _parse(default, flags):
  """The config with the user's flags; an unknown one ends with the near names."""
  import tyro

  return tyro.cli(type(default), default=default, args=flags, prog="make … ARGS=")


if __name__ == "__main__":
  sys.exit(main())

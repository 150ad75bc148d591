"""What a run writes down: JSON lines, TensorBoard, progress on the terminal, run.json.

A value that was not measured is absent; a value that is not finite stops the run.
"""

import contextlib
import datetime
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

_PACKAGES = (
  "opo-jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "transformers",
  "tensorflow-datasets",
  "numpy",
)


class JsonLines:
  """A file of one JSON object a line, keyed by `step`, that survives kills.

  Args:
    path: made if it is missing.
    resume_at: lines of later steps, and a half-written last line, are dropped: they
      are about to be written again. None starts anew.

  Attributes:
    last: the latest step whose lines were kept; -1 where there is none.
  """

  def __init__(self, path: pathlib.Path, *, resume_at: int | None):
    kept, self.last = [], -1
    if resume_at is not None and path.exists():
      # Bytes, and newlines alone: a kill may have cut a character in two, and
      # `str.splitlines` also breaks at U+2028 and the like, which answers may contain.
      for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
          if (step := json.loads(line)["step"]) <= resume_at:
            kept.append(line + b"\n")
            self.last = max(self.last, step)
    _replace(path, b"".join(kept))
    self._path = path
    self._open()

  def _open(self):
    self._file = self._path.open("a", encoding="utf-8", newline="\n")

  def write(self, row: dict[str, Any]) -> None:
    self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
    self._file.flush()

  def keep(self) -> None:
    """Makes what was written outlive the machine.

    A disk needs `fsync`; a bucket mounted with gcsfuse gets a file when it is closed
    (since 3.0 no sooner), https://github.com/GoogleCloudPlatform/gcsfuse, semantics.md.
    """
    os.fsync(self._file.fileno())
    self._file.close()
    self._open()

  def close(self) -> None:
    self._file.close()


class TensorBoard:
  """Scalars for TensorBoard, under the names of metrics.jsonl."""

  def __init__(self, directory: pathlib.Path, *, resume_at: int | None):
    from tensorboardX import SummaryWriter

    self._writer = SummaryWriter(
      str(directory), purge_step=0 if resume_at is None else resume_at + 1
    )

  def write(self, row: dict[str, Any]) -> None:
    for name, value in row.items():
      if name != "step":
        self._writer.add_scalar(name, value, row["step"])

  def close(self) -> None:
    self._writer.close()


class Timers:
  """Wall-clock seconds of the calling thread, by phase of one step.

  Phases that follow one another without a gap add up to the step. In a profile each is
  marked by its name.
  """

  def __init__(self):
    self._start = time.perf_counter()
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    start = time.perf_counter()
    with jax.profiler.TraceAnnotation(name):
      yield
    spent = time.perf_counter() - start
    self.seconds[name] = self.seconds.get(name, 0.0) + spent

  def metrics(self) -> dict[str, float]:
    """`time/<phase>_s`, and `time/step_s` since this object was made."""
    row = {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}
    return row | {"time/step_s": time.perf_counter() - self._start}


class Terminal:
  """One progress bar with the time left, and a line now and then.

  Args:
    quiet: say nothing.
  """

  def __init__(self, *, quiet: bool = False):
    self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)

  def say(self, text: str) -> None:
    self.console.print(text, markup=False)

  @contextlib.contextmanager
  def progress(self, title: str, *, done: int, total: int):
    """Yields a function to call once a step."""
    columns = (
      TextColumn("{task.description}"),
      BarColumn(),
      MofNCompleteColumn(),
      TimeElapsedColumn(),
      TextColumn("left"),
      TimeRemainingColumn(),
    )
    # Without a terminal the bar would only leave its last state in the log.
    bar = Progress(*columns, console=self.console, disable=not sys.stdout.isatty())
    with bar:
      task = bar.add_task(title, total=total, completed=done)
      yield lambda: bar.advance(task)


def check_finite(row: dict[str, Any], step: int) -> None:
  """Stops at the first value that is NaN or infinite.

  Raises:
    FloatingPointError: names the step and the metrics.
  """
  bad = [name for name, value in row.items() if not math.isfinite(value)]
  if bad:
    raise FloatingPointError(
      f"Step {step}: {', '.join(bad)} not finite, and nothing of this step was kept. A"
      " smaller --optimizer.learning-rate or --optimizer.max-grad-norm may help."
    )


def describe_responses(
  rewards: np.ndarray, lengths: np.ndarray, finished: np.ndarray
) -> dict[str, float]:
  """Rewards and lengths of one step's responses.

  Args:
    rewards: [N]; NaN is unscorable, and is left out of every mean of rewards.
    lengths: [N] response tokens.
    finished: [N] not cut off.

  Returns:
    Metrics; those of right (reward > 0.5) or wrong answers are absent where there is
    none or a reward is below 0 or above 1, as scores of a reward model are, and the
    correlation where rewards or lengths do not vary.
  """
  scorable = ~np.isnan(rewards)
  judged = scorable & ((rewards >= 0) & (rewards <= 1))[scorable].all()
  right = judged & (rewards > 0.5)
  wrong = judged & ~right
  row = {
    "reward/unscorable_fraction": float(1.0 - scorable.mean()),
    "response_length/mean": float(lengths.mean()),
    "response_length/cv": float(lengths.std() / lengths.mean()),
    "response_length/truncated_fraction": float(1.0 - finished.mean()),
    "rollout/tokens": int(lengths.sum()),
  }
  if scorable.any():
    row["reward/mean"] = float(rewards[scorable].mean())
  if right.any():
    row["response_length/correct_mean"] = float(lengths[right].mean())
  if wrong.any():
    row["response_length/wrong_mean"] = float(lengths[wrong].mean())
  if scorable.any() and np.ptp(lengths[scorable]) and np.ptp(rewards[scorable]):
    correlation = np.corrcoef(lengths[scorable], rewards[scorable])[0, 1]
    row["response_length/reward_correlation"] = float(correlation)
  return row


def write_json(path: pathlib.Path, values: Any) -> None:
  """Writes a file of indented JSON, whole."""
  _replace(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _replace(path: pathlib.Path, content: bytes) -> None:
  """Writes a file whole: a kill leaves the old one or the new one."""
  new = path.with_suffix(".new")
  new.write_bytes(content)
  new.replace(path)


def write_run_json(
  directory: pathlib.Path, *, seed: int, devices: dict[str, Any]
) -> None:
  """Where a run comes from. A resumed run adds an entry; the first stays first."""
  path = directory / "run.json"
  starts = json.loads(path.read_text())["starts"] if path.exists() else []
  commit, dirty = _commit()
  start = {
    "command": shlex.join(["python", "-m", "opo_jax", *sys.argv[1:]]),
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": commit,
    "dirty": dirty,
    "seed": seed,
    "python": platform.python_version(),
    "versions": {name: _version(name) for name in _PACKAGES},
    **devices,
  }
  starts.append(start)
  write_json(path, {**starts[0], "starts": starts})


def add_to_run_json(directory: pathlib.Path, **facts: Any) -> None:
  """Puts what showed only later into the newest start of run.json."""
  path = directory / "run.json"
  starts = json.loads(path.read_text())["starts"]
  starts[-1] |= facts
  write_json(path, {**starts[0], "starts": starts})


def _version(package):
  try:
    return version(package)
  except PackageNotFoundError:
    return None


def _commit():
  """(commit, dirty) of the source tree; (None, None) where it is not a checkout."""
  root = pathlib.Path(__file__).parent

  def git(*words):
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

  try:
    return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain").strip())
  except (OSError, subprocess.CalledProcessError):
    return None, None

"""What a run writes every step: metrics.jsonl, samples.jsonl, TensorBoard."""

import contextlib
import math
import pathlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from opo_jax.storage.json_files import JsonLines


class Responses(NamedTuple):
  """The responses of one step, some of which go to samples.jsonl.

  Attributes:
    problems: G, indexed by `rollouts.prompt_ids`.
    texts: N responses.
    rewards: [N] after shaping; NaN is masked out.
    rollouts: N rows, on the host.
    advantages: [N].
  """

  problems: Sequence[Any]
  texts: Sequence[str]
  rewards: np.ndarray
  rollouts: Any
  advantages: Any


class Record:
  """metrics.jsonl, samples.jsonl and TensorBoard, side by side.

  A thread writes a step while the next one samples. An error of the thread is raised by
  the next call.

  Args:
    directory: of the run.
    resume_at: the step after which the run resumes; None starts anew.
    samples: responses written per step.
  """

  def __init__(
    self, directory: pathlib.Path, *, resume_at: int | None, samples: int = 0
  ):
    self._metrics = JsonLines(directory / "metrics.jsonl", resume_at=resume_at)
    self.last = self._metrics.last  # the latest step that metrics.jsonl holds
    self._samples = JsonLines(directory / "samples.jsonl", resume_at=resume_at)
    self._board = TensorBoard(directory / "tensorboard", resume_at=resume_at)
    self._num_samples = samples
    self._thread = ThreadPoolExecutor(1, "record")
    self._writing: Future | None = None

  def metrics(self, row: dict[str, Any]) -> None:
    """Writes a row of metrics."""
    self._metrics.write(row)
    self._board.write(row)

  def samples(self, step: int, responses: Responses) -> None:
    """Writes some responses of a step, evenly spaced over its rows."""
    problems, texts, rewards, rollouts, advantages = responses
    lengths, finished = np.asarray(rollouts.lengths), np.asarray(rollouts.finished)
    groups, advantages = np.asarray(rollouts.prompt_ids), np.asarray(advantages)
    count = min(self._num_samples, len(texts))
    for i in np.linspace(0, len(texts) - 1, count).astype(int):
      row = {
        "step": step,
        "prompt": problems[groups[i]].question,
        "response": texts[i],
        "reference": problems[groups[i]].answer,
        "length": int(lengths[i]),
        "finished": bool(finished[i]),
        "advantage": float(advantages[i]),
      }
      if not np.isnan(rewards[i]):
        row["reward"] = float(rewards[i])
      self._samples.write(row)

  def step(self, row: dict[str, Any], responses: Responses) -> None:
    """Starts writing a step: its metrics, and some of its responses."""
    self.wait()
    self._writing = self._thread.submit(self._write, row, responses)

  def _write(self, row, responses):
    self.metrics(row)
    self.samples(row["step"], responses)

  def wait(self) -> None:
    """Returns when everything is written."""
    if self._writing is not None:
      writing, self._writing = self._writing, None
      writing.result()

  def sync(self) -> None:
    """Returns when everything is written where it outlives the machine."""
    self.wait()
    self._metrics.sync()
    self._samples.sync()

  def __enter__(self) -> "Record":
    return self

  def __exit__(self, *error) -> None:
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      for part in (self._metrics, self._samples, self._board):
        part.close()


class NoRecord(contextlib.nullcontext):
  """The `Record` of a process that leaves the writing to the first one."""

  last = math.inf  # no line is missing

  def __enter__(self) -> "NoRecord":
    return self

  def metrics(self, row: dict[str, Any]) -> None:
    """Writes nothing."""

  def step(self, row: dict[str, Any], responses: Responses) -> None:
    """Writes nothing."""

  def sync(self) -> None:
    """Waits for nothing."""


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

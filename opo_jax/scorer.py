"""Scoring a batch of answers, many of them while others are still being sampled.

The sampler hands out rows that have ended; they are scored on a thread, whose verifiers
are processes of their own. What is left when sampling is over is scored then. Every
result is kept under its row, so that nothing depends on when it was scored.
"""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numpy as np


class Answer(NamedTuple):
  """One response, scored.

  Attributes:
    text: without special tokens.
    reward: NaN where it could not be scored.
    reason: why it could not be scored.
  """

  text: str
  reward: float
  reason: str = ""


class Scoring:
  """The scoring of one batch.

  Args:
    score: (prompt_ids [n], tokens [n, T], lengths [n], finished [n]), NumPy arrays ->
      n answers. It is never called by two threads at a time.
    thread: with a single worker, where rows are scored that come early; None scores
      everything in `finish`, on the caller's thread.

  Example, with rows as the sampler hands them out (-1: none):

  >>> from concurrent.futures import ThreadPoolExecutor
  >>> from types import SimpleNamespace
  >>> def score(prompt_ids, tokens, lengths, finished):
  ...   return [Answer(str(row[:l]), float(l)) for row, l in zip(tokens, lengths)]
  >>> batch = SimpleNamespace(prompt_ids=np.array([0, 0]), lengths=np.array([1, 2]),
  ...   tokens=np.array([[7, 0], [8, 9]]), finished=np.array([True, False]))
  >>> early = SimpleNamespace(rows=np.array([1, -1]), prompt_ids=np.array([0, 0]),
  ...   tokens=np.array([[8, 9], [0, 0]]), lengths=np.array([2, 0]),
  ...   finished=np.array([False, False]))
  >>> with ThreadPoolExecutor(1) as thread:
  ...   scoring = Scoring(score, thread)
  ...   scoring.add(early)
  ...   [answer.text for answer in scoring.finish(batch)], scoring.num_early
  (['[7]', '[8 9]'], 1)
  """

  def __init__(
    self, score: Callable[..., Sequence[Answer]], thread: Executor | None = None
  ):
    self._score, self._thread = score, thread
    self._answers: dict[int, Answer] = {}
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._jobs: list[Future] = []
    self.num_early = 0  # answers that came before `finish`

  @property
  def wants_rows(self) -> bool:
    """Whether rows that come early are of use."""
    return self._thread is not None

  def add(self, ended: Any) -> None:
    """Takes rows that have ended, and returns at once.

    Args:
      ended: `sampler.Ended`; its arrays are read, and waited for, on the thread.
    """
    self._queue.put(ended)
    self._jobs.append(self._thread.submit(self._score_queue))

  def _score_queue(self) -> None:
    # Together all that came while the last call was scoring: one slow answer then
    # holds up a call, not a queue of them.
    while not self._queue.empty():
      parts = []
      while not self._queue.empty():
        parts.append(self._queue.get())
      rows = np.concatenate([np.asarray(part.rows) for part in parts])
      real = rows >= 0
      if real.any():
        names = ("prompt_ids", "tokens", "lengths", "finished")
        columns = (
          np.concatenate([np.asarray(getattr(part, name)) for part in parts])[real]
          for name in names
        )
        self._keep(rows[real], *columns)

  def finish(self, rollouts: Any, rows: np.ndarray | None = None) -> list[Answer]:
    """All answers of the batch, in the order of its rows.

    Args:
      rollouts: the whole batch, those rows included that were added before.
      rows: the rows to score; None: all.

    Raises:
      What `score` raised, on the thread or here.
    """
    for job in self._jobs:
      job.result()
    self.num_early = len(self._answers)
    rows = np.arange(len(rollouts.lengths)) if rows is None else rows
    left = np.array([row for row in rows if row not in self._answers], int)
    if len(left):
      names = ("prompt_ids", "tokens", "lengths", "finished")
      self._keep(left, *(np.asarray(getattr(rollouts, name))[left] for name in names))
    return [self._answers[row] for row in rows.tolist()]

  def _keep(self, rows, *columns) -> None:
    answers = self._score(*columns)
    self._answers.update(zip(rows.tolist(), answers, strict=True))

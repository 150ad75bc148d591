"""Scoring of one batch that begins while the batch is still being sampled.

The sampler hands out rows that have ended; a thread scores them, whose verifiers are
processes of their own. `finish` scores the rest when sampling is over. Every result is
kept under its row, so that no reward depends on when it was computed.
"""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np


class ScoredResponse(NamedTuple):
  """One response with its reward.

  Attributes:
    text: without special tokens.
    reward: NaN where it is unscorable.
    reason: why it is unscorable.
  """

  text: str
  reward: float
  reason: str = ""


class EarlyScoring:
  """The scoring of one batch, which begins while the batch is still being sampled.

  Args:
    score: (prompt_ids [n], tokens [n, T], lengths [n], finished [n]), NumPy arrays ->
      n scored responses. Never called by two threads at a time.
    thread: with a single worker, where early rows are scored; None scores everything in
      `finish`, on the caller's thread.

  Example, with rows as the sampler hands them out (-1: none):

  >>> from types import SimpleNamespace
  >>> def score(prompt_ids, tokens, lengths, finished):
  ...   rows = zip(tokens, lengths)
  ...   return [ScoredResponse(str(row[:l]), float(l)) for row, l in rows]
  >>> batch = SimpleNamespace(prompt_ids=np.array([0, 0]), lengths=np.array([1, 2]),
  ...   tokens=np.array([[7, 0], [8, 9]]), finished=np.array([True, False]))
  >>> early = SimpleNamespace(rows=np.array([1, -1]), prompt_ids=np.array([0, 0]),
  ...   tokens=np.array([[8, 9], [0, 0]]), lengths=np.array([2, 0]),
  ...   finished=np.array([False, False]))
  >>> with ThreadPoolExecutor(1) as thread:
  ...   scoring = EarlyScoring(score, thread)
  ...   scoring.add(early)
  ...   [each.text for each in scoring.finish(batch)], scoring.num_early
  (['[7]', '[8 9]'], 1)
  """

  def __init__(
    self,
    score: Callable[..., Sequence[ScoredResponse]],
    thread: ThreadPoolExecutor | None = None,
  ):
    self._score, self._thread = score, thread
    self._scored: dict[int, ScoredResponse] = {}
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._jobs: list[Future] = []
    self.num_early = 0  # rows that were scored before `finish`

  def add(self, ended: Any) -> None:
    """Takes rows that have ended, and returns at once.

    Args:
      ended: `sampler.Ended`; the thread reads its arrays, and waits for them.
    """
    self._queue.put(ended)
    self._jobs.append(self._thread.submit(self._score_queue))

  def _score_queue(self) -> None:
    # Scores together all rows that came during the last call: one slow response then
    # holds up one call, not a queue of calls.
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

  def finish(
    self, rollouts: Any, rows: np.ndarray | None = None
  ) -> list[ScoredResponse]:
    """All scored responses of the batch, in the order of its rows.

    Args:
      rollouts: the whole batch, rows given to `add` included.
      rows: the rows to score; None: all.

    Raises:
      What `score` raised, on the thread or here.
    """
    for job in self._jobs:
      job.result()
    self.num_early = len(self._scored)
    rows = np.arange(len(rollouts.lengths)) if rows is None else rows
    left = np.array([row for row in rows if row not in self._scored], int)
    if len(left):
      names = ("prompt_ids", "tokens", "lengths", "finished")
      self._keep(left, *(np.asarray(getattr(rollouts, name))[left] for name in names))
    return [self._scored[row] for row in rows.tolist()]

  def _keep(self, rows, *columns) -> None:
    scored = self._score(*columns)
    self._scored.update(zip(rows.tolist(), scored, strict=True))

"""Rewards do not depend on when an answer was scored; slow ones wait with nobody."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from opo_jax.rewards import RewardPool
from opo_jax.rewards.early import EarlyScoring, ScoredResponse

LENGTHS = np.array([2, 1, 3, 1, 2, 3, 1])
BATCH = SimpleNamespace(
  prompt_ids=np.array([0, 0, 1, 1, 2, 2, 2]),
  tokens=np.arange(21).reshape(7, 3),
  lengths=LENGTHS,
  finished=LENGTHS < 3,
)


def ended(*rows):
  """Rows of the batch as the sampler hands them out; -1 is none."""
  rows = np.array(rows)
  names = ("prompt_ids", "tokens", "lengths", "finished")
  return SimpleNamespace(
    rows=rows, **{name: getattr(BATCH, name)[np.maximum(rows, 0)] for name in names}
  )


def score(prompt_ids, tokens, lengths, finished):
  """An answer that shows everything it was made of."""
  columns = zip(prompt_ids, tokens, lengths, finished, strict=True)
  return [
    ScoredResponse(f"{p} {t[:n].tolist()}", float(n), reason=str(f))
    for p, t, n, f in columns
  ]


EXPECTED = score(BATCH.prompt_ids, BATCH.tokens, BATCH.lengths, BATCH.finished)


@pytest.mark.parametrize(
  "early", [[], [(6,)], [(3, -1), (-1, -1), (0, 5)], [(2, 1, 0), (6, 5, 4), (3,)]]
)
def test_answers_do_not_depend_on_when_they_were_scored(early):
  with ThreadPoolExecutor(1) as thread:
    scoring = EarlyScoring(score, thread)
    for rows in early:
      scoring.add(ended(*rows))
    assert scoring.finish(BATCH) == EXPECTED
  assert scoring.num_early == sum(row >= 0 for rows in early for row in rows)


def test_without_a_thread_everything_is_scored_at_the_end():
  scoring = EarlyScoring(score)
  assert scoring.finish(BATCH) == EXPECTED


def test_adding_does_not_wait_and_what_came_meanwhile_is_scored_together():
  go_on, calls = threading.Event(), []

  def slow(prompt_ids, *rest):
    calls.append(len(prompt_ids))
    assert go_on.wait(20)
    return score(prompt_ids, *rest)

  with ThreadPoolExecutor(1) as thread:
    scoring = EarlyScoring(slow, thread)
    scoring.add(ended(1))
    while not calls:
      time.sleep(0.001)
    scoring.add(ended(0, -1))
    scoring.add(ended(4, 3))
    assert calls == [1], "they wait, and `add` does not"
    go_on.set()
    assert scoring.finish(BATCH) == EXPECTED
  # One early, three that came while it was scored, three that came last.
  assert calls == [1, 3, 3]


def test_an_error_on_the_thread_is_raised_where_the_answers_are_wanted():
  def fail(*_):
    raise OSError("no verifier")

  with ThreadPoolExecutor(1) as thread:
    scoring = EarlyScoring(fail, thread)
    scoring.add(ended(1))
    with pytest.raises(OSError, match="no verifier"):
      scoring.finish(BATCH)


def sleep(response, reference):
  time.sleep(60)
  return 0.0


def test_closing_the_pool_ends_a_scoring_that_still_runs():
  """As Ctrl-C while sampling does: neither the thread nor a worker is left."""

  def verify(prompt_ids, *_):
    begun.set()
    pool.score(["a"] * len(prompt_ids), ["b"] * len(prompt_ids))

  begun = threading.Event()
  with ThreadPoolExecutor(1) as thread:
    with RewardPool(sleep, workers=1, timeout_s=50) as pool:
      scoring = EarlyScoring(verify, thread)
      scoring.add(ended(1))
      assert begun.wait(20)
      time.sleep(2)  # the worker sleeps by now, or is about to start
    with pytest.raises(ValueError, match="closed"):
      scoring.finish(BATCH)
    assert not pool._context._processes

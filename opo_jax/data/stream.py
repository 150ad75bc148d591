"""Endless, shuffled, resumable streams of problems, for one or several processes."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from opo_jax.data.prompts import Problem

T = TypeVar("T")


class OnDemand(Sequence[T]):
  """A sequence whose items are created on first access, each once.

  Args:
    length: number of items.
    make: index -> item.

  >>> squares = OnDemand(3, lambda i: print("made", i) or i * i)
  >>> squares[-1], squares[2], len(squares)
  made 2
  (4, 4, 3)
  """

  def __init__(self, length: int, make: Callable[[int], T]):
    self._places, self._make = range(length), functools.cache(make)

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index: int) -> T:
    return self._make(self._places[operator.index(index)])


class ProblemStream:
  """An endless, shuffled, resumable stream of problems.

  Epoch e visits every problem once, in a permutation that depends on (seed, e) only.

  All processes have the same stream at the same position and take the same problems. A
  process reads only the problems that it accesses: its share of a batch. No problem is
  sampled by two processes, and a checkpoint is valid for any number of processes.

  Args:
    problems: any sequence; it is only indexed.
    seed: non-negative; it determines the order.

  Raises:
    ValueError: no problems, or a negative seed.

  Example: `ProblemStream(load("gsm8k", "train"), seed=0).take(32)`
  """

  def __init__(self, problems: Sequence[Problem], *, seed: int):
    if seed < 0:
      raise ValueError(f"the seed of a stream must be 0 or more, got {seed}.")
    if not len(problems):
      raise ValueError(
        "0 problems cannot be a stream; check the split and its filters."
      )
    self._problems = problems
    self._seed = operator.index(seed)
    self._epoch = 0
    self._position = 0
    self._order = self._epoch_order()

  def take(self, n: int) -> Sequence[Problem]:
    """Takes the next n problems; each is read on first access.

    If an epoch ends within the n problems, a problem can occur twice, once from each
    epoch. n may exceed an epoch.
    """
    if n < 0:
      raise ValueError(f"cannot take {n} problems; expected 0 or more.")
    places = []
    for _ in range(n):
      if self._position == len(self._order):
        self._epoch += 1
        self._position = 0
        self._order = self._epoch_order()
      places.append(int(self._order[self._position]))
      self._position += 1
    return OnDemand(n, lambda i: self._problems[places[i]])

  @property
  def num_taken(self) -> int:
    """The number of problems taken so far."""
    return self._epoch * len(self._order) + self._position

  def state(self) -> dict[str, int]:
    """Returns the position in the stream as integers, for JSON.

    `epoch` and `position` (problems taken in the epoch) are the position; it is valid
    for `size` and `seed`.
    """
    return {
      "epoch": self._epoch,
      "position": self._position,
      "size": len(self._problems),
      "seed": self._seed,
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Restores the position of a `state()`.

    Raises:
      ValueError: a state of other data or another seed, or a malformed one; the stream
        is then unchanged.
    """
    own = self.state()
    if set(state) != set(own):
      raise ValueError(
        f"a stream's state has the keys {sorted(own)}, got {sorted(map(str, state))}; "
        "restore a result of ProblemStream.state()."
      )
    remedy = {
      "size": "problems; resume with the data the run was started with",
      "seed": "as seed; resume with the seed the run was started with",
    }
    for key, advice in remedy.items():
      if state[key] != own[key]:
        raise ValueError(
          f"the saved stream has {key} {state[key]!r}, this one {own[key]} {advice}."
        )
    epoch, position = state["epoch"], state["position"]
    whole = type(epoch) is int and type(position) is int
    if not (whole and epoch >= 0 and 0 <= position <= len(self._order)):
      raise ValueError(
        f"epoch {epoch!r}, position {position!r} is no place in this stream; expected "
        f"integers, epoch >= 0 and 0 <= position <= {len(self._order)}."
      )
    self._epoch, self._position = epoch, position
    self._order = self._epoch_order()

  def _epoch_order(self) -> np.ndarray:
    """The indices of the problems, in the order of this epoch."""
    entropy = np.random.SeedSequence(self._seed, spawn_key=(self._epoch,))
    # Sorted raw bits, not Generator.permutation: NumPy keeps the bits of Philox over
    # versions, but not the algorithms of Generator, and a run may resume after an
    # upgrade.
    keys = np.random.Philox(entropy).random_raw(len(self._problems))
    return np.argsort(keys, kind="stable")


class MixtureStream:
  """A weighted mixture of streams of several sources.

  After n problems, the count of each of k sources differs from its share of n by at
  most 1 - 1/(2k - 2), less than one. The next problem comes from the source with the
  earliest deadline among those behind their share (Tijdeman's algorithm for the
  chairman assignment problem, https://doi.org/10.1016/0012-365X(80)90269-1). The
  mixture is deterministic: equal in every process and after every resume, without
  random variation between batches. Within a source the order is that of its
  `ProblemStream`; a small source of large weight is in its second epoch while a large
  one is still in its first.

  Args:
    parts: name -> (weight, problems); weights above 0, of any sum.
    seed: of the order of every part.

  Raises:
    ValueError: no parts, a weight of 0, or an error of `ProblemStream`.

  Example: `MixtureStream({"gsm8k": (1, a), "math": (2, b)}, seed=0).take(32)`
  """

  def __init__(
    self, parts: Mapping[str, tuple[float, Sequence[Problem]]], *, seed: int
  ):
    weights = {name: weight for name, (weight, _) in parts.items()}
    if not weights or not all(0 < weight < float("inf") for weight in weights.values()):
      raise ValueError(
        f"a mixture needs sources with weights above 0, got {weights or 'none'}."
      )
    self._shares = {n: w / sum(weights.values()) for n, w in weights.items()}
    self._streams = {
      name: ProblemStream(problems, seed=seed) for name, (_, problems) in parts.items()
    }

  def take(self, n: int) -> Sequence[Problem]:
    """Takes the next n problems; each is read on first access."""
    if n < 0:
      raise ValueError(f"cannot take {n} problems; expected 0 or more.")
    taken = {name: stream.num_taken for name, stream in self._streams.items()}
    slack = 1 / max(2 * len(taken) - 2, 1)
    taken_one_by_one = []
    for _ in range(n):
      place = sum(taken.values()) + 1
      # At least one source is behind by the slack; 1e-9 absorbs rounding.
      behind = [
        name
        for name, share in self._shares.items()
        if share * place - taken[name] >= slack - 1e-9
      ]
      name = min(behind, key=lambda s: (taken[s] + 1 - slack) / self._shares[s])
      taken[name] += 1
      taken_one_by_one.append(self._streams[name].take(1))
    return OnDemand(n, lambda i: taken_one_by_one[i][0])

  def state(self) -> dict[str, Any]:
    """Returns the position in every source, and the shares for which it is valid."""
    return {
      "shares": dict(self._shares),
      "streams": {name: stream.state() for name, stream in self._streams.items()},
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Restores the position of a `state()`.

    Raises:
      ValueError: a state of another mixture; the stream is then unchanged.
    """
    if state.get("shares") != self._shares or set(state.get("streams", ())) != set(
      self._streams
    ):
      raise ValueError(
        f"the saved mixture has the shares {state.get('shares')}, this one"
        f" {self._shares}; resume with the --data.train the run was started with."
      )
    before = self.state()["streams"]
    try:
      for name, stream in self._streams.items():
        stream.restore(state["streams"][name])
    except ValueError:
      for name, stream in self._streams.items():
        stream.restore(before[name])
      raise

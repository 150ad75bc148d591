"""Selects the training problems of a source.

A filter selects indices; `Kept` reads the problems at them, so that nothing is copied
and rows are decoded on access.
"""

import json
import operator
import pathlib
from collections.abc import Callable, Mapping, Sequence

from opo_jax.data.prompts import Problem


class Kept(Sequence[Problem]):
  """The problems of a sequence at some indices, in order."""

  def __init__(self, problems: Sequence[Problem], places: Sequence[int]):
    self._problems, self._places = problems, places

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return Kept(self._problems, self._places[index])
    return self._problems[self._places[operator.index(index)]]


def keep(
  problems: Sequence[Problem], wanted: Callable[[Problem], bool]
) -> Sequence[Problem]:
  """Selects the wanted problems; returns the same sequence if all are wanted."""
  places = [i for i, problem in enumerate(problems) if wanted(problem)]
  return problems if len(places) == len(problems) else Kept(problems, places)


def read_pass_rates(path: str | pathlib.Path) -> dict[str, float]:
  """Reads a policy's pass rate on each problem.

  The file has one JSON object per line and problem; other keys are ignored:

      {"id": "gsm8k/train/17", "pass_rate": 0.375}

  Returns:
    id -> pass rate, from 0 to 1.

  Raises:
    ValueError: no such file, a malformed line, a rate out of its range, or a repeated
      id.
  """
  rates: dict[str, float] = {}
  try:
    lines = pathlib.Path(path).expanduser().read_text().splitlines()
  except OSError as error:
    raise ValueError(
      f"the pass rates {path} cannot be read ({error.strerror}); `make eval` writes"
      " such a file (--data.pass-rate-file)."
    ) from error
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      name, rate = row["id"], float(row["pass_rate"])
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f'{path} line {number} is no pass rate; expected {{"id": "gsm8k/train/17",'
        f' "pass_rate": 0.375}}, got {line[:80]!r}.'
      ) from error
    if not 0 <= rate <= 1 or name in rates:
      raise ValueError(
        f"{path} line {number}: {name!r} has the pass rate {rate}"
        f"{' a second time' if name in rates else '; expected 0 to 1'}."
      )
    rates[name] = rate
  return rates


def by_pass_rate(
  problems: Sequence[Problem],
  rates: Mapping[str, float],
  *,
  lowest: float,
  highest: float,
) -> Sequence[Problem]:
  """Selects problems with lowest <= pass rate <= highest; drops those without a rate.

  Problems that the policy always or never solves have zero advantage: 0.01 and 0.99
  exclude them.

  Raises:
    ValueError: no problem has a rate: the rates belong to other data.
  """
  if len(problems) and not any(problem.id in rates for problem in problems):
    raise ValueError(
      f"none of the {len(rates)} pass rates is of these problems, whose ids are like"
      f" {problems[0].id!r}; measure them on this source (--data.pass-rate-file)."
    )
  return keep(problems, lambda each: lowest <= rates.get(each.id, -1.0) <= highest)

"""Training problems that are in an evaluation set, word for word or nearly.

A policy that was trained on its test has a good test score and nothing else. `find`
compares two sets, `report` prints what it found.
"""

import collections
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from opo_jax.data.prompts import Problem

# Of `words`. Shorter questions are compared as a whole.
NGRAM = 8
# The share of the shorter question's n-grams that occur in the other one.
THRESHOLD = 0.6

# Kana and Chinese characters: no spaces are between their words, so each one is a word.
_CHARACTER = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# A word, a number, the point of a decimal, or an operator: ASCII's, plus-minus, times,
# division, and Unicode's arrows and mathematical operators.
_WORD = re.compile(
  rf"[{_CHARACTER}]|[^\W\d_{_CHARACTER}]+|\d+|(?<=\d)\.(?=\d)"
  r"|[-+*/^=<>\xb1\xd7\xf7\u2190-\u22ff]"
)


class Match(NamedTuple):
  """A training problem and the evaluation problem it repeats.

  Attributes:
    train: the training problem.
    held_out: the evaluation problem, the one of the largest overlap.
    overlap: share of common n-grams, 1.0 where the match is exact.
    exact: the same letters, digits and operators in the same order.
  """

  train: Problem
  held_out: Problem
  overlap: float
  exact: bool


def find(
  train: Sequence[Problem],
  held_out: Sequence[Problem],
  *,
  ngram: int = NGRAM,
  threshold: float = THRESHOLD,
) -> list[Match]:
  r"""Finds the training problems that are in an evaluation set.

      overlap = |A ∩ B| / min(|A|, |B|)      A, B: the sets of word n-grams

  Exact: equal `words`, without regard to case, spacing and LaTeX's punctuation. Fuzzy:
  an overlap of at least `threshold`. A question without words repeats none. Problems
  made of one template
  ("How many … are there such that …") share some n-grams and stay below; the same
  problem with other numbers may be above: look at the report.

  Args:
    train: what may go.
    held_out: what nothing may be in.
    ngram: words in a row; a question with fewer is compared by its whole.
    threshold: above 0, at most 1.

  Returns:
    One match at most for each training problem, in their order.

  >>> ask = "How many positive integers below 100 are multiples of 7?"
  >>> other = "How many positive integers less than 10 are even?"
  >>> matches = find(
  ...   [Problem("a", ask, "14"), Problem("b", other, "4")],
  ...   [Problem("c", "How many positive integers below $100$ are multiples of 7", "")],
  ... )
  >>> [(match.train.id, match.held_out.id, match.exact) for match in matches]
  [('a', 'c', True)]
  """
  if ngram < 1 or not 0 < threshold <= 1:
    raise ValueError(
      f"expected n-grams of 1 word or more and a threshold above 0 and at most 1, got"
      f" {ngram} and {threshold}."
    )
  exact: dict[str, int] = {}
  holders = collections.defaultdict(list)
  sizes = []
  for index, problem in enumerate(held_out):
    found = words(problem.question)
    exact.setdefault("".join(found), index)
    grams = _grams(found, ngram)
    sizes.append(len(grams))
    for gram in grams:
      holders[gram].append(index)
  matches = []
  for problem in train:
    found = words(problem.question)
    if not found:
      continue
    if (index := exact.get("".join(found))) is not None:
      matches.append(Match(problem, held_out[index], 1.0, True))
      continue
    grams = _grams(found, ngram)
    common = collections.Counter(i for gram in grams for i in holders.get(gram, ()))
    overlaps = {i: n / min(len(grams), sizes[i]) for i, n in common.items()}
    index = max(overlaps, key=overlaps.__getitem__, default=None)
    if index is not None and overlaps[index] >= threshold:
      matches.append(Match(problem, held_out[index], overlaps[index], False))
  return matches


def words(question: str) -> list[str]:
  """Words, numbers and operators: what two questions must differ in to be two.

  >>> words("What is $6 - 2.5$?"), words("求6÷2")
  (['what', 'is', '6', '-', '2', '.', '5'], ['求', '6', '÷', '2'])
  """
  return _WORD.findall(unicodedata.normalize("NFC", question).casefold())


def report(found: Mapping[str, Sequence[Match]], sizes: Mapping[str, int]) -> str:
  """A table of matches: a line for each pair of sets, then the fuzzy ones to look at.

  Args:
    found: "train in held-out" -> its matches.
    sizes: the same names -> number of training problems.
  """
  width = max(map(len, found), default=0)
  lines = [f"{'':{width}}   problems   exact   fuzzy"]
  for name, matches in found.items():
    exact = sum(match.exact for match in matches)
    lines.append(f"{name:{width}} {sizes[name]:10,} {exact:7} {len(matches) - exact:7}")
  for matches in found.values():
    for match in matches:
      if not match.exact:
        lines.append(
          f"{match.train.id} is {match.overlap:.0%} in {match.held_out.id}:"
          f" {' '.join(match.train.question.split())[:100]!r}"
        )
  return "\n".join(lines)


def _grams(words: Sequence[str], ngram: int) -> set[tuple[str, ...]]:
  count = max(1, len(words) - ngram + 1)
  return {tuple(words[i : i + ngram]) for i in range(count)}

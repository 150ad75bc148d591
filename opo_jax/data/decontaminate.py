"""Decontamination: finds training problems that duplicate held-out problems.

Scores on problems that were trained on say nothing of generalisation. `find_duplicates`
compares two sets, `report` tabulates the duplicates.
"""

import collections
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from opo_jax.data.prompts import Problem

# Words of an n-gram. Shorter questions are compared as a whole.
NGRAM = 8
# The least fraction of the shorter question's n-grams that the other one contains.
THRESHOLD = 0.6

# Kana and Chinese characters: without spaces between words, each character is a word.
_CHARACTER = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# A word, a number, a decimal point, or an operator: those of ASCII, plus-minus, times,
# division, and the arrows and mathematical operators of Unicode.
_WORD = re.compile(
  rf"[{_CHARACTER}]|[^\W\d_{_CHARACTER}]+|\d+|(?<=\d)\.(?=\d)"
  r"|[-+*/^=<>\xb1\xd7\xf7\u2190-\u22ff]"
)


class Duplicate(NamedTuple):
  """A training problem and the held-out problem that it duplicates.

  Attributes:
    train: the training problem.
    held_out: the held-out problem with the largest overlap.
    overlap: fraction of common n-grams, 1.0 for an exact duplicate.
    exact: equal letters, digits and operators in equal order.
  """

  train: Problem
  held_out: Problem
  overlap: float
  exact: bool


def find_duplicates(
  train: Sequence[Problem],
  held_out: Sequence[Problem],
  *,
  ngram: int = NGRAM,
  threshold: float = THRESHOLD,
) -> list[Duplicate]:
  r"""Finds the training problems that duplicate held-out problems.

      overlap = |A ∩ B| / min(|A|, |B|)      A, B: the sets of word n-grams

  Exact: equal `words`, regardless of case, spacing and LaTeX's punctuation. Fuzzy: an
  overlap of at least `threshold`. A question without words has no duplicate. Problems
  of one template ("How many … are there such that …") share some n-grams and stay below
  the threshold; the same problem with other numbers may exceed it: read the report.

  Args:
    train: training problems.
    held_out: the problems that training must not contain.
    ngram: words of an n-gram; a shorter question is compared as a whole.
    threshold: above 0, at most 1.

  Returns:
    At most one duplicate for each training problem, in their order.

  >>> ask = "How many positive integers below 100 are multiples of 7?"
  >>> other = "How many positive integers less than 10 are even?"
  >>> found = find_duplicates(
  ...   [Problem("a", ask, "14"), Problem("b", other, "4")],
  ...   [Problem("c", "How many positive integers below $100$ are multiples of 7", "")],
  ... )
  >>> [(each.train.id, each.held_out.id, each.exact) for each in found]
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
  duplicates = []
  for problem in train:
    found = words(problem.question)
    if not found:
      continue
    if (index := exact.get("".join(found))) is not None:
      duplicates.append(Duplicate(problem, held_out[index], 1.0, True))
      continue
    grams = _grams(found, ngram)
    common = collections.Counter(i for gram in grams for i in holders.get(gram, ()))
    overlaps = {i: n / min(len(grams), sizes[i]) for i, n in common.items()}
    index = max(overlaps, key=overlaps.__getitem__, default=None)
    if index is not None and overlaps[index] >= threshold:
      duplicates.append(Duplicate(problem, held_out[index], overlaps[index], False))
  return duplicates


def words(question: str) -> list[str]:
  """Splits a question into words, numbers and operators: its identity here.

  >>> words("What is $6 - 2.5$?"), words("求6÷2")
  (['what', 'is', '6', '-', '2', '.', '5'], ['求', '6', '÷', '2'])
  """
  return _WORD.findall(unicodedata.normalize("NFC", question).casefold())


def report(found: Mapping[str, Sequence[Duplicate]], sizes: Mapping[str, int]) -> str:
  """Tabulates duplicates: a line for each pair of sets, then every fuzzy duplicate.

  Args:
    found: "train in held-out" -> its duplicates.
    sizes: the same names -> number of training problems.
  """
  width = max(map(len, found), default=0)
  lines = [f"{'':{width}}   problems   exact   fuzzy"]
  for name, duplicates in found.items():
    exact = sum(each.exact for each in duplicates)
    fuzzy = len(duplicates) - exact
    lines.append(f"{name:{width}} {sizes[name]:10,} {exact:7} {fuzzy:7}")
  for duplicates in found.values():
    for each in duplicates:
      if not each.exact:
        lines.append(
          f"{each.train.id} is {each.overlap:.0%} in {each.held_out.id}:"
          f" {' '.join(each.train.question.split())[:100]!r}"
        )
  return "\n".join(lines)


def _grams(words: Sequence[str], ngram: int) -> set[tuple[str, ...]]:
  count = max(1, len(words) - ngram + 1)
  return {tuple(words[i : i + ngram]) for i in range(count)}

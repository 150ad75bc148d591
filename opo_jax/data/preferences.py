"""Preference pairs: from a user's file, or an embedded task with a known true score.

A question of the embedded task is an order, `tea jam rice`; the best response repeats
it and closes politely, `tea jam rice enjoy`. A formula, `true_score`, rates a response;
only the evaluation may use it. A reward model learns from simulated labels: which of
two responses to an order is preferred, with label noise,

    P(a preferred to b) = sigmoid(SHARPNESS (true_score(a) - true_score(b)))

the model of Bradley and Terry (https://doi.org/10.2307/2334029). Responses come from a
careless waiter, who also provides the demonstrations of SFT: he drops and permutes
items, adds others, says `er`, omits the closing or repeats it, repeats himself, and
sometimes does not stop. About one response in seven is optimal.
"""

import json
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import pre_tokenizers

from opo_jax.data.arithmetic import Demonstration
from opo_jax.data.prompts import Problem, embedded_tokenizer

ITEMS = ("tea", "milk", "jam", "rice", "eggs", "salt", "soap", "figs", "corn", "nuts")
CLOSING, FILLER = "enjoy", "er"
# The least and the most items of an order; all differ.
NUM_ITEMS = (2, 4)

# Weights of the true score, and the logit of a label at a score difference of one.
HELPFUL, POLITE, CLUTTER = 0.8, 0.2, 0.1
SHARPNESS = 8.0

# Probabilities of the waiter's errors.
SHUFFLES, DROPS, ADDS, FALTERS = 0.25, 0.08, 0.06, 0.08
FORGETS_TO_CLOSE, GUSHES, REPEATS, NEVER_STOPS = 0.5, 0.1, 0.1, 0.06
# A response that does not stop is truncated here; the others, with their end, are
# shorter.
MAX_WORDS = 16

_SPLIT_SIZES = {"train": 1024, "test": 256}
_PAIRS_PER_ORDER = {"train": 4, "test": 2}


class Pair(NamedTuple):
  """Two responses to one problem: the preferred one and the other."""

  chosen: Demonstration
  rejected: Demonstration


def load(split: str) -> list[Problem]:
  """Generates the orders of `train` (1,024) or `test` (256): fixed, without duplicates.

  A hash of the words assigns an order to `test`, so that the splits are disjoint. The
  reference answer is the best response.

  >>> load("test")[0].answer
  'tea milk enjoy'
  """
  if split not in _SPLIT_SIZES:
    raise ValueError(
      f"The preferences task has no split {split!r}; there are train and test."
    )
  rng = np.random.default_rng(19_520_324)
  orders: dict[str, None] = {}
  while len(orders) < _SPLIT_SIZES[split]:
    size = rng.integers(NUM_ITEMS[0], NUM_ITEMS[1] + 1)
    order = " ".join(rng.choice(ITEMS, size, replace=False))
    if is_held_out(order) == (split == "test"):
      orders[order] = None
  return [
    Problem(f"preferences/{split}/{i}", order, f"{order} {CLOSING}")
    for i, order in enumerate(orders)
  ]


def is_held_out(question: str) -> bool:
  """Whether a question is held out for evaluation: one in sixteen, by a hash."""
  return zlib.crc32(question.encode()) % 16 == 0


def true_score(response: str, reference: str) -> float:
  """The true score of a response: at most 1.0, without a lower bound.

      0.8 (items in the order asked for) / (items asked for)
        + 0.2 if the last word is `enjoy`  -  0.1 for each word besides

  Items in the order asked for: the longest common subsequence of order and response.

  Args:
    response: a response, without special tokens.
    reference: the best response.

  >>> true_score("tea jam rice enjoy", "tea jam rice enjoy")
  1.0
  >>> round(true_score("er jam tea rice", "tea jam rice enjoy"), 2)  # 1.6 / 3 - 0.2
  0.33
  """
  asked, words = reference.split()[:-1], response.split()
  polite = words[-1:] == [CLOSING]
  in_order = _longest_common_subsequence(asked, words)
  clutter = len(words) - in_order - polite
  score = HELPFUL * in_order / len(asked) + POLITE * polite - CLUTTER * clutter
  return round(score, 9)  # equal sums of tenths compare equal


def true_margin(pair: "Pair") -> float:
  """The lead of the preferred response in true score; negative for a wrong label."""
  chosen, rejected = (true_score(each.response, each.problem.answer) for each in pair)
  return chosen - rejected


def demonstrations(problems: Sequence[Problem], *, seed: int) -> list[Demonstration]:
  """Generates the careless waiter's response to each order."""
  rng = np.random.default_rng(seed)
  return [_respond(problem, rng) for problem in problems]


def load_pairs(name: str, split: str) -> Sequence[Pair]:
  """Loads preference pairs.

  Args:
    name: `preferences`, the embedded task: 4,096 training pairs and 512 held-out ones,
      with fixed labels. Or `jsonl:PATH`, a file with one JSON object per line with the
      texts `prompt`, `chosen` and `rejected`.
    split: `train` or `test`; in a file, `is_held_out` prompts are `test`. No prompt is
      in both.

  Raises:
    ValueError: an unknown name, an unreadable file, or a line that is no pair.
  """
  if name == "preferences":
    return _embedded_pairs(split)
  if name.startswith("jsonl:"):
    path = pathlib.Path(name.removeprefix("jsonl:"))
    held_out = split == "test"
    pairs = [
      pair
      for pair in _read_pairs(path)
      if is_held_out(pair.chosen.problem.question) == held_out
    ]
    if not pairs:
      raise ValueError(
        f"{path} has no pair in the split {split!r}; one prompt in sixteen is held out"
        " (by a hash), so give some dozens of different prompts."
      )
    return pairs
  raise ValueError(
    f"There are no preference pairs {name!r}; there are `preferences` and jsonl:PATH."
  )


def tokenizer() -> Any:
  """Builds a tokenizer of words, as a `transformers` tokenizer."""
  return embedded_tokenizer((*ITEMS, CLOSING, FILLER), pre_tokenizers.WhitespaceSplit())


def _respond(problem: Problem, rng) -> Demonstration:
  items = problem.question.split()
  if rng.random() < SHUFFLES:
    items = list(rng.permutation(items))
  words = []
  for item in items:
    if rng.random() < FALTERS:
      words.append(FILLER)
    if rng.random() < ADDS:
      words.append(str(rng.choice(ITEMS)))
    if rng.random() >= DROPS:
      words.append(str(item))
  ends = not words or rng.random() >= NEVER_STOPS
  if not ends:
    words = (words * MAX_WORDS)[:MAX_WORDS]
  else:
    words = (words * (1 + (rng.random() < REPEATS)))[: MAX_WORDS - 2]
    if not words or rng.random() >= FORGETS_TO_CLOSE:
      words.append(CLOSING)
      if rng.random() < GUSHES:
        words += [CLOSING] * rng.integers(1, 4)
    words = words[: MAX_WORDS - 1]
  return Demonstration(problem, " ".join(words), ends)


def _embedded_pairs(split: str) -> list[Pair]:
  problems = load(split) * _PAIRS_PER_ORDER[split]
  rng = np.random.default_rng(list(split.encode()))
  pairs = []
  while len(pairs) < len(problems):
    problem = problems[len(pairs)]
    one, other = _respond(problem, rng), _respond(problem, rng)
    if one == other:  # equal responses make no pair
      continue
    better = true_margin(Pair(one, other))
    prefers_one = rng.random() < 1 / (1 + np.exp(-SHARPNESS * better))
    pairs.append(Pair(one, other) if prefers_one else Pair(other, one))
  return pairs


def _read_pairs(path: pathlib.Path) -> list[Pair]:
  try:
    lines = path.read_text("utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f"{path} cannot be read ({error}); give a file of JSON lines"
      " (--reward-model.pairs jsonl:PATH)."
    ) from error
  pairs = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      texts = [row[field] for field in ("prompt", "chosen", "rejected")]
    except (ValueError, KeyError, TypeError):
      texts = []
    if not (texts and all(isinstance(text, str) and text for text in texts)):
      raise ValueError(
        f"{path} line {number} is no pair; expected the texts prompt, chosen and"
        f' rejected, {{"prompt": "…", "chosen": "…", "rejected": "…"}}, got'
        f" {line[:80]!r}."
      )
    prompt, chosen, rejected = texts
    if chosen == rejected:
      raise ValueError(
        f"{path} line {number} has the same text as chosen and rejected; remove it."
      )
    problem = Problem(f"{path.name}/{number}", prompt, "")
    pairs.append(
      Pair(Demonstration(problem, chosen, True), Demonstration(problem, rejected, True))
    )
  return pairs


def _longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
  row = [0] * (len(other) + 1)
  for a in one:
    above, row = row, [0]
    for j, b in enumerate(other):
      row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
  return row[-1]

"""How different are the answers to one problem, and how much does one repeat itself?

Pure functions of texts. Words are runs of letters, single digits and single symbols,
so the figures do not depend on a model's tokenizer and `a3=3` has four words.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[^\W\d_]+|\S")
# Self-BLEU looks at so many answers to a problem and so many words of each: the samples
# of a problem are exchangeable, so the first ones stand for all.
MAX_ANSWERS, MAX_WORDS = 8, 2000


def words(text: str) -> list[str]:
  """Runs of letters, single digits, single symbols.

  >>> words("So x=12.5!")
  ['So', 'x', '=', '1', '2', '.', '5', '!']
  """
  return _WORD.findall(text)


def repetition(text: str, *, n: int = 4) -> float:
  """The share of a text's n-grams that stood in it before.

      1 - (different n-grams) / (n-grams)

  Returns:
    0 for a text without n-grams, near 1 for one that goes round in circles.

  >>> repetition("a b a b a b", n=2)  # ab ba ab ba ab: two different ones of five
  0.6
  """
  grams = _ngrams(words(text), n)
  return 1.0 - len(grams) / grams.total() if grams else 0.0


def distinct_n(texts: Sequence[str], n: int) -> float:
  """The share of different n-grams among all n-grams of a problem's answers.

  More and longer answers have a lower share (https://arxiv.org/abs/1510.03055), so
  compare only where numbers and lengths are alike.

  Returns:
    1 for texts without n-grams.

  >>> distinct_n(["x = 4", "x = 5"], 1)  # x = 4 5 of six
  0.6666666666666666
  """
  grams = Counter()
  for text in texts:
    grams.update(_ngrams(words(text), n))
  return len(grams) / grams.total() if grams else 1.0


def self_bleu(texts: Sequence[str], *, order: int = 4) -> float:
  """The mean BLEU of each answer against the others: 1 if all are the same.

      BLEU = min(1, exp(1 - r / c)) (p_1 ... p_N)^(1/N)

  with c words in the answer, r in the other answer nearest in length, and p_n the share
  of its n-grams found in another, each as often as in the one that has most of it.
  N is 4, or c in a shorter answer; no match counts as a tenth of one. After Texygen,
  https://arxiv.org/abs/1802.01886. The cost grows with the number of answers, so the
  first `MAX_ANSWERS` are looked at, and the first `MAX_WORDS` words of each.

  Args:
    texts: at least two answers to one problem.
    order: N.

  Raises:
    ValueError: fewer than two.

  >>> self_bleu(["the sum is 7", "the sum is 7"])
  1.0
  >>> round(self_bleu(["a b c d", "w x y z"]), 3)  # (0.1^4 / (4 3 2 1))^(1/4)
  0.045
  """
  if len(texts) < 2:
    raise ValueError(f"Self-BLEU compares answers; expected two or more, got {texts}.")
  answers = [words(text)[:MAX_WORDS] for text in texts[:MAX_ANSWERS]]
  lengths = [len(answer) for answer in answers]
  logs = [0.0] * len(answers)  # sums of log p_n
  for n in range(1, order + 1):
    grams = [_ngrams(answer, n) for answer in answers]
    most = _two_largest(grams)
    for i, own in enumerate(grams):
      if not own:
        continue
      # If this answer has most of an n-gram, the others have at most the second.
      found = sum(
        min(count, most[gram][1 if count == most[gram][0] else 0])
        for gram, count in own.items()
      )
      logs[i] += math.log((found or 0.1) / own.total())
  return math.fsum(
    _brevity(length, lengths[:i] + lengths[i + 1 :])
    * math.exp(log / max(min(order, length), 1))
    for i, (length, log) in enumerate(zip(lengths, logs, strict=True))
  ) / len(answers)


def _ngrams(sequence: Sequence[str], n: int) -> Counter:
  return Counter(zip(*(sequence[i:] for i in range(n)), strict=False))


def _two_largest(counters: Sequence[Counter]) -> dict[tuple, tuple[int, int]]:
  """n-gram -> how often it is in the answer that has most of it, and in the next."""
  largest: dict[tuple, tuple[int, int]] = {}
  for counter in counters:
    for gram, count in counter.items():
      first, second = largest.get(gram, (0, 0))
      largest[gram] = (max(first, count), max(second, min(first, count)))
  return largest


def _brevity(length: int, others: Sequence[int]) -> float:
  nearest = min(others, key=lambda other: (abs(other - length), other))
  if length >= nearest:
    return 1.0
  return math.exp(1 - nearest / length) if length else 0.0

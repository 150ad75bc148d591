"""Diversity of the responses to one problem, and repetition within a response.

Pure functions of texts. A word is a run of letters, a single digit or a single symbol,
so that the metrics do not depend on a tokenizer: `a3=3` has four words.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[^\W\d_]+|\S")
# Self-BLEU reads so many responses to a problem and so many words of each. The samples
# of a problem are exchangeable, so the first ones are an unbiased choice.
MAX_RESPONSES, MAX_WORDS = 8, 2000


def words(text: str) -> list[str]:
  """Splits a text into runs of letters, single digits and single symbols.

  >>> words("So x=12.5!")
  ['So', 'x', '=', '1', '2', '.', '5', '!']
  """
  return _WORD.findall(text)


def repetition(text: str, *, n: int = 4) -> float:
  """The fraction of a text's n-grams that occurred earlier in it.

      1 - (distinct n-grams) / (n-grams)

  Returns:
    0 for a text without n-grams, near 1 for a loop.

  >>> repetition("a b a b a b", n=2)  # ab ba ab ba ab: two distinct of five
  0.6
  """
  grams = _ngrams(words(text), n)
  return 1.0 - len(grams) / grams.total() if grams else 0.0


def distinct_n(texts: Sequence[str], n: int) -> float:
  """The fraction of distinct n-grams among all n-grams of a problem's responses.

  It falls with the number and length of responses
  (https://arxiv.org/abs/1510.03055): compare at equal settings only.

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
  """The mean BLEU of each response against the others: 1 if all are equal.

      BLEU = min(1, exp(1 - r / c)) (p_1 ... p_N)^(1/N)

  c is the number of words of the response, r that of the other response nearest in
  length, p_n the clipped n-gram precision: each n-gram counts at most as often as in
  the other response that has most of it. N is 4, or c in a shorter response; no match
  counts as a tenth of one. After Texygen, https://arxiv.org/abs/1802.01886. The cost
  grows with the number of responses: only the first `MAX_RESPONSES` are read, and the
  first `MAX_WORDS` words of each.

  Args:
    texts: at least two responses to one problem.
    order: N.

  Raises:
    ValueError: fewer than two.

  >>> self_bleu(["the sum is 7", "the sum is 7"])
  1.0
  >>> round(self_bleu(["a b c d", "w x y z"]), 3)  # (0.1^4 / (4 3 2 1))^(1/4)
  0.045
  """
  if len(texts) < 2:
    raise ValueError(f"Self-BLEU compares two or more responses, got {texts}.")
  responses = [words(text)[:MAX_WORDS] for text in texts[:MAX_RESPONSES]]
  lengths = [len(response) for response in responses]
  logs = [0.0] * len(responses)  # sums of log p_n
  for n in range(1, order + 1):
    grams = [_ngrams(response, n) for response in responses]
    most = _two_largest(grams)
    for i, own in enumerate(grams):
      if not own:
        continue
      # Where this response has most of an n-gram, the others have at most the second.
      found = sum(
        min(count, most[gram][1 if count == most[gram][0] else 0])
        for gram, count in own.items()
      )
      logs[i] += math.log((found or 0.1) / own.total())
  return math.fsum(
    _brevity(length, lengths[:i] + lengths[i + 1 :])
    * math.exp(log / max(min(order, length), 1))
    for i, (length, log) in enumerate(zip(lengths, logs, strict=True))
  ) / len(responses)


def _ngrams(sequence: Sequence[str], n: int) -> Counter:
  return Counter(zip(*(sequence[i:] for i in range(n)), strict=False))


def _two_largest(counters: Sequence[Counter]) -> dict[tuple, tuple[int, int]]:
  """n-gram -> its two largest counts over the responses."""
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

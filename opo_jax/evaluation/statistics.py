"""Evaluation: from responses to pass@k, maj@k, mean@n with intervals, and diversity.

Everything here is a function of `Response`s, the lines of a results file: a figure can
be computed again long after the policy is gone, and two policies be paired problem by
problem. `collect` fills such a file and goes on where a killed one stopped. NumPy and
plain Python alone: how to sample and to verify is the caller's business.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opo_jax.evaluation import diversity

KS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Response:
  """One answer to one problem: a line of `<benchmark>.responses.jsonl`.

  Attributes:
    id: of the problem.
    sample: 0 to n - 1.
    response: the text, without special tokens.
    reference: the true answer.
    answer: the final answer, in a normal form; None where none was found or looked for.
    reward: above 0.5 is right; None is unscorable.
    length: tokens, the end token included.
    finished: not cut off at the length limit.
    truth: how good it really is, where a benchmark has a formula for that which the
      reward does not see; else None.
  """

  id: str
  sample: int
  response: str
  reference: str
  answer: str | None
  reward: float | None
  length: int
  finished: bool
  truth: float | None = None


# --- one problem ---------------------------------------------------------------------


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
  """The unbiased estimate of P(at least one of k samples is right).

      1 - C(n - c, k) / C(n, k)                https://arxiv.org/abs/2107.03374

  Args:
    num_samples: n, at least k.
    num_correct: c of them are right.
    k: at least 1.

  Raises:
    ValueError: numbers out of their range.

  >>> pass_at_k(8, 1, 8), pass_at_k(4, 1, 2)
  (1.0, 0.5)
  """
  if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
    raise ValueError(
      f"Expected 0 <= correct <= samples and 1 <= k <= samples, got {num_correct}"
      f" correct of {num_samples} samples and k = {k}."
    )
  wrong = num_samples - num_correct
  return 1.0 - math.comb(wrong, k) / math.comb(num_samples, k)


def majority_at_k(
  answers: Sequence[str | None], right: Sequence[bool], k: int
) -> float:
  """The unbiased estimate of P(the most frequent answer of k samples is right).

  The mean over all C(n, k) subsets of the samples, exact. Answers that tie for the
  first place win equally often; None does not vote, and a subset without any answer is
  wrong. Answers are the same if they are the same string: give them in a normal form.
  https://arxiv.org/abs/2203.11171 calls it self-consistency.

  Args:
    answers: final answer of each of n samples.
    right: whether each is right. Where equal answers differ in this, the answer counts
      as right in their share.
    k: 1 to n.

  Raises:
    ValueError: k out of its range.

  >>> majority_at_k(["4", "4", "5"], [True, True, False], 3)
  1.0
  >>> majority_at_k(["4", "5"], [True, False], 2)  # a tie
  0.5
  """
  if not 1 <= k <= len(answers) == len(right):
    raise ValueError(
      f"Expected 1 <= k <= samples, got k = {k} for {len(answers)} answers and"
      f" {len(right)} verdicts."
    )
  votes: dict[str, list[bool]] = {}
  for answer, is_right in zip(answers, right, strict=True):
    if answer is not None:
      votes.setdefault(answer, []).append(is_right)
  counts = tuple(sorted(map(len, votes.values())))
  chances = _winning_chances(counts, len(answers), k)
  return math.fsum(
    chances[len(verdicts)] * sum(verdicts) / len(verdicts)
    for verdicts in votes.values()
  )


@functools.lru_cache(maxsize=2**14)
def _winning_chances(counts: tuple[int, ...], n: int, k: int) -> dict[int, float]:
  """How likely an answer wins a random subset of k, by how often it was given.

  With v votes for it, `ways[j, t]` counts the choices of t other votes in which no
  other answer has more than v and j of them have exactly v: it wins 1 / (1 + j).
  """
  abstentions = n - sum(counts)
  chances = {}
  for own in set(counts):
    others = list(counts)
    others.remove(own)
    won = 0.0
    for v in range(1, min(own, k) + 1):
      width = k - v + 1
      ways = np.zeros((k // v, width))
      ways[0, 0] = 1.0
      for count in others:
        more = np.zeros_like(ways)
        for u in range(min(count, v, width - 1) + 1):
          rest = math.comb(count, u) * ways[:, : width - u]
          if u < v:
            more[:, u:] += rest
          else:
            more[1:, u:] += rest[:-1]
        ways = more
      silent = [math.comb(abstentions, k - v - t) for t in range(width)]
      shares = 1.0 / np.arange(1, len(ways) + 1)
      won += math.comb(own, v) * float(shares @ ways @ np.array(silent, float))
    chances[own] = won / math.comb(n, k)
  return chances


def bootstrap_interval(
  per_problem: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
  """The interval of the mean over problems, by resampling problems.

  Its random numbers are its own: neither training nor another interval changes them.
  Given differences of two policies, problem by problem, it is the paired bootstrap.

  Args:
    per_problem: one value for each problem.
    confidence: mass inside.
    resamples: of the set of problems, with replacement.

  >>> low, high = bootstrap_interval([0.0, 0.5, 0.5, 1.0] * 25)
  >>> low < 0.5 < high, round(high - low, 1)  # 4 x 0.354 / sqrt(100) wide
  (True, 0.1)
  """
  values = np.asarray(per_problem, np.float64)
  rng = np.random.default_rng(0)
  means = rng.choice(values, (resamples, len(values))).mean(axis=1)
  tail = 50.0 * (1.0 - confidence)
  low, high = np.percentile(means, [tail, 100.0 - tail])
  return float(low), float(high)


# --- many problems -------------------------------------------------------------------


def by_problem(responses: Sequence[Response]) -> dict[str, list[Response]]:
  """Problem id -> the responses to it.

  >>> row = Response("a", 0, "7", "7", "7", 1.0, 2, True)
  >>> [*by_problem([row, dataclasses.replace(row, id="b")])]
  ['a', 'b']
  """
  problems: dict[str, list[Response]] = {}
  for response in responses:
    problems.setdefault(response.id, []).append(response)
  return problems


def per_problem(responses: Sequence[Response]) -> dict[str, dict[str, float]]:
  """Every figure of every problem: metric -> {problem id: value}.

  An unscorable sample is left out of pass@k, maj@k and mean@n, and a problem with
  fewer than k scorable ones out of what needs k.

  Returns:
    `pass@k`, and `maj@k` where final answers were looked for, for the k of `KS` up to
    n (a majority of two is a coin: maj@k begins at 4); `mean@n`, the mean reward;
    `response_length`, `truncated_fraction`, `unscorable_fraction`, `repetition`,
    `distinct_1`, `distinct_2`; of two samples or more `self_bleu`, and
    `unique_answers`, the number of different final answers.

  >>> answers = [("4", 1.0), ("5", 0.0), ("4", 1.0), (None, 0.0)]
  >>> figures = per_problem(
  ...   [Response("p", i, "so", "4", a, r, 3, True) for i, (a, r) in enumerate(answers)]
  ... )
  >>> figures["pass@2"]["p"], figures["maj@4"]["p"], figures["unique_answers"]["p"]
  (0.8333333333333334, 1.0, 2.0)
  """
  problems = by_problem(responses)
  num_samples = max(map(len, problems.values()), default=0)
  looked_for = any(response.answer is not None for response in responses)
  figures: dict[str, dict[str, float]] = {}
  for problem, rows in problems.items():
    scorable = [row for row in rows if row.reward is not None]
    values = _of_samples(scorable, num_samples, looked_for) | of_texts(rows)
    if looked_for and len(rows) > 1:
      answers = {row.answer for row in rows if row.answer is not None}
      values["unique_answers"] = float(len(answers))
    for name, value in values.items():
      figures.setdefault(name, {})[problem] = value
  return figures


def _of_samples(scorable, num_samples, looked_for) -> dict[str, float]:
  """pass@k, maj@k and mean@n of one problem."""
  right = [row.reward > 0.5 for row in scorable]
  answers = [row.answer for row in scorable]
  n, correct = len(scorable), sum(right)
  values = {f"pass@{k}": pass_at_k(n, correct, k) for k in KS if k <= n}
  if looked_for:
    values |= {f"maj@{k}": majority_at_k(answers, right, k) for k in KS if 4 <= k <= n}
  if scorable:
    values[f"mean@{num_samples}"] = math.fsum(row.reward for row in scorable) / n
  return values


def of_texts(rows: Sequence[Response]) -> dict[str, float]:
  """What one problem's answers look like, however good they are.

  Returns:
    Their `response_length`, `truncated_fraction`, `unscorable_fraction` and diversity.

  >>> of_texts([Response("a", 0, "7", "7", "7", 1.0, 2, True)])["response_length"]
  2.0
  """
  texts = [row.response for row in rows]
  values = {
    "response_length": math.fsum(row.length for row in rows) / len(rows),
    "truncated_fraction": sum(not row.finished for row in rows) / len(rows),
    "unscorable_fraction": sum(row.reward is None for row in rows) / len(rows),
    "repetition": math.fsum(map(diversity.repetition, texts)) / len(rows),
    "distinct_1": diversity.distinct_n(texts, 1),
    "distinct_2": diversity.distinct_n(texts, 2),
  }
  if len(rows) > 1:
    values["self_bleu"] = diversity.self_bleu(texts)
  return values


def summarise(responses: Sequence[Response]) -> dict[str, float]:
  """The means over problems of `per_problem`, with intervals where they are scores.

  Returns:
    Each metric, and for pass@k, maj@k and mean@n its `_low` and `_high`: 95 % over
    problems. What no problem has is absent.

  >>> row = Response("a", 0, "7", "7", "7", 1.0, 2, True)
  >>> other = dataclasses.replace(row, id="b", reward=0.0)
  >>> result = summarise([row, other])
  >>> result["pass@1"], result["pass@1_low"], result["pass@1_high"]
  (0.5, 0.0, 1.0)
  """
  return means(per_problem(responses))


def means(figures: dict[str, dict[str, float]]) -> dict[str, float]:
  """The mean over problems of each figure, and of scores the interval.

  Args:
    figures: metric -> problem id -> value.

  >>> result = means({"pass@1": {"a": 1.0, "b": 0.0}, "repetition": {"a": 0.5}})
  >>> result["pass@1"], result["pass@1_high"], result["repetition"]
  (0.5, 1.0, 0.5)
  """

  def order(name):
    kind, _, number = name.partition("@")
    place = ("pass", "maj", "mean").index(kind) if number else 3
    return place, int(number or 0)

  result = {}
  for name in sorted(figures, key=order):
    values = list(figures[name].values())
    result[name] = float(np.mean(values))
    if "@" in name or name.endswith(("_score", "_win_rate")):
      result[f"{name}_low"], result[f"{name}_high"] = bootstrap_interval(values)
  return result


def pass_rates(responses: Sequence[Response]) -> list[dict[str, Any]]:
  """How often each problem was solved: the lines of `<benchmark>.problems.jsonl`.

  Returns:
    `id`, `num_samples`, `num_correct` and `pass_rate` of each problem, in order, of its
    scorable answers; a problem without any is absent.

  >>> rewards = (0.0, 1.0)
  >>> pass_rates([Response("a", i, "", "7", "7", rewards[i], 2, True) for i in (0, 1)])
  [{'id': 'a', 'num_samples': 2, 'num_correct': 1, 'pass_rate': 0.5}]
  """
  samples, correct = Counter(), Counter()
  for row in responses:
    if row.reward is not None:
      samples[row.id] += 1
      correct[row.id] += row.reward > 0.5
  return [
    {"id": name, "num_samples": n, "num_correct": c, "pass_rate": c / n}
    for name, n in samples.items()
    for c in [correct[name]]
  ]


def table(policies: dict[str, dict[str, float]]) -> str:
  """Policies beside each other, as Markdown that is also easy on the eye as text.

  Args:
    policies: name -> `summarise` of it, with the prefix `eval/<benchmark>/`.

  Returns:
    Two tables for each benchmark, of scores and of what the answers look like; percent
    but for lengths and numbers of answers. Not every k is there: the JSON file has all.

  >>> scores = {"eval/sums/pass@1": 0.5, "eval/sums/repetition": 0.25}
  >>> print(table({"start": scores}))
  sums
  <BLANKLINE>
  | policy | pass@1 |
  |:-------|-------:|
  | start  |   50.0 |
  <BLANKLINE>
  | policy | repetition |
  |:-------|-----------:|
  | start  |       25.0 |
  """
  keys = dict.fromkeys(key for row in policies.values() for key in row)
  scored = [key for key in keys if key.startswith("eval/")]
  benchmarks = dict.fromkeys(map(_benchmark, scored))
  return "\n\n".join(
    f"{name}\n\n{_table_of(name, policies, scored)}" for name in benchmarks
  )


def _benchmark(key: str) -> str:
  """The name between `eval/` and the metric; it may be a path."""
  return key.removeprefix("eval/").rpartition("/")[0]


@dataclasses.dataclass(frozen=True)
class Column:
  """How a metric is shown."""

  metric: str
  title: str
  digits: int
  factor: float

  @property
  def is_score(self) -> bool:
    """Whether it says how good answers are, and not what they look like."""
    ends = ("_score", "_win_rate", "unscorable_fraction")
    return "@" in self.metric or self.metric.endswith(ends)

  def cell(self, row: dict[str, float], prefix: str = "") -> tuple[str, str]:
    """The value and its interval as text; empty where they were not measured."""
    ends = [row.get(f"{prefix}{self.metric}{end}") for end in ("", "_low", "_high")]
    value, *interval = [
      "" if end is None else f"{self.factor * end:.{self.digits}f}" for end in ends
    ]
    return value, f"[{', '.join(interval)}]" if all(interval) else ""


_SHOWN = (
  Column("pass@", "pass@", 1, 100),
  Column("maj@", "maj@", 1, 100),
  Column("mean@", "mean@", 1, 100),
  Column("reward_score", "reward", 3, 1),
  Column("reward_win_rate", "wins by reward", 1, 100),
  Column("true_score", "true score", 3, 1),
  Column("true_win_rate", "true wins", 1, 100),
  Column("unscorable_fraction", "unscorable", 1, 100),
  Column("response_length", "length", 1, 1),
  Column("truncated_fraction", "truncated", 1, 100),
  Column("repetition", "repetition", 1, 100),
  Column("self_bleu", "self-BLEU", 1, 100),
  Column("distinct_2", "distinct-2", 1, 100),
  Column("unique_answers", "answers", 2, 1),
)


def columns(names: Sequence[str], *, every_k: bool = False) -> list[Column]:
  """What a table shows of these metrics, and how.

  Args:
    names: of metrics, as `summarise` has them.
    every_k: of pass@k and maj@k all k, and not the first pass@k and the last of each.

  >>> names = ["repetition", "pass@1", "pass@1_low", "pass@2", "pass@4"]
  >>> [column.title for column in columns(names)]
  ['pass@1', 'pass@4', 'repetition']
  """
  shown = []
  for column in _SHOWN:
    if column.metric.endswith("@"):
      found = [re.fullmatch(rf"{column.metric}(\d+)", name) for name in names]
      ks = sorted({int(match[1]) for match in found if match})
      if not every_k:
        ks = sorted({*ks[: column.metric == "pass@"], *ks[-1:]})
      shown += [
        dataclasses.replace(
          column, metric=f"{column.metric}{k}", title=f"{column.title}{k}"
        )
        for k in ks
      ]
    elif column.metric in names:
      shown.append(column)
  return shown


def _table_of(benchmark, policies, keys):
  prefix = f"eval/{benchmark}/"
  shown = columns(
    [key.removeprefix(prefix) for key in keys if _benchmark(key) == benchmark]
  )
  tables = []
  for is_score in (True, False):
    part = [column for column in shown if column.is_score == is_score]
    lines = [["policy", *(column.title for column in part)]]
    for name, row in policies.items():
      if any(_benchmark(key) == benchmark for key in row):
        cells = [" ".join(column.cell(row, prefix)).strip() for column in part]
        lines.append([name, *cells])
    if part:
      tables.append(markdown(lines))
  return "\n\n".join(tables)


def markdown(lines: Sequence[Sequence[str]]) -> str:
  """A Markdown table whose columns are also aligned as text.

  >>> print(markdown([["policy", "pass@1"], ["start", "5.0"]]))
  | policy | pass@1 |
  |:-------|-------:|
  | start  |    5.0 |
  """
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  rows = [
    " | ".join(
      text.rjust(width) if i else text.ljust(width)
      for i, (text, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in lines
  ]
  dashes = ["-" * (width + 1) for width in widths]
  rule = "|".join([f":{dashes[0]}", *(f"{dash}:" for dash in dashes[1:])])
  return "\n".join([f"| {rows[0]} |", f"|{rule}|", *(f"| {row} |" for row in rows[1:])])


# --- the file of responses -----------------------------------------------------------


def collect(
  answer: Callable[[int, int], Sequence[Response]],
  asked: Sequence[tuple[str, str]],
  path: pathlib.Path,
  *,
  samples: int,
  chunk: int,
) -> list[Response]:
  """Fills a file of responses, a chunk of problems at a time, and gives all of them.

  What is in the file is not sampled again: it goes on after the last problem that is
  complete, and asks for more problems only where there are more than last time.

  Args:
    answer: (first, last) -> responses to the problems first ... last - 1, `samples`
      consecutive ones to each.
    asked: (id, reference) of every problem.
    path: JSON lines; made if it is missing.
    samples: n.
    chunk: problems between two writes; a kill loses so many at most.

  Raises:
    ValueError: the file answers other problems, or is broken before its last line.

  >>> import tempfile
  >>> def answer(first, last):
  ...   print("asked", first, last)
  ...   return [Response(i, 0, "7", "7", "7", 1.0, 2, True) for i in "abc"[first:last]]
  >>> asked = [("a", "7"), ("b", "7"), ("c", "7")]
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   path = pathlib.Path(directory, "sums.responses.jsonl")
  ...   _ = collect(answer, asked[:2], path, samples=1, chunk=2)
  ...   len(collect(answer, asked, path, samples=1, chunk=2))
  asked 0 2
  asked 2 3
  3
  """
  lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
  done = len(lines) // samples  # a cut-off line has no newline, a problem may lack some
  kept = lines[: done * samples]
  rows = [_response(line, path, number) for number, line in enumerate(kept, start=1)]
  for (problem, reference), row in zip(asked, rows[::samples], strict=False):
    if (row.id, row.reference) != (problem, reference):
      raise ValueError(
        f"{path} answers {row.id!r} (reference {row.reference!r}) where the benchmark"
        f" has {problem!r} (reference {reference!r}) now; move the file away."
      )
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("ab") as file:
    file.truncate(sum(len(line) + 1 for line in kept))
    for first in range(done, len(asked), chunk):
      new = answer(first, min(first + chunk, len(asked)))
      text = "".join(
        json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in new
      )
      # Half a character can be in a response of a byte-level tokenizer.
      file.write(text.encode("utf-8", errors="replace"))
      file.flush()
      rows += new
  return rows[: len(asked) * samples]


def read_responses(path: pathlib.Path) -> list[Response]:
  """The complete lines of a file of responses; [] where there is no file.

  >>> read_responses(pathlib.Path("no such file"))
  []
  """
  lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
  return [_response(line, path, number) for number, line in enumerate(lines, start=1)]


def _response(line: bytes, path: pathlib.Path, number: int) -> Response:
  try:
    return Response(**json.loads(line))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path}, line {number} is no response ({error}).") from error

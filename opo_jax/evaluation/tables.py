"""Tables of metrics: which metrics are shown, how, and as Markdown.

`columns` is shared by the terminal's table, the HTML report and the comparison of runs.
"""

import dataclasses
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Column:
  """How a metric is shown.

  Attributes:
    metric: its name in `summarise`.
    title: of the column.
    digits: after the decimal point.
    factor: what the value is multiplied by; 100 shows percent.
  """

  metric: str
  title: str
  digits: int
  factor: float

  @property
  def is_score(self) -> bool:
    """Whether the metric rates responses; the others describe their text."""
    ends = ("_score", "_win_rate", "unscorable_fraction")
    return "@" in self.metric or self.metric.endswith(ends)

  def cell(self, row: dict[str, float], prefix: str = "") -> tuple[str, str]:
    """The value and its interval as text; empty where they were not measured."""
    ends = [row.get(f"{prefix}{self.metric}{end}") for end in ("", "_low", "_high")]
    value, *interval = [
      "" if end is None else f"{self.factor * end:.{self.digits}f}" for end in ends
    ]
    return value, f"[{', '.join(interval)}]" if all(interval) else ""


_COLUMNS = (
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
  """The columns of a table of these metrics, in a fixed order.

  Args:
    names: of metrics, as `summarise` has them.
    every_k: show all k of pass@k and maj@k; else the first and last pass@k and the last
      maj@k.

  >>> names = ["repetition", "pass@1", "pass@1_low", "pass@2", "pass@4"]
  >>> [column.title for column in columns(names)]
  ['pass@1', 'pass@4', 'repetition']
  """
  shown = []
  for column in _COLUMNS:
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


def table(policies: dict[str, dict[str, float]]) -> str:
  """Compares policies in Markdown tables that are aligned as plain text, too.

  Args:
    policies: name -> `summarise` of it, with the prefix `eval/<benchmark>/`.

  Returns:
    Two tables for each benchmark: the scores, and the statistics of the responses.
    Values are percent but for rewards, true scores, lengths and numbers of answers.
    Only some k are shown; the JSON file has all.

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
    f"{name}\n\n{_tables_of(name, policies, scored)}" for name in benchmarks
  )


def _benchmark(key: str) -> str:
  """The name between `eval/` and the metric; it may contain slashes."""
  return key.removeprefix("eval/").rpartition("/")[0]


def _tables_of(benchmark, policies, keys):
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
  """A Markdown table, its columns padded to equal width.

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

"""Writes the report of one run: report.html, with its figures inside.

Reads the files that training and `make eval` wrote, of a finished or an unfinished run,
and imports no JAX: a report can be made on a laptop from a copied directory. The page
omits what the run did not measure; a missing metric is never shown as zero.
"""

import base64
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from opo_jax.evaluation import Column, columns
from opo_jax.reports.charts import CHARTS, GAP_BOUND, render
from opo_jax.reports.run_files import (
  Row,
  benchmarks,
  graded,
  read_json,
  read_lines,
  read_metrics,
  series,
  start_and_last,
)

# The scores at the top of the page, those that were measured.
HEADLINES = ("pass@1", "reward_score", "true_score", "true_win_rate", "reward_win_rate")


def report(run_dir: str | Path) -> Path:
  """Writes `figures/*.png` and the self-contained `report.html` of a run.

  Args:
    run_dir: holds `metrics.jsonl`, and `config.json`, `run.json`, `sft.jsonl`
      and `samples.jsonl` where they exist. The run may be unfinished: an incomplete
      last line is ignored.

  Returns:
    The path of `report.html`, which embeds every figure.

  Raises:
    ValueError: no `metrics.jsonl`, no complete line in it, or a malformed line that is
      not the last one.
  """
  run_dir = Path(run_dir)
  rows = read_metrics(run_dir)
  config = read_json(run_dir / "config.json")
  sft = read_lines(run_dir / "sft.jsonl")

  figures = []
  (run_dir / "figures").mkdir(exist_ok=True)
  for chart in CHARTS:
    image = render(chart, sft if chart.name == "sft" else rows)
    if image:
      (run_dir / "figures" / f"{chart.name}.png").write_bytes(image)
      figures.append((chart, base64.b64encode(image).decode("ascii")))

  path = run_dir / "report.html"
  return write_page(
    path,
    "report.html.jinja",
    name=config.get("experiment") or run_dir.resolve().name,
    config=config,
    config_text=json.dumps(config, indent=2, ensure_ascii=False),
    run=read_json(run_dir / "run.json"),
    headlines=_headlines(rows, config, sft),
    tables=[_score_table(name, start_and_last(rows, name)) for name in _names(rows)],
    graded=graded(rows),
    evaluated=_evaluated(run_dir),
    figures=figures,
    examples=_examples(
      read_lines(run_dir / "samples.jsonl"), graded=bool(graded(rows))
    ),
  )


def write_page(path: Path, template: str, **values: Any) -> Path:
  """Renders a template of this directory; undefined values render as nothing."""
  # Chainable: a run may lack its config or, if it is old, a section of it.
  html = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    undefined=jinja2.ChainableUndefined,
  )
  page = html.get_template(template).render(**values)
  # A byte-level tokenizer may leave half a character in a response: show a "?".
  path.write_bytes(page.encode("utf-8", errors="replace"))
  return path


def _evaluated(run_dir: Path) -> list[dict[str, Any]]:
  """The tables of the last `make eval`: the start policy and checkpoints."""
  policies = read_json(run_dir / "eval" / "results.json").get("policies", {})
  rows = list(policies.values())
  return [_score_table(name, list(policies.items())) for name in _names(rows)]


def _names(rows: list[Row]) -> list[str]:
  return [*benchmarks(rows), *graded(rows)]


def _headlines(
  rows: list[Row], config: Row, sft: list[Row]
) -> list[tuple[str, str, str]]:
  """Label, value and note of each headline.

  The policy-gradient loss is none of them: its value says nothing about progress.
  """
  cards = []
  for name in _names(rows):
    ends = start_and_last(rows, name)
    found = [key.removeprefix(f"eval/{name}/") for _, row in ends for key in row]
    shown = [metric for metric in HEADLINES if metric in found]
    cards += [_score_card(name, column, ends) for column in columns(shown)]

  gaps = series(rows, "onpolicy/logprob_diff_max")[1]
  if len(gaps):
    note = f"nats; above {GAP_BOUND:g} at {sum(gaps > GAP_BOUND)} of {len(gaps)} steps"
    cards.append(("Largest log-prob gap", _number(gaps.max()), note))
  for key, label, ends in (
    ("policy/kl_to_start", "KL to start", [-1]),
    ("policy/entropy", "Entropy", [0, -1]),
  ):
    steps, values = series(rows, key)
    if len(values):
      note = "nats per token, step " + " → ".join(f"{steps[i]:.0f}" for i in ends)
      cards.append((label, " → ".join(_number(values[i]) for i in ends), note))
  if rows[-1]["step"]:
    note = f"of {config['steps']:,} configured" if "steps" in config else ""
    cards.append(("RL steps", f"{rows[-1]['step']:,}", note))
  seconds = {
    "RL": series(rows, "time/step_s")[1].sum(),
    "evaluation": series(rows, "time/eval_s")[1].sum(),
    "SFT": series(sft, "time/step_s")[1].sum(),
  }
  if any(seconds.values()):
    parts = [f"{name} {_duration(spent)}" for name, spent in seconds.items() if spent]
    cards.append(("Time", _duration(sum(seconds.values())), ", ".join(parts)))
  speed = series(rows, "throughput/tokens_per_s")[1]
  if len(speed):
    note = "tokens/s, median of the steps"
    cards.append(("Throughput", _number(float(np.median(speed))), note))
  return cards


def _score_card(
  benchmark: str, column: Column, ends: list[tuple[str, Row]]
) -> tuple[str, str, str]:
  """A headline: a score of the start policy and of the last, with intervals."""
  cells = [(end, *column.cell(row, f"eval/{benchmark}/")) for end, row in ends]
  value = " → ".join(value for _, value, _ in cells)
  note = " → ".join(f"{end} {interval}" for end, _, interval in cells)
  unit = " %" if column.factor == 100 else ""
  # No-break spaces keep an interval on one line.
  return f"{benchmark}, {column.title}", value + unit, note.replace(", ", ",\u00a0")


def _score_table(benchmark: str, policies: list[tuple[str, Row]]) -> dict[str, Any]:
  """A line for each policy: its name and (value, interval) of each column.

  Scores and statistics of the responses are two parts.
  """
  prefix = f"eval/{benchmark}/"
  policies = [
    (name, row) for name, row in policies if any(key.startswith(prefix) for key in row)
  ]
  names = {key.removeprefix(prefix): None for _, row in policies for key in row}
  shown = columns(list(names), every_k=True)
  parts = []
  for is_score in (True, False):
    part = [column for column in shown if column.is_score == is_score]
    lines = [(name, [c.cell(row, prefix) for c in part]) for name, row in policies]
    if part:
      parts.append({"titles": [column.title for column in part], "lines": lines})
  return {"benchmark": benchmark, "parts": parts}


def _examples(samples: list[Row], *, graded: bool) -> list[tuple[str, Row]]:
  """(verdict, sample): one early, one middle and one late example of each verdict.

  With graded rewards, the examples are the highest and the lowest reward of each third
  of the steps.
  """

  def verdict(sample: Row) -> str:
    if "reward" not in sample:
      return "unscorable"
    return "correct" if sample["reward"] > 0.5 else "incorrect"

  thirds = np.array_split(sorted({sample["step"] for sample in samples}), 3)
  examples = []
  for i, steps in enumerate(thirds):
    third = [sample for sample in samples if sample["step"] in steps]
    ranked = sorted(
      (sample for sample in third if "reward" in sample), key=lambda s: s["reward"]
    )
    if graded and ranked:
      examples += [("high", ranked[-1]), ("low", ranked[0])]
    for name in ("unscorable",) if graded else ("correct", "incorrect", "unscorable"):
      found = [sample for sample in third if verdict(sample) == name]
      if found:
        examples.append((name, found[i * (len(found) - 1) // 2]))
  return examples


def _number(value: float) -> str:
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.3g} s"
  minutes = round(seconds / 60)
  return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

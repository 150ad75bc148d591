"""Reads the files of a run directory: JSON, JSON lines, and what they measured.

The run may be unfinished: a last line that a kill cut off is ignored.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

# One line of metrics.jsonl, sft.jsonl or samples.jsonl.

Row = dict[str, Any]


def read_metrics(run_dir: str | Path) -> list[Row]:
  """Reads the complete lines of `metrics.jsonl`, sorted by step, without null and NaN.

  Returns:
    One dict for each line, at least one. Step 0 is the evaluation of the start policy.

  Raises:
    ValueError: the file is missing or has no complete line, or a line other than
      the last is not a JSON object with a `step`.
  """
  path = Path(run_dir) / "metrics.jsonl"
  rows = read_lines(path)
  if not rows:
    raise ValueError(
      f"{path} is missing or holds no complete line yet; train at least one step "
      f"(make train RUN={run_dir}) or name another run directory"
    )
  return rows


def read_json(path: Path) -> Row:
  """Reads a JSON object; {} if the file does not exist."""
  if not path.is_file():
    return {}
  try:
    values = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON ({error}); repair or remove it") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} holds no JSON object; repair or remove it")
  return values


def read_lines(path: Path) -> list[Row]:
  """Reads JSON lines, sorted by step; [] if the file does not exist."""
  lines = path.read_bytes().rstrip().split(b"\n") if path.is_file() else []
  rows = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line, parse_constant=lambda name: None)
    except ValueError as error:  # UnicodeDecodeError is one: a cut inside a character
      if number == len(lines):
        break
      raise ValueError(
        f"{path}, line {number} is not JSON ({error}); only the last line may be "
        "incomplete: repair or remove this one"
      ) from None
    if not isinstance(row, dict) or "step" not in row:
      raise ValueError(f'{path}, line {number}: expected an object with a "step"')
    rows.append({key: value for key, value in row.items() if value is not None})
  return sorted(rows, key=lambda row: row["step"])


def series(rows: list[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of the rows that measured `key`: two arrays [n]."""
  points = [(row["step"], row[key]) for row in rows if key in row]
  steps, values = np.array(points, np.float64).reshape(-1, 2).T
  return steps, values


def benchmarks(rows: list[Row]) -> dict[str, list[int]]:
  """Benchmark -> every k with a measured pass@k."""
  keys = {key for row in rows for key in row}
  found = [m for key in keys if (m := re.fullmatch(r"eval/(.+)/pass@(\d+)", key))]
  names = sorted({m[1] for m in found})
  return {name: sorted(int(m[2]) for m in found if m[1] == name) for name in names}


def graded(rows: list[Row]) -> list[str]:
  """Benchmarks of graded responses: with mean scores, without pass@k."""
  found = [re.fullmatch(r"eval/(.+)/reward_score", key) for row in rows for key in row]
  return sorted({match[1] for match in found if match})


def start_and_last(rows: list[Row], benchmark: str) -> list[tuple[str, Row]]:
  """The evaluation before the first RL step and the last one after it, named."""
  scores = {f"eval/{benchmark}/pass@1", f"eval/{benchmark}/reward_score"}
  evaluated = [row for row in rows if scores & row.keys()]
  start = [("start", row) for row in evaluated[:1] if row["step"] == 0]
  final = [(f"step {r['step']}", r) for r in evaluated[-1:] if r["step"] > 0]
  return start + final

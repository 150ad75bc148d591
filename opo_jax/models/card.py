"""Writes the model card of an exported policy: its origin and the run's metrics."""

import math
from typing import Any


def model_card(
  *,
  name: str,
  base: str | None,
  settings: dict[str, Any],
  rows: list[dict[str, Any]],
  run: dict[str, Any],
  library: str = "transformers",
) -> str:
  """Builds the README.md that the Hugging Face hub shows.

  Args:
    name: of the run.
    base: hub id of the start policy; "" for a local directory, which means nothing to
      others; None for random weights.
    settings: training settings to show, by name.
    rows: of metrics.jsonl, up to the exported step.
    run: the values of run.json.
    library: the library that loads the model.

  >>> card = model_card(name="r", base=None, settings={}, rows=[{"step": 3}], run={})
  >>> card.splitlines()[:2]
  ['---', 'library_name: transformers']
  """
  scored = [row for row in rows if any(key.startswith("eval/") for key in row)]
  start, last = (scored[0], scored[-1]) if scored else ({}, {})
  evaluation = [
    f"| {key[len('eval/') :]} | {_interval(start, key)} | {_interval(last, key)} |"
    for key in last
    if key.startswith("eval/") and not key.endswith(("_low", "_high"))
  ]
  final = rows[-1] if rows else {}
  figures = [
    f"| {key} | {_number(final[key])} |"
    for key in (
      "reward/mean", "response_length/mean", "response_length/truncated_fraction",
      "policy/entropy", "policy/kl_to_start", "onpolicy/logprob_diff_max",
      "onpolicy/clip_fraction",
    )
    if key in final
  ]  # fmt: skip
  start_model = "fresh weights" if base is None else base or "a model of its own"
  parts = [
    "---",
    f"library_name: {library}",
    "pipeline_tag: text-generation",
    *([f"base_model: {base}"] if base else []),
    "tags: [reinforcement-learning, opo, opo-jax]",
    "---",
    "",
    f"# {name}",
    "",
    "Trained on-policy with the optimal reward baseline"
    f" ([OPO](https://arxiv.org/abs/2505.23585)) by opo_jax, from {start_model}.",
  ]
  if evaluation:
    steps = f"| step {start['step']} | step {last['step']} |"
    parts += ["", "## Held-out evaluation", "", f"| {steps}", "|---|---|---|"]
    parts += evaluation
  if figures:
    parts += ["", f"## The last step, {final['step']}", "", "| | |", "|---|---|"]
    parts += figures
  parts += ["", "## Training", "", "| | |", "|---|---|"]
  origin = {key: run[key] for key in ("command", "commit", "devices") if run.get(key)}
  parts += [f"| {key} | `{value}` |" for key, value in (settings | origin).items()]
  return "\n".join(parts) + "\n"


def _interval(row, key):
  if key not in row:
    return ""
  low, high = (row.get(f"{key}_{end}") for end in ("low", "high"))
  interval = "" if low is None else f" [{_number(low)}, {_number(high)}]"
  return _number(row[key]) + interval


def _number(value):
  return f"{value:.3g}" if math.isfinite(value) else "none"

"""Makes the results that docs/alignment.md reports.

    .venv/bin/python docs/make_alignment.py [runs/alignment]

Four runs, about 15 minutes on two idle cores; complete runs are not repeated.
Writes `docs/results/alignment.json`, `docs/alignment.png` and the table in
`docs/alignment.md`. The quickstart stops at step 80; here it continues to step 120, to
show what follows.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
from matplotlib.figure import Figure

from opo_jax.data import preferences
from opo_jax.reports import style
from opo_jax.reports.run_files import read_metrics

DOCS = pathlib.Path(__file__).parent
# label: (experiment, additional flags)
RUNS = {
  "seed 0": ("alignment_quickstart", ["--steps=120"]),
  "seed 1": ("alignment_quickstart", ["--steps=120", "--seed=1"]),
  "seed 2": ("alignment_quickstart", ["--steps=120", "--seed=2"]),
  "256 pairs": ("alignment_overoptimised", []),
}
STEPS = (0, 80, 120)
BEGIN, END = "<!-- results: docs/make_alignment.py -->\n", "<!-- end -->\n"
KEYS = ("true_score", "true_win_rate", "reward_score", "reward_win_rate")


def main(directory: pathlib.Path) -> None:
  paths = {label: directory / label.replace(" ", "_") for label in RUNS}
  for label, (experiment, flags) in RUNS.items():
    command = [sys.executable, "-m", "opo_jax", "train", experiment]
    command += ["--run", str(paths[label]), *flags]
    print("+", *command[1:], flush=True)
    subprocess.run(command, check=True, cwd=DOCS.parent)
  results = {label: summary(path) for label, path in paths.items()}
  results["labels"] = {"held-out accuracy of the true score": truth_accuracy()}
  out = DOCS / "results" / "alignment.json"
  out.write_text(json.dumps(results, indent=2) + "\n")
  draw(paths, DOCS / "alignment.png")
  page = DOCS / "alignment.md"
  head, rest = page.read_text().split(BEGIN)
  page.write_text(f"{head}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}")


def table(results: dict) -> str:
  """The table of docs/alignment.md: one row per run and step."""
  lines = [
    "| run | step | true score | true win rate | reward-model score | KL to start |",
    "|---|---|---|---|---|---|",
  ]
  for label in RUNS:
    for step in STEPS:
      at = results[label][f"step {step}"]
      cells = [f"{at[key]:.3f} {_in_words(at[f'{key} interval'])}" for key in KEYS[:3]]
      cells = [label, str(step), *cells, f"{at['KL to start']:.3f}"]
      lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def _in_words(interval: list[float]) -> str:
  return "[{:.3f}, {:.3f}]".format(*interval)


def truth_accuracy() -> float:
  """Share of held-out pairs that the true score orders as labelled; a tie counts ½."""
  pairs = preferences.load_pairs("preferences", "test")
  ahead = np.array([preferences.true_margin(pair) for pair in pairs])
  return round(float(((ahead > 0) + 0.5 * (ahead == 0)).mean()), 3)


def evaluations(path: pathlib.Path) -> dict[int, dict]:
  """{step: row} of the steps with an evaluation."""
  rows = read_metrics(path)
  return {row["step"]: row for row in rows if "eval/preferences/true_score" in row}


def summary(path: pathlib.Path) -> dict:
  """The result-file entry of one finished run."""
  pairs = read_metrics(path / "reward_model")
  sft = [json.loads(line) for line in (path / "sft.jsonl").open()]
  rows, last = read_metrics(path), pairs[-1]
  figures = {
    "commit": json.loads((path / "run.json").read_text())["commit"],
    "held-out accuracy": round(last["eval/pairs/accuracy"], 3),
    "held-out accuracy interval": interval(last, "eval/pairs/accuracy"),
    "true accuracy": round(last["eval/pairs/true_accuracy"], 3),
    "SFT s": round(sum(row["time/step_s"] for row in sft)),
    "reward model s": round(sum(row.get("time/step_s", 0.0) for row in pairs)),
    "RL s": round(sum(row.get("time/step_s", 0.0) for row in rows)),
    "evaluation s": round(sum(row.get("time/eval_s", 0.0) for row in rows)),
    "largest logprob_diff_max": max(
      row["onpolicy/logprob_diff_max"] for row in rows[1:]
    ),
  }
  for step, row in evaluations(path).items():
    at = {"KL to start": round(row.get("policy/kl_to_start", 0.0), 3)}
    for key in KEYS:
      name = f"eval/preferences/{key}"
      at[key] = round(row[name], 3)
      at[f"{key} interval"] = interval(row, name)
    at["length"] = round(row["eval/preferences/response_length"], 1)
    if step in STEPS:
      figures[f"step {step}"] = at
  return figures


def interval(row, name) -> list[float]:
  return [round(row[f"{name}_{end}"], 3) for end in ("low", "high")]


def draw(paths: dict[str, pathlib.Path], out: pathlib.Path) -> None:
  """Plots reward-model score and true score over steps, and true score over KL."""
  figure = Figure(figsize=(11, 3.4), layout="constrained")
  panels = figure.subplots(1, 3)
  for color, (label, path) in zip(style.RUN_COLORS, paths.items(), strict=False):
    rows = evaluations(path)
    steps = list(rows)
    kls = [row.get("policy/kl_to_start", 0.0) for row in rows.values()]
    for panel, x, key in zip(
      panels, (steps, steps, kls), ("reward_score", "true_score", "true_score"),
      strict=True,
    ):  # fmt: skip
      name = f"eval/preferences/{key}"
      low, high = ([r[f"{name}_{e}"] for r in rows.values()] for e in ("low", "high"))
      values = [row[name] for row in rows.values()]
      panel.plot(x, values, ".-", color=color, label=label)
      if x is steps:
        panel.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
  titles = ("reward-model score", "true score", "true score over KL")
  labels = ("RL step", "RL step", "KL to start (nats per token)")
  for panel, title, xlabel in zip(panels, titles, labels, strict=True):
    panel.set(title=title, xlabel=xlabel)
    panel.grid(color="#e3e6ea", linewidth=0.6)
  panels[0].set_ylabel("reward-model score")
  panels[1].set_ylabel("true score")
  panels[2].set_ylabel("true score")
  panels[0].legend(frameon=False)
  figure.savefig(out, dpi=150)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs/alignment"))

"""Makes the results that docs/variance.md reports.

    .venv/bin/python docs/make_variance.py [runs/variance]

Trains the quickstart, keeps its checkpoints, and measures the start, middle and end of
training: about 10 minutes on two cores. Writes
`docs/results/variance.json` and `docs/variance.png`, and prints the page's tables.
"""

import json
import pathlib
import shutil
import subprocess
import sys

DOCS = pathlib.Path(__file__).parent
RESULT = DOCS / "results" / "variance.json"


def main(directory: pathlib.Path) -> None:
  run = str(directory)
  for arguments in (
    ["train", "quickstart", "--run", run, "--checkpoint.keep=20"],
    ["variance", run, "--prompts=48"],
  ):
    print("+ python -m opo_jax", *arguments, flush=True)
    command = [sys.executable, "-m", "opo_jax", *arguments]
    subprocess.run(command, check=True, cwd=DOCS.parent)
  write_down(directory)
  print(tables(json.loads(RESULT.read_text())))


def write_down(directory: pathlib.Path) -> None:
  """Writes the measurement to four digits, without the points of its figure."""
  rows = json.loads((directory / "variance.json").read_text())["policies"]
  kept = [
    {name: _rounded(value) for name, value in row.items() if name != "points"}
    for row in rows
  ]
  run = json.loads((directory / "run.json").read_text())
  result = {"training commit": run["commit"], "policies": kept}
  RESULT.write_text(json.dumps(result, indent=1) + "\n")
  shutil.copy(directory / "figures" / "variance.png", DOCS / "variance.png")


def tables(result: dict) -> str:
  """The tables of the page, in Markdown."""
  policies = result["policies"]
  steps = [f"step {row['step']}" for row in policies]
  blocks = []

  def block(title, names, line):
    lines = [
      f"| {title} | " + " | ".join(steps) + " |",
      "|---" * (1 + len(steps)) + "|",
    ]
    for name in names:
      cells = [line(name, row) for row in policies]
      lines.append(f"| {name} | " + " | ".join(cells) + " |")
    blocks.append("\n".join(lines))

  facts = {
    "reward": "reward/mean",
    "length, tokens": "response_length/mean",
    "length, coefficient of variation": "response_length/cv",
    "length of correct responses": "response_length/right",
    "length of incorrect responses": "response_length/wrong",
    "mean of `|s|²`, correct": "score/squared_norm_right",
    "mean of `|s|²`, incorrect": "score/squared_norm_wrong",
    "share of the largest 1 % of responses in `Σ|s|²`": "score/largest_percent_share",
  }
  block("responses", facts, lambda name, row: f"{row[facts[name]]:.3g}")

  def fit(name, row):
    quantity, how = name.split(", ")
    found = row["fits"][quantity][how]
    slope = [found[key] for key in ("slope", "slope_low", "slope_high")]
    return f"{_interval(slope)}, {found['r2']:.3f}"

  names = [f"{x}, {how}" for x in ("length", "energy") for how in ("pooled", "within")]
  block("slope of `log|s|²` on log of, R²", names, fit)
  for measure in ("error", "noise", "variance"):
    block(
      f"{measure} at K = 8",
      [*policies[0]["ratios"]["8"], "optimal_token"],
      lambda name, row, measure=measure: _interval(
        {**row["ratios"]["8"], **row["tokens"]["8"]}[name].get(measure)
      ),
    )
  for name in ("opo_loo", "energy_loo", "exact_loo"):
    block(
      f"error of `{name}`",
      [f"K = {K}" for K in policies[0]["ratios"]],
      lambda title, row, name=name: _interval(
        row["ratios"][title.removeprefix("K = ")][name].get("error")
      ),
    )
  return "\n\n".join(blocks)


def _interval(ratio):
  return "{:.3g} [{:.3g}, {:.3g}]".format(*ratio) if ratio else "not measurable"


def _rounded(value):
  if isinstance(value, dict):
    return {name: _rounded(inner) for name, inner in value.items()}
  if isinstance(value, list):
    return [_rounded(inner) for inner in value]
  return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs/variance"))

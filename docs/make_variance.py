"""Runs what docs/variance.md reports, and writes the figures down.

    .venv/bin/python docs/make_variance.py [runs/variance]

Trains the quickstart with its checkpoints kept and measures it at the start, in the
middle and at the end: about 10 minutes on two cores. Writes
`docs/results/variance.json` and `docs/variance.png`.
"""

import json
import pathlib
import shutil
import subprocess
import sys

DOCS = pathlib.Path(__file__).parent


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


def write_down(directory: pathlib.Path) -> None:
  """The measurement without the points of its figure, to four digits."""
  rows = json.loads((directory / "variance.json").read_text())["policies"]
  kept = [
    {name: _rounded(value) for name, value in row.items() if name != "points"}
    for row in rows
  ]
  run = json.loads((directory / "run.json").read_text())
  result = {"commit": run["commit"], "policies": kept}
  (DOCS / "results" / "variance.json").write_text(json.dumps(result, indent=1) + "\n")
  shutil.copy(directory / "figures" / "variance.png", DOCS / "variance.png")


def _rounded(value):
  if isinstance(value, dict):
    return {name: _rounded(inner) for name, inner in value.items()}
  if isinstance(value, list):
    return [_rounded(inner) for inner in value]
  return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs/variance"))

"""Makes the results that README.md and experiments/README.md report.

    .venv/bin/python docs/make_results.py [runs/results]

Seven runs, about 15 minutes on two cores; complete runs are not repeated.
Writes `docs/results/quickstart.json`, `docs/quickstart.png` and `docs/variants.png`.
"""

import json
import pathlib
import subprocess
import sys

from opo_jax.reports import plots
from opo_jax.reports.run_files import read_metrics

DOCS = pathlib.Path(__file__).parent
# label: (experiment, additional flags)
RUNS = {
  "opo, seed 0": ("quickstart", []),
  "opo, seed 1": ("quickstart", ["--seed=1"]),
  "opo, seed 2": ("quickstart", ["--seed=2"]),
  "opo_loo": ("quickstart", ["--algorithm.advantage=opo_loo"]),
  "grpo": ("quickstart", ["--algorithm.advantage=grpo"]),
  "grpo, 4 updates": ("quickstart_off_policy", []),
  "collapse": ("quickstart_collapse", []),
}


def main(directory: pathlib.Path) -> None:
  paths = {
    label: directory / label.replace(", ", "_").replace(" ", "_") for label in RUNS
  }
  for label, (experiment, flags) in RUNS.items():
    command = [sys.executable, "-m", "opo_jax", "train", experiment]
    command += ["--run", str(paths[label]), *flags]
    print("+", *command[1:], flush=True)
    subprocess.run(command, check=True, cwd=DOCS.parent)
  results = {label: summary(path) for label, path in paths.items()}
  out = DOCS / "results" / "quickstart.json"
  out.parent.mkdir(exist_ok=True)
  out.write_text(json.dumps(results, indent=2) + "\n")
  seeds = {label: paths[label] for label in RUNS if label.startswith("opo, seed")}
  plots.compare_figure(seeds, DOCS / "quickstart.png")
  shown = ("opo, seed 0", "grpo", "grpo, 4 updates", "collapse")
  plots.compare_figure({label: paths[label] for label in shown}, DOCS / "variants.png")
  print(json.dumps(results, indent=2))


def summary(path: pathlib.Path) -> dict:
  """The result-file entry of one finished run."""
  rows = read_metrics(path)
  run = json.loads((path / "run.json").read_text())
  sft = [json.loads(line) for line in (path / "sft.jsonl").open()]
  evaluated = [row for row in rows if "eval/arithmetic/pass@1" in row]
  first, last, steps = evaluated[0], evaluated[-1], rows[1:]
  pass_1 = "eval/arithmetic/pass@1"
  return {
    "commit": run["commit"],
    "steps": last["step"],
    "start pass@1": round(first[pass_1], 3),
    "final pass@1": round(last[pass_1], 3),
    "final pass@1 interval": [round(last[f"{pass_1}_{x}"], 3) for x in ("low", "high")],
    "start length cv": round(steps[0]["response_length/cv"], 2),
    "start length-reward correlation": round(
      steps[0].get("response_length/reward_correlation", float("nan")), 2
    ),
    "final length": round(steps[-1]["response_length/mean"], 1),
    "final entropy": round(steps[-1]["policy/entropy"], 4),
    "final KL to start": round(steps[-1]["policy/kl_to_start"], 4),
    "largest logprob_diff_max": max(s["onpolicy/logprob_diff_max"] for s in steps),
    "largest clip_fraction": round(max(s["onpolicy/clip_fraction"] for s in steps), 4),
    "SFT s": round(sum(row["time/step_s"] for row in sft)),
    "RL s": round(sum(row["time/step_s"] for row in steps)),
    "evaluation s": round(sum(row["time/eval_s"] for row in evaluated)),
  }


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs/results"))

"""The `plan` command: plan or search, print the tables, write the file."""

import json
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

from opo_jax.config import Config
from opo_jax.planning.plan import Assumptions, plan
from opo_jax.planning.search import advice, search
from opo_jax.planning.topologies import GIB


def run(
  config: Config,
  topology_name: str,
  assumptions: Assumptions,
  *,
  out: pathlib.Path | None = None,
  searching: bool = False,
) -> int:
  """Plans, prints and writes; returns the exit code, 0 where the run fits, else 1.

  Args:
    config, topology_name, assumptions: as for `plan`.
    out: the file; None: plans/EXPERIMENT-TOPOLOGY.json.
    searching: try meshes and micro-batches; the file holds all plans that fit, the
      fastest first.
  """
  console = Console(soft_wrap=True)
  name = f"{config.experiment}-{topology_name.replace(':', '-')}.json"
  out = out or pathlib.Path("plans") / name
  if searching:
    made = search(config, topology_name, assumptions, report=console.print)
    for each in made[:3]:
      show(each, console)
    fits = bool(made)
  else:
    made = plan(config, topology_name, assumptions)
    show(made, console)
    for line in advice(made, config):
      console.print(line)
    fits = made["fits"]
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(made, indent=2) + "\n")
  console.print(f"{'It fits' if fits else 'It does not fit'}; {out}")
  return 0 if fits else 1


def show(made: dict[str, Any], console: Console) -> None:
  """Prints a plan: memory and cost of each program, and the bound on a step's time."""
  programs, memory = made["programs"], made["chip"]["memory"]
  mesh = " x ".join(f"{axis} {size}" for axis, size in made["mesh"].items())
  table = Table(
    title=f"{made['experiment']} on {made['topology']}: {made['devices']} devices"
    f" ({mesh}), GiB a device of {memory / GIB:.1f}"
  )
  table.add_column("", justify="left")
  for program in programs:
    table.add_column(program["name"], justify="right")
  _memory_rows(table, programs)
  table.add_section()
  _cost_rows(table, programs)
  console.print(table)
  assumed = made["assumed"]
  console.print(
    f"A step takes at least {made['step_s']:.3g} s: each program takes the time of its"
    " slowest resource at the published rate, with responses of"
    f" {assumed['mean_response_tokens']} tokens on average and prompts of"
    f" {assumed['prompt_tokens']}; rewards and checkpoints are not counted."
  )
  for program in programs:
    if program["reason"]:
      console.print(f"{program['name']}: {program['reason']}")


def _memory_rows(table: Table, programs: list[dict[str, Any]]) -> None:
  def gib(size):
    return "" if size is None else f"{size / GIB:.2f}"

  for kind in dict.fromkeys(kind for p in programs for kind in p["bytes"]):
    table.add_row(kind, *(gib(p["bytes"].get(kind)) for p in programs))
  table.add_row("sum", *(gib(sum(p["bytes"].values())) for p in programs))
  table.add_row("fits", *("yes" if p["fits"] else "NO" for p in programs))


def _cost_rows(table: Table, programs: list[dict[str, Any]]) -> None:
  def gb(size):
    return f"{size / 1e9:.3g}"

  table.add_row("TFLOP", *(f"{p['flops'] / 1e12:.3g}" for p in programs))
  table.add_row("GB through memory", *(gb(p["memory_bytes"]) for p in programs))
  for axes in dict.fromkeys(axes for p in programs for axes in p["collective_bytes"]):
    moved = (gb(p["collective_bytes"].get(axes, 0)) for p in programs)
    table.add_row(f"GB over {axes or 'self'}", *moved)
  table.add_row("executions a step", *(f"{p['executions']:.0f}" for p in programs))
  for what in ("compute", "memory", "links"):
    table.add_row(f"s, {what}", *(f"{p['seconds'][what]:.3g}" for p in programs))
  table.add_row("compiled in, s", *(f"{p['compile_s']:.0f}" for p in programs))
  table.add_row("… all cores, s", *(f"{p['compile_cpu_s']:.0f}" for p in programs))

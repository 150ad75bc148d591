"""Writes the tables of docs/scaling.md from the plans in docs/results/plans.

    .venv/bin/python docs/make_plans.py
    .venv-plan/bin/python docs/make_plans.py NAME [NAME ...]

The second form first compiles the named plans, minutes each; `make plan` creates
.venv-plan.
"""

import json
import pathlib
import sys

DOCS = pathlib.Path(__file__).parent
PAGE, PLANS = DOCS / "scaling.md", DOCS / "results" / "plans"
GIB = 2**30

_R1 = "r1_distill_qwen_7b"
_7B = f"opo_{_R1}"
_32K = "--rollout.max-new-tokens 32768"
_TENSOR_4 = "--mesh.tensor 4"


def _micro_batch(tokens):
  return f"--algorithm.micro-batch-tokens {tokens}"


# Name of the file -> EXP, TOPOLOGY and ARGS of `make plan`.
COMMANDS = {
  "0.5b-v5e-1x1": ("opo_qwen2_5_0_5b_gsm8k", "v5e:1x1", _micro_batch(8_192)),
  "0.5b-v5e-2x4": ("opo_qwen2_5_0_5b_gsm8k", "v5e:2x4", ""),
  "7b-8k-v5p-2x2x1": (_7B, "v5p:2x2x1", _micro_batch(40_960)),
  "7b-8k-v5p-2x2x2": (_7B, "v5p:2x2x2", _micro_batch(81_920)),
  "7b-8k-v5p-4x4x4": (_7B, "v5p:4x4x4", ""),
  "7b-8k-v5p-4x8x8": (_7B, "v5p:4x8x8", _micro_batch(2_621_440)),
  "7b-8k-v5p-8x8x16": (_7B, "v5p:8x8x16", f"{_TENSOR_4} {_micro_batch(2_621_440)}"),
  "7b-8k-v6e-2x4": (_7B, "v6e:2x4", f"{_TENSOR_4} {_micro_batch(20_480)}"),
  "7b-8k-v6e-8x8": (_7B, "v6e:8x8", ""),
  "7b-32k-v5p-4x4x4": (_7B, "v5p:4x4x4", f"{_32K} {_micro_batch(2_228_224)}"),
  "7b-32k-v6e-8x8": (_7B, "v6e:8x8", f"{_32K} {_TENSOR_4} {_micro_batch(557_056)}"),
  "grpo-v5p-2x2x1": (f"grpo_{_R1}", "v5p:2x2x1", _micro_batch(40_960)),
  "on-policy-grpo-v5p-2x2x1": (
    f"on_policy_grpo_{_R1}", "v5p:2x2x1", _micro_batch(40_960)
  ),
}  # fmt: skip

PROGRAM_NAMES = ("reshard", "prefill", "decode", "update")
# Plans with a row for each program.
DETAILED = (
  "0.5b-v5e-2x4",
  "7b-8k-v5p-4x4x4",
  "7b-8k-v6e-8x8",
  "7b-32k-v5p-4x4x4",
  "7b-32k-v6e-8x8",
)


def main(names: list[str]) -> None:
  for name in names:
    compile_plan(name)
  PAGE.write_text(with_tables(PAGE.read_text()))


def compile_plan(name: str) -> None:
  from opo_jax import __main__ as command_line

  experiment, topology, flags = COMMANDS[name]
  out = str(PLANS / f"{name}.json")
  command_line.main(["plan", experiment, topology, "--out", out, *flags.split()])


def with_tables(page: str) -> str:
  """The page with its tables replaced by those of the plans."""
  for section, table in (
    ("programs", programs_table(DETAILED)),
    ("whole", whole_table(COMMANDS)),
    ("commands", commands_table()),
  ):
    before, start, rest = page.partition(f"<!-- {section} -->\n")
    _, end, after = rest.partition(f"<!-- /{section} -->")
    assert start and end, f"{PAGE} lacks the comments <!-- {section} -->"
    page = before + start + table + end + after
  return page


def read(name: str) -> dict:
  return json.loads((PLANS / f"{name}.json").read_text())


def programs_table(names) -> str:
  """A row for each program."""
  rows = []
  for name in names:
    made = read(name)
    for program in made["programs"]:
      sizes, seconds = program["bytes"], program["seconds"]
      rows.append([
        f"`{name}`",
        program["name"],
        _gib(sizes["parameters"] + sizes["optimiser"] + sizes["start"]),
        _gib(sizes.get("weights", 0)),
        _gib(sizes.get("cache", 0)),
        _gib(sizes["temporaries"]),
        _sum(program, made),
        *(f"{seconds[what]:.3g}" for what in ("compute", "memory", "links")),
      ])  # fmt: skip
  head = "plan program state weights cache temporaries sum compute memory links"
  return _table(head.split(), rows)


def whole_table(names) -> str:
  """A row for each plan."""
  rows = []
  for name in names:
    made = read(name)
    programs = {program["name"]: program for program in made["programs"]}
    mesh, shards = made["mesh"], made["mesh"]["data"] * made["mesh"]["fsdp"]
    rows.append([
      f"`{name}`",
      str(made["devices"]),
      f"{mesh['fsdp']} x {mesh['tensor']}",
      str(programs["decode"]["slots"] // shards),
      *(_sum(programs[which], made) for which in ("decode", "update")),
      *(_bound(programs[which]) for which in PROGRAM_NAMES),
      f"{made['step_s']:.3g}",
    ])  # fmt: skip
  head = (
    "plan", "chips", "fsdp x tensor", "slots a shard", "GiB decode", "GiB update",
    *(f"s {which}" for which in PROGRAM_NAMES), "s step",
  )  # fmt: skip
  return _table(head, rows)


def commands_table() -> str:
  rows = [
    [f"`{name}`", f"`EXP={exp} TOPOLOGY={topology}`", f"`{flags}`" if flags else ""]
    for name, (exp, topology, flags) in COMMANDS.items()
  ]
  return _table(["plan", "make plan", "ARGS"], rows)


def _gib(size) -> str:
  return f"{size / GIB:.1f}"


def _sum(program, made) -> str:
  size = _gib(sum(program["bytes"].values()))
  text = f"{size} of {_gib(made['chip']['memory'])}"
  return text if program["fits"] else f"**{text}**"


def _bound(program) -> str:
  """The slowest resource: its seconds and its name."""
  resource, seconds = max(program["seconds"].items(), key=lambda item: item[1])
  return f"{seconds:.3g} {resource}"


def _table(head, rows) -> str:
  lines = [head, ["---"] * len(head), *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
  main(sys.argv[1:])

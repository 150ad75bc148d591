"""The architecture holds: who imports whom, what the maps list, what stays light.

`python tests/architecture_test.py` prints MAY_IMPORT as the code is now.
"""

import ast
import functools
import os
import pathlib
import re
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "opo_jax"

# Module: the modules that it imports, no more and no fewer. A new entry is a decision
# about the architecture. A package stands for itself and for all of its modules.
MAY_IMPORT = """
opo_jax:
__main__: commands config devices loop planning reports reward_training storage variance
advantages:
build: config devices learner models sampler
commands:
commands.data: data
commands.evaluate: build config evaluation run scorer storage
commands.export: config models run storage.json_files
commands.sample: build config data.prompts run
commands.variance: build config run scorer storage.json_files variance
config:
data:
data.arithmetic: data.prompts
data.builders: data.prompts
data.decontaminate: data.prompts
data.preferences: data.arithmetic data.prompts
data.prompts:
data.selection: data.prompts
data.sources: data.arithmetic data.builders data.decontaminate data.preferences
  data.prompts data.stream rewards.answers
data.stream: data.prompts
devices:
devices.aot:
devices.distributed: devices.environment devices.sharding
devices.environment:
devices.memory:
devices.profiling:
devices.sharding:
evaluation: evaluation.estimators evaluation.responses evaluation.summary
  evaluation.tables
evaluation.diversity:
evaluation.estimators:
evaluation.evaluator: build data.preferences evaluation evaluation.graded metrics run
  scorer
evaluation.graded: evaluation.responses evaluation.summary
evaluation.responses:
evaluation.summary: evaluation.diversity evaluation.estimators evaluation.responses
evaluation.tables:
learner: learner.algorithm learner.forward learner.state learner.update
learner.algorithm: advantages losses
learner.forward: devices.sharding learner.packing logprobs losses models.attention
  rollouts
learner.metrics: advantages learner.packing rollouts
learner.optimizer:
learner.packing:
learner.state: devices.sharding models.lora
learner.update: advantages devices learner.algorithm learner.forward learner.metrics
  learner.packing learner.state losses models.lora rollouts
logprobs:
loop: build config devices evaluation.evaluator learner metrics protocols
  reports.terminal reward_training rollouts run sampler scorer sft storage
losses: losses.aggregation losses.objectives losses.ratios
losses.aggregation: losses.checks
losses.checks:
losses.objectives: advantages losses.aggregation losses.checks losses.ratios
losses.ratios: losses.checks
metrics:
models: models.config models.config_json models.hf models.transformer
models.attention: models.flash
models.card:
models.config: models.rope
models.config_json: models.config models.rope
models.flash: devices.sharding
models.hf: devices.sharding models.config models.config_json models.lora
  models.transformer
models.lora: devices.sharding models.transformer
models.rope:
models.transformer: devices.sharding models.attention models.config models.rope
planning:
planning.command: config planning.plan planning.search planning.topologies
planning.hlo:
planning.jaxpr:
planning.plan: build config devices models planning.hlo planning.jaxpr planning.programs
  planning.replication planning.simulation planning.topologies
planning.programs: build config devices learner models rollouts sampler
planning.replication: planning.hlo planning.jaxpr
planning.search: config planning.plan planning.topologies
planning.simulation: sampler.schedule
planning.topologies: config
problems: config data devices.distributed
protocols: data.prompts learner rollouts sampler scorer
reports:
reports.charts: reports.run_files reports.style
reports.compare: evaluation reports.plots reports.report reports.run_files reports.style
reports.plots: reports.charts reports.run_files reports.style
reports.report: evaluation reports.charts reports.run_files
reports.run_files:
reports.style: reports.run_files
reports.terminal:
reward_training: build config data devices.sharding evaluation learner metrics models
  rewards.reward_model rollouts run scorer sft storage
rewards: rewards.custom rewards.math_verifier rewards.pool
rewards.answers:
rewards.custom:
rewards.early:
rewards.math_verifier: rewards.answers rewards.normalization rewards.numeric
rewards.normalization:
rewards.numeric:
rewards.pool:
rewards.reward_model: devices.sharding models rollouts
rewards.shaping: rewards.answers
rollouts:
run: build config data devices models problems reports.terminal scorer storage.directory
sampler: sampler.engine sampler.params sampler.schedule sampler.state
sampler.batch: devices models.transformer rollouts sampler.decoding sampler.params
  sampler.prefill sampler.schedule sampler.state
sampler.decoding: devices.sharding models rollouts sampler.params sampler.schedule
  sampler.state sampler.tokens
sampler.engine: devices models.transformer rollouts sampler.batch sampler.decoding
  sampler.lowering sampler.params sampler.prefill sampler.schedule sampler.state
sampler.lowering: devices models.transformer sampler.decoding sampler.params
  sampler.prefill sampler.state
sampler.params: models.transformer
sampler.prefill: devices.sharding models.transformer rollouts sampler.params
  sampler.state
sampler.schedule:
sampler.state: devices.sharding sampler.params
sampler.tokens: sampler.params
scorer: config data devices reports.terminal rewards rollouts
sft: build config data metrics rollouts run sampler storage.json_files
storage:
storage.checkpoint:
storage.config_file: config
storage.directory: config devices.distributed models.lora storage.checkpoint
  storage.config_file storage.json_files storage.run_json
storage.json_files:
storage.record: storage.json_files
storage.run_json: storage.json_files
variance: variance.estimates variance.estimators variance.gram variance.measurement
  variance.statistics variance.tables
variance.estimates: advantages rollouts variance.estimators variance.gram
variance.estimators: advantages
variance.gram: learner rollouts
variance.measurement: rollouts variance.estimates variance.gram variance.statistics
variance.statistics: variance.estimators
variance.tables:
"""


@functools.cache
def modules() -> dict[str, ast.Module]:
  """Every module by its name below the package ("" is opo_jax itself)."""
  names = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    name = name.removesuffix("__init__").removesuffix(".")
    names[name] = ast.parse(path.read_text())
  return names


def imports_of(tree: ast.Module, known) -> set[str]:
  """Modules of this package that a module imports, wherever the import stands."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
      # `from opo_jax.data import sources` imports a module, other names do not.
      names = [n if n.removeprefix("opo_jax.") in known else node.module for n in names]
    else:
      continue
    own = [n for n in names if n.split(".")[0] == "opo_jax"]
    found |= {n.removeprefix("opo_jax").removeprefix(".") for n in own}
  return found


def parsed(table: str) -> dict[str, set[str]]:
  """A table as text: `module: entries`, which may go on in lines further in."""
  rows = re.findall(r"^(\S+):(.*(?:\n +.*)*)", table, re.M)
  return {name: set(entries.split()) for name, entries in rows}


def covers(entry: str, module: str) -> bool:
  """Whether an entry of the table stands for this module."""
  return module == entry or module.startswith(f"{entry}.")


def differences(table, found):
  """What a table allows too little and too much, in words."""
  for name in sorted(found.keys() - table.keys()):
    yield f"{name} is not in the table"
  for name in sorted(table.keys() - found.keys()):
    yield f"{name} is in the table, and there is no such module"
  for name in sorted(table.keys() & found.keys()):
    for module in sorted(found[name]):
      if not any(covers(entry, module) for entry in table[name]):
        yield f"{name} may not import {module}"
    for entry in sorted(table[name]):
      if not any(covers(entry, module) for module in found[name]):
        yield f"{name} may import {entry}, and does not"


def imports() -> dict[str, set[str]]:
  trees = {name or "opo_jax": tree for name, tree in modules().items()}
  return {name: imports_of(tree, modules()) for name, tree in trees.items()}


def test_every_module_imports_what_the_table_says():
  assert not list(differences(parsed(MAY_IMPORT), imports()))


def test_a_wrong_table_is_told_line_by_line():
  leaf = ast.parse(
    "def f():\n  from opo_jax.data import sources\n  import opo_jax.loop"
  )
  found = {"leaf": imports_of(leaf, modules()), "new": set()}
  assert found["leaf"] == {"data.sources", "loop"}
  assert list(differences(parsed("leaf: data\n  loop\nnew:"), found)) == []
  assert list(differences(parsed("leaf: data run\ngone:"), found)) == [
    "new is not in the table",
    "gone is in the table, and there is no such module",
    "leaf may not import loop",
    "leaf may import run, and does not",
  ]


def test_no_modules_import_each_other():
  graph, done = imports(), set()

  def visit(name, path):
    assert name not in path, " -> ".join([*path, name])
    if name not in done:
      for other in graph[name]:
        visit(other, [*path, name])
    done.add(name)

  for name in graph:
    visit(name, [])


def test_only_sharding_and_the_command_line_ask_for_devices():
  asking = {
    name
    for name, tree in modules().items()
    if any(
      isinstance(node, ast.Attribute) and node.attr in ("devices", "local_devices")
      and isinstance(node.value, ast.Name) and node.value.id == "jax"
      for node in ast.walk(tree)
    )
  }  # fmt: skip
  assert asking <= {"devices.sharding", "__main__"}


def test_only_what_assembles_a_run_knows_the_config():
  """All other modules take plain values. (`near_names` writes error messages.)"""
  knowing = {
    name.split(".")[0]
    for name, tree in modules().items()
    for node in ast.walk(tree)
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if f"{node.module}.{alias.name}" == "opo_jax.config"
    or (node.module == "opo_jax.config" and alias.name != "near_names")
  }
  assert knowing == {
    "__main__",
    "build",
    "commands",
    "loop",
    "planning",
    "problems",
    "reward_training",
    "run",
    "scorer",
    "sft",
    "storage",  # a run directory holds its config.json
  }


def test_no_module_is_called_utils():
  assert not [name for name in modules() if re.search("util|helper|common|misc", name)]


# --- names and maps -----------------------------------------------------------------


def legend() -> tuple[list[str], str]:
  """The letters of the table of shapes in opo_jax/__init__.py, and the text around."""
  table, prose = [], []
  for line in ast.get_docstring(modules()[""]).splitlines():
    if re.match(r"    [A-Z]  ", line):
      table += re.findall(r"(?:^|\s{2})\s*([A-Z])  (?=\S)", line)
    elif not line.startswith("    "):
      prose.append(line)
  return table, "\n".join(prose)


def shape_suffixes(tree: ast.Module) -> set[str]:
  """The suffixes of its names that are shapes: BTD of `hidden_BTD`."""
  names = set()
  for node in ast.walk(tree):
    for kind, field in ((ast.Name, "id"), (ast.arg, "arg"), (ast.Attribute, "attr")):
      if isinstance(node, kind):
        names.add(getattr(node, field))
  found = (re.fullmatch(r"_?[a-z][a-z0-9_]*_([A-Z][A-Z0-9]*)", name) for name in names)
  return {match[1] for match in found if match}


def test_a_shape_letter_has_one_meaning():
  letters, prose = legend()
  assert len(letters) > 10
  assert not sorted({each for each in letters if letters.count(each) > 1})
  # No sentence beside the table gives a letter a second meaning.
  assert not re.findall(r"\b[B-HJ-Z]\b", prose)


def test_every_shape_suffix_is_in_the_legend():
  letters, _ = legend()
  unknown = {
    f"{name}: {suffix}"
    for name, tree in modules().items()
    if name.split(".")[0] in ("sampler", "learner", "models")
    for suffix in shape_suffixes(tree)
    if set(re.sub(r"[0-9]", "", suffix)) - set(letters)
  }
  assert not unknown


def test_suffixes_are_found_in_names_parameters_and_attributes():
  code = (
    "def f(a_BT, T):\n  MAX_LEN = self.b_G2\n  c_SV = lambda d_E: _e_F\n  x_y = X_Y"
  )
  assert shape_suffixes(ast.parse(code)) == {"BT", "G2", "SV", "E", "F"}


def top_level() -> set[str]:
  return {name.split(".")[0] for name in modules()} - {""}


def tree_of(page: str) -> set[str]:
  """The files and folders of opo_jax/ in the tree of a page: below it, two deeper."""
  (block,) = re.findall(r"^    opo_jax/.*\n((?:      +\S.*\n)+)", page, re.M)
  rows = re.findall(r"^      (\S.*?)(?:  .*)?$", block, re.M)
  return {re.sub(r"(\.py|/)$", "", word) for row in rows for word in row.split()}


def map_of(text: str) -> set[str]:
  """Modules and packages of a docstring's map: a line each, a package's modules below.

  sampler   prompts -> rollouts
            params engine decoding
  """
  listed, package = set(), ""
  for indent, line in re.findall(r"^( {4,})([a-z_].*)$", text, re.M):
    if len(indent) == 4:
      package = line.split()[0]
      listed.add(package)
    else:
      listed |= {f"{package}.{name}" for name in line.split()}
  return listed


def test_the_maps_list_every_module():
  packaged = map_of(ast.get_docstring(modules()[""]))
  wrong = packaged ^ (set(modules()) - {""})
  assert not wrong, f"in opo_jax/__init__.py or in the package alone: {sorted(wrong)}"
  wrong = map_of((ROOT / "docs" / "architecture.md").read_text()) ^ packaged
  assert not wrong, f"in docs/architecture.md or in opo_jax alone: {sorted(wrong)}"
  wrong = tree_of((ROOT / "README.md").read_text()) ^ top_level()
  assert not wrong, f"in README.md or in the package alone: {sorted(wrong)}"


# --- what stays light ---------------------------------------------------------------


# In this order in one process: what a module may load, those before it may not.
ABSENT = {
  "opo_jax": {"jax", "numpy"},
  "opo_jax.config": {"jax", "numpy"},
  "opo_jax.__main__": {"jax", "numpy"},
  "opo_jax.rewards": {"jax", "sympy"},
  "opo_jax.loop": {"tensorflow", "torch", "matplotlib"},
}


def test_importing_a_module_does_not_load_what_it_does_not_need():
  code = f"""
import importlib, sys
for module in {list(ABSENT)}:
  importlib.import_module(module)
  print(*{{name.split(".")[0] for name in sys.modules}})
"""
  output = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
  )
  loaded = map(set, map(str.split, output.stdout.splitlines()))
  found = dict(zip(ABSENT, loaded, strict=True))
  too_many = {name: found[name] & absent for name, absent in ABSENT.items()}
  assert not any(too_many.values()), too_many


def test_the_algorithm_imports_jax_and_nothing_besides():
  """Nor does it touch a device: whoever imports it may still choose the platform."""
  code = """
import sys
import jax, jax.numpy
before = set(sys.modules)
import opo_jax.advantages, opo_jax.losses, opo_jax.logprobs
print(*set(sys.modules) - before)
"""
  # A platform that is not there: the first array would fail.
  environment = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=environment,
  )
  assert done.returncode == 0, done.stderr
  loaded = {name.split(".")[0] for name in done.stdout.split()}
  assert loaded - {"jax", "jaxlib"} - sys.stdlib_module_names == {"opo_jax"}


def written(found: dict[str, set[str]]) -> str:
  """The table as text: for several modules of another package, the package."""
  lines = []
  for name, others in found.items():
    packages = [other.split(".")[0] for other in others]
    own = name.split(".")[0]
    entries = {
      package if packages.count(package) > 1 and package != own else other
      for other, package in zip(others, packages, strict=True)
    }
    line = f"{name}: {' '.join(sorted(entries))}".rstrip()
    lines += textwrap.wrap(line, 88, subsequent_indent="  ", break_on_hyphens=False)
  return "\n".join(lines)


if __name__ == "__main__":
  print(written(imports()))

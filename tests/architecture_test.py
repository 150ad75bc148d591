"""The house holds its plan: who may import whom, and what stays light."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "opo_jax"

# Room -> the rooms it may import; nothing else may. A package's name stands for all of
# its rooms; rooms of one package are listed where they use each other. Rooms that are
# planned and not built yet stand here too, so that they are built where they belong.
MAY_IMPORT = {
  "__main__": {"loop", "evaluation", "planning", "plots", "variance", "models.hf"}
  | {"reward_loop"}
  | {"report", "compare"}  # pages about one run, about several
  | {"environment"}  # before JAX starts
  | {"sharding"}  # how one of several processes ends
  | {"commands"}  # what is done with a finished run, which no loop needs to hold
  | {"config"},  # the command line parses flags over it
  # The loop's three: the order of a step, its phases, and the commands besides.
  "loop": {"run", "build", "data", "checkpoint", "metrics", "profiling", "config"}
  | {"reward_loop"}
  | {"sharding"},  # the processes of a run find each other first
  "problems": {"data", "config"}
  | {"sharding"},  # of several processes each measures its share of the prompts
  "run": {"problems", "build", "data", "rewards", "packing", "evaluation", "checkpoint"}
  | {"metrics", "sharding", "config", "judging", "rollouts"}
  | {"scoring", "memory"}  # of a batch, while it is sampled; of a device
  | {"warm_start"},
  "warm_start": {"build", "data", "metrics", "rollouts", "config"},
  # A second, smaller loop, before the other: preference pairs instead of rollouts.
  "reward_loop": {"run", "models", "data", "rewards", "rollouts", "evaluation"}
  | {"checkpoint", "metrics", "sharding", "config", "warm_start"},
  "commands": {"run", "data", "metrics", "config", "evaluation"}
  | {"checkpoint"},  # results name the policy they are of
  "planning": {"build", "sharding", "config"}
  | {"hlo", "models"}  # what programs move; the shapes of known models
  | {"decoding"},  # by whose rules a ring grows and slots become fewer
  "hlo": set(),
  "environment": set(),
  "variance": {"advantages", "rollouts"}
  | {"trainer"},  # it differentiates the very log-probs that training does
  "build": {"models", "sampler", "trainer", "advantages", "sharding", "config"}
  | {"rollouts"}  # demonstrations are made into rollouts here
  | {"rewards.reward_model"},  # a device part like the policy
  # The sampler's two halves below it: the compiled programs, and logits to a token.
  "sampler": {"models", "rollouts", "sharding", "decoding", "distribution", "memory"},
  "decoding": {"models", "rollouts", "sharding", "distribution"},
  "distribution": set(),
  "trainer": {"losses", "logprobs", "advantages", "rollouts", "packing", "sharding"}
  | {"models.attention"},  # responses attend to the keys of their prompt
  "evaluation": {"diversity"},
  "diversity": set(),
  "judging": {"evaluation"},
  "rewards.reward_model": {"rollouts", "models", "sharding"},
  "models.transformer": {"sharding", "models.attention", "models.config"}
  | {"models.rope"},
  "models.lora": {"sharding", "models.transformer"},
  "models.hf": {"sharding", "models.config", "models.config_json"}
  | {"models.transformer", "models.lora"},
  "models.config_json": {"models.config", "models.rope"},
  "models.config": {"models.rope"},  # the scalings are part of it
  "models.rope": set(),
  "models.card": set(),
  "models.attention": {"models.flash"},
  "models.flash": {"sharding"},
  "data.sources": {"data.prompts", "data.arithmetic", "data.builders", "data.stream"}
  | {"data.preferences", "data.dedup"}
  | {"rewards.answers"},  # a reference solution's answer is found as a response's
  "data.builders": {"data.prompts"},
  "data.stream": {"data.prompts"},
  "data.selection": {"data.prompts"},
  "data.dedup": {"data.prompts"},
  "data.arithmetic": {"data.prompts"},
  "data.preferences": {"data.prompts", "data.arithmetic"},
  "checkpoint": set(),
  # Leaves take arrays and plain numbers.
  "advantages": set(),
  "losses": {"advantages"},  # opo_loss goes from rewards to a loss in one call
  "logprobs": set(),
  "rollouts": set(),
  "packing": set(),
  "sharding": {"environment"},  # of several processes all compile, or all read
  "config": set(),
  "metrics": set(),
  "profiling": set(),
  "memory": set(),
  "scoring": set(),
  "plots": set(),
  "report": {"plots", "evaluation"},
  "compare": {"plots", "evaluation", "judging", "report"},
  "data.prompts": set(),
  "rewards.math_verifier": {
    "rewards.answers",
    "rewards.normalization",
    "rewards.numeric",
  },
  "rewards.answers": set(),
  "rewards.normalization": set(),
  "rewards.numeric": set(),
  "rewards.pool": set(),
  "rewards.custom": set(),
  "rewards.shaping": {"rewards.answers"},
}
FACES = {
  "": set(),
  "models": {"models.config", "models.config_json", "models.hf", "models.transformer"},
  "data": set(),
  "rewards": {"rewards.custom", "rewards.math_verifier", "rewards.pool"},
}


def rooms():
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    yield ".".join(parts).removesuffix("__init__").removesuffix("."), path


def imports_of(path):
  """Rooms that a file imports, wherever in it the import stands."""
  names = {name for name, _ in rooms()}
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: imports are absolute"
      module = node.module or ""
      modules = [f"{module}.{alias.name}" for alias in node.names]
      # `from opo_jax.data import sources` is a room, `from …plots import report` not.
      modules = [m if m.removeprefix("opo_jax.") in names else module for m in modules]
    else:
      continue
    found |= {
      m.removeprefix("opo_jax").removeprefix(".")
      for m in modules
      if m.split(".")[0] == "opo_jax"
    }
  return found


@pytest.mark.parametrize(
  ("room", "path"), list(rooms()), ids=lambda value: str(value)[-30:]
)
def test_a_room_imports_only_what_the_plan_allows(room, path):
  allowed = FACES[room] if path.name == "__init__.py" else MAY_IMPORT[room]
  too_many = {
    name
    for name in imports_of(path)
    if name not in allowed and name.split(".")[0] not in allowed
  }
  assert not too_many, f"{room or 'opo_jax'} may not import {sorted(too_many)}"


def test_a_forbidden_import_is_seen(tmp_path):
  file = tmp_path / "leaf.py"
  file.write_text(
    "def f():\n  from opo_jax.data import sources\n  import opo_jax.loop\n"
  )
  assert imports_of(file) == {"data.sources", "loop"}


def test_only_sharding_and_the_command_line_ask_for_devices():
  allowed = {"sharding", "__main__"}
  asking = {
    name
    for name, path in rooms()
    if any(
      isinstance(node, ast.Attribute) and node.attr in ("devices", "local_devices")
      and isinstance(node.value, ast.Name) and node.value.id == "jax"
      for node in ast.walk(ast.parse(path.read_text()))
    )
  }  # fmt: skip
  assert asking <= allowed


def test_only_build_loop_planning_and_the_command_line_know_the_config():
  knowing = {name for name, path in rooms() if "config" in imports_of(path)}
  assert knowing <= {
    "build",
    "loop",
    "reward_loop",
    "run",
    "problems",
    "warm_start",
    "commands",
    "planning",
    "__main__",
  }


def test_every_config_field_is_read():
  """As an attribute, in one of the rooms that know the config."""
  import dataclasses

  from opo_jax.config import Config

  rooms_that_read = ("build", "loop", "reward_loop", "run", "problems", "commands")
  rooms_that_read += ("warm_start",)
  read = {
    node.attr
    for name in (*rooms_that_read, "__main__")
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text()))
    if isinstance(node, ast.Attribute)
  }

  def fields(cls):
    for field in dataclasses.fields(cls):
      if dataclasses.is_dataclass(field.type):
        yield from fields(field.type)
      else:
        yield field.name

  # The experiment's name is read from config.json, by the report.
  assert not set(fields(Config)) - read - {"experiment"}


@pytest.mark.parametrize(
  ("module", "absent"),
  [
    ("opo_jax", {"jax", "numpy"}),
    ("opo_jax.config", {"jax", "numpy"}),
    ("opo_jax.__main__", {"jax", "numpy"}),
    ("opo_jax.rewards", {"jax", "sympy"}),
    ("opo_jax.loop", {"tensorflow", "torch", "matplotlib"}),
  ],
)
def test_importing_a_room_does_not_load_what_it_does_not_need(module, absent):
  code = f"import sys, {module}; print(*sys.modules)"
  output = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
  )
  loaded = {name.split(".")[0] for name in output.stdout.split()}
  assert not loaded & absent


@pytest.mark.parametrize(
  "module", ["opo_jax.advantages", "opo_jax.losses", "opo_jax.logprobs"]
)
def test_the_algorithm_imports_jax_and_nothing_besides(module):
  """Nor does it touch a device: whoever imports it may still choose the platform."""
  code = f"""
import sys
import jax, jax.numpy
before = set(sys.modules)
import {module}
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


def test_no_room_is_called_utils_and_none_is_endless():
  for name, path in rooms():
    assert "util" not in name and "helper" not in name
    assert len(path.read_text().splitlines()) <= 700, f"{name} holds two ideas"

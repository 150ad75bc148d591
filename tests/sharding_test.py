"""The mesh, its rules, and collectives between several processes."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import textwrap

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from opo_jax import __main__ as command_line
from opo_jax.data.stream import ProblemStream
from opo_jax.devices import distributed, sharding

ROOT = pathlib.Path(__file__).parents[1]


def test_a_dimension_lies_where_its_rule_says():
  rules = sharding.RULES
  assert rules.spec("batch", None) == PartitionSpec(("data", "fsdp"), None)
  assert rules.spec("embed", "mlp") == PartitionSpec(("fsdp",), ("tensor",))


def test_two_dimensions_on_one_mesh_axis_are_refused():
  with pytest.raises(ValueError, match="two dimensions over the mesh axis 'tensor'"):
    sharding.RULES.spec("vocab", "mlp")
  with pytest.raises(ValueError, match="two dimensions over the mesh axis 'fsdp'"):
    sharding.RULES.spec("batch", "embed")


def test_an_axis_without_a_rule_is_refused_with_those_that_have_one():
  with pytest.raises(ValueError, match=r"no rule for the logical axis 'head'.*'heads'"):
    sharding.RULES.spec("head")


def test_rules_know_the_axes_of_the_mesh():
  with pytest.raises(ValueError, match=r"'mlp' is to lie over \('model',\)"):
    sharding.Rules(mlp=("model",))
  with pytest.raises(ValueError, match="each once"):
    sharding.Rules(batch=("data", "data"))


def test_one_process_owns_every_index():
  mesh = sharding.make_mesh(2, 2, 2)
  assert distributed.local_indices(mesh, 5).tolist() == [0, 1, 2, 3, 4]
  np.testing.assert_array_equal(
    distributed.all_gather(np.arange(5), mesh, 5), np.arange(5)
  )


@pytest.mark.parametrize(
  "given",
  [("localhost:1234", 0, -1), ("", 2, -1), ("localhost:1234", 2, -1), ("", 2, 1)],
)
def test_half_a_start_by_hand_is_refused(given):
  with pytest.raises(ValueError, match="give all of --distributed"):
    distributed.start_processes(*given)


def test_a_machine_on_its_own_joins_no_other(monkeypatch):
  for name in ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
    monkeypatch.delenv(name, raising=False)
  distributed.start_processes()
  assert jax.process_count() == 1


@pytest.mark.parametrize(
  ("variables", "cluster"),
  [
    ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM"),
    ({"SLURM_STEP_NUM_TASKS": "1"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "GKE"),
    ({"TPU_WORKER_HOSTNAMES": "a"}, None),
  ],
)
def test_clusters_are_known_by_their_variables(monkeypatch, variables, cluster):
  for name in ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert distributed._cluster() == cluster


@pytest.mark.parametrize("command", ["eval", "sample", "reward-model", "variance"])
def test_a_command_for_one_process_is_refused_to_several(command, monkeypatch, capsys):
  given = {"reward-model": ["quickstart"], "sample": ["run", "2+2"]}.get(
    command, ["run"]
  )
  monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
  several = ["--distributed.num-processes", "2"]
  assert command_line.main([command, *given, *several]) == 2
  monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
  assert command_line.main([command, *given]) == 2
  told = capsys.readouterr().err
  assert told.count(f"error: {command} is for one process; start one") == 2


@pytest.mark.parametrize(
  ("tasks", "nodes", "gpus", "taken"),
  [
    ("4", "4", "8", {"local_device_ids": [*range(8)]}),  # JAX alone would take one
    ("32", "4", "8", {}),  # a task for every GPU: JAX knows which is whose
    ("4", "4", None, {}),
  ],
)
def test_a_task_that_has_a_node_alone_takes_all_its_gpus(
  monkeypatch, tasks, nodes, gpus, taken
):
  joined = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **how: joined.append(how))
  monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
  monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
  monkeypatch.setenv("SLURM_STEP_NUM_NODES", nodes)
  if gpus:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", gpus)
  distributed.start_processes()
  (how,) = joined
  assert how.pop("heartbeat_timeout_seconds") < how.pop("initialization_timeout")
  assert how == taken


@pytest.mark.parametrize(
  ("platform", "directory", "kept"),
  [
    ("gpu", "/everybodys", True),
    ("gpu", "/own/opo_jax/xla", False),
    ("gpu", None, False),
    ("cpu", "/everybodys", False),
  ],
)
def test_several_processes_keep_programs_where_all_find_the_same(
  monkeypatch, platform, directory, kept
):
  names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
  before = {name: getattr(jax.config, name) for name in names}
  monkeypatch.setenv("XDG_CACHE_HOME", "/own")
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  try:
    for name, value in zip(names, (True, directory), strict=True):
      jax.config.update(name, value)
    distributed._compile_alike()
    assert jax.config.jax_enable_compilation_cache == kept
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


# --- several real processes ---------------------------------------------------------


def start_processes(code, num_processes, devices_each, out=None):
  """Starts `code` in processes; its arguments are where they meet, and which it is.

  What it prints goes to `out/0`, `out/1`, …: the collectives' library greets on the
  standard output, from several threads, in the middle of others' lines.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices_each}",
    "PYTHONPATH": str(ROOT),
  }
  to_file = "import functools\nprint = functools.partial(print, file=open({!r}, 'w'))\n"
  code = textwrap.dedent(code)
  return [
    subprocess.Popen(
      [
        sys.executable,
        "-c",
        (to_file.format(f"{out}/{i}") if out else "") + code,
        f"localhost:{port}",
        str(i),
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for i in range(num_processes)
  ]


def run_processes(code, num_processes, devices_each, timeout_s=120):
  """Runs `code` in processes that find each other on loopback; gives their lines."""
  with tempfile.TemporaryDirectory() as out:
    started = start_processes(code, num_processes, devices_each, out)
    try:
      for process in started:
        _, err = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, err
      files = [pathlib.Path(out, str(i)) for i in range(num_processes)]
      return [file.read_text().splitlines() for file in files]
    finally:
      for process in started:
        process.kill()


EXCHANGE = """
  import json, sys
  import jax, numpy as np
  from opo_jax.devices import distributed, sharding
  distributed.start_processes(sys.argv[1], 2, int(sys.argv[2]))
  lists = [list(range(i)) for i in range(5)]

  def exchanged(mesh):
    own, everybodys = {}, {}
    for count in (16, 5):
      share = distributed.local_indices(mesh, count)
      own[count] = share.tolist()
      values = np.stack([share * 10 + 2**40, share], axis=1)  # 64 bits must survive
      gathered = distributed.all_gather(values, mesh, count)
      everybodys[count] = (gathered[:, 0] - 2**40).tolist()
    share = distributed.local_indices(mesh, 5)
    assert distributed.all_gather_lists([lists[i] for i in share], mesh, 5) == lists
    array = sharding.put(np.arange(32).reshape(16, 2), mesh, "batch", None)
    total = jax.jit(lambda x: x.sum(0))(array)
    whole = distributed.to_host_replicated(array, mesh)
    assert whole.shape == (16, 2) and (whole == np.arange(32).reshape(16, 2)).all()
    return own, everybodys, distributed.to_host_replicated(total, mesh).tolist()

  for sizes in (1, -1, 1), (1, 1, -1):
    print(json.dumps(exchanged(sharding.make_mesh(*sizes))))
  share = distributed.local_indices(None, 5)
  assert share.tolist() == ([0, 1, 2], [3, 4])[jax.process_index()]
  assert (distributed.all_gather(share, None, 5) == range(5)).all()
  print(json.dumps(distributed.is_first_process()))
"""


def test_each_process_takes_its_share_and_all_see_everything():
  outputs = run_processes(EXCHANGE, 2, 2)
  outputs = [[json.loads(line) for line in output] for output in outputs]
  for i, shares in enumerate(
    (
      # Shards of the batch 0..3: two to a process.
      ([*range(8)], [*range(8, 16)]),
      # `tensor` crosses the processes: the shards of both belong to the first.
      ([*range(16)], []),
    )
  ):
    for output, share in zip(outputs, shares, strict=True):
      own, everybodys, total = output[i]
      assert own["16"] == share
      for count in (16, 5):
        assert everybodys[str(count)] == [10 * i for i in range(count)]
      assert total == np.arange(32).reshape(16, 2).sum(0).tolist()
    uneven = [index for output in outputs for index in output[i][0]["5"]]
    assert sorted(uneven) == [0, 1, 2, 3, 4]
  assert [output[2] for output in outputs] == [True, False]


FAILURE = """
  import sys
  from opo_jax import __main__ as command_line
  from opo_jax.devices import distributed, sharding

  def fail(known, flags):
    raise KeyError("the disk is full")

  distributed.start_processes(sys.argv[1], 2, int(sys.argv[2]))
  if sys.argv[2] == "1":
    command_line.COMMANDS["train"] = fail
    command_line.main(["train", "quickstart"])
  distributed.barrier("a place where the other never comes")
"""


def test_an_error_in_one_process_is_told_and_ends_the_others():
  first, second = start_processes(FAILURE, 2, 1)
  try:
    _, said = second.communicate(timeout=100)
    assert second.returncode == 1 and "KeyError: 'the disk is full'" in said
    assert first.wait(timeout=100) != 0  # JAX's barrier alone would take 300
  finally:
    first.kill()


def test_a_process_whose_others_never_come_says_so_and_ends():
  code = """
  import sys
  from opo_jax.devices import distributed, sharding
  distributed._JOIN_S = 3
  distributed.start_processes(sys.argv[1], 2, int(sys.argv[2]))
  print("alone")
"""
  (process,) = start_processes(code, 1, 1)
  out, said = process.communicate(timeout=100)
  assert process.returncode != 0 and "alone" not in out
  assert "Waiting up to 3 s for the other processes (localhost:" in said


OWN_PROMPTS = """
  import os, sys
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "1"
  os.environ["JAX_COMPILATION_CACHE_DIR"] = "/everybodys"
  from types import SimpleNamespace
  from opo_jax.devices import distributed, sharding
  from opo_jax.data.stream import ProblemStream
  from opo_jax.run import Run

  class Problems(list):
    def __getitem__(self, place):
      read.append(place)
      return super().__getitem__(place)

  read = []
  distributed.start_processes(sys.argv[1], 2, int(sys.argv[2]))
  mesh = sharding.make_mesh(1, -1, 1)
  run = SimpleNamespace(mesh=mesh)
  run.encode = lambda problems: [[problem] * (1 + problem % 3) for problem in problems]
  asked = ProblemStream(Problems(range(12)), seed=0).take(8)
  own = Run.encode_local(run, asked)
  print(read)
  print(distributed.all_gather_lists(own, mesh, 8))
  import jax
  assert not jax.config.jax_enable_compilation_cache  # nothing read, nothing compiled
"""


def test_each_process_reads_and_tokenises_its_own_prompts_and_all_get_all():
  first, second = run_processes(OWN_PROMPTS, 2, 2)
  order = [int(problem) for problem in ProblemStream(range(12), seed=0).take(8)]
  assert [json.loads(output[0]) for output in (first, second)] == [order[:4], order[4:]]
  prompts = [[problem] * (1 + problem % 3) for problem in order]
  assert json.loads(first[1]) == json.loads(second[1]) == prompts

"""Planning: topologies by name, what is replicated, and plans for absent TPUs.

Tests that need `libtpu` have `absent` in their names and run with `make test-plan`.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from experiments import (
  grpo_r1_distill_qwen_7b,
  on_policy_grpo_r1_distill_qwen_7b,
  opo_qwen2_5_0_5b_gsm8k,
  opo_r1_distill_qwen_7b,
  quickstart,
)
from opo_jax import __main__ as command_line
from opo_jax import sampler
from opo_jax.devices import sharding
from opo_jax.models import ModelConfig, Policy
from opo_jax.planning import command
from opo_jax.planning import plan as planning
from opo_jax.planning.plan import Assumptions, plan
from opo_jax.planning.programs import abstract_run
from opo_jax.planning.replication import replicated
from opo_jax.planning.search import advice, search
from opo_jax.planning.simulation import assumed_lengths, simulate_decoding
from opo_jax.planning.topologies import topology
from opo_jax.sampler import decoding, schedule

# Plans read the text of compiled programs.
pytestmark = pytest.mark.usefixtures("compiled_anew")
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu compiles for absent TPUs: make test-plan",
)


def test_an_impossible_topology_is_refused_with_the_nearest_possible():
  cases = {
    "v5x:4x8": "not a known TPU generation; did you mean v5",
    "v5e": r"has no shape; write TOPOLOGY=v5e:4x8",
    "v5e:4x": r"has no shape",
    "v5e:4x4x4": "v5e slices have 2 dimensions and up to 256 chips",
    "v5e:32x32": "up to 256 chips",
    "v5p:8x8": r"v5p slices have 3 dimensions .* TOPOLOGY=v5p:4x4x4",
    "v5p:3x3x3": "hosts of 2x2 chips, which cannot make 3x3x3",
    # As Google names slices: of v4 and v5p, by TensorCores.
    "v5p-64": "64 counts TensorCores, two a chip; write TOPOLOGY=v5p:2x4x4",
    "v6e-64": "64 counts chips; write TOPOLOGY=v6e:8x8",
    "v5litepod-8": "TOPOLOGY=v5e:2x4",
    "v5p-8": "TOPOLOGY=v5p:2x2x1",
    "V5E:4x8": "did you mean v5e",
    "v7x:2x2x2": "did you mean tpu7x",
    "h100:8": "there are",
  }
  failures = []
  for name, message in cases.items():
    try:
      said = f"accepted: {len(topology(name))} devices"
    except ValueError as error:
      said = str(error)
    if not re.search(message, said):
      failures.append(f"{name}: {said}")
  assert not failures, "\n".join(failures)


# --- replication ---------------------------------------------------------------------

# What programs of the 7B run do not split over all of fsdp and tensor, and why.
LAYER = "a layer's weights, gathered over fsdp while it is computed"
GATHERED = "the sampler's weights are whole over fsdp: --rollout.gather-weights"
ACTIVATIONS = "between blocks, tensor splits no activation"
ROLLOUTS = "rows of the batch lie over data and fsdp: some bytes a token"
LOOKED_UP = "the batch's embeddings, in each share of the width"


def reason(name: str, where: str, program: str, mesh: dict[str, int]) -> str:
  """Why an array is not split; empty: there is no reason."""
  fsdp, tensor = mesh["fsdp"], mesh["tensor"]
  rows = r"(input|output) .*\.((sampling_)?logprobs|tokens|layout\.\w+)"
  if where == "tensor" and re.fullmatch(rows, name):
    return ROLLOUTS
  mlp, heads = 18_944 // tensor, 3584 // tensor
  layer = f"3584,{mlp}|{mlp},3584"
  if program != "update":
    if re.fullmatch(r"input \[0\]\[\d\]\.(embedding|untied|layers\..*)\.value", name):
      return GATHERED
    if re.fullmatch(r"output \.(embedding|untied|layers\..*)\.value", name):
      return GATHERED if program == "reshard" else ""
    layer += f"|3584,{heads}|{heads},3584|3584,{512 // tensor}|{152_064 // tensor},3584"
    whole = rf"\w+\[((28|1),)?({layer})\]"
    return GATHERED if re.fullmatch(whole, name) else ""
  tokens = "2048|8192|10240|32768|34816"
  for shape, why in (
    (rf"(1,)?({layer})", LAYER),
    (rf"((28|1),)?(\d+,)?({tokens}),3584", ACTIVATIONS),
    (rf"(\d+,)*({tokens}|20480|2621440),{3584 // fsdp}", LOOKED_UP),
  ):
    # A layer's weights may be whole; of all others each shard of fsdp has its own.
    if re.fullmatch(rf"\w+\[{shape}\]", name):
      return why if why == LAYER or int(where.split()[0]) >= fsdp else ""
  return ""


def test_a_batch_of_activations_on_every_shard_has_no_reason():
  mesh = {"data": 1, "fsdp": 2, "tensor": 4}
  name = "bf16[28,1,10240,3584]"
  assert reason(name, "2 of 8 parts: forward", "update", mesh) == ACTIVATIONS
  assert not reason(name, "1 of 8 parts: forward", "update", mesh)
  # Nor has the gradient of the embedding, split over the width alone.
  assert not reason("f32[152064,1792]", "2 of 8 parts: scatter", "update", mesh)


def without_reason(made):
  """The arrays of a plan that are not split and should be."""
  return {
    (program["name"], name): where
    for program in made["programs"]
    for name, where in program["replicated"].items()
    if not reason(name, where, program["name"], made["mesh"])
  }


@pytest.fixture(scope="module")
def compiled_anew():
  """No program comes from the compilation cache: their text is read."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  yield
  jax.config.update("jax_enable_compilation_cache", before)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def mesh_and_programs_of_7b(compiled_anew):
  """Eight devices, and name -> the traced and the compiled program of the 7B run."""
  config = opo_r1_distill_qwen_7b.get_config()
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, dtype="bfloat16"),
    rollout=dataclasses.replace(config.rollout, prompts_per_step=8, slots=32),
    algorithm=dataclasses.replace(config.algorithm, micro_batch_tokens=81_920),
  )
  mesh = sharding.make_mesh(1, 4, 2)
  lowered = planning.lower_run(
    config,
    mesh,
    planning.model_shape(config),
    prompt_tokens=config.rollout.max_prompt_tokens,
  )
  return mesh, {
    program.name: (program.traced, program.traced.lower().compile())
    for program in lowered
  }


def test_nothing_large_of_the_7b_run_is_replicated_by_accident(mesh_and_programs_of_7b):
  """28 layers, real widths, compiled for eight devices: inputs, outputs, and what the
  programs hold between them."""
  mesh, programs = mesh_and_programs_of_7b
  unexplained, explained = {}, set()
  for program, (traced, compiled) in programs.items():
    for name, where in replicated(compiled, traced, mesh).items():
      if reason(name, where, program, mesh.shape):
        explained.add(program)
      else:
        unexplained[program, name] = where
  assert unexplained == {}
  assert explained == {"reshard", "prefill", "decode", "update"}  # each has some


def test_the_sampler_s_weights_are_not_there_twice_while_they_are_made(
  mesh_and_programs_of_7b,
):
  _, reshard = mesh_and_programs_of_7b[1]["reshard"]
  memory = reshard.memory_analysis()
  assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 2


def test_no_large_parameter_or_moment_of_the_other_runs_is_replicated():
  mesh = sharding.make_mesh(1, 4, 2)
  for experiment in (grpo_r1_distill_qwen_7b, opo_qwen2_5_0_5b_gsm8k):
    config = experiment.get_config()
    state = abstract_run(config, mesh, planning.model_shape(config)).state
    large = {
      jax.tree_util.keystr(path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(state)
      if leaf.size * 4 > 64 * 2**20
    }
    assert large
    assert not [
      path
      for path, leaf in large.items()
      if math.prod(leaf.sharding.shard_shape(leaf.shape)) != leaf.size // 8
    ]


# --- assumptions, simulation, advice -------------------------------------------------


def test_the_start_policy_stays_on_the_chips_unless_adapters_share_it():
  config = quickstart.get_config()
  mesh = sharding.make_mesh(1, 4, 2)

  def kept(rank):
    model = dataclasses.replace(config.model, lora_rank=rank)
    run = dataclasses.replace(config, model=model)
    return planning.kept_bytes(run, mesh, planning.model_shape(run))

  whole, adapters = kept(0), kept(4)
  assert whole["start"] == whole["parameters"] < whole["optimiser"]
  assert adapters["start"] == 0 < adapters["optimiser"] < adapters["parameters"]


def test_comparison_runs_differ_from_the_papers_in_what_they_say():
  opo = opo_r1_distill_qwen_7b.get_config()
  assert opo.algorithm.updates_per_batch == 1 and opo.rollout.group_size == 8
  for module, updates in (
    (on_policy_grpo_r1_distill_qwen_7b, 1),
    (grpo_r1_distill_qwen_7b, 4),
  ):
    other = module.get_config()
    assert other.algorithm.advantage == "grpo"
    assert other.algorithm.updates_per_batch == updates
    same = dataclasses.replace(
      other, experiment=opo.experiment, algorithm=opo.algorithm
    )
    assert same == opo


def test_assumed_responses_have_their_mean_and_one_reaches_the_limit():
  for mean in (2048, 4096, 6000):
    lengths = assumed_lengths(mean, 8192, 256)
    assert lengths.max() == 8192 and lengths.min() >= 1
    assert lengths.mean() == pytest.approx(mean, rel=0.02)


def test_the_simulated_schedule_is_the_one_the_sampler_takes(monkeypatch):
  """Refilled, with rings that grow and shrink, and slots that become fewer."""
  monkeypatch.setattr(schedule, "MIN_WIDTH", 6)
  monkeypatch.setattr(schedule, "MIN_SLOTS", 2)
  lengths, slots, longest = np.array([24, *[5, 3, 4] * 6, 5, 4, 6]), 4, 24
  taken, decode = [0, 0], decoding.decode

  def counted(slots, *rest):
    before, (num_slots, columns) = int(slots.step), slots.keys.shape[1:4:2]
    after = decode(slots, *rest)
    steps = int(after[0].step) - before
    taken[0] += steps
    taken[1] += steps * num_slots * columns
    return after

  monkeypatch.setattr(decoding, "decode", counted)
  policy = Policy(ModelConfig(16, 8, 8, 1, 1, 1, 8), jax.random.key(0))
  sampler.generate(
    policy, [[1, 2]] * len(lengths), max_new_tokens=lengths, slots=slots, eos_ids=()
  )
  tokens, share = simulate_decoding(lengths, slots, longest)
  assert [tokens, round(share * tokens * slots * longest)] == taken
  assert share < 0.8  # the widest ring all the time would be 1


def test_the_compilers_words_say_how_many_temporaries_would_have_been_needed():
  def parsed(text, arguments):
    error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}")
    return planning._out_of_memory(error, arguments)

  used = "Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm."
  assert parsed(used, 2**30) == (
    int(19.5 * 2**30),
    "the compiler ran out of memory: Used 20.5G",
  )
  temporaries, _ = parsed("cannot allocate temporaries (512.0M)", 2**30)
  assert temporaries == 2**29
  with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
    parsed("something else", 0)


def test_advice_names_flags_that_exist_and_change_something():
  config = opo_r1_distill_qwen_7b.get_config()
  programs = [
    {"name": name, "fits": False, "bytes": {"temporaries": 2**36}, "slots": 64}
    for name in ("reshard", "decode", "update")
  ]
  mesh = {"data": 1, "fsdp": 8, "tensor": 2}
  made = {"programs": programs, "mesh": mesh, "chip": {"memory": 2**34}}
  lines = advice(made, config)
  assert lines[0] == "reshard needs 48.0 GiB more than a chip has:"
  assert "slots" not in lines[1] and "--rollout.no-gather-weights" in lines[1]
  flags = [flag.split() for flag in re.findall(r"--[\w.-]+(?: \w+)?", "\n".join(lines))]
  assert ["--rollout.slots", "32"] in flags and ["--mesh.tensor", "4"] in flags
  # Eight shards of 655,360 tokens: eight rows of 10,240 each; the advice is half.
  assert ["--algorithm.micro-batch-tokens", "327680"] in flags
  for flag in flags:
    assert command_line._parse(config, flag) != config, flag
  # Neither less than one row a shard, nor a setting that the run already has.
  algorithm = dataclasses.replace(config.algorithm, micro_batch_tokens=81_920)
  rollout = dataclasses.replace(config.rollout, gather_weights=False)
  least = dataclasses.replace(config, algorithm=algorithm, rollout=rollout)
  text = "\n".join(advice(made, least))
  assert "micro-batch" not in text and "gather" not in text


def test_the_tables_of_the_page_are_those_of_the_plans():
  docs = pathlib.Path(__file__).parents[1] / "docs"
  spec = importlib.util.spec_from_file_location("make_plans", docs / "make_plans.py")
  make_plans = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(make_plans)
  page = (docs / "scaling.md").read_text()
  assert make_plans.with_tables(page) == page
  files = {
    path.stem: json.loads(path.read_text())
    for path in docs.glob("results/plans/*.json")
  }
  assert files.keys() == make_plans.COMMANDS.keys()
  for name, (experiment, topology_name, _) in make_plans.COMMANDS.items():
    made = files[name]
    assert [made["experiment"], made["topology"]] == [experiment, topology_name]
    assert "7b" not in name or not without_reason(made)
    for program in made["programs"]:  # the page's rule: it fits where it says so
      assert program["bytes"]["start"] == program["bytes"]["parameters"]
      size = sum(program["bytes"].values())
      assert program["fits"] == (size <= made["chip"]["memory"])


# --- with libtpu ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
  config = quickstart.get_config()
  rollout = dataclasses.replace(config.rollout, prompts_per_step=8, group_size=4)
  return dataclasses.replace(config, rollout=rollout)


@needs_libtpu
def test_a_mesh_axis_may_be_part_of_a_side_of_an_absent_slice():
  for name in ("v5p:4x4x4", "v6e:8x8", "v5e:4x8", "tpu7x:2x2x2"):
    devices = topology(name)
    for tensor in (1, 2, 4):
      mesh = sharding.make_mesh(1, -1, tensor, devices=devices)
      assert mesh.devices.shape == (1, len(devices) // tensor, tensor), name
      assert set(mesh.devices.flat) == set(devices), name


@needs_libtpu
@pytest.mark.parametrize("topology_name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_run_is_planned_for_an_absent_topology(topology_name, small, tmp_path, capfd):
  out = tmp_path / "plans" / "plan.json"
  assert command.run(small, topology_name, Assumptions(), out=out) == 0
  made = json.loads(out.read_text())
  assert made["fits"] and made["devices"] == 4
  names = ["reshard", "prefill", "decode", "update"]
  assert [program["name"] for program in made["programs"]] == names
  reshard, update = made["programs"][0], made["programs"][-1]
  # Each of four shards gets the other three quarters of the sampler's weights.
  assert reshard["collective_bytes"]["fsdp"] == pytest.approx(
    0.75 * reshard["bytes"]["weights"], rel=0.02
  )
  # Adam keeps two moments of every parameter, float32 as they are.
  assert update["bytes"]["optimiser"] == pytest.approx(
    2 * update["bytes"]["parameters"], rel=0.01
  )
  assert update["collective_bytes"]["fsdp"] > 0
  assert update["flops"] > made["programs"][1]["flops"] > 0
  assert made["step_s"] > 0
  printed = capfd.readouterr()  # libtpu writes below Python
  assert "It fits" in printed.out and not printed.err


@needs_libtpu
def test_what_does_not_fit_an_absent_topology_is_told_with_what_to_change(small):
  model = dataclasses.replace(
    small.model, width=4096, mlp_width=16_384, num_layers=48, num_heads=32,
    num_kv_heads=8, head_dim=128,
  )  # fmt: skip
  large = dataclasses.replace(small, model=model)
  made = plan(large, "v5e:2x2", Assumptions(), only="prefill")
  assert not made["fits"]
  console = Console(record=True, width=120)
  command.show(made, console)
  assert "NO" in console.export_text()
  assert any("more chips" in line for line in advice(made, large))


@needs_libtpu
def test_search_ranks_meshes_of_an_absent_topology_that_fit(small):
  said = []
  plans = search(small, "v5e:2x2", Assumptions(), said.append)
  assert len(plans) >= 2 and len(said) >= 2
  times = [made["step_s"] for made in plans]
  assert times == sorted(times)
  assert len({tuple(made["mesh"].items()) for made in plans}) == len(plans)


@needs_libtpu
def test_nothing_large_of_the_7b_run_is_replicated_on_an_absent_topology():
  """As compiled for TPUs, kernels included, on fsdp 2 x tensor 4."""
  config = opo_r1_distill_qwen_7b.get_config()
  config = dataclasses.replace(
    config,
    algorithm=dataclasses.replace(config.algorithm, micro_batch_tokens=20_480),
    mesh=dataclasses.replace(config.mesh, tensor=4),
  )
  made = plan(config, "v6e:2x4", Assumptions())
  assert made["fits"] and not without_reason(made)


@needs_libtpu
def test_the_command_plans_for_an_absent_topology(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  flags = ["--rollout.prompts-per-step", "8", "--rollout.group-size", "4"]
  assert command_line.main(["plan", "quickstart", "v5e:2x2", *flags]) == 0
  assert (tmp_path / "plans" / "quickstart-v5e-2x2.json").is_file()
  assert command_line.main(["plan", "quickstart", "v5e:9"]) == 2
  assert "v5e slices have 2 dimensions" in capsys.readouterr().err

"""Planning: topologies by name, what is replicated, and plans for absent TPUs.

What needs `libtpu` is named `absent`, and runs with `make test-plan`.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re

import jax
import pytest
from rich.console import Console

from experiments import (
  grpo_r1_distill_qwen_7b,
  on_policy_grpo_r1_distill_qwen_7b,
  opo_qwen2_5_0_5b_gsm8k,
  opo_r1_distill_qwen_7b,
  quickstart,
)
from opo_jax import __main__ as command_line
from opo_jax import build, sampler
from opo_jax.devices import sharding
from opo_jax.planning import hlo
from opo_jax.planning import plan as planning
from opo_jax.sampler import decoding

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu compiles for absent TPUs: make test-plan",
)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v5x:4x8", "no TPU generation of ours; did you mean v5"),
    ("v5e", r"has no shape; write TOPOLOGY=v5e:4x8"),
    ("v5e:4x", r"has no shape"),
    ("v5e:4x4x4", "v5e slices have 2 dimensions and up to 256 chips"),
    ("v5e:32x32", "up to 256 chips"),
    ("v5p:8x8", r"v5p slices have 3 dimensions .*\(TOPOLOGY=v5p:4x4x4\)"),
    ("v5p:3x3x3", "hosts of 2x2 chips; 3x3x3 is none"),
    # As Google names slices: of v4 and v5p, by TensorCores.
    ("v5p-64", "64 counts TensorCores, two a chip; write TOPOLOGY=v5p:2x4x4"),
    ("v6e-64", "64 counts chips; write TOPOLOGY=v6e:8x8"),
    ("v5litepod-8", "TOPOLOGY=v5e:2x4"),
    ("v5p-8", "TOPOLOGY=v5p:2x2x1"),
    ("V5E:4x8", "did you mean v5e"),
    ("v7x:2x2x2", "did you mean tpu7x"),
    ("h100:8", "there are"),
  ],
)
def test_a_topology_that_is_none_is_refused_with_the_near_ones(name, message):
  with pytest.raises(ValueError, match=message):
    planning.topology(name)


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
  """Of a plan: what is not split and should be."""
  return {
    (program["name"], name): where
    for program in made["programs"]
    for name, where in program["replicated"].items()
    if not reason(name, where, program["name"], made["mesh"])
  }


@pytest.mark.parametrize("program", ["reshard", "prefill", "decode", "update"])
def test_nothing_large_of_the_7b_run_is_replicated_by_accident(program, programs_of_7b):
  """28 layers, real widths, compiled for eight devices: inputs, outputs, and what the
  program holds between them."""
  traced, mesh = programs_of_7b[program]
  found = hlo.replicated(traced.lower().compile(), traced, mesh)
  assert found  # the reasons above are of something
  unexplained = {
    k: v for k, v in found.items() if not reason(k, v, program, mesh.shape)
  }
  assert unexplained == {}


def test_the_sampler_s_weights_are_not_there_twice_while_they_are_made():
  traced = programs("bfloat16")["reshard"][0]
  memory = traced.lower().compile().memory_analysis()
  assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 2


@pytest.fixture(scope="module")
def programs_of_7b():
  return programs("float32")


def programs(dtype):
  """Of the 7B run on eight devices, each with its mesh."""
  config = opo_r1_distill_qwen_7b.get_config()
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, dtype=dtype),
    rollout=dataclasses.replace(config.rollout, prompts_per_step=8, slots=32),
    algorithm=dataclasses.replace(config.algorithm, micro_batch_tokens=81_920),
  )
  shape, mesh = planning.model_shape(config), sharding.make_mesh(1, 4, 2)
  parts = build.build(
    config, eos_ids=(0,), vocab_size=shape.vocab_size, mesh=mesh, shape=shape
  )
  ahead = parts.trace(prompt_tokens=config.rollout.max_prompt_tokens)
  return {each.name: (each.traced, mesh) for each in ahead}


@pytest.mark.parametrize(
  "experiment", [grpo_r1_distill_qwen_7b, opo_qwen2_5_0_5b_gsm8k]
)
def test_no_large_parameter_or_moment_of_the_other_runs_is_replicated(experiment):
  config = experiment.get_config()
  shape = planning.model_shape(config)
  mesh = sharding.make_mesh(1, 4, 2)
  parts = build.build(
    config, eos_ids=(0,), vocab_size=shape.vocab_size, mesh=mesh, shape=shape
  )
  large = [
    leaf for leaf in jax.tree.leaves(parts.like_state) if leaf.size * 4 > 64 * 2**20
  ]
  assert large
  for leaf in large:
    assert math.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size // 8


@pytest.mark.parametrize("rank", [0, 4])
def test_the_start_policy_stays_on_the_chips_unless_adapters_share_it(rank):
  config = quickstart.get_config()
  model = dataclasses.replace(config.model, lora_rank=rank)
  config = dataclasses.replace(config, model=model)
  mesh = sharding.make_mesh(1, 4, 2)
  kept = planning.kept_bytes(
    build.build(config, eos_ids=(0,), vocab_size=32, mesh=mesh)
  )
  if rank:
    assert kept["start"] == 0 < kept["optimiser"] < kept["parameters"]
  else:
    assert kept["start"] == kept["parameters"] < kept["optimiser"]


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
    found = planning.lengths(mean, 8192, 256)
    assert found.max() == 8192 and found.min() >= 1
    assert found.mean() == pytest.approx(mean, rel=0.02)


def test_the_planned_schedule_is_the_one_the_sampler_takes(monkeypatch):
  """Refilled, with rings that grow and shrink, and slots that become fewer."""
  monkeypatch.setattr(decoding, "MIN_WIDTH", 6)
  monkeypatch.setattr(decoding, "MIN_SLOTS", 2)
  config = quickstart.get_config()
  parts = build.build(
    config,
    eos_ids=(),
    vocab_size=32,
    mesh=sharding.make_mesh(1, 1, 1, jax.devices()[:1]),
  )
  lengths, slots, longest = planning.lengths(12, 24, 8), 4, 24
  taken, real = [0, 0], decoding.decode

  def counted(slots, *rest):
    before, (num_slots, columns) = int(slots.step), slots.keys.shape[1:4:2]
    after = real(slots, *rest)
    steps = int(after[0].step) - before
    taken[0] += steps
    taken[1] += steps * num_slots * columns
    return after

  monkeypatch.setattr(decoding, "decode", counted)
  sampler.generate(
    parts.init(), [[1, 2]] * 8, max_new_tokens=lengths, slots=slots, eos_ids=()
  )
  tokens, share = planning.attended(lengths, slots, longest)
  assert [tokens, round(share * tokens * slots * longest)] == taken
  assert share < 0.8  # the widest ring all the time would be 1


def test_advice_names_flags_that_exist_and_change_something():
  config = opo_r1_distill_qwen_7b.get_config()
  programs = [
    {"name": name, "fits": False, "bytes": {"temporaries": 2**36}, "slots": 64}
    for name in ("reshard", "decode", "update")
  ]
  mesh = {"data": 1, "fsdp": 8, "tensor": 2}
  made = {"programs": programs, "mesh": mesh, "chip": {"memory": 2**34}}
  lines = planning.advice(made, config)
  assert lines[0] == "reshard needs 48.0 GiB more than there is:"
  assert "slots" not in lines[1] and "--rollout.no-gather-weights" in lines[1]
  flags = [flag.split() for flag in re.findall(r"--[\w.-]+(?: \w+)?", "\n".join(lines))]
  assert ["--rollout.slots", "32"] in flags and ["--mesh.tensor", "4"] in flags
  # Eight shards of 655,360 tokens: eight rows of 10,240 each, of which half.
  assert ["--algorithm.micro-batch-tokens", "327680"] in flags
  for flag in flags:
    assert command_line._parse(config, flag) != config, flag
  # One row a shard is the least; what is already so is not asked for again.
  algorithm = dataclasses.replace(config.algorithm, micro_batch_tokens=81_920)
  rollout = dataclasses.replace(config.rollout, gather_weights=False)
  least = dataclasses.replace(config, algorithm=algorithm, rollout=rollout)
  text = "\n".join(planning.advice(made, least))
  assert "micro-batch" not in text and "gather" not in text


def test_the_tables_of_the_page_are_those_of_the_plans():
  docs = pathlib.Path(__file__).parents[1] / "docs"
  spec = importlib.util.spec_from_file_location("make_plans", docs / "make_plans.py")
  make_plans = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(make_plans)
  page = (docs / "scaling.md").read_text()
  assert make_plans.written(page) == page
  files = {
    path.stem: json.loads(path.read_text())
    for path in docs.glob("results/plans/*.json")
  }
  assert files.keys() == make_plans.COMMANDS.keys()
  for name, (experiment, topology, _) in make_plans.COMMANDS.items():
    made = files[name]
    assert [made["experiment"], made["topology"]] == [experiment, topology]
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
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v6e:8x8", "v5e:4x8", "tpu7x:2x2x2"])
def test_a_mesh_axis_may_be_part_of_a_side_of_an_absent_slice(topology):
  devices = planning.topology(topology)
  for tensor in (1, 2, 4):
    mesh = sharding.make_mesh(1, -1, tensor, devices=devices)
    assert mesh.devices.shape == (1, len(devices) // tensor, tensor)
    assert set(mesh.devices.flat) == set(devices)


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_run_is_planned_for_an_absent_topology(topology, small, tmp_path, capfd):
  out = tmp_path / "plans" / "plan.json"
  assert planning.run(small, topology, planning.Settings(), out=out) == 0
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
  made = planning.plan(large, "v5e:2x2", planning.Settings(), only="prefill")
  assert not made["fits"]
  console = Console(record=True, width=120)
  planning.show(made, console)
  assert "NO" in console.export_text()
  assert any("more chips" in line for line in planning.advice(made, large))


@needs_libtpu
def test_search_ranks_meshes_of_an_absent_topology_that_fit(small):
  said = []
  plans = planning.search(small, "v5e:2x2", planning.Settings(), said.append)
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
  made = planning.plan(config, "v6e:2x4", planning.Settings())
  assert made["fits"] and not without_reason(made)


@needs_libtpu
def test_the_command_plans_for_an_absent_topology(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  flags = ["--rollout.prompts-per-step", "8", "--rollout.group-size", "4"]
  assert command_line.main(["plan", "quickstart", "v5e:2x2", *flags]) == 0
  assert (tmp_path / "plans" / "quickstart-v5e-2x2.json").is_file()
  assert command_line.main(["plan", "quickstart", "v5e:9"]) == 2
  assert "v5e slices have 2 dimensions" in capsys.readouterr().err

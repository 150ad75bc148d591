"""Does it fit, and how fast can it be: a run compiled for TPUs that are not there.

`libtpu` compiles the very programs that training runs (reshard, prefill, decode and
update) for a topology that is only described, on any CPU host. What it reports per chip
is held against the chip's memory and rates.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from opo_jax import build
from opo_jax.config import Config, near_names
from opo_jax.devices import sharding
from opo_jax.models import ModelConfig
from opo_jax.planning import hlo
from opo_jax.sampler import decoding

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A generation of TPUs; rates are one device's, as JAX counts devices.

  Attributes:
    memory: bytes that a program may use.
    flops: bfloat16, per second.
    memory_rate: bytes per second from main memory.
    link_rate: bytes per second around a ring along one mesh axis, both directions.
    dims: of a slice's shape.
    largest: chips of the largest slice.
    counted: what Google's name of a slice (v5p-64) has of one chip: TensorCores or 1.
  """

  memory: float
  flops: float
  memory_rate: float
  link_rate: float
  dims: int
  largest: int
  counted: int


# Published peaks (https://cloud.google.com/tpu/docs, and for links
# https://jax-ml.github.io/scaling-book/tpus). Of a TPU7x, JAX sees two devices a chip.
CHIPS = {
  "v4": Chip(15.75 * GIB, 137e12, 614e9, 90e9, 3, 4096, 2),
  "v5e": Chip(15.75 * GIB, 197e12, 819e9, 90e9, 2, 256, 1),
  "v5p": Chip(95.0 * GIB, 459e12, 2765e9, 180e9, 3, 8960, 2),
  "v6e": Chip(31.25 * GIB, 918e12, 1640e9, 180e9, 2, 256, 1),
  "tpu7x": Chip(94.75 * GIB, 1153e12, 3690e9, 180e9, 3, 9216, 1),
}
# What they are called elsewhere.
ALSO_CALLED = {
  "v5lite": "v5e", "v5litepod": "v5e", "trillium": "v6e", "v7x": "tpu7x",
  "ironwood": "tpu7x",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is assumed of a run.

  Attributes:
    mean_length: of a response, tokens; 0: half of --rollout.max-new-tokens.
    prompt_length: of every prompt, tokens; 0: --rollout.max-prompt-tokens.
  """

  mean_length: int = 0
  prompt_length: int = 0


@dataclasses.dataclass(frozen=True)
class Program:
  """What one program needs, on each chip.

  Attributes:
    name: reshard, prefill, decode or update.
    bytes: by kind: parameters, optimiser, start (the policy before RL, which the KL is
      measured to), weights (the sampler's own), cache, rollouts, temporaries (all that
      a program makes for itself, activations and gradients); when every response is of
      full length.
    fits: their sum is within the chip's memory, and it compiles.
    reason: what the compiler said where it did not compile.
    replicated: arrays above 64 MiB -> the mesh axes they could be split over and are
      not, as `hlo.replicated` finds them.
    flops, memory_bytes, collective_bytes: of one run, responses of the mean length;
      decoding: of one token in every slot, the mean of a batch.
    rounds: runs in a step, as assumed.
    seconds: by what it waits for (compute, memory, links), for all its rounds.
    slots: responses decoded at a time, over all devices.
    compile_s, compile_cpu_s: on the clock, and of all cores.
  """

  name: str
  bytes: dict[str, int]
  fits: bool
  reason: str
  replicated: dict[str, str]
  flops: float
  memory_bytes: float
  collective_bytes: dict[str, float]
  rounds: float
  seconds: dict[str, float]
  slots: int
  compile_s: float
  compile_cpu_s: float


def topology(name: str) -> Sequence[Any]:
  """The devices of a slice such as `v5e:4x8` or `v5p:4x4x4`, which need not exist.

  Raises:
    ValueError: no such generation or shape, or no `libtpu`.
  """
  generation, _, shape = name.partition(":")
  if generation not in CHIPS:
    raise ValueError(_near(name))
  chip = CHIPS[generation]
  example = f"TOPOLOGY={generation}:{_shape(32 if chip.dims == 2 else 64, chip)}"
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise ValueError(f"{name!r} has no shape; write {example}.")
  sizes = [int(size) for size in shape.split("x")]
  if len(sizes) != chip.dims or math.prod(sizes) > chip.largest:
    raise ValueError(
      f"{generation} slices have {chip.dims} dimensions and up to {chip.largest} chips;"
      f" {shape} is none ({example})."
    )
  single = chip.dims == 2 and math.prod(sizes) == 1  # a host of its own
  if any(size % 2 for size in sizes[:2]) and not single:
    raise ValueError(
      f"{generation} slices are made of hosts of 2x2 chips; {shape} is none"
      f" ({example})."
    )
  # Not asked for: it would wait for a metadata server that is not there.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU to fight for
  for variable in ("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):
    os.environ.setdefault(variable, "4")
  with _quiet() as said:
    try:
      bounds = {"chips_per_host_bounds": [1, 1, 1]} if single else {}
      found = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds)
    except Exception as error:
      reason = str(error).strip().splitlines()[-1]
      if "libtpu" in str(error).lower() or "not found" in str(error).lower():
        reason = "libtpu is not installed (make plan installs it; pip: opo-jax[plan])"
      raise ValueError(f"{name} cannot be described: {reason}. {said()}") from error
  return found.devices


def _near(name: str) -> str:
  """What to write instead of a topology whose generation is none."""
  generation = re.split("[:-]", name.lower())[0]
  generation = ALSO_CALLED.get(generation, generation)
  if generation in CHIPS and (found := re.search(r"-(\d+)$", name)):
    chip = CHIPS[generation]
    chips = max(int(found[1]) // chip.counted, 4)
    what = "TensorCores, two a chip" if chip.counted == 2 else "chips"
    return (
      f"{name!r} has no shape: its {found[1]} counts {what};"
      f" write TOPOLOGY={generation}:{_shape(chips, chip)}."
    )
  return (
    f"{name!r} is no TPU generation of ours; {near_names(generation, CHIPS)}"
    " (TOPOLOGY=v5e:4x8)."
  )


def _shape(chips: int, chip: Chip) -> str:
  """The most even shape of so many chips, for a power of two of them."""
  sizes = [1] * chip.dims
  for _ in range(chips.bit_length() - 1):
    sizes[sizes.index(min(sizes))] *= 2
  return "x".join(map(str, sorted(sizes, key=lambda size: (size == 1, size))))


def run(
  config: Config,
  topology_name: str,
  settings: Settings,
  *,
  out: pathlib.Path | None = None,
  ranked: bool = False,
) -> int:
  """The command: plans, prints, writes the file; 0 where the run fits, else 1.

  Args:
    config, topology_name, settings: as for `plan`.
    out: the file; None: plans/EXPERIMENT-TOPOLOGY.json.
    ranked: search instead; the file holds all that fit, the best first.
  """
  console = Console(soft_wrap=True)
  name = f"{config.experiment}-{topology_name.replace(':', '-')}.json"
  out = out or pathlib.Path("plans") / name
  if ranked:
    plans = search(config, topology_name, settings, say=console.print)
    for made in plans[:3]:
      show(made, console)
    fits = bool(plans)
  else:
    plans = plan(config, topology_name, settings)
    show(plans, console)
    for line in advice(plans, config):
      console.print(line)
    fits = plans["fits"]
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(plans, indent=2) + "\n")
  console.print(f"{'It fits' if fits else 'It does not fit'}; {out}")
  return 0 if fits else 1


def plan(
  config: Config,
  topology_name: str,
  settings: Settings,
  *,
  only: str = "",
  until_miss: bool = False,
) -> dict[str, Any]:
  """Compiles a run's programs for a topology.

  Args:
    config: the run.
    topology_name: `GENERATION:SHAPE`.
    settings: what is assumed.
    only: the one program to compile; empty: all.
    until_miss: begin with the update, which is the first not to fit, and compile no
      more after a program that does not.

  Returns:
    What the file holds: topology, mesh, chip, batch, assumptions, programs, the
    step's seconds (at the chip's rates, each program waiting for its slowest part
    alone: a bound, not a forecast), whether all fits, and who compiled it.

  Raises:
    ValueError: no such topology, or a mesh that does not fill it.
  """
  devices = topology(topology_name)
  chip = CHIPS[topology_name.partition(":")[0]]
  mesh = sharding.make_mesh(
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=devices
  )
  build.check_batch(config, mesh)
  shape = model_shape(config)
  parts = build.build(
    config, eos_ids=(0,), vocab_size=shape.vocab_size, mesh=mesh, shape=shape
  )
  kept = kept_bytes(parts)
  prompt_tokens = settings.prompt_length or config.rollout.max_prompt_tokens
  mean_length = settings.mean_length or config.rollout.max_new_tokens // 2
  # Where the state alone is too large, the rest is planned as if a quarter were free.
  free_bytes = int(max(chip.memory - sum(kept.values()), chip.memory / 4))
  ahead = parts.trace(prompt_tokens=prompt_tokens, free_bytes=free_bytes)
  ahead = [each for each in ahead if only in ("", each.name)]
  order = [each.name for each in ahead]
  if until_miss:
    ahead.sort(key=lambda each: each.name != "update")
  programs = []
  for each in ahead:
    programs.append(
      _measure(each, kept, chip, mesh, config, prompt_tokens, mean_length)
    )
    if until_miss and not programs[-1].fits:
      break
  programs.sort(key=lambda program: order.index(program.name))
  rollout = config.rollout
  return {
    "experiment": config.experiment,
    "topology": topology_name,
    "devices": len(devices),
    "mesh": dict(mesh.shape),
    "micro_batch_tokens": config.algorithm.micro_batch_tokens,
    "batch": {
      "prompts": rollout.prompts_per_step,
      "responses_to_each": rollout.group_size,
      "max_new_tokens": rollout.max_new_tokens,
    },
    "chip": {
      what: getattr(chip, what)
      for what in ("memory", "flops", "memory_rate", "link_rate")
    },
    "assumed": {"prompt_tokens": prompt_tokens, "mean_response_tokens": mean_length},
    "programs": [dataclasses.asdict(program) for program in programs],
    "step_s": sum(max(program.seconds.values()) for program in programs),
    "fits": all(program.fits for program in programs),
    "compiled_by": {
      name: importlib.metadata.version(name) for name in ("jax", "libtpu")
    },
  }


def kept_bytes(parts: build.Parts) -> dict[str, int]:
  """By kind, what stays on each chip all the run: the state, and where it started."""
  parameters = sharding.share_bytes(parts.like_state.policy)
  _, frozen = parts.update.split(parts.like_state)
  return {
    "parameters": parameters,
    "optimiser": sharding.share_bytes(parts.like_state) - parameters,
    # Both have what is frozen, once: with adapters, all of the start.
    "start": sharding.share_bytes(parts.like) - sharding.share_bytes(frozen),
  }


def _measure(ahead, kept, chip, mesh, config, prompt_tokens, mean_length) -> Program:
  """Compiles one program and reads what it needs."""
  bytes_ = kept | _kinds(ahead, kept)
  clocks = time.perf_counter(), time.process_time()
  reason, replicated, longest = "", {}, config.rollout.max_new_tokens
  rounds, open_rounds = 1, ahead.rounds
  if ahead.name == "update":
    # Its memory is that of full rows; of responses of the mean length, fewer do.
    filled = (prompt_tokens + mean_length) / (prompt_tokens + longest)
    open_rounds = math.ceil(ahead.rounds * filled)
  flops = hlo.flops(ahead.traced, open_rounds=open_rounds) / mesh.size
  work = _Work(flops, 0.0, {})  # the rest is unknown where it does not compile
  try:
    compiled = _compile(ahead.traced)
    bytes_["temporaries"] = compiled.memory_analysis().temp_size_in_bytes
    replicated = hlo.replicated(compiled, ahead.traced, mesh)
    work = _work(ahead.traced, compiled, mesh, open_rounds)
    if ahead.half:
      half = _work(ahead.half, _compile(ahead.half), mesh, open_rounds)
      shards = sharding.batch_shards(mesh)
      rows = config.rollout.prompts_per_step * config.rollout.group_size // shards
      rounds, share = attended(
        lengths(mean_length, longest, rows), ahead.slots // shards, longest
      )
      work = _between(half, work, share)
  except jax.errors.JaxRuntimeError as error:
    # More than fits: the compiler says how much it would have needed.
    used = re.search(r"(Used|temporaries) \(?([\d.]+)([KMGT])", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not used:
      raise
    what, size, unit = used.groups()
    needed = int(float(size) * 1024 ** ("KMGT".index(unit) + 1))
    if what == "Used":  # by everything
      needed -= sum(v for kind, v in bytes_.items() if kind in ahead.arguments)
    bytes_["temporaries"] = max(needed, 0)
    reason = f"the compiler ran out of memory: {what} {size}{unit}"
  seconds = {
    "compute": work.flops / chip.flops,
    "memory": work.memory_bytes / chip.memory_rate,
    "links": sum(work.collective_bytes.values()) / chip.link_rate,
  }
  return Program(
    name=ahead.name,
    bytes=bytes_,
    fits=not reason and sum(bytes_.values()) <= chip.memory,
    reason=reason,
    replicated=replicated,
    flops=work.flops,
    memory_bytes=work.memory_bytes,
    collective_bytes=work.collective_bytes,
    rounds=rounds,
    seconds={what: rounds * value for what, value in seconds.items()},
    slots=ahead.slots,
    compile_s=round(time.perf_counter() - clocks[0], 1),
    compile_cpu_s=round(time.process_time() - clocks[1], 1),
  )


def _compile(traced):
  with _quiet():
    return traced.lower().compile()


class _Work(NamedTuple):
  """Of one run, on each device."""

  flops: float
  memory_bytes: float
  collective_bytes: dict[str, float]


def _work(traced, compiled, mesh, open_rounds) -> _Work:
  flops = hlo.flops(traced, open_rounds=open_rounds) / mesh.size
  text = compiled.as_text()
  moved = hlo.traffic(text, dict(mesh.shape), open_rounds=open_rounds)
  return _Work(flops, moved.memory_bytes, moved.collective_bytes)


def _between(half: _Work, full: _Work, share: float) -> _Work:
  """At this share of the ring: all that grows with it grows in proportion."""

  def at(half, full):
    return full - 2 * (1 - share) * (full - half)

  axes = half.collective_bytes.keys() | full.collective_bytes.keys()
  return _Work(
    at(half.flops, full.flops),
    at(half.memory_bytes, full.memory_bytes),
    {a: at(*(w.collective_bytes.get(a, 0.0) for w in (half, full))) for a in axes},
  )


def lengths(mean: float, longest: int, count: int) -> np.ndarray:
  """Responses as a plan assumes them: `T u^(T / mean - 1)` for u evenly from 0 to 1.

  All lengths up to T are equally frequent where the mean is half of T. One is T; they
  come in some mixed order.

  >>> sorted(lengths(4, 8, 4).tolist())
  [1, 3, 5, 8]
  """
  even = (np.arange(count) + 0.5) / count
  power = max(longest / mean - 1, 0.0)
  found = np.maximum(longest * even**power, 1).astype(int)
  found[-1] = longest
  return np.random.default_rng(0).permutation(found)


def attended(lengths: np.ndarray, slots: int, longest: int) -> tuple[int, float]:
  """What a shard's decoding costs, by the sampler's own rules for its ring and slots.

  Args:
    lengths: [n] of its responses, in the order of the queue.
    slots: at the start.
    longest: T.

  Returns:
    Tokens that are decoded one after the other, and which share of `slots` rings of T
    columns a token attends to on average.

  64 tokens see 64 columns, 64 see 128, and 128 see 256:

  >>> attended(np.full(4, 256), slots=4, longest=256)
  (256, 0.6875)
  """
  settings = decoding.Settings(1, 1, longest, (), (), "")
  left, waiting = np.array(lengths[:slots]), list(lengths[slots:])
  slots = most = len(left)
  grown, width, tokens, columns = 0 * left, decoding.ring(0, longest), 0, 0
  while (left > 0).any():
    busy = left > 0
    # Until a response ends or the ring is full, nothing changes.
    steps = left[busy].min()
    if width < longest:
      steps = min(steps, width - grown.max())
    tokens, columns = tokens + steps, columns + steps * slots * width
    left, grown = left - steps * busy, grown + steps * busy
    for slot in np.flatnonzero(busy & (left == 0)):
      grown[slot] = 0
      left[slot] = waiting.pop(0) if waiting else 0
    if grown.max() >= width:
      width = decoding.ring(grown.max(), longest)
    while decoding.too_wide(grown.max(), width):
      width = decoding.ring((width - 1) // 2, longest)
    while not waiting and decoding.mostly_idle((left > 0).sum(), slots, settings):
      slots = decoding.fewer_slots(slots)
      order = np.argsort(left == 0, kind="stable")[:slots]
      left, grown = left[order], grown[order]
  return int(tokens), float(columns / (tokens * most * longest))


def search(
  config: Config, topology_name: str, settings: Settings, say=lambda text: None
) -> list[dict[str, Any]]:
  """Tries meshes and micro-batches; gives the plans that fit, the fastest first.

  For each `tensor` size that divides the model, the rest of the devices is `fsdp`, and
  the micro-batch is the largest of a ladder with which the update fits. Rungs that
  would not fit, were all temporaries in proportion to the rows, are not compiled.

  Args:
    say: called with a line for each attempt.
  """
  devices, model = len(topology(topology_name)), model_shape(config)
  rollout, plans = config.rollout, []
  longest = rollout.max_prompt_tokens + rollout.max_new_tokens
  for tensor in (1, 2, 4, 8, 16):
    parts = (model.num_heads, model.mlp_width, model.vocab_size, devices)
    if any(size % tensor for size in parts):
      continue
    shards, most = devices // tensor, 8
    for rows in (8, 4, 2, 1):  # of full length, on a shard at a time
      if most < rows > 1:
        continue
      tried = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, data=1, fsdp=shards, tensor=tensor),
        algorithm=dataclasses.replace(
          config.algorithm, micro_batch_tokens=rows * longest * shards
        ),
      )
      what = f"fsdp {shards} x tensor {tensor}, {rows} rows a shard"
      try:
        made = plan(tried, topology_name, settings, until_miss=True)
      except ValueError as error:
        say(f"{what}: {error}")
        break
      if made["fits"]:
        say(f"{what}: fits, {made['step_s']:.3g} s a step")
        plans.append(made)
        break
      missed = next(each for each in made["programs"] if not each["fits"])
      over = sum(missed["bytes"].values()) - made["chip"]["memory"]
      say(f"{what}: {missed['name']} needs {over / GIB:.1f} GiB more than there is")
      if missed["name"] != "update":
        break
      temporaries = missed["bytes"]["temporaries"]
      most = rows * (temporaries - over) / temporaries
  return sorted(plans, key=lambda made: made["step_s"])


def advice(made: dict[str, Any], config: Config) -> list[str]:
  """What to change where a plan does not fit, the cheapest first."""
  lines, sizes_of_mesh = [], made["mesh"]
  shards = sizes_of_mesh["data"] * sizes_of_mesh["fsdp"]
  for program in made["programs"]:
    if program["fits"]:
      continue
    sizes = program["bytes"]
    over = sum(sizes.values()) - made["chip"]["memory"]
    lines.append(f"{program['name']} needs {over / GIB:.1f} GiB more than there is:")
    if program["name"] == "update":
      row = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
      rows = config.algorithm.micro_batch_tokens // (row * shards)
      if config.algorithm.micro_batch_tokens == 0:
        rows = config.rollout.prompts_per_step * config.rollout.group_size // shards
      if rows > 1:
        lines.append(
          "  smaller micro-batches (--algorithm.micro-batch-tokens"
          f" {rows // 2 * row * shards})"
        )
      stronger = {"none": "block", "attention": "block", "block": "everything"}
      if config.model.remat in stronger:
        lines.append(f"  --model.remat {stronger[config.model.remat]}")
      if config.optimizer.moment_dtype == "float32":
        lines.append("  --optimizer.moment-dtype bfloat16")
    else:
      if program["name"] == "decode" and program["slots"] > shards:
        slots = max(program["slots"] // 2, shards)
        lines.append(f"  fewer slots (--rollout.slots {slots})")
      if config.rollout.gather_weights and sizes_of_mesh["fsdp"] > 1:
        lines.append("  weights that stay sharded (--rollout.no-gather-weights)")
    shape, tensor = model_shape(config), 2 * sizes_of_mesh["tensor"]
    # Keys and values that it does not divide would be whole on every device.
    heads = shape.num_kv_heads if program["name"] == "decode" else shape.num_heads
    if heads % tensor == 0 and sizes_of_mesh["fsdp"] % 2 == 0:
      lines.append(f"  --mesh.tensor {tensor}")
    lines.append("  more chips, or adapters alone (--model.lora-rank 32)")
  return lines


def show(made: dict[str, Any], console: Console) -> None:
  """A plan as tables."""
  programs = made["programs"]
  mesh = " x ".join(f"{axis} {size}" for axis, size in made["mesh"].items())
  memory = made["chip"]["memory"]
  table = Table(
    title=f"{made['experiment']} on {made['topology']}: {made['devices']} devices"
    f" ({mesh}), GiB a device of {memory / GIB:.1f}"
  )
  kinds = list(dict.fromkeys(kind for p in programs for kind in p["bytes"]))
  for column in ("", *(program["name"] for program in programs)):
    table.add_column(column, justify="right" if column else "left")
  for kind in kinds:
    table.add_row(
      kind,
      *(
        f"{p['bytes'][kind] / GIB:.2f}" if kind in p["bytes"] else "" for p in programs
      ),
    )
  table.add_row(
    "sum",
    *(f"{sum(program['bytes'].values()) / GIB:.2f}" for program in programs),
  )
  table.add_row("fits", *("yes" if p["fits"] else "NO" for p in programs))
  table.add_section()
  axes = list(dict.fromkeys(axis for p in programs for axis in p["collective_bytes"]))
  table.add_row("TFLOP", *(f"{p['flops'] / 1e12:.3g}" for p in programs))
  table.add_row("GB moved", *(f"{p['memory_bytes'] / 1e9:.3g}" for p in programs))
  for axis in axes:
    table.add_row(
      f"GB over {axis or 'self'}",
      *(f"{p['collective_bytes'].get(axis, 0) / 1e9:.3g}" for p in programs),
    )
  table.add_row("runs a step", *(f"{p['rounds']:.0f}" for p in programs))
  for what in ("compute", "memory", "links"):
    table.add_row(f"s, {what}", *(f"{p['seconds'][what]:.3g}" for p in programs))
  table.add_row("compiled in, s", *(f"{p['compile_s']:.0f}" for p in programs))
  table.add_row("… all cores, s", *(f"{p['compile_cpu_s']:.0f}" for p in programs))
  console.print(table)
  assumed = made["assumed"]
  console.print(
    f"A step takes {made['step_s']:.3g} s at least: every chip at its published rates,"
    " each program waiting for its slowest part alone, responses of"
    f" {assumed['mean_response_tokens']} tokens on average, prompts of"
    f" {assumed['prompt_tokens']}; rewards and checkpoints aside."
  )
  for program in programs:
    if program["reason"]:
      console.print(f"{program['name']}: {program['reason']}")


def model_shape(config: Config) -> ModelConfig:
  """The shape of the policy, without a network where the model is a known one."""
  return KNOWN.get(config.model.path) or build.read_shape(config)


# The numbers in the config.json of models that experiments name.
_R1_7B = ModelConfig(
  152_064, 3584, 18_944, 28, 28, 4, 128, max_positions=131_072, tie_embeddings=False
)
_R1_1_5B = ModelConfig(
  151_936, 1536, 8960, 28, 12, 2, 128, max_positions=131_072, tie_embeddings=False
)
_QWEN2_5_0_5B = ModelConfig(151_936, 896, 4864, 24, 14, 2, 64, rope_theta=1e6)
KNOWN = {
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _R1_7B,
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _R1_1_5B,
  "Qwen/Qwen2.5-0.5B": _QWEN2_5_0_5B,
  "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2_5_0_5B,
}


def _kinds(ahead, kept) -> dict[str, int]:
  """Bytes by kind of what a program is given beside what stays on the chip anyway."""
  return {
    k: sharding.share_bytes(tree)
    for k, tree in ahead.arguments.items()
    if k not in kept
  }


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
  """Keeps libtpu's own lines, written below Python, from the terminal; yields a
  function that gives the last of them."""
  sys.stderr.flush()
  kept = os.dup(2)
  with tempfile.TemporaryFile() as file:
    os.dup2(file.fileno(), 2)

    def said() -> str:
      file.seek(0)
      lines = file.read().decode(errors="replace").strip().splitlines()
      return lines[-1] if lines else ""

    try:
      yield said
    finally:
      os.dup2(kept, 2)
      os.close(kept)

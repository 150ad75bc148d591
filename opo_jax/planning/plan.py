"""Plan a run on TPUs that need not exist: memory, and a lower bound of a step's time.

`libtpu` compiles the very programs that training executes (reshard, prefill, decode and
update) for a topology that is only described, on any CPU host. The memory, FLOPs and
bytes moved of each are compared with the chip's memory and rates.
"""

import dataclasses
import importlib.metadata
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from opo_jax import build
from opo_jax.config import Config
from opo_jax.devices import sharding
from opo_jax.devices.aot import AotProgram
from opo_jax.models import ModelConfig
from opo_jax.planning import hlo, jaxpr, replication, topologies
from opo_jax.planning.programs import kept_bytes, lower_run
from opo_jax.planning.simulation import assumed_lengths, simulate_decoding


@dataclasses.dataclass(frozen=True)
class Assumptions:
  """What a plan assumes about the data.

  Attributes:
    mean_response_tokens: mean length; 0: half of --rollout.max-new-tokens.
    prompt_tokens: length of every prompt; 0: --rollout.max-prompt-tokens.
  """

  mean_response_tokens: int = 0
  prompt_tokens: int = 0

  def resolve(self, config: Config) -> "Assumptions":
    """Zeros replaced by what they stand for."""
    return Assumptions(
      self.mean_response_tokens or config.rollout.max_new_tokens // 2,
      self.prompt_tokens or config.rollout.max_prompt_tokens,
    )


@dataclasses.dataclass(frozen=True)
class Program:
  """What one program needs, on each device.

  Attributes:
    name: reshard, prefill, decode or update.
    bytes: by kind: parameters, optimiser, start (the initial policy, reference of the
      KL), weights (the sampler's copy), cache, rollouts, temporaries (all that the
      program allocates itself, activations and gradients among it); with every response
      of full length.
    fits: it compiles, and the sum of its bytes is within the chip's memory.
    reason: the compiler's words where it does not compile.
    replicated: arrays above 64 MiB -> the mesh axes they could be split over and are
      not, as `replication.replicated` finds them.
    flops, memory_bytes, collective_bytes: of one execution, with responses of the mean
      length; of decoding: of one token in every slot, the mean over a batch.
    executions: in a step.
    seconds: of all executions, by resource: compute, memory, links.
    slots: responses decoded at a time, over all devices.
    compile_s, compile_cpu_s: wall-clock time, and processor time of all cores.
  """

  name: str
  bytes: dict[str, int]
  fits: bool
  reason: str
  replicated: dict[str, str]
  flops: float
  memory_bytes: float
  collective_bytes: dict[str, float]
  executions: float
  seconds: dict[str, float]
  slots: int
  compile_s: float
  compile_cpu_s: float


def plan(
  config: Config,
  topology_name: str,
  assumptions: Assumptions,
  *,
  only: str = "",
  until_miss: bool = False,
) -> dict[str, Any]:
  """Compiles a run's programs for a topology.

  Args:
    config: the run.
    topology_name: `GENERATION:SHAPE`.
    assumptions: about the data.
    only: the one program to compile; empty: all.
    until_miss: start with the update, which is the first that does not fit, and stop
      after a program that does not fit.

  Returns:
    The content of the plan's file: topology, mesh, chip, batch, assumptions, programs;
    the step's seconds (each program takes the time of its slowest resource at the
    published rate: a lower bound, not a forecast); whether all programs fit; versions.

  Raises:
    ValueError: no such topology, or a mesh or batch that does not fill it.
  """
  devices, chip = topologies.topology(topology_name), topologies.chip(topology_name)
  mesh = sharding.make_mesh(
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=devices
  )
  assumptions = assumptions.resolve(config)
  shape = model_shape(config)
  kept = kept_bytes(config, mesh, shape)
  # Where the state alone is too large, the rest is planned as if a quarter were free.
  free_bytes = int(max(chip.memory - sum(kept.values()), chip.memory / 4))
  lowered = lower_run(
    config,
    mesh,
    shape,
    prompt_tokens=assumptions.prompt_tokens,
    free_bytes=free_bytes,
  )
  lowered = [program for program in lowered if only in ("", program.name)]
  order = [program.name for program in lowered]
  if until_miss:
    lowered.sort(key=lambda program: program.name != "update")
  programs = []
  for program in lowered:
    programs.append(_measure(program, kept, chip, mesh, config, assumptions))
    if until_miss and not programs[-1].fits:
      break
  programs.sort(key=lambda program: order.index(program.name))
  return {
    "experiment": config.experiment,
    "topology": topology_name,
    "devices": len(devices),
    "mesh": dict(mesh.shape),
    "micro_batch_tokens": config.algorithm.micro_batch_tokens,
    "batch": {
      "prompts": config.rollout.prompts_per_step,
      "group_size": config.rollout.group_size,
      "max_new_tokens": config.rollout.max_new_tokens,
    },
    "chip": {
      what: getattr(chip, what)
      for what in ("memory", "flops", "memory_rate", "link_rate")
    },
    "assumed": {
      "prompt_tokens": assumptions.prompt_tokens,
      "mean_response_tokens": assumptions.mean_response_tokens,
    },
    "programs": [dataclasses.asdict(program) for program in programs],
    "step_s": sum(max(program.seconds.values()) for program in programs),
    "fits": all(program.fits for program in programs),
    "compiled_by": {
      name: importlib.metadata.version(name) for name in ("jax", "libtpu")
    },
  }


def model_shape(config: Config) -> ModelConfig:
  """The policy's sizes; those of a known model need no network."""
  return KNOWN_MODELS.get(config.model.path) or build.model_config(config)


# The numbers in the config.json of models that experiments name.
_R1_7B = ModelConfig(
  152_064, 3584, 18_944, 28, 28, 4, 128, max_positions=131_072, tie_embeddings=False
)
_R1_1_5B = ModelConfig(
  151_936, 1536, 8960, 28, 12, 2, 128, max_positions=131_072, tie_embeddings=False
)
_QWEN2_5_0_5B = ModelConfig(151_936, 896, 4864, 24, 14, 2, 64, rope_theta=1e6)
KNOWN_MODELS = {
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _R1_7B,
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _R1_1_5B,
  "Qwen/Qwen2.5-0.5B": _QWEN2_5_0_5B,
  "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2_5_0_5B,
}


# --- one program ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Cost:
  """Of one execution, on each device."""

  flops: float
  memory_bytes: float = 0.0
  collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)

  def combine(self, other: "_Cost", by: Callable[[float, float], float]) -> "_Cost":
    """Every number is `by(own, other's)`."""
    own, others = self.collective_bytes, other.collective_bytes
    return _Cost(
      by(self.flops, other.flops),
      by(self.memory_bytes, other.memory_bytes),
      {
        axes: by(own.get(axes, 0.0), others.get(axes, 0.0))
        for axes in own.keys() | others.keys()
      },
    )

  def seconds(self, chip: topologies.Chip) -> dict[str, float]:
    return {
      "compute": self.flops / chip.flops,
      "memory": self.memory_bytes / chip.memory_rate,
      "links": sum(self.collective_bytes.values()) / chip.link_rate,
    }


def _measure(
  program: AotProgram,
  kept: dict[str, int],
  chip: topologies.Chip,
  mesh: Mesh,
  config: Config,
  assumptions: Assumptions,
) -> Program:
  """Compiles a program and reads what it needs."""
  start = time.perf_counter(), time.process_time()
  given = {
    kind: sharding.share_bytes(tree)
    for kind, tree in program.arguments.items()
    if kind not in kept
  }
  bytes_, executions, reason, replicated = kept | given, 1, "", {}
  trip_count = _trip_count(program, config, assumptions)
  cost = _Cost(_device_flops(program.traced, mesh, trip_count))  # if all else fails
  try:
    compiled = _compile(program.traced)
    bytes_["temporaries"] = compiled.memory_analysis().temp_size_in_bytes
    replicated = replication.replicated(compiled, program.traced, mesh)
    cost = _cost(program.traced, compiled, mesh, trip_count)
    if program.half:
      half = _cost(program.half, _compile(program.half), mesh, trip_count)
      executions, ring_share = _decoding(program.slots, mesh, config, assumptions)
      cost = _interpolate(half, cost, ring_share)
  except jax.errors.JaxRuntimeError as error:
    arguments = sum(bytes_[kind] for kind in program.arguments if kind in bytes_)
    bytes_["temporaries"], reason = _out_of_memory(error, arguments)
  return Program(
    name=program.name,
    bytes=bytes_,
    fits=not reason and sum(bytes_.values()) <= chip.memory,
    reason=reason,
    replicated=replicated,
    flops=cost.flops,
    memory_bytes=cost.memory_bytes,
    collective_bytes=cost.collective_bytes,
    executions=executions,
    seconds={what: executions * s for what, s in cost.seconds(chip).items()},
    slots=program.slots,
    compile_s=round(time.perf_counter() - start[0], 1),
    compile_cpu_s=round(time.process_time() - start[1], 1),
  )


def _trip_count(program: AotProgram, config: Config, assumptions: Assumptions) -> int:
  """Of the program's dynamic loop: the update's micro-batches, else 1 token.

  The program is that of responses of full length; those of the mean length fill fewer
  micro-batches.
  """
  if program.name != "update":
    return program.rounds
  prompt = assumptions.prompt_tokens
  full = prompt + config.rollout.max_new_tokens
  return math.ceil(
    program.rounds * ((prompt + assumptions.mean_response_tokens) / full)
  )


def _decoding(
  slots: int, mesh: Mesh, config: Config, assumptions: Assumptions
) -> tuple[int, float]:
  """Tokens that a shard decodes in sequence, and the mean share of the ring."""
  rollout, shards = config.rollout, sharding.batch_shards(mesh)
  responses = rollout.prompts_per_step * rollout.group_size // shards
  longest = rollout.max_new_tokens
  lengths = assumed_lengths(assumptions.mean_response_tokens, longest, responses)
  return simulate_decoding(lengths, slots // shards, longest)


def _compile(traced: jax.stages.Traced) -> jax.stages.Compiled:
  with topologies.silenced_libtpu():
    return traced.lower().compile()


def _device_flops(traced: jax.stages.Traced, mesh: Mesh, trip_count: int) -> float:
  return jaxpr.flops(traced, dynamic_trip_count=trip_count) / mesh.size


def _cost(
  traced: jax.stages.Traced, compiled: jax.stages.Compiled, mesh: Mesh, trip_count: int
) -> _Cost:
  moved = hlo.traffic(
    compiled.as_text(), dict(mesh.shape), dynamic_trip_count=trip_count
  )
  flops = _device_flops(traced, mesh, trip_count)
  return _Cost(flops, moved.memory_bytes, moved.collective_bytes)


def _interpolate(half: _Cost, full: _Cost, ring_share: float) -> _Cost:
  """The cost at a share of the ring's columns, from those at half and at all.

  A part of the cost is constant (the weights), the rest is linear in the columns.
  """
  return half.combine(
    full, lambda half, full: full - 2 * (1 - ring_share) * (full - half)
  )


def _out_of_memory(
  error: jax.errors.JaxRuntimeError, argument_bytes: int
) -> tuple[int, str]:
  """Bytes of temporaries that the compiler would have needed, and its words.

  It writes `Used 20.5G of 15.7G hbm`, arguments included, or `temporaries (20.5G)`.
  Other errors are raised again.
  """
  needed = re.search(r"(Used|temporaries) \(?([\d.]+)([KMGT])", str(error))
  if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
    raise error
  what, size, unit = needed.groups()
  temporaries = int(float(size) * 1024 ** ("KMGT".index(unit) + 1))
  if what == "Used":
    temporaries -= argument_bytes
  reason = f"the compiler ran out of memory: {what} {size}{unit}"
  return max(temporaries, 0), reason

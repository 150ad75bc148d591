"""Find settings that fit: search meshes and micro-batches, or advise on flags."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from opo_jax.config import Config
from opo_jax.planning import topologies
from opo_jax.planning.plan import Assumptions, model_shape, plan
from opo_jax.planning.topologies import GIB


def search(
  config: Config,
  topology_name: str,
  assumptions: Assumptions,
  report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
  """Plans meshes and micro-batches; returns the plans that fit, the fastest first.

  Tries each `tensor` size that divides the model, with the rest of the devices in
  `fsdp`, and for each the largest micro-batch with which the update fits.

  Args:
    report: called with a line for each attempt.
  """
  num_devices = len(topologies.topology(topology_name))
  plans = []
  for tensor in _tensor_sizes(config, num_devices):
    made = _largest_micro_batch(
      config, topology_name, assumptions, num_devices // tensor, tensor, report
    )
    if made:
      plans.append(made)
  return sorted(plans, key=lambda made: made["step_s"])


def _tensor_sizes(config: Config, num_devices: int) -> Iterator[int]:
  shape = model_shape(config)
  split = (shape.num_heads, shape.mlp_width, shape.vocab_size, num_devices)
  for tensor in (1, 2, 4, 8, 16):
    if not any(size % tensor for size in split):
      yield tensor


def _largest_micro_batch(
  config: Config,
  topology_name: str,
  assumptions: Assumptions,
  shards: int,
  tensor: int,
  report: Callable[[str], None],
) -> dict[str, Any] | None:
  """The plan with the most rows a micro-batch that fits, or None.

  After a miss, sizes that could not fit if all temporaries were in proportion to the
  rows are left out.
  """
  row_tokens = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
  max_rows = 8
  for rows in (8, 4, 2, 1):  # rows of full length, in a shard's micro-batch
    if rows > 1 and rows > max_rows:
      continue
    tried = dataclasses.replace(
      config,
      mesh=dataclasses.replace(config.mesh, data=1, fsdp=shards, tensor=tensor),
      algorithm=dataclasses.replace(
        config.algorithm, micro_batch_tokens=rows * row_tokens * shards
      ),
    )
    name = f"fsdp {shards} x tensor {tensor}, {rows} rows a shard"
    try:
      made = plan(tried, topology_name, assumptions, until_miss=True)
    except ValueError as error:
      report(f"{name}: {error}")
      return None
    if made["fits"]:
      report(f"{name}: fits, {made['step_s']:.3g} s a step")
      return made
    missed = next(program for program in made["programs"] if not program["fits"])
    report(f"{name}: {_over(missed, made)}")
    if missed["name"] != "update":
      return None
    temporaries = missed["bytes"]["temporaries"]
    max_rows = rows * (temporaries - _bytes_over(missed, made)) / temporaries
  return None


def advice(made: dict[str, Any], config: Config) -> list[str]:
  """Which flags to change where a plan does not fit, the cheapest first."""
  lines = []
  for program in made["programs"]:
    if not program["fits"]:
      flags = _update_flags if program["name"] == "update" else _sampling_flags
      lines.append(f"{_over(program, made)}:")
      lines += [f"  {flag}" for flag in flags(program, made, config)]
      lines += [f"  {flag}" for flag in _mesh_flags(program, made, config)]
  return lines


def _update_flags(program, made, config: Config) -> Iterator[str]:
  shards = _shards(made)
  row_tokens = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
  rows = config.algorithm.micro_batch_tokens // (row_tokens * shards)
  if config.algorithm.micro_batch_tokens == 0:  # the whole batch at once
    rows = config.rollout.prompts_per_step * config.rollout.group_size // shards
  if rows > 1:
    tokens = rows // 2 * row_tokens * shards
    yield f"smaller micro-batches (--algorithm.micro-batch-tokens {tokens})"
  stronger = {"none": "block", "attention": "block", "block": "everything"}
  if config.model.remat in stronger:
    yield f"--model.remat {stronger[config.model.remat]}"
  if config.optimizer.moment_dtype == "float32":
    yield "--optimizer.moment-dtype bfloat16"


def _sampling_flags(program, made, config: Config) -> Iterator[str]:
  shards = _shards(made)
  if program["name"] == "decode" and program["slots"] > shards:
    yield f"fewer slots (--rollout.slots {max(program['slots'] // 2, shards)})"
  if config.rollout.gather_weights and made["mesh"]["fsdp"] > 1:
    yield "weights that stay sharded (--rollout.no-gather-weights)"


def _mesh_flags(program, made, config: Config) -> Iterator[str]:
  shape, tensor = model_shape(config), 2 * made["mesh"]["tensor"]
  # Keys and values that `tensor` does not divide would be replicated over it.
  heads = shape.num_kv_heads if program["name"] == "decode" else shape.num_heads
  if heads % tensor == 0 and made["mesh"]["fsdp"] % 2 == 0:
    yield f"--mesh.tensor {tensor}"
  yield "more chips, or LoRA (--model.lora-rank 32)"


def _shards(made) -> int:
  return made["mesh"]["data"] * made["mesh"]["fsdp"]


def _bytes_over(program, made) -> float:
  return sum(program["bytes"].values()) - made["chip"]["memory"]


def _over(program, made) -> str:
  gib = _bytes_over(program, made) / GIB
  return f"{program['name']} needs {gib:.1f} GiB more than a chip has"

"""Lowering: the sampler's largest programs from shapes alone, for devices that need
not exist. Nothing is allocated or run."""

import functools

import jax
import jax.numpy as jnp

from opo_jax.devices import sharding
from opo_jax.devices.aot import AotProgram
from opo_jax.models.transformer import Policy
from opo_jax.sampler import decoding
from opo_jax.sampler.params import SamplingParams
from opo_jax.sampler.prefill import prefill, start
from opo_jax.sampler.state import Prompts, Queue, logical_axes


def lower_prefill(
  policy: Policy, *, num_prompts: int, prompt_columns: int, cache_dtype: str
) -> tuple[AotProgram, Prompts]:
  """Prefill of a batch.

  Args:
    policy: of `jax.ShapeDtypeStruct`s with their shardings, in its compute dtype.
    num_prompts: G, of all shards, padding included.
    prompt_columns: P.
    cache_dtype: of keys and values.

  Returns:
    the program; the shapes of what it returns.
  """
  mesh = policy.mesh
  asked = (_abstract(mesh, num_prompts, prompt_columns), _abstract(mesh, num_prompts))
  program = functools.partial(prefill, cache_dtype=cache_dtype)
  prompts = _laid_out(jax.eval_shape(program, policy, *asked), mesh)
  arguments = {"rollouts": asked, "cache": (prompts.keys, prompts.values)}
  traced = prefill.trace(policy, *asked, cache_dtype)
  return AotProgram("prefill", traced, arguments), prompts


def lower_decode(
  policy: Policy, prompts: Prompts, params: SamplingParams, *, num_slots: int
) -> AotProgram:
  """The decode loop with the widest ring; `half` has half of its columns.

  Args:
    policy, prompts: as for `lower_prefill`, and what that returns.
    params: `eos_ids` resolved.
    num_slots: of a shard.
  """
  mesh, shards = policy.mesh, sharding.batch_shards(policy.mesh)
  num_rows = prompts.lengths.shape[0] * params.samples_per_prompt
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_rows))
  queue = Queue(
    _laid_out(keys, mesh), _abstract(mesh, num_rows), _abstract(mesh, shards)
  )

  def with_ring(width):
    begin = functools.partial(start, num_slots=num_slots, width=width)
    slots, responses = _laid_out(
      jax.eval_shape(begin, policy, prompts, queue, params), mesh
    )
    in_groups = num_slots * shards == num_rows
    traced = decoding.decode.trace(
      slots, responses, policy, prompts, queue, params, _abstract(mesh), in_groups
    )
    cache = (prompts.keys, prompts.values, slots.keys, slots.values)
    return traced, {"cache": cache, "rollouts": (responses, queue)}

  traced, arguments = with_ring(params.max_new_tokens)
  half, _ = with_ring(max(params.max_new_tokens // 2, 1))
  return AotProgram("decode", traced, arguments, half=half)


def _abstract(mesh, *shape):
  return _laid_out(jax.ShapeDtypeStruct(shape, jnp.int32), mesh)


def _laid_out(tree, mesh):
  """The layout of `state.on_mesh`; keys and values are known by their five axes."""

  def of_leaf(leaf):
    axes = logical_axes(mesh, leaf.shape, cache=leaf.ndim == 5) if leaf.ndim else ()
    return jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding.named(mesh, *axes)
    )

  return jax.tree.map(of_leaf, tree)

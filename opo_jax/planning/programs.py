"""The programs of a training step, lowered from shapes for absent devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opo_jax import build, sampler
from opo_jax.config import Config
from opo_jax.devices import sharding
from opo_jax.devices.aot import AotProgram
from opo_jax.learner import PolicyGradientLearner, TrainState
from opo_jax.models import ModelConfig, Policy, lora
from opo_jax.rollouts import Rollouts


class AbstractRun(NamedTuple):
  """Shapes and shardings of what a run keeps on its devices.

  Attributes:
    policy: the policy before RL.
    learner: of the RL phase.
    state: what the learner updates.
  """

  policy: Policy
  learner: PolicyGradientLearner
  state: TrainState


def abstract_run(
  config: Config, mesh: Mesh, shape: ModelConfig, eos_ids: tuple[int, ...] = (0,)
) -> AbstractRun:
  """The run's policy and state, from shapes alone.

  Args:
    config: of the run.
    mesh: of devices that may be absent.
    shape: of the policy.
    eos_ids: the tokens that end a response; no size depends on them.

  Raises:
    ValueError: sizes that do not fit the mesh.
  """
  build.check_batch(config, mesh)
  build.check_remat(config, mesh)
  policy = build.abstract_policy(config, mesh, eos_ids=eos_ids, shape=shape)
  learner = build.make_learner(config, mesh)
  trained = jax.eval_shape(lambda p: build.add_adapters(config, p), policy)
  return AbstractRun(policy, learner, learner.abstract_state(trained))


def kept_bytes(config: Config, mesh: Mesh, shape: ModelConfig) -> dict[str, int]:
  """Bytes that stay on each device all the run: parameters, optimiser, start."""
  run = abstract_run(config, mesh, shape)
  _, frozen = lora.split(run.state.policy)
  parameters = sharding.share_bytes(run.state.policy)
  return {
    "parameters": parameters,
    "optimiser": sharding.share_bytes(run.state) - parameters,
    # Policy and start policy share the frozen parameters: with adapters, all of them.
    "start": sharding.share_bytes(run.policy) - sharding.share_bytes(frozen),
  }


def lower_run(
  config: Config,
  mesh: Mesh,
  shape: ModelConfig,
  *,
  prompt_tokens: int,
  free_bytes: int | None = None,
) -> list[AotProgram]:
  """Reshard (where the sampler has weights of its own), prefill, decode and update.

  Args:
    config: of the run.
    mesh: of devices that may be absent.
    shape: of the policy.
    prompt_tokens: length of every prompt.
    free_bytes: of a device beside what the run keeps there; None asks the device.
  """
  run, rollout = abstract_run(config, mesh, shape), config.rollout
  programs = build.make_sampler(config).lower(
    run.policy,
    build.rollout_params(config),
    num_prompts=rollout.prompts_per_step,
    prompt_tokens=prompt_tokens,
    free_bytes=free_bytes,
  )
  rollouts = _abstract_rollouts(config, mesh, sampler.bucket(prompt_tokens))
  return [*programs, run.learner.lower(run.state, rollouts)]


def _abstract_rollouts(config: Config, mesh: Mesh, prompt_columns: int) -> Rollouts:
  """Shapes and shardings of what the sampler returns."""
  rollout = config.rollout
  G, T = rollout.prompts_per_step, rollout.max_new_tokens
  N = G * rollout.group_size

  def array(dtype, *shape, over="batch"):
    axes = (over, *(None,) * (len(shape) - 1)) if shape else ()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(mesh, *axes))

  logprobs = array(jnp.float32, N, T)
  return Rollouts(
    prompts=array(jnp.int32, G, prompt_columns, over=None),
    prompt_lengths=array(jnp.int32, G, over=None),
    tokens=array(jnp.int32, N, T),
    logprobs=logprobs,
    sampling_logprobs=logprobs,
    mask=array(bool, N, T),
    lengths=array(jnp.int32, N),
    prompt_ids=array(jnp.int32, N, over=None),
    finished=array(bool, N),
    temperature=array(jnp.float32),
    version=array(jnp.int32),
  )

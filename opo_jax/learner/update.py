"""The update: rollouts and rewards in, one optimiser step out.

`PolicyGradientLearner.update` runs two jitted programs and, between them, a plan:

    compute_advantages   rewards -> advantages, denominators, metrics of the groups
    packing.plan         on the host: which rollouts have a gradient, and in which rows
                         their tokens lie
    optimizer_steps      gather tokens -> log-probs -> loss -> gradients -> optimiser

`algorithm.py` has the settings and the objectives by name, `forward.py` the forward
pass; losses and baselines are `opo_jax/losses/` and `opo_jax/advantages.py`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from opo_jax import losses
from opo_jax.advantages import ESTIMATORS
from opo_jax.devices import sharding
from opo_jax.devices.aot import AotProgram
from opo_jax.learner import metrics, packing
from opo_jax.learner.algorithm import OBJECTIVES, Algorithm
from opo_jax.learner.forward import PackedBatch, batch_stats, gather
from opo_jax.learner.state import TrainState, abstract_state, init_state
from opo_jax.models import lora
from opo_jax.rollouts import Rollouts


class UpdateMetrics(NamedTuple):
  """What one update measured; the arrays may still be under computation.

  Attributes:
    scalars: metric -> float32 scalar; a metric that was not measured is absent.
    advantages: [N].
  """

  scalars: dict[str, jax.Array | float]
  advantages: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoredRollouts:
  """What is known of a batch before any token goes through the model.

  Attributes:
    advantages: [N].
    normalizers: [optimiser steps] float32, the denominator of each one's loss.
    last_token: [N] columns up to and including the last trainable token of a response;
      0: the row does not count.
    prompt_ids: [N].
    prompt_lengths: [G].
  """

  advantages: jax.Array
  normalizers: jax.Array
  last_token: jax.Array
  prompt_ids: jax.Array
  prompt_lengths: jax.Array


class _Programs(NamedTuple):
  """The jitted halves of an update."""

  compute_advantages: jax.stages.Wrapped
  optimizer_steps: jax.stages.Wrapped


class PolicyGradientLearner:
  """One optimiser step, or several, on a batch of rollouts.

  Args:
    algorithm: from rewards to a gradient.
    optimizer: Optax's.
    offload: keep the optimiser's moments in the hosts' memory; `optimizer` must then
      fetch them (`learner.optimizer.adamw(offload=True)`).
  """

  def __init__(
    self,
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    *,
    offload: bool = False,
  ):
    self.algorithm, self.optimizer, self.offload = algorithm, optimizer, offload
    self._programs: _Programs | None = None

  @property
  def is_on_policy(self) -> bool:
    """Whether it takes only rollouts of the very version it updates."""
    return self.algorithm.require_on_policy

  def init(self, policy: Any) -> TrainState:
    """The state before the first update, see `state.init_state`."""
    return init_state(policy, self.optimizer, offload=self.offload)

  def abstract_state(self, abstract_policy: Any) -> TrainState:
    """Shapes, dtypes and layout of what `init` gives, see `state.abstract_state`."""
    return abstract_state(abstract_policy, self.optimizer, offload=self.offload)

  def update(
    self, state: TrainState, rollouts: Rollouts, rewards: np.ndarray | jax.Array
  ) -> tuple[TrainState, UpdateMetrics]:
    """One update.

    Args:
      state: donated, except for the frozen part of its policy, which the new state
        shares; do not use it afterwards.
      rollouts: N rows.
      rewards: [N], equal on all hosts; NaN leaves the row out of baseline, loss and
        normaliser.

    Returns:
      The new state, and what was measured, while the devices are still at work on both.

    Raises:
      ValueError: rollouts of another policy version in exact on-policy training, or a
        number of prompts that does not split as configured.
    """
    if self.is_on_policy:
      check_on_policy(state, rollouts)
    trained, frozen = state.split()
    programs = self._jitted(trained)
    scored, group_metrics = programs.compute_advantages(
      rollouts, *_zero_for_nan(rewards)
    )
    # The only wait for the devices: the host plans by a few numbers of each rollout.
    plan = self._plan(rollouts, jax.device_get(scored), state.policy.mesh)
    trained, measured = programs.optimizer_steps(
      trained, frozen, rollouts, scored, plan
    )
    scalars = group_metrics | measured | metrics.plan_metrics(plan)
    if not plan.tokens:  # nothing went through the model: there is no gap to report
      scalars = {k: v for k, v in scalars.items() if not k.startswith("onpolicy/")}
    return trained.join(frozen), UpdateMetrics(scalars, scored.advantages)

  def memory(
    self, state: TrainState, rollouts: Rollouts, rewards: np.ndarray | jax.Array
  ) -> Any:
    """The `memory_analysis()` of the program that these arguments need, of one device.

    It compiles the program; an update with the same arguments then compiles nothing.
    """
    trained, frozen = state.split()
    programs = self._jitted(trained)
    scored, _ = programs.compute_advantages(rollouts, *_zero_for_nan(rewards))
    plan = self._plan(rollouts, jax.device_get(scored), state.policy.mesh)
    lowered = programs.optimizer_steps.lower(trained, frozen, rollouts, scored, plan)
    return lowered.compile().memory_analysis()

  def lower(
    self, abstract_state: TrainState, abstract_rollouts: Rollouts
  ) -> AotProgram:
    """The program of the largest batch: every response of full length, all trained.

    Args:
      abstract_state, abstract_rollouts: arrays, or their shapes and layout
        (`jax.ShapeDtypeStruct`).

    Returns:
      `update`, traced; its rounds are the micro-batches of an optimiser step.
    """
    rollouts, mesh = abstract_rollouts, abstract_state.policy.mesh
    trained, frozen = abstract_state.split()
    programs = self._jitted(trained)
    (num_rows, width), (num_groups, prompt_width) = (
      rollouts.tokens.shape,
      rollouts.prompts.shape,
    )
    row = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    scored, _ = jax.eval_shape(programs.compute_advantages, rollouts, row, row)
    largest = ScoredRollouts(
      advantages=np.ones(num_rows),
      normalizers=None,
      last_token=np.full(num_rows, width),
      prompt_ids=np.arange(num_rows) * num_groups // num_rows,
      prompt_lengths=np.full(num_groups, prompt_width),
    )
    plan = self._plan(rollouts, largest, mesh)
    traced = programs.optimizer_steps.trace(trained, frozen, rollouts, scored, plan)
    rounds = int(plan.micro_batches.max())
    return AotProgram("update", traced, {"rollouts": rollouts}, rounds=rounds)

  def _jitted(self, trained: TrainState) -> _Programs:
    """The jitted programs; the layout of the first state is that of every later one."""
    if self._programs is not None:
      return self._programs
    mesh = trained.policy.mesh
    # Every host plans by the same few numbers, so each of them needs all of these.
    everywhere = None if mesh is None else sharding.named(mesh)
    # The state is donated: the new one takes the memory of the old, which halves what
    # it needs. It also lies where the old one lay: left to the compiler, the layout may
    # change, and the next sampling would compile again.
    layout = jax.tree.map(lambda leaf: leaf.sharding, trained)
    self._programs = _Programs(
      compute_advantages=jax.jit(
        functools.partial(compute_advantages, self.algorithm), out_shardings=everywhere
      ),
      optimizer_steps=jax.jit(
        functools.partial(optimizer_steps, self.algorithm, self.optimizer),
        donate_argnums=0,
        out_shardings=(layout, None),
      ),
    )
    return self._programs

  def _plan(
    self, rollouts: Rollouts, scored: ScoredRollouts, mesh: Mesh | None
  ) -> packing.Plan:
    algorithm, num_groups = self.algorithm, rollouts.num_groups
    if num_groups % algorithm.updates_per_batch:
      raise ValueError(
        f"{num_groups} prompts do not split into {algorithm.updates_per_batch} equal"
        " updates per batch; use a multiple (--rollout.prompts-per-step)."
      )
    return packing.plan(
      scored.last_token,
      # Exactly zero: the estimators give exactly 0 where rewards of a group are equal.
      (scored.advantages != 0) | (not algorithm.prune),
      scored.prompt_ids,
      scored.prompt_lengths,
      prompt_width=rollouts.prompts.shape[1],
      response_width=rollouts.tokens.shape[1],
      share_prompts=algorithm.share_prompts,
      steps=algorithm.updates_per_batch,
      shards=sharding.batch_shards(mesh),
      micro_batch_tokens=algorithm.micro_batch_tokens,
      pack=algorithm.pack,
    )


# --- before the update ---------------------------------------------------------------


def check_on_policy(state: TrainState, rollouts: Rollouts) -> None:
  """Refuses rollouts that are not samples of this very policy.

  Raises:
    ValueError: another version sampled them, or a filter left tokens out.
  """
  sampled, current = int(rollouts.version), int(state.step)
  if sampled != current:
    raise ValueError(
      f"Rollouts of policy version {sampled} were given to version {current}; exact"
      " on-policy training takes only its own. Sample again, or train off-policy"
      " (--algorithm.updates-per-batch 2)."
    )
  if rollouts.filtered:
    raise ValueError(
      "Rollouts that were sampled greedily or with top-k, top-p or min-p were given to"
      " exact on-policy training, and the learner applies no such filter; sample with"
      " temperature alone."
    )


def _zero_for_nan(rewards) -> tuple[jax.Array, jax.Array]:
  """Rewards with 0 for NaN, and whether the row has a reward: two arrays [N]."""
  rewards = np.asarray(rewards)
  valid = ~np.isnan(rewards)
  return jnp.asarray(np.where(valid, rewards, 0.0)), jnp.asarray(valid)


def compute_advantages(
  algorithm: Algorithm, rollouts: Rollouts, rewards: jax.Array, valid: jax.Array
) -> tuple[ScoredRollouts, dict[str, jax.Array]]:
  """Advantages and denominators of the whole batch, and the metrics of its groups.

  Args:
    algorithm: estimator, aggregation, normaliser.
    rollouts: N rows.
    rewards: [N].
    valid: [N] bool; False leaves the row out of baseline, loss and normaliser.
  """
  # Rows without a reward leave before any statistic is taken: one NaN, or one 0 in its
  # place, would move the baseline of its group.
  valid = valid.astype(bool)
  mask = rollouts.mask & valid[:, None]
  rewards = jnp.where(valid, rewards.astype(jnp.float32), 0.0)
  advantages = ESTIMATORS[algorithm.estimator](
    rewards,
    mask.sum(-1),
    rollouts.prompt_ids,
    num_groups=rollouts.num_groups,
    valid=valid,
  )

  def normalizer(step):
    # One denominator for a whole optimiser step, of all rollouts that count: those that
    # are pruned count too, and no micro-batch divides by its own tokens. (A mean of the
    # means of micro-batches would depend on how the batch is cut.)
    if algorithm.normalizer is not None:
      return jnp.float32(algorithm.normalizer)
    own = rollouts.prompt_ids * steps // rollouts.num_groups == step
    return losses.step_normalizer(mask & own[:, None], algorithm.aggregation)

  steps = algorithm.updates_per_batch
  columns = jnp.arange(1, mask.shape[1] + 1)
  scored = ScoredRollouts(
    advantages=advantages,
    normalizers=jnp.stack([normalizer(step) for step in range(steps)]),
    last_token=jnp.where(mask, columns, 0).max(-1),
    prompt_ids=rollouts.prompt_ids,
    prompt_lengths=rollouts.prompt_lengths,
  )
  return scored, metrics.group_metrics(rewards, advantages, mask, valid, rollouts)


# --- the update ----------------------------------------------------------------------


def optimizer_steps(
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  frozen: Any,
  rollouts: Rollouts,
  scored: ScoredRollouts,
  plan: packing.Plan,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Every optimiser step of the batch, one after the other.

  Args:
    algorithm, optimizer: static.
    state: its policy holds only what is trained.
    frozen: the rest of the policy.
    rollouts, scored: the batch.
    plan: where its tokens lie.

  Returns:
    The new state, and metrics of the tokens that were computed.
  """

  def optimizer_step(carry, step):
    trained, opt_state = carry
    layout, num_micro_batches, normalizer = step
    grads, sums = _sum_gradients(
      algorithm,
      trained,
      frozen,
      rollouts,
      scored.advantages,
      layout,
      num_micro_batches,
      normalizer,
    )
    with jax.named_scope("optimizer"):
      change, opt_state = optimizer.update(grads, opt_state, trained)
      trained = optax.apply_updates(trained, change)
    sums["grad_norm"] = optax.tree.norm(grads)
    return (trained, opt_state), sums

  (trained, opt_state), sums = jax.lax.scan(
    optimizer_step,
    (state.policy, state.opt_state),
    (plan.layout, plan.micro_batches, scored.normalizers),
  )
  state = TrainState(trained, opt_state, state.step + 1)
  return state, metrics.token_metrics(sums, rollouts, plan.left_out)


def _sum_gradients(
  algorithm: Algorithm,
  trained: Any,
  frozen: Any,
  rollouts: Rollouts,
  advantages: jax.Array,
  layout: packing.Layout,
  num_micro_batches: jax.Array,
  normalizer: jax.Array,
) -> tuple[Any, dict[str, jax.Array]]:
  """The gradient of one optimiser step, and what was measured on its tokens.

  Args:
    layout: of its micro-batches, with one leading axis.
    num_micro_batches: how many of them hold anything.
    normalizer: the denominator of the step's loss.
  """

  def loss_of(trained, batch):
    policy = lora.join(trained, frozen)
    return _loss(policy, batch, algorithm, rollouts.temperature, normalizer)

  def add_micro_batch(index, totals):
    grads, sums = totals
    own = jax.tree.map(lambda array: array[index], layout)
    batch = gather(rollouts, advantages, own, trained.mesh)
    (loss, new), new_grads = jax.value_and_grad(loss_of, has_aux=True)(trained, batch)
    grads = jax.tree.map(lambda total, new: total + new, grads, new_grads)
    return grads, _add_up(sums, {"loss": loss, **new})

  # Gradients add up in float32, whatever the dtype of the parameters: in bfloat16 a sum
  # of 30 micro-batches would be off by a hundredth.
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)
  nothing = {name: jnp.float32(0.0) for name in ("loss", *_SUMS)}
  # The bound of the loop is data: another number of micro-batches is the same program.
  return jax.lax.fori_loop(0, num_micro_batches, add_micro_batch, (zeros, nothing))


# Sums over trainable tokens that a micro-batch measures besides its loss (`diff_max` is
# their maximum).
_SUMS = ("tokens", "entropy", "diff", "diff_max", "kl", "clipped")


def _loss(
  policy: Any,
  batch: PackedBatch,
  algorithm: Algorithm,
  temperature: jax.Array,
  normalizer: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """One micro-batch's share of the step's loss, and what was measured on it."""
  stats = batch_stats(policy, batch, temperature, algorithm.remat)
  loss, aux = OBJECTIVES[algorithm.objective](
    stats.logprob,
    batch.sampling_logprobs,
    batch.advantages,
    batch.mask,
    aggregation=algorithm.aggregation,
    normalizer=normalizer,
    segment_ids=batch.segment_ids,
    **algorithm.objective_options,
  )
  logprob, entropy = jax.lax.stop_gradient((stats.logprob, stats.entropy))
  # The on-policy gap is measured on the log-probs of the policy, not on those of the
  # filtered distribution that tokens may be sampled from: it shows where sampler and
  # learner compute something else, and must be 0 up to rounding even then.
  gap = jnp.where(batch.mask, jnp.abs(logprob - batch.logprobs), 0.0)
  return loss, {
    "tokens": batch.mask.sum(dtype=jnp.float32),
    "entropy": jnp.where(batch.mask, entropy, 0.0).sum(),
    "diff": gap.sum(),
    "diff_max": gap.max(),
    "kl": losses.kl(batch.logprobs, logprob, batch.mask).sum(),
    "clipped": aux["clipped"].sum(dtype=jnp.float32),
  }


def _add_up(totals, new):
  return {
    name: jnp.maximum(totals[name], new[name])
    if name.endswith("_max")
    else totals[name] + new[name]
    for name in totals
  }

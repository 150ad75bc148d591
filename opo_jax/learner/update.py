"""The update: rollouts and rewards in, one optimiser step out.

`PolicyGradientLearner.update` runs two jitted programs and, between them, a plan:

    compute_advantages   rewards -> advantages, denominators, metrics of the groups
    packing.plan         on the host: which rollouts have a gradient, and in which rows
                         their tokens lie
    optimizer_steps      gather tokens -> log-probs -> loss -> gradients -> optimiser

The forward pass is in `forward.py`, the losses in `opo_jax/losses.py` (by name in
`objectives.py`), the baselines in `opo_jax/advantages.py`.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable
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
from opo_jax.learner.forward import PackedBatch, batch_stats, gather
from opo_jax.learner.objectives import OBJECTIVES, OPTIONS
from opo_jax.learner.state import TrainState, abstract_state, init_state
from opo_jax.models import lora
from opo_jax.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """What is compiled into an update; plain values, so that it can be hashed and shown.

  Attributes:
    estimator: a name in `advantages.ESTIMATORS`.
    objective: a name in `OBJECTIVES`.
    aggregation: one of `losses.AGGREGATIONS`.
    normalizer: the denominator of one optimiser step's loss; None counts the step's
      tokens or responses, as the aggregation says. `constant` needs a number.
    clip_low, clip_high: bounds of the ratio in ppo_clip, gspo and cispo; None: the
      default of the loss. Other objectives do not read them.
    tis_cap: largest importance weight of tis; None: its default.
    updates_per_batch: optimiser steps per batch of rollouts, each on the groups of an
      equal share of the prompts. 1 is exact on-policy.
    micro_batch_tokens: bound on the tokens that are computed at a time, over all
      devices, padding included; the gradients of an optimiser step add up over them.
      0: all at once.
    require_on_policy: refuse rollouts of another policy version.
    remat: what the backward pass computes again, one of `models.transformer.REMAT`.
    share_prompts: compute a prompt once for its group; False repeats it before each
      response, in rows with segment ids, which is what attention kernels take.
    prune: leave out rollouts whose advantage is exactly zero.
    pack: several responses to a row.

  Raises:
    ValueError: an unknown estimator or objective, with the near names.
  """

  estimator: str = "opo"
  objective: str = "policy_gradient"
  aggregation: str = "token_mean"
  normalizer: float | None = None
  clip_low: float | None = None
  clip_high: float | None = None
  tis_cap: float | None = None
  updates_per_batch: int = 1
  micro_batch_tokens: int = 0
  require_on_policy: bool = True
  remat: str = "none"
  share_prompts: bool = True
  prune: bool = True
  pack: bool = True

  def __post_init__(self):
    _check_name("estimator", self.estimator, ESTIMATORS, "--algorithm.advantage")
    _check_name("objective", self.objective, OBJECTIVES, "--algorithm.loss")

  @property
  def objective_options(self) -> dict[str, float]:
    """The options that the objective takes and that are set."""
    options = {name: getattr(self, name) for name in OPTIONS.get(self.objective, ())}
    return {name: value for name, value in options.items() if value is not None}


class UpdateMetrics(NamedTuple):
  """What one update measured; the arrays may still be under computation.

  Attributes:
    scalars: metric -> float32 scalar; a metric that was not measured is absent.
    advantages: [N].
  """

  scalars: dict[str, jax.Array | float]
  advantages: jax.Array


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
    """The state before the first update, see `init_state`."""
    return init_state(policy, self.optimizer, offload=self.offload)

  def abstract_state(self, abstract_policy: Any) -> TrainState:
    """Shapes and layout of the state, see the function of this name."""
    return abstract_state(abstract_policy, self.optimizer, offload=self.offload)

  def update(
    self, state: TrainState, rollouts: Rollouts, rewards: np.ndarray | jax.Array
  ) -> tuple[TrainState, UpdateMetrics]:
    """One update.

    Args:
      state: donated, except for the frozen part of its policy, which the new state
        shares; do not use it afterwards.
      rollouts: N rows.
      rewards: [N]; NaN leaves the row out of baseline, loss and normaliser.

    Returns:
      The new state, and what was measured. It returns as soon as the work is handed to
      the devices.

    Raises:
      ValueError: rollouts of another policy version in exact on-policy training, or a
        number of prompts that does not split as configured.
    """
    if self.is_on_policy:
      check_on_policy(state, rollouts)
    trained, frozen = state.split()
    programs = self._compiled(trained)
    scored, group_metrics = programs.advantages(rollouts, *_zero_for_nan(rewards))
    plan = self._plan(rollouts, jax.device_get(scored), state.policy.mesh)
    trained, measured = programs.steps(trained, frozen, rollouts, scored, plan)
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
    programs = self._compiled(trained)
    scored, _ = programs.advantages(rollouts, *_zero_for_nan(rewards))
    plan = self._plan(rollouts, jax.device_get(scored), state.policy.mesh)
    lowered = programs.steps.lower(trained, frozen, rollouts, scored, plan)
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
    programs = self._compiled(trained)
    (num_rows, width), (num_groups, prompt_width) = (
      rollouts.tokens.shape,
      rollouts.prompts.shape,
    )
    row = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    scored, _ = jax.eval_shape(programs.advantages, rollouts, row, row)
    largest = ScoredRollouts(
      advantages=np.ones(num_rows),
      normalizers=None,
      last_token=np.full(num_rows, width),
      prompt_ids=np.arange(num_rows) * num_groups // num_rows,
      prompt_lengths=np.full(num_groups, prompt_width),
    )
    plan = self._plan(rollouts, largest, mesh)
    traced = programs.steps.trace(trained, frozen, rollouts, scored, plan)
    rounds = int(plan.micro_batches.max())
    return AotProgram("update", traced, {"rollouts": rollouts}, rounds=rounds)

  def _compiled(self, trained: TrainState) -> "_Programs":
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
      advantages=jax.jit(
        functools.partial(compute_advantages, self.algorithm), out_shardings=everywhere
      ),
      steps=jax.jit(
        functools.partial(optimizer_steps, self.algorithm, self.optimizer),
        donate_argnums=0,
        out_shardings=(layout, None),
      ),
    )
    return self._programs

  def _plan(
    self, rollouts: Rollouts, scored: "ScoredRollouts", mesh: Mesh | None
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


class _Programs(NamedTuple):
  advantages: Callable[..., tuple["ScoredRollouts", dict[str, jax.Array]]]
  steps: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


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

  def loss_of(trained, batch, normalizer):
    policy = lora.join(trained, frozen)
    return _loss(policy, batch, algorithm, rollouts.temperature, normalizer)

  def optimizer_step(carry, step):
    trained, opt_state = carry
    layout, num_micro_batches, normalizer = step
    mesh = lora.join(trained, frozen).mesh

    def add_micro_batch(index, totals):
      grads, sums = totals
      own = jax.tree.map(lambda array: array[index], layout)
      batch = gather(rollouts, scored.advantages, own, mesh)
      (loss, new), new_grads = jax.value_and_grad(loss_of, has_aux=True)(
        trained, batch, normalizer
      )
      grads = jax.tree.map(lambda total, new: total + new, grads, new_grads)
      return grads, _add_up(sums, {"loss": loss, **new})

    # Gradients add up in float32, whatever the dtype of the parameters: in bfloat16 a
    # sum of 30 micro-batches would be off by a hundredth.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)
    nothing = {name: jnp.float32(0.0) for name in ("loss", *_SUMS)}
    # A loop with a bound that is data: how many micro-batches a step has does not
    # compile another program.
    grads, sums = jax.lax.fori_loop(
      0, num_micro_batches, add_micro_batch, (zeros, nothing)
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


def _check_name(kind: str, name: str, table: dict[str, Any], flag: str) -> None:
  if name not in table:
    near = difflib.get_close_matches(str(name), table, n=1)
    hint = f"did you mean {near[0]}? There" if near else "there"
    raise ValueError(
      f"Unknown {kind} {name!r}; {hint} are {', '.join(table)} ({flag})."
    )

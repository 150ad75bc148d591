"""The on-policy update: rollouts and rewards in, one optimiser step out.

Three programs of which the middle one runs on the host:

    _weigh        rewards -> advantages, denominators, metrics of the groups
    packing.plan  which rollouts have a gradient, and where their tokens lie
    _update       gather tokens -> log-probs -> loss -> gradients -> optimiser

`_update` is the algorithm in one place. It is jitted and donates its state.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opo_jax import advantages as adv
from opo_jax import losses
from opo_jax.devices import sharding
from opo_jax.learner import packing
from opo_jax.logprobs import TokenStats, linear_logprobs
from opo_jax.models.attention import Keys
from opo_jax.rollouts import Rollouts, Rows, prompt_columns, rows, select

# (logprobs, sampled logprobs, advantages, mask, *, aggregation, normalizer) -> loss,
# and a dict where `clipped` [N, T] marks the tokens whose ratio is out of bounds.
Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def policy_gradient(logprobs, sampling_logprobs, advantages, mask, **options):
  """`losses.policy_gradient` with the signature of an Objective.

  On-policy, the ratio to the sampled log-probs is 1, and it does not read them but to
  measure what PPO's usual clip would cut off.
  """
  loss, _ = losses.policy_gradient(logprobs, advantages, mask, **options)
  _, aux = losses.ppo_clip(
    jax.lax.stop_gradient(logprobs), sampling_logprobs, advantages, mask
  )
  return loss, aux


def tis(logprobs, sampling_logprobs, advantages, mask, *, cap=2.0, **options):
  """`policy_gradient`, each token weighed by its truncated importance."""
  weights = losses.truncated_importance(logprobs, sampling_logprobs, mask, cap=cap)
  return policy_gradient(
    logprobs, sampling_logprobs, advantages, mask, importance_weights=weights, **options
  )


OBJECTIVES: dict[str, Objective] = {
  "policy_gradient": policy_gradient,
  "tis": tis,
  "ppo_clip": losses.ppo_clip,
  "gspo": losses.gspo,
  "cispo": losses.cispo,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What an update changes.

  Attributes:
    policy: the parameters, an NNX module with `hidden` and `unembedding`.
    opt_state: Optax's.
    step: int32 scalar, updates done: the policy's version.
  """

  policy: Any
  opt_state: Any
  step: jax.Array


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """What is compiled into an update. All plain values and functions.

  Attributes:
    estimator: one of `advantages.ESTIMATORS`.
    objective: one of `OBJECTIVES`, options bound.
    aggregation: one of `losses.AGGREGATIONS`.
    normalizer: the denominator of one optimiser step's loss; None counts the step's
      tokens or responses, as the aggregation says. `constant` needs a number.
    updates_per_batch: optimiser steps per rollout batch, each on the groups of its
      own share of the prompts. 1 is exact on-policy.
    micro_batch_tokens: the gradient of one optimiser step is accumulated over parts
      of this many tokens, over all devices, padding included; 0: one part.
    require_on_policy: refuse rollouts of another policy version.
    remat: what the backward pass computes again, one of `models.transformer.REMAT`.
    share_prompts: compute a prompt once for its group; False repeats it before each
      response, in the rows with segment ids that attention kernels take.
    prune: leave out rollouts whose advantage is exactly zero.
    pack: several responses to a row.
    split: policy -> what is trained, and what is frozen.
    join: its inverse.
  """

  estimator: adv.Estimator
  objective: Objective
  aggregation: str = "token_mean"
  normalizer: float | None = None
  updates_per_batch: int = 1
  micro_batch_tokens: int = 0
  require_on_policy: bool = True
  remat: str = "none"
  share_prompts: bool = True
  prune: bool = True
  pack: bool = True
  split: Callable[[Any], tuple[Any, Any]] = lambda policy: (policy, None)
  join: Callable[[Any, Any], Any] = lambda trained, frozen: trained


class Update:
  """`update(state, rollouts, rewards, valid) -> state, metrics, advantages`."""

  def __init__(self, algorithm: Algorithm, optimizer: optax.GradientTransformation):
    self.algorithm, self.optimizer = algorithm, optimizer
    self._programs = None

  def split(self, state: TrainState) -> tuple[TrainState, Any]:
    """The state with what an update changes alone, and the rest of its policy."""
    trained, frozen = self.algorithm.split(state.policy)
    return dataclasses.replace(state, policy=trained), frozen

  def join(self, state: TrainState, frozen: Any) -> TrainState:
    """The inverse of `split`."""
    policy = self.algorithm.join(state.policy, frozen)
    return dataclasses.replace(state, policy=policy)

  @property
  def is_on_policy(self) -> bool:
    """Whether it takes only rollouts of the very version it updates."""
    return self.algorithm.require_on_policy

  def __call__(
    self,
    state: TrainState,
    rollouts: Rollouts,
    rewards: jax.Array,
    valid: jax.Array,
  ) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
    """One update.

    Args:
      state: donated, but for the frozen part of its policy, which the new state shares;
        do not use it afterwards.
      rollouts: N rows.
      rewards: [N]; may be NaN where `valid` is False.
      valid: [N] bool; False leaves the row out of baseline, loss and normaliser.

    Returns:
      The new state, metrics as scalars (see `_token_metrics`), and the advantages [N].

    Raises:
      ValueError: rollouts of another policy version in exact on-policy training, or a
        number of prompts that does not split as configured.
    """
    if self.is_on_policy:
      check_on_policy(state, rollouts)
    update, arguments, metrics = self._prepare(state, rollouts, rewards, valid)
    _, frozen, _, weighed, plan = arguments
    state, measured = update(*arguments)
    state = self.join(state, frozen)
    if not plan.tokens:  # nothing to measure, so that nothing was
      measured = {k: v for k, v in measured.items() if not k.startswith("onpolicy/")}
    return state, metrics | measured | _plan_metrics(plan), weighed.advantages

  def memory(self, state, rollouts, rewards, valid) -> Any:
    """The `memory_analysis()` of the program that these arguments need, of one device.

    It compiles the program; a call with the same arguments then compiles nothing.
    """
    update, arguments, _ = self._prepare(state, rollouts, rewards, valid)
    return update.lower(*arguments).compile().memory_analysis()

  def _prepare(self, state, rollouts, rewards, valid):
    """The jitted `_update`, its arrays for this batch, and its groups' metrics."""
    mesh = state.policy.mesh
    state, frozen = self.split(state)
    weigh, update = self._programs or self._jit(state, mesh)
    weighed, metrics = weigh(rollouts, rewards, valid)
    plan = self._plan(mesh, rollouts, jax.device_get(weighed))
    return update, (state, frozen, rollouts, weighed, plan), metrics

  def trace(
    self, state: TrainState, rollouts: Rollouts
  ) -> tuple[jax.stages.Traced, int]:
    """The program of a batch in which every response is of full length.

    Args:
      state, rollouts: arrays, or their shapes and layout (`jax.ShapeDtypeStruct`).

    Returns:
      The program, to be lowered, and how many micro-batches it then has.
    """
    mesh = state.policy.mesh
    state, frozen = self.split(state)
    weigh, update = self._jit(state, mesh)
    (num_rows, width), (num_groups, prompt_width) = (
      rollouts.tokens.shape,
      rollouts.prompts.shape,
    )
    row = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    weighed, _ = jax.eval_shape(weigh, rollouts, row, row)
    full = _Weighed(
      advantages=np.ones(num_rows),
      normalizers=None,
      spans=np.full(num_rows, width),
      prompt_ids=np.arange(num_rows) * num_groups // num_rows,
      prompt_lengths=np.full(num_groups, prompt_width),
    )
    plan = self._plan(mesh, rollouts, full)
    traced = update.trace(state, frozen, rollouts, weighed, plan)
    return traced, int(plan.micro_batches.max())

  def _jit(self, state, mesh):
    # The new state lies where the old one lay and takes its memory: else the next
    # sampling would meet another layout, and compile again.
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    # Every host plans by the same few numbers.
    everywhere = None if mesh is None else sharding.named(mesh)
    self._programs = (
      jax.jit(functools.partial(_weigh, self.algorithm), out_shardings=everywhere),
      jax.jit(
        functools.partial(_update, self.algorithm, self.optimizer),
        donate_argnums=0,
        out_shardings=(layout, None),
      ),
    )
    return self._programs

  def _plan(self, mesh, rollouts, weighed) -> packing.Plan:
    algorithm, num_groups = self.algorithm, rollouts.num_groups
    if num_groups % algorithm.updates_per_batch:
      raise ValueError(
        f"{num_groups} prompts do not split into {algorithm.updates_per_batch} equal"
        " updates per batch; use a multiple (--rollout.prompts-per-step)."
      )
    return packing.plan(
      weighed.spans,
      (weighed.advantages != 0) | (not algorithm.prune),
      weighed.prompt_ids,
      weighed.prompt_lengths,
      prompt_width=rollouts.prompts.shape[1],
      response_width=rollouts.tokens.shape[1],
      share_prompts=algorithm.share_prompts,
      steps=algorithm.updates_per_batch,
      shards=sharding.batch_shards(mesh),
      micro_batch_tokens=algorithm.micro_batch_tokens,
      pack=algorithm.pack,
    )


def check_on_policy(state: TrainState, rollouts: Rollouts) -> None:
  """Refuses rollouts that are no samples of this very policy."""
  sampled, current = int(rollouts.version), int(state.step)
  if sampled != current:
    raise ValueError(
      f"Rollouts of policy version {sampled} were given to version {current}; exact"
      " on-policy training takes only its own. Sample again, or train off-policy"
      " (--algorithm.updates-per-batch 2)."
    )
  if rollouts.filtered:
    raise ValueError(
      "Rollouts that were chosen greedily or with top-k, top-p or min-p were given to"
      " exact on-policy training, and the learner applies no such filter; sample with"
      " temperature alone."
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Weighed:
  """What is known of a batch before any token is computed."""

  advantages: jax.Array  # [N]
  normalizers: jax.Array  # [optimiser steps]
  spans: jax.Array  # [N] columns up to the last trainable token; 0: does not count
  prompt_ids: jax.Array  # [N]
  prompt_lengths: jax.Array  # [G]


def _weigh(
  algorithm: Algorithm, rollouts: Rollouts, rewards: jax.Array, valid: jax.Array
) -> tuple[_Weighed, dict[str, jax.Array]]:
  """Advantages and denominators of the whole batch, and its groups' metrics."""
  # Unscorable rows leave before any statistic is taken.
  valid = valid.astype(bool)
  mask = rollouts.mask & valid[:, None]
  rewards = jnp.where(valid, rewards.astype(jnp.float32), 0.0)
  advantages = algorithm.estimator(
    rewards,
    mask.sum(-1),
    rollouts.prompt_ids,
    num_groups=rollouts.num_groups,
    valid=valid,
  )

  def normalizer(step):
    # One denominator for a whole step: rollouts that are left out count as well.
    if algorithm.normalizer is not None:
      return jnp.float32(algorithm.normalizer)
    own = rollouts.prompt_ids * steps // rollouts.num_groups == step
    return losses.step_normalizer(mask & own[:, None], algorithm.aggregation)

  steps = algorithm.updates_per_batch
  columns = jnp.arange(1, mask.shape[1] + 1)
  weighed = _Weighed(
    advantages=advantages,
    normalizers=jnp.stack([normalizer(step) for step in range(steps)]),
    spans=jnp.where(mask, columns, 0).max(-1),
    prompt_ids=rollouts.prompt_ids,
    prompt_lengths=rollouts.prompt_lengths,
  )
  return weighed, _group_metrics(rewards, advantages, mask, valid, rollouts)


def _update(
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  frozen: Any,
  rollouts: Rollouts,
  weighed: _Weighed,
  plan: packing.Plan,
) -> tuple[TrainState, dict[str, jax.Array]]:
  def whole(trained):
    return algorithm.join(trained, frozen)

  def loss_of(trained, *batch):
    return _loss(whole(trained), *batch)

  def optimiser_step(carry, part):
    policy, opt_state = carry  # of the policy, what is trained
    layout, micro_batches, normalizer = part

    def add_micro_batch(index, totals):
      grads, measured = totals
      own = jax.tree.map(lambda array: array[index], layout)
      batch = _gather(whole(policy).mesh, rollouts, weighed, own)
      (loss, new), new_grads = jax.value_and_grad(loss_of, has_aux=True)(
        policy, batch, algorithm, rollouts.temperature, normalizer
      )
      grads = jax.tree.map(lambda total, new: total + new, grads, new_grads)
      return grads, _merge(measured, {"loss": loss, **new})

    # float32, whatever the parameters are kept in: small parts must not vanish.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), policy)
    nothing = {name: jnp.float32(0.0) for name in ("loss", *_MEASURED)}
    grads, measured = jax.lax.fori_loop(
      0, micro_batches, add_micro_batch, (zeros, nothing)
    )
    with jax.named_scope("optimizer"):
      step, opt_state = optimizer.update(grads, opt_state, policy)
      policy = optax.apply_updates(policy, step)
    measured["grad_norm"] = optax.tree.norm(grads)
    return (policy, opt_state), measured

  (policy, opt_state), measured = jax.lax.scan(
    optimiser_step,
    (state.policy, state.opt_state),
    (plan.layout, plan.micro_batches, weighed.normalizers),
  )
  state = TrainState(policy, opt_state, state.step + 1)
  return state, _token_metrics(measured, rollouts, plan.left_out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Batch:
  """A micro-batch: its rows, and what the loss needs to know of their C targets."""

  prompts: Rows | None  # [E, P], each before R / E rows; None: they are in the rows
  rows: Rows  # [R, W]
  columns: jax.Array | None  # [R, C] of the targets; None: each column is one
  follows_prompt: jax.Array  # [R, C] the first token of a response
  tokens: jax.Array  # [R, C]
  logprobs: jax.Array  # [R, C] of the policy, as the sampler computed them
  sampling_logprobs: jax.Array  # [R, C] of what the tokens were drawn from
  mask: jax.Array  # [R, C]
  advantages: jax.Array  # [R, C]
  segment_ids: jax.Array  # [R, C]


def _gather(mesh, rollouts, weighed, layout: packing.Layout) -> _Batch:
  """Fetches what `layout` points to."""
  ids, offsets, segment_ids = layout.rollouts, layout.offsets, layout.segment_ids
  groups = rollouts.prompt_ids[ids]
  tokens = rollouts.tokens[ids, jnp.maximum(offsets, 0)]
  positions = rollouts.prompt_lengths[groups] + offsets
  if layout.prompts is None:
    prompt_tokens = rollouts.prompts[groups, jnp.minimum(offsets, -1)]  # from the right
    tokens = jnp.where(offsets < 0, prompt_tokens, tokens)
    prompts = None
  else:
    lengths = rollouts.prompt_lengths[layout.prompts]
    prompts = rollouts.prompts[layout.prompts]
    prompts = Rows(prompts, *prompt_columns(lengths, prompts.shape[1]))

  def targets(array):
    if layout.columns is None:
      return array
    return jnp.take_along_axis(array, layout.columns, axis=1)

  ids, offsets, segments = targets(ids), targets(offsets), targets(segment_ids)
  place = ids, jnp.maximum(offsets, 0)
  batch = _Batch(
    prompts=prompts,
    rows=Rows(tokens, positions, segment_ids),
    columns=layout.columns,
    follows_prompt=offsets == 0,
    tokens=targets(tokens),
    logprobs=rollouts.logprobs[place],
    sampling_logprobs=rollouts.sampling_logprobs[place],
    mask=rollouts.mask[place] & (segments > 0) & (offsets >= 0),
    advantages=weighed.advantages[ids],
    segment_ids=segments,
  )
  return jax.tree.map(
    lambda array: sharding.constrain(array, mesh, "batch", None), batch
  )


# Sums over trainable tokens that a micro-batch measures besides its loss (one maximum).
_MEASURED = ("tokens", "entropy", "diff", "diff_max", "kl", "clipped")


def _loss(policy, batch, algorithm, temperature, normalizer):
  """The share of one micro-batch in the step's loss, and what was measured on it."""
  stats = _batch_stats(policy, batch, temperature, algorithm.remat)
  loss, aux = algorithm.objective(
    stats.logprob,
    batch.sampling_logprobs,
    batch.advantages,
    batch.mask,
    aggregation=algorithm.aggregation,
    normalizer=normalizer,
    segment_ids=batch.segment_ids,
  )
  logprob, entropy = jax.lax.stop_gradient((stats.logprob, stats.entropy))
  gap = jnp.where(batch.mask, jnp.abs(logprob - batch.logprobs), 0.0)
  return loss, {
    "tokens": batch.mask.sum(dtype=jnp.float32),
    "entropy": jnp.where(batch.mask, entropy, 0.0).sum(),
    "diff": gap.sum(),
    "diff_max": gap.max(),
    "kl": losses.kl(batch.logprobs, logprob, batch.mask).sum(),
    "clipped": aux["clipped"].sum(dtype=jnp.float32),
  }


def _batch_stats(policy, batch: _Batch, temperature, remat) -> TokenStats:
  """The learner's view of each target: arrays [R, C]."""
  rows, prompts = batch.rows, batch.prompts
  cache = ()
  if prompts:
    with jax.named_scope("prompts"):
      ends, (keys, values) = policy.hidden(
        prompts.tokens, prompts.positions, prompts.segment_ids, remat=remat
      )
    seen = (prompts.segment_ids > 0)[:, None]
    cache = (Keys(keys, values, seen, positions=prompts.positions),)
  with jax.named_scope("forward"):
    hidden, _ = policy.hidden(
      rows.tokens, rows.positions, rows.segment_ids, cache=cache, remat=remat
    )
    # A token is predicted one column before it, or by the end of its prompt.
    if prompts:
      end = jnp.repeat(ends[:, -1:], hidden.shape[0] // ends.shape[0], axis=0)
      hidden = jnp.concatenate([end, hidden[:, :-1]], axis=1)
      hidden = jnp.where(batch.follows_prompt[..., None], end, hidden)
    else:
      before = jnp.maximum(batch.columns - 1, 0)
      hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)
  return _logprobs(policy, hidden, batch.tokens, temperature)


def token_stats(policy, rows: Rows, tokens, temperature) -> TokenStats:
  """The learner's view of each response token, one response a row: arrays [n, T]."""
  with jax.named_scope("forward"):
    hidden, _ = policy.hidden(rows.tokens, rows.positions, rows.segment_ids)
  # A column predicts the next one, and responses start at column P.
  start = rows.tokens.shape[1] - tokens.shape[1] - 1
  return _logprobs(policy, hidden[:, start:-1], tokens, temperature)


def _logprobs(policy, hidden, tokens, temperature) -> TokenStats:
  with jax.named_scope("logprobs"):
    return linear_logprobs(
      hidden,
      policy.unembedding,
      tokens,
      temperature=temperature,
      vocab_shards=1 if policy.mesh is None else policy.mesh.shape["tensor"],
    )


@jax.jit
def response_logprobs(policy: Any, rollouts: Rollouts) -> jax.Array:
  """log pi(token) of the rollouts under `policy`, at their temperature: [N, T]."""
  stats = token_stats(policy, rows(rollouts), rollouts.tokens, rollouts.temperature)
  return jnp.where(rollouts.mask, stats.logprob, 0.0)


@functools.partial(jax.jit, static_argnames="micro_batch_tokens")
def kl_to_start(
  start_policy: Any,
  rollouts: Rollouts,
  indices: jax.Array,
  *,
  micro_batch_tokens: int = 0,
) -> jax.Array:
  """Mean k1 estimate of KL(policy || start) per response token, in nats.

  k1, not k3: far from the start, a token that the policy draws once in a while and the
  start preferred weighs `start / policy` in k3, and one such token hides all others.

  Args:
    start_policy: the policy before training.
    rollouts: the policy's, with the log-probs its sampler recorded.
    indices: [n] the rows it is measured on, as many for each shard of the batch.
    micro_batch_tokens: computed at a time at most (one row a shard at least), over all
      devices, padding included; 0: all in one.
  """
  shards = sharding.batch_shards(start_policy.mesh)
  row_tokens = rollouts.prompts.shape[1] + rollouts.tokens.shape[1]
  per_shard = most = len(indices) // shards
  if micro_batch_tokens:
    most = max(micro_batch_tokens // (row_tokens * shards), 1)
  parts = next(
    n for n in range(1, per_shard + 1) if per_shard / n <= most and per_shard % n == 0
  )

  def logprobs_of(own):
    return response_logprobs(start_policy, select(rollouts, own))

  reference = jax.lax.map(logprobs_of, indices.reshape(parts, -1))
  rollouts = select(rollouts, indices)
  reference = reference.reshape(rollouts.tokens.shape)
  per_token = losses.kl(rollouts.logprobs, reference, rollouts.mask, estimator="k1")
  return losses.aggregate(per_token, rollouts.mask, "token_mean")


def _token_metrics(measured, rollouts, left_out):
  """Metrics of the whole batch, from sums [optimiser steps] over what was computed.

  Losses and norms are means over optimiser steps. `onpolicy/*` is of the computed
  tokens. `policy/entropy` is exact for these; of a rollout that is left out it takes
  -log pi of what was drawn, as the sampler recorded it: unbiased, from one sample.
  """
  tokens = jnp.maximum(measured["tokens"].sum(), 1.0)
  rest = rollouts.mask & left_out[:, None]
  entropy = measured["entropy"].sum() - jnp.where(rest, rollouts.logprobs, 0.0).sum()
  all_tokens = jnp.maximum(measured["tokens"].sum() + rest.sum(), 1.0)
  return {
    "loss": measured["loss"].mean(),
    "grad_norm": measured["grad_norm"].mean(),
    "policy/entropy": entropy / all_tokens,
    "onpolicy/logprob_diff_max": measured["diff_max"].max(),
    "onpolicy/logprob_diff_mean": measured["diff"].sum() / tokens,
    "onpolicy/kl": measured["kl"].sum() / tokens,
    "onpolicy/clip_fraction": measured["clipped"].sum() / tokens,
  }


def _plan_metrics(plan: packing.Plan) -> dict[str, float]:
  """What was computed: tokens, padding and prompts included, and the share of them
  that carry a gradient; and the share of rollouts that were left out."""
  if not plan.tokens:
    return {"update/tokens": 0}
  return {
    "update/tokens": plan.tokens,
    "update/packing_efficiency": plan.tokens_with_gradient / plan.tokens,
    "update/skipped_rollouts_fraction": plan.pruned / plan.counted,
  }


def _group_metrics(rewards, advantages, mask, valid, rollouts):
  lengths, ids, num_groups = mask.sum(-1), rollouts.prompt_ids, rollouts.num_groups

  def per_group(values):
    return jax.ops.segment_sum(values.astype(jnp.float32), ids, num_groups)

  counted = valid & (lengths > 0)
  sizes = per_group(counted)
  groups = jnp.maximum((sizes > 0).sum(), 1)
  signal = per_group(jnp.abs(advantages)) > 0
  group = dict(num_groups=num_groups, valid=valid)
  # (r - mean) - (r - b) = b - mean
  difference = adv.mean(rewards, lengths, ids, **group) - adv.opo(
    rewards, lengths, ids, **group
  )
  weighted_sums = per_group(advantages * lengths) / jnp.maximum(per_group(lengths), 1)
  return {
    "baseline/opo_minus_mean": difference.sum() / jnp.maximum(counted.sum(), 1),
    "groups/zero_advantage_fraction": ((sizes > 0) & ~signal).sum() / groups,
    "groups/single_sample_fraction": (sizes == 1).sum() / groups,
    "advantages/length_weighted_mean_max": jnp.abs(weighted_sums).max(),
  }


def _merge(totals, new):
  return {
    name: jnp.maximum(totals[name], new[name])
    if name.endswith("_max")
    else totals[name] + new[name]
    for name in totals
  }

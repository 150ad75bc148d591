"""AdamW and its learning-rate schedules, from plain values."""

import jax
import jax.numpy as jnp
import optax


def learning_rate_schedule(
  schedule: str, peak: float, *, warmup_steps: int, total_steps: int
) -> optax.Schedule:
  """Linear warm-up to `peak`, then constant, or a decay to 0 at the last step.

  Args:
    schedule: `constant`, `cosine` or `linear`: what follows the warm-up.
    peak: the largest learning rate.
    warmup_steps: optimiser steps of the warm-up; 0 starts at `peak`.
    total_steps: optimiser steps of the run, warm-up included.

  Returns:
    Optimiser step, from 0 -> learning rate.

  Raises:
    KeyError: an unknown schedule.

  >>> rate = learning_rate_schedule("linear", 1.0, warmup_steps=3, total_steps=7)
  >>> [float(rate(step)) for step in range(8)]
  [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]
  """
  decay_steps = max(total_steps - warmup_steps, 1)
  after_warmup = {
    "constant": optax.constant_schedule(peak),
    "cosine": optax.cosine_decay_schedule(peak, decay_steps),
    "linear": optax.linear_schedule(peak, 0.0, decay_steps),
  }[schedule]
  if not warmup_steps:
    return after_warmup
  # The first step already moves the policy: 1 / (warm-up + 1) of the peak, not 0.
  rise = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
  return optax.join_schedules([rise, after_warmup], [warmup_steps])


def sft_schedule(peak: float, total_steps: int) -> optax.Schedule:
  """Linear warm-up over a tenth of the steps, then a cosine to 0.

  For the supervised phases: SFT and the training of a reward model.
  """
  steps = max(total_steps, 1)
  return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)


def adamw(
  schedule: optax.Schedule,
  *,
  b1: float,
  b2: float,
  epsilon: float,
  weight_decay: float,
  max_grad_norm: float,
  moment_dtype: str = "float32",
  offload: bool = False,
) -> optax.GradientTransformation:
  """AdamW behind a clip of the global gradient norm, computed in float32.

  Args:
    schedule: optimiser step -> learning rate.
    b1, b2: decay of the first and the second moment.
    epsilon: added to the root of the second moment.
    weight_decay: decoupled from the gradient.
    max_grad_norm: larger gradients are scaled down to this global norm.
    moment_dtype: of the first moment. The second stays float32: with a b2 near 1 its
      increments, (1 - b2) g^2, would be rounded away in bfloat16.
    offload: the moments lie in the hosts' memory and are copied to the devices only
      for the update.
  """
  adamw = optax.chain(
    optax.clip_by_global_norm(max_grad_norm),
    optax.adamw(
      schedule,
      b1=b1,
      b2=b2,
      eps=epsilon,
      weight_decay=weight_decay,
      mu_dtype=moment_dtype,
    ),
  )

  # Whatever dtype the parameters have, moments and step are computed in float32; Optax
  # would take the dtype of the parameters for the second moment.
  def init(policy):
    return adamw.init(_in_float32(policy))

  def update(gradients, state, policy):
    return adamw.update(_in_float32(gradients), state, _in_float32(policy))

  def update_offloaded(gradients, state, policy):
    state = jax.device_put(state, jax.memory.Space.Device)
    step, state = update(gradients, state, policy)
    # Scalars (the step count) stay on the device: `sharding.on_host` leaves them there.
    on_host = jax.tree.map(
      lambda leaf: jax.device_put(leaf, jax.memory.Space.Host) if leaf.ndim else leaf,
      state,
    )
    return step, on_host

  return optax.GradientTransformation(init, update_offloaded if offload else update)


def _in_float32(tree):
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

"""Advantages: what each response is worth beside the others of its group.

Every estimator is a pure function of `rewards[N]`, `lengths[N]` and `group_ids[N]`,
jit-, grad- and shard-safe; each baseline is one segment reduction over stacked columns.
The idea of the paper is `weighted_baseline` with the lengths as weights.

Conventions that hold for all of them:
- `lengths` counts trainable response tokens: the end token counts; prompt, padding and
  tool tokens do not.
- A row with `valid=False` (an unscorable answer) or of length 0 gets advantage 0 and
  moves nobody else's baseline. Its reward may be NaN.
- A group without weight, and a group of one, gets advantage 0, never NaN.
  (For a group of one this is LMOps' choice; verl returns the reward itself.)
- Arithmetic is float32, whatever comes in. A difference to the baseline that is within
  float32 rounding of zero *is* zero, so that a group of equal rewards gives exactly 0.
"""

from typing import Protocol

import jax
import jax.numpy as jnp


class Estimator(Protocol):
  """`(rewards[N], lengths[N], group_ids[N], num_groups, valid[N]) -> [N]`."""

  def __call__(
    self,
    rewards: jax.Array,
    lengths: jax.Array,
    group_ids: jax.Array,
    *,
    num_groups: int,
    valid: jax.Array | None = None,
  ) -> jax.Array: ...


def weighted_baseline(
  rewards: jax.Array,
  weights: jax.Array,
  group_ids: jax.Array,
  *,
  num_groups: int,
  valid: jax.Array | None = None,
  leave_one_out: bool = False,
) -> jax.Array:
  """The weighted mean reward of each row's group.

      b_g = sum_i w_i r_i / sum_i w_i          over the rows i of group g

  With `w = ||grad log pi(y)||^2` this is the baseline of least variance; with
  `w = length` it is OPO's (https://arxiv.org/abs/2505.23585), with `w = 1` the mean.

  Args:
    rewards: [N].
    weights: [N], not negative; a row of weight 0 does not count.
    group_ids: [N] integers in `[0, num_groups)`, in any order.
    num_groups: G, static.
    valid: [N] bool; rows that are False do not count.
    leave_one_out: leave row i out of its own baseline, which makes it unbiased.

  Returns:
    [N] float32. Where a group has no weight (left), the row's own reward: its
    advantage is then 0.

  Raises:
    ValueError: shapes that differ.

  >>> import jax.numpy as jnp
  >>> weighted_baseline(
  ...   jnp.array([1.0, 0.0]), jnp.array([30, 10]), jnp.array([0, 0]), num_groups=1
  ... ).tolist()
  [0.75, 0.75]
  """
  rewards, weights, valid = _prepare(rewards, weights, group_ids, valid)
  centred = _subtract_baseline(rewards, weights, group_ids, num_groups, leave_one_out)
  return rewards - centred


def reinforce(rewards, lengths, group_ids, *, num_groups, valid=None):
  """`A = r`: no baseline. Williams 1992, https://doi.org/10.1007/BF00992696."""
  rewards, _, valid = _prepare(rewards, lengths, group_ids, valid)
  return jnp.where(valid, rewards, 0.0)


def mean(rewards, lengths, group_ids, *, num_groups, valid=None):
  """`A = r - mean_g(r)`. Dr. GRPO, https://arxiv.org/abs/2503.20783."""
  rewards, ones, valid = _prepare(rewards, lengths, group_ids, valid, weights="ones")
  centred = _subtract_baseline(rewards, ones, group_ids, num_groups)
  return jnp.where(valid, centred, 0.0)


def rloo(rewards, lengths, group_ids, *, num_groups, valid=None):
  """`A = r - mean of the others = K/(K-1) (r - mean_g(r))`.

  Leave-one-out REINFORCE, https://arxiv.org/abs/2402.14740.
  """
  rewards, ones, valid = _prepare(rewards, lengths, group_ids, valid, weights="ones")
  centred = _subtract_baseline(rewards, ones, group_ids, num_groups, leave_one_out=True)
  return jnp.where(valid, centred, 0.0)


def grpo(rewards, lengths, group_ids, *, num_groups, valid=None, epsilon=1e-6):
  """`A = (r - mean_g(r)) / (std_g(r) + epsilon)`, std with K - 1 in the denominator.

  GRPO, https://arxiv.org/abs/2402.03300.
  """
  rewards, ones, valid = _prepare(rewards, lengths, group_ids, valid, weights="ones")
  centred = _subtract_baseline(rewards, ones, group_ids, num_groups)
  return _divide_by_std(centred, ones, group_ids, num_groups, valid, epsilon)


def reinforce_pp(rewards, lengths, group_ids, *, num_groups, valid=None, epsilon=1e-6):
  """`A = (r - mean of the batch) / (std of the batch + epsilon)`.

  REINFORCE++, https://arxiv.org/abs/2501.03262.
  """
  one_group = jnp.zeros_like(group_ids)
  return grpo(rewards, lengths, one_group, num_groups=1, valid=valid, epsilon=epsilon)


def maxrl(rewards, lengths, group_ids, *, num_groups, valid=None, epsilon=1e-6):
  """`A = (r - mean_g(r)) / (mean_g(r) + epsilon)`, for rewards that are not negative.

  MaxRL, https://arxiv.org/abs/2602.02710.
  """
  rewards, ones, valid = _prepare(rewards, lengths, group_ids, valid, weights="ones")
  centred = _subtract_baseline(rewards, ones, group_ids, num_groups)
  return jnp.where(valid, centred / (rewards - centred + epsilon), 0.0)


def opo(rewards, lengths, group_ids, *, num_groups, valid=None):
  """OPO: `A_i = r_i - b_g` with `b_g = sum_j l_j r_j / sum_j l_j`.

  The baseline of least gradient variance where a response's squared gradient norm
  grows with its length. `sum_i l_i A_i = 0` in every group.
  https://arxiv.org/abs/2505.23585, equation 8.

  Args:
    rewards: [N].
    lengths: [N] trainable response tokens, the end token included.
    group_ids: [N] integers in `[0, num_groups)`: which prompt a row answers.
    num_groups: G, static.
    valid: [N] bool, optional.

  Returns:
    [N] float32; see the module's conventions for empty and single-row groups.

  >>> import jax.numpy as jnp
  >>> rewards, lengths = jnp.array([1.0, 0.0, 0.0]), jnp.array([20, 10, 10])
  >>> opo(rewards, lengths, jnp.zeros(3, int), num_groups=1).tolist()
  [0.5, -0.5, -0.5]
  """
  rewards, lengths, valid = _prepare(rewards, lengths, group_ids, valid)
  centred = _subtract_baseline(rewards, lengths, group_ids, num_groups)
  return jnp.where(valid, centred, 0.0)


def opo_loo(rewards, lengths, group_ids, *, num_groups, valid=None):
  """OPO without the row itself in its baseline: unbiased.

  `A_i = r_i - sum_{j!=i} l_j r_j / sum_{j!=i} l_j`. Plain OPO is
  `(1 - l_i / sum_j l_j)` times this, so it shrinks long answers more.
  """
  rewards, lengths, valid = _prepare(rewards, lengths, group_ids, valid)
  centred = _subtract_baseline(
    rewards, lengths, group_ids, num_groups, leave_one_out=True
  )
  return jnp.where(valid, centred, 0.0)


def opo_batch(rewards, lengths, group_ids, *, num_groups, valid=None):
  """OPO with one baseline over the whole batch (the paper's REINFORCE++ variant)."""
  one_group = jnp.zeros_like(group_ids)
  return opo(rewards, lengths, one_group, num_groups=1, valid=valid)


ESTIMATORS: dict[str, Estimator] = {
  "reinforce": reinforce,
  "mean": mean,
  "grpo": grpo,
  "rloo": rloo,
  "reinforce_pp": reinforce_pp,
  "maxrl": maxrl,
  "opo": opo,
  "opo_loo": opo_loo,
  "opo_batch": opo_batch,
}


# A sum of K float32 products is off by a few units in the last place; 32 of them cover
# groups far larger than anybody samples and stay far below any reward that means
# something (4e-6 of the reward's size).
_ROUNDING = 32 * float(jnp.finfo(jnp.float32).eps)


def _prepare(rewards, lengths, group_ids, valid, weights="lengths"):
  """float32 rewards and weights, zero where a row does not count, and which count."""
  shapes = {"rewards": rewards, "lengths": lengths, "group_ids": group_ids}
  if valid is not None:
    shapes["valid"] = valid
  shapes = {name: jnp.shape(array) for name, array in shapes.items()}
  if len(set(shapes.values())) != 1 or len(shapes["rewards"]) != 1:
    raise ValueError(f"Expected arrays of one shape [N], got {shapes}.")
  counts = jnp.asarray(lengths) > 0
  if valid is not None:
    counts &= jnp.asarray(valid, bool)
  # `where`, not `* 0`: the reward of an unscorable row may be NaN.
  rewards = jnp.where(counts, jnp.asarray(rewards, jnp.float32), 0.0)
  if weights == "ones":
    return rewards, counts.astype(jnp.float32), counts
  return rewards, jnp.where(counts, jnp.asarray(lengths, jnp.float32), 0.0), counts


def _subtract_baseline(rewards, weights, group_ids, num_groups, leave_one_out=False):
  """`r - b` with b the weighted mean of the group: one segment reduction."""
  columns = jnp.stack([weights, weights * rewards, weights * jnp.abs(rewards)], -1)
  sums = jax.ops.segment_sum(columns, group_ids, num_segments=num_groups)
  total, weighted, magnitude = jnp.moveaxis(sums[group_ids], -1, 0)
  has_weight = total > 0
  total = jnp.where(has_weight, total, 1.0)
  centred = rewards - jnp.where(has_weight, weighted / total, rewards)
  rounding = _ROUNDING * jnp.maximum(magnitude / total, jnp.abs(rewards))
  centred = jnp.where(jnp.abs(centred) <= rounding, 0.0, centred)
  if leave_one_out:
    # r - b_{-i} = (r - b) L / (L - l): no difference of two large sums.
    others = total - weights
    has_others = others > 0
    centred *= jnp.where(has_others, total / jnp.where(has_others, others, 1.0), 0.0)
  return centred


def _divide_by_std(centred, ones, group_ids, num_groups, valid, epsilon):
  columns = jnp.stack([ones, jnp.where(valid, centred, 0.0) ** 2], -1)
  sums = jax.ops.segment_sum(columns, group_ids, num_segments=num_groups)
  count, squares = jnp.moveaxis(sums[group_ids], -1, 0)
  std = jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0))
  return jnp.where(valid, centred / (std + epsilon), 0.0)

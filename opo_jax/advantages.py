"""Advantage estimators: rewards, lengths and groups -> the advantage of each response.

Every estimator is a pure function of `rewards[N]`, `lengths[N]` and `group_ids[N]`,
jit-, grad- and shard-safe; each baseline is one segment reduction over stacked columns.
OPO is `weighted_baseline` with the lengths as weights.

Conventions of all estimators:
- `lengths` counts trainable response tokens: the end token counts; prompt, padding and
  tool tokens do not.
- `group_ids` may have any order, and groups may be ragged or empty. An id outside of
  `[0, num_groups)` raises an error if it is concrete; under `jit` the row counts as not
  valid.
- A row with `valid=False` (an unscorable response) or of length 0 gets advantage 0 and
  does not affect any baseline. Its reward may be NaN; a NaN reward of a row that counts
  raises an error if it is concrete.
- A group without weight, and a group of one, gets advantage 0, never NaN. (For a group
  of one this follows LMOps; verl returns the reward itself.)
- Arithmetic is float32 for any input dtype. A difference to the baseline within float32
  rounding of zero is set to zero, so that a group of equal rewards gives exactly 0.
- Rows may be sharded: devices exchange the sums of groups (`[G, columns]`), never rows.
  Over a mesh with explicit axes, wrap the call in `jax.sharding.auto_axes`.
"""

import difflib
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np


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
    weights: [N], not negative, of any scale whose sums fit float32; a row of weight 0
      does not count. For example `length ** (2 * alpha)`, logit energy summed over
      the tokens, or measured squared gradient norms.
    group_ids: [N] integers in `[0, num_groups)`, in any order.
    num_groups: G, static.
    valid: [N] bool; rows that are False do not count.
    leave_one_out: exclude row i from its own baseline, which makes it unbiased. If a
      row outweighs its group by more than 1e5, rounding loses the others, and the row's
      baseline is its own reward.

  Returns:
    [N] float32. Where a group has no (other) weight, the row's own reward, so that its
    advantage is 0; 0 where the row is not valid or its reward not finite.

  Raises:
    ValueError: shapes that differ, ids that are not integers; in concrete arrays, also
      an id out of range, a weight that is negative or not finite, and a reward that is
      not finite in a row that counts.

  >>> import jax.numpy as jnp
  >>> weighted_baseline(
  ...   jnp.array([1.0, 0.0]), jnp.array([30, 10]), jnp.array([0, 0]), num_groups=1
  ... ).tolist()
  [0.75, 0.75]
  """
  own = jnp.asarray(rewards, jnp.float32)
  rewards, weights, group_ids, _ = _prepare(
    rewards, weights, group_ids, num_groups, valid, weights_name="weights"
  )
  centred, has_weight = _subtract_baseline(
    rewards, weights, group_ids, num_groups, leave_one_out
  )
  # Not `rewards`, which is 0 in every row that does not count, including weight 0.
  readable = jnp.isfinite(own) & (True if valid is None else jnp.asarray(valid, bool))
  return jnp.where(has_weight, rewards - centred, jnp.where(readable, own, 0.0))


def reinforce(rewards, lengths, group_ids, *, num_groups, valid=None):
  """`A = r`: no baseline. Williams 1992, https://doi.org/10.1007/BF00992696.

  >>> import jax.numpy as jnp
  >>> rewards, lengths = jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.array([20, 10, 5, 5])
  >>> reinforce(rewards, lengths, jnp.zeros(4, int), num_groups=1).tolist()
  [1.0, 0.0, 0.0, 0.0]
  """
  rewards, *_ = _prepare(rewards, lengths, group_ids, num_groups, valid)
  return rewards


def mean(rewards, lengths, group_ids, *, num_groups, valid=None):
  """`A = r - mean_g(r)`. Dr. GRPO, https://arxiv.org/abs/2503.20783.

  >>> import jax.numpy as jnp
  >>> rewards, lengths = jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.array([20, 10, 5, 5])
  >>> mean(rewards, lengths, jnp.zeros(4, int), num_groups=1).tolist()
  [0.75, -0.25, -0.25, -0.25]
  """
  rewards, ones, group_ids, valid = _prepare(
    rewards, lengths, group_ids, num_groups, valid, alpha=0.0
  )
  centred, _ = _subtract_baseline(rewards, ones, group_ids, num_groups)
  return jnp.where(valid, centred, 0.0)


def rloo(rewards, lengths, group_ids, *, num_groups, valid=None):
  """`A = r - mean of the others = K/(K-1) (r - mean_g(r))`.

  Leave-one-out REINFORCE, https://arxiv.org/abs/2402.14740.

  >>> import jax.numpy as jnp
  >>> rewards, lengths = jnp.array([1.0, 1.0, 0.0]), jnp.array([20, 10, 5])
  >>> advantages = rloo(rewards, lengths, jnp.zeros(3, int), num_groups=1)
  >>> [round(a, 3) for a in advantages.tolist()]
  [0.5, 0.5, -1.0]
  """
  rewards, ones, group_ids, valid = _prepare(
    rewards, lengths, group_ids, num_groups, valid, alpha=0.0
  )
  centred, _ = _subtract_baseline(
    rewards, ones, group_ids, num_groups, leave_one_out=True
  )
  return jnp.where(valid, centred, 0.0)


def grpo(rewards, lengths, group_ids, *, num_groups, valid=None, epsilon=1e-6):
  """`A = (r - mean_g(r)) / (std_g(r) + epsilon)`, std with K - 1 in the denominator.

  GRPO, https://arxiv.org/abs/2402.03300.

  >>> import jax.numpy as jnp
  >>> rewards, lengths = jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.array([20, 10, 5, 5])
  >>> advantages = grpo(rewards, lengths, jnp.zeros(4, int), num_groups=1)
  >>> [round(a, 3) for a in advantages.tolist()]
  [1.5, -0.5, -0.5, -0.5]
  """
  rewards, ones, group_ids, valid = _prepare(
    rewards, lengths, group_ids, num_groups, valid, alpha=0.0
  )
  centred, _ = _subtract_baseline(rewards, ones, group_ids, num_groups)
  return _divide_by_std(centred, ones, group_ids, num_groups, valid, epsilon)


def reinforce_pp(rewards, lengths, group_ids, *, num_groups, valid=None, epsilon=1e-6):
  """`A = (r - mean of the batch) / (std of the batch + epsilon)`.

  REINFORCE++, https://arxiv.org/abs/2501.03262.

  >>> import jax.numpy as jnp
  >>> rewards, lengths = jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.array([20, 10, 5, 5])
  >>> advantages = reinforce_pp(rewards, lengths, jnp.arange(4), num_groups=4)
  >>> [round(a, 3) for a in advantages.tolist()]
  [1.5, -0.5, -0.5, -0.5]
  """
  rewards, ones, group_ids, valid = _prepare(
    rewards, lengths, group_ids, num_groups, valid, alpha=0.0
  )
  one_group = jnp.zeros_like(group_ids)
  centred, _ = _subtract_baseline(rewards, ones, one_group, 1)
  return _divide_by_std(centred, ones, one_group, 1, valid, epsilon)


def maxrl(rewards, lengths, group_ids, *, num_groups, valid=None, epsilon=1e-6):
  """`A = (r - mean_g(r)) / (mean_g(r) + epsilon)`, for rewards that are not negative.

  MaxRL, https://arxiv.org/abs/2602.02710.

  >>> import jax.numpy as jnp
  >>> rewards, lengths = jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.array([20, 10, 5, 5])
  >>> advantages = maxrl(rewards, lengths, jnp.zeros(4, int), num_groups=1)
  >>> [round(a, 3) for a in advantages.tolist()]
  [3.0, -1.0, -1.0, -1.0]
  """
  rewards, ones, group_ids, valid = _prepare(
    rewards, lengths, group_ids, num_groups, valid, alpha=0.0
  )
  centred, _ = _subtract_baseline(rewards, ones, group_ids, num_groups)
  return jnp.where(valid, centred / (rewards - centred + epsilon), 0.0)


def opo(rewards, lengths, group_ids, *, num_groups, valid=None, alpha=0.5):
  """OPO: `A_i = r_i - b_g` with `b_g = sum_j l_j r_j / sum_j l_j`.

  The baseline of least gradient variance if the squared gradient norm of a response is
  proportional to its length. `sum_i l_i A_i = 0` in every group.
  https://arxiv.org/abs/2505.23585, equation 8.

  If the gradient norm grows as `l ** alpha` instead, the weights are
  `l ** (2 * alpha)`: 0.5 is OPO, 0 the mean of the group. Fit alpha as the slope of
  `log ||grad log pi(y)||` on `log l`. A loss that divides each response by its length
  (`sequence_mean_token_mean`) divides its gradient as well: subtract 1 from alpha, so
  that OPO's assumption implies weights `1 / l`, alpha -0.5.

  Args:
    rewards: [N].
    lengths: [N] trainable response tokens, the end token included.
    group_ids: [N] integers in `[0, num_groups)`: the prompt of each row.
    num_groups: G, static.
    valid: [N] bool, optional.
    alpha: number or scalar array.

  Returns:
    [N] float32; see the module's conventions for empty groups and groups of one.

  Raises:
    ValueError: see `weighted_baseline`.

  >>> import jax.numpy as jnp
  >>> rewards, lengths = jnp.array([1.0, 0.0, 0.0]), jnp.array([20, 10, 10])
  >>> opo(rewards, lengths, jnp.zeros(3, int), num_groups=1).tolist()
  [0.5, -0.5, -0.5]
  """
  rewards, weights, group_ids, valid = _prepare(
    rewards, lengths, group_ids, num_groups, valid, alpha=alpha
  )
  centred, _ = _subtract_baseline(rewards, weights, group_ids, num_groups)
  return jnp.where(valid, centred, 0.0)


def opo_loo(rewards, lengths, group_ids, *, num_groups, valid=None, alpha=0.5):
  """Leave-one-out OPO: unbiased.

  `A_i = r_i - sum_{j!=i} l_j r_j / sum_{j!=i} l_j`. Plain OPO is
  `(1 - l_i / sum_j l_j)` times this, so it shrinks long responses more. `alpha` as in
  `opo`; 0 is RLOO.

  >>> import jax.numpy as jnp
  >>> rewards, lengths = jnp.array([1.0, 1.0, 0.0]), jnp.array([10, 20, 20])
  >>> advantages = opo_loo(rewards, lengths, jnp.zeros(3, int), num_groups=1)
  >>> [round(a, 3) for a in advantages.tolist()]
  [0.5, 0.667, -1.0]
  """
  rewards, weights, group_ids, valid = _prepare(
    rewards, lengths, group_ids, num_groups, valid, alpha=alpha
  )
  centred, _ = _subtract_baseline(
    rewards, weights, group_ids, num_groups, leave_one_out=True
  )
  return jnp.where(valid, centred, 0.0)


def opo_batch(rewards, lengths, group_ids, *, num_groups, valid=None, alpha=0.5):
  """OPO with one baseline over the whole batch (the paper's REINFORCE++ variant).

  `alpha` as in `opo`.

  >>> import jax.numpy as jnp
  >>> rewards, lengths = jnp.array([1.0, 0.0, 0.0, 0.0]), jnp.array([20, 10, 5, 5])
  >>> opo_batch(rewards, lengths, jnp.arange(4), num_groups=4).tolist()
  [0.5, -0.5, -0.5, -0.5]
  """
  rewards, weights, group_ids, valid = _prepare(
    rewards, lengths, group_ids, num_groups, valid, alpha=alpha
  )
  one_group = jnp.zeros_like(group_ids)
  centred, _ = _subtract_baseline(rewards, weights, one_group, 1)
  return jnp.where(valid, centred, 0.0)


def optimal_token(
  rewards: jax.Array,
  energy: jax.Array,
  mask: jax.Array,
  group_ids: jax.Array,
  *,
  num_groups: int,
  valid: jax.Array | None = None,
) -> jax.Array:
  """The optimal token baseline: a baseline for every position of a group.

      W_it = sum_{j<=t} w_ij                 cumulative energy of row i up to token t
      B_t  = sum_i W_it r_i / sum_i W_it     over the rows i alive at t
      A_it = r_i - B_t

  The reward comes at the end, so the return from every token is `r_i`. A row is alive
  up to its last trainable token; in a hole of its mask (tool output) it keeps its
  weight:

      mask of row 0      x x . . x      alive   x x x x x
      mask of row 1      x x x . .      alive   x x x . .      B_3, B_4 = r_0

  `sum_i W_it A_it = 0` over the rows alive at t. With equal energy per token and rows
  of equal length, B_t is the mean of the group. https://arxiv.org/abs/2602.07078

  The last row alive is its own baseline: its tail gets advantage 0, like a group of
  one. (verl has an option that gives such a tail the reward itself.)

  Args:
    rewards: [N], one for the whole response.
    energy: [N, T] squared norm of each token's score, not negative; `logprobs` gives
      the logit energy `1 - 2 pi(y) + sum_v pi(v)^2`. Not read where `mask` is False.
    mask: [N, T] bool, trainable tokens, anywhere in the row.
    group_ids: [N] integers in `[0, num_groups)`, in any order.
    num_groups: G, static.
    valid: [N] bool; rows that are False do not count. Their reward may be NaN.

  Returns:
    [N, T] float32, for a loss with per-token advantages; 0 where `mask` is False, in
    rows that do not count, and at positions where the rows alive have no energy.

  Raises:
    ValueError: shapes that do not fit, ids that are not integers; in concrete arrays,
      also an id out of range, and a reward or energy that counts and is not finite.

  >>> import jax.numpy as jnp
  >>> advantages = optimal_token(
  ...   jnp.array([1.0, 0.0]),
  ...   jnp.array([[3.0, 1.0, 2.0], [1.0, 3.0, 0.0]]),
  ...   jnp.array([[True, True, True], [True, True, False]]),
  ...   jnp.array([0, 0]),
  ...   num_groups=1,
  ... )
  >>> advantages.tolist()  # B_t is 3/4, 4/8, and row 0's own reward
  [[0.25, 0.5, 0.0], [-0.75, -0.5, 0.0]]
  """
  shapes = {"rewards": rewards, "energy": energy, "mask": mask}
  shapes = {name: jnp.shape(array) for name, array in shapes.items()}
  if len(shapes["mask"]) != 2 or shapes["energy"] != shapes["mask"]:
    raise ValueError(f"Expected energy and mask of one shape [N, T], got {shapes}.")
  if shapes["rewards"] != shapes["mask"][:1]:
    raise ValueError(f"Expected rewards [N] for a mask [N, T], got {shapes}.")
  mask = jnp.asarray(mask, bool)
  rewards, _, group_ids, counts = _prepare(
    rewards, mask.sum(-1), group_ids, num_groups, valid
  )
  mask &= counts[:, None]
  _check_energy(energy, mask)
  # Rounding can make a computed squared norm negative.
  energy = jnp.maximum(jnp.asarray(energy, jnp.float32), 0.0)
  # W_it; and alive: a trainable token at t or later, the reversed running maximum.
  spent = jnp.cumsum(jnp.where(mask, energy, 0.0), axis=1)
  alive = jax.lax.cummax(mask.astype(jnp.int32), axis=1, reverse=True) > 0
  centred, _ = _subtract_baseline(
    jnp.broadcast_to(rewards[:, None], mask.shape),
    jnp.where(alive, spent, 0.0),
    group_ids,
    num_groups,
  )
  return jnp.where(mask, centred, 0.0)


class _Estimators(dict[str, Estimator]):
  def __missing__(self, name):
    near = difflib.get_close_matches(str(name), self, n=1)
    hint = f"did you mean {near[0]}? There" if near else "there"
    raise ValueError(f"Unknown estimator {name!r}; {hint} are {', '.join(self)}.")


# An unknown name raises a ValueError that lists these.
ESTIMATORS: dict[str, Estimator] = _Estimators(
  {
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
)


# The error of a sum of K float32 products is a few units in the last place. 32 units
# cover groups far larger than any in use, and are 4e-6 of the reward's size: far below
# a meaningful difference.
_ROUNDING = 32 * float(jnp.finfo(jnp.float32).eps)


def _prepare(
  rewards, weights, group_ids, num_groups, valid, *, alpha=0.5, weights_name="lengths"
):
  """Returns float32 rewards, `weights ** (2 alpha)`, int32 ids, and which rows count.

  Rewards and weights are 0 in rows that do not count.
  """
  arrays = {"rewards": rewards, weights_name: weights, "group_ids": group_ids}
  if valid is not None:
    arrays["valid"] = valid
  arrays = {k: x if hasattr(x, "dtype") else jnp.asarray(x) for k, x in arrays.items()}
  shapes = {name: jnp.shape(array) for name, array in arrays.items()}
  if len(set(shapes.values())) != 1 or len(shapes["rewards"]) != 1:
    raise ValueError(f"Expected arrays of one shape [N], got {shapes}.")
  rewards, weights, group_ids, *_ = arrays.values()
  if not jnp.issubdtype(group_ids.dtype, jnp.integer):
    raise ValueError(f"Expected group_ids of an integer type, got {group_ids.dtype}.")
  valid = arrays.get("valid", np.ones(shapes["rewards"], bool))
  _check_values(rewards, weights, group_ids, num_groups, valid)
  group_ids = jnp.asarray(group_ids).astype(jnp.int32)
  in_range = (group_ids >= 0) & (group_ids < num_groups)
  weights = jnp.asarray(weights, jnp.float32)
  counts = jnp.asarray(valid, bool) & in_range & (weights > 0)
  # `where`, not `* 0`: the reward of an unscorable row may be NaN. Weights of 0 become
  # 1 before the power, whose derivative by alpha is infinite at 0.
  rewards = jnp.where(counts, jnp.asarray(rewards, jnp.float32), 0.0)
  powers = jnp.where(counts, weights, 1.0) ** (2 * alpha)
  return rewards, jnp.where(counts, powers, 0.0), group_ids, counts


def _concrete(*arrays):
  """Whether all values can be read on this host; under `jit` none can."""
  return not any(
    isinstance(array, jax.core.Tracer)
    or not getattr(array, "is_fully_addressable", True)
    for array in arrays
  )


def _check_values(rewards, weights, group_ids, num_groups, valid):
  """Raises ValueError for invalid values in concrete arrays."""
  if not _concrete(weights, group_ids, valid):
    return
  weights, ids, valid = map(np.asarray, jax.device_get((weights, group_ids, valid)))
  counted = valid.astype(bool) & (weights != 0)
  outside = counted & ((ids < 0) | (ids >= num_groups))
  if outside.any():
    row = outside.argmax()
    raise ValueError(
      f"Row {row} has group id {ids[row]}, but num_groups is {num_groups}: ids are in"
      f" [0, {num_groups})."
    )
  wrong = counted & ~((weights > 0) & np.isfinite(weights))
  if wrong.any():
    row = wrong.argmax()
    raise ValueError(
      f"Row {row} has length or weight {weights[row]}; it must not be negative,"
      " infinite or NaN (valid=False excludes a row)."
    )
  if not _concrete(rewards):
    return
  rewards = np.asarray(jax.device_get(rewards))
  unscored = counted & ~np.isfinite(rewards)
  if unscored.any():
    row = unscored.argmax()
    raise ValueError(
      f"Row {row} has reward {rewards[row]}; pass valid=False for an unscorable"
      " response."
    )


def _check_energy(energy, mask):
  if not _concrete(energy, mask):
    return
  energy, mask = map(np.asarray, jax.device_get((energy, mask)))
  wrong = mask & ~np.isfinite(energy)
  if wrong.any():
    row, token = np.argwhere(wrong)[0]
    raise ValueError(
      f"Row {row} has energy {energy[row, token]} at token {token}, which is trainable;"
      " it must be finite (a mask of False excludes a token)."
    )


def _subtract_baseline(rewards, weights, group_ids, num_groups, leave_one_out=False):
  """Returns `r - b`, with b the weighted mean of the group, and whether it has weight.

  Arrays are [N], or [N, T] with a baseline for each column. In a group without weight
  `r - b` is 0.
  """
  total, weighted, magnitude = _group_sums(
    [weights, weights * rewards, weights * jnp.abs(rewards)], group_ids, num_groups
  )
  has_weight = total > 0
  total = jnp.where(has_weight, total, 1.0)
  centred = rewards - jnp.where(has_weight, weighted / total, rewards)
  rounding = _ROUNDING * jnp.maximum(magnitude / total, jnp.abs(rewards))
  centred = jnp.where(jnp.abs(centred) <= rounding, 0.0, centred)
  if leave_one_out:
    # r - b_{-i} = (r - b) L / (L - l) with L the total: no difference of large sums.
    others = total - weights
    has_others = others > 0
    centred *= jnp.where(has_others, total / jnp.where(has_others, others, 1.0), 0.0)
  return centred, has_weight


def _divide_by_std(centred, ones, group_ids, num_groups, valid, epsilon):
  # A second reduction: E[r^2] - E[r]^2 from the first would cancel.
  count, squares = _group_sums(
    [ones, jnp.where(valid, centred, 0.0) ** 2], group_ids, num_groups
  )
  # The derivative of the square root is infinite at 0, where rewards are equal.
  spread = squares > 0
  variance = jnp.where(spread, squares, 1.0) / jnp.maximum(count - 1.0, 1.0)
  std = jnp.where(spread, jnp.sqrt(variance), 0.0)
  return jnp.where(valid, centred / (std + epsilon), 0.0)


def _group_sums(columns, group_ids, num_groups):
  """The sums over each row's group, by one segment reduction of all columns."""
  sums = jax.ops.segment_sum(jnp.stack(columns, -1), group_ids, num_segments=num_groups)
  return jnp.moveaxis(sums.at[group_ids].get(mode="fill", fill_value=0.0), -1, 0)

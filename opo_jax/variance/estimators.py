"""Estimators of advantages whose gradient variance is measured.

All of `advantages.ESTIMATORS`, and baselines weighted with measured quantities.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from opo_jax import advantages as adv

# The inputs of estimators, one value per response, arrays of one shape: rewards,
# lengths, valid, and the weights of `WEIGHTS`.
Columns = dict[str, jax.Array]
# (columns [N], group_ids [N], num_groups) -> advantages [N]; groups are contiguous.
Advantages = Callable[[Columns, jax.Array, int], jax.Array]

# The order of the table: with the row itself in the baseline, without it, rescaled,
# bounds.
ROWS = (
  *("reinforce", "mean", "opo", "opo_batch", "opo_fitted", "energy", "exact"),
  *("rloo", "opo_loo", "opo_fitted_loo", "energy_loo", "exact_loo"),
  *("grpo", "maxrl", "reinforce_pp", "exact_outside", "exact_all", "zero"),
)


def _plain(estimator: adv.Estimator) -> Advantages:
  def advantages(columns, ids, num_groups):
    rewards, lengths, valid = (columns[k] for k in ("rewards", "lengths", "valid"))
    return estimator(rewards, lengths, ids, num_groups=num_groups, valid=valid)

  return advantages


def _weighted(name: str) -> Advantages:
  def advantages(columns, ids, num_groups):
    rewards, valid = columns["rewards"], columns["valid"]
    baseline = adv.weighted_baseline(
      rewards, columns[name], ids, num_groups=num_groups, valid=valid
    )
    return jnp.where(valid, rewards - baseline, 0.0)

  return advantages


def _weighted_loo(name: str) -> Advantages:
  """Leave-one-out by summing the other rows, not by subtracting the row from the total.

  `advantages.weighted_baseline` subtracts in float32, where a squared norm a million
  times the others' leaves nothing of them.
  """

  def advantages(columns, ids, num_groups):
    del ids
    columns = {k: column.reshape(num_groups, -1) for k, column in columns.items()}
    weights = jnp.where(columns["valid"], columns[name], 0.0)
    others = 1.0 - jnp.eye(weights.shape[1])
    sums = [weights, weights * columns["rewards"]]
    total, weighted = (jnp.matmul(x, others, precision="highest") for x in sums)
    return _centred(columns, total, weighted).reshape(-1)

  return advantages


def _centred(columns, total, weighted):
  """`r - weighted / total`; 0 where a row is not valid or the total is 0."""
  baseline = weighted / jnp.where(total > 0, total, 1.0)
  return jnp.where(columns["valid"] & (total > 0), columns["rewards"] - baseline, 0.0)


def beyond_the_group(columns_GJK: Columns) -> dict[str, jax.Array]:
  """Advantages with a baseline from the prompt's other groups, and from all groups."""
  weights = jnp.where(columns_GJK["valid"], columns_GJK["exact"], 0.0)
  sums = jnp.stack([weights, weights * columns_GJK["rewards"]])
  own = sums.sum(3, keepdims=True)
  every = own.sum(2, keepdims=True)
  return {
    "exact_outside": _centred(columns_GJK, *(every - own)),
    "exact_all": _centred(columns_GJK, *every),
  }


WEIGHTS = ("opo_fitted", "energy", "exact")
ESTIMATORS: dict[str, Advantages] = {
  **{name: _plain(estimator) for name, estimator in adv.ESTIMATORS.items()},
  **{name: _weighted(name) for name in WEIGHTS},
  **{f"{name}_loo": _weighted_loo(name) for name in WEIGHTS},
}

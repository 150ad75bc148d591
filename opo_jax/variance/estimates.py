"""Variance, error and signal of the gradient estimates, from Gram matrices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opo_jax import advantages as adv
from opo_jax.rollouts import Rollouts, select
from opo_jax.variance.estimators import ESTIMATORS, Columns, beyond_the_group
from opo_jax.variance.gram import gram_matrices


@functools.partial(jax.jit, static_argnames="group_size")
def moments(
  gram: jax.Array, columns: Columns, orders: jax.Array, *, group_size: int
) -> dict[str, dict[str, jax.Array]]:
  """Variance, error and signal of every estimator, for one group size.

  A shuffle cuts the M responses of a prompt into J groups; Q is permuted alike, so that
  a group is a diagonal block, here with J = 3 and K = 2:

      own own  .   .   .   .      own: inner products within a group, E|g|^2
      own own  .   .   .   .      .  : between groups, which are independent,
       .   .  own own  .   .           |E g|^2 and, with rloo, E g . J
       .   .  own own  .   .
       .   .   .   .  own own
       .   .   .   .  own own

  Args:
    gram: [G, M, M] inner products of scores.
    columns: arrays [G, M].
    orders: [shuffles, M] permutations of the responses.
    group_size: K, at most M / 2.

  Returns:
    estimator -> `variance`, `error` and `signal` = |E g|^2: unbiased arrays [G], so
    that an estimate of a small value can be negative.
  """
  G, K = gram.shape[0], group_size
  J = gram.shape[1] // K
  ids = jnp.repeat(jnp.arange(G), K)

  def of_shuffle(order):
    order = order[: J * K]
    q_GMM = gram[:, order][:, :, order]
    columns_GJK = {k: x[:, order].reshape(G, J, K) for k, x in columns.items()}
    # J batches, each of a group from every prompt.
    batches = {k: x.swapaxes(0, 1).reshape(J, -1) for k, x in columns_GJK.items()}
    by_name = {
      name: jax.vmap(lambda batch: estimator(batch, ids, G))(batches)  # noqa: B023
      for name, estimator in ESTIMATORS.items()
    }
    by_name = {k: x.reshape(J, G, K).swapaxes(0, 1) for k, x in by_name.items()}
    by_name |= beyond_the_group(columns_GJK) | {"zero": jnp.zeros((G, J, K))}

    a_XGJK = jnp.stack(list(by_name.values())) / K
    h_GJK = by_name["rloo"] / K
    # `qa` sums over all groups, `own` over the group itself, `others` over the rest.
    qa_XGJK = jnp.einsum(
      "gmn,xgn->xgm", q_GMM, a_XGJK.reshape(-1, G, J * K), precision="highest"
    ).reshape(a_XGJK.shape)
    own_GJKK = jnp.einsum("gjkjl->gjkl", q_GMM.reshape(G, J, K, J, K))
    own_XGJK = jnp.einsum("gjkl,xgjl->xgjk", own_GJKK, a_XGJK, precision="highest")
    others_XGJK = (qa_XGJK - own_XGJK) / (J * (J - 1))
    power = (a_XGJK * own_XGJK).sum((2, 3)) / J
    signal = (a_XGJK * others_XGJK).sum((2, 3))
    cross = (h_GJK * others_XGJK).sum((2, 3))
    truth = signal[list(by_name).index("rloo")]
    return {
      name: {
        "variance": power[i] - signal[i],
        "error": power[i] - 2 * cross[i] + truth,
        "signal": signal[i],
      }
      for i, name in enumerate(by_name)
    }

  results = jax.lax.map(of_shuffle, orders)
  return jax.tree.map(lambda x: x.mean(0), results)


def token_moments(
  policy: Any,
  rollouts: Rollouts,
  scores: tuple[np.ndarray, np.ndarray],
  columns: Columns,
  order: np.ndarray,
  *,
  group_size: int,
  chunk: int,
  memory_gib: float = 4.0,
) -> dict[str, np.ndarray]:
  """`moments` of `advantages.optimal_token`, from the gradients of one shuffle.

  Args:
    policy, rollouts, chunk, memory_gib: of `gram_matrices`.
    scores: its result, Q of the scores and the energy.
    columns: arrays [G, M].
    order: [M], the shuffle.
    group_size: K.
  """
  score_score, energy = scores
  G, M, T = energy.shape
  K, J = group_size, M // group_size
  cut = np.full(M, -1)  # the group of each response; -1 for those left over
  cut[order[: J * K]] = np.arange(J * K) // K
  ids = (np.arange(G)[:, None] * J + np.maximum(cut, 0)).reshape(-1)
  rewards, lengths = (columns[k].reshape(-1) for k in ("rewards", "lengths"))
  group = dict(num_groups=G * J, valid=(columns["valid"] & (cut >= 0)).reshape(-1))
  token_advantages = adv.optimal_token(
    rewards, energy.reshape(-1, T), rollouts.mask, ids, **group
  )
  h_GM = adv.rloo(rewards, lengths, ids, **group).reshape(G, M)

  # Every row twice: M gradients with token advantages, then M scores.
  twice = np.concatenate([np.arange(G * M).reshape(G, M)] * 2, axis=1).reshape(-1)
  coefficients = jnp.stack(
    [token_advantages.reshape(G, M, T), jnp.ones((G, M, T))], axis=1
  )
  gram, _ = gram_matrices(
    policy,
    select(rollouts, twice),
    coefficients.reshape(-1, T),
    chunk=chunk,
    memory_gib=memory_gib,
  )
  # Responses left over have advantage 0 on both sides.
  same, other = cut[:, None] == cut, cut[:, None] != cut
  token_token, token_score = gram[:, :M, :M], gram[:, :M, M:]
  pairs = J * (J - 1) * K**2
  power = (token_token * same).sum((1, 2)) / (J * K**2)
  signal = (token_token * other).sum((1, 2)) / pairs
  cross = np.einsum("gmn,gn->g", token_score * other, h_GM) / pairs
  h_h = score_score * h_GM[:, :, None] * h_GM[:, None] * other
  return {
    "variance": power - signal,
    "error": power - 2 * cross + h_h.sum((1, 2)) / pairs,
    "signal": signal,
  }

"""Gradient variance: how noisy each estimator's policy gradient is, measured.

For a prompt x and a frozen policy, M responses y_i are sampled and rewarded, and each
has its score, the gradient of its log-probability summed over its tokens:

    s_i = grad log pi(y_i | x)

An estimator turns a group of K of them into advantages and a gradient,

    g = 1/K sum_i A_i s_i                          (of one prompt; a batch averages)

and what is asked is how far g lies from the true gradient J = E[r s]:

    variance   tr Cov(g)  = E|g|^2 - |E g|^2      what averaging more groups removes
    error      E|g - J|^2 = variance + bias^2
    noise      tr Cov(g) / |E g|^2                free of scale, not of direction

**Gram matrices say it all.** Every term is an inner product of two sums of scores, so
`Q = S S^T` [M, M] of a prompt holds everything: M gradients are taken once and then any
number of groups, sizes and estimators are evaluated exactly, without a projection. The
policy is large and Q is small; see `gram_matrices` for the memory.

**Unbiased from M responses.** A shuffle cuts them into J = M // K disjoint groups:
independent draws of g. With `<.,.>` over pairs j != j', and h the group's `rloo`
gradient, which is unbiased and, averaged over shuffles, that of all M responses,

    |E g|^2    mean <g_j, g_j'>                   E|g|^2      mean |g_j|^2
    |J|^2      mean <h_j, h_j'>                   E g . J     mean <g_j, h_j'>

so nothing is an inner product of a noisy vector with itself, and the large-sample
gradient needs no correction for its own noise. Shuffles are averaged; the intervals are
a bootstrap over prompts, and ratios are paired: both sides see the same responses.

**What can be compared.** `mean` is `(K-1)/K` times the unbiased `rloo`, and `opo` is
`(1 - l_i / sum l)` times `opo_loo`: a row's own reward in its baseline shrinks the
gradient, and its variance with it, by a factor of four at K = 2. That is not less
noise. Compare the leave-one-out forms with each other (they are unbiased: variance is
error), or the raw forms by their noise, which is free of scale but not of direction:
where the row itself is in the baseline, E g may turn away from J. `grpo`, `maxrl` and
`reinforce_pp` divide by a statistic of the rewards: only their noise can be set against
the others', and there they also weigh prompts differently, which is another objective,
not a better estimate.

**Rows.** Every one of `advantages.ESTIMATORS`, and `r - sum w r / sum w` with weights

    opo_fitted      l^(2 alpha), alpha fitted here: half the slope of log |s|^2 on log l
    energy          sum_t |onehot(y_t) - pi_t|^2
    exact           |s|^2, measured: the oracle, the baseline of least variance
    *_loo           the same without the row itself
    exact_outside   `exact` from the M - K responses outside of the group
    exact_all       `exact` from all M: the floor of all baselines that are one number
                    a prompt, a little too low, as it has seen what it is judged on
    optimal_token   a baseline for every position (measured for one K, see below)
    zero            no gradient at all: the error of standing still

A group of K estimates its baseline from K - 1 others, so `exact_loo` can lose to `rloo`
at small K: better weights, fewer effective samples. At K = 2 the only other response is
the baseline whatever it weighs, and all leave-one-out forms are one. Where a few rare
responses hold most of `|s|^2`, weights that include the row itself let such a response
be its own baseline: variance falls with the signal, and `zero` shows how far.

**Tokens.** The advantages of `optimal_token` differ inside of a row, so scores do not
suffice. There each row's gradient of `sum_t A_t log pi_t` is taken as it is, for one
shuffle and one K, and its Q with the scores gives the same three numbers.

**Left out.** Training's `token_mean` divides by the batch's tokens, here 1/K: a common
constant but for its own small fluctuation. Between prompts, covariance is exactly zero
for group baselines and neglected for `opo_batch` and `reinforce_pp`, whose baseline all
prompts of a batch share (order 1/K G^2 of G prompts). Differences between prompts add
the same variance to every estimator that keeps J, and no advantage can take it away.
Unscorable rows have advantage 0, as in training.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from opo_jax import advantages as adv
from opo_jax import learner as trainer
from opo_jax.rollouts import Rollouts, rows, select

# What estimators know of each response, arrays of one shape: rewards, lengths, valid,
# and the weights of `WEIGHTS`.
Columns = dict[str, jax.Array]
# (columns [N], group_ids [N], num_groups) -> advantages [N]; groups lie side by side.
Advantages = Callable[[Columns, jax.Array, int], jax.Array]
# As they are shown: with the row itself in the baseline, without it, rescaled, bounds.
ROWS = (
  *("reinforce", "mean", "opo", "opo_batch", "opo_fitted", "energy", "exact"),
  *("rloo", "opo_loo", "opo_fitted_loo", "energy_loo", "exact_loo"),
  *("grpo", "maxrl", "reinforce_pp", "exact_outside", "exact_all", "zero"),
)
# Measure -> the estimator that is 1. An unbiased estimator's error is its variance.
BASES = {"variance": "mean", "error": "rloo", "noise": "rloo"}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to measure."""

  # Checkpoints by step, 0 is the start policy; none: the start, the middle, the last.
  steps: tuple[int, ...] = ()
  # Training prompts, the same for every policy.
  prompts: int = 32
  # M, responses to each prompt.
  samples: int = 128
  # K, the sizes of groups.
  group_sizes: tuple[int, ...] = (2, 4, 8, 16, 32)
  # Ways to cut the responses of a prompt into groups.
  shuffles: int = 32
  # K for optimal_token, which costs three times the rest; 0 leaves it out.
  token_group_size: int = 8
  # Per-sample gradients in memory at a time (twice as many where M is larger).
  chunk: int = 128
  # What these gradients may take, GiB.
  memory_gib: float = 4.0
  # Of prompts, responses and shuffles.
  seed: int = 0

  def __post_init__(self):
    for name in ("prompts", "shuffles", "chunk"):
      if getattr(self, name) < 1:
        raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1.")
    if not self.group_sizes or min(self.group_sizes) < 2:
      raise ValueError(
        f"--group-sizes is {self.group_sizes}; a group baseline needs at least 2."
      )
    if self.token_group_size < 0 or self.token_group_size == 1:
      raise ValueError(
        f"--token-group-size is {self.token_group_size}; it must be at least 2, or 0 to"
        " leave optimal_token out."
      )
    largest = max(*self.group_sizes, self.token_group_size)
    if self.samples < 2 * largest:
      raise ValueError(
        f"--samples {self.samples} is less than two groups of {largest}; use --samples"
        f" {2 * largest}, or smaller --group-sizes and --token-group-size."
      )


# Per-sample gradients ------------------------------------------------------------


def row_gradients(
  policy: Any, rollouts: Rollouts, coefficients: jax.Array
) -> tuple[Any, jax.Array]:
  """Each row's own gradient `grad sum_t c_t log pi(y_t)`: the score where c = 1.

  Args:
    policy: without a mesh, which each row alone would be padded to fill.
    rollouts: N rows.
    coefficients: [N, T]; what lies outside of the mask is not read.

  Returns:
    A tree like the policy with arrays [N, ...], and each token's logit energy [N, T].
  """

  def objective(policy, row, tokens, mask, coefficients):
    one = jax.tree.map(lambda x: x[None], row)
    stats = trainer.token_stats(policy, one, tokens[None], rollouts.temperature)
    weighted = jnp.where(mask, coefficients * stats.logprob[0], 0.0).sum()
    return weighted, jnp.where(mask, stats.energy[0], 0.0)

  return jax.vmap(jax.grad(objective, has_aux=True), (None, 0, 0, 0, 0))(
    policy, rows(rollouts), rollouts.tokens, rollouts.mask, coefficients
  )


def gram_matrices(
  policy: Any,
  rollouts: Rollouts,
  coefficients: jax.Array | None = None,
  *,
  chunk: int,
  memory_gib: float = 4.0,
) -> tuple[np.ndarray, np.ndarray]:
  """Inner products of the gradients of each prompt's responses.

  No more than two chunks of gradients are alive: where a prompt has more responses
  than a chunk, Q is computed block by block and the second chunk of a block is
  differentiated again.

  Args:
    policy: an NNX policy; it is not changed.
    rollouts: G prompts with M consecutive rows each.
    coefficients: [N, T] of `row_gradients`; ones, that is the scores, where it is None.
    chunk: gradients that are taken together.
    memory_gib: the bound of what they may take.

  Returns:
    Q [G, M, M] and each token's logit energy [G, M, T], float32.

  Raises:
    ValueError: gradients that do not fit, with the chunk that would.
  """
  num_rows, num_tokens = rollouts.tokens.shape
  G, M = rollouts.num_groups, num_rows // rollouts.num_groups
  chunk = min(chunk, M)
  _check_memory(policy, chunk, 1 if chunk == M else 2, memory_gib)
  policy = jax.tree.map(lambda x: x, policy)  # another module over the same arrays
  policy.mesh = None
  if coefficients is None:
    coefficients = jnp.ones(rollouts.tokens.shape)
  gram = np.zeros((G, M, M), np.float32)
  energy = np.zeros((G, M, num_tokens), np.float32)
  starts = range(0, M, chunk)

  def gradients_of(group, start):
    # Beyond the last row it is taken again, so that all chunks have one shape.
    index = group * M + np.minimum(np.arange(start, start + chunk), M - 1)
    return _gradients(policy, rollouts, coefficients, index)

  for group in range(G):
    for a in starts:
      first = second = None  # freed before the next ones are taken
      first, energies = gradients_of(group, a)
      energy[group, a : a + chunk] = np.asarray(energies)[: M - a]
      for b in starts[: a // chunk + 1]:
        second = None
        second = first if a == b else gradients_of(group, b)[0]
        block = np.asarray(_inner_products(first, second))[: M - a, : M - b]
        gram[group, a : a + chunk, b : b + chunk] = block
        gram[group, b : b + chunk, a : a + chunk] = block.T
  return gram, energy


@jax.jit
def _gradients(policy, rollouts, coefficients, index):
  return row_gradients(policy, select(rollouts, index), coefficients[index])


@jax.jit
def _inner_products(a, b):
  def of_leaf(x, y):
    x, y = x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1)
    return jnp.matmul(x, y.T, precision="highest")

  return sum(jax.tree.leaves(jax.tree.map(of_leaf, a, b)))


def _check_memory(policy, chunk, chunks, memory_gib):
  size = sum(leaf.size for leaf in jax.tree.leaves(policy))
  one_gib = 4 * size / 2**30
  if chunks * chunk * one_gib > memory_gib:
    fits = int(memory_gib / (2 * one_gib))
    do = f"use --chunk {fits}" if fits else "measure a smaller policy"
    raise ValueError(
      f"{chunks} x {chunk} gradients of {size:,} parameters take"
      f" {chunks * chunk * one_gib:.1f} GiB, more than {memory_gib:g}; {do}, or allow"
      " more (--memory-gib)."
    )


# Estimators ----------------------------------------------------------------------


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
  """Sums the others one by one: `advantages.weighted_baseline` takes the row out of a
  float32 total, and nothing is left of the others beside a norm a million times theirs.
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
  """`r - weighted / total`, 0 for what does not count or has nothing to go by."""
  baseline = weighted / jnp.where(total > 0, total, 1.0)
  return jnp.where(columns["valid"] & (total > 0), columns["rewards"] - baseline, 0.0)


def _beyond_the_group(columns_GJK: Columns) -> dict[str, jax.Array]:
  """Advantages with a baseline from a prompt's other groups, and from all of them."""
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


# Moments -------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="group_size")
def moments(
  gram: jax.Array, columns: Columns, orders: jax.Array, *, group_size: int
) -> dict[str, dict[str, jax.Array]]:
  """Variance, error and signal of every estimator for groups of one size.

  Args:
    gram: [G, M, M] inner products of scores.
    columns: arrays [G, M].
    orders: [R, M] permutations of the responses.
    group_size: K, at most M / 2.

  Returns:
    estimator -> `variance`, `error` and `signal` = |E g|^2, arrays [G] that are
    unbiased: a small one can come out below zero.
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
    a = {
      name: jax.vmap(lambda batch: estimator(batch, ids, G))(batches)  # noqa: B023
      for name, estimator in ESTIMATORS.items()
    }
    a = {name: x.reshape(J, G, K).swapaxes(0, 1) for name, x in a.items()}
    a |= _beyond_the_group(columns_GJK) | {"zero": jnp.zeros((G, J, K))}

    a_EGJK = jnp.stack(list(a.values())) / K
    h_GJK = a["rloo"] / K
    # Sums over all pairs of groups, and over each group with itself.
    qa_EGJK = jnp.einsum(
      "gmn,egn->egm", q_GMM, a_EGJK.reshape(-1, G, J * K), precision="highest"
    ).reshape(a_EGJK.shape)
    own_GJKK = jnp.einsum("gjkjl->gjkl", q_GMM.reshape(G, J, K, J, K))
    own_EGJK = jnp.einsum("gjkl,egjl->egjk", own_GJKK, a_EGJK, precision="highest")
    others_EGJK = (qa_EGJK - own_EGJK) / (J * (J - 1))
    power = (a_EGJK * own_EGJK).sum((2, 3)) / J
    signal = (a_EGJK * others_EGJK).sum((2, 3))
    cross = (h_GJK * others_EGJK).sum((2, 3))
    truth = signal[list(a).index("rloo")]
    return {
      name: {
        "variance": power[i] - signal[i],
        "error": power[i] - 2 * cross[i] + truth,
        "signal": signal[i],
      }
      for i, name in enumerate(a)
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
  **options,
) -> dict[str, np.ndarray]:
  """`moments` of `advantages.optimal_token`, from gradients taken for one shuffle.

  Args:
    policy, rollouts, options: of `gram_matrices`.
    scores: what it gave, Q of the scores and the energy.
    columns: arrays [G, M].
    order: [M], the shuffle.
    group_size: K.
  """
  score_score, energy = scores
  G, M, T = energy.shape
  K, J = group_size, M // group_size
  cut = np.full(M, -1)  # the group of each response; what is left over has none
  cut[order[: J * K]] = np.arange(J * K) // K
  ids = (np.arange(G)[:, None] * J + np.maximum(cut, 0)).reshape(-1)
  rewards, lengths = (columns[k].reshape(-1) for k in ("rewards", "lengths"))
  group = dict(num_groups=G * J, valid=(columns["valid"] & (cut >= 0)).reshape(-1))
  token_advantages = adv.optimal_token(
    rewards, energy.reshape(-1, T), rollouts.mask, ids, **group
  )
  h_GM = adv.rloo(rewards, lengths, ids, **group).reshape(G, M)

  # Every row twice: with its token advantages, and as its score.
  twice = np.concatenate([np.arange(G * M).reshape(G, M)] * 2, axis=1).reshape(-1)
  coefficients = jnp.stack(
    [token_advantages.reshape(G, M, T), jnp.ones((G, M, T))], axis=1
  )
  gram, _ = gram_matrices(
    policy, select(rollouts, twice), coefficients.reshape(-1, T), **options
  )
  # What is left over has advantage 0 on both sides.
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


# Fits and intervals --------------------------------------------------------------


def fit(x: np.ndarray, y: np.ndarray, *, within: bool) -> dict[str, float]:
  """Least squares `y = c + slope x`, with an interval by resampling prompts.

  Args:
    x, y: [G, M]; what is not finite is left out.
    within: each of the G prompts has its own c.

  Returns:
    `slope` with the 95 % interval `slope_low`, `slope_high`, and `r2` (within: of the
    variance inside of prompts); empty where x does not vary.
  """
  good = np.isfinite(x) & np.isfinite(y)
  x, y = (np.where(good, v, 0.0).astype(np.float64) for v in (x, y))
  n = good.sum(1)
  if within:
    mean = [v.sum(1, keepdims=True) / np.maximum(n, 1)[:, None] for v in (x, y)]
    x, y = (np.where(good, v - m, 0.0) for v, m in zip((x, y), mean, strict=True))
  sums = np.stack([n, *(v.sum(1) for v in (x, y, x * x, x * y, y * y))])

  def solve(sums):
    n, sx, sy, sxx, sxy, syy = sums
    xx, xy, yy = sxx - sx * sx / n, sxy - sx * sy / n, syy - sy * sy / n
    return xx / n, xy / xx, xy * xy / (xx * yy)

  with np.errstate(all="ignore"):
    variation, slope, r2 = solve(sums.sum(1))
    if not variation > 1e-9:
      return {}
    low, high = _interval(solve(sums @ _resamples(len(n)))[1])
  return {"slope": slope, "slope_low": low, "slope_high": high, "r2": r2}


def _resamples(num: int, resamples: int = 2000) -> np.ndarray:
  """How often each of `num` prompts is in each bootstrap sample: [num, resamples]."""
  rng = np.random.default_rng(0)
  return rng.multinomial(num, np.full(num, 1 / num), resamples).T


def _interval(values):
  low, high = np.nanpercentile(values, [2.5, 97.5])
  return float(low), float(high)


def ratios(measured: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, list]]:
  """Each estimator beside the one of `BASES`: [ratio, low, high] of every measure.

  Args:
    measured: of `moments`, for one group size.

  Returns:
    estimator -> measure -> [ratio of the sums over prompts, 95 % interval]. `noise` is
    absent where a signal is not distinguishable from zero.
  """
  num = len(measured["mean"]["variance"])
  counts = np.concatenate([np.ones((num, 1)), _resamples(num)], axis=1)

  def totals(name):
    sums = {k: np.asarray(v, np.float64) @ counts for k, v in measured[name].items()}
    with np.errstate(all="ignore"):
      noise = np.where(sums["signal"] > 0, sums["variance"] / sums["signal"], np.nan)
    return {"variance": sums["variance"], "error": sums["error"], "noise": noise}

  result = {}
  for name in sorted(measured, key=[*ROWS, *measured].index):
    own, result[name] = totals(name), {}
    for measure, base in BASES.items():
      with np.errstate(all="ignore"):
        ratio = own[measure] / totals(base)[measure]
      if np.isfinite(ratio[0]) and np.isfinite(ratio).mean() > 0.975:
        result[name][measure] = [float(ratio[0]), *_interval(ratio[1:])]
  return result


# The measurement -----------------------------------------------------------------


def measure(
  policy: Any,
  rollouts: Rollouts,
  rewards: np.ndarray,
  settings: Settings,
) -> dict[str, Any]:
  """All that is reported of one policy, JSON-able; see the module's docstring.

  Args:
    policy: the one that sampled.
    rollouts: `settings.prompts` prompts with `settings.samples` consecutive rows each.
    rewards: [N]; NaN is unscorable.
    settings: what to measure.
  """
  options = dict(chunk=settings.chunk, memory_gib=settings.memory_gib)
  gram, energy = gram_matrices(policy, rollouts, **options)
  G, M, _ = energy.shape
  rewards = np.asarray(rewards, np.float32).reshape(G, M)
  lengths = np.asarray(rollouts.lengths, np.float32).reshape(G, M)
  norms = np.diagonal(gram, axis1=1, axis2=2)
  quantities = {"length": lengths, "energy": energy.sum(-1), "norm": norms}
  with np.errstate(divide="ignore"):
    logs = {name: np.log(quantity) for name, quantity in quantities.items()}
  fits = {
    name: {
      "pooled": fit(logs[name], logs["norm"], within=False),
      "within": fit(logs[name], logs["norm"], within=True),
    }
    for name in ("length", "energy")
  }
  # A baseline belongs to a prompt: what counts is how norms grow inside of one. Without
  # any variation of length all weights are the same.
  alpha = fits["length"]["within"].get("slope", 1.0) / 2
  valid = ~np.isnan(rewards)
  columns = {
    "rewards": np.where(valid, rewards, 0.0),
    "lengths": lengths,
    "valid": valid,
    "opo_fitted": np.where(lengths > 0, np.maximum(lengths, 1.0) ** (2 * alpha), 0.0),
    "energy": quantities["energy"],
    "exact": norms,
  }
  rng = np.random.default_rng(settings.seed)
  orders = np.stack([rng.permutation(M) for _ in range(settings.shuffles)])

  def moments_of(orders, size):
    return jax.tree.map(np.asarray, moments(gram, columns, orders, group_size=size))

  by_size = {str(K): moments_of(orders, K) for K in settings.group_sizes}
  result = {
    "prompts": G,
    "samples": M,
    "reward/mean": float(rewards[valid].mean()),
    "response_length/mean": float(lengths.mean()),
    "response_length/cv": float(lengths.std() / lengths.mean()),
    "score/squared_norm_mean": float(norms.mean()),
    "score/largest_percent_share": _largest_share(norms),
    "alpha": float(alpha),
    "fits": fits,
    "rloo": {  # means over prompts: what the ratios are ratios of
      K: {name: float(x.mean()) for name, x in measured["rloo"].items()}
      for K, measured in by_size.items()
    },
    "ratios": {K: ratios(measured) for K, measured in by_size.items()},
    "tokens": {},
    "points": _points(logs, rewards),
  }
  for name, which in (("right", rewards > 0.5), ("wrong", rewards <= 0.5)):
    if which.any():
      result[f"score/squared_norm_{name}"] = float(norms[which].mean())
      result[f"response_length/{name}"] = float(lengths[which].mean())
  if K := settings.token_group_size:
    # Beside the others on the same one shuffle.
    tokens = token_moments(
      policy, rollouts, (gram, energy), columns, orders[0], group_size=K, **options
    )
    measured = ratios(moments_of(orders[:1], K) | {"optimal_token": tokens})
    result["tokens"] = {str(K): {"optimal_token": measured["optimal_token"]}}
  return result


def _largest_share(norms):
  """What the largest hundredth of the squared norms has of their sum."""
  largest = np.sort(norms, axis=None)[-max(norms.size // 100, 1) :]
  return float(largest.sum() / norms.sum())


def _points(logs, rewards, count=400):
  """Some responses for the figure: [log length, log energy, log |s|^2, reward]."""
  columns = np.stack([logs["length"], logs["energy"], logs["norm"], rewards], -1)
  columns = columns.reshape(-1, 4)
  columns = columns[np.isfinite(columns).all(1)]
  index = np.linspace(0, len(columns) - 1, min(count, len(columns))).astype(int)
  return columns[index].astype(np.float64).round(3).tolist()


# The words -----------------------------------------------------------------------


def show(rows: list[dict[str, Any]]) -> None:
  """Prints a table of estimators and a line on the norms for each policy."""
  console = Console(highlight=False, soft_wrap=True)
  for row in rows:
    console.print(table(row))
    for name, fits in row["fits"].items():
      if fits["within"]:
        line = (
          "|s|^2 ~ {name}^{slope:.2f} [{slope_low:.2f}, {slope_high:.2f}] within a"
          " prompt, R^2 {r2:.3f}"
        )
        console.print(line.format(name=name, **fits["within"]), markup=False)


def table(row: dict[str, Any]) -> Table:
  """What `measure` found of every estimator, the interval for the largest K."""
  *sizes, last = row["ratios"]
  result = Table(
    title=f"step {row['step']}, reward {row['reward/mean']:.3f}: error |g - J|^2 by K"
    " and noise tr Cov(g)/|E g|^2, of rloo = 1",
    title_justify="left",
  )
  result.add_column("", no_wrap=True)
  for name in (*sizes, last, f"noise at {last}"):
    result.add_column(name, justify="right", no_wrap=True)
  for name, at_last in row["ratios"][last].items():
    result.add_row(
      name,
      *(_cell(row["ratios"][K][name].get("error"), interval=False) for K in sizes),
      _cell(at_last.get("error")),
      _cell(at_last.get("noise")),
    )
  for K, measured in row["tokens"].items():
    error = _cell(measured["optimal_token"].get("error"))
    result.add_row("optimal_token", *(error if k == K else "" for k in (*sizes, last)))
  return result


def _cell(ratio, interval=True):
  if not ratio:
    return ""
  return "{:.3g} [{:.3g}, {:.3g}]".format(*ratio) if interval else f"{ratio[0]:.3g}"

"""Fits, ratios to a base estimator, and bootstrap intervals over prompts."""

import numpy as np

from opo_jax.variance.estimators import ROWS

# Measure -> the estimator whose ratio is 1. An unbiased estimator's error is its
# variance.
BASES = {"variance": "mean", "error": "rloo", "noise": "rloo"}


def fit(x: np.ndarray, y: np.ndarray, *, within: bool) -> dict[str, float]:
  """Fits `y = c + slope x` by least squares, with a bootstrap interval over prompts.

  Args:
    x, y: [G, M]; pairs that are not finite are ignored.
    within: each of the G prompts has its own c.

  Returns:
    `slope` with the 95 % interval `slope_low`, `slope_high`, and `r2` (within: of the
    variance within prompts); empty if x does not vary.
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
  """The counts of `num` prompts in each bootstrap sample: [num, resamples]."""
  rng = np.random.default_rng(0)
  return rng.multinomial(num, np.full(num, 1 / num), resamples).T


def _interval(values):
  low, high = np.nanpercentile(values, [2.5, 97.5])
  return float(low), float(high)


def ratios(measured: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, list]]:
  """The ratio of every estimator's measures to those of `BASES`: [ratio, low, high].

  Args:
    measured: `moments` of one group size.

  Returns:
    estimator -> measure -> [ratio of the sums over prompts, 95 % interval]. `noise` is
    absent where the signal is not distinguishable from zero.
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

"""Measures a policy: samples' gradients -> moments, ratios and fits, as JSON."""

import dataclasses
from typing import Any

import jax
import numpy as np

from opo_jax.rollouts import Rollouts
from opo_jax.variance.estimates import moments, token_moments
from opo_jax.variance.gram import gram_matrices
from opo_jax.variance.statistics import fit, ratios


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a measurement: flags of `make variance`."""

  # Checkpoints by step; 0 is the start policy. Empty: the start, the middle, the last.
  steps: tuple[int, ...] = ()
  # Training prompts, the same for every policy.
  prompts: int = 32
  # M, responses to each prompt.
  samples: int = 128
  # K, the sizes of groups.
  group_sizes: tuple[int, ...] = (2, 4, 8, 16, 32)
  # Random partitions of the responses of a prompt into groups.
  shuffles: int = 32
  # K for optimal_token, which costs three times the rest; 0 omits it.
  token_group_size: int = 8
  # Per-response gradients in memory at a time (twice as many where M is larger).
  chunk: int = 128
  # Memory limit of these gradients, GiB.
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
        " omit optimal_token."
      )
    largest = max(*self.group_sizes, self.token_group_size)
    if self.samples < 2 * largest:
      raise ValueError(
        f"--samples {self.samples} is less than two groups of {largest}; use --samples"
        f" {2 * largest}, or smaller --group-sizes and --token-group-size."
      )


def measure(
  policy: Any,
  rollouts: Rollouts,
  rewards: np.ndarray,
  settings: Settings,
) -> dict[str, Any]:
  """Measures one policy; the result is JSON-able. See the package's docstring.

  Args:
    policy: the policy that sampled.
    rollouts: `settings.prompts` prompts with `settings.samples` consecutive rows each.
    rewards: [N]; NaN is unscorable.
    settings: group sizes, shuffles, memory.
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
  # A baseline is shared within a prompt, so the slope within prompts counts. Without
  # variation of length all weights are equal.
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
    "rloo": {  # means over prompts, the denominators of the ratios
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
    # Its ratios are paired with the others on the same single shuffle.
    tokens = token_moments(
      policy, rollouts, (gram, energy), columns, orders[0], group_size=K, **options
    )
    measured = ratios(moments_of(orders[:1], K) | {"optimal_token": tokens})
    result["tokens"] = {str(K): {"optimal_token": measured["optimal_token"]}}
  return result


def _largest_share(norms):
  """The share of the largest 1 % of the squared norms in their sum."""
  largest = np.sort(norms, axis=None)[-max(norms.size // 100, 1) :]
  return float(largest.sum() / norms.sum())


def _points(logs, rewards, count=400):
  """Evenly chosen points of the figure: [log length, log energy, log |s|^2, reward]."""
  columns = np.stack([logs["length"], logs["energy"], logs["norm"], rewards], -1)
  columns = columns.reshape(-1, 4)
  columns = columns[np.isfinite(columns).all(1)]
  index = np.linspace(0, len(columns) - 1, min(count, len(columns))).astype(int)
  return columns[index].astype(np.float64).round(3).tolist()

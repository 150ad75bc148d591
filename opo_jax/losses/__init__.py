"""Losses: log-probs, advantages and a mask -> a scalar to minimise.

`mask[N, T]` marks the trainable tokens: the end token is one of them; prompt, padding
and tool tokens are not. Advantages are `[N]` or `[N, T]` and receive no gradient.
Arithmetic is float32; values where `mask` is False, NaN included, are not read. Every
loss returns `(loss, aux)` and takes these options:

- `aggregation`: how token losses are reduced to a scalar, see `aggregate`.
- `normalizer`: the denominator of a loss belongs to the *step*, not to the micro-batch.
  When a step is split, compute `step_normalizer(mask, how)` once for the whole step and
  pass it for every part: the losses of the parts then add up to that of the step, for
  every split.
- `segment_ids[N, T]`: for packed rows, the response that a token belongs to: 1, 2, ...
  within the row, 0 for padding. A packed response has the same loss as in a row of its
  own; advantages are `[N, T]`.

      segment_ids    1 1 1 2 2 3 3 3 0 0
- `importance_weights`, `[N]` or `[N, T]`: constant factors of the token losses, such as
  those of `truncated_importance`.
- `entropy[N, T]`: measured only; `aux["entropy"]` is its mean.

`aux` describes the trainable tokens of this call: `ratio[N, T]` (1 where `mask` is
False), `clipped[N, T]`, and as means over tokens `clip_fraction`, `approx_kl` (k3 of
the old policy to the new one) and `entropy`.
"""

from opo_jax.losses.aggregation import AGGREGATIONS, aggregate, step_normalizer
from opo_jax.losses.objectives import (
  Aux,
  cispo,
  gspo,
  opo_loss,
  policy_gradient,
  ppo_clip,
)
from opo_jax.losses.ratios import importance_ratio, kl, truncated_importance

__all__ = [
  "AGGREGATIONS",
  "Aux",
  "aggregate",
  "cispo",
  "gspo",
  "importance_ratio",
  "kl",
  "opo_loss",
  "policy_gradient",
  "ppo_clip",
  "step_normalizer",
  "truncated_importance",
]

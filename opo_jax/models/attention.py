"""Attention over keys that lie in several places: one softmax across all of them.

A decoded token attends to the prompt (stored once for the whole group), to the
response so far (stored per row) and to itself. Each is a `Keys` part; the softmax
runs over their concatenated scores, so that the keys themselves are never copied.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Far below any score, yet finite: a query without any key (padding) gets a uniform
# average, never NaN, and its output is read by nobody.
_MASKED = -1e30


class Keys(NamedTuple):
  """Keys and values that lie together.

  Attributes:
    key: [C, S, K, E]. C is the number of query rows, or divides it: then each of the
      C is shared by as many consecutive query rows (a group and its prompt).
    value: [C, S, K, E].
    mask: bool, which query may attend to which key: [C, T, S], or [C, 1, S], or one
      for each query row, [B, T, S].
    positions: [C, S] int32 of the keys, for layers with a sliding window; the mask they
      pass on is already cut to it.
  """

  key: jax.Array
  value: jax.Array
  mask: jax.Array
  positions: jax.Array | None = None


def attention(query_BTHE: jax.Array, parts: Sequence[Keys]) -> jax.Array:
  """`softmax(q k / sqrt(E)) v` over all parts together, with grouped queries.

  Args:
    query_BTHE: [B, T, H, E]; H is a multiple of the keys' K.
    parts: at least one.

  Returns:
    [B, T, H, E] in the query's dtype; scores and softmax are float32.
  """
  B, T, H, E = query_BTHE.shape
  K = parts[0].key.shape[2]
  query = query_BTHE.reshape(B, T, K, H // K, E) * (E**-0.5)

  scores = [_scores(query, part) for part in parts]
  probs = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
  probs = probs.astype(query.dtype)
  ends = [0]
  for part in parts:
    ends.append(ends[-1] + part.key.shape[1])
  out = sum(
    _weighted_values(probs[..., start:end], part)
    for part, start, end in zip(parts, ends, ends[1:], strict=False)
  )
  return out.reshape(B, T, H, E)


def _scores(query_BTKRE, part):
  """[B, K, R, T, S]; rows that share a prompt are folded into the query's T axis."""
  B, T, K, R, E = query_BTKRE.shape
  C, S = part.key.shape[:2]
  query = query_BTKRE.reshape(C, (B // C) * T, K, R, E)
  scores = jnp.einsum(
    "ctkre,cske->ckrts", query, part.key, preferred_element_type=jnp.float32
  )
  mask = part.mask.reshape(C, -1, *part.mask.shape[1:])
  mask = jnp.broadcast_to(mask, (C, B // C, T, S))
  scores = jnp.where(mask.reshape(C, 1, 1, -1, S), scores, _MASKED)
  scores = scores.reshape(C, K, R, B // C, T, S)
  return jnp.moveaxis(scores, 3, 1).reshape(B, K, R, T, S)


def _weighted_values(probs_BKRTS, part):
  B, K, R, T, S = probs_BKRTS.shape
  C = part.key.shape[0]
  probs = jnp.moveaxis(probs_BKRTS.reshape(C, B // C, K, R, T, S), 1, 3)
  probs = probs.reshape(C, K, R, (B // C) * T, S)
  out = jnp.einsum("ckrts,cske->ctkre", probs, part.value)
  return out.reshape(B, T, K, R, -1)

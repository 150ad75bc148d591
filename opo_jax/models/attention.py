"""Attention over keys that lie in several places: one softmax across all of them.

A decoded token attends to the prompt (stored once for the whole group), to the
response so far (stored per row) and to itself. Each is a `Keys` part; the softmax
runs over their concatenated scores, so that the parts are never joined.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Far below any score, yet finite: a query without any key (padding) gets a uniform
# average, never NaN, and its output is read by nobody.
_MASKED = -1e30


class Keys(NamedTuple):
  """Keys and values that lie together, head by head, as matrix products want them.

  Attributes:
    key: [C, K, S, E].
    value: [C, K, S, E].
    mask: [C, T, S] or [C, 1, S] bool: which query may attend to which key.
    rows: which of the C entries each query row reads, int32 [shards, B / shards],
      counted from the first entry of the row's own shard, so that no device reads
      another's. None: C is B, or divides it and each entry is shared by as many
      consecutive rows (a group and its prompt).
    positions: [C, S] int32; needed where a window counts back from the query's.
  """

  key: jax.Array
  value: jax.Array
  mask: jax.Array
  rows: jax.Array | None = None
  positions: jax.Array | None = None


def attention(
  query_BTHE: jax.Array,
  parts: Sequence[Keys],
  *,
  positions: jax.Array | None = None,
  window: jax.Array | int | None = None,
) -> jax.Array:
  """`softmax(q k / sqrt(E)) v` over all parts together, with grouped queries.

  Args:
    query_BTHE: [B, T, H, E]; H is a multiple of the keys' K.
    parts: at least one.
    positions: [B, T] int32 of the queries, for a window.
    window: scalar; a query sees keys less than this many positions back, itself
      included. None: as far back as the masks allow.

  Returns:
    [B, T, H, E] in the query's dtype; scores, softmax and sums are float32.

  Raises:
    ValueError: a window over keys without positions.
  """
  B, T, H, E = query_BTHE.shape
  K = parts[0].key.shape[1]
  query = query_BTHE.reshape(B, T, K, H // K, E) * (E**-0.5)
  query = query.transpose(0, 2, 3, 1, 4)
  parts = [_per_row(part) for part in parts]

  masks = [_mask(part, positions, window) for part in parts]
  scores = [_scores(query, part, mask) for part, mask in zip(parts, masks, strict=True)]
  scores = jnp.concatenate(scores, axis=-1)
  probs = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
  out, end = 0.0, 0
  for part in parts:
    start, end = end, end + part.key.shape[2]
    out += _weighted_values(probs[..., start:end], part)
  out = out.astype(query.dtype)
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)


def _per_row(part: Keys) -> Keys:
  """The part with an entry for every query row, where `rows` says which."""
  if part.rows is None:
    return part
  shards, rows = part.rows.shape

  def take(array):
    entries = array.reshape(shards, -1, *array.shape[1:])
    taken = jax.vmap(lambda entries, rows: entries[rows])(entries, part.rows)
    return taken.reshape(shards * rows, *array.shape[1:])

  taken = part._replace(rows=None)
  return Keys(*(None if array is None else take(array) for array in taken))


def _mask(part, positions_BT, window):
  """[C, B / C, T, S] or smaller: which query sees which key, the window counted in."""
  if window is None:
    return part.mask[:, None]
  if part.positions is None:
    raise ValueError(
      "This policy has a sliding window; give the positions of the keys in the cache"
      " (Keys.positions)."
    )
  C = part.positions.shape[0]
  query_positions = positions_BT.reshape(C, -1, positions_BT.shape[1], 1)
  distances = query_positions - part.positions[:, None, None]
  return part.mask[:, None] & (distances < window)


def _scores(query_BKRTE, part, mask):
  """[B, K, R, T, S]; rows that share an entry become one longer query."""
  B, K, R, T, E = query_BKRTE.shape
  C, _, S, _ = part.key.shape
  shared = B // C
  query = query_BKRTE.reshape(C, shared, K, R * T, E).swapaxes(1, 2)
  scores = jnp.einsum(
    "ckne,ckse->ckns",
    query.reshape(C, K, shared * R * T, E),
    part.key.astype(query.dtype),
    preferred_element_type=jnp.float32,
  )
  scores = scores.reshape(C, K, shared, R, T, S)
  scores = jnp.where(mask[:, None, :, None], scores, _MASKED)
  return scores.swapaxes(1, 2).reshape(B, K, R, T, S)


def _weighted_values(probs_BKRTS, part):
  B, K, R, T, S = probs_BKRTS.shape
  C, _, _, E = part.value.shape
  shared = B // C
  probs = probs_BKRTS.reshape(C, shared, K, R * T, S).swapaxes(1, 2)
  out = jnp.einsum(
    "ckns,ckse->ckne",
    probs.reshape(C, K, shared * R * T, S),
    part.value.astype(probs.dtype),
    preferred_element_type=jnp.float32,
  )
  return out.reshape(C, K, shared, R * T, E).swapaxes(1, 2).reshape(B, K, R, T, E)

"""Attention: one function, as an einsum over parts of a cache or by a flash kernel.

A decoded token attends to three parts: the prompt (cached once per group), its own
response so far (cached per row), and itself. Each part is a `Keys`. Scores of the parts
are concatenated, keys and values are not:

                 prompt             response          own column
    key          [G, K, P, E]       [B, K, S, E]      [B, K, 1, E]
    scores       . . . . . . . . .  . . . . . . . .   .               <- one softmax
    weights @ value, part by part, summed

The einsum is the reference. Where sequences attend only to themselves (prefill, the
learner), a kernel of `models/flash.py` may compute the same without storing scores.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opo_jax.models import flash

BACKENDS = ("einsum", *flash.KERNELS)
# The einsum stores the scores of at most this many queries at a time.
_BLOCK = 512
# Up to this length one tile of a kernel holds all scores of a head, and a kernel would
# pad a shorter sequence to it.
_SHORT = 128
# Far below any score, but finite: a query without any key (padding) averages all values
# uniformly. -inf would give NaN, which spreads through gradients although no loss reads
# the output.
_MASKED = -1e30


class Keys(NamedTuple):
  """One part of the keys and values, stored head-major, as matrix products read them.

  C is the number of entries. Query row b reads one of them:

      rows given      entry rows[shard, i] of the row's own shard
      C = B           entry b
      C < B           entry b // (B / C): a group of consecutive rows shares its prompt

  Attributes:
    key: [C, K, S, E].
    value: [C, K, S, E].
    mask: [C, T, S] or [C, 1, S] bool: which query may attend to which key. None: the
      queries' own columns, S = T, causal within a segment.
    rows: int32 [shards, B / shards], the entry of each query row, counted from the
      first entry of the row's own shard, so that no device reads another's.
    positions: [C, S] int32, required for a sliding window; own columns have those of
      the queries.
  """

  key: jax.Array
  value: jax.Array
  mask: jax.Array | None = None
  rows: jax.Array | None = None
  positions: jax.Array | None = None


def choose_backend(wish: str, *, platform: str, dtype: jnp.dtype, head_dim: int) -> str:
  """Chooses the backend for whole sequences.

  Args:
    wish: one of `BACKENDS`, or `auto`: splash on TPU, cuDNN on NVIDIA where dtype and
      width allow it, else the einsum.
    platform: `cpu`, `gpu` or `tpu`.
    dtype: of activations.
    head_dim: E.

  Raises:
    ValueError: a backend that this platform, dtype or width does not support.

  >>> choose_backend("auto", platform="tpu", dtype=jnp.bfloat16, head_dim=128)
  'splash'
  """
  name = wish
  if wish == "auto":
    name = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "einsum")
  narrow = jnp.dtype(dtype).itemsize == 2
  # Backend -> {requirement, as the error says it: whether it is met}.
  against = {
    "einsum": {},
    "splash": {f"runs on TPUs, not on a {platform}": platform == "tpu"},
    "cudnn": {
      f"runs on NVIDIA GPUs, not on a {platform}": platform == "gpu",
      f"takes bfloat16 (--model.dtype bfloat16), not {jnp.dtype(dtype)}": narrow,
      f"takes heads of a multiple of 8 up to 128, not of {head_dim}": (
        head_dim % 8 == 0 and head_dim <= 128
      ),
    },
  }
  if name not in against:
    raise ValueError(f"--model.attention has no {wish!r}; auto, {', '.join(BACKENDS)}.")
  unmet = [reason for reason, met in against[name].items() if not met]
  if not unmet:
    return name
  if wish == "auto":
    return "einsum"
  raise ValueError(f"--model.attention {wish} {unmet[0]}; use --model.attention auto.")


def attention(
  query_BTHE: jax.Array,
  parts: Sequence[Keys],
  *,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  window: int | None = None,
  windowed: jax.Array | None = None,
  backend: str = "einsum",
  mesh: Mesh | None = None,
) -> jax.Array:
  """`softmax(q k / sqrt(E)) v` over all parts together, with grouped queries.

  Args:
    query_BTHE: [B, T, H, E]; H is a multiple of the keys' K.
    parts: at least one.
    positions: [B, T] int32 of the queries, for a window. Within a segment they increase
      by one per column: kernels measure the window in columns.
    segment_ids: [B, T] int32: among the own columns, a query sees only its segment.
      None: one segment. Padding is a segment as well; it attends to itself, which keeps
      its output finite.
    window: a query sees keys less than this many positions back, itself included.
      None: as far back as the masks allow.
    windowed: bool scalar, whether the window applies, which may differ between the
      layers of one program. None: it does.
    backend: one of `BACKENDS`; a kernel runs only if the queries' own columns are the
      only part, and more than 128.
    mesh: each of its devices runs the kernel on its rows and heads.

  Returns:
    [B, T, H, E] in the query's dtype; scores, softmax and sums are float32.

  Raises:
    ValueError: a window over keys without positions.
  """
  own = len(parts) == 1 and parts[0].mask is None
  if backend != "einsum" and own and query_BTHE.shape[1] > _SHORT:
    return flash.attend(
      backend,
      query_BTHE,
      parts[0].key,
      parts[0].value,
      segment_ids,
      window=window,
      windowed=windowed,
      mesh=mesh,
    )
  # Layers are scanned as one program: a layer without a window has one that excludes no
  # key.
  if window is not None and windowed is not None:
    window = jnp.where(windowed, window, jnp.iinfo(jnp.int32).max)
  parts = [_per_row(part) for part in parts]
  queries = _Queries(
    query_BTHE,
    jnp.arange(query_BTHE.shape[1])[None],
    positions,
    segment_ids,
    [part.mask for part in parts],
  )
  own_columns = queries._replace(query=None, masks=None)

  def block(queries):
    masks = [
      _mask(part, mask, queries, own_columns, window)
      for part, mask in zip(parts, queries.masks, strict=True)
    ]
    return _attend(queries.query, parts, masks)

  return _in_blocks(block, queries)


class _Queries(NamedTuple):
  """A block of queries, with the arrays that decide which keys they see."""

  query: jax.Array  # [B, T, H, E]
  columns: jax.Array  # [1, T]
  positions: jax.Array | None  # [B, T]
  segment_ids: jax.Array | None  # [B, T]
  masks: list[jax.Array | None]  # one per part, [C, T, S], [C, 1, S] or None


def _in_blocks(block, queries):
  """Applies `block` to at most `_BLOCK` queries at a time.

  The scores [B, H, T, S] in float32 would be the largest array of a long batch. The
  backward pass recomputes those of each block.
  """
  T = queries.query.shape[1]
  num_blocks = -(-T // _BLOCK)
  if num_blocks == 1:
    return block(queries)
  size = -(-T // num_blocks)  # equal blocks: at most num_blocks - 1 queries of padding

  def split(array):  # [B, T, ...] -> [blocks, B, size, ...]
    if array.shape[1] == 1:  # the same for all queries
      return jnp.broadcast_to(array, (num_blocks, *array.shape))
    padding = [(0, 0), (0, num_blocks * size - T)] + [(0, 0)] * (array.ndim - 2)
    array = jnp.pad(array, padding)
    array = array.reshape(array.shape[0], num_blocks, size, *array.shape[2:])
    return array.swapaxes(0, 1)

  out = jax.lax.map(jax.checkpoint(block), jax.tree.map(split, queries))
  out = out.swapaxes(0, 1)
  return out.reshape(out.shape[0], num_blocks * size, *out.shape[3:])[:, :T]


def _attend(query_BTHE, parts, masks):
  B, T, H, E = query_BTHE.shape
  K = parts[0].key.shape[1]
  # Query head h reads key-value head h // (H / K): heads split into (K, R).
  query = query_BTHE.reshape(B, T, K, H // K, E) * (E**-0.5)
  query = query.transpose(0, 2, 3, 1, 4)  # [B, K, R, T, E], head-major like the keys
  scores = [_scores(query, part, mask) for part, mask in zip(parts, masks, strict=True)]
  scores = jnp.concatenate(scores, axis=-1)
  # Float32 up to here. Probabilities in the activations' dtype make the product with
  # the values a fast matmul, whose sums are float32 again.
  probs = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
  out, end = 0.0, 0  # end: the part's last column in the concatenated scores
  for part in parts:
    start, end = end, end + part.key.shape[2]
    out += _weighted_values(probs[..., start:end], part)
  out = out.astype(query.dtype)
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)


def _per_row(part: Keys) -> Keys:
  """Gathers the entry of every query row, if `rows` names them: C becomes B."""
  if part.rows is None:
    return part
  shards, rows = part.rows.shape

  def take(array):  # [C, ...] -> [B, ...], each shard from its own C / shards entries
    entries = array.reshape(shards, -1, *array.shape[1:])
    taken = jax.vmap(lambda entries, rows: entries[rows])(entries, part.rows)
    return taken.reshape(shards * rows, *array.shape[1:])

  taken = part._replace(rows=None)
  return Keys(*(None if array is None else take(array) for array in taken))


def _mask(part, mask, queries, own, window):
  """Which query sees which key: [C, B / C, T, S], or 1 in place of B / C.

  Own columns of one row, segment ids 1 1 2 2 0 (padding), T = S = 5:

              key  0 1 2 3 4
      query 0      x . . . .
            1      x x . . .
            2      . . x . .        causal, and within the segment
            3      . . x x .
            4      . . . . x        padding sees itself

  In a block of `_in_blocks` the queries are a part of the columns; `own` has all.
  """
  positions = part.positions
  if mask is None:
    mask, positions = queries.columns[..., None] >= own.columns[:, None], own.positions
    if queries.segment_ids is not None:
      mask &= queries.segment_ids[..., None] == own.segment_ids[:, None]
  if window is None:
    return mask[:, None]
  if positions is None:
    raise ValueError(
      "This policy has a sliding window; give the positions of the keys in the cache"
      " (Keys.positions)."
    )
  C = positions.shape[0]
  # [C, B / C, T, 1] - [C, 1, 1, S]: rows that share an entry differ in their positions.
  query_positions = queries.positions.reshape(C, -1, queries.positions.shape[1], 1)
  distances = query_positions - positions[:, None, None]
  return mask[:, None] & (distances < window)


def _scores(query_BKRTE, part, mask):
  """Scores [B, K, R, T, S].

  The B / C rows that share an entry become one query of (B / C) R T columns: one large
  matrix product with the entry's keys, instead of B small ones that each read them.
  """
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
  """The transpose of `_scores`: probabilities times values, [B, K, R, T, E]."""
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

"""Aggregation: per-token values -> a scalar, with one denominator per step."""

import jax
import jax.numpy as jnp

from opo_jax.losses.checks import check_name, check_numbers, trainable

AGGREGATIONS = (
  "token_mean",
  "sequence_mean_token_sum",
  "sequence_mean_token_mean",
  "constant",
)


def step_normalizer(
  mask: jax.Array, how: str, *, segment_ids: jax.Array | None = None
) -> jax.Array:
  """The denominator of `aggregate`: trainable tokens, or responses with any.

  Args:
    mask: [N, T] bool of the whole optimiser step, over all micro-batches and hosts.
    how: `token_mean` counts tokens; `sequence_mean_*` count responses with a token.
    segment_ids: [N, T] where rows are packed.

  Returns:
    float32 scalar, at least 1.

  Raises:
    ValueError: an unknown name, or `constant`, whose denominator the caller chooses.

  >>> import jax.numpy as jnp
  >>> mask = jnp.array([[True, True, False], [False, False, False]])
  >>> float(step_normalizer(mask, "token_mean"))
  2.0
  >>> float(step_normalizer(mask, "sequence_mean_token_mean"))  # one row has tokens
  1.0
  """
  check_name("aggregation", how, AGGREGATIONS)
  if how == "constant":
    raise ValueError(
      "aggregation 'constant' has no normalizer of its own; pass one (Dr. GRPO: rows x"
      " longest response)."
    )
  mask = trainable(mask, segment_ids)
  counted = mask if how == "token_mean" else sequence_sums(mask, segment_ids) > 0
  return jnp.maximum(counted.sum(dtype=jnp.float32), 1.0)


def aggregate(
  values: jax.Array,
  mask: jax.Array,
  how: str,
  *,
  normalizer: float | jax.Array | None = None,
  segment_ids: jax.Array | None = None,
) -> jax.Array:
  """Reduces per-token values to a scalar.

      token_mean                sum of all tokens / number of tokens  (DAPO)
      sequence_mean_token_sum   mean over responses of their sum
      sequence_mean_token_mean  mean over responses of their mean     (GRPO, GSPO)
      constant                  sum of all tokens / normalizer        (Dr. GRPO)

  Args:
    values: [N, T]; not read where `mask` is False.
    mask: [N, T] bool.
    how: one of `AGGREGATIONS`.
    normalizer: the denominator, if these rows are a part of the step.
    segment_ids: [N, T] where rows are packed.

  Returns:
    float32 scalar; 0 for an empty mask.

  Raises:
    ValueError: an unknown name, shapes that differ, `constant` without a normalizer,
      or a plain number of 0 or less for it.

  >>> import jax.numpy as jnp
  >>> values = jnp.array([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]])
  >>> mask = jnp.array([[True, True, True], [True, False, False]])
  >>> float(aggregate(values, mask, "token_mean"))
  3.0
  >>> float(aggregate(values, mask, "sequence_mean_token_mean"))
  4.0
  """
  check_name("aggregation", how, AGGREGATIONS)
  mask = trainable(mask, segment_ids, values=values)
  check_numbers(normalizer=normalizer)
  if normalizer is None:
    normalizer = step_normalizer(mask, how, segment_ids=segment_ids)
  values = jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0)
  if how == "sequence_mean_token_mean":
    values = values / sequence_lengths(mask, segment_ids)
  return values.sum() / normalizer


def sequence_sums(values, segment_ids):
  """Sums over each response: [N, 1], or [N, T + 1] by segment id."""
  values = jnp.asarray(values, jnp.float32)
  if segment_ids is None:
    return values.sum(-1, keepdims=True)
  # A segment has at least one token, so that ids 1, 2, ... never exceed T.
  num_segments = values.shape[1] + 1
  return jax.vmap(lambda v, i: jax.ops.segment_sum(v, i, num_segments))(
    values, segment_ids
  )


def to_tokens(sums, segment_ids):
  """Broadcasts `sequence_sums` to the tokens: an array that broadcasts to [N, T]."""
  if segment_ids is None:
    return sums
  return jnp.take_along_axis(sums, segment_ids, axis=1, mode="clip")


def sequence_lengths(mask, segment_ids):
  """The number of trainable tokens of each token's response, at least 1."""
  return jnp.maximum(to_tokens(sequence_sums(mask, segment_ids), segment_ids), 1.0)

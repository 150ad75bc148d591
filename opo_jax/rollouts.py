"""Rollouts: what was sampled, exactly as it was sampled.

The one type that crosses rooms. Tokens stay tokens (nothing is decoded and tokenised
again), and the mask is written by the sampler when it draws a token: nobody derives it
later from pad or end ids.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
  """N responses to G prompts.

  Attributes:
    prompts: [G, P] int32, right-aligned: column P - 1 is a prompt's last token.
    prompt_lengths: [G] int32.
    tokens: [N, T] int32 responses, left-aligned, the end token included.
    logprobs: [N, T] float32, of the policy at `temperature`, which is what the learner
      computes again. 0 where `mask` is False.
    sampling_logprobs: [N, T] float32, of the distribution that was drawn from: after
      top-k, top-p and min-p, too. The same as `logprobs` unless `filtered`.
    mask: [N, T] bool: this token was drawn from the policy.
    lengths: [N] int32, the drawn tokens of a row.
    prompt_ids: [N] int32, the prompt a row answers: its group.
    finished: [N] bool: the row ended by an end token, not by the length limit.
    temperature: float32 scalar, the sampler's; the learner divides by the same.
    version: int32 scalar, the policy version that sampled (-1: none, demonstrations).
    filtered: whether greedy choice or a filter left tokens out. Such rollouts are no
      samples of the policy.
  """

  prompts: jax.Array
  prompt_lengths: jax.Array
  tokens: jax.Array
  logprobs: jax.Array
  sampling_logprobs: jax.Array
  mask: jax.Array
  lengths: jax.Array
  prompt_ids: jax.Array
  finished: jax.Array
  temperature: jax.Array
  version: jax.Array
  filtered: bool = dataclasses.field(default=False, metadata={"static": True})

  @property
  def num_groups(self) -> int:
    return self.prompts.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """The learner's view: prompt and response in one row of P + T columns.

  Attributes:
    tokens: [N, P + T] int32; the response starts at column P in every row.
    positions: [N, P + T] int32, 0 at the prompt's first token.
    segment_ids: [N, P + T] int32, 0 marks padding.
  """

  tokens: jax.Array
  positions: jax.Array
  segment_ids: jax.Array


def prompt_columns(
  prompt_lengths: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
  """Positions and segment ids of right-aligned prompts: two arrays [G, width]."""
  offset = width - prompt_lengths[:, None]
  positions = jnp.arange(width) - offset
  return jnp.maximum(positions, 0), (positions >= 0).astype(jnp.int32)


def rows(rollouts: Rollouts) -> Rows:
  """Joins each response to its prompt."""
  prompt_width, num_tokens = rollouts.prompts.shape[1], rollouts.tokens.shape[1]
  positions, segment_ids = prompt_columns(rollouts.prompt_lengths, prompt_width)
  ids = rollouts.prompt_ids
  response_positions = rollouts.prompt_lengths[ids][:, None] + jnp.arange(num_tokens)
  return Rows(
    tokens=jnp.concatenate([rollouts.prompts[ids], rollouts.tokens], axis=1),
    positions=jnp.concatenate([positions[ids], response_positions], axis=1),
    segment_ids=jnp.concatenate(
      [segment_ids[ids], rollouts.mask.astype(jnp.int32)], axis=1
    ),
  )


def select(rollouts: Rollouts, indices: jax.Array) -> Rollouts:
  """The rows `indices` [n], with all prompts, so that group ids keep their meaning."""
  per_row = ("tokens", "logprobs", "sampling_logprobs", "mask", "lengths")
  per_row += ("prompt_ids", "finished")
  return dataclasses.replace(
    rollouts, **{name: getattr(rollouts, name)[indices] for name in per_row}
  )

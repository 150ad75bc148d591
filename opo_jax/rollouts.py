"""Rollouts: the sampled responses, as sampler, scorer and learner exchange them.

Tokens stay tokens: no text is tokenised again. The sampler writes the mask when it
samples a token; no module derives it from pad or end ids, which may be equal.

    prompts [G, P], right-aligned      tokens [N, T], left-aligned
    0 0 p p p                          y y y e 0 0        prompt_ids[row] = 0, length 4
    p p p p p                          y y y y y y        prompt_ids[row] = 1, length 6

`rows` joins both into [N, P + T], in which every response starts at column P:

    tokens        0 0 p p p y y y e 0 0
    positions     0 0 0 1 2 3 4 5 6 7 8
    segment ids   0 0 1 1 1 1 1 1 1 0 0
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
  """N responses to G prompts. A group is the responses to one prompt.

  Attributes:
    prompts: [G, P] int32, right-aligned: column P - 1 is a prompt's last token.
    prompt_lengths: [G] int32.
    tokens: [N, T] int32 responses, left-aligned, the end token included.
    logprobs: [N, T] float32, under the policy at `temperature`, as the learner
      recomputes them. 0 where `mask` is False.
    sampling_logprobs: [N, T] float32, under the distribution that tokens were sampled
      from, after top-k, top-p and min-p. Equal to `logprobs` unless `filtered`.
    mask: [N, T] bool: this token was sampled from the policy.
    lengths: [N] int32, the sampled tokens of a row.
    prompt_ids: [N] int32, the prompt of a row: its group.
    finished: [N] bool: the row ended with an end token, not at the length limit.
    temperature: float32 scalar, the sampler's; the learner divides logits by the same.
    version: int32 scalar, the policy version that sampled (-1: none, demonstrations).
    filtered: whether greedy sampling or a filter excluded tokens. Such rollouts are not
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
  """Prompt and response joined in one row of P + T columns.

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
  """Joins each response to its prompt; see the drawing at the top of the module."""
  prompt_width, num_tokens = rollouts.prompts.shape[1], rollouts.tokens.shape[1]
  positions, segment_ids = prompt_columns(rollouts.prompt_lengths, prompt_width)
  # Positions go on after the prompt's last token, whatever its padding on the left.
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
  """Selects the rows `indices` [n], with all prompts: prompt ids stay valid."""
  per_row = ("tokens", "logprobs", "sampling_logprobs", "mask", "lengths")
  per_row += ("prompt_ids", "finished")
  return dataclasses.replace(
    rollouts, **{name: getattr(rollouts, name)[indices] for name in per_row}
  )

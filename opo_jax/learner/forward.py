"""The learner's forward pass: packed rows -> the log-prob of every response token.

`gather` fetches the tokens that a `packing.Layout` points to, `batch_stats` runs the
policy on them. `token_stats` does the same for rows that are not packed (one response a
row), for whoever measures a policy besides training it.

Shape letters, as in `opo_jax/__init__.py`: a micro-batch has B packed rows of
W columns, of which U hold response tokens and reach the unembedding, and C prompts,
each in front of B / C consecutive rows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opo_jax import losses
from opo_jax.devices import sharding
from opo_jax.learner.packing import Layout
from opo_jax.logprobs import TokenStats, linear_logprobs
from opo_jax.models.attention import Keys
from opo_jax.rollouts import Rollouts, Rows, prompt_columns, rows, select


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
  """A micro-batch: packed rows, and what the loss needs of their U targets.

  Attributes:
    prompts: [C, P], each computed once for B / C consecutive rows; None: each response
      has a copy of its prompt in its row.
    rows: [B, W].
    columns: [B, U] column of each target in its row; None: U is W, every column is one.
    follows_prompt: [B, U] bool, the first token of a response.
    tokens: [B, U].
    logprobs: [B, U] of the policy, as the sampler computed them.
    sampling_logprobs: [B, U] of the distribution that the tokens were sampled from.
    mask: [B, U] bool, trainable.
    advantages: [B, U].
    segment_ids: [B, U].
  """

  prompts: Rows | None
  rows: Rows
  columns: jax.Array | None
  follows_prompt: jax.Array
  tokens: jax.Array
  logprobs: jax.Array
  sampling_logprobs: jax.Array
  mask: jax.Array
  advantages: jax.Array
  segment_ids: jax.Array


def gather(
  rollouts: Rollouts, advantages: jax.Array, layout: Layout, mesh: Mesh | None
) -> PackedBatch:
  """The tokens of one micro-batch, where its layout puts them.

  Args:
    rollouts: N rows.
    advantages: [N].
    layout: of this micro-batch, without the leading axes.
    mesh: the rows are split over its batch axes.
  """
  ids_BW, offsets_BW, segment_ids_BW = (
    layout.rollouts,
    layout.offsets,
    layout.segment_ids,
  )
  groups_BW = rollouts.prompt_ids[ids_BW]
  tokens_BW = rollouts.tokens[ids_BW, jnp.maximum(offsets_BW, 0)]
  # A response goes on where its own prompt ended, whatever lies before it in the row.
  positions_BW = rollouts.prompt_lengths[groups_BW] + offsets_BW
  if layout.prompts is None:
    # Prompts are right-aligned: offset -1, the last prompt token, is column -1.
    prompt_tokens_BW = rollouts.prompts[groups_BW, jnp.minimum(offsets_BW, -1)]
    tokens_BW = jnp.where(offsets_BW < 0, prompt_tokens_BW, tokens_BW)
    prompts = None
  else:
    lengths_C = rollouts.prompt_lengths[layout.prompts]
    prompts_CP = rollouts.prompts[layout.prompts]
    prompts = Rows(prompts_CP, *prompt_columns(lengths_C, prompts_CP.shape[1]))

  def targets(array_BW):
    if layout.columns is None:
      return array_BW
    return jnp.take_along_axis(array_BW, layout.columns, axis=1)

  ids_BU, offsets_BU = targets(ids_BW), targets(offsets_BW)
  segment_ids_BU = targets(segment_ids_BW)
  place = ids_BU, jnp.maximum(offsets_BU, 0)
  batch = PackedBatch(
    prompts=prompts,
    rows=Rows(tokens_BW, positions_BW, segment_ids_BW),
    columns=layout.columns,
    follows_prompt=offsets_BU == 0,
    tokens=targets(tokens_BW),
    logprobs=rollouts.logprobs[place],
    sampling_logprobs=rollouts.sampling_logprobs[place],
    # Padding points at rollout 0, offset 0, and prompt columns at offset 0 of theirs.
    mask=rollouts.mask[place] & (segment_ids_BU > 0) & (offsets_BU >= 0),
    advantages=advantages[ids_BU],
    segment_ids=segment_ids_BU,
  )
  return jax.tree.map(
    lambda array: sharding.constrain(array, mesh, "batch", None), batch
  )


def batch_stats(
  policy: Any, batch: PackedBatch, temperature: jax.Array, remat: str
) -> TokenStats:
  """Log-prob, entropy and energy of each target under the policy: arrays [B, U]."""
  rows, prompts = batch.rows, batch.prompts
  cache = ()
  if prompts:
    with jax.named_scope("prompts"):
      ends_CPD, (keys, values) = policy.hidden(
        prompts.tokens, prompts.positions, prompts.segment_ids, remat=remat
      )
    seen = (prompts.segment_ids > 0)[:, None]
    cache = (Keys(keys, values, seen, positions=prompts.positions),)
  with jax.named_scope("forward"):
    hidden_BWD, _ = policy.hidden(
      rows.tokens, rows.positions, rows.segment_ids, cache=cache, remat=remat
    )
    # The hidden state that predicts a token is that of the column before it, or, for
    # the first token of a response, that of the end of its prompt:
    #
    #     column        0    1    2    3    4
    #     token         a0   a1   a2   b0   b1        two responses a, b to one prompt
    #     hidden of     end  a0   a1   end  b0        shared
    if prompts:
      end_B1D = jnp.repeat(
        ends_CPD[:, -1:], hidden_BWD.shape[0] // ends_CPD.shape[0], axis=0
      )
      hidden_BUD = jnp.concatenate([end_B1D, hidden_BWD[:, :-1]], axis=1)
      hidden_BUD = jnp.where(batch.follows_prompt[..., None], end_B1D, hidden_BUD)
    else:
      # Repeated: the column before a response holds the end of its prompt already.
      before_BU = jnp.maximum(batch.columns - 1, 0)
      hidden_BUD = jnp.take_along_axis(hidden_BWD, before_BU[..., None], axis=1)
  return _logprobs(policy, hidden_BUD, batch.tokens, temperature)


def token_stats(
  policy: Any, rows: Rows, tokens: jax.Array, temperature: jax.Array | float
) -> TokenStats:
  """Log-prob, entropy and energy of response tokens, one response a row: [N, T].

  Args:
    policy: with `hidden`, `unembedding` and `mesh`.
    rows: [N, P + T], as `rollouts.rows` joins them.
    tokens: [N, T] of the responses.
    temperature: the sampler's.
  """
  with jax.named_scope("forward"):
    hidden, _ = policy.hidden(rows.tokens, rows.positions, rows.segment_ids)
  # A column predicts the next one, and responses start at column P.
  start = rows.tokens.shape[1] - tokens.shape[1] - 1
  return _logprobs(policy, hidden[:, start:-1], tokens, temperature)


def _logprobs(policy, hidden, tokens, temperature) -> TokenStats:
  with jax.named_scope("logprobs"):
    return linear_logprobs(
      hidden,
      policy.unembedding,
      tokens,
      temperature=temperature,
      vocab_shards=1 if policy.mesh is None else policy.mesh.shape["tensor"],
    )


@jax.jit
def response_logprobs(policy: Any, rollouts: Rollouts) -> jax.Array:
  """log pi(token) of the rollouts under `policy`, at their temperature: [N, T]."""
  stats = token_stats(policy, rows(rollouts), rollouts.tokens, rollouts.temperature)
  return jnp.where(rollouts.mask, stats.logprob, 0.0)


@functools.partial(jax.jit, static_argnames="micro_batch_tokens")
def kl_to_start(
  start_policy: Any,
  rollouts: Rollouts,
  indices: jax.Array,
  *,
  micro_batch_tokens: int = 0,
) -> jax.Array:
  """Mean k1 estimate of KL(policy || start) per response token, in nats.

  k1, not k3: far from the start policy, k3 weighs a token that the policy rarely
  samples and the start policy preferred by `start / policy`, and a single such token
  outweighs all others.

  Args:
    start_policy: the policy before training.
    rollouts: the policy's, with the log-probs that its sampler recorded.
    indices: [n] the rows to measure, the same number for each shard of the batch.
    micro_batch_tokens: bound on the tokens computed at a time (at least one row a
      shard), over all devices, padding included; 0: all at once.
  """
  shards = sharding.batch_shards(start_policy.mesh)
  row_tokens = rollouts.prompts.shape[1] + rollouts.tokens.shape[1]
  rows_per_shard = most_rows = len(indices) // shards
  if micro_batch_tokens:
    most_rows = max(micro_batch_tokens // (row_tokens * shards), 1)
  # The fewest equal parts of at most `most_rows` rows a shard.
  num_parts = next(
    n
    for n in range(1, rows_per_shard + 1)
    if rows_per_shard / n <= most_rows and rows_per_shard % n == 0
  )

  def logprobs_of(part):
    return response_logprobs(start_policy, select(rollouts, part))

  reference = jax.lax.map(logprobs_of, indices.reshape(num_parts, -1))
  rollouts = select(rollouts, indices)
  reference = reference.reshape(rollouts.tokens.shape)
  per_token = losses.kl(rollouts.logprobs, reference, rollouts.mask, estimator="k1")
  return losses.aggregate(per_token, rollouts.mask, "token_mean")

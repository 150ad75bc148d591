"""Decoding: the jitted loop that samples, token by token.

    prompts ── prefill, once each ──▶ keys and values of the prompts
    queue of rows ──▶ slots: sample a token, record it, run the model ──▶ responses
            ▲           │
            └───────────┘ a response ended: its slot takes the next row

A row is one response of `Rollouts`; a slot is a place of the decode batch. When a
response ends, the jitted loop refills its slot in the same iteration: nothing is
recompiled, and no slot waits for the others.

Keys and values of a slot lie in a ring of columns. In every iteration all slots write
the same column, and a slot attends to as many of the last columns as its response is
long. A refilled slot starts again at length 0, so nothing is cleared. With a ring of 8
columns, before iteration 11, which will write column 11 % 8 = 3:

    column             0   1   2   3   4   5   6   7
    written in         8   9  10   3   4   5   6   7    iteration
    age                2   1   0   7   6   5   4   3    0: the last one written
    slot 0, length 6   x   x   x   .   .   x   x   x    reads ages 0 to 5
    slot 1, length 1   .   .   x   .   .   .   .   .    refilled in iteration 9
    slot 2, length 0   .   .   .   .   .   .   .   .    refilled in iteration 10

Each slot also attends to its prompt's keys and to the token being processed itself.

The loop stops only when its shapes should change (`schedule`): the ring doubles when a
response outgrows it and halves when the long responses have ended; when the queue is
empty and most slots are idle, the busy ones move together.

Each shard of the batch has its own prompts, queue and slots, so that only a few scalars
cross the shards while they decode.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opo_jax.devices import sharding
from opo_jax.models.attention import Keys
from opo_jax.models.transformer import Policy
from opo_jax.rollouts import prompt_columns
from opo_jax.sampler import schedule
from opo_jax.sampler.params import SamplingParams
from opo_jax.sampler.state import (
  Ended,
  Prompts,
  Queue,
  Responses,
  Slots,
  by_shard,
  prompt_of,
  take,
)
from opo_jax.sampler.tokens import sample_token


@functools.partial(jax.jit, static_argnames="in_groups", donate_argnums=(0, 1))
def decode(
  slots: Slots,
  responses: Responses,
  policy: Policy,
  prompts: Prompts,
  queue: Queue,
  params: SamplingParams,
  steps: jax.Array,
  in_groups: bool,
) -> tuple[Slots, Responses, tuple[jax.Array, jax.Array, jax.Array]]:
  """Decodes until shapes should change, all rows have ended, or `steps` are over.

  Args:
    slots, responses: donated.
    steps: iterations, at most.
    in_groups: slot i samples row i, or did before it was idle. The slots of a group are
      then contiguous and read their prompt's keys once for all of them.

  Returns:
    slots, responses, and three scalars: the busy slots of the busiest shard, the
    longest response in progress, whether any queue has rows left.
  """
  prompt_positions_GP, prompt_segments_GP = prompt_columns(
    prompts.lengths, prompts.keys.shape[3]
  )
  prompt_keys = Keys(
    prompts.keys,
    prompts.values,
    (prompt_segments_GP > 0)[:, None],
    positions=prompt_positions_GP,
  )
  last = slots.step + steps

  def goes_on(carry):
    slots, _ = carry
    return _goes_on(slots, queue, params) & (slots.step < last)

  def decode_token(carry):
    slots, responses = carry
    draw = _draw(slots, policy, queue, params)
    responses = _record(responses, slots, draw)
    hidden_BD, column = _run_model(
      draw.token, slots, policy, prompts, prompt_keys, params, in_groups
    )
    slots = _advance(slots, draw, hidden_BD, column, prompts, queue, params)
    return slots, responses

  with jax.named_scope("decode"):
    slots, responses = jax.lax.while_loop(goes_on, decode_token, (slots, responses))
  return slots, responses, _progress(slots, queue)


def _progress(slots, queue):
  """Busy slots of the busiest shard, longest response, whether a queue has rows."""
  busy = by_shard(slots.row >= 0, queue.counts.shape[0]).sum(-1).max()
  return busy, slots.length.max(), (slots.next_row < queue.counts).any()


def _goes_on(slots, queue, params):
  """Whether rows are left, and the shapes still fit them."""
  width, shards = slots.keys.shape[3], queue.counts.shape[0]
  num_slots, max_new_tokens = slots.row.shape[0] // shards, params.max_new_tokens
  busy, longest, waiting = _progress(slots, queue)
  resize = (longest >= width) & (max_new_tokens > width)
  resize |= schedule.too_wide(longest, width)
  resize |= ~waiting & schedule.mostly_idle(busy, num_slots, max_new_tokens)
  return (busy > 0) & ~resize


class _Draw(NamedTuple):
  """The next token of every slot; of idle slots 0, and never recorded."""

  token: jax.Array  # [B]
  logprob: jax.Array  # [B]
  sampling_logprob: jax.Array | None  # [B]
  recent: jax.Array  # [B, M], this token the last of them
  ended: jax.Array  # [B] by an end token or a stop sequence
  done: jax.Array  # [B] ended, or cut off at the limit


def _draw(slots, policy, queue, params):
  """Samples the next token of every slot, and finds the responses that it ends."""
  shards = queue.counts.shape[0]
  busy_B, row_B = slots.row >= 0, jnp.maximum(slots.row, 0)
  # The key depends on the row and on the token's position in the response only.
  keys_B = jax.vmap(jax.random.fold_in)(take(queue.keys, row_B, shards), slots.length)
  token_B, logprob_B, sampling_logprob_B = sample_token(
    policy.project(slots.hidden), keys_B, params
  )
  token_B = jnp.where(busy_B, token_B, 0)
  recent_BM = jnp.concatenate([slots.recent, token_B[:, None]], axis=1)[:, 1:]
  ended_B = busy_B & _ends(token_B, recent_BM, params)
  done_B = ended_B | (slots.length + 1 >= take(queue.limits, row_B, shards))
  return _Draw(token_B, logprob_B, sampling_logprob_B, recent_BM, ended_B, done_B)


def _ends(token_B, recent_BM, params):
  """Whether a response ends with this token."""
  ends_B = (token_B[:, None] == jnp.array(params.eos_ids, jnp.int32)).any(-1)
  for sequence in params.stop:
    tail = recent_BM[:, recent_BM.shape[1] - len(sequence) :]
    ends_B |= (tail == jnp.array(sequence)).all(-1)
  return ends_B


def _record(responses, slots, draw):
  """Writes the token of every busy slot into its row, at column `length`."""
  shards = slots.next_row.shape[0]

  def write(array, values_B, *columns_B):
    def write_shard(array, rows, values, *columns):
      rows = jnp.where(rows < 0, array.shape[0], rows)  # idle: out of range, dropped
      return array.at[(rows, *columns)].set(values, mode="drop", unique_indices=True)

    parts = (by_shard(x, shards) for x in (array, slots.row, values_B, *columns_B))
    return jax.vmap(write_shard)(*parts).reshape(array.shape)

  sampling_logprobs = responses.sampling_logprobs
  if sampling_logprobs is not None:
    sampling_logprobs = write(sampling_logprobs, draw.sampling_logprob, slots.length)
  return Responses(
    tokens=write(responses.tokens, draw.token, slots.length),
    logprobs=write(responses.logprobs, draw.logprob, slots.length),
    sampling_logprobs=sampling_logprobs,
    lengths=write(responses.lengths, slots.length + 1),
    finished=write(responses.finished, draw.ended),
  )


def _run_model(token_B, slots, policy, prompts, prompt_keys, params, in_groups):
  """Runs the model on one token of every slot.

  Returns:
    hidden [B, D], which predicts the next token; the token's keys and values, each
    [L, B, K, 1, E] in the cache's dtype.
  """
  (shards,), B, S = slots.next_row.shape, slots.row.shape[0], slots.keys.shape[3]
  prompt_B = prompt_of(slots.row, params)
  # Columns by age, as drawn at the top of this module: a response of t tokens reads the
  # ages below t, and its last token, of age 0, is one position before this one.
  age_S = (slots.step - 1 - jnp.arange(S)) % S
  position_B1 = (take(prompts.lengths, prompt_B, shards) + slots.length)[:, None]
  response_keys = Keys(
    slots.keys,
    slots.values,
    (age_S < slots.length[:, None])[:, None],
    positions=position_B1 - 1 - age_S,
  )
  rows = None if in_groups else prompt_B.reshape(shards, B // shards)
  hidden_B1D, column = policy.hidden(
    token_B[:, None],
    position_B1,
    cache=(prompt_keys._replace(rows=rows), response_keys),
  )
  return hidden_B1D[:, 0], tuple(x.astype(slots.keys.dtype) for x in column)


def _advance(slots, draw, hidden_BD, column, prompts, queue, params):
  """The slots of the next iteration: one token longer, or refilled from the queue."""
  shards = queue.counts.shape[0]
  # The model's scan over layers only read the ring. The new column is written into the
  # donated buffers here, in place: a scan that updated the ring would copy it.
  key, value = column
  at = (0, 0, 0, slots.step % slots.keys.shape[3], 0)
  fresh_B = draw.done | (slots.row < 0)
  row_B, next_row = _refill(slots, queue, fresh_B)
  first_hidden_BD = take(prompts.hidden, prompt_of(row_B, params), shards)
  return Slots(
    step=slots.step + 1,
    row=row_B,
    length=jnp.where(fresh_B, 0, slots.length + 1),
    hidden=jnp.where(fresh_B[:, None], first_hidden_BD, hidden_BD),
    keys=jax.lax.dynamic_update_slice(slots.keys, key, at),
    values=jax.lax.dynamic_update_slice(slots.values, value, at),
    recent=jnp.where(fresh_B[:, None], -1, draw.recent),
    next_row=next_row,
  )


def _refill(slots, queue, free_B):
  """Gives free slots the next rows of their shard's queue, as far as it has any.

  A shard with 6 rows, of which slots have taken 5 (`next_row`):

      row now          3   1   4   2
      free             .   x   .   x      rows 1 and 2 have ended
      row then         3   5   4  -1      row 5 is the last; the other slot is idle

  Returns:
    row [B], next_row [shards].
  """
  shards = queue.counts.shape[0]
  free = by_shard(free_B, shards)
  row = slots.next_row[:, None] + jnp.cumsum(free, axis=1, dtype=jnp.int32) - 1
  row = jnp.where(row < queue.counts[:, None], row, -1)
  row = jnp.where(free, row, by_shard(slots.row, shards))
  taken = free.sum(axis=1, dtype=jnp.int32)
  next_row = jnp.minimum(slots.next_row + taken, queue.counts)
  return row.reshape(-1), next_row


# --- between two decode loops --------------------------------------------------------


@functools.partial(
  jax.jit, static_argnames=("samples_per_prompt", "mesh", "most"), donate_argnums=2
)
def ended(
  slots: Slots,
  responses: Responses,
  reported_N: jax.Array,
  row_N: jax.Array,
  samples_per_prompt: int,
  mesh: Mesh | None,
  most: int,
) -> tuple[jax.Array, Ended]:
  """At most `most` responses that have ended and were not reported before.

  Args:
    slots, responses: of `decode`.
    reported_N: [N] bool, donated.
    row_N: [N] the row in Rollouts of each of the shards' rows; -1: padding.

  Returns:
    reported_N with the new ones; `Ended`, replicated over the devices.
  """
  (shards,), N = slots.next_row.shape, reported_N.shape[0]

  def taken_and_left(row, next_row):
    """Of a shard's rows: taken from the queue, and in no slot any more."""
    index = jnp.arange(N // shards)
    return (index < next_row) & (index[:, None] != row).all(1)

  ended_N = jax.vmap(taken_and_left)(by_shard(slots.row, shards), slots.next_row)
  new_N = ended_N.reshape(-1) & ~reported_N & (row_N >= 0)
  (chosen,) = jnp.nonzero(new_N, size=most, fill_value=N)
  reported_N = reported_N.at[chosen].set(True, mode="drop")
  rows = row_N.at[chosen].get(mode="fill", fill_value=-1)
  chosen = jnp.minimum(chosen, N - 1)
  reported = Ended(
    rows=rows,
    prompt_ids=jnp.maximum(rows, 0) // samples_per_prompt,
    tokens=responses.tokens[chosen],
    lengths=responses.lengths[chosen],
    finished=responses.finished[chosen],
  )
  return reported_N, jax.tree.map(
    lambda x: sharding.constrain(x, mesh, *(None,) * x.ndim), reported
  )


@functools.partial(jax.jit, static_argnames=("num_slots", "width"))
def resize(slots: Slots, num_slots: int, width: int) -> Slots:
  """The same responses in another number of slots, or of columns of the ring.

  Args:
    num_slots: of a shard; its busy slots fit. They move to the front, in their order:

        row before    -1   7  -1  -1   4  -1      6 slots
        row after      7   4                      2 slots
    width: columns.
  """
  shards = slots.next_row.shape[0]
  slots = _resize_ring(slots, width)
  if num_slots * shards == slots.row.shape[0]:
    return slots

  idle = (slots.row < 0).reshape(shards, -1)
  chosen = jnp.argsort(idle, axis=1, stable=True)[:, :num_slots].reshape(-1)

  def move(array):
    return take(array, chosen, shards)

  return Slots(
    step=slots.step,
    row=move(slots.row),
    length=move(slots.length),
    hidden=move(slots.hidden),
    keys=jax.vmap(move)(slots.keys),
    values=jax.vmap(move)(slots.values),
    recent=move(slots.recent),
    next_row=slots.next_row,
  )


def _resize_ring(slots, width):
  """Moves every iteration's column to where a ring of `width` columns has it.

  Iteration i lies in column i % 4 of a ring of 4, and in column i % 8 of one of 8.
  Before iteration 6, doubled:

      old column            0   1   2   3
      iteration             4   5   2   3

      new column            0   1   2   3   4   5   6   7
      iteration it is for   0   1   2   3   4   5  -2  -1    the last one <= 5
      taken from, mod 4     0   1   2   3   0   1   2   3
      which holds           4!  5!  2   3   4   5   2!  3!

  A column marked ! holds another iteration than it is for. Its age, 4 to 7, is at least
  the old width, and no response is longer than that: it is never attended to. A ring
  that shrinks keeps the newest columns.
  """
  S = slots.keys.shape[3]
  if width == S:
    return slots
  iteration = slots.step - 1 - (slots.step - 1 - jnp.arange(width)) % width
  keys, values = (
    jnp.take(x, iteration % S, axis=3) for x in (slots.keys, slots.values)
  )
  return dataclasses.replace(slots, keys=keys, values=values)

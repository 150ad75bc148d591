"""Which tokens an update computes, and where each of them lies.

A rollout whose advantage is exactly zero has no gradient and is left out. The others
lie in rows, several responses to a row where they fit:

    shared     prompt 1 <- [ response a | response b ] [ response c      ]
               prompt 2 <- [ response d              ] [                 ]
    repeated   [ prompt 1 | response a | prompt 2 | response d ]
               [ prompt 1 | response b | prompt 1 | response c ]

*Shared*: a row holds responses of one group, and attends to the keys of its prompt,
which are computed once for some consecutive rows. *Repeated*: each response stands
behind a copy of its prompt, and a row may hold several groups; this is all that an
attention kernel with segment ids asks for.

Planned on the host, in NumPy, from a few numbers per rollout: what comes out are index
arrays, by which the device gathers tokens and log-probs. Their sizes come from short
ladders, so that a run compiles a few programs; how many micro-batches hold something is
no size at all.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np


class Layout(NamedTuple):
  """Where tokens lie; every array has leading axes [optimiser steps, micro-batches].

  Attributes:
    prompts: [E] the prompts that are computed, each for R / E consecutive rows; None
      where they are repeated.
    rollouts: [R, W] whose token a column holds.
    offsets: [R, W] which one: 0 is the first of the response, negative ones count
      from the end of the prompt.
    segment_ids: [R, W] a response is 1, 2, ... in its row; 0 is padding.
    columns: [R, C] which columns hold responses, 0 where there are no more; None with
      shared prompts, where all do.
  """

  prompts: Any
  rollouts: Any
  offsets: Any
  segment_ids: Any
  columns: Any


class Plan(NamedTuple):
  """What one update computes.

  Attributes:
    layout: of its rows.
    micro_batches: [optimiser steps] how many of them hold anything.
    left_out: [N] bool, rollouts that count and are not computed.
    tokens: that go through the model, padding and copies of prompts included.
    tokens_with_gradient: response tokens among them whose advantage is not zero.
    counted: rollouts that count.
    pruned: those of them without a gradient.
  """

  layout: Layout
  micro_batches: np.ndarray
  left_out: np.ndarray
  tokens: int
  tokens_with_gradient: int
  counted: int
  pruned: int


def plan(
  last_token: np.ndarray,
  has_gradient: np.ndarray,
  prompt_ids: np.ndarray,
  prompt_lengths: np.ndarray,
  *,
  prompt_width: int,
  response_width: int,
  share_prompts: bool,
  steps: int = 1,
  shards: int = 1,
  micro_batch_tokens: int = 0,
  pack: bool = True,
) -> Plan:
  """Lays out the rollouts that have a gradient.

  Where none has one, a single rollout is computed all the same, so that the gap between
  sampler and learner is measured in every step.

  Args:
    last_token: [N] columns of a response up to and including its last trainable token;
      0: the rollout does not count.
    has_gradient: [N] bool; False leaves a rollout out.
    prompt_ids: [N] the prompt, that is the group, of a rollout.
    prompt_lengths: [G].
    prompt_width, response_width: P and T of the rollouts.
    share_prompts: compute a prompt once for its rows; False repeats it before each
      response.
    steps: optimiser steps; each takes the groups of an equal share of the prompts.
    shards: entries of a micro-batch are a multiple of it (an entry is a prompt and its
      rows, or a row).
    micro_batch_tokens: what a micro-batch computes at most (one entry a shard at
      least); 0: all in one.
    pack: False gives each response a row of the full width.

  Returns:
    The plan of least tokens.

  >>> last_token, signal = np.array([3, 5, 2, 4]), np.array([True, True, True, False])
  >>> made = plan(last_token, signal, np.array([0, 0, 1, 1]), np.array([2, 3]),
  ...   prompt_width=4, response_width=8, share_prompts=True)
  >>> made.layout.rollouts[0, 0].tolist(), made.layout.prompts[0, 0].tolist()
  ([[0, 0, 0, 1, 1, 1, 1, 1], [2, 2, 0, 0, 0, 0, 0, 0]], [0, 1])
  >>> made.layout.segment_ids[0, 0].tolist()
  [[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 0, 0, 0, 0, 0, 0]]
  >>> made.tokens, made.tokens_with_gradient, made.left_out.tolist()
  (24, 10, [False, False, False, True])
  """
  counted = last_token > 0
  with_gradient = counted & has_gradient
  computed = with_gradient.copy()
  if not computed.any():
    computed[np.flatnonzero(counted)[:1]] = True
  ids = np.flatnonzero(computed)
  step_of = prompt_ids[ids] * steps // len(prompt_lengths)
  # Rows hold responses of one group: of a prompt, or of a whole optimiser step.
  groups = prompt_ids[ids] if share_prompts else step_of
  lengths = last_token[ids] + (0 if share_prompts else prompt_lengths[prompt_ids[ids]])
  full = response_width + (0 if share_prompts else prompt_width)

  def candidates():
    for width in _widths(full, share_prompts) if pack else [full]:
      if width < lengths.max(initial=0):
        continue
      rows, sizes = np.zeros_like(ids), {}
      for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        rows[members] = (
          _first_fit(lengths[members], width) if pack else np.arange(len(members))
        )
        sizes[group] = rows[members].max() + 1
      for share in _row_counts(prompt_ids) if share_prompts else [1]:
        tokens = share * width + (prompt_width if share_prompts else 0)
        entries = np.zeros(steps, int)
        for group, size in sizes.items():
          entries[step_of[groups == group][0]] += -(-size // share)
        per_batch = shards * _ladder(-(-int(entries.max()) // shards))
        if micro_batch_tokens:
          most = max(micro_batch_tokens // (tokens * shards), 1)
          per_batch = min(per_batch, shards * most)
        micro_batches = -(-entries // per_batch)
        yield (
          int(micro_batches.sum()) * per_batch * tokens,
          (width, share, per_batch, micro_batches, rows, sizes),
        )

  tokens, chosen = min(candidates(), key=lambda candidate: candidate[0])
  width, share, per_batch, micro_batches, rows, sizes = chosen

  # Entries of a group, then of an optimiser step, follow each other. Room for 1, 4, 16,
  # ... micro-batches: one that is empty costs its index arrays and no computation.
  parts = 1
  while parts < micro_batches.max():
    parts *= 4
  shape = (steps, parts, per_batch)
  prompts = np.zeros(shape, np.int32)
  next_entry = np.arange(steps) * parts * per_batch
  for group, size in sizes.items():
    members = groups == group
    step = step_of[members][0]
    first, next_entry[step] = next_entry[step], next_entry[step] - (-size // share)
    rows[members] += first * share
    prompts.reshape(-1)[first : next_entry[step]] = group

  layout = _fill(
    (steps, parts, per_batch * share, width), ids, rows, lengths, last_token
  )
  if share_prompts:
    layout = layout._replace(prompts=prompts, columns=None)
  return Plan(
    layout,
    micro_batches,
    left_out=counted & ~computed,
    tokens=tokens,
    tokens_with_gradient=int(last_token[with_gradient].sum()),
    counted=int(counted.sum()),
    pruned=int((counted & ~with_gradient).sum()),
  )


def _fill(shape, ids, rows, lengths, last_token) -> Layout:
  """Puts each rollout's columns side by side into its row."""
  rollouts, offsets, segment_ids = np.zeros((3, *shape), np.int32)
  order = np.argsort(rows, kind="stable")
  ids, rows, lengths = ids[order], rows[order], lengths[order]
  is_first = np.diff(rows, prepend=-1) > 0
  before = np.cumsum(lengths) - lengths  # tokens of earlier rollouts, of all rows
  row_start = np.maximum.accumulate(np.where(is_first, before, 0))
  first = np.maximum.accumulate(np.where(is_first, np.arange(len(ids)), 0))
  starts = rows * shape[-1] + before - row_start
  index = np.arange(lengths.sum()) - np.repeat(before, lengths)
  columns = np.repeat(starts, lengths) + index
  rollouts.reshape(-1)[columns] = np.repeat(ids, lengths)
  offsets.reshape(-1)[columns] = index - np.repeat(lengths - last_token[ids], lengths)
  segments = np.arange(len(ids)) - first + 1
  segment_ids.reshape(-1)[columns] = np.repeat(segments, lengths)

  in_response = (offsets >= 0) & (segment_ids > 0)
  eighth = -(-shape[-1] // 8)
  most = -(-int(in_response.sum(-1).max()) // eighth) * eighth
  order = np.argsort(~in_response, axis=-1, kind="stable")[..., : max(most, 1)]
  held = np.take_along_axis(in_response, order, axis=-1)
  return Layout(
    prompts=None,
    rollouts=rollouts,
    offsets=offsets,
    segment_ids=segment_ids,
    columns=np.where(held, order, 0).astype(np.int32),
  )


def _first_fit(lengths: np.ndarray, width: int) -> np.ndarray:
  """The row of each length, longest first, each in the first row that has room."""
  room, rows = np.full(len(lengths), width), np.zeros(len(lengths), int)
  for i in np.argsort(-lengths, kind="stable"):
    rows[i] = np.argmax(room >= lengths[i])
    room[rows[i]] -= lengths[i]
  return rows


def _widths(full: int, share_prompts: bool) -> list[int]:
  """Quarters of the longest response, up to four; behind its prompt up to eight, in
  whole tiles of a kernel, where rows of two may fill them better than rows of one."""
  tile = 8 if share_prompts or full < 128 else 128
  quarters = range(1, 5 if share_prompts else 9)
  widths = {-(-full * quarter // (4 * tile)) * tile for quarter in quarters}
  return sorted({min(w, full) for w in widths} if share_prompts else widths)


def _row_counts(prompt_ids: np.ndarray) -> list[int]:
  """How many rows may share a prompt: powers of two, and the whole group."""
  largest = int(np.bincount(prompt_ids).max())
  powers = itertools.takewhile(lambda n: n < largest, (1 << i for i in range(32)))
  return [*powers, largest]


def _ladder(count: int) -> int:
  """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: a third of it is empty at most."""
  power = 1 << max(count - 1, 0).bit_length()
  return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power

"""Packing: which tokens an update computes, and in which row and column each lies.

A rollout whose advantage is exactly zero has no gradient and is left out. The others
lie in rows, several responses to a row where they fit. There are two layouts:

    shared     prompt 1 <- [ response a | response b ] [ response c      ]
               prompt 2 <- [ response d              ] [                 ]
    repeated   [ prompt 1 | response a | prompt 2 | response d ]
               [ prompt 1 | response b | prompt 1 | response c ]

*Shared*: a row holds responses of one group and attends to the keys of its prompt,
which are computed once for several consecutive rows. *Repeated*: each response follows
a copy of its prompt, and a row may hold several groups; attention kernels need nothing
but the segment ids of the row.

The plan is made on the host, in NumPy, from a few numbers per rollout. It consists of
index arrays, by which the device gathers tokens and log-probs. Their sizes come from
short ladders, so that a run compiles few programs; the number of micro-batches that
hold anything is data, not a size.

The example that the comments below draw: 4 rollouts of 2 prompts, of 2 and 3 tokens.
Rollouts 0 and 1 answer prompt 0 with 2 and 1 tokens, rollout 2 answers prompt 1 with 3,
and rollout 3 has no gradient. P is 4, T is 8.

    shared       column         0   1   2   3   4   5   6   7
    prompt 0 <-  row 0          a0  a1  b0
                 rollouts       0   0   1   0   0   0   0   0
                 offsets        0   1   0   0   0   0   0   0
                 segment_ids    1   1   2   0   0   0   0   0
    prompt 1 <-  row 1          c0  c1  c2
                 rollouts       2   2   2   0   0   0   0   0
                 offsets        0   1   2   0   0   0   0   0
                 segment_ids    1   1   1   0   0   0   0   0

    repeated     column         0   1   2   3   4   5   6   7
                 row 0          p1  p1  p1  c0  c1  c2
                 rollouts       2   2   2   2   2   2   0   0
                 offsets       -3  -2  -1   0   1   2   0   0
                 segment_ids    1   1   1   1   1   1   0   0
                 row 1          p0  p0  a0  a1  p0  p0  b0
                 rollouts       0   0   0   0   1   1   1   0
                 offsets       -2  -1   0   1  -2  -1   0   0
                 segment_ids    1   1   1   1   2   2   2   0
    columns      of row 0: 3 4 5    of row 1: 2 3 6

Shape letters, as in `opo_jax/__init__.py`: a micro-batch has B rows of W
columns, of which up to U hold response tokens, and C prompts, each of B / C rows.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np


class Layout(NamedTuple):
  """Where tokens lie; every array has leading axes [optimiser steps, micro-batches].

  Attributes:
    prompts: [C] the prompts that are computed, each for B / C consecutive rows; None
      where they are repeated.
    rollouts: [B, W] the rollout whose token a column holds.
    offsets: [B, W] which of its tokens: 0 is the first of the response, negative
      offsets count back from the end of the prompt.
    segment_ids: [B, W] responses are 1, 2, ... in their row; 0 is padding.
    columns: [B, U] the columns that hold response tokens, padded with 0 (with a prompt
      in front, no response starts in column 0); None with shared prompts, where U is W
      and every column counts.
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
  """Lays out the rollouts that have a gradient, in as few tokens as possible.

  If none has one, a single rollout is computed all the same, so that the gap between
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
    shards: the entries of a micro-batch are a multiple of it (an entry is a prompt and
      its rows, or with repeated prompts a row).
    micro_batch_tokens: bound on the tokens of a micro-batch (at least one entry a
      shard); 0: all in one.
    pack: False gives each response a row of the full width.

  Returns:
    The plan of fewest tokens. On a tie, the one of narrower rows, then the one of fewer
    rows to a prompt.

  >>> last_token, signal = np.array([2, 1, 3, 4]), np.array([True, True, True, False])
  >>> batch = last_token, signal, np.array([0, 0, 1, 1]), np.array([2, 3])
  >>> widths = dict(prompt_width=4, response_width=8)
  >>> shared = plan(*batch, **widths, share_prompts=True)
  >>> shared.layout.prompts[0, 0].tolist(), shared.layout.rollouts[0, 0].tolist()
  ([0, 1], [[0, 0, 1, 0, 0, 0, 0, 0], [2, 2, 2, 0, 0, 0, 0, 0]])
  >>> shared.layout.segment_ids[0, 0].tolist()
  [[1, 1, 2, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
  >>> shared.tokens, shared.tokens_with_gradient, shared.left_out.tolist()
  (24, 6, [False, False, False, True])
  >>> repeated = plan(*batch, **widths, share_prompts=False)
  >>> repeated.layout.offsets[0, 0].tolist()
  [[-3, -2, -1, 0, 1, 2, 0, 0], [-2, -1, 0, 1, -2, -1, 0, 0]]
  >>> repeated.layout.columns[0, 0].tolist(), repeated.tokens
  ([[3, 4, 5], [2, 3, 6]], 16)
  """
  counted = last_token > 0
  with_gradient = counted & has_gradient
  computed = with_gradient.copy()
  if not computed.any():
    computed[np.flatnonzero(counted)[:1]] = True
  ids = np.flatnonzero(computed)
  prompt_columns = 0 if share_prompts else prompt_lengths[prompt_ids[ids]]
  step_of = prompt_ids[ids] * steps // len(prompt_lengths)
  pieces = _Pieces(
    ids=ids,
    lengths=prompt_columns + last_token[ids],
    responses=last_token[ids],
    groups=prompt_ids[ids] if share_prompts else step_of,
    steps=step_of,
  )

  # The width of an unpacked row; packed rows are a fraction or a multiple of it.
  full = response_width if share_prompts else prompt_width + response_width
  widths = _widths(full, share_prompts) if pack else [full]
  row_counts = _row_counts(prompt_ids) if share_prompts else [1]
  # `min` takes the first of equals: the order of this loop breaks ties.
  best = min(
    (
      _candidate(
        rows,
        rows_per_entry,
        prompt_width=prompt_width if share_prompts else 0,
        steps=steps,
        shards=shards,
        micro_batch_tokens=micro_batch_tokens,
      )
      for rows in _rows_of_each_width(pieces, widths, pack)
      for rows_per_entry in row_counts
    ),
    key=lambda candidate: candidate.tokens,
  )

  layout = _lay_out(pieces, best)
  if share_prompts:
    layout = layout._replace(columns=None)
  else:
    layout = layout._replace(prompts=None)
  return Plan(
    layout,
    best.micro_batches,
    left_out=counted & ~computed,
    tokens=best.tokens,
    tokens_with_gradient=int(last_token[with_gradient].sum()),
    counted=int(counted.sum()),
    pruned=int((counted & ~with_gradient).sum()),
  )


class _Pieces(NamedTuple):
  """What is packed: n rollouts, each a run of consecutive columns of one row.

  Attributes:
    ids: [n] which rollout.
    lengths: [n] columns it takes: its response, with its prompt in front if repeated.
    responses: [n] columns of the response alone.
    groups: [n] only pieces of one group share a row: of one prompt where rows share
      prompts, of one optimiser step where prompts are repeated.
    steps: [n] the optimiser step it belongs to.
  """

  ids: np.ndarray
  lengths: np.ndarray
  responses: np.ndarray
  groups: np.ndarray
  steps: np.ndarray


class _Rows(NamedTuple):
  """The pieces in rows of one width.

  Attributes:
    width: W.
    row_of: [n] the row of each piece, counted from 0 within its group.
    groups: [g] the groups that have pieces, ascending.
    steps: [g] the optimiser step of each.
    counts: [g] the rows of each.
  """

  width: int
  row_of: np.ndarray
  groups: np.ndarray
  steps: np.ndarray
  counts: np.ndarray


class _Candidate(NamedTuple):
  """Rows cut into micro-batches: one way to compute the pieces.

  Attributes:
    rows: its rows.
    rows_per_entry: rows that share a prompt; 1 where prompts are repeated.
    entries: of a micro-batch.
    micro_batches: [optimiser steps] that each needs.
    tokens: of all micro-batches.
  """

  rows: _Rows
  rows_per_entry: int
  entries: int
  micro_batches: np.ndarray
  tokens: int

  @property
  def entries_of_group(self) -> np.ndarray:
    """[g] entries of each group; the last one may lack rows."""
    return _ceil_div(self.rows.counts, self.rows_per_entry)


def _rows_of_each_width(pieces: _Pieces, widths: list[int], pack: bool):
  """Yields the pieces in rows of every width that holds the longest of them."""
  groups, first = np.unique(pieces.groups, return_index=True)
  for width in widths:
    if width < pieces.lengths.max(initial=0):
      continue
    row_of, counts = np.zeros_like(pieces.ids), np.zeros(len(groups), int)
    for i, group in enumerate(groups):
      members = np.flatnonzero(pieces.groups == group)
      row_of[members] = (
        _first_fit(pieces.lengths[members], width) if pack else np.arange(len(members))
      )
      counts[i] = row_of[members].max() + 1
    yield _Rows(width, row_of, groups, pieces.steps[first], counts)


def _candidate(
  rows: _Rows,
  rows_per_entry: int,
  *,
  prompt_width: int,
  steps: int,
  shards: int,
  micro_batch_tokens: int,
) -> _Candidate:
  """Cuts the rows into micro-batches of equal size.

  Args:
    rows: of one width.
    rows_per_entry: how many of them share a prompt.
    prompt_width: columns of a shared prompt; 0 where prompts are repeated.
    steps, shards, micro_batch_tokens: as of `plan`.
  """
  entry_tokens = prompt_width + rows_per_entry * rows.width
  entries_of_step = np.zeros(steps, int)
  np.add.at(entries_of_step, rows.steps, _ceil_div(rows.counts, rows_per_entry))
  # One size for all optimiser steps, since they run in one scan.
  entries = shards * _ladder(_ceil_div(int(entries_of_step.max()), shards))
  if micro_batch_tokens:
    most_per_shard = max(micro_batch_tokens // (entry_tokens * shards), 1)
    entries = min(entries, shards * most_per_shard)
  micro_batches = _ceil_div(entries_of_step, entries)
  return _Candidate(
    rows,
    rows_per_entry,
    entries,
    micro_batches,
    tokens=int(micro_batches.sum()) * entries * entry_tokens,
  )


def _lay_out(pieces: _Pieces, candidate: _Candidate) -> Layout:
  """The index arrays of a candidate."""
  # Space for 1, 4, 16, ... micro-batches a step: an empty one costs its index arrays
  # and no computation, and the number of programs stays small.
  num_micro_batches = 1
  while num_micro_batches < candidate.micro_batches.max():
    num_micro_batches *= 4
  rows, steps = candidate.rows, len(candidate.micro_batches)

  # The entries of a group, then those of an optimiser step, follow each other. In the
  # example, shared: groups 0 and 1 have a row each, so that entry 0 is prompt 0, entry
  # 1 prompt 1. `next_entry` is flat over [steps, micro-batches, entries].
  entries_of_step = num_micro_batches * candidate.entries
  prompts = np.zeros(steps * entries_of_step, np.int32)
  next_entry = np.arange(steps) * entries_of_step
  row_of = rows.row_of.copy()
  for group, step, count in zip(
    rows.groups, rows.steps, candidate.entries_of_group, strict=True
  ):
    first = next_entry[step]
    prompts[first : first + count] = group
    row_of[pieces.groups == group] += first * candidate.rows_per_entry
    next_entry[step] += count

  leading = steps, num_micro_batches
  num_rows = candidate.entries * candidate.rows_per_entry
  layout = _fill((*leading, num_rows, rows.width), pieces, row_of)
  return layout._replace(prompts=prompts.reshape(*leading, candidate.entries))


def _fill(shape: tuple[int, ...], pieces: _Pieces, row_of: np.ndarray) -> Layout:
  """Puts the pieces side by side into their rows, in the order of their ids.

  The example, repeated (W = 8), ordered by row:

      ids           2  0  1         lengths      6  4  3
      row_of        0  1  1         responses    3  2  1
      before        0  6 10         columns of earlier pieces, over all rows
      row_start     0  6  6         the same, at the first piece of the row
      start         0  8 12         row_of * W + before - row_start: flat first column
      segment       1  1  2

  Then each piece is unrolled. Piece 1, of length 3 with a response of 1, is

      index         0  1  2         columns of the piece
      columns      12 13 14         start + index: row 1, columns 4 to 6
      offsets      -2 -1  0         index - (length - response)

  Args:
    shape: [optimiser steps, micro-batches, B, W].
    pieces: n of them.
    row_of: [n] flat over the first three axes of `shape`.
  """
  order = np.argsort(row_of, kind="stable")
  ids, row_of, lengths = pieces.ids[order], row_of[order], pieces.lengths[order]
  prompt_columns = lengths - pieces.responses[order]
  starts_row = np.diff(row_of, prepend=-1) > 0
  before = np.cumsum(lengths) - lengths
  # A running maximum carries the value at the first piece of a row to the others.
  row_start = np.maximum.accumulate(np.where(starts_row, before, 0))
  first_in_row = np.maximum.accumulate(np.where(starts_row, np.arange(len(ids)), 0))
  start = row_of * shape[-1] + before - row_start
  segment = np.arange(len(ids)) - first_in_row + 1

  index = np.arange(lengths.sum()) - np.repeat(before, lengths)
  columns = np.repeat(start, lengths) + index
  rollouts, offsets, segment_ids = np.zeros((3, *shape), np.int32)
  rollouts.reshape(-1)[columns] = np.repeat(ids, lengths)
  offsets.reshape(-1)[columns] = index - np.repeat(prompt_columns, lengths)
  segment_ids.reshape(-1)[columns] = np.repeat(segment, lengths)
  return Layout(
    prompts=None,
    rollouts=rollouts,
    offsets=offsets,
    segment_ids=segment_ids,
    columns=_response_columns(offsets, segment_ids),
  )


def _response_columns(offsets: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
  """The columns of each row that hold response tokens, ascending, padded with 0.

  U is the most of any row, rounded up to an eighth of W: 3 of 8 in the example.
  """
  in_response = (offsets >= 0) & (segment_ids > 0)
  eighth = _ceil_div(in_response.shape[-1], 8)
  most = _ceil_div(int(in_response.sum(-1).max()), eighth) * eighth
  # A stable sort brings the response columns to the front and keeps their order.
  order = np.argsort(~in_response, axis=-1, kind="stable")[..., : max(most, 1)]
  held = np.take_along_axis(in_response, order, axis=-1)
  return np.where(held, order, 0).astype(np.int32)


def _first_fit(lengths: np.ndarray, width: int) -> np.ndarray:
  """The row of each piece: longest first, each into the first row with enough space.

  >>> _first_fit(np.array([4, 3, 6]), width=8).tolist()
  [1, 1, 0]
  """
  free, row_of = np.full(len(lengths), width), np.zeros(len(lengths), int)
  for i in np.argsort(-lengths, kind="stable"):
    row_of[i] = np.argmax(free >= lengths[i])
    free[row_of[i]] -= lengths[i]
  return row_of


def _widths(full: int, share_prompts: bool) -> list[int]:
  """The widths that are tried, ascending, in whole tiles.

  Shared: a quarter to four quarters of the longest response. Repeated: up to eight
  quarters of the longest row, since two pieces may fill a row of twice the width better
  than one does a row of its own; tiles of 128 are those of the attention kernels.

  >>> _widths(500, share_prompts=True), _widths(500, share_prompts=False)
  ([128, 256, 376, 500], [128, 256, 384, 512, 640, 768, 896, 1024])
  """
  tile = 8 if share_prompts or full < 128 else 128
  quarters = range(1, 5 if share_prompts else 9)
  widths = {_ceil_div(full * quarter, 4 * tile) * tile for quarter in quarters}
  return sorted({min(w, full) for w in widths} if share_prompts else widths)


def _row_counts(prompt_ids: np.ndarray) -> list[int]:
  """How many rows may share a prompt: powers of two, and the whole group.

  >>> _row_counts(np.array([0, 0, 0, 0, 0, 0, 1]))
  [1, 2, 4, 6]
  """
  largest = int(np.bincount(prompt_ids).max())
  powers = itertools.takewhile(lambda n: n < largest, (1 << i for i in range(32)))
  return [*powers, largest]


def _ladder(count: int) -> int:
  """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: at most a third of it is empty.

  >>> [_ladder(count) for count in (1, 3, 5, 7, 9, 13)]
  [1, 3, 6, 8, 12, 16]
  """
  power = 1 << max(count - 1, 0).bit_length()
  return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def _ceil_div(a, b):
  return -(-a // b)

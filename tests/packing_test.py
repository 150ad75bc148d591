"""Packing: every token with a gradient lies in one place, beside its own prompt."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opo_jax.learner.packing import plan

P, T = 6, 16


def batch(seed, groups=5, samples=4, limit=T):
  """(last_token, has_gradient, prompt_ids, prompt_lengths), rows in any order."""
  rng = np.random.default_rng(seed)
  ids = rng.permutation(np.repeat(np.arange(groups), samples))
  last_token = rng.integers(0, limit + 1, len(ids))
  # Some groups without signal, and single rollouts without one.
  has_gradient = (rng.random(groups) < 0.6)[ids] & (rng.random(len(ids)) < 0.9)
  return last_token, has_gradient, ids, rng.integers(1, P + 1, groups)


def made(batch, share_prompts=True, response_width=T, **options):
  return plan(
    *batch,
    prompt_width=P,
    response_width=response_width,
    share_prompts=share_prompts,
    **options,
  )


def pieces(made):
  """(step, micro-batch, row, segment) -> [(rollout, offset), ...] in row order."""
  found = collections.defaultdict(list)
  layout = made.layout
  for place in np.argwhere(layout.segment_ids > 0):
    place = tuple(place)
    key = (*map(int, place[:3]), int(layout.segment_ids[place]))
    found[key].append((int(layout.rollouts[place]), int(layout.offsets[place])))
  return found


@settings(max_examples=60, deadline=None)
@given(
  seed=st.integers(0, 10**6),
  share_prompts=st.booleans(),
  pack=st.booleans(),
  steps=st.sampled_from([1, 2, 3]),
  shards=st.sampled_from([1, 2, 8]),
  micro_batch_tokens=st.sampled_from([0, 40, 100]),
)
def test_each_rollout_with_a_gradient_lies_in_one_segment_from_its_first_token_on(
  seed, share_prompts, pack, steps, shards, micro_batch_tokens
):
  last_token, has_gradient, ids, prompt_lengths = given_batch = batch(seed, groups=6)
  result = made(
    given_batch,
    share_prompts,
    steps=steps,
    shards=shards,
    micro_batch_tokens=micro_batch_tokens,
    pack=pack,
  )
  layout, found = result.layout, pieces(result)
  expected = np.flatnonzero(has_gradient & (last_token > 0))
  if not len(expected):
    expected = np.flatnonzero(last_token > 0)[:1]
  assert sorted(content[0][0] for content in found.values()) == expected.tolist()

  rows_per_entry = 1
  if share_prompts:
    rows_per_entry = layout.rollouts.shape[2] // layout.prompts.shape[2]
  segments_of_row = collections.defaultdict(list)
  for (step, part, row, segment), content in found.items():
    rollout = content[0][0]
    first = 0 if share_prompts else -prompt_lengths[ids[rollout]]
    assert content == [(rollout, at) for at in range(first, last_token[rollout])]
    assert step == ids[rollout] * steps // 6  # whole groups to each optimiser step
    assert part < result.micro_batches[step]
    segments_of_row[step, part, row].append(segment)
    if share_prompts:
      assert layout.prompts[step, part, row // rows_per_entry] == ids[rollout]
  for segments in segments_of_row.values():
    assert sorted(segments) == list(range(1, len(segments) + 1))
    assert pack or len(segments) == 1

  entries = layout.rollouts.shape[2] // rows_per_entry
  tokens = layout.rollouts[0, 0].size + (entries * P if share_prompts else 0)
  assert entries % shards == 0
  if micro_batch_tokens and entries > shards:
    assert tokens <= micro_batch_tokens
  assert result.tokens == result.micro_batches.sum() * tokens
  left_out = (last_token > 0) & ~np.isin(np.arange(24), expected)
  assert (result.left_out == left_out).all()
  assert result.tokens_with_gradient == last_token[has_gradient].sum()


@pytest.mark.parametrize("seed", range(4))
def test_columns_name_the_response_tokens_of_every_row(seed):
  layout = made(batch(seed), share_prompts=False).layout
  responses = (layout.segment_ids > 0) & (layout.offsets >= 0)
  for row in np.ndindex(responses.shape[:3]):
    # Column 0 is a prompt's, and stands for none.
    named = [column for column in layout.columns[row] if column]
    assert named == np.flatnonzero(responses[row]).tolist()
  width, most = layout.rollouts.shape[-1], responses.sum(-1).max()
  assert most <= layout.columns.shape[-1] < most + width / 8 < width + width / 8


def test_equal_lengths_pack_without_any_padding():
  """5 groups x 4 full responses: each prompt once, nothing else."""
  full = (np.full(20, T), np.ones(20, bool), np.repeat(np.arange(5), 4), np.full(5, P))
  result = made(full, micro_batch_tokens=P + 4 * T)
  assert result.tokens == 5 * (P + 4 * T)
  assert result.layout.rollouts.shape == (1, 16, 4, T)  # room for 16
  assert result.micro_batches.tolist() == [5]
  # Repeated, it is 20 prompts.
  assert made(full, False, micro_batch_tokens=P + T).tokens == 20 * 24


def test_short_responses_share_rows():
  """Of 32 tokens each group has 8 responses of 4: one row of 32 instead of eight."""
  short = (np.full(16, 4), np.ones(16, bool), np.repeat([0, 1], 8), np.full(2, P))
  result = made(short, response_width=32)
  assert result.tokens == 2 * (P + 32)
  assert made(short, response_width=32, pack=False).tokens == 2 * (P + 8 * 32)


def test_where_none_has_a_gradient_one_rollout_is_measured():
  last_token = np.array([0, 3, 5, 2])
  nothing = np.zeros(4, bool)
  result = made((last_token, nothing, np.array([0, 0, 1, 1]), np.array([2, 2])))
  assert [content[0][0] for content in pieces(result).values()] == [1]
  assert result.left_out.tolist() == [False, False, True, True]
  assert (result.counted, result.pruned, result.tokens_with_gradient) == (3, 3, 0)


def test_where_none_counts_nothing_is_computed():
  nobody = (np.zeros(4, int), np.ones(4, bool), np.array([0, 0, 1, 1]), np.ones(2, int))
  for share_prompts in (True, False):
    result = made(nobody, share_prompts, steps=2)
    assert result.micro_batches.tolist() == [0, 0]
    assert result.tokens == result.counted == 0


@pytest.mark.parametrize("share_prompts", [True, False])
def test_a_run_needs_few_programs(share_prompts):
  """300 batches of 32 x 8 rollouts, log-normal lengths, a fifth to all with signal."""
  rng, shapes, fill = np.random.default_rng(0), collections.Counter(), []
  ids, limit = np.repeat(np.arange(32), 8), 256
  for _ in range(300):
    last_token = np.clip(np.exp(rng.normal(4, 1, 256)), 1, limit).astype(int)
    has_gradient = (rng.random(32) < rng.uniform(0.2, 1.0))[ids]
    result = made(
      (last_token, has_gradient, ids, np.full(32, P)),
      share_prompts,
      response_width=limit,
      micro_batch_tokens=8192,
    )
    shapes[tuple(None if x is None else x.shape for x in result.layout)] += 1
    fill.append(result.tokens_with_gradient / result.tokens)
  assert len(shapes) <= 14, shapes
  # Rows one after the other, unpacked, would have a fill of 0.3.
  assert np.mean(fill) > 0.6

"""Advantages: identities of the algebra, and values against NumPy in float64.

Arrays have one shape (24 rows, 7 groups, one of them always empty), so that each
estimator compiles once. The rows are ragged: unsorted group ids, single-row groups,
zero lengths, unscorable rows whose reward is NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opo_jax.advantages import ESTIMATORS, weighted_baseline

NUM_ROWS, NUM_GROUPS = 24, 7
EMPTY_GROUP = 4
EPS = float(jnp.finfo(jnp.float32).eps)
# Rewards are at most 3 in size and a baseline sums 24 of them: a few roundings each.
ATOL = 16 * 3 * EPS

few = settings(max_examples=30, deadline=None)
names = pytest.mark.parametrize("name", sorted(ESTIMATORS))


@functools.cache
def jitted(name):
  return jax.jit(functools.partial(ESTIMATORS[name], num_groups=NUM_GROUPS))


def run(name, rewards, lengths, ids, valid=None):
  """The estimator on arrays of one shape; float64 out, so that tests lose nothing."""
  if valid is None:
    valid = np.ones(len(rewards), bool)
  args = np.float32(rewards), np.int32(lengths), np.int32(ids)
  return np.asarray(jitted(name)(*args, valid=np.asarray(valid)), np.float64)


@st.composite
def batches(draw, unscorable=True):
  """(rewards, lengths, group ids, valid): steps of 1/4, 0..400 tokens, NaN rewards."""

  def rows(elements):
    return draw(st.lists(elements, min_size=NUM_ROWS, max_size=NUM_ROWS))

  rewards = np.array(rows(st.integers(-8, 12))) / 4
  lengths = np.array(rows(st.one_of(st.integers(0, 3), st.integers(1, 400))))
  groups = [g for g in range(NUM_GROUPS) if g != EMPTY_GROUP]
  ids = np.array(rows(st.sampled_from(groups)))
  valid = np.ones(NUM_ROWS, bool)
  if unscorable:
    valid = np.array(rows(st.sampled_from([True, True, True, False])))
    rewards = np.where(valid, rewards, np.nan)
  return rewards, lengths, ids, valid


def fixed_batch(seed=0):
  """One ragged batch with every special case in it."""
  rng = np.random.default_rng(seed)
  ids = np.array(
    [6, 0, 3, 1, 0, 6, 2, 0, 3, 3, 1, 0, 6, 3, 1, 0, 3, 5, 5, 0, 6, 3, 1, 0]
  )
  rewards = rng.integers(-2, 5, NUM_ROWS) / 2
  lengths = rng.integers(1, 300, NUM_ROWS)
  lengths[[4, 9]] = 0
  valid = np.ones(NUM_ROWS, bool)
  valid[[1, 17, 18]] = False  # group 5 is unscorable altogether, group 2 has one row
  return np.where(valid, rewards, np.nan), lengths, ids, valid


def reference(name, rewards, lengths, ids, valid):
  """Group by group in float64, from the table of the papers' formulas."""
  result = np.zeros(len(rewards))
  counts = valid & (lengths > 0)
  one_group = name in ("opo_batch", "reinforce_pp")
  for group in [None] if one_group else sorted(set(ids.tolist())):
    rows = np.flatnonzero(counts if one_group else counts & (ids == group))
    for i in rows:
      others = rows[rows != i]
      r, weights = rewards[rows], lengths[rows]
      if name == "reinforce":
        result[i] = rewards[i]
      elif len(rows) < 2:
        result[i] = 0.0
      elif name == "mean":
        result[i] = rewards[i] - r.mean()
      elif name == "rloo":
        result[i] = rewards[i] - rewards[others].mean()
      elif name in ("grpo", "reinforce_pp"):
        result[i] = (rewards[i] - r.mean()) / (r.std(ddof=1) + 1e-6)
      elif name == "maxrl":
        result[i] = (rewards[i] - r.mean()) / (r.mean() + 1e-6)
      elif name in ("opo", "opo_batch"):
        result[i] = rewards[i] - np.average(r, weights=weights)
      elif name == "opo_loo":
        result[i] = rewards[i] - np.average(rewards[others], weights=lengths[others])
      else:
        raise AssertionError(f"no reference for {name}")
  return result


def tolerance(name, rewards, lengths, ids, valid):
  """float32 rounding, times what the formula multiplies it by."""
  counts = valid & (lengths > 0)
  gain = np.ones(len(rewards))
  for i in np.flatnonzero(counts):
    rows = counts & (ids == ids[i])
    if name == "opo_loo" and rows.sum() > 1:
      gain[i] = lengths[rows].sum() / (lengths[rows].sum() - lengths[i])
    if name == "grpo" and np.ptp(rewards[rows]):
      gain[i] = 1 / np.std(rewards[rows], ddof=1)
    if name == "rloo":
      gain[i] = 2.0
  if name == "reinforce_pp":
    gain[:] = 24.0  # the std of 24 values in steps of 1/4 is above 0.05, or 0
  return ATOL * (1 + gain)


# --- Values ---


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"maxrl"}))
@few
@given(batch=batches())
def test_every_estimator_equals_its_formula_in_float64(name, batch):
  error = np.abs(run(name, *batch) - reference(name, *batch))
  assert (error <= tolerance(name, *batch)).all(), error.max()


@few
@given(batch=batches(unscorable=False))
def test_maxrl_equals_its_formula_in_float64(batch):
  # Its rewards are not negative. Dividing by the mean magnifies rounding by 1 / mean,
  # and a mean in float32 that is not zero is at least 0.25 / 24 here.
  _, lengths, ids, valid = batch
  batch = np.abs(batch[0]), lengths, ids, valid
  expected = reference("maxrl", *batch)
  np.testing.assert_allclose(run("maxrl", *batch), expected, rtol=1e-4, atol=1e-4)


def test_opo_gives_what_lmops_and_verl_give():
  # Group 7's baseline: (4*1 + 1*0 + 5*0) / 10 = 0.4   -> 0.6, -0.4, -0.4
  # Group 2's baseline: (3*1 + 1*-0.5) / 4   = 0.625   -> 0.375, -1.125
  # Group 0 has one row: 0 here and in LMOps (verl: the reward, 0.25).
  rewards = jnp.array([1.0, 1.0, 0.0, 0.25, -0.5, 0.0])
  lengths = jnp.array([3, 4, 1, 9, 1, 5])
  ids = jnp.array([2, 7, 7, 0, 2, 7])
  advantages = ESTIMATORS["opo"](rewards, lengths, ids, num_groups=8)
  expected = [0.375, 0.6, -0.4, 0.0, -1.125, -0.4]
  np.testing.assert_allclose(advantages, expected, atol=2 * EPS)


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    # rewards 1 0 0 2 in group 0, 3 1 in group 1; lengths 2 1 3 2, 1 3
    ("reinforce", [1, 0, 0, 2, 3, 1]),
    # means 0.75 and 2
    ("mean", [0.25, -0.75, -0.75, 1.25, 1, -1]),
    # others' means 2/3 1 1 1/3, 1 3
    ("rloo", [1 / 3, -1, -1, 5 / 3, 2, -2]),
    # squares .0625 + .5625 + .5625 + 1.5625 = 2.75, / 3, root = 0.957427; root of 2
    ("grpo", [0.261116, -0.783349, -0.783349, 1.305581, 0.707106, -0.707106]),
    # batch mean 7/6; squares 1/36 + 49/36 + 49/36 + 25/36 + 121/36 + 1/36 = 246/36,
    # / 5 = 41/30, root = 1.169045
    ("reinforce_pp", [-0.142566, -0.997964, -0.997964, 0.712832, 1.568230, -0.142566]),
    # divided by the mean
    ("maxrl", [1 / 3, -1, -1, 5 / 3, 0.5, -0.5]),
    # baselines (2 + 4) / 8 = 0.75 and (3 + 3) / 4 = 1.5
    ("opo", [0.25, -0.75, -0.75, 1.25, 1.5, -0.5]),
    # others' (0 + 0 + 4) / 6, 6 / 7, 6 / 5, 2 / 6; 3 / 3, 3 / 1
    ("opo_loo", [1 / 3, -6 / 7, -6 / 5, 5 / 3, 2, -2]),
    # (2 + 4 + 3 + 3) / 12 = 1
    ("opo_batch", [0, -1, -1, 1, 2, 0]),
  ],
)
def test_every_estimator_by_hand(name, expected):
  rewards, lengths = jnp.array([1.0, 0, 0, 2, 3, 1]), jnp.array([2, 1, 3, 2, 1, 3])
  ids = jnp.array([0, 0, 0, 0, 1, 1])
  advantages = ESTIMATORS[name](rewards, lengths, ids, num_groups=2)
  # 3e-6: the digits written here, and the epsilon of 1e-6 beside a std or mean near 1.
  np.testing.assert_allclose(advantages, expected, atol=3e-6)


def test_baseline_weighs_by_any_weights_of_any_scale():
  # (0.5*4 + 1.5*2) / 2 = 2.5; rows left out see the other's reward alone.
  rewards, ids = jnp.array([4.0, 2.0, 9.0]), jnp.array([0, 0, 0])
  valid = jnp.array([True, True, False])
  for scale in (1e-6, 1.0, 1e6):
    weights = scale * jnp.array([0.5, 1.5, 8.0])
    kwargs = dict(num_groups=1, valid=valid)
    baseline = weighted_baseline(rewards, weights, ids, **kwargs)
    np.testing.assert_allclose(baseline[:2], [2.5, 2.5], rtol=4 * EPS)
    others = weighted_baseline(rewards, weights, ids, leave_one_out=True, **kwargs)
    np.testing.assert_allclose(others[:2], [2.0, 4.0], rtol=16 * EPS)


# --- Identities ---


@few
@given(batch=batches(), length=st.integers(1, 5000))
def test_equal_lengths_make_opo_the_group_mean_and_opo_loo_rloo(batch, length):
  rewards, _, ids, valid = batch
  batch = rewards, np.full(NUM_ROWS, length), ids, valid
  np.testing.assert_allclose(run("opo", *batch), run("mean", *batch), atol=ATOL)
  # K / (K - 1) is at most 2.
  np.testing.assert_allclose(run("opo_loo", *batch), run("rloo", *batch), atol=2 * ATOL)


@few
@given(batch=batches())
def test_length_weighted_advantages_of_a_group_sum_to_zero(batch):
  _, lengths, ids, valid = batch
  weighted = run("opo", *batch) * lengths
  for group in range(NUM_GROUPS):
    total = (lengths * valid)[ids == group].sum()
    assert abs(weighted[ids == group].sum()) <= ATOL * max(total, 1)


def test_mean_does_not_satisfy_the_identity_of_opo():
  # What a baseline that forgets the weights gives: 0.5*9 - 0.5*1 = 4, not 0.
  rewards, lengths = jnp.array([1.0, 0.0]), jnp.array([9, 1])
  ids = jnp.array([0, 0])
  assert (ESTIMATORS["mean"](rewards, lengths, ids, num_groups=1) @ lengths) == 4.0
  assert abs(ESTIMATORS["opo"](rewards, lengths, ids, num_groups=1) @ lengths) < 1e-6


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"reinforce"}))
@few
@given(batch=batches(), reward=st.floats(-100, 100, width=32))
def test_equal_rewards_give_exactly_zero(name, batch, reward):
  # Exactly: packing leaves out what is zero, and 1e-8 / (std + 1e-6) would be 0.01.
  _, lengths, ids, valid = batch
  rewards = np.where(valid, reward, np.nan)
  assert not run(name, rewards, lengths, ids, valid).any()


@pytest.mark.parametrize(
  "name", ["mean", "rloo", "opo", "opo_loo", "opo_batch", "grpo"]
)
@few
@given(batch=batches(), shift=st.sampled_from([-3.0, 0.5, 3.0]))
def test_advantages_do_not_depend_on_a_constant_added_to_rewards(name, batch, shift):
  rewards, lengths, ids, valid = batch
  shifted = run(name, rewards + shift, lengths, ids, valid)
  # Twice: both sides round, and rewards are up to twice as large.
  error = np.abs(shifted - run(name, *batch))
  assert (error <= 4 * tolerance(name, *batch)).all()


@pytest.mark.parametrize("name", ["mean", "rloo", "opo", "opo_loo", "opo_batch"])
@few
@given(batch=batches(), scale=st.sampled_from([-8.0, 0.25, 1024.0]))
def test_advantages_are_linear_in_the_scale_of_rewards(name, batch, scale):
  rewards, lengths, ids, valid = batch
  scaled = run(name, rewards * scale, lengths, ids, valid)
  # Powers of two: float32 scales without rounding.
  np.testing.assert_array_equal(scaled, run(name, *batch) * scale)


@names
@few
@given(batch=batches(), order=st.permutations(range(NUM_ROWS)))
def test_order_of_rows_does_not_matter(name, batch, order):
  permuted = run(name, *(array[order] for array in batch))
  expected = run(name, *batch)[order]
  error = np.abs(permuted - expected)
  if name == "maxrl":  # may divide by a mean near 0, of either sign
    error /= 1 + np.abs(expected) ** 2 * 100
  assert (error <= 2 * tolerance(name, *batch)[order]).all()


@names
def test_names_of_groups_do_not_matter(name):
  rewards, lengths, ids, valid = fixed_batch()
  renamed = np.random.default_rng(1).permutation(NUM_GROUPS)[ids]
  np.testing.assert_array_equal(
    run(name, rewards, lengths, renamed, valid), run(name, rewards, lengths, ids, valid)
  )


@names
@few
@given(batch=batches(), garbage=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_row_that_does_not_count_moves_nobody(name, batch, garbage):
  rewards, lengths, ids, valid = batch
  counts = valid & (lengths > 0)
  with_garbage = run(name, np.where(counts, rewards, garbage), lengths, ids, valid)
  assert not with_garbage[~counts].any()
  # The same rows, those that do not count in the group that is empty otherwise.
  apart = np.where(counts, ids, EMPTY_GROUP)
  expected = run(name, np.where(counts, rewards, 0.0), lengths, apart, valid)
  np.testing.assert_array_equal(with_garbage, expected)


@names
def test_padding_rows_change_nothing(name):
  # 24 rows, and the same with 9 invalid ones that point anywhere.
  rewards, lengths, ids, valid = fixed_batch()
  padded = ESTIMATORS[name](
    jnp.concatenate([jnp.float32(rewards), jnp.full(9, jnp.nan)]),
    jnp.concatenate([jnp.int32(lengths), jnp.arange(9) * 50]),
    jnp.concatenate([jnp.int32(ids), jnp.arange(9) % NUM_GROUPS]),
    num_groups=NUM_GROUPS,
    valid=jnp.concatenate([jnp.asarray(valid), jnp.zeros(9, bool)]),
  )
  expected = run(name, rewards, lengths, ids, valid)
  np.testing.assert_allclose(padded[:NUM_ROWS], expected, rtol=4 * EPS, atol=ATOL)
  assert not np.any(padded[NUM_ROWS:])


@names
@pytest.mark.parametrize("why", ["unscorable", "zero length"])
def test_batch_without_a_row_that_counts_gives_zero(name, why):
  rewards = np.full(NUM_ROWS, np.nan)
  _, lengths, ids, valid = fixed_batch()
  if why == "unscorable":
    valid = np.zeros(NUM_ROWS, bool)
  else:
    lengths = np.zeros(NUM_ROWS)
  assert not run(name, rewards, lengths, ids, valid).any()


@pytest.mark.parametrize("name", ["mean", "opo", "opo_loo"])
def test_group_without_weight_is_quiet_where_someone_looks_for_nan(name):
  # With `debug_nans` a 0 / 0 raises even where its result is thrown away.
  with jax.debug_nans(True):
    zeros = jnp.zeros(4)
    assert not np.any(ESTIMATORS[name](zeros, zeros, jnp.zeros(4, int), num_groups=2))


@pytest.mark.parametrize("name", ["mean", "grpo", "rloo", "maxrl", "opo", "opo_loo"])
def test_single_row_of_a_group_gets_zero(name):
  # Row 0 is alone from the start, row 1 because its neighbours do not count.
  rewards, lengths = np.array([0.7, 1.3, 5.0, np.nan]), np.array([6, 11, 0, 3])
  ids, valid = np.array([1, 0, 0, 0]), np.array([True, True, True, False])
  advantages = ESTIMATORS[name](
    jnp.float32(rewards), lengths, ids, num_groups=2, valid=valid
  )
  assert advantages.tolist() == [0.0, 0.0, 0.0, 0.0]


@few
@given(batch=batches())
def test_leaving_a_row_out_undoes_its_own_share_of_the_baseline(batch):
  """r - b = (1 - l / L) (r - b without the row)."""
  _, lengths, ids, valid = batch
  opo, opo_loo = run("opo", *batch), run("opo_loo", *batch)
  for i in np.flatnonzero(valid & (lengths > 0)):
    total = lengths[valid & (ids == ids[i])].sum()
    assert abs(opo[i] - (1 - lengths[i] / total) * opo_loo[i]) <= ATOL


def test_opo_loo_has_no_advantage_on_average_and_opo_shrinks():
  # Rewards independent of lengths, uniform on {0, 1}: given row 0's reward r, the
  # others' mean is 1/2, so E[A_0 | r = 1] = 1/2 without the row in its baseline, and
  # with it (1 - 90/100) / 2 = 0.05. All 2^2 rewards of the others, row 0 right.
  lengths, ids = np.array([90, 3, 7]), np.zeros(3, int)
  average = {}
  for name in ("opo", "opo_loo"):
    advantages = [
      ESTIMATORS[name](jnp.array([1.0, a, b]), lengths, ids, num_groups=1)[0]
      for a in (0, 1)
      for b in (0, 1)
    ]
    average[name] = float(np.mean(advantages))
  assert average["opo_loo"] == pytest.approx(0.5, abs=1e-5)
  assert average["opo"] == pytest.approx(0.05, abs=1e-6)


@few
@given(batch=batches())
def test_opo_batch_is_opo_on_one_group(batch):
  rewards, lengths, ids, valid = batch
  one_group = run("opo", rewards, lengths, np.full_like(ids, 3), valid)
  np.testing.assert_allclose(run("opo_batch", *batch), one_group, atol=ATOL)


@few
@given(batch=batches())
def test_advantage_is_reward_minus_baseline(batch):
  rewards, lengths, ids, valid = batch
  baseline = weighted_baseline_jit(rewards, lengths, ids, valid)
  counts = valid & (lengths > 0)
  difference = np.where(counts, np.where(counts, rewards, 0) - baseline, 0)
  np.testing.assert_allclose(run("opo", *batch), difference, atol=ATOL)
  assert np.isfinite(baseline).all()


@jax.jit
def _weighted_baseline(rewards, lengths, ids, valid):
  return weighted_baseline(rewards, lengths, ids, num_groups=NUM_GROUPS, valid=valid)


def weighted_baseline_jit(rewards, lengths, ids, valid):
  return np.asarray(_weighted_baseline(np.float32(rewards), lengths, ids, valid))


def test_opo_baseline_has_the_least_variance_where_squared_norms_grow_with_length():
  # Orthogonal unit token gradients: ||A s||^2 = A^2 l. Over the two answers of a
  # prompt, equally likely: E||.||^2 = (20 (1 - b)^2 + 5 b^2) / 2, least at b = 20/25.
  rewards, lengths = jnp.array([1.0, 0.0]), jnp.array([20, 5])
  baseline = weighted_baseline(rewards, lengths, jnp.zeros(2, int), num_groups=1)[0]
  assert baseline == pytest.approx(0.8, abs=EPS)
  second_moment = [float(((rewards - b) ** 2 * lengths).sum()) for b in (0.5, 0.8, 0.9)]
  assert second_moment == pytest.approx([6.25, 4.0, 4.25], abs=1e-5)


# --- What arrays may be ---


@names
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "int8"])
def test_arithmetic_is_float32_whatever_comes_in(name, dtype):
  # 300 * 3 = 900 and sums near 3000 overflow int8, and bfloat16 keeps 8 bits of them.
  rewards, lengths, ids, valid = fixed_batch()
  rewards = np.where(valid, np.round(rewards), 0)
  result = ESTIMATORS[name](
    jnp.asarray(rewards).astype(dtype),
    jnp.asarray(lengths, jnp.int32),
    jnp.asarray(ids),
    num_groups=NUM_GROUPS,
    valid=jnp.asarray(valid),
  )
  assert result.dtype == jnp.float32
  # Jitted and not: fused multiply-adds round differently; maxrl divides by small means.
  expected = run(name, rewards, lengths, ids, valid)
  np.testing.assert_allclose(result, expected, rtol=1e-5, atol=ATOL)


@names
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lengths_may_be_floats(name, dtype):
  # Lengths up to 255 are exact in bfloat16; their sums and products are not.
  rewards, lengths, ids, valid = fixed_batch()
  lengths = np.minimum(lengths, 255)
  result = ESTIMATORS[name](
    jnp.float32(rewards),
    jnp.asarray(lengths).astype(dtype),
    jnp.asarray(ids),
    num_groups=NUM_GROUPS,
    valid=jnp.asarray(valid),
  )
  expected = run(name, rewards, lengths, ids, valid)
  np.testing.assert_allclose(result, expected, rtol=1e-5, atol=ATOL)


@names
def test_rows_sharded_over_eight_devices_give_the_same_advantages(name):
  assert len(jax.devices()) == 8
  mesh = Mesh(np.array(jax.devices()), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  rewards, lengths, ids, valid = fixed_batch()
  arrays = jax.device_put(
    (np.float32(rewards), np.int32(lengths), np.int32(ids), valid), sharding
  )
  sharded = jitted(name)(*arrays[:3], valid=arrays[3])
  # Groups straddle devices; halves and integers add up exactly in any order.
  assert all(len(set(ids[i : i + 3])) > 1 for i in range(0, NUM_ROWS, 3))
  expected = run(name, rewards, lengths, ids, valid)
  np.testing.assert_allclose(sharded, expected, rtol=2 * EPS, atol=EPS)


@pytest.mark.parametrize("name", ["mean", "rloo", "opo", "opo_loo", "opo_batch"])
def test_gradient_with_respect_to_rewards_is_that_of_the_formula(name):
  """A learned reward may be trained through the advantage."""
  rewards, lengths, ids, valid = fixed_batch()
  rewards = np.where(valid & (lengths > 0), rewards + np.arange(NUM_ROWS) / 16, np.nan)
  weights = np.cos(np.arange(NUM_ROWS))
  grads = jax.grad(
    lambda r: (jitted(name)(r, lengths, ids, valid=valid) * weights).sum()
  )(np.float32(rewards))
  # The advantage is linear in rewards: differences in float64 are exact.
  expected = np.zeros(NUM_ROWS)
  for i in np.flatnonzero(valid & (lengths > 0)):
    moved = rewards + (np.arange(NUM_ROWS) == i)
    change = reference(name, moved, lengths, ids, valid) - reference(
      name, rewards, lengths, ids, valid
    )
    expected[i] = change @ weights
  np.testing.assert_allclose(grads, expected, atol=1e-5)  # sums of 24 in float32


@pytest.mark.parametrize(
  ("rewards", "lengths", "ids", "valid"),
  [
    ((4,), (3,), (4,), None),
    ((4,), (4,), (2,), None),
    ((4,), (4,), (4,), (1,)),
    ((4, 1), (4, 1), (4, 1), None),
  ],
)
def test_shapes_that_differ_are_refused_and_shown(rewards, lengths, ids, valid):
  with pytest.raises(ValueError, match=r"shape \[N\], got .*'rewards': \(4,"):
    ESTIMATORS["opo"](
      jnp.zeros(rewards),
      jnp.ones(lengths),
      jnp.zeros(ids, int),
      num_groups=1,
      valid=None if valid is None else jnp.ones(valid, bool),
    )

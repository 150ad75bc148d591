"""Advantages: identities of the algebra, and values against NumPy in float64.

All estimators are one compiled program over arrays of one shape (24 rows, 7 groups, one
of them always empty); smaller cases are padded to it (`by_hand`). The rows are uneven:
unsorted group ids, groups of one row, zero lengths, NaN rewards of unscorable rows.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opo_jax.advantages import ESTIMATORS, opo, optimal_token, weighted_baseline

NUM_ROWS, NUM_GROUPS = 24, 7
EMPTY_GROUP = 4
EPS = float(jnp.finfo(jnp.float32).eps)
# Rewards are at most 3 in size and a baseline sums 24 of them: a few roundings each.
ATOL = 16 * 3 * EPS

# What is added up is above the smallest float32: a part in a million of 1e-30 is.
constant_rewards = st.floats(-100, 100, width=32).filter(
  lambda reward: reward == 0 or abs(reward) > 1e-30
)

few = settings(max_examples=30, deadline=None)


@functools.partial(jax.jit, static_argnames="num_groups")
def all_estimators(rewards, lengths, ids, valid=None, *, num_groups=NUM_GROUPS):
  """{name: [N]}."""
  return {
    name: estimator(rewards, lengths, ids, num_groups=num_groups, valid=valid)
    for name, estimator in ESTIMATORS.items()
  }


def run(rewards, lengths, ids, valid):
  """{name: [N]} in float64, so that tests lose nothing."""
  args = np.float32(rewards), np.int32(lengths), np.int32(ids), np.asarray(valid)
  return {
    name: np.asarray(advantages, np.float64)
    for name, advantages in all_estimators(*args).items()
  }


def pad(rewards, weights, ids, valid=None):
  """The rows, and invalid rows up to the shape that is compiled."""
  missing = NUM_ROWS - len(rewards)
  valid = np.ones(len(rewards), bool) if valid is None else np.asarray(valid)
  return (
    np.pad(np.float32(rewards), (0, missing), constant_values=np.nan),
    np.pad(np.float32(weights), (0, missing), constant_values=9),
    np.pad(np.int32(ids), (0, missing)),
    np.pad(valid, (0, missing)),
  )


def by_hand(rewards, lengths, ids, valid=None):
  """{name: [n]} of fewer rows."""
  found = run(*pad(rewards, lengths, ids, valid))
  return {name: advantages[: len(rewards)] for name, advantages in found.items()}


@functools.partial(jax.jit, static_argnames="leave_one_out")
def _baseline(rewards, weights, ids, valid, leave_one_out=False):
  kwargs = dict(num_groups=NUM_GROUPS, valid=valid, leave_one_out=leave_one_out)
  return weighted_baseline(rewards, weights, ids, **kwargs)


def baseline(rewards, weights, ids, valid=None, **options):
  """[n] from `weighted_baseline`."""
  return np.asarray(_baseline(*pad(rewards, weights, ids, valid), **options))[
    : len(rewards)
  ]


def assert_none(wrong):
  """Shows every case that failed; `wrong` maps cases to what was found."""
  wrong = {case: found for case, found in wrong.items() if np.any(found)}
  assert not wrong, wrong


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


@few
@given(batch=batches())
def test_every_estimator_equals_its_formula_in_float64(batch):
  found = run(*batch)
  del found["maxrl"]  # below
  assert_none(
    {
      name: np.abs(advantages - reference(name, *batch)) > tolerance(name, *batch)
      for name, advantages in found.items()
    }
  )


@few
@given(batch=batches(unscorable=False))
def test_maxrl_equals_its_formula_in_float64(batch):
  # Its rewards are not negative. Dividing by the mean magnifies rounding by 1 / mean,
  # and a mean in float32 that is not zero is at least 0.25 / 24 here.
  _, lengths, ids, valid = batch
  batch = np.abs(batch[0]), lengths, ids, valid
  expected = reference("maxrl", *batch)
  np.testing.assert_allclose(run(*batch)["maxrl"], expected, rtol=1e-4, atol=1e-4)


def test_opo_gives_what_lmops_and_verl_give():
  # Group 7's baseline: (4*1 + 1*0 + 5*0) / 10 = 0.4   -> 0.6, -0.4, -0.4
  # Group 2's baseline: (3*1 + 1*-0.5) / 4   = 0.625   -> 0.375, -1.125
  # Group 0 has one row: 0 here and in LMOps (verl: the reward, 0.25).
  rewards = [1.0, 1.0, 0.0, 0.25, -0.5, 0.0]
  advantages = by_hand(rewards, [3, 4, 1, 9, 1, 5], [2, 6, 6, 0, 2, 6])["opo"]
  expected = [0.375, 0.6, -0.4, 0.0, -1.125, -0.4]
  np.testing.assert_allclose(advantages, expected, atol=2 * EPS)


def test_every_estimator_by_hand(subtests):
  # rewards 1 0 0 2 in group 0, 3 1 in group 1; lengths 2 1 3 2, 1 3
  expected = {
    "reinforce": [1, 0, 0, 2, 3, 1],
    # means 0.75 and 2
    "mean": [0.25, -0.75, -0.75, 1.25, 1, -1],
    # others' means 2/3 1 1 1/3, 1 3
    "rloo": [1 / 3, -1, -1, 5 / 3, 2, -2],
    # squares .0625 + .5625 + .5625 + 1.5625 = 2.75, / 3, root = 0.957427; root of 2
    "grpo": [0.261116, -0.783349, -0.783349, 1.305581, 0.707106, -0.707106],
    # batch mean 7/6; squares 1/36 + 49/36 + 49/36 + 25/36 + 121/36 + 1/36 = 246/36,
    # / 5 = 41/30, root = 1.169045
    "reinforce_pp": [-0.142566, -0.997964, -0.997964, 0.712832, 1.568230, -0.142566],
    # divided by the mean
    "maxrl": [1 / 3, -1, -1, 5 / 3, 0.5, -0.5],
    # baselines (2 + 4) / 8 = 0.75 and (3 + 3) / 4 = 1.5
    "opo": [0.25, -0.75, -0.75, 1.25, 1.5, -0.5],
    # others' (0 + 0 + 4) / 6, 6 / 7, 6 / 5, 2 / 6; 3 / 3, 3 / 1
    "opo_loo": [1 / 3, -6 / 7, -6 / 5, 5 / 3, 2, -2],
    # (2 + 4 + 3 + 3) / 12 = 1
    "opo_batch": [0, -1, -1, 1, 2, 0],
  }
  found = by_hand([1.0, 0, 0, 2, 3, 1], [2, 1, 3, 2, 1, 3], [0, 0, 0, 0, 1, 1])
  assert found.keys() == expected.keys()
  for name, advantages in found.items():
    with subtests.test(name):
      # 3e-6: the digits written here, and the epsilon of 1e-6 beside a std or mean
      # near 1.
      np.testing.assert_allclose(advantages, expected[name], atol=3e-6)


def test_baseline_weighs_by_any_weights_of_any_scale():
  # (0.5*4 + 1.5*2) / 2 = 2.5; rows left out see the other's reward alone.
  rewards, ids, valid = [4.0, 2.0, 9.0], [0, 0, 0], [True, True, False]
  for scale in (1e-6, 1.0, 1e6):
    weights = scale * np.array([0.5, 1.5, 8.0])
    found = baseline(rewards, weights, ids, valid)
    np.testing.assert_allclose(found[:2], [2.5, 2.5], rtol=4 * EPS)
    others = baseline(rewards, weights, ids, valid, leave_one_out=True)
    np.testing.assert_allclose(others[:2], [2.0, 4.0], rtol=16 * EPS)


def test_grpo_with_the_epsilon_of_trl():
  # Mean 0.25, std sqrt((9 + 1 + 1 + 1) / 16 / 3) = 0.5: 0.75 / 0.5001, -0.25 / 0.5001
  estimator = functools.partial(ESTIMATORS["grpo"], num_groups=1, epsilon=1e-4)
  rewards = np.float32([1.0, 0, 0, 0])
  advantages = jax.jit(estimator)(rewards, np.ones(4), np.zeros(4, int))
  np.testing.assert_allclose(advantages, [1.4997001] + 3 * [-0.4999], rtol=1e-6)


def test_alpha_is_the_exponent_of_the_gradient_norm_in_the_length(subtests):
  rewards, lengths, ids = (
    np.float32([1.0, 0.0, 7.0]),
    np.array([1, 4, 0]),
    np.zeros(3, int),
  )

  @jax.jit
  def advantages(alpha):
    def row(alpha):
      found = opo(rewards, lengths, ids, num_groups=1, alpha=alpha)
      return found[0], found

    slope, found = jax.grad(row, has_aux=True)(alpha)
    loo = ESTIMATORS["opo_loo"](rewards, lengths, ids, num_groups=1, alpha=alpha)
    return found, loo, slope

  for alpha, share in (
    (0.0, 1 / 2),  # the mean
    (0.5, 1 / 5),  # lengths 1, 4
    (1.0, 1 / 17),  # squared
    (-0.5, 4 / 5),  # 1 and 1/4: for a loss that averages over each response
  ):
    with subtests.test(alpha=alpha):
      found, loo, slope = advantages(alpha)
      np.testing.assert_allclose(found, [1 - share, -share, 0], rtol=4 * EPS)
      np.testing.assert_allclose(loo, [1, -1, 0], rtol=8 * EPS)
      # It may be fitted: by l^(2a), db/da = -2 log 4 b (1 - b), with a row of length 0
      # beside.
      expected = 2 * np.log(4) * share * (1 - share)
      assert float(slope) == pytest.approx(expected, rel=1e-5)


def test_opo_of_very_long_responses_and_baselines_of_huge_weights_stay_exact():
  # (1e5 * 1 + 3e5 * 0) / 4e5 = 0.25
  advantages = by_hand([1.0, 0], [100_000, 300_000], [0, 0])["opo"]
  np.testing.assert_allclose(advantages, [0.75, -0.25], rtol=4 * EPS)
  for scale in (1e-30, 1e30):
    found = baseline([1.0, 0], scale * np.array([1.0, 3.0]), [0, 0])
    np.testing.assert_allclose(found, [0.25, 0.25], rtol=4 * EPS)
  # A row without weight does not count; a group without any sees its own rewards.
  found = baseline([1.0, 3.0, 5.0], [0.0, 2.0, 0.0], [0, 0, 1])
  assert found.tolist() == [3.0, 3.0, 5.0]
  # The reward of an unscorable row is not read.
  found = baseline([2.0, np.nan, 7.0], np.zeros(3), np.zeros(3), [True, True, False])
  assert found.tolist() == [2.0, 0.0, 0.0]


def test_squared_gradient_norms_give_the_baseline_of_least_variance():
  # A softmax over 3 answers: score e_a - pi, all answers once, weighed by pi.
  policy, rewards = np.array([0.6, 0.3, 0.1]), np.array([0.2, 1.0, 0.5])
  scores = np.eye(3) - policy

  def variance(b):
    gradients = (rewards - b)[:, None] * scores
    return policy @ (gradients**2).sum(1) - ((policy @ gradients) ** 2).sum()

  weights = policy * (scores**2).sum(1)
  b = float(baseline(rewards, weights, np.zeros(3))[0])
  assert variance(b) < min(variance(b - 0.01), variance(b + 0.01), variance(0.0))
  # And it is the minimum: of a parabola, half-way between equal values.
  assert variance(b - 0.3) == pytest.approx(variance(b + 0.3), rel=1e-5)


# --- Per token ---

NUM_TOKENS = 6
_optimal_token = jax.jit(functools.partial(optimal_token, num_groups=NUM_GROUPS))


@st.composite
def token_batches(draw):
  """(rewards, energy, mask, ids, valid): holes, empty rows, NaN behind the mask."""
  rewards, _, ids, valid = draw(batches())
  seed = draw(st.integers(0, 2**16))
  rng = np.random.default_rng(seed)
  lengths = rng.integers(0, NUM_TOKENS + 1, NUM_ROWS)
  mask = np.arange(NUM_TOKENS) < lengths[:, None]
  mask &= rng.random(mask.shape) < 0.85
  energy = rng.integers(0, 9, mask.shape) / 8
  return rewards, np.where(mask, energy, np.nan), mask, ids, valid


def run_tokens(rewards, energy, mask, ids, valid):
  args = np.float32(rewards), np.float32(energy), mask, np.int32(ids)
  return np.asarray(_optimal_token(*args, valid=valid), np.float64)


def alive_and_spent(energy, mask, valid):
  """[N, T] both, row by row and token by token."""
  alive, spent = np.zeros(mask.shape, bool), np.zeros(mask.shape)
  for i, t in np.ndindex(mask.shape):
    alive[i, t] = valid[i] and mask[i, t:].any()
    spent[i, t] = sum(energy[i, j] for j in range(t + 1) if mask[i, j])
  return alive, spent


@few
@given(batch=token_batches())
def test_optimal_token_equals_its_formula_in_float64(batch):
  rewards, energy, mask, ids, valid = batch
  alive, spent = alive_and_spent(energy, mask, valid)
  expected = np.zeros(mask.shape)
  for i, t in zip(*np.nonzero(mask & valid[:, None]), strict=True):
    rows = alive[:, t] & (ids == ids[i])
    if spent[rows, t].sum() > 0:
      expected[i, t] = rewards[i] - np.average(rewards[rows], weights=spent[rows, t])
  np.testing.assert_allclose(run_tokens(*batch), expected, atol=ATOL)


@few
@given(batch=token_batches(), order=st.permutations(range(NUM_ROWS)))
def test_optimal_token_sums_to_zero_by_energy_spent_in_any_order(batch, order):
  rewards, energy, mask, ids, valid = batch
  mask = np.arange(NUM_TOKENS) < mask.sum(-1, keepdims=True)  # no holes
  energy = np.nan_to_num(energy, nan=0.5)
  batch = rewards, energy, mask, ids, valid
  advantages = run_tokens(*batch)
  alive, spent = alive_and_spent(energy, mask, valid)
  for group in range(NUM_GROUPS):
    rows = ids == group
    total = (advantages * spent * alive)[rows].sum(0)
    assert (np.abs(total) <= ATOL * np.maximum((spent * alive)[rows].sum(0), 1)).all()
  permuted = run_tokens(*(array[order] for array in batch))
  np.testing.assert_allclose(permuted, advantages[order], atol=2 * ATOL)


@few
@given(batch=token_batches(), reward=constant_rewards)
def test_optimal_token_of_equal_rewards_is_exactly_zero(batch, reward):
  _, energy, mask, ids, valid = batch
  rewards = np.where(valid, reward, np.nan)
  assert not run_tokens(rewards, energy, mask, ids, valid).any()


def test_optimal_token_keeps_a_row_alive_while_a_tool_writes():
  # Row 1 has a hole at t = 1, and ends there; the tool's token is neither trained nor
  # counted, but the row's energy of 1 from before stays in the baseline:
  # B = 1/2, 3/(3 + 1), 4/(4 + 2); at t = 3 row 0 is alone.
  mask = np.array([[1, 1, 1, 1], [1, 0, 1, 0]])
  energy = np.float32([[1.0, 2.0, 1.0, 5.0], [1.0, np.nan, 1.0, np.nan]])
  args = np.float32([1.0, 0.0]), energy, mask, np.array([0, 0])
  advantages = jax.jit(functools.partial(optimal_token, num_groups=1))(*args)
  expected = [[1 / 2, 1 / 4, 1 / 3, 0], [-1 / 2, 0, -2 / 3, 0]]
  np.testing.assert_allclose(advantages, expected, atol=2 * EPS)
  # Were it dead in the hole, row 0 would be compared with itself there.
  assert advantages[0, 1] != 0


def test_optimal_token_of_one_token_is_the_baseline_weighted_by_its_energy():
  rewards, energy, ids, valid = pad([4.0, 2, 9], [0.5, 1.5, 8], [0] * 3, [1, 1, 0])
  one_token = np.arange(NUM_TOKENS) == np.zeros((NUM_ROWS, 1))
  spread = np.where(one_token, energy[:, None], np.nan)
  per_token = run_tokens(rewards, spread, one_token, ids, valid.astype(bool))
  expected = (rewards - baseline([4.0, 2], [0.5, 1.5], [0, 0])[0])[:2]
  np.testing.assert_allclose(per_token[:2, 0], expected, atol=4 * EPS)
  assert not per_token[2:].any() and not per_token[:, 1:].any()


def test_optimal_token_computes_in_float32():
  # 300 energies of 1 add up to 256 in bfloat16.
  energy = np.ones((2, 300))
  energy[1] = 0.5

  @jax.jit
  def both(rewards, energy):
    mask, ids = jnp.ones((2, 300)), jnp.zeros(2, int)
    return [
      optimal_token(
        rewards.astype(dtype), energy.astype(dtype), mask, ids, num_groups=1
      )
      for dtype in ("bfloat16", "float16")
    ]

  for advantages in both(np.float32([1, 0]), energy):
    assert advantages.dtype == jnp.float32
    np.testing.assert_allclose(advantages[0], np.full(300, 1 / 3), rtol=1e-5)


# --- Identities ---


@few
@given(batch=batches(), length=st.integers(1, 5000))
def test_equal_lengths_make_opo_the_group_mean_and_opo_loo_rloo(batch, length):
  rewards, _, ids, valid = batch
  found = run(rewards, np.full(NUM_ROWS, length), ids, valid)
  np.testing.assert_allclose(found["opo"], found["mean"], atol=ATOL)
  # K / (K - 1) is at most 2.
  np.testing.assert_allclose(found["opo_loo"], found["rloo"], atol=2 * ATOL)


@few
@given(batch=batches())
def test_length_weighted_advantages_of_a_group_sum_to_zero(batch):
  _, lengths, ids, valid = batch
  weighted = run(*batch)["opo"] * lengths
  for group in range(NUM_GROUPS):
    total = (lengths * valid)[ids == group].sum()
    assert abs(weighted[ids == group].sum()) <= ATOL * max(total, 1)


def test_mean_does_not_satisfy_the_identity_of_opo():
  # What a baseline that forgets the weights gives: 0.5*9 - 0.5*1 = 4, not 0.
  lengths = np.array([9, 1])
  found = by_hand([1.0, 0.0], lengths, [0, 0])
  assert found["mean"] @ lengths == 4.0
  assert abs(found["opo"] @ lengths) < 1e-6


@few
@given(batch=batches(), reward=constant_rewards)
def test_equal_rewards_give_exactly_zero(batch, reward):
  # Exactly: packing leaves out what is zero, and 1e-8 / (std + 1e-6) would be 0.01.
  _, lengths, ids, valid = batch
  found = run(np.where(valid, reward, np.nan), lengths, ids, valid)
  del found["reinforce"]
  assert_none(found)


@few
@given(batch=batches(), shift=st.sampled_from([-3.0, 0.5, 3.0]))
def test_advantages_do_not_depend_on_a_constant_added_to_rewards(batch, shift):
  rewards, lengths, ids, valid = batch
  found, shifted = run(*batch), run(rewards + shift, lengths, ids, valid)
  # Twice: both sides round, and rewards are up to twice as large.
  assert_none(
    {
      name: np.abs(shifted[name] - found[name]) > 4 * tolerance(name, *batch)
      for name in ("mean", "rloo", "opo", "opo_loo", "opo_batch", "grpo")
    }
  )


@few
@given(batch=batches(), scale=st.sampled_from([-8.0, 0.25, 1024.0]))
def test_advantages_are_linear_in_the_scale_of_rewards(batch, scale):
  rewards, lengths, ids, valid = batch
  found, scaled = run(*batch), run(rewards * scale, lengths, ids, valid)
  # Powers of two: float32 scales without rounding.
  names = ("mean", "rloo", "opo", "opo_loo", "opo_batch")
  assert_none({name: scaled[name] != found[name] * scale for name in names})


@few
@given(batch=batches(), order=st.permutations(range(NUM_ROWS)))
def test_order_of_rows_does_not_matter(batch, order):
  found, permuted = run(*batch), run(*(array[order] for array in batch))
  wrong = {}
  for name in ESTIMATORS:
    expected = found[name][order]
    error = np.abs(permuted[name] - expected)
    if name == "maxrl":  # may divide by a mean near 0, of either sign
      error /= 1 + np.abs(expected) ** 2 * 100
    wrong[name] = error > 2 * tolerance(name, *batch)[order]
  assert_none(wrong)


def test_names_of_groups_do_not_matter():
  rewards, lengths, ids, valid = fixed_batch()
  renamed = np.random.default_rng(1).permutation(NUM_GROUPS)[ids]
  found, expected = run(rewards, lengths, renamed, valid), run(*fixed_batch())
  assert_none({name: found[name] != expected[name] for name in ESTIMATORS})


@few
@given(batch=batches(), garbage=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_row_that_does_not_count_changes_no_other(batch, garbage):
  rewards, lengths, ids, valid = batch
  counts = valid & (lengths > 0)
  with_garbage = run(np.where(counts, rewards, garbage), lengths, ids, valid)
  assert_none({name: found[~counts] for name, found in with_garbage.items()})
  # The same rows, those that do not count in the group that is empty otherwise.
  apart = np.where(counts, ids, EMPTY_GROUP)
  expected = run(np.where(counts, rewards, 0.0), lengths, apart, valid)
  assert_none({name: with_garbage[name] != expected[name] for name in ESTIMATORS})


def test_padding_rows_change_nothing(subtests):
  # 24 rows, and the same with 9 invalid ones that point anywhere.
  rewards, lengths, ids, valid = fixed_batch()
  padded = all_estimators(
    np.float32([*rewards, *[np.nan] * 9]),
    np.int32([*lengths, *np.arange(9) * 50]),
    np.int32([*ids, *np.arange(9) % NUM_GROUPS]),
    np.array([*valid, *[False] * 9]),
  )
  expected = run(*fixed_batch())
  for name, found in padded.items():
    with subtests.test(name):
      kwargs = dict(rtol=4 * EPS, atol=ATOL)
      np.testing.assert_allclose(found[:NUM_ROWS], expected[name], **kwargs)
      assert not np.any(found[NUM_ROWS:])


def test_batch_without_a_row_that_counts_gives_zero():
  rewards = np.full(NUM_ROWS, np.nan)
  _, lengths, ids, valid = fixed_batch()
  assert_none(run(rewards, lengths, ids, np.zeros(NUM_ROWS, bool)))
  assert_none(run(rewards, np.zeros(NUM_ROWS), ids, valid))


def test_group_without_weight_divides_nothing_by_zero():
  """`jax_debug_nans` raises at 0 / 0 even where the result is thrown away."""

  def advantages(zeros):
    ids = jnp.zeros(4, int)
    return [
      ESTIMATORS[name](zeros, zeros, ids, num_groups=2)
      for name in ("mean", "opo", "opo_loo")
    ]

  # Looks at every operation, not only at the result.
  checked = checkify.checkify(advantages, errors=checkify.nan_checks)
  error, _ = jax.jit(checked)(np.zeros(4, np.float32))
  error.throw()


def test_single_row_of_a_group_gets_zero():
  # Row 0 is alone from the start, row 1 because its neighbours do not count.
  rewards, lengths = [0.7, 1.3, 5.0, np.nan], [6, 11, 0, 3]
  found = by_hand(rewards, lengths, [1, 0, 0, 0], [True, True, True, False])
  names = ("mean", "grpo", "rloo", "maxrl", "opo", "opo_loo")
  assert_none({name: found[name] for name in names})


@few
@given(batch=batches())
def test_leaving_a_row_out_undoes_its_own_share_of_the_baseline(batch):
  """r - b = (1 - l / L) (r - b without the row)."""
  _, lengths, ids, valid = batch
  found = run(*batch)
  opo, opo_loo = found["opo"], found["opo_loo"]
  for i in np.flatnonzero(valid & (lengths > 0)):
    total = lengths[valid & (ids == ids[i])].sum()
    assert abs(opo[i] - (1 - lengths[i] / total) * opo_loo[i]) <= ATOL


def test_opo_loo_has_no_advantage_on_average_and_opo_shrinks():
  # Rewards independent of lengths, uniform on {0, 1}: given row 0's reward r, the
  # others' mean is 1/2, so E[A_0 | r = 1] = 1/2 without the row in its baseline, and
  # with it (1 - 90/100) / 2 = 0.05. All 2^2 rewards of the others, row 0 right.
  found = [by_hand([1.0, a, b], [90, 3, 7], [0, 0, 0]) for a in (0, 1) for b in (0, 1)]
  average = {name: np.mean([f[name][0] for f in found]) for name in ("opo", "opo_loo")}
  assert average["opo_loo"] == pytest.approx(0.5, abs=1e-5)
  assert average["opo"] == pytest.approx(0.05, abs=1e-6)


@few
@given(batch=batches())
def test_opo_batch_is_opo_on_one_group(batch):
  rewards, lengths, ids, valid = batch
  one_group = run(rewards, lengths, np.full_like(ids, 3), valid)["opo"]
  np.testing.assert_allclose(run(*batch)["opo_batch"], one_group, atol=ATOL)


@few
@given(batch=batches())
def test_advantage_is_reward_minus_baseline(batch):
  rewards, lengths, ids, valid = batch
  found = baseline(rewards, lengths, ids, valid)
  counts = valid & (lengths > 0)
  difference = np.where(counts, np.where(counts, rewards, 0) - found, 0)
  np.testing.assert_allclose(run(*batch)["opo"], difference, atol=ATOL)
  assert np.isfinite(found).all()


def test_opo_baseline_has_the_least_variance_where_squared_norms_grow_with_length():
  # Orthogonal unit token gradients: ||A s||^2 = A^2 l. Over the two answers of a
  # prompt, equally likely: E||.||^2 = (20 (1 - b)^2 + 5 b^2) / 2, least at b = 20/25.
  rewards, lengths = np.array([1.0, 0.0]), np.array([20, 5])
  assert baseline(rewards, lengths, [0, 0])[0] == pytest.approx(0.8, abs=EPS)
  second_moment = [float(((rewards - b) ** 2 * lengths).sum()) for b in (0.5, 0.8, 0.9)]
  assert second_moment == pytest.approx([6.25, 4.0, 4.25], abs=1e-5)


# --- What arrays may be ---


def test_arithmetic_is_float32_whatever_comes_in(subtests):
  """The first and only thing done with a narrow array is to make it float32.

  300 * 3 = 900 and sums near 3000 overflow int8, and bfloat16 keeps 8 bits of them.
  """
  wide, ids = jnp.ones(NUM_ROWS), jnp.zeros(NUM_ROWS, jnp.int32)
  cases = [
    *(("rewards", dtype) for dtype in ("float16", "bfloat16", "int8")),
    *(("lengths", dtype) for dtype in ("float16", "bfloat16")),
  ]
  for name, (which, dtype) in itertools.product(ESTIMATORS, cases):
    with subtests.test(f"{name}, {which} in {dtype}"):
      narrow = wide.astype(dtype)
      args = (narrow, wide) if which == "rewards" else (wide, narrow)
      estimator = functools.partial(ESTIMATORS[name], num_groups=NUM_GROUPS)
      jaxpr = jax.make_jaxpr(estimator)(*args, ids)
      assert jaxpr.out_avals[0].dtype == jnp.float32
      readers = [
        eqn
        for eqn in jaxpr.eqns
        if any(getattr(var, "aval", var).dtype == dtype for var in eqn.invars)
      ]
      assert readers and {eqn.primitive.name for eqn in readers} == {
        "convert_element_type"
      }
      assert {eqn.params["new_dtype"] for eqn in readers} == {jnp.dtype("float32")}


def test_integers_and_bfloat16_give_the_numbers_of_float32():
  rewards, lengths, ids, valid = fixed_batch()
  rewards, lengths = np.where(valid, np.round(rewards), 0), np.minimum(lengths, 255)
  expected = run(rewards, lengths, ids, valid)

  @jax.jit
  def advantages(rewards, lengths):
    return {
      name: ESTIMATORS[name](rewards, lengths, ids, num_groups=NUM_GROUPS, valid=valid)
      for name in ("opo", "maxrl")
    }

  for pair in (("int32", "int32"), ("bfloat16", "bfloat16")):
    narrow = (
      np.asarray(x, dtype) for x, dtype in zip((rewards, lengths), pair, strict=True)
    )
    for name, found in advantages(*narrow).items():
      # maxrl divides by small means.
      np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=ATOL)


def test_rows_sharded_over_eight_devices_give_the_same_advantages(subtests):
  assert len(jax.devices()) == 8
  mesh = Mesh(np.array(jax.devices()), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  rewards, lengths, ids, valid = fixed_batch()
  arrays = jax.device_put(
    (np.float32(rewards), np.int32(lengths), np.int32(ids), valid), sharding
  )
  # Groups straddle devices; halves and integers add up exactly in any order.
  assert all(len(set(ids[i : i + 3])) > 1 for i in range(0, NUM_ROWS, 3))
  expected = run(*fixed_batch())
  for name, found in all_estimators(*arrays).items():
    with subtests.test(name):
      np.testing.assert_allclose(found, expected[name], rtol=2 * EPS, atol=EPS)


def baseline_of(rewards, lengths, ids, *, num_groups):
  return weighted_baseline(rewards, lengths, ids, num_groups=num_groups)


def token_baseline_of(rewards, lengths, ids, *, num_groups):
  mask = jnp.arange(NUM_TOKENS) < lengths[:, None]
  return optimal_token(rewards, 0.5 + mask, mask, ids, num_groups=num_groups)


# How many reductions over rows each takes, and their columns.
REDUCTIONS = {
  "mean": (ESTIMATORS["mean"], [[NUM_GROUPS, 3]]),
  "rloo": (ESTIMATORS["rloo"], [[NUM_GROUPS, 3]]),
  "grpo": (ESTIMATORS["grpo"], [[NUM_GROUPS, 3], [NUM_GROUPS, 2]]),
  "reinforce_pp": (ESTIMATORS["reinforce_pp"], [[1, 3], [1, 2]]),
  "maxrl": (ESTIMATORS["maxrl"], [[NUM_GROUPS, 3]]),
  "opo": (ESTIMATORS["opo"], [[NUM_GROUPS, 3]]),
  "opo_loo": (ESTIMATORS["opo_loo"], [[NUM_GROUPS, 3]]),
  "opo_batch": (ESTIMATORS["opo_batch"], [[1, 3]]),
  "weighted_baseline": (baseline_of, [[NUM_GROUPS, 3]]),
  "optimal_token": (token_baseline_of, [[NUM_GROUPS, NUM_TOKENS, 3]]),
}


@pytest.mark.usefixtures("no_compilation_cache")
def test_devices_exchange_the_sums_of_groups_and_never_the_rows(subtests):
  mesh = Mesh(np.array(jax.devices()), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  arguments = [
    jax.ShapeDtypeStruct((NUM_ROWS,), dtype, sharding=sharding)
    for dtype in (jnp.float32, jnp.int32, jnp.int32)
  ]
  for name, (function, expected) in REDUCTIONS.items():
    with subtests.test(name):
      function = functools.partial(function, num_groups=NUM_GROUPS)
      # One fused reduction for a baseline, counted before the compiler merges any.
      jaxpr = str(jax.make_jaxpr(function)(*arguments))
      assert jaxpr.count("scatter-add") == len(expected)
      compiled = jax.jit(function).lower(*arguments).compile()
      code = compiled.as_text()
      shapes = re.findall(r"= f32\[([\d,]+)\]\S* all-reduce\(", code)
      assert [[int(n) for n in shape.split(",")] for shape in shapes] == expected
      for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {other}(" not in code and f" {other}-start(" not in code
      assert compiled.output_shardings.is_equivalent_to(sharding, 1)


def test_rows_over_a_mesh_with_explicit_axes():
  mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Explicit,))
  rewards, lengths, ids, valid = fixed_batch()
  with jax.set_mesh(mesh):
    arrays = jax.device_put(
      (np.float32(rewards), np.int32(lengths), np.int32(ids), valid),
      NamedSharding(mesh, PartitionSpec("data")),
    )
    sharded = jax.jit(
      jax.sharding.auto_axes(
        lambda *rows: opo(*rows[:3], num_groups=NUM_GROUPS, valid=rows[3]),
        out_sharding=PartitionSpec("data"),
      )
    )(*arrays)
  expected = run(rewards, lengths, ids, valid)["opo"]
  np.testing.assert_allclose(sharded, expected, rtol=2 * EPS, atol=EPS)


def test_rows_sharded_over_eight_devices_give_the_same_token_advantages():
  mesh = Mesh(np.array(jax.devices()), ("data",))
  rewards, _, ids, valid = fixed_batch()
  rng = np.random.default_rng(3)
  mask = np.arange(NUM_TOKENS) < rng.integers(0, NUM_TOKENS + 1, NUM_ROWS)[:, None]
  energy = rng.integers(0, 9, mask.shape) / 8
  arrays = np.float32(rewards), np.float32(energy), mask, np.int32(ids), valid
  *sharded, valid = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))
  result = _optimal_token(*sharded, valid=valid)
  np.testing.assert_allclose(result, run_tokens(*arrays), rtol=2 * EPS, atol=EPS)


def test_gradient_with_respect_to_rewards_is_that_of_the_formula(subtests):
  """A learned reward may be trained through the advantage."""
  rewards, lengths, ids, valid = fixed_batch()
  rewards = np.where(valid & (lengths > 0), rewards + np.arange(NUM_ROWS) / 16, np.nan)
  weights, names = (
    np.cos(np.arange(NUM_ROWS)),
    ("mean", "rloo", "opo", "opo_loo", "opo_batch"),
  )

  @jax.jit
  def gradients(rewards):
    def weighted(rewards, name):
      kwargs = dict(num_groups=NUM_GROUPS, valid=valid)
      return (ESTIMATORS[name](rewards, lengths, ids, **kwargs) * weights).sum()

    return {name: jax.grad(weighted)(rewards, name) for name in names}

  for name, grads in gradients(np.float32(rewards)).items():
    with subtests.test(name):
      # The advantage is linear in rewards: differences in float64 are exact.
      before, expected = (
        reference(name, rewards, lengths, ids, valid),
        np.zeros(NUM_ROWS),
      )
      for i in np.flatnonzero(valid & (lengths > 0)):
        moved = rewards + (np.arange(NUM_ROWS) == i)
        expected[i] = (reference(name, moved, lengths, ids, valid) - before) @ weights
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


def test_group_id_out_of_range_is_refused_where_it_can_be_seen():
  rewards, lengths = np.float32([1.0, 0.0, 3.0]), np.array([2, 2, 5])
  mask, energy = np.arange(5) < lengths[:, None], np.ones((3, 5))
  for ids, message in (
    ([0, 0, 2], "2 has group id 2"),
    ([0, -1, 1], "1 has group id -1"),
  ):
    for name, estimator in ESTIMATORS.items():
      with pytest.raises(ValueError, match=f"Row {message}, but num_groups is 2"):
        estimator(rewards, lengths, np.array(ids), num_groups=2), name
    with pytest.raises(ValueError, match=f"Row {message}"):
      optimal_token(rewards, energy, mask, np.array(ids), num_groups=2)

  # Rows that do not count may point anywhere. (Inside of `jit`, what is not an argument
  # can be seen.)
  valid, no_length = np.array([True, True, False]), np.array([2, 2, 0])

  @jax.jit
  def advantages():
    def three(estimator):
      return (
        estimator(rewards[:2], lengths[:2], np.array([0, 0]), num_groups=2),
        estimator(rewards, lengths, np.array([0, 0, 9]), num_groups=2, valid=valid),
        estimator(rewards, no_length, np.array([0, 0, -1]), num_groups=2),
      )

    return {name: three(estimator) for name, estimator in ESTIMATORS.items()}

  for name, (expected, not_valid, empty) in advantages().items():
    expected = [*expected.tolist(), 0.0]
    assert not_valid.tolist() == empty.tolist() == expected, name


def test_row_of_a_group_out_of_range_does_not_count_under_jit():
  # -1 would wrap around to the last group, and 7 read its sums.
  rewards, lengths, last = [1.0, 3.0, 5.0], [2, 2, 5], NUM_GROUPS - 1
  expected = by_hand(rewards, [2, 2, 0], [last] * 3)
  for outside in (-1, NUM_GROUPS, 99):
    found = by_hand(rewards, lengths, [last, last, outside])
    assert_none({name: found[name] != expected[name] for name in ESTIMATORS})
  assert all(found[1] > 0 and found[2] == 0 for found in expected.values())


def test_reward_that_is_not_finite_is_refused_unless_the_row_does_not_count():
  lengths, ids, valid = np.array([2, 2, 5]), np.array([0, 0, 0]), [True, True, False]
  for bad in (np.nan, np.inf, -np.inf):
    rewards = np.float32([1.0, 0.0, bad])
    found = by_hand(rewards, lengths, ids, valid)
    for name, estimator in ESTIMATORS.items():
      estimator = functools.partial(estimator, rewards, lengths, ids, num_groups=1)
      with pytest.raises(ValueError, match=rf"Row 2 has reward {bad}; pass valid=F"):
        estimator()
      jax.eval_shape(lambda f=estimator: f(valid=np.array(valid)))  # is not refused
      assert np.isfinite(found[name]).all(), name


def test_energy_that_is_not_finite_is_refused_where_it_is_trained():
  energy = np.float32([[1.0, np.nan], [1.0, 1.0]])
  rewards, mask, ids = np.float32([1, 0]), np.ones((2, 2), bool), np.array([0, 0])
  with pytest.raises(ValueError, match="Row 0 has energy nan at token 1"):
    optimal_token(rewards, energy, mask, ids, num_groups=1)
  mask[0, 1] = False
  accepted = jax.jit(lambda: optimal_token(rewards, energy, mask, ids, num_groups=1))
  assert np.isfinite(accepted()).all()


def test_equal_rewards_have_finite_gradients():
  # sqrt'(0) is infinite, and 0 times it is NaN: also where a group has two rewards.
  lengths, ids = np.float32([3.0, 1, 2, 4, 5]), np.array([0, 0, 0, 1, 1])
  weights = np.cos(np.arange(5.0))

  @jax.jit
  def gradients(rewards, lengths):
    def weighted(rewards, lengths, name):
      return (ESTIMATORS[name](rewards, lengths, ids, num_groups=2) * weights).sum()

    return {
      name: jax.grad(weighted, argnums=(0, 1))(rewards, lengths, name)
      for name in ESTIMATORS
    }

  for rewards in ([0.5, 0.5, 0.5, 1.0, 0.0], [0.5] * 5):
    for name, grads in gradients(np.float32(rewards), lengths).items():
      assert np.isfinite(grads).all(), name


def test_lists_are_arrays_and_unknown_names_are_met_with_near_ones():
  assert opo([1.0, 0.0], [30, 10], [0, 0], num_groups=1).tolist() == [0.25, -0.75]
  with pytest.raises(ValueError, match="group_ids of an integer type, got float32"):
    opo([1.0, 0.0], [30, 10], [0.0, 0.0], num_groups=1)
  with pytest.raises(
    ValueError, match=r"'opo_lo'; did you mean opo_loo\? There are re"
  ):
    ESTIMATORS["opo_lo"]
  assert "opo_lo" not in ESTIMATORS and ESTIMATORS.get("opo_lo") is None


def test_weights_out_of_range_are_refused_unless_the_row_does_not_count():
  rewards, ids = np.float32([1.0, 0.0, 3.0]), np.array([0, 0, 0])
  valid = np.array([True, True, False])
  for bad in (-2.0, np.nan, np.inf):
    weights = np.float32([1.0, 3.0, bad])
    with pytest.raises(ValueError, match=rf"Row 2 has length or weight {bad}"):
      weighted_baseline(rewards, weights, ids, num_groups=1)
    accepted = functools.partial(
      weighted_baseline, rewards, weights, ids, num_groups=1, valid=valid
    )
    jax.eval_shape(lambda f=accepted: f())
    found = baseline(rewards, weights, ids, valid)
    np.testing.assert_allclose(found[:2], [0.25, 0.25], rtol=4 * EPS)
  with pytest.raises(ValueError, match=r"'weights': \(2,\)"):
    weighted_baseline(rewards, weights[:2], ids, num_groups=1)


def test_group_ids_are_integers_and_masks_fit():
  with pytest.raises(ValueError, match="group_ids of an integer type, got float32"):
    opo(jnp.ones(2), jnp.ones(2), jnp.zeros(2), num_groups=1)
  with pytest.raises(ValueError, match=r"'energy': \(2, 4\), 'mask': \(2, 3\)"):
    optimal_token(
      jnp.ones(2), jnp.ones((2, 4)), jnp.ones((2, 3)), jnp.zeros(2, int), num_groups=1
    )
  with pytest.raises(ValueError, match=r"rewards \[N\] .*'rewards': \(3,\)"):
    optimal_token(
      jnp.ones(3), jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.zeros(2, int), num_groups=1
    )

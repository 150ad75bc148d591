"""Losses: one scalar, whatever is behind the mask and however the step is split.

All objectives and aggregations are one compiled program (`results`), which most tests
call with arrays of the same shapes: an operation outside of `jit` compiles by itself.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opo_jax import losses
from opo_jax.advantages import ESTIMATORS, opo

NUM_ROWS, NUM_TOKENS = 6, 5
LENGTHS = np.array([5, 1, 3, 0, 4, 2])
MASK = np.arange(NUM_TOKENS) < LENGTHS[:, None]
# A tool wrote a token in the middle of row 4, and its mask has a hole.
MASK[4, 1] = False
EPS = float(jnp.finfo(jnp.float32).eps)
# Sums of at most 30 terms of size about 1.
TOLERANCE = dict(rtol=1e-6, atol=1e-6)

AGGREGATIONS = [how for how in losses.AGGREGATIONS if how != "constant"]
OBJECTIVES = {
  "policy_gradient": lambda logprobs, old, *args, **kwargs: losses.policy_gradient(
    logprobs, *args, **kwargs
  ),
  "ppo_clip": losses.ppo_clip,
  # Bounds that cut some of the rows below, and not all.
  "gspo": functools.partial(losses.gspo, clip_low=0.05, clip_high=0.1),
  "cispo": functools.partial(losses.cispo, clip_low=0.2, clip_high=0.1),
}
RATIO_OBJECTIVES = ("ppo_clip", "gspo", "cispo")
PAIRS = tuple(itertools.product(OBJECTIVES, losses.AGGREGATIONS))
ROWS_TIMES_LONGEST = {"constant": 17.0}


def value_and_grad(loss, **options):
  return jax.jit(jax.value_and_grad(loss, **options))


@functools.partial(jax.jit, static_argnames="pairs")
def results(
  logprobs, old, advantages, mask, *, normalizers=None, pairs=PAIRS, **options
):
  """{(objective, aggregation): (loss, gradient by logprobs, aux)}."""
  normalizers = ROWS_TIMES_LONGEST | (normalizers or {})

  def result(objective, how):
    options_ = options | dict(aggregation=how, normalizer=normalizers.get(how))

    def loss(logprobs):
      return OBJECTIVES[objective](logprobs, old, advantages, mask, **options_)

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs)
    return value, gradient, aux

  return {pair: result(*pair) for pair in pairs}


@jax.jit
def aggregates(values, mask, normalizers=None, segment_ids=None):
  """{aggregation: scalar}."""
  return {
    how: losses.aggregate(
      values,
      mask,
      how,
      normalizer=normalizers and normalizers[how],
      segment_ids=segment_ids,
    )
    for how in AGGREGATIONS
  }


@jax.jit
def step_normalizers(mask, segment_ids=None):
  return {
    how: losses.step_normalizer(mask, how, segment_ids=segment_ids)
    for how in AGGREGATIONS
  }


def assert_close(actual, expected):
  np.testing.assert_allclose(actual, expected, **TOLERANCE)


def normal(seed, shape=(NUM_ROWS, NUM_TOKENS)):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def logprobs_like(seed):
  return -np.abs(normal(seed)) - 0.01


def behind_the_mask(values, garbage=np.nan):
  return jnp.where(MASK, values, garbage)


def reference_aggregate(values, mask, how, normalizer):
  rows = [row[m].astype(np.float64) for row, m in zip(values, mask, strict=True)]
  if how == "sequence_mean_token_mean":
    total = sum(row.mean() for row in rows if len(row))
  else:
    total = sum(row.sum() for row in rows)
  return total / normalizer


# --- Aggregation ---


def test_aggregation_by_hand():
  # rows [1 2 6], [4], []: sums 9, 4, 0; means 3, 4; 4 tokens, 2 rows with a token
  nan = np.nan
  values = np.array([[1.0, 2, 6, nan], [nan, 4, nan, nan], [nan, nan, nan, nan]])
  assert aggregates(values, ~np.isnan(values)) == {
    "token_mean": 13 / 4,
    "sequence_mean_token_sum": 13 / 2,
    "sequence_mean_token_mean": 7 / 2,
  }


def test_constant_aggregation_divides_by_what_it_is_given():
  values = np.array([[1.0, 2, 6], [4, 9, 9]])
  mask = np.array([[1, 1, 1], [1, 0, 0]])
  assert float(losses.aggregate(values, mask, "constant", normalizer=26.0)) == 0.5
  with pytest.raises(ValueError, match="no normalizer of its own"):
    losses.aggregate(values, mask, "constant")


def test_aggregation_equals_numpy_in_float64(subtests):
  found = aggregates(behind_the_mask(normal(0)), MASK)
  denominators = step_normalizers(MASK)
  for how in AGGREGATIONS:
    with subtests.test(how):
      normalizer = MASK.sum() if how == "token_mean" else MASK.any(-1).sum()
      expected = reference_aggregate(normal(0), MASK, how, normalizer)
      assert_close(found[how], expected)
      assert denominators[how] == normalizer


def test_empty_mask_gives_zero_and_a_zero_gradient(subtests):
  empty, nan = np.zeros_like(MASK), np.full(MASK.shape, np.nan, np.float32)
  for how, value in aggregates(nan, empty).items():
    with subtests.test(how):
      assert value == 0
  for pair, (loss, gradient, _) in results(nan, nan, nan, empty).items():
    with subtests.test(str(pair)):
      assert loss == 0 and not gradient.any()


def test_columns_and_rows_of_padding_change_nothing(subtests):
  padded_mask = np.pad(MASK, ((0, 2), (0, 3)))
  padded = np.pad(normal(0), ((0, 2), (0, 3)), constant_values=np.inf)
  expected = aggregates(normal(0), MASK)
  for how, value in aggregates(padded, padded_mask).items():
    with subtests.test(how):
      assert_close(value, expected[how])


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(NUM_ROWS)), cuts=st.sets(st.integers(1, 5)))
def test_micro_batches_add_up_to_the_step_however_it_is_split(order, cuts):
  values, mask = normal(0)[order], MASK[order]
  normalizers = step_normalizers(MASK)
  parts = [
    aggregates(values[start:stop], mask[start:stop], normalizers)
    for start, stop in itertools.pairwise([0, *sorted(cuts), NUM_ROWS])
  ]
  for how, expected in aggregates(normal(0), MASK).items():
    assert_close(sum(part[how] for part in parts), expected)


def test_token_mean_of_the_step_is_not_the_mean_of_its_parts():
  # One row of 7 tokens that lose 0.1, two of 1 token that lose 0.2 and 0.8:
  # (0.7 + 0.2 + 0.8) / 9 = 0.189. Parts that divide by their own tokens, averaged,
  # give (0.1 + 0.2 + 0.8) / 3 = 0.367, and a loss that depends on the micro-batch size.
  mask = np.arange(7) < np.array([7, 1, 1])[:, None]
  values = np.where(mask, np.array([0.1, 0.2, 0.8])[:, None], 5.0).astype(np.float32)
  normalizer = losses.step_normalizer(mask, "token_mean")
  parts = [(values[i : i + 1], mask[i : i + 1]) for i in range(3)]
  split = sum(
    losses.aggregate(*part, "token_mean", normalizer=normalizer) for part in parts
  )
  assert float(split) == pytest.approx(1.7 / 9, rel=1e-6)
  own = np.mean([losses.aggregate(*part, "token_mean") for part in parts])
  assert own == pytest.approx(1.1 / 3, rel=1e-6)


@jax.jit
def shared_gradients(weight, noise, old, advantages, mask, normalizers=None):
  """{pair: gradient} by a parameter in which the rows of all parts meet."""
  normalizers = ROWS_TIMES_LONGEST | (normalizers or {})

  def gradient(objective, how):
    def loss(weight):
      logprobs = old + 0.3 * jnp.tanh(weight * noise)
      kwargs = dict(aggregation=how, normalizer=normalizers.get(how))
      return OBJECTIVES[objective](logprobs, old, advantages, mask, **kwargs)[0]

    return jax.grad(loss)(weight)

  return {pair: gradient(*pair) for pair in PAIRS}


def test_gradients_of_micro_batches_add_up_to_the_gradient_of_the_step(subtests):
  arrays = normal(3), logprobs_like(1), normal(2, (NUM_ROWS,)), MASK
  weight = normal(9, (NUM_TOKENS,))
  whole = shared_gradients(weight, *arrays)
  normalizers = step_normalizers(MASK)
  # Of two rows each, of different lengths.
  parts = [
    shared_gradients(weight, *(x[rows] for x in arrays), normalizers)
    for rows in np.split(np.random.default_rng(4).permutation(NUM_ROWS), 3)
  ]
  for pair, expected in whole.items():
    with subtests.test(str(pair)):
      assert_close(sum(part[pair] for part in parts), expected)
      assert np.abs(expected).max() > 1e-3


# --- Objectives ---


def test_policy_gradient_by_hand():
  # -(2 * (-1 - 3) + -1 * -0.5) / 3 = 7.5 / 3, and its gradient is -A / 3.
  logprobs, mask = np.array([[-1.0, -3.0], [-0.5, -7.0]]), np.array([[1, 1], [1, 0]])
  loss, grads = value_and_grad(
    lambda logprobs: losses.policy_gradient(logprobs, np.array([2.0, -1.0]), mask)[0]
  )(logprobs)
  assert float(loss) == pytest.approx(2.5, rel=EPS)
  np.testing.assert_allclose(grads, [[-2 / 3, -2 / 3], [1 / 3, 0]], rtol=2 * EPS)


def test_ppo_clip_by_hand():
  # Ratios 0.5, 0.5, 1.5, 1.5, 1.25, clip [0.8, 1.3]:
  # A = 1: 0.5 (min keeps it)   A = -1: -0.8, cut    A = 1: 1.3, cut
  # A = -1: -1.5                A = 1: 1.25          loss = -(0.75) / 5
  ratio = np.array([[0.5, 0.5, 1.5, 1.5, 1.25, 1.5]])
  old = np.array([[-1.0, -2.0, -3.0, -1.5, -0.7, -9.0]])
  advantages = np.array([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0]])
  mask = np.array([[1, 1, 1, 1, 1, 0]])

  def loss(logprobs):
    return losses.ppo_clip(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.3)

  (value, aux), grads = value_and_grad(loss, has_aux=True)(old + np.log(ratio))
  assert float(value) == pytest.approx(-0.15, rel=1e-5)  # exp and log round
  assert aux["clipped"].tolist() == [[False, True, True, False, False, False]]
  np.testing.assert_allclose(aux["ratio"][0], [0.5, 0.5, 1.5, 1.5, 1.25, 1], rtol=1e-5)
  # -ratio * A / 5 where the clip does not cut
  np.testing.assert_allclose(grads[0], [-0.1, 0, 0, 0.3, -0.25, 0], atol=1e-6)


def test_on_policy_ratios_are_1_and_the_gradient_is_that_of_policy_gradient(subtests):
  logprobs = logprobs_like(1)
  for advantages in (normal(2), normal(2, (NUM_ROWS,))):
    found = results(logprobs, logprobs, advantages, MASK)
    for objective, how in itertools.product(RATIO_OBJECTIVES, losses.AGGREGATIONS):
      with subtests.test(str((objective, how, advantages.shape))):
        _, clip_grads, aux = found[objective, how]
        _, grads, _ = found["policy_gradient", how]
        # At ratio 1 both branches of the minimum are equal: each gives half.
        np.testing.assert_allclose(clip_grads, grads, rtol=4 * EPS)
        assert np.abs(grads).max() > 0.05
        np.testing.assert_array_equal(aux["ratio"], np.ones_like(MASK))
        assert not np.any(aux["clipped"])
        assert aux["clip_fraction"] == aux["approx_kl"] == 0


def test_dapo_clips_higher_above_than_below():
  # Ratios 1.25, 1.3, 0.75, 0.79 in [0.8, 1.28]: 1.25 + 1.28 - 0.8 + 0.79 = 2.52
  old = np.array([[-1.0, -2.0, -3.0, -0.5]])
  logprobs = old + np.log(np.array([[1.25, 1.3, 0.75, 0.79]]))
  loss, aux = jax.jit(functools.partial(losses.ppo_clip, clip_high=0.28))(
    logprobs, old, np.array([[1.0, 1.0, -1.0, 1.0]]), np.ones((1, 4))
  )
  assert float(loss) == pytest.approx(-2.52 / 4, rel=1e-5)
  assert aux["clipped"].tolist() == [[False, True, True, False]]


def test_gspo_by_hand():
  # Roots of the products: (2 * 0.5)^(1/2) = 1, (1.44 * 1)^(1/2) = 1.2 cut at 1.1, and
  # (0.729 * 1 * 1)^(1/3) = 0.9 within [0.8, 1.1]. A = 1, 1, -1:
  # loss = -(1 + 1.1 - 0.9) / 3; gradients -A s / l / 3, 0 where it cuts.
  ratio = np.array([[2.0, 0.5, 7.0], [7.0, 1.44, 1.0], [0.729, 1.0, 1.0]])
  mask = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1]])
  old = logprobs_like(0)[:3, :3]

  def loss(logprobs):
    advantages = np.array([1.0, 1.0, -1.0])
    return losses.gspo(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.1)

  (value, aux), grads = value_and_grad(loss, has_aux=True)(old + np.log(ratio))
  assert float(value) == pytest.approx(-0.4, rel=1e-5)
  expected = [[-1 / 6, -1 / 6, 0], [0, 0, 0], [0.1, 0.1, 0.1]]
  np.testing.assert_allclose(grads, expected, atol=1e-6)
  assert aux["clipped"].tolist() == [[False] * 3, [False, True, True], [False] * 3]
  assert float(aux["clip_fraction"]) == pytest.approx(2 / 7)
  expected = [[1, 1, 1], [1, 1.2, 1.2], [0.9, 0.9, 0.9]]
  np.testing.assert_allclose(aux["ratio"], expected, rtol=1e-5)


def test_gspo_clips_as_its_paper_does():
  # Mean log-ratios 5e-4, 3.5e-4, -3.5e-4, -2e-4 beside 3e-4 below and 4e-4 above.
  shift = np.array([5e-4, 3.5e-4, -3.5e-4, -2e-4], np.float32)[:, None]
  old = np.zeros((4, 3), np.float32)
  for advantage, expected in ((1.0, [1, 0, 0, 0]), (-1.0, [0, 0, 1, 0])):
    advantages = np.full(4, advantage, np.float32)
    _, aux = jax.jit(losses.gspo)(old + shift, old, advantages, np.ones((4, 3)))
    assert aux["clipped"][:, 0].tolist() == [bool(e) for e in expected]


def test_gspo_has_value_and_gradient_of_the_objective_over_sequences(subtests):
  old, advantages = logprobs_like(1), normal(2, (NUM_ROWS,))
  lengths = np.maximum(MASK.sum(-1), 1)
  # What an aggregation gives a response whose tokens all have one value.
  shares = {
    "token_mean": MASK.sum(-1) / MASK.sum(),
    "sequence_mean_token_sum": MASK.sum(-1) / MASK.any(-1).sum(),
    "sequence_mean_token_mean": MASK.any(-1) / MASK.any(-1).sum(),
  }

  @value_and_grad
  def sequences(logprobs, share):
    ratio = jnp.exp(jnp.where(MASK, logprobs - old, 0).sum(-1) / lengths)
    bounded = jnp.clip(ratio, 0.95, 1.1)
    return -(share * jnp.minimum(ratio * advantages, bounded * advantages)).sum()

  logprobs = old + 0.3 * normal(3)
  found = results(logprobs, old, advantages, MASK)
  for how, share in shares.items():
    with subtests.test(how):
      expected, expected_grads = sequences(logprobs, share)
      loss, grads, aux = found["gspo", how]
      assert_close(loss, expected)
      assert_close(grads, expected_grads)
      clipped = np.asarray(aux["clipped"])[MASK]
      assert clipped.any() and not clipped.all()


def test_cispo_by_hand():
  # Weights 0.5, 1, 5 (8 cut), 0 of the last token behind the mask; A = 2, -1 per row.
  # loss = -(2 * (0.5 * -3 + 1 * -2) - 5 * -1) / 3 = 2 / 3, gradients -w A / 3: the
  # token that was cut keeps one, which PPO's clip would take away.
  logprobs = np.array([[-3.0, -2.0], [-1.0, -4.0]])
  old = logprobs - np.log(np.array([[0.5, 1.0], [8.0, 3.0]]))
  mask = np.array([[1, 1], [1, 0]])

  def loss(logprobs):
    return losses.cispo(logprobs, old, np.array([2.0, -1.0]), mask)

  (value, aux), grads = value_and_grad(loss, has_aux=True)(logprobs)
  assert float(value) == pytest.approx(2 / 3, rel=1e-5)
  np.testing.assert_allclose(grads, [[-1 / 3, -2 / 3], [5 / 3, 0]], rtol=1e-5)
  assert aux["clipped"].tolist() == [[False, False], [True, False]]
  # Bounded below, too: 0.8 instead of 0.5.
  bounded, _ = jax.jit(functools.partial(losses.cispo, clip_low=0.2))(
    logprobs, old, np.array([2.0, -1.0]), mask
  )
  assert float(bounded) == pytest.approx(2 / 3 + 2 * 0.3 * 3 / 3, rel=1e-5)


def test_measures_of_the_ratio_by_hand():
  # Ratios 2 and 1: k3 of old to new is ratio - 1 - log ratio = 1 - log 2 and 0 (of new
  # to old it would be log 2 - 1/2 and 0). Entropies 1 and 4, on average 2.5.
  old = np.array([[-1.0, -2.0, -7.0]])
  logprobs = old + np.log(np.array([[2.0, 1.0, 3.0]]))
  mask = np.array([[1, 1, 0]])

  @jax.jit
  def measured(entropy):
    return {
      name: objective(logprobs, old, np.ones(1), mask, entropy=entropy)[1]
      for name, objective in OBJECTIVES.items()
    } | {"defaults": losses.ppo_clip(logprobs, old, np.ones(1), mask)[1]}

  found = measured(np.array([[1.0, 4.0, np.nan]]))
  for name in RATIO_OBJECTIVES:
    assert float(found[name]["approx_kl"]) == pytest.approx(
      (1 - np.log(2)) / 2, rel=1e-5
    )
  assert all(found[name]["entropy"] == 2.5 for name in OBJECTIVES)
  assert found["defaults"]["clip_fraction"] == 0.5  # 2 is cut, 1 is not


def test_ratio_that_overflows_has_a_finite_gradient(subtests):
  # exp(100) is infinity, and 0 * infinity in the gradient of a loss that is finite.
  logprobs = np.zeros(MASK.shape, np.float32)
  old = logprobs - np.float32(0.5)
  old[0, 0] = -100.0
  ones = np.ones(NUM_ROWS, np.float32)
  for pair, (value, grads, aux) in results(logprobs, old, ones, MASK).items():
    with subtests.test(str(pair)):
      assert np.isfinite(value) and np.isfinite(grads).all()
      assert all(np.isfinite(measured).all() for measured in aux.values())


# --- Truncated importance sampling ---


def test_truncated_importance_by_hand():
  # Ratios 0.5, 1.5, 4 with a cap of 2; behind the mask 1; constants.
  learner, mask = np.array([[-1.0, -2.0, -3.0, np.nan]]), np.array([[1, 1, 1, 0]])
  sampler = learner - np.log(np.array([[0.5, 1.5, 4.0, 9.0]]))

  @jax.jit
  def weights(cap=2.0):
    def total(learner, sampler):
      weights = losses.truncated_importance(learner, sampler, mask, cap=cap)
      return weights.sum(), weights

    grads, weights = jax.grad(total, argnums=(0, 1), has_aux=True)(learner, sampler)
    return weights, grads

  found, grads = weights()
  np.testing.assert_allclose(found, [[0.5, 1.5, 2.0, 1.0]], rtol=1e-5)
  assert not any(np.any(g) for g in grads)
  np.testing.assert_allclose(weights(0.75)[0], [[0.5, 0.75, 0.75, 1.0]], rtol=1e-5)
  default = jax.jit(losses.truncated_importance)(learner, sampler, mask)
  np.testing.assert_array_equal(default, found)


def test_importance_weights_scale_each_token_of_every_loss(subtests):
  old, advantages = logprobs_like(1), normal(2, (NUM_ROWS,))
  weights = jax.jit(losses.truncated_importance)(old, logprobs_like(4), MASK)
  logprobs = old + 0.3 * normal(3)
  plain = results(logprobs, old, advantages, MASK)
  expected = results(logprobs, old, advantages[:, None] * np.asarray(weights), MASK)
  weighted = results(
    logprobs, old, advantages, MASK, importance_weights=behind_the_mask(weights)
  )
  for pair, (_, grads, _) in weighted.items():
    with subtests.test(str(pair)):
      assert_close(grads, expected[pair][1])
      assert np.abs(grads - plain[pair][1]).max() > 1e-3


def test_cispo_bounded_above_is_policy_gradient_with_truncated_importance():
  old, advantages = logprobs_like(1), normal(2, (NUM_ROWS,))

  @jax.jit
  def both(logprobs, old):
    weights = losses.truncated_importance(logprobs, old, MASK, cap=1.5)
    plain, _ = losses.policy_gradient(
      logprobs, advantages, MASK, importance_weights=weights
    )
    return plain, losses.cispo(logprobs, old, advantages, MASK, clip_high=0.5)[0]

  plain, cispo = both(logprobs_like(3), old)
  assert_close(cispo, plain)


# --- Packing ---

# Rows 0 and 2 in one row, 4, 1 and 5 in another, out of order and with a gap; row 3 is
# empty. Each entry: packed row, first column, segment id, columns taken.
PLACES = {0: (0, 3, 1, 5), 2: (0, 0, 2, 3), 4: (1, 0, 3, 4), 1: (1, 5, 7, 1)}
PLACES[5] = (1, 6, 2, 2)


def pack(values, fill):
  packed = np.full((2, 8), fill, np.asarray(values).dtype)
  for row, (to, start, _, width) in PLACES.items():
    packed[to, start : start + width] = values[row, :width]
  return packed


SEGMENTS = pack(np.array([[PLACES.get(i, [0] * 4)[2]] * 5 for i in range(6)]), 0)
PACKED_MASK = pack(MASK, False)


def test_packed_rows_equal_rows_of_their_own(subtests):
  old, advantages = logprobs_like(1), normal(2, (NUM_ROWS,))
  logprobs = old + 0.3 * normal(3)
  expected = results(logprobs, old, advantages, MASK)
  per_token = np.repeat(advantages[:, None], NUM_TOKENS, 1)
  arrays = [*(pack(x, np.nan) for x in (logprobs, old, per_token)), PACKED_MASK]
  packed = results(*arrays, segment_ids=SEGMENTS)
  # And in micro-batches of one packed row.
  normalizers = step_normalizers(PACKED_MASK, SEGMENTS)
  assert normalizers == step_normalizers(MASK)
  parts = [
    results(
      *(x[i : i + 1] for x in arrays),
      normalizers=normalizers,
      segment_ids=SEGMENTS[i : i + 1],
    )
    for i in range(2)
  ]
  for pair, (loss, grads, _) in expected.items():
    with subtests.test(str(pair)):
      assert_close(packed[pair][0], loss)
      assert_close(packed[pair][1], pack(grads, 0.0))
      assert_close(sum(part[pair][0] for part in parts), loss)


def test_packing_without_segment_ids_is_another_loss():
  # Rows [1 2 6] and [4] packed into [1 2 6 4]: (3 + 4) / 2 as two responses, 13 / 4 as
  # one.
  values, mask = np.array([[1.0, 2, 6, 4]]), np.ones((1, 4), bool)
  how, ids = "sequence_mean_token_mean", np.array([[1, 1, 1, 2]])
  assert aggregates(values, mask, segment_ids=ids)[how] == 3.5
  assert aggregates(values, mask)[how] == 3.25


def test_segment_0_is_padding_whatever_the_mask_says():
  values, ids = np.array([[1.0, 2, 9, 4]]), np.array([[1, 1, 0, 0]])
  assert aggregates(values, values > 0, segment_ids=ids)["token_mean"] == 1.5


# --- OPO in one call ---

GROUPS = np.array([1, 0, 1, 0, 2, 1])
REWARDS = np.array([1.0, 0.5, 0.0, 1.0, 0.75, 0.25], np.float32)


@functools.partial(jax.jit, static_argnames=("num_groups", "estimator", "aggregation"))
def opo_loss(logprobs, rewards, mask, group_ids, *, num_groups, **options):
  """(loss, gradient by logprobs, aux)."""

  def loss(logprobs):
    return losses.opo_loss(
      logprobs, rewards, mask, group_ids, num_groups=num_groups, **options
    )

  (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs)
  return value, gradient, aux


def test_opo_loss_has_the_gradient_of_the_formula(subtests):
  # d loss / d log pi(y_t) = -A_i / tokens, with A from NumPy for opo.
  lengths = MASK.sum(-1)
  for name in ("opo", "opo_loo", "grpo"):
    with subtests.test(name):
      _, grads, aux = opo_loss(
        logprobs_like(1), REWARDS, MASK, GROUPS, num_groups=4, estimator=name
      )
      estimator = jax.jit(functools.partial(ESTIMATORS[name], num_groups=4))
      advantages = estimator(REWARDS, lengths, GROUPS)
      if name == "opo":
        # Group 1: (5 * 1 + 3 * 0 + 2 * 0.25) / 10 = 0.55; the others have one row left.
        np.testing.assert_allclose(advantages, [0.45, 0, -0.55, 0, 0, -0.3], atol=1e-6)
      np.testing.assert_allclose(aux["advantages"], advantages, atol=EPS)
      expected = np.where(MASK, -np.asarray(advantages)[:, None] / MASK.sum(), 0)
      assert_close(grads, expected)


def test_opo_loss_of_rows_that_are_not_valid_is_that_of_the_others(subtests):
  valid = np.array([True, True, False, True, True, True])
  arrays = logprobs_like(1), np.where(valid, REWARDS, np.nan), MASK, GROUPS
  for how in AGGREGATIONS:
    with subtests.test(how):
      options = dict(num_groups=3, aggregation=how)
      loss, grads, _ = opo_loss(*arrays, valid=valid, **options)
      kept_loss, kept_grads, _ = opo_loss(*(x[valid] for x in arrays), **options)
      assert_close(loss, kept_loss)
      assert_close(grads[valid], kept_grads)
      assert not np.any(grads[2])


def test_opo_loss_adds_up_over_micro_batches_that_keep_groups_whole():
  normalizer = step_normalizers(MASK)["token_mean"]

  def loss(rows, **kwargs):
    args = (x[np.array(rows)] for x in (logprobs_like(1), REWARDS, MASK, GROUPS))
    return float(opo_loss(*args, num_groups=3, **kwargs)[0])

  whole = loss(range(NUM_ROWS))
  kept = loss([5, 0, 2], normalizer=normalizer) + loss([1, 3, 4], normalizer=normalizer)
  assert kept == pytest.approx(whole, rel=1e-6)
  # Group 1 cut in two: its rows see other baselines, and the sum is another loss.
  cut = loss([0, 1, 3], normalizer=normalizer) + loss([2, 4, 5], normalizer=normalizer)
  assert abs(cut - whole) > 0.01


def test_opo_loss_takes_a_function():
  mean = functools.partial(opo, alpha=0.0)
  args = logprobs_like(1), REWARDS, MASK, GROUPS
  result, *_ = opo_loss(*args, num_groups=3, estimator=mean)
  expected, *_ = opo_loss(*args, num_groups=3, estimator="mean")
  assert_close(result, expected)


def test_sampling_logprobs_and_advantages_get_no_gradient():
  @jax.jit
  def gradients(old, advantages, rewards):
    def total(old, advantages, rewards):
      logprobs, args = logprobs_like(1), (advantages, MASK)
      ratios = [OBJECTIVES[name](logprobs, old, *args)[0] for name in RATIO_OBJECTIVES]
      plain = losses.policy_gradient(logprobs, *args)[0]
      whole = losses.opo_loss(logprobs, rewards, MASK, GROUPS, num_groups=3)[0]
      return jnp.stack([*ratios, plain, whole])

    return jax.jacrev(total, argnums=(0, 1, 2))(old, advantages, rewards)

  for advantages in (normal(3), normal(3, (NUM_ROWS,))):
    found = gradients(logprobs_like(2), advantages, REWARDS)
    assert not any(np.any(g) for g in found)


def test_what_is_behind_the_mask_reaches_neither_loss_nor_gradient(subtests):
  clean = logprobs_like(3), logprobs_like(1), normal(2)
  expected = results(*clean, MASK)
  for garbage in (np.nan, np.inf, -np.inf):
    found = results(*(behind_the_mask(x, garbage) for x in clean), MASK)
    for pair, (loss, grads, _) in found.items():
      with subtests.test(str((pair, garbage))):
        assert float(loss) == float(expected[pair][0])
        np.testing.assert_array_equal(grads, expected[pair][1])
        assert not np.any(grads[~MASK])


def test_row_without_advantage_may_hold_nan_where_it_is_masked(subtests):
  # Row 3 has no trainable token; an unscorable answer's advantage may be NaN.
  advantages = np.where(LENGTHS > 0, 1.5, np.nan).astype(np.float32)
  found = results(logprobs_like(1), logprobs_like(1), advantages, MASK)
  for pair, (_, grads, _) in found.items():
    with subtests.test(str(pair)):
      assert np.isfinite(grads).all()


def test_groups_of_equal_rewards_can_be_left_out_with_the_same_normalizer():
  # Groups 0 and 2 have equal rewards; 0.3 is not exact in float32.
  ids = np.array([0, 1, 0, 2, 1, 1])
  rewards = np.array([0.3, 1.0, 0.3, 0.7, 0.0, 0.5], np.float32)
  advantages = jax.jit(functools.partial(opo, num_groups=3))(rewards, MASK.sum(-1), ids)
  normalizer = step_normalizers(MASK)["token_mean"]

  @jax.jit
  @jax.grad
  def gradient(weight, noise, advantages, mask, normalizer):
    logprobs = -jnp.square(weight - noise)
    return losses.policy_gradient(
      logprobs, advantages, mask, normalizer=normalizer
    )[0]  # fmt: skip

  def grads(keep, normalizer):
    arrays = (x[keep] for x in (normal(1), advantages, MASK))
    return gradient(normal(2, (NUM_TOKENS,)), *arrays, normalizer)

  packed = np.array([1, 4, 5])
  whole = grads(np.arange(NUM_ROWS), None)
  assert_close(grads(packed, normalizer), whole)
  # 14 tokens, 6 of them kept: a normaliser of the kept rows alone gives 14/6 times it.
  np.testing.assert_allclose(grads(packed, None), whole * 14 / 6, rtol=1e-5)


def test_losses_compute_in_float32(subtests):
  pairs = tuple((objective, "token_mean") for objective in OBJECTIVES)
  for dtype in ("bfloat16", "float16"):
    logprobs, advantages = (
      np.asarray(x, dtype) for x in (logprobs_like(1), normal(2, (NUM_ROWS,)))
    )
    found = results(logprobs, logprobs, advantages, MASK, pairs=pairs)
    exact = [np.asarray(x, np.float64) for x in (logprobs, advantages)]
    for (objective, _), (loss, *_) in found.items():
      with subtests.test(str((objective, dtype))):
        assert loss.dtype == jnp.float32
        by_logprob = objective in ("policy_gradient", "cispo")
        terms = exact[1][:, None] * (exact[0] if by_logprob else 1.0)
        expected = -(terms * MASK).sum() / MASK.sum()
        assert_close(loss, expected)


# --- KL ---


@jax.jit
def kls(logprobs, reference, mask):
  """{estimator: ([N, T], gradient of the sum by logprobs)}."""

  def total(logprobs, estimator):
    values = losses.kl(logprobs, reference, mask, estimator=estimator)
    return values.sum(), values

  def pair(estimator):
    gradient, values = jax.grad(total, has_aux=True)(logprobs, estimator)
    return values, gradient

  return {estimator: pair(estimator) for estimator in ("k1", "k2", "k3")}


def test_kl_by_hand(subtests):
  # log-ratios log 2 and -log 4, ratios ref / pi 1/2 and 4
  expected = {
    "k1": [np.log(2), -np.log(4)],
    "k2": [np.log(2) ** 2 / 2, np.log(4) ** 2 / 2],
    "k3": [1 / 2 - 1 + np.log(2), 4 - 1 - np.log(4)],
  }
  logprobs, reference = np.log([[0.5, 0.2, 1.0]]), np.log([[0.25, 0.8, 0.5]])
  logprobs[0, 2] = np.nan
  found = kls(logprobs, reference, np.array([[1, 1, 0]]))
  for name, values in expected.items():
    with subtests.test(name):
      np.testing.assert_allclose(found[name][0], [[*values, 0.0]], rtol=1e-6)


def test_k1_and_k3_are_unbiased(subtests):
  # Every token once, weighted by its probability: the expectation itself.
  policy = np.array([0.05, 0.25, 0.6, 0.1])
  reference = np.array([0.4, 0.3, 0.2, 0.1])
  expected = (policy * np.log(policy / reference)).sum()
  found = kls(np.log(policy)[None], np.log(reference)[None], np.ones((1, 4)))
  for name in ("k1", "k3"):
    with subtests.test(name):
      np.testing.assert_allclose(found[name][0][0] @ policy, expected, rtol=1e-6)


default_kl = jax.jit(losses.kl)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-20, 0, width=32), min_size=8, max_size=8))
def test_k3_is_never_negative_and_zero_for_equal_policies(values):
  # exp(-x) - 1 + x without expm1 is about -1e-8 for x near 1e-4.
  logprobs = np.float32(values).reshape(2, 4)
  mask = np.ones((2, 4), bool)
  for gap in (0.0, 1e-4, 0.3):
    assert (default_kl(logprobs, np.float32(logprobs + gap), mask) >= 0).all()
  assert not np.any(default_kl(logprobs, logprobs, mask))


def test_small_kl_is_measured_and_not_rounded_away():
  # x^2 / 2 for x = 1e-3: 5e-7 to a thousandth; naive float32 is off by a tenth.
  logprobs, reference = np.array([[0.0]]), np.array([[1e-3]])
  result = float(default_kl(logprobs, reference, np.array([[True]]))[0, 0])
  assert result == pytest.approx(np.expm1(1e-3) - 1e-3, rel=5e-4)


def test_kl_gradient_is_finite_behind_the_mask(subtests):
  garbage = (behind_the_mask(logprobs_like(seed), -np.inf) for seed in (1, 2))
  for name, (_, grads) in kls(*garbage, MASK).items():
    with subtests.test(name):
      assert np.isfinite(grads).all()
      assert not np.any(grads[~MASK])


def test_kl_of_tokens_far_apart_is_finite_with_its_gradient(subtests):
  gaps, zeros = np.array([[-1000.0, 1000.0]]), np.zeros((1, 2))
  for name, (values, grads) in kls(gaps, zeros, gaps == gaps).items():
    with subtests.test(name):
      assert np.isfinite(values).all() and np.isfinite(grads).all()
  assert (kls(gaps, zeros, gaps == gaps)["k3"][0] > 0).all()


def test_only_k2_has_the_gradient_of_the_kl_as_a_penalty(subtests):
  # Every token once, weighted by its probability, which is a constant of the sampler.
  logits, reference = np.array([0.3, -1.0, 2.0]), np.log(np.array([0.5, 0.3, 0.2]))
  policy = np.exp(logits) / np.exp(logits).sum()

  def sampled(logits, estimator):
    logprobs = jax.nn.log_softmax(logits)[None]
    values = losses.kl(logprobs, reference[None], logprobs < 0, estimator=estimator)
    return values[0] @ policy

  def exact(logits):
    logprobs = jax.nn.log_softmax(logits)
    return jnp.exp(logprobs) @ (logprobs - reference)

  def backwards(logits):
    return jnp.exp(reference) @ (reference - jax.nn.log_softmax(logits))

  @jax.jit
  def gradients(logits):
    estimated = {k: jax.grad(sampled)(logits, k) for k in ("k1", "k2", "k3")}
    zero = np.zeros(3)
    return estimated, {
      "k1": zero, "k2": jax.grad(exact)(logits), "k3": jax.grad(backwards)(logits)
    }  # fmt: skip

  found, expected = gradients(logits)
  for name in expected:
    with subtests.test(name):
      np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


# --- Refusals ---


def test_negative_clips_are_refused():
  x = np.zeros((1, 2))
  for objective, name in itertools.product(RATIO_OBJECTIVES, ("clip_low", "clip_high")):
    with pytest.raises(ValueError, match=f"Expected {name} of at least 0, got -0.1"):
      getattr(losses, objective)(x, x, np.ones(1), x == 0, **{name: -0.1})


def test_caps_and_normalizers_are_above_zero():
  x = np.zeros((1, 2))
  for bad in (0.0, -1, np.float32(-2), np.nan):
    with pytest.raises(ValueError, match=f"Expected cap above 0, got {bad}"):
      losses.truncated_importance(x, x, x == 0, cap=bad)
    with pytest.raises(ValueError, match=f"Expected normalizer above 0, got {bad}"):
      losses.aggregate(x, x == 0, "constant", normalizer=bad)


def test_unknown_names_are_answered_with_those_there_are():
  values = np.ones((2, 3))
  with pytest.raises(ValueError, match="'tokens_mean'; did you mean token_mean\\? Th"):
    losses.aggregate(values, values > 0, "tokens_mean")
  with pytest.raises(ValueError, match="'qqqq'; there are token_mean, "):
    losses.step_normalizer(values > 0, "qqqq")
  with pytest.raises(ValueError, match="'k4'; there are k1, k2, k3"):
    losses.kl(values, values, values > 0, estimator="k4")
  with pytest.raises(ValueError, match="estimator 'opo_lo'; did you mean opo_loo"):
    losses.opo_loss(
      values, np.ones(2), values > 0, np.zeros(2, int), num_groups=1,
      estimator="opo_lo",
    )  # fmt: skip


def test_shapes_that_do_not_fit_are_refused_and_shown():
  logprobs, mask = np.ones((2, 3)), np.ones((2, 3), bool)
  with pytest.raises(ValueError, match=r"\(2, 3\), got \(3,\)"):
    losses.policy_gradient(logprobs, np.ones(3), mask)
  with pytest.raises(ValueError, match=r"\(2, 3\), got \(2, 1\)"):
    losses.ppo_clip(logprobs, logprobs, np.ones((2, 1)), mask)
  with pytest.raises(ValueError, match=r"'mask': \(2, 1\), 'values': \(2, 3\)"):
    losses.aggregate(logprobs, mask[:, :1], "token_mean")
  with pytest.raises(ValueError, match=r"'mask': \(2, 2\)"):
    losses.policy_gradient(logprobs, np.ones(2), mask[:, :2])
  with pytest.raises(ValueError, match=r"'mask': \(2,\)"):
    losses.policy_gradient(logprobs, np.ones(2), mask[:, 0])
  for objective in RATIO_OBJECTIVES:
    with pytest.raises(ValueError, match=r"'old_logprobs': \(2, 1\)"):
      OBJECTIVES[objective](logprobs, logprobs[:, :1], np.ones(2), mask)
  with pytest.raises(ValueError, match=r"'entropy': \(2, 1\)"):
    losses.policy_gradient(logprobs, np.ones(2), mask, entropy=logprobs[:, :1])
  with pytest.raises(ValueError, match=r"importance_weights .* got \(3,\)"):
    losses.policy_gradient(logprobs, np.ones(2), mask, importance_weights=np.ones(3))
  with pytest.raises(ValueError, match=r"'reference_logprobs': \(2, 1\)"):
    losses.kl(logprobs, logprobs[:, :1], mask)
  with pytest.raises(ValueError, match=r"'rewards': \(3,\), 'lengths': \(2,\)"):
    losses.opo_loss(logprobs, np.ones(3), mask, np.zeros(2, int), num_groups=1)
  with pytest.raises(ValueError, match=r"valid \[N\] for a mask \(2, 3\), got \(3,\)"):
    losses.opo_loss(
      logprobs, np.ones(2), mask, np.zeros(2, int), num_groups=1, valid=np.ones(3)
    )


def test_segment_ids_that_cannot_be_are_refused():
  values, mask = np.ones((1, 3)), np.ones((1, 3), bool)
  for ids, message in (
    ([[1, 4, 4]], r"lie in \[1, 4\]; number"),
    ([[-1, 1, 1]], r"lie in \[-1, 1\]; number"),
    ([[1.0, 1.0, 2.0]], "integer type, got float32"),
    ([[1, 1]], r"'segment_ids': \(1, 2\)"),
  ):
    with pytest.raises(ValueError, match=message):
      losses.aggregate(values, mask, "token_mean", segment_ids=jnp.array(ids))
  # Where they cannot be seen, such tokens are padding.
  total = jax.jit(
    lambda ids: losses.aggregate(
      values, mask, "sequence_mean_token_mean", segment_ids=ids
    )
  )(jnp.array([[-1, 9, 3]]))
  assert float(total) == 1.0

"""Losses: one scalar, whatever is behind the mask and however the step is split."""

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
aggregations = pytest.mark.parametrize("how", AGGREGATIONS)


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


@pytest.mark.parametrize(
  ("how", "expected"),
  [
    # rows [1 2 6], [4], []: sums 9, 4, 0; means 3, 4; 4 tokens, 2 rows with a token
    ("token_mean", 13 / 4),
    ("sequence_mean_token_sum", 13 / 2),
    ("sequence_mean_token_mean", 7 / 2),
  ],
)
def test_aggregation_by_hand(how, expected):
  nan = jnp.nan
  values = jnp.array([[1.0, 2, 6, nan], [nan, 4, nan, nan], [nan, nan, nan, nan]])
  assert float(losses.aggregate(values, ~jnp.isnan(values), how)) == expected


def test_constant_aggregation_divides_by_what_it_is_given():
  values = jnp.array([[1.0, 2, 6], [4, 9, 9]])
  mask = jnp.array([[1, 1, 1], [1, 0, 0]])
  assert float(losses.aggregate(values, mask, "constant", normalizer=26.0)) == 0.5
  with pytest.raises(ValueError, match="no normalizer of its own"):
    losses.aggregate(values, mask, "constant")


@aggregations
def test_aggregation_equals_numpy_in_float64(how):
  normalizer = MASK.sum() if how == "token_mean" else MASK.any(-1).sum()
  expected = reference_aggregate(normal(0), MASK, how, normalizer)
  result = losses.aggregate(behind_the_mask(normal(0)), MASK, how)
  np.testing.assert_allclose(result, expected, **TOLERANCE)
  assert float(losses.step_normalizer(MASK, how)) == normalizer


@aggregations
def test_empty_mask_gives_zero_and_a_zero_gradient(how):
  def aggregate(values):
    return losses.aggregate(values, jnp.zeros_like(MASK), how)

  loss, grads = jax.value_and_grad(aggregate)(jnp.full(MASK.shape, jnp.nan))
  assert float(loss) == 0.0
  assert not np.any(grads)


@aggregations
def test_columns_and_rows_of_padding_change_nothing(how):
  padded_mask = np.pad(MASK, ((0, 2), (0, 3)))
  padded = np.pad(normal(0), ((0, 2), (0, 3)), constant_values=np.inf)
  np.testing.assert_allclose(
    losses.aggregate(padded, padded_mask, how),
    losses.aggregate(normal(0), MASK, how),
    **TOLERANCE,
  )


@aggregations
@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(NUM_ROWS)), cuts=st.sets(st.integers(1, 5)))
def test_micro_batches_add_up_to_the_step_however_it_is_split(how, order, cuts):
  values, mask = normal(0)[order], MASK[order]
  normalizer = losses.step_normalizer(MASK, how)
  edges = [0, *sorted(cuts), NUM_ROWS]
  total = sum(
    losses.aggregate(values[start:stop], mask[start:stop], how, normalizer=normalizer)
    for start, stop in itertools.pairwise(edges)
  )
  np.testing.assert_allclose(total, losses.aggregate(normal(0), MASK, how), **TOLERANCE)


def test_token_mean_of_the_step_is_not_the_mean_of_its_parts():
  # One row of 7 tokens that lose 0.1, two of 1 token that lose 0.2 and 0.8:
  # (0.7 + 0.2 + 0.8) / 9 = 0.189. Parts that divide by their own tokens, averaged,
  # give (0.1 + 0.2 + 0.8) / 3 = 0.367, and a loss that depends on the memory at hand.
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


OBJECTIVES = {
  "policy_gradient": lambda logprobs, old, *args, **kwargs: losses.policy_gradient(
    logprobs, *args, **kwargs
  ),
  "ppo_clip": losses.ppo_clip,
  # Bounds that cut some of the rows below, and not all.
  "gspo": functools.partial(losses.gspo, clip_low=0.05, clip_high=0.1),
  "cispo": functools.partial(losses.cispo, clip_low=0.2, clip_high=0.1),
}
objectives = pytest.mark.parametrize("objective", sorted(OBJECTIVES))
ratio_objectives = pytest.mark.parametrize("objective", ["ppo_clip", "gspo", "cispo"])


@objectives
@aggregations
def test_gradients_of_micro_batches_add_up_to_the_gradient_of_the_step(objective, how):
  objective = OBJECTIVES[objective]
  weight = normal(9, (NUM_TOKENS,))
  old, advantages = logprobs_like(1), normal(2, (NUM_ROWS,))
  normalizer = losses.step_normalizer(MASK, how)

  def loss(weight, rows, normalizer):
    # A shared parameter, so that rows of different parts meet in one gradient.
    logprobs = old[rows] + 0.3 * jnp.tanh(weight * normal(3)[rows])
    args = logprobs, old[rows], advantages[rows], MASK[rows]
    return objective(*args, aggregation=how, normalizer=normalizer)[0]

  whole = jax.grad(loss)(weight, np.arange(NUM_ROWS), None)
  parts = np.split(np.random.default_rng(4).permutation(NUM_ROWS), [1, 3])
  split = sum(jax.grad(loss)(weight, rows, normalizer) for rows in parts)
  np.testing.assert_allclose(split, whole, **TOLERANCE)


# --- Objectives ---


def test_policy_gradient_by_hand():
  # -(2 * (-1 - 3) + -1 * -0.5) / 3 = 7.5 / 3, and its gradient is -A / 3.
  logprobs, mask = jnp.array([[-1.0, -3.0], [-0.5, -7.0]]), jnp.array([[1, 1], [1, 0]])
  loss, grads = jax.value_and_grad(
    lambda logprobs: losses.policy_gradient(logprobs, jnp.array([2.0, -1.0]), mask)[0]
  )(logprobs)
  assert float(loss) == pytest.approx(2.5, rel=EPS)
  np.testing.assert_allclose(grads, [[-2 / 3, -2 / 3], [1 / 3, 0]], rtol=2 * EPS)


def test_ppo_clip_by_hand():
  # Ratios 0.5, 0.5, 1.5, 1.5, 1.25, clip [0.8, 1.3]:
  # A = 1: 0.5 (min keeps it)   A = -1: -0.8, cut    A = 1: 1.3, cut
  # A = -1: -1.5                A = 1: 1.25          loss = -(0.75) / 5
  ratio = jnp.array([[0.5, 0.5, 1.5, 1.5, 1.25, 1.5]])
  old = jnp.array([[-1.0, -2.0, -3.0, -1.5, -0.7, -9.0]])
  advantages = jnp.array([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0]])
  mask = jnp.array([[1, 1, 1, 1, 1, 0]])

  def loss(logprobs):
    return losses.ppo_clip(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.3)

  (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(old + jnp.log(ratio))
  assert float(value) == pytest.approx(-0.15, rel=1e-5)  # exp and log round
  assert aux["clipped"].tolist() == [[False, True, True, False, False, False]]
  np.testing.assert_allclose(aux["ratio"][0], [0.5, 0.5, 1.5, 1.5, 1.25, 1], rtol=1e-5)
  # -ratio * A / 5 where the clip does not cut
  np.testing.assert_allclose(grads[0], [-0.1, 0, 0, 0.3, -0.25, 0], atol=1e-6)


@ratio_objectives
@aggregations
@pytest.mark.parametrize("per_token", [False, True])
def test_on_policy_ratios_are_1_and_the_gradient_is_that_of_policy_gradient(
  objective, how, per_token
):
  logprobs = logprobs_like(1)
  advantages = normal(2) if per_token else normal(2, (NUM_ROWS,))
  kwargs = dict(aggregation=how)

  def clip(x):
    return OBJECTIVES[objective](x, logprobs, advantages, MASK, **kwargs)

  (_, aux), clip_grads = jax.value_and_grad(clip, has_aux=True)(logprobs)
  grads = jax.grad(lambda x: losses.policy_gradient(x, advantages, MASK, **kwargs)[0])(
    logprobs
  )
  # At ratio 1 both branches of the minimum are equal: each gives half.
  np.testing.assert_allclose(clip_grads, grads, rtol=4 * EPS)
  assert np.abs(grads).max() > 0.05
  np.testing.assert_array_equal(aux["ratio"], np.ones_like(MASK))
  assert not np.any(aux["clipped"])
  assert float(aux["clip_fraction"]) == 0
  assert float(aux["approx_kl"]) == 0


def test_dapo_clips_higher_above_than_below():
  # Ratios 1.25, 1.3, 0.75, 0.79 in [0.8, 1.28]: 1.25 + 1.28 - 0.8 + 0.79 = 2.52
  old = jnp.array([[-1.0, -2.0, -3.0, -0.5]])
  logprobs = old + jnp.log(jnp.array([[1.25, 1.3, 0.75, 0.79]]))
  loss, aux = losses.ppo_clip(
    logprobs,
    old,
    jnp.array([[1.0, 1.0, -1.0, 1.0]]),
    jnp.ones((1, 4)),
    clip_high=0.28,
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
    advantages = jnp.array([1.0, 1.0, -1.0])
    return losses.gspo(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.1)

  (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(old + np.log(ratio))
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
    _, aux = losses.gspo(old + shift, old, jnp.full(4, advantage), jnp.ones((4, 3)))
    assert aux["clipped"][:, 0].tolist() == [bool(e) for e in expected]


@aggregations
def test_gspo_has_value_and_gradient_of_the_objective_over_sequences(how):
  old, advantages = logprobs_like(1), normal(2, (NUM_ROWS,))
  lengths = np.maximum(MASK.sum(-1), 1)
  # What an aggregation gives a response whose tokens all have one value.
  share = {
    "token_mean": MASK.sum(-1) / MASK.sum(),
    "sequence_mean_token_sum": MASK.sum(-1) / MASK.any(-1).sum(),
    "sequence_mean_token_mean": MASK.any(-1) / MASK.any(-1).sum(),
  }[how]

  def sequences(logprobs):
    ratio = jnp.exp(jnp.where(MASK, logprobs - old, 0).sum(-1) / lengths)
    bounded = jnp.clip(ratio, 0.95, 1.1)
    return -(share * jnp.minimum(ratio * advantages, bounded * advantages)).sum()

  def gspo(logprobs):
    return OBJECTIVES["gspo"](logprobs, old, advantages, MASK, aggregation=how)

  logprobs = old + 0.3 * normal(3)
  expected, expected_grads = jax.value_and_grad(sequences)(logprobs)
  (loss, aux), grads = jax.value_and_grad(gspo, has_aux=True)(logprobs)
  np.testing.assert_allclose(loss, expected, **TOLERANCE)
  np.testing.assert_allclose(grads, expected_grads, **TOLERANCE)
  clipped = np.asarray(aux["clipped"])[MASK]
  assert clipped.any() and not clipped.all()


def test_cispo_by_hand():
  # Weights 0.5, 1, 5 (8 cut), 0 of the last token behind the mask; A = 2, -1 per row.
  # loss = -(2 * (0.5 * -3 + 1 * -2) - 5 * -1) / 3 = 2 / 3, gradients -w A / 3: the
  # token that was cut keeps one, which PPO's clip would take away.
  logprobs = jnp.array([[-3.0, -2.0], [-1.0, -4.0]])
  old = logprobs - jnp.log(jnp.array([[0.5, 1.0], [8.0, 3.0]]))
  mask = jnp.array([[1, 1], [1, 0]])

  def loss(logprobs):
    return losses.cispo(logprobs, old, jnp.array([2.0, -1.0]), mask)

  (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(logprobs)
  assert float(value) == pytest.approx(2 / 3, rel=1e-5)
  np.testing.assert_allclose(grads, [[-1 / 3, -2 / 3], [5 / 3, 0]], rtol=1e-5)
  assert aux["clipped"].tolist() == [[False, False], [True, False]]
  # Bounded below, too: 0.8 instead of 0.5.
  bounded, _ = losses.cispo(logprobs, old, jnp.array([2.0, -1.0]), mask, clip_low=0.2)
  assert float(bounded) == pytest.approx(2 / 3 + 2 * 0.3 * 3 / 3, rel=1e-5)


def test_measures_of_the_ratio_by_hand():
  # Ratios 2 and 1: k3 of old to new is ratio - 1 - log ratio = 1 - log 2 and 0 (of new
  # to old it would be log 2 - 1/2 and 0). Entropies 1 and 4, on average 2.5.
  old = jnp.array([[-1.0, -2.0, -7.0]])
  logprobs = old + jnp.log(jnp.array([[2.0, 1.0, 3.0]]))
  mask = jnp.array([[1, 1, 0]])
  kwargs = dict(entropy=jnp.array([[1.0, 4.0, jnp.nan]]))
  for objective in (losses.ppo_clip, losses.gspo, losses.cispo):
    _, aux = objective(logprobs, old, jnp.ones(1), mask, **kwargs)
    assert float(aux["approx_kl"]) == pytest.approx((1 - np.log(2)) / 2, rel=1e-5)
    assert float(aux["entropy"]) == 2.5
  _, aux = losses.ppo_clip(logprobs, old, jnp.ones(1), mask)
  assert float(aux["clip_fraction"]) == 0.5  # 2 is cut, 1 is not
  _, aux = losses.policy_gradient(logprobs, jnp.ones(1), mask, **kwargs)
  assert float(aux["entropy"]) == 2.5


@objectives
def test_ratio_that_overflows_has_a_finite_gradient(objective):
  # exp(100) is infinity, and 0 * infinity in the gradient of a loss that is finite.
  logprobs = jnp.zeros((1, 2))
  old = jnp.array([[-100.0, -0.5]])

  def loss(x):
    return OBJECTIVES[objective](x, old, jnp.ones(1), jnp.ones((1, 2)))

  (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(logprobs)
  assert np.isfinite(value) and np.isfinite(grads).all()
  assert all(np.isfinite(measured).all() for measured in aux.values())


# --- Truncated importance sampling ---


def test_truncated_importance_by_hand():
  # Ratios 0.5, 1.5, 4 with a cap of 2; behind the mask 1; constants.
  learner, mask = jnp.array([[-1.0, -2.0, -3.0, jnp.nan]]), jnp.array([[1, 1, 1, 0]])
  sampler = learner - jnp.log(jnp.array([[0.5, 1.5, 4.0, 9.0]]))
  weights = losses.truncated_importance(learner, sampler, mask)
  np.testing.assert_allclose(weights, [[0.5, 1.5, 2.0, 1.0]], rtol=1e-5)
  weights = losses.truncated_importance(learner, sampler, mask, cap=0.75)
  np.testing.assert_allclose(weights, [[0.5, 0.75, 0.75, 1.0]], rtol=1e-5)
  grads = jax.grad(
    lambda x, y: losses.truncated_importance(x, y, mask).sum(), argnums=(0, 1)
  )(learner, sampler)
  assert not any(np.any(g) for g in grads)


@objectives
def test_importance_weights_scale_each_token_of_every_loss(objective):
  old, advantages = logprobs_like(1), normal(2, (NUM_ROWS,))
  weights = losses.truncated_importance(old, logprobs_like(4), MASK)

  def grads(advantages, **kwargs):
    return jax.grad(
      lambda x: OBJECTIVES[objective](x, old, advantages, MASK, **kwargs)[0]
    )(old + 0.3 * normal(3))

  expected = grads(advantages[:, None] * weights)
  weighed = grads(advantages, importance_weights=behind_the_mask(weights))
  np.testing.assert_allclose(weighed, expected, **TOLERANCE)
  assert np.abs(expected - grads(advantages)).max() > 1e-3


def test_cispo_bounded_above_is_policy_gradient_with_truncated_importance():
  old, advantages = logprobs_like(1), normal(2, (NUM_ROWS,))
  weights = losses.truncated_importance(logprobs_like(3), old, MASK, cap=1.5)
  plain = losses.policy_gradient(
    logprobs_like(3), advantages, MASK, importance_weights=weights
  )[0]
  cispo = losses.cispo(logprobs_like(3), old, advantages, MASK, clip_high=0.5)[0]
  np.testing.assert_allclose(cispo, plain, **TOLERANCE)


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


@objectives
@pytest.mark.parametrize("how", losses.AGGREGATIONS)
def test_packed_rows_equal_rows_of_their_own(objective, how):
  objective = functools.partial(OBJECTIVES[objective], aggregation=how)
  kwargs = dict(normalizer=17.0) if how == "constant" else {}
  old, advantages = logprobs_like(1), normal(2, (NUM_ROWS,))
  logprobs = old + 0.3 * normal(3)

  def value_and_grad(logprobs, *args, **kwargs):
    return jax.jit(  # segment ids are traced
      lambda x, kwargs: jax.value_and_grad(lambda x: objective(x, *args, **kwargs)[0])(
        x
      )
    )(logprobs, kwargs)

  loss, grads = value_and_grad(logprobs, old, advantages, MASK, **kwargs)
  per_token = np.repeat(advantages[:, None], NUM_TOKENS, 1)
  packed_args = [pack(x, np.nan) for x in (logprobs, old, per_token)]
  packed_loss, packed_grads = value_and_grad(
    *packed_args, PACKED_MASK, segment_ids=SEGMENTS, **kwargs
  )
  np.testing.assert_allclose(packed_loss, loss, **TOLERANCE)
  np.testing.assert_allclose(packed_grads, pack(grads, 0.0), **TOLERANCE)
  if how != "constant":
    # And in micro-batches of one packed row.
    whole = losses.step_normalizer(PACKED_MASK, how, segment_ids=SEGMENTS)
    assert float(whole) == float(losses.step_normalizer(MASK, how))
    parts = [
      objective(
        *(x[i : i + 1] for x in (*packed_args, PACKED_MASK)),
        normalizer=whole,
        segment_ids=SEGMENTS[i : i + 1],
      )[0]
      for i in range(2)
    ]
    np.testing.assert_allclose(sum(parts), loss, **TOLERANCE)


def test_packing_without_segment_ids_is_another_loss():
  # Rows [1 2 6] and [4] packed into [1 2 6 4]: (3 + 4) / 2 as two responses, 13 / 4 as
  # one.
  values, mask = jnp.array([[1.0, 2, 6, 4]]), jnp.ones((1, 4), bool)
  how, ids = "sequence_mean_token_mean", jnp.array([[1, 1, 1, 2]])
  assert float(losses.aggregate(values, mask, how, segment_ids=ids)) == 3.5
  assert float(losses.aggregate(values, mask, how)) == 3.25


def test_segment_0_is_padding_whatever_the_mask_says():
  values = jnp.array([[1.0, 2, 9]])
  kwargs = dict(segment_ids=jnp.array([[1, 1, 0]]))
  assert float(losses.aggregate(values, values > 0, "token_mean", **kwargs)) == 1.5


# --- OPO in one call ---

GROUPS = np.array([1, 0, 1, 0, 2, 1])
REWARDS = np.array([1.0, 0.5, 0.0, 1.0, 0.75, 0.25], np.float32)


@pytest.mark.parametrize("estimator", ["opo", "opo_loo", "grpo"])
def test_opo_loss_has_the_gradient_of_the_formula(estimator):
  # d loss / d log pi(y_t) = -A_i / tokens, with A from NumPy for opo.
  def loss(logprobs):
    return losses.opo_loss(
      logprobs, REWARDS, MASK, GROUPS, num_groups=4, estimator=estimator
    )

  (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(logprobs_like(1))
  lengths = MASK.sum(-1)
  advantages = ESTIMATORS[estimator](REWARDS, lengths, GROUPS, num_groups=4)
  if estimator == "opo":
    # Group 1: (5 * 1 + 3 * 0 + 2 * 0.25) / 10 = 0.55; the others have one row left.
    np.testing.assert_allclose(advantages, [0.45, 0, -0.55, 0, 0, -0.3], atol=1e-6)
  np.testing.assert_allclose(aux["advantages"], advantages, atol=EPS)
  expected = np.where(MASK, -np.asarray(advantages)[:, None] / MASK.sum(), 0)
  np.testing.assert_allclose(grads, expected, **TOLERANCE)


@aggregations
def test_opo_loss_of_rows_that_are_not_valid_is_that_of_the_others(how):
  valid = np.array([True, True, False, True, True, True])
  rewards = np.where(valid, REWARDS, np.nan)
  kwargs = dict(num_groups=3, aggregation=how)

  def value_and_grad(rows, **kwargs):
    def loss(x):
      args = rewards[rows], MASK[rows], GROUPS[rows]
      return losses.opo_loss(x, *args, **kwargs)[0]

    return jax.value_and_grad(loss)(logprobs_like(1)[rows])

  loss, grads = value_and_grad(np.arange(6), valid=valid, **kwargs)
  kept_loss, kept_grads = value_and_grad(np.flatnonzero(valid), **kwargs)
  np.testing.assert_allclose(loss, kept_loss, **TOLERANCE)
  np.testing.assert_allclose(grads[valid], kept_grads, **TOLERANCE)
  assert not np.any(grads[2])


def test_opo_loss_adds_up_over_micro_batches_that_keep_groups_whole():
  normalizer = losses.step_normalizer(MASK, "token_mean")

  def loss(rows, **kwargs):
    args = (x[rows] for x in (logprobs_like(1), REWARDS, MASK, GROUPS))
    return float(losses.opo_loss(*args, num_groups=3, **kwargs)[0])

  whole = loss(np.arange(NUM_ROWS))
  kept = loss([5, 0, 2], normalizer=normalizer) + loss([1, 3, 4], normalizer=normalizer)
  assert kept == pytest.approx(whole, rel=1e-6)
  # Group 1 cut in two: its rows see other baselines, and the sum is another loss.
  cut = loss([0, 1], normalizer=normalizer) + loss([2, 3, 4, 5], normalizer=normalizer)
  assert abs(cut - whole) > 0.01


def test_opo_loss_takes_a_function_and_runs_under_jit():
  mean = functools.partial(opo, alpha=0.0)

  @jax.jit
  def loss(*args):
    return losses.opo_loss(*args, num_groups=3, estimator=mean)[0]

  result = loss(logprobs_like(1), REWARDS, MASK, GROUPS)
  expected = losses.opo_loss(
    logprobs_like(1), REWARDS, MASK, GROUPS, num_groups=3, estimator="mean"
  )[0]
  np.testing.assert_allclose(result, expected, **TOLERANCE)


def test_sampling_logprobs_and_advantages_get_no_gradient():
  for objective in ("ppo_clip", "gspo", "cispo"):

    def loss(old, advantages, objective=OBJECTIVES[objective]):
      return objective(logprobs_like(1), old, advantages, MASK)[0]

    grads = jax.grad(loss, argnums=(0, 1))(logprobs_like(2), normal(3, (NUM_ROWS,)))
    assert not any(np.any(g) for g in grads)
  grads = jax.grad(
    lambda r: losses.opo_loss(logprobs_like(1), r, MASK, GROUPS, num_groups=3)[0]
  )(REWARDS)
  assert not np.any(grads)
  grads = jax.grad(
    lambda advantages: losses.policy_gradient(logprobs_like(1), advantages, MASK)[0]
  )(normal(3))
  assert not np.any(grads)


@objectives
@aggregations
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_what_is_behind_the_mask_reaches_neither_loss_nor_gradient(
  objective, how, garbage
):
  objective = functools.partial(OBJECTIVES[objective], aggregation=how)
  old, advantages = logprobs_like(1), normal(2)

  def value_and_grad(logprobs, old, advantages):
    loss = jax.value_and_grad(lambda x: objective(x, old, advantages, MASK)[0])
    return loss(jnp.asarray(logprobs))

  loss, grads = value_and_grad(logprobs_like(3), old, advantages)
  dirty_loss, dirty_grads = value_and_grad(
    *(behind_the_mask(x, garbage) for x in (logprobs_like(3), old, advantages))
  )
  assert float(dirty_loss) == float(loss)
  np.testing.assert_array_equal(dirty_grads, grads)
  assert not np.any(dirty_grads[~MASK])


@objectives
def test_row_without_advantage_may_hold_nan_where_it_is_masked(objective):
  # Row 3 has no trainable token; an unscorable answer's advantage may be NaN.
  advantages = np.where(LENGTHS > 0, 1.5, np.nan)
  grads = jax.grad(
    lambda x: OBJECTIVES[objective](x, logprobs_like(1), advantages, MASK)[0]
  )(logprobs_like(1))
  assert np.isfinite(grads).all()


def test_groups_of_equal_rewards_can_be_left_out_with_the_same_normalizer():
  # Groups 0 and 2 have equal rewards; 0.3 is not exact in float32.
  ids = jnp.array([0, 1, 0, 2, 1, 1])
  rewards = jnp.array([0.3, 1.0, 0.3, 0.7, 0.0, 0.5])
  lengths = MASK.sum(-1)
  advantages = opo(rewards, lengths, ids, num_groups=3)
  normalizer = losses.step_normalizer(MASK, "token_mean")

  def grads(keep, normalizer):
    def loss(weight):
      logprobs = -jnp.square(weight - normal(1)[keep])
      args = logprobs, advantages[keep], MASK[keep]
      return losses.policy_gradient(*args, normalizer=normalizer)[0]

    return jax.grad(loss)(normal(2, (NUM_TOKENS,)))

  packed = np.array([1, 4, 5])
  whole = grads(np.arange(NUM_ROWS), None)
  np.testing.assert_allclose(grads(packed, normalizer), whole, **TOLERANCE)
  # 14 tokens, 6 of them kept: a normaliser of the kept rows alone gives 14/6 times it.
  np.testing.assert_allclose(grads(packed, None), whole * 14 / 6, rtol=1e-5)


@objectives
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_losses_compute_in_float32(objective, dtype):
  logprobs, old, advantages = (
    jnp.asarray(x).astype(dtype)
    for x in (logprobs_like(1), logprobs_like(1), normal(2, (NUM_ROWS,)))
  )
  loss = OBJECTIVES[objective](
    logprobs, old, advantages, MASK, aggregation="token_mean"
  )[0]
  assert loss.dtype == jnp.float32
  exact = [np.asarray(x, np.float64) for x in (logprobs, advantages)]
  by_logprob = objective in ("policy_gradient", "cispo")
  terms = exact[1][:, None] * (exact[0] if by_logprob else 1.0)
  np.testing.assert_allclose(loss, -(terms * MASK).sum() / MASK.sum(), **TOLERANCE)


# --- KL ---


@pytest.mark.parametrize(
  ("estimator", "expected"),
  [
    # log-ratios log 2 and -log 4, ratios ref / pi 1/2 and 4
    ("k1", [np.log(2), -np.log(4)]),
    ("k2", [np.log(2) ** 2 / 2, np.log(4) ** 2 / 2]),
    ("k3", [1 / 2 - 1 + np.log(2), 4 - 1 - np.log(4)]),
  ],
)
def test_kl_by_hand(estimator, expected):
  logprobs = jnp.log(jnp.array([[0.5, 0.2, jnp.nan]]))
  reference = jnp.log(jnp.array([[0.25, 0.8, 0.5]]))
  mask = jnp.array([[1, 1, 0]])
  result = losses.kl(logprobs, reference, mask, estimator=estimator)
  np.testing.assert_allclose(result, [[*expected, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
  # Every token once, weighted by its probability: the expectation itself.
  policy = np.array([0.05, 0.25, 0.6, 0.1])
  reference = np.array([0.4, 0.3, 0.2, 0.1])
  values = losses.kl(
    np.log(policy)[None], np.log(reference)[None], np.ones((1, 4)), estimator=estimator
  )
  expected = (policy * np.log(policy / reference)).sum()
  np.testing.assert_allclose(values[0] @ policy, expected, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-20, 0, width=32), min_size=8, max_size=8))
def test_k3_is_never_negative_and_zero_for_equal_policies(values):
  # exp(-x) - 1 + x without expm1 is about -1e-8 for x near 1e-4.
  logprobs = np.float32(values).reshape(2, 4)
  mask = np.ones((2, 4), bool)
  for gap in (0.0, 1e-4, 0.3):
    assert (losses.kl(logprobs, np.float32(logprobs + gap), mask) >= 0).all()
  assert not np.any(losses.kl(logprobs, logprobs, mask))


def test_small_kl_is_measured_and_not_rounded_away():
  # x^2 / 2 for x = 1e-3: 5e-7 to a thousandth; naive float32 is off by a tenth.
  logprobs, reference = jnp.array([[0.0]]), jnp.array([[1e-3]])
  result = float(losses.kl(logprobs, reference, jnp.array([[True]]))[0, 0])
  assert result == pytest.approx(np.expm1(1e-3) - 1e-3, rel=5e-4)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_gradient_is_finite_behind_the_mask(estimator):
  def total(logprobs):
    reference = behind_the_mask(logprobs_like(2), -np.inf)
    return losses.kl(logprobs, reference, MASK, estimator=estimator).sum()

  grads = jax.grad(total)(behind_the_mask(logprobs_like(1), -np.inf))
  assert np.isfinite(grads).all()
  assert not np.any(grads[~MASK])


@pytest.mark.parametrize("gap", [-1000.0, 1000.0])
def test_kl_of_tokens_far_apart_is_finite_with_its_gradient(gap):
  value, grad = jax.value_and_grad(lambda x: losses.kl(x, x * 0, x == x).sum())(
    jnp.array([[gap]])
  )
  assert value > 0 and np.isfinite(value) and np.isfinite(grad).all()


def test_only_k2_has_the_gradient_of_the_kl_as_a_penalty():
  # Every token once, weighted by its probability, which is a constant of the sampler.
  logits, reference = jnp.array([0.3, -1.0, 2.0]), jnp.log(jnp.array([0.5, 0.3, 0.2]))
  policy = jax.nn.softmax(logits)

  def sampled(logits, estimator):
    logprobs = jax.nn.log_softmax(logits)[None]
    values = losses.kl(logprobs, reference[None], logprobs < 0, estimator=estimator)
    return values[0] @ policy

  def exact(logits):
    logprobs = jax.nn.log_softmax(logits)
    return jnp.exp(logprobs) @ (logprobs - reference)

  def backwards(logits):
    return jnp.exp(reference) @ (reference - jax.nn.log_softmax(logits))

  for estimator, expected in (
    ("k1", jnp.zeros(3)),
    ("k2", jax.grad(exact)(logits)),
    ("k3", jax.grad(backwards)(logits)),
  ):
    got = jax.grad(sampled)(logits, estimator)
    np.testing.assert_allclose(got, expected, atol=1e-6, err_msg=estimator)


# --- Refusals ---


@pytest.mark.parametrize("objective", ["ppo_clip", "gspo", "cispo"])
@pytest.mark.parametrize("name", ["clip_low", "clip_high"])
def test_negative_clips_are_refused(objective, name):
  x = jnp.zeros((1, 2))
  with pytest.raises(ValueError, match=f"Expected {name} of at least 0, got -0.1"):
    getattr(losses, objective)(x, x, jnp.ones(1), x == 0, **{name: -0.1})


def test_caps_and_normalizers_are_above_zero():
  x = jnp.zeros((1, 2))
  for bad in (0.0, -1, np.float32(-2), np.nan):
    with pytest.raises(ValueError, match=f"Expected cap above 0, got {bad}"):
      losses.truncated_importance(x, x, x == 0, cap=bad)
    with pytest.raises(ValueError, match=f"Expected normalizer above 0, got {bad}"):
      losses.aggregate(x, x == 0, "constant", normalizer=bad)


def test_unknown_names_are_answered_with_those_there_are():
  values = jnp.ones((2, 3))
  with pytest.raises(ValueError, match="'tokens_mean'; did you mean token_mean\\? Th"):
    losses.aggregate(values, values > 0, "tokens_mean")
  with pytest.raises(ValueError, match="'qqqq'; there are token_mean, "):
    losses.step_normalizer(values > 0, "qqqq")
  with pytest.raises(ValueError, match="'k4'; there are k1, k2, k3"):
    losses.kl(values, values, values > 0, estimator="k4")
  with pytest.raises(ValueError, match="estimator 'opo_lo'; did you mean opo_loo"):
    losses.opo_loss(
      values, jnp.ones(2), values > 0, jnp.zeros(2, int), num_groups=1,
      estimator="opo_lo",
    )  # fmt: skip


def test_shapes_that_do_not_fit_are_refused_and_shown():
  logprobs, mask = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
  with pytest.raises(ValueError, match=r"\(2, 3\), got \(3,\)"):
    losses.policy_gradient(logprobs, jnp.ones(3), mask)
  with pytest.raises(ValueError, match=r"\(2, 3\), got \(2, 1\)"):
    losses.ppo_clip(logprobs, logprobs, jnp.ones((2, 1)), mask)
  with pytest.raises(ValueError, match=r"'mask': \(2, 1\), 'values': \(2, 3\)"):
    losses.aggregate(logprobs, mask[:, :1], "token_mean")
  with pytest.raises(ValueError, match=r"'mask': \(2, 2\)"):
    losses.policy_gradient(logprobs, jnp.ones(2), mask[:, :2])
  with pytest.raises(ValueError, match=r"'mask': \(2,\)"):
    losses.policy_gradient(logprobs, jnp.ones(2), mask[:, 0])
  for objective in ("ppo_clip", "gspo", "cispo"):
    with pytest.raises(ValueError, match=r"'old_logprobs': \(2, 1\)"):
      OBJECTIVES[objective](logprobs, logprobs[:, :1], jnp.ones(2), mask)
  with pytest.raises(ValueError, match=r"'entropy': \(2, 1\)"):
    losses.policy_gradient(logprobs, jnp.ones(2), mask, entropy=logprobs[:, :1])
  with pytest.raises(ValueError, match=r"importance_weights .* got \(3,\)"):
    losses.policy_gradient(logprobs, jnp.ones(2), mask, importance_weights=jnp.ones(3))
  with pytest.raises(ValueError, match=r"'reference_logprobs': \(2, 1\)"):
    losses.kl(logprobs, logprobs[:, :1], mask)
  with pytest.raises(ValueError, match=r"'rewards': \(3,\), 'lengths': \(2,\)"):
    losses.opo_loss(logprobs, jnp.ones(3), mask, jnp.zeros(2, int), num_groups=1)
  with pytest.raises(ValueError, match=r"valid \[N\] for a mask \(2, 3\), got \(3,\)"):
    losses.opo_loss(
      logprobs, jnp.ones(2), mask, jnp.zeros(2, int), num_groups=1, valid=jnp.ones(3)
    )


def test_segment_ids_that_cannot_be_are_refused():
  values, mask = jnp.ones((1, 3)), jnp.ones((1, 3), bool)
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

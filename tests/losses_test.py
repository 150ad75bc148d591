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
from opo_jax.advantages import opo

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
}
objectives = pytest.mark.parametrize("objective", sorted(OBJECTIVES))


@objectives
@aggregations
@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_of_micro_batches_add_up_to_the_gradient_of_the_step(
  objective, how, size
):
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
  parts = np.random.default_rng(4).permutation(NUM_ROWS).reshape(-1, size)
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


@aggregations
@pytest.mark.parametrize("per_token", [False, True])
def test_on_policy_ppo_clip_has_the_gradient_of_policy_gradient(how, per_token):
  logprobs = logprobs_like(1)
  advantages = normal(2) if per_token else normal(2, (NUM_ROWS,))
  kwargs = dict(aggregation=how)

  def clip(x):
    return losses.ppo_clip(x, logprobs, advantages, MASK, **kwargs)

  (_, aux), clip_grads = jax.value_and_grad(clip, has_aux=True)(logprobs)
  grads = jax.grad(lambda x: losses.policy_gradient(x, advantages, MASK, **kwargs)[0])(
    logprobs
  )
  # At ratio 1 both branches of the minimum are equal: each gives half.
  np.testing.assert_allclose(clip_grads, grads, rtol=4 * EPS)
  assert np.abs(grads).max() > 0.05
  np.testing.assert_array_equal(aux["ratio"], np.ones_like(MASK))
  assert not np.any(aux["clipped"])


def test_sampling_logprobs_and_advantages_get_no_gradient():
  def loss(old, advantages):
    return losses.ppo_clip(logprobs_like(1), old, advantages, MASK)[0]

  grads = jax.grad(loss, argnums=(0, 1))(logprobs_like(2), normal(3, (NUM_ROWS,)))
  assert not any(np.any(g) for g in grads)
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
  loss = OBJECTIVES[objective](logprobs, old, advantages, MASK)[0]
  assert loss.dtype == jnp.float32
  exact = [np.asarray(x, np.float64) for x in (logprobs, advantages)]
  terms = exact[1][:, None] * (exact[0] if objective == "policy_gradient" else 1.0)
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


# --- Refusals ---


def test_unknown_names_are_answered_with_those_there_are():
  values = jnp.ones((2, 3))
  with pytest.raises(ValueError, match="'tokens_mean'; there are token_mean, "):
    losses.aggregate(values, values > 0, "tokens_mean")
  with pytest.raises(ValueError, match="'token'; there are token_mean, "):
    losses.step_normalizer(values > 0, "token")
  with pytest.raises(ValueError, match="'k4'; there are k1, k2, k3"):
    losses.kl(values, values, values > 0, estimator="k4")


def test_shapes_that_do_not_fit_are_refused_and_shown():
  logprobs, mask = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
  with pytest.raises(ValueError, match=r"\(2, 3\), got \(3,\)"):
    losses.policy_gradient(logprobs, jnp.ones(3), mask)
  with pytest.raises(ValueError, match=r"\(2, 3\), got \(2, 1\)"):
    losses.ppo_clip(logprobs, logprobs, jnp.ones((2, 1)), mask)
  with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 1\)"):
    losses.aggregate(logprobs, mask[:, :1], "token_mean")

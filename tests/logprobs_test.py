"""Log-probs block by block equal those of all logits at once, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opo_jax.logprobs import linear_logprobs

# Neither 7 tokens nor 11 words divide by anything; 3 rows.
ROWS, TOKENS, WIDTH, WORDS = 3, 7, 4, 11
PER_TOKEN = ROWS * WORDS


def inputs(seed=0, scale=1.5, shape=(ROWS, TOKENS)):
  rng = np.random.default_rng(seed)
  hidden = scale * rng.normal(size=(*shape, WIDTH))
  unembedding = rng.normal(size=(WORDS, WIDTH))
  targets = rng.integers(WORDS, size=shape)
  return np.float32(hidden), np.float32(unembedding), targets


def reference(hidden, unembedding, targets, temperature=1.0):
  """(log-prob, entropy, energy) in float64, from the definitions."""
  logits = np.float64(hidden) @ np.float64(unembedding).T / temperature
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  onehot = np.eye(len(unembedding))[targets]
  logprob = np.log((onehot * probs).sum(-1))
  entropy = -(probs * np.log(probs)).sum(-1)
  return logprob, entropy, ((onehot - probs) ** 2).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("tokens_per_block", [None, 3])
def test_statistics_equal_numpy_in_float64(temperature, tokens_per_block):
  blocks = {} if tokens_per_block is None else {"block_logits": 3 * PER_TOKEN}
  stats = linear_logprobs(*inputs(), temperature=temperature, **blocks)
  expected = reference(*inputs(), temperature=temperature)
  for name, got, want in zip(stats._fields, stats, expected, strict=True):
    assert got.shape == (ROWS, TOKENS) and got.dtype == jnp.float32
    # Logits up to 15 in size, divided by 0.6: an ulp of 25 is 2e-6.
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-6, err_msg=name)


def test_statistics_by_hand():
  # Logits log 1, log 2, log 5 -> 1/8, 2/8, 5/8; target 1.
  # entropy = 3/8 log 8 + 2/8 log 4 + 5/8 log 1.6; energy = (1 + 36 + 25) / 64
  unembedding = np.log([[1.0], [2.0], [5.0]])
  stats = linear_logprobs(np.ones((1, 1)), unembedding, np.array([1]))
  entropy = np.log(8) / 8 + np.log(4) / 4 + np.log(1.6) * 5 / 8
  expected = [np.log(1 / 4), entropy, 62 / 64]
  np.testing.assert_allclose(np.ravel(stats), expected, rtol=1e-6)


# 1 token a block, a block that divides nothing, all but one, and a limit below a token.
@pytest.mark.parametrize("block_logits", [PER_TOKEN, 3 * PER_TOKEN, 6 * PER_TOKEN, 1])
def test_blocks_change_neither_values_nor_gradients(block_logits):
  hidden, unembedding, targets = inputs()
  weights = np.random.default_rng(1).normal(size=(3, ROWS, TOKENS))

  def loss(hidden, unembedding, temperature, **blocks):
    stats = linear_logprobs(
      hidden, unembedding, targets, temperature=temperature, **blocks
    )
    return sum((w * s).sum() for w, s in zip(weights, stats, strict=True)), stats

  grad = functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
  args = hidden, unembedding, jnp.float32(0.7)
  (_, whole), whole_grads = grad(loss)(*args)
  blocked_loss = functools.partial(loss, block_logits=block_logits)
  (_, blocked), blocked_grads = grad(blocked_loss)(*args)
  # A matmul of another shape sums in another order.
  for got, want in zip(blocked, whole, strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-6)
  for got, want in zip(blocked_grads, whole_grads, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("block_logits", [2 * PER_TOKEN, 2**20])
def test_gradient_of_the_log_prob_equals_the_formula_in_float64(block_logits):
  """d log pi(y) / dz = (onehot - pi) / temperature."""
  hidden, unembedding, targets = inputs()
  weights = np.random.default_rng(1).normal(size=(ROWS, TOKENS))
  temperature = 0.7

  def loss(hidden, unembedding):
    stats = linear_logprobs(
      hidden, unembedding, targets, temperature=temperature, block_logits=block_logits
    )
    return (weights * stats.logprob).sum()

  grads = jax.grad(loss, argnums=(0, 1))(hidden, unembedding)
  logits = np.float64(hidden) @ np.float64(unembedding).T / temperature
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  by_logits = weights[..., None] * (np.eye(WORDS)[targets] - probs) / temperature
  np.testing.assert_allclose(grads[0], by_logits @ unembedding, atol=1e-5)
  by_unembedding = np.einsum("ntv,ntd->vd", by_logits, np.float64(hidden))
  np.testing.assert_allclose(grads[1], by_unembedding, atol=5e-5)  # sums of 21


def test_energy_is_the_squared_norm_of_the_gradient_by_scaled_logits():
  # An unembedding of ones on the diagonal makes the hidden state the logits.
  logits, targets = np.float32([[0.3, -1.2, 2.0, 0.0]]), np.array([1])
  grads = jax.grad(lambda z: linear_logprobs(z, jnp.eye(4), targets).logprob.sum())(
    logits
  )
  energy = linear_logprobs(logits, jnp.eye(4), targets).energy
  np.testing.assert_allclose(energy[0], (np.float64(grads) ** 2).sum(), rtol=1e-6)


def test_blocks_run_in_a_jitted_gradient_and_never_hold_all_logits():
  hidden, unembedding, targets = inputs()

  def loss(hidden, unembedding):
    stats = linear_logprobs(hidden, unembedding, targets, block_logits=2 * PER_TOKEN)
    return stats.logprob.sum()

  text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, unembedding))
  # Neither all logits as they are, nor the blocks stacked for the backward pass.
  assert f"f32[{ROWS},2,{WORDS}]" in text
  assert f"f32[{ROWS},{TOKENS},{WORDS}]" not in text
  assert f"f32[4,{ROWS},2,{WORDS}]" not in text


def test_certain_and_impossible_tokens_stay_finite_with_their_gradients():
  # Logits of +-400: probabilities 1 and 0 in float32.
  hidden, unembedding = np.float32([[200.0], [200.0]]), np.float32([[2.0], [-2.0]])
  targets = np.array([0, 1])

  def total(hidden):
    return sum(s.sum() for s in linear_logprobs(hidden, unembedding, targets))

  stats = linear_logprobs(hidden, unembedding, targets)
  np.testing.assert_allclose(stats.logprob, [0.0, -800.0])
  np.testing.assert_allclose(stats.entropy, [0.0, 0.0])
  np.testing.assert_allclose(stats.energy, [0.0, 2.0])
  assert np.isfinite(jax.grad(total)(hidden)).all()


def test_bfloat16_inputs_are_projected_in_float32():
  hidden, unembedding, targets = inputs()
  hidden, unembedding = jnp.bfloat16(hidden), jnp.bfloat16(unembedding)
  stats = linear_logprobs(hidden, unembedding, targets, block_logits=3 * PER_TOKEN)
  exact = reference(np.float64(hidden), np.float64(unembedding), targets)
  for got, want in zip(stats, exact, strict=True):
    assert got.dtype == jnp.float32
    # As for float32 inputs; logits rounded to bfloat16 would be off by 1e-2.
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("shape", [(TOKENS,), (2, 3, TOKENS)])
def test_leading_axes_may_be_any(shape):
  args = inputs(shape=shape)
  stats = linear_logprobs(*args, block_logits=2 * WORDS * int(np.prod(shape[:-1])))
  for got, want in zip(stats, reference(*args), strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("shape", [(0, TOKENS), (ROWS, 0)])
def test_batch_without_tokens_gives_empty_statistics(shape):
  stats = linear_logprobs(*inputs(shape=shape))
  assert [s.shape for s in stats] == [shape] * 3


def test_shapes_that_do_not_fit_are_refused_and_shown():
  hidden, unembedding, targets = inputs()
  with pytest.raises(ValueError, match=r"\(3, 7, 4\), \(11, 4\), \(3, 6\)"):
    linear_logprobs(hidden, unembedding, targets[:, 1:])
  with pytest.raises(ValueError, match=r"\(3, 7, 4\), \(4, 11\), \(3, 7\)"):
    linear_logprobs(hidden, unembedding.T, targets)

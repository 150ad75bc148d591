"""Log-probs block by block equal those of all logits at once, gradients too."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from opo_jax.logprobs import linear_logprobs

# Neither 7 tokens nor 11 words divide by anything; 3 rows.
ROWS, TOKENS, WIDTH, WORDS = 3, 7, 4, 11
# How the work may be cut: at once, a word a block, blocks that overlap by 1 or by 9.
CUTS = {
  "whole": {},
  "a word a block": {"block_size": 1},
  "blocks of 3, 4 and 4": {"block_size": 4},
  "blocks of 1 and 10": {"block_size": 10},
}


def inputs(seed=0, scale=1.5, shape=(ROWS, TOKENS), words=WORDS, width=WIDTH):
  rng = np.random.default_rng(seed)
  hidden = scale * rng.normal(size=(*shape, width))
  unembedding = rng.normal(size=(words, width))
  targets = rng.integers(words, size=shape)
  return np.float32(hidden), np.float32(unembedding), targets


def reference(hidden, unembedding, targets, temperature=1.0, xp=np):
  """(log-prob, entropy, energy) from the definitions, in the inputs' precision."""
  logits = hidden @ unembedding.T / temperature
  probs = xp.exp(logits - logits.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  onehot = np.arange(len(unembedding)) == targets[..., None]
  logprob = xp.log((onehot * probs).sum(-1))
  entropy = -(probs * xp.log(probs)).sum(-1)
  return logprob, entropy, ((onehot - probs) ** 2).sum(-1)


def float64(*arrays):
  return [np.asarray(array, np.float64) for array in arrays]


def weighted(stats, weights):
  return sum((w * s).sum() for w, s in zip(weights, stats, strict=True))


@jax.jit
def _reference_grads(hidden, unembedding, targets, temperature, weights):
  def loss(hidden, unembedding, temperature):
    stats = reference(hidden, unembedding, targets, temperature, xp=jnp)
    return weighted(stats, weights)

  return jax.grad(loss, argnums=(0, 1, 2))(hidden, unembedding, temperature)


def reference_grads(hidden, unembedding, targets, temperature, weights):
  """By JAX from the definitions, in float64."""
  floats = float64(hidden, unembedding)
  with jax.enable_x64(True):
    args = *floats, np.int32(targets), np.float64(temperature), float64(*weights)
    grads = _reference_grads(*args)
    assert grads[0].dtype == jnp.float64
    return [np.asarray(grad) for grad in grads]


@functools.partial(jax.jit, static_argnames=("options",))
def stats_and_grads(hidden, unembedding, targets, temperature, weights, *, options):
  """(stats, gradients by hidden, unembedding, temperature) for each of `options`."""

  def one(options):
    def loss(hidden, unembedding, temperature):
      stats = linear_logprobs(
        hidden, unembedding, targets, temperature=temperature, **dict(options)
      )
      return weighted(stats, weights), stats

    grads, stats = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(
      hidden, unembedding, temperature
    )
    return stats, grads

  return [one(each) for each in options]


jitted = jax.jit(linear_logprobs, static_argnames="block_size")


def assert_relative(got, want, rtol, name=""):
  """The error's norm against the array's: an entry may be a sum that cancels."""
  error = np.linalg.norm(np.float64(got) - want) / np.linalg.norm(want)
  assert error < rtol, f"{name}: {error:.1e}"


def all_cuts(temperature):
  """{cut: (stats, gradients)} and the weights of the loss."""
  weights = np.random.default_rng(1).normal(size=(3, ROWS, TOKENS))
  options = tuple(tuple(cut.items()) for cut in CUTS.values())
  found = stats_and_grads(*inputs(), temperature, weights, options=options)
  return dict(zip(CUTS, found, strict=True)), weights


def test_statistics_equal_numpy_in_float64(subtests):
  hidden, unembedding, targets = inputs()
  for temperature in (1.0, 0.6, 2.5):
    expected = reference(*float64(hidden, unembedding), targets, temperature)
    for cut, (stats, _) in all_cuts(temperature)[0].items():
      for name, got, want in zip(stats._fields, stats, expected, strict=True):
        with subtests.test(f"{name}, {cut}, temperature {temperature}"):
          assert got.shape == (ROWS, TOKENS) and got.dtype == jnp.float32
          # Logits up to 15 in size, divided by 0.6: an ulp of 25 is 2e-6.
          np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-6)


def test_statistics_by_hand():
  # Logits log 1, log 2, log 5 -> 1/8, 2/8, 5/8; target 1.
  # entropy = 3/8 log 8 + 2/8 log 4 + 5/8 log 1.6; energy = (1 + 36 + 25) / 64
  unembedding = np.log([[1.0], [2.0], [5.0]])
  stats = jitted(np.ones((1, 1)), unembedding, np.array([1]))
  entropy = np.log(8) / 8 + np.log(4) / 4 + np.log(1.6) * 5 / 8
  expected = [np.log(1 / 4), entropy, 62 / 64]
  np.testing.assert_allclose(np.ravel(stats), expected, rtol=1e-6)


# Cotangents of log-prob, entropy and energy; None is one drawn per token.
COTANGENTS = {
  "logprob": (None, 0.0, 0.0),
  "entropy": (0.0, None, 0.0),
  "energy": (0.0, 0.0, None),
  "all three": (None, None, None),
}


def test_gradients_are_within_1e_minus_5_of_float64(subtests):
  # 1,000 words in blocks of 384 rows; 3 x 37 tokens; logits of a trained model's size.
  args = inputs(shape=(3, 37), words=1000, width=24, scale=0.7)
  drawn, zeros = np.random.default_rng(1).normal(size=(3, 3, 37)), np.zeros((3, 37))
  for cotangents, temperature in itertools.product(COTANGENTS, (0.3, 1.0, 1.7)):
    with subtests.test(f"{cotangents}, temperature {temperature}"):
      chosen = zip(COTANGENTS[cotangents], drawn, strict=True)
      weights = np.stack([draw if c is None else zeros for c, draw in chosen])
      ((_, grads),) = stats_and_grads(
        *args, temperature, weights, options=((("block_size", 384),),)
      )
      expected = reference_grads(*args, temperature, weights)
      names = "hidden", "unembedding", "temperature"
      for name, got, want in zip(names, grads, expected, strict=True):
        assert got.dtype == jnp.float32
        # By the temperature it is one number, in which 111 signed terms cancel.
        assert_relative(got, want, 5e-5 if name == "temperature" else 1e-5, name)


def test_cuts_change_no_gradient(subtests):
  found, weights = all_cuts(0.7)
  expected = reference_grads(*inputs(), 0.7, weights)
  for cut, (_, grads) in found.items():
    with subtests.test(cut):
      for got, want in zip(grads, expected, strict=True):
        assert_relative(got, want, 1e-5)


def test_shards_and_padding_change_nothing(subtests):
  """9 words and 3 rows of padding: the last of 4 shards is all padding."""
  hidden, unembedding, targets = inputs(words=12)
  targets %= 9
  weights = np.random.default_rng(1).normal(size=(3, ROWS, TOKENS))
  cases = [
    dict(vocab_shards=1, vocab_size=9, block_size=5),
    dict(vocab_shards=2, vocab_size=12, block_size=4),
    dict(vocab_shards=4, vocab_size=9, block_size=None),
    dict(vocab_shards=4, vocab_size=9, block_size=2),
  ]
  options = tuple(tuple(case.items()) for case in cases)
  found = stats_and_grads(hidden, unembedding, targets, 0.7, weights, options=options)
  for case, (stats, grads) in zip(cases, found, strict=True):
    with subtests.test(**case):
      words = case["vocab_size"]
      expected = reference(*float64(hidden, unembedding[:words]), targets, 0.7)
      for got, want in zip(stats, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-6)
      expected = reference_grads(hidden, unembedding[:words], targets, 0.7, weights)
      assert_relative(grads[0], expected[0], 1e-5)
      assert_relative(grads[1][:words], expected[1], 1e-5)
      assert not grads[1][words:].any()


def test_gradients_of_a_tied_table_add_up():
  """Embedding and unembedding in one: both uses count."""
  _, table, targets = inputs()
  tokens = inputs(seed=1)[2]

  def loss(embedding, unembedding):
    stats = linear_logprobs(jnp.tanh(embedding[tokens]), unembedding, targets)
    return stats.logprob.sum()

  both = jax.jit(jax.grad(lambda table: loss(table, table)))(table)
  with jax.enable_x64(True):

    def exact(table):
      hidden = jnp.tanh(table[tokens])
      return reference(hidden, table, targets, xp=jnp)[0].sum()

    expected = np.asarray(jax.jit(jax.grad(exact))(np.float64(table)))
  assert_relative(both, expected, 1e-5)
  # Either use alone is far off.
  for one in jax.jit(jax.grad(loss, argnums=(0, 1)))(table, table):
    assert np.linalg.norm(one - expected) > 0.1 * np.linalg.norm(expected)


def test_energy_is_the_squared_norm_of_the_gradient_by_scaled_logits():
  # An unembedding of ones on the diagonal makes the hidden state the logits.
  logits, targets = np.float32([[0.3, -1.2, 2.0, 0.0]]), np.array([1])

  @jax.jit
  def grads_and_energy(logits):
    def loss(logits):
      stats = linear_logprobs(logits, jnp.eye(4), targets)
      return stats.logprob.sum(), stats.energy

    return jax.grad(loss, has_aux=True)(logits)

  grads, energy = grads_and_energy(logits)
  np.testing.assert_allclose(energy[0], (np.float64(grads) ** 2).sum(), rtol=1e-6)


def test_certain_and_impossible_tokens_stay_finite_with_their_gradients():
  # Logits of +-400: probabilities 1 and 0 in float32.
  hidden, unembedding = np.float32([[200.0], [200.0]]), np.float32([[2.0], [-2.0]])
  targets = np.array([0, 1])

  options = ((("block_size", 1),), (("block_size", 2),))
  weights, one = np.ones((3, 2)), np.float32(1)
  args = hidden, unembedding, targets, one, weights
  for stats, grads in stats_and_grads(*args, options=options):
    np.testing.assert_array_equal(stats.logprob, [0.0, -800.0])
    np.testing.assert_array_equal(stats.entropy, [0.0, 0.0])
    np.testing.assert_array_equal(stats.energy, [0.0, 2.0])
    # d(z_1 - z_0)/dh = -2 - 2; by the temperature, +800 / 1^2.
    np.testing.assert_array_equal(grads[0], [[0.0], [-4.0]])
    np.testing.assert_allclose(grads[2], 800.0)


def test_confident_tokens_keep_their_small_probabilities():
  """Large logits, close together: log-sum-exp in one number would round by 3e-5."""
  logits = np.float32([[400.0, 399.0, 398.5]])
  args = logits, np.eye(3, dtype=np.float32), np.array([0]), np.float32(1)
  only_logprob = np.array([[1.0], [0.0], [0.0]])
  ((stats, (grads, *_)),) = stats_and_grads(*args, only_logprob, options=((),))
  expected = reference(*float64(logits, np.eye(3)), np.array([0]))
  np.testing.assert_allclose(np.ravel(stats), np.ravel(expected), rtol=1e-6)
  probs = np.exp(np.float64(logits) - 400) / np.exp(np.float64(logits) - 400).sum()
  np.testing.assert_allclose(grads, np.eye(3)[:1] - probs, rtol=2e-6)


def test_energy_of_confident_tokens_does_not_cancel(subtests):
  """12 above three others: 4.5e-10, where 1 - 2 p + sum pi^2 gives 0 in float32."""
  logits, targets = np.float32([[9.0, 0, 0, 0], [12.0, 0, 0, 0]]), np.array([0, 0])
  expected = reference(*float64(logits, np.eye(4)), targets)[2]
  for block_size in (4, 1):
    with subtests.test(block_size=block_size):
      stats = jitted(logits, np.float32(np.eye(4)), targets, block_size=block_size)
      np.testing.assert_allclose(stats.energy, expected, rtol=0.05)


def test_masked_tokens_may_have_targets_that_are_no_words():
  """The -100 of other libraries: NaN where it counts, harmless behind a mask."""
  hidden, unembedding, targets = inputs()
  mask = np.arange(TOKENS) < 5

  def loss(hidden, unembedding, targets):
    stats = linear_logprobs(hidden, unembedding, targets, block_size=4)
    return sum(jnp.where(mask, s, 0.0).sum() for s in stats), stats

  grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  for none in (-100, WORDS):
    strange = jnp.where(mask, targets, none)
    grads, stats = grad(hidden, unembedding, strange)
    assert np.isnan(stats.logprob[:, 5:]).all() and np.isnan(stats.energy[:, 5:]).all()
    expected, _ = grad(hidden, unembedding, jnp.asarray(targets))
    jax.tree.map(np.testing.assert_array_equal, grads, expected)


def test_bfloat16_inputs_are_summed_in_float32():
  hidden, unembedding, targets = inputs()
  hidden, unembedding = (np.asarray(x, "bfloat16") for x in (hidden, unembedding))
  stats = jitted(hidden, unembedding, targets, block_size=4)
  exact = reference(*float64(hidden, unembedding), targets)
  for got, want in zip(stats, exact, strict=True):
    assert got.dtype == jnp.float32
    # As for float32 inputs; logits rounded to bfloat16 would be off by 1e-2.
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-6)


def test_bfloat16_gradients_are_as_good_as_bfloat16_holds():
  args = inputs(shape=(500,), words=300, width=16, scale=0.7)
  hidden, unembedding = (np.asarray(x, "bfloat16") for x in args[:2])
  weights = np.random.default_rng(1).normal(size=(3, 500)) * [[1], [0], [0]]
  ((_, grads),) = stats_and_grads(
    hidden, unembedding, args[2], 1.0, weights, options=((("block_size", 128),),)
  )
  expected = reference_grads(hidden, unembedding, args[2], 1.0, weights)
  for got, want in zip(grads[:2], expected[:2], strict=True):
    assert got.dtype == jnp.bfloat16
    # Half an ulp is 2^-9, 2e-3 at most: once in the factor, once in the result. A sum
    # over 500 tokens in bfloat16 would be off by more.
    assert_relative(got, want, 3e-3)


def test_every_matmul_of_bfloat16_inputs_multiplies_bfloat16():
  """The backward pass too, where plain autodiff would multiply in float32."""
  hidden, unembedding, targets = inputs()

  def loss(hidden, unembedding):
    return linear_logprobs(hidden, unembedding, targets).logprob.sum()

  halves = jnp.bfloat16(hidden), jnp.bfloat16(unembedding)
  text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*halves).as_text()
  operands = re.findall(r"dot_general.* : \((tensor<.*>), (tensor<.*>)\) ->", text)
  assert len(operands) == 4
  assert all(operand.endswith("xbf16>") for pair in operands for operand in pair)


@pytest.mark.parametrize("shape", [(), (TOKENS,), (2, 3, TOKENS)])
def test_leading_axes_may_be_any(shape):
  hidden, unembedding, targets = inputs(shape=shape)
  stats = jitted(hidden, unembedding, targets, block_size=4)
  expected = reference(*float64(hidden, unembedding), targets)
  for got, want in zip(stats, expected, strict=True):
    assert got.shape == shape
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("shape", [(0, TOKENS), (ROWS, 0)])
def test_batch_without_tokens_gives_empty_statistics_and_no_gradient(shape):
  hidden, unembedding, targets = inputs(shape=shape)
  weights = np.ones((3, *shape))
  ((stats, grads),) = stats_and_grads(
    hidden, unembedding, targets, 1.0, weights, options=((),)
  )
  assert [s.shape for s in stats] == [shape] * 3
  assert grads[1].shape == unembedding.shape and not grads[1].any()


def test_vmap_checkpoint_and_scan_give_the_same_gradients():
  hidden, unembedding, targets = inputs()

  def loss(unembedding, hidden, targets):
    stats = linear_logprobs(hidden, unembedding, targets, block_size=4)
    return weighted(stats, (1.0, 0.3, -0.5))

  def add(total, row):
    return total + jax.grad(jax.checkpoint(loss))(unembedding, *row), None

  @jax.jit
  def in_four_ways(unembedding, hidden, targets):
    grad = jax.grad(loss)
    rows = zip(hidden, targets, strict=True)
    return (
      jnp.stack([grad(unembedding, *row) for row in rows]),
      jax.vmap(grad, (None, 0, 0))(unembedding, hidden, targets),
      grad(unembedding, hidden, targets),
      jax.lax.scan(add, jnp.zeros_like(unembedding), (hidden, targets))[0],
    )

  by_row, by_vmap, whole, by_scan = in_four_ways(unembedding, hidden, targets)
  np.testing.assert_allclose(by_vmap, by_row, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(by_scan, whole, rtol=1e-5, atol=2e-6)


# What the claims are made for: Qwen2-0.5B's table, 8,192 tokens, bfloat16.
NUM_TOKENS, VOCAB, MODEL_WIDTH = 8192, 151_936, 896


def compiled(logprob):
  """Forward and backward of a weighted sum, at full size."""

  def loss(hidden, unembedding, targets, weights):
    return jnp.vdot(weights, logprob(hidden, unembedding, targets))

  return (
    jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    .lower(
      jax.ShapeDtypeStruct((NUM_TOKENS, MODEL_WIDTH), jnp.bfloat16),
      jax.ShapeDtypeStruct((VOCAB, MODEL_WIDTH), jnp.bfloat16),
      jax.ShapeDtypeStruct((NUM_TOKENS,), jnp.int32),
      jax.ShapeDtypeStruct((NUM_TOKENS,), jnp.float32),
    )
    .compile()
  )


def largest_array(program):
  """Elements of the largest array anywhere in a compiled program."""
  shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())
  return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.usefixtures("no_compilation_cache")
def test_all_logits_exist_nowhere_and_memory_is_a_tenth_at_full_size():
  def plain(hidden, unembedding, targets):
    logits = jnp.einsum(
      "td,vd->tv", hidden, unembedding, preferred_element_type=jnp.float32
    )
    logprobs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]

  blockwise = compiled(lambda *args: linear_logprobs(*args).logprob)
  everything = compiled(plain)
  assert largest_array(everything) >= NUM_TOKENS * VOCAB
  # The table itself, and a block of logits is smaller: 9 times less than all logits.
  assert largest_array(blockwise) <= VOCAB * MODEL_WIDTH

  def temporary(program):
    return program.memory_analysis().temp_size_in_bytes

  # 15.5 GB against 0.44 when this was written.
  assert temporary(everything) > 10 * temporary(blockwise)


@pytest.mark.usefixtures("no_compilation_cache")
def test_sharded_vocabulary_stays_on_its_devices():
  """Rows of the batch over data and fsdp, words over tensor, width over fsdp."""
  mesh = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
  )
  # No product of these sizes equals another.
  shape, words, width = (16, 7), 1536, 40
  args = inputs(shape=shape, words=words, width=width, scale=0.3)
  batch = ("data", "fsdp")
  specs = PartitionSpec(batch), PartitionSpec("tensor", "fsdp"), PartitionSpec(batch)
  shardings = [NamedSharding(mesh, spec) for spec in specs]

  def loss(hidden, unembedding, targets):
    stats = linear_logprobs(
      hidden, unembedding, targets, temperature=0.7, vocab_shards=2, block_size=128
    )
    return weighted(stats, (1.0, 0.3, -0.5)), stats

  grad = jax.jit(
    jax.grad(loss, argnums=(0, 1), has_aux=True),
    out_shardings=(tuple(shardings[:2]), shardings[2]),
  )
  placed = jax.device_put(args, tuple(shardings))
  text = grad.lower(*placed).compile().as_text()

  def sizes(operation):
    """Elements of the results of every such operation, one device's part."""
    found = re.findall(rf"= \(?(\S*\[[\d,]*\]\S*) {operation}\(", text)
    shapes = [re.search(r"\[([\d,]*)\]", shape)[1].split(",") for shape in found]
    return [math.prod(int(dim) for dim in shape if dim) for shape in shapes]

  # Over fsdp, each pass gathers the width of a block of its own words: nothing else
  # is gathered, and the words of another device never.
  assert set(sizes("all-gather")) == {128 * width}
  assert not re.search(rf"\[(\d+,)*({words}|{math.prod(shape)})(,\d+)*\]", text)
  # The gradient by hidden states crosses tensor once, after the blocks.
  rows_on_device = math.prod(shape) // 4
  (once,) = re.findall(rf".*\[{rows_on_device},{width}\]\S* all-reduce\(.*", text)
  assert once in text[text.index("ENTRY") :]
  grads, stats = grad(*placed)
  assert (grads[1].sharding, stats.logprob.sharding) == tuple(shardings[1:])
  expected = reference(*float64(*args[:2]), args[2], 0.7)
  for got, want in zip(stats, expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-6)
  expected = reference_grads(*args, 0.7, (1.0, 0.3, -0.5))
  for got, want in zip(grads, expected[:2], strict=True):
    assert_relative(got, want, 1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"targets": np.zeros((3, 6), int)}, r"\(3, 7, 4\), \(11, 4\), \(3, 6\)"),
    ({"unembedding": np.zeros((4, 11))}, r"\(3, 7, 4\), \(4, 11\), \(3, 7\)"),
    ({"unembedding": np.zeros(4)}, r"\(3, 7, 4\), \(4,\), \(3, 7\)"),
    ({"targets": np.zeros((3, 7))}, "integer targets, got float32, float32, float"),
    ({"hidden": np.zeros((3, 7, 4), int)}, "of a float dtype .* got int"),
    ({"targets": np.full((3, 7), 11)}, r"\(3, 7\) in \[0, 11\), got 11 to 11"),
    ({"targets": np.full((3, 7), -100)}, r"in \[0, 11\), got -100 to -100"),
    ({"vocab_size": 12}, r"vocab_size of 1 to 11, .* \(11, 4\), got 12"),
    ({"vocab_size": 0}, "vocab_size of 1 to 11"),
    ({"vocab_shards": 3}, r"\(11, 4\) does not divide into vocab_shards=3"),
    ({"block_size": 0}, "block_size of at least 1 word, got 0"),
    ({"temperature": 0.0}, "temperature above 0, got 0.0"),
    ({"temperature": np.float32(-1)}, "temperature above 0, got -1.0"),
    ({"temperature": np.ones(3)}, r"scalar temperature above 0, got .* \(3,\)"),
  ],
)
def test_misuse_is_refused_and_shown(change, message):
  kwargs = dict(zip(("hidden", "unembedding", "targets"), inputs(), strict=True))
  with pytest.raises(ValueError, match=message):
    linear_logprobs(**{**kwargs, **change})

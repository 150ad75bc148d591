"""Sampling: exact, independent of its schedule, and the same as the learner sees."""

import dataclasses
import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opo_jax import sampler
from opo_jax.devices import sharding
from opo_jax.learner import response_logprobs
from opo_jax.models import ModelConfig, Policy
from opo_jax.planning import hlo
from opo_jax.rollouts import select
from opo_jax.sampler import decoding
from opo_jax.sampler import tokens as distribution
from opo_jax.sampler.engine import bucket, generate

CONFIG = ModelConfig(
  vocab_size=24,
  width=16,
  mlp_width=40,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  rope_theta=500.0,
  initializer_range=0.3,
)
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [5, 5]]
# Two end tokens, one of which is also what the rows are padded with.
EOS = (0, 2)


def policy(config=CONFIG, mesh=None, eos_ids=EOS):
  key = jax.random.key(1)
  if mesh is None:
    return Policy(config, key, eos_ids=eos_ids)

  def fresh(key):
    return Policy(config, key, eos_ids=eos_ids, mesh=mesh)

  layout = sharding.tree_shardings(jax.eval_shape(fresh, key), mesh)
  return jax.jit(fresh, out_shardings=layout)(key)


def sample(policy, prompts=PROMPTS, **options):
  options = {"samples_per_prompt": 6, "max_new_tokens": 12, "seed": 3} | options
  return generate(policy, prompts, **options)


def rows_of(rollouts):
  """{(prompt, sample): response tokens}."""
  ids = np.asarray(rollouts.prompt_ids)
  counts = {}
  result = {}
  for row, group in enumerate(ids):
    index = counts[group] = counts.get(group, -1) + 1
    length = int(rollouts.lengths[row])
    result[int(group), index] = np.asarray(rollouts.tokens)[row, :length].tolist()
  return result


def assert_same(actual, expected):
  """Tokens to the last one; log-probs to the rounding of products of other shapes."""
  np.testing.assert_array_equal(actual.tokens, expected.tokens)
  np.testing.assert_array_equal(actual.mask, expected.mask)
  np.testing.assert_array_equal(actual.finished, expected.finished)
  np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=2e-5)


@pytest.fixture(scope="module")
def rollouts():
  return sample(policy())


def test_end_token_belongs_to_the_response(rollouts):
  tokens, lengths = np.asarray(rollouts.tokens), np.asarray(rollouts.lengths)
  finished = np.asarray(rollouts.finished)
  assert 0 < finished.sum() < len(finished), "both kinds of row are needed here"
  for row, length, done in zip(tokens, lengths, finished, strict=True):
    assert (row[length - 1] in EOS) == done
    assert not set(row[: length - 1]) & set(EOS)
    assert done or length == 12


def test_mask_marks_the_drawn_tokens_and_no_other(rollouts):
  expected = np.arange(12) < np.asarray(rollouts.lengths)[:, None]
  np.testing.assert_array_equal(rollouts.mask, expected)
  assert not np.asarray(rollouts.logprobs)[~expected].any()
  assert (np.asarray(rollouts.logprobs)[expected] < 0).all()


def test_an_end_token_drawn_first_gives_length_one():
  every_token = tuple(range(CONFIG.vocab_size))
  rollouts = sample(policy(), eos_ids=every_token)
  np.testing.assert_array_equal(rollouts.lengths, 1)
  assert np.asarray(rollouts.finished).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_recorded_logprobs_equal_the_learners(temperature):
  model = policy()
  rollouts = sample(model, temperature=temperature)
  gap = np.abs(np.asarray(rollouts.logprobs - response_logprobs(model, rollouts)))
  # float32: the two programs sum in another order. A learner without the temperature
  # is off by more than 0.1 here.
  assert gap.max() < 1e-5


@pytest.mark.parametrize("slots", [1, 4, 7, 64])
def test_rollouts_do_not_depend_on_slots(rollouts, slots):
  """A refilled slot gives what a fresh slot gives, to the last response."""
  refilled = sample(policy(), slots=slots)
  assert_same(refilled, rollouts)


def test_a_ring_that_grows_and_shrinks_changes_nothing(monkeypatch):
  """Rings of 4, 8 … columns, against one that is wide enough from the start."""
  limits = [1, 17, 3, 2, 2, 12, 1, 1, 2, 5, 9, 1]
  options = dict(samples_per_prompt=3, max_new_tokens=limits, eos_ids=())
  fixed = sample(policy(), **options)
  np.testing.assert_array_equal(fixed.lengths, limits)

  widths = []
  resize = decoding.resize

  def watched(slots, settings, num_slots, width):
    widths.append(width)
    return resize(slots, settings, num_slots, width)

  monkeypatch.setattr(decoding, "resize", watched)
  monkeypatch.setattr(decoding, "MIN_WIDTH", 4)
  assert_same(sample(policy(), slots=2, **options), fixed)
  growth = np.diff(widths)
  assert (growth > 0).any() and (growth < 0).any(), widths


def test_the_ring_is_as_wide_as_the_responses_not_as_the_limit():
  model = policy()
  sampling = sampler._Sampling(model, PROMPTS, max_new_tokens=4096)
  while sampling.advance():
    pass
  longest = int(sampling.rollouts(0).lengths.max())
  assert longest < 64, "the test wants short responses"
  assert sampling.slots.keys.shape[3] == 64


def test_idle_slots_leave_the_batch_when_the_queue_is_empty():
  """One long row of each prompt; both go on with the prompt that is theirs."""
  prompts, long = [[3], [4, 5, 6]], np.array([31, 63])
  limits = np.where(np.isin(np.arange(64), long), 256, 1)
  options = dict(samples_per_prompt=32, eos_ids=(), seed=3)
  sampling = sampler._Sampling(policy(), prompts, max_new_tokens=limits, **options)
  while sampling.advance():
    pass
  assert sampling.num_slots == 16
  alone = generate(policy(), prompts, max_new_tokens=40, **options)
  moved = sampling.rollouts(0).tokens[:, :40]
  np.testing.assert_array_equal(moved[long], alone.tokens[long])


def test_prompts_prefilled_in_chunks_are_those_prefilled_together(monkeypatch):
  prompts = [PROMPTS[i % 4] for i in range(5)]  # 3 and 2
  together = sample(policy(), prompts)
  monkeypatch.setattr(decoding, "_PREFILL_TOKENS", 3 * bucket(1))
  decoding.prefill.clear_cache()
  try:
    assert_same(sample(policy(), prompts), together)
  finally:
    decoding.prefill.clear_cache()


def test_a_shared_prompt_equals_a_repeated_prompt():
  seeds = list(range(12))
  shared = sample(policy(), PROMPTS[:2], seed=seeds)
  repeated = sample(
    policy(), [PROMPTS[0]] * 6 + [PROMPTS[1]] * 6, samples_per_prompt=1, seed=seeds
  )
  assert_same(repeated, shared)


def test_the_order_of_prompts_changes_no_rollout():
  seeds = np.arange(24).reshape(4, 6)
  order = [2, 0, 3, 1]
  there = sample(policy(), seed=seeds.reshape(-1), slots=5)
  moved = sample(
    policy(), [PROMPTS[i] for i in order], seed=seeds[order].reshape(-1), slots=5
  )
  back = np.argsort(np.repeat(np.array(order) * 6, 6) + np.tile(np.arange(6), 4))
  assert_same(select(moved, back), there)


def test_a_rollout_with_a_seed_of_its_own_can_be_sampled_alone():
  together = sample(policy(), seed=list(range(24)))
  alone = sample(policy(), [PROMPTS[2]], samples_per_prompt=1, seed=[15])
  assert rows_of(alone)[0, 0] == rows_of(together)[2, 3]


def test_a_list_sampled_in_parts_gives_what_the_whole_list_gives():
  whole = rows_of(sample(policy()))
  # The shape of the whole, so that one program serves both.
  rest = rows_of(sample(policy(), [*PROMPTS[1:], PROMPTS[0]], first_prompt=1))
  for (group, i), row in rest.items():
    if group < 3:
      assert row == whole[group + 1, i]


def test_streamed_tokens_are_those_of_generate():
  options = dict(max_new_tokens=12, seed=5, eos_ids=())
  pieces = list(sampler.stream(policy(), PROMPTS[0], every=4, **options))
  whole = generate(policy(), PROMPTS[:1], **options)
  assert list(itertools.chain(*pieces)) == rows_of(whole)[0, 0]
  assert [len(piece) for piece in pieces] == [4, 4, 4]


def test_steps_of_one_shape_compile_nothing_new():
  """New prompts, counts within a bucket, temperatures, limits and seeds are data."""
  model = policy()

  def step(seed, prompts, **options):
    options = {"temperature": 1.0, "max_new_tokens": [12] * 6 * len(prompts)} | options
    sample(model, prompts, seed=seed, slots=4, **options)
    return sampler.compiled_programs()

  many = [[3 + i % 5] * (1 + i % 7) for i in range(17)]
  first = step(1, many)
  assert step(2, many[::-1]) == first
  assert step(3, [*many, [4, 4]]) == first
  assert step(4, many, temperature=0.7) == first
  assert step(5, many, max_new_tokens=[12, 3] * 51) == first


def test_a_stop_sequence_ends_a_response_and_belongs_to_it():
  options = dict(eos_ids=(), max_new_tokens=40)
  free = rows_of(sample(policy(), **options))
  first = free[0, 0]
  stop = [first[5:7], [first[2]]]  # two sequences, of two tokens and of one
  stopped = sample(policy(), stop=stop, slots=3, **options)
  ended = 0
  for (row, response), done in zip(
    rows_of(stopped).items(), np.asarray(stopped.finished), strict=True
  ):
    ends = [
      end
      for end in range(1, 41)
      if any(free[row][max(end - len(s), 0) : end] == s for s in stop)
    ]
    assert done == bool(ends)
    assert response == free[row][: ends[0] if ends else 40]
    ended += done
  assert 0 < ended < 24, "both kinds of row are needed here"


def test_a_stop_sequence_does_not_begin_in_the_prompt():
  options = dict(eos_ids=(), max_new_tokens=8, samples_per_prompt=1)
  free = rows_of(sample(policy(), PROMPTS[:1], **options))[0, 0]
  pair = [PROMPTS[0][-1], free[0]]
  assert pair not in [free[i : i + 2] for i in range(7)]
  stopped = sample(policy(), PROMPTS[:1], stop=[pair], **options)
  assert rows_of(stopped)[0, 0] == free


def test_rollouts_do_not_depend_on_the_mesh():
  alone = rows_of(sample(policy()))
  for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
    assert rows_of(sample(policy(mesh=sharding.make_mesh(*sizes)))) == alone


def test_gathered_weights_change_no_rollout_and_save_the_gathering_of_every_token():
  model = policy(mesh=sharding.make_mesh(1, 4, 2))
  assert rows_of(sample(model, gather_weights=False)) == rows_of(sample(model))

  like = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
    model,
  )

  def gathered_bytes(gather_weights):
    programs = sampler.trace(
      like,
      num_prompts=4,
      prompt_tokens=6,
      samples_per_prompt=2,
      max_new_tokens=16,
      slots=8,
      gather_weights=gather_weights,
    )
    decode = programs[-1]["traced"]
    text = decode.lower().compile().as_text()
    return hlo.traffic(text, dict(model.mesh.shape)).collective_bytes

  once, each = gathered_bytes(True), gathered_bytes(False)
  assert 10 * sum(once.values()) < sum(each.values())
  # Over fsdp, whole weights leave the counting of busy slots, a few numbers.
  assert sum(size for axes, size in once.items() if "fsdp" in axes) < 400


@pytest.mark.parametrize("total", [24_000, 60_000, 90_000])
def test_planned_slots_are_those_that_a_run_takes(total, monkeypatch):
  """A run asks for free memory when the sampler's weights are there."""
  model = policy(mesh=sharding.make_mesh(1, 4, 2))
  like = sharding.abstract(model, jax.tree.map(lambda leaf: leaf.sharding, model))
  options = dict(samples_per_prompt=64, max_new_tokens=8)
  planned = sampler.trace(
    like, num_prompts=4, prompt_tokens=6, free_bytes=total, **options
  )[-1]["slots"]

  taken, started = [], []
  change, start = decoding.sampling_weights, decoding.start

  def changed(*args):
    weights = change(*args)
    taken.append(sharding.share_bytes(weights))
    return weights

  def begun(*args):
    started.append(args[5])
    return start(*args)

  monkeypatch.setattr(decoding, "sampling_weights", changed)
  monkeypatch.setattr(decoding, "start", begun)
  monkeypatch.setattr(sharding, "free_bytes", lambda mesh: total - sum(taken))
  sampler._slots_that_fit.cache_clear()
  sample(model, **options)
  sampler._slots_that_fit.cache_clear()
  assert taken and 4 * started[0] == planned < 256


@pytest.mark.parametrize(
  "sizes", [(2, 1, 2), pytest.param((4, 1, 1), marks=pytest.mark.slow)]
)
def test_refilled_slots_of_several_devices_give_what_one_gives(sizes, monkeypatch):
  """Uneven queues, more shards than prompts for some, rings that change."""
  monkeypatch.setattr(decoding, "MIN_WIDTH", 4)
  devices = jax.devices()[: int(np.prod(sizes))]
  mesh = sharding.make_mesh(*sizes, devices=devices)
  for prompts, slots in ((PROMPTS + PROMPTS[:3], 8), (PROMPTS[:2], 4)):
    limits = 1 + np.arange(3 * len(prompts)) * 7 % 10
    options = dict(samples_per_prompt=3, max_new_tokens=limits)
    alone = sample(policy(), prompts, **options)
    assert_same(sample(policy(mesh=mesh), prompts, slots=slots, **options), alone)


@pytest.mark.parametrize("sizes", [None, (2, 1, 2)], ids=["alone", "four devices"])
@pytest.mark.parametrize("most", [3, 256])
def test_rows_handed_out_early_are_rows_of_the_batch_and_change_none(
  sizes, most, monkeypatch
):
  """Each once at most; rings and slots change meanwhile, queues are uneven."""
  monkeypatch.setattr(decoding, "MIN_WIDTH", 4)
  monkeypatch.setattr(sampler, "MIN_TOKENS_A_LOOK", 2)
  monkeypatch.setattr(sampler, "MOST_ENDED", most)
  prompts = PROMPTS[:3]  # on four devices, padding fills the second shard up
  model = policy()
  if sizes is not None:
    model = policy(mesh=sharding.make_mesh(*sizes, devices=jax.devices()[:4]))
  options = dict(samples_per_prompt=5, slots=4, max_new_tokens=[12, 3, 7] * 5)
  looks = []
  listened = sample(model, prompts, on_ended=looks.append, **options)
  assert_same(listened, sample(policy(), prompts, **options))

  rows = np.concatenate([np.asarray(look.rows) for look in looks])
  assert len(looks[0].rows) == min(most, 15 if sizes is None else 20)
  real = rows >= 0
  assert len(set(rows[real])) == real.sum(), "no row twice"
  assert 5 <= real.sum() < 15, "the last rows are never handed out"
  for name in ("prompt_ids", "tokens", "lengths", "finished"):
    early = np.concatenate([np.asarray(getattr(look, name)) for look in looks])
    whole = np.asarray(getattr(listened, name))
    np.testing.assert_array_equal(early[real], whole[rows[real]], err_msg=name)


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_running_out_of_memory_says_how_many_slots_to_use(program, monkeypatch):
  def fail(*_):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(decoding, program, fail)
  message = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nat 1"
  with pytest.raises(
    RuntimeError, match=r"7 slots.*--rollout.slots 3\).*allocate 9 bytes.$"
  ):
    sample(policy(), slots=7)
  with pytest.raises(RuntimeError, match=r"--rollout.max-new-tokens 6\)"):
    sample(policy(), slots=1)
  message = "INTERNAL: something else"
  with pytest.raises(jax.errors.JaxRuntimeError, match=message):
    sample(policy(), slots=7)


def test_memory_told_is_that_of_the_slots_taken():
  # A slot: 2 x 2 layers x 2 heads x 8 x 4 bytes x 12 x 3/2 + 8 x 4 x 24.
  assert sampler.memory_bytes(policy(), 24, 12, slots=7) == (7, 7 * 5376)
  assert sampler.memory_bytes(policy(), 5, 12) == (5, 5 * 5376)
  # Two slots of each of four shards; on two devices each, which split heads and words.
  four = SimpleNamespace(
    config=CONFIG, mesh=sharding.make_mesh(4, 1, 2), dtype="float32"
  )
  assert sampler.memory_bytes(four, 24, 12, slots=7) == (8, 2 * 5376 // 2)


def test_a_new_seed_gives_new_rollouts():
  assert rows_of(sample(policy(), seed=4)) != rows_of(sample(policy(), seed=5))


def test_greedy_takes_the_most_probable_token():
  model = policy()
  rollouts = sample(model, temperature=0.0, samples_per_prompt=1, eos_ids=())
  # A causal model does not see what follows: one width serves all lengths.
  forward = jax.jit(lambda tokens: model.logits(tokens).argmax(-1))
  for row, prompt in enumerate(PROMPTS):
    response = np.asarray(rollouts.tokens)[row].tolist()
    tokens = np.zeros((1, 20), np.int32)
    tokens[0, : len(prompt) + 12] = prompt + response
    best = np.asarray(forward(tokens))[0]
    assert best[len(prompt) - 1 : len(prompt) + 11].tolist() == response


def test_whole_sequences_have_the_probabilities_of_exact_enumeration():
  """Chi-square over all sequences of up to 3 tokens of a vocabulary of 4."""
  config = ModelConfig(4, 8, 16, 1, 2, 1, 4, initializer_range=0.8)
  model, num_samples, temperature = policy(config, eos_ids=(3,)), 20_000, 1.3
  rollouts = generate(
    model,
    [[1, 2]],
    samples_per_prompt=num_samples,
    max_new_tokens=3,
    temperature=temperature,
    seed=11,
  )
  observed = {}
  for response in rows_of(rollouts).values():
    observed[tuple(response)] = observed.get(tuple(response), 0) + 1

  sequences = [
    sequence
    for length in (1, 2, 3)
    for sequence in itertools.product(range(4), repeat=length)
    if 3 not in sequence[:-1] and (length == 3 or sequence[-1] == 3)
  ]
  padded = jnp.array([[1, 2, *s, *[0] * (3 - len(s))] for s in sequences])
  logits = model.logits(padded)[:, 1:-1] / temperature
  every_logprob = np.asarray(jax.nn.log_softmax(logits), np.float64)
  statistic = total = 0.0
  for sequence, logprobs in zip(sequences, every_logprob, strict=True):
    probability = np.exp(logprobs[np.arange(len(sequence)), sequence].sum())
    total += probability
    expected = num_samples * probability
    statistic += (observed.get(sequence, 0) - expected) ** 2 / expected
  assert abs(total - 1) < 1e-5, "the enumeration is complete"
  assert len(sequences) == 40
  # 39 degrees of freedom: above 82 with probability 7e-5 if the sampler is right.
  # Sampling without the temperature gives more than 300.
  assert statistic < 82


def test_top_k_and_top_p_keep_what_they_say():
  model = policy()
  kept = sample(model, top_k=1, samples_per_prompt=1)
  greedy = sample(model, temperature=0.0, samples_per_prompt=1)
  assert rows_of(kept) == rows_of(greedy)
  # One token is left over: certain in what was drawn from, not in the policy.
  np.testing.assert_allclose(kept.sampling_logprobs, 0.0, atol=1e-6)
  np.testing.assert_allclose(kept.logprobs, greedy.logprobs, atol=1e-6)

  nucleus = sample(model, [[6]], samples_per_prompt=400, max_new_tokens=1, top_p=0.6)
  probs = np.asarray(jax.nn.softmax(model.logits(jnp.array([[6]]))[0, -1]))
  order = np.argsort(-probs)
  size = int((np.cumsum(probs[order]) - probs[order] < 0.6).sum())
  assert set(np.asarray(nucleus.tokens)[:, 0].tolist()) == set(order[:size].tolist())
  drawn = np.asarray(nucleus.tokens)[:, 0]
  expected = np.log(probs[drawn] / probs[order[:size]].sum())
  np.testing.assert_allclose(nucleus.sampling_logprobs[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [320, 300], ids=["whole blocks", "padded"])
def test_draws_over_several_blocks_have_the_probabilities(vocab_size):
  """Every third word is impossible, whole blocks among them."""
  assert 4 <= distribution._block_size(vocab_size) <= 20
  logits = np.array(1.5 * jax.random.normal(jax.random.key(0), (vocab_size,)))
  logits[::3], logits[40:80] = -np.inf, -np.inf
  num_draws = 200_000
  tokens, logprobs, _ = jax.jit(distribution.draw)(
    jnp.broadcast_to(jnp.array(logits), (num_draws, vocab_size)),
    jax.random.split(jax.random.key(1), num_draws),
    distribution.make(vocab_size),
  )
  expected = np.exp(logits - logits.max()).astype(np.float64)
  expected *= num_draws / expected.sum()
  observed = np.bincount(tokens, minlength=vocab_size)
  assert not observed[expected == 0].any()
  np.testing.assert_allclose(np.exp(logprobs), expected[tokens] / num_draws, rtol=1e-4)
  likely = expected > 5
  cells = likely.sum()
  statistic = ((observed - expected) ** 2 / np.maximum(expected, 1e-9))[likely].sum()
  # A chi-square of n cells is above n + 6 sqrt(2 n) with probability below 1e-7.
  assert statistic < cells + 6 * np.sqrt(2 * cells)


def test_one_word_that_is_left_is_drawn_and_no_logits_name_a_word_that_is_none():
  logits = np.full((2, 300), -np.inf, np.float32)
  logits[0, 299], logits[1] = 0.0, np.nan
  tokens, logprobs, _ = distribution.draw(
    jnp.array(logits), jax.random.split(jax.random.key(0), 2), distribution.make(300)
  )
  assert tokens[0] == 299 and logprobs[0] == 0
  assert tokens[1] < 300 and np.isnan(logprobs[1])


def test_min_p_keeps_what_is_probable_enough_beside_the_first():
  logits = 2.0 * jax.random.normal(jax.random.key(0), (50, 200))
  kept = distribution.kept(logits, distribution.make(200, min_p=0.2))
  probs = np.asarray(jax.nn.softmax(logits), np.float64)
  np.testing.assert_array_equal(kept, probs >= 0.2 * probs.max(1, keepdims=True))
  # After top-k, the first is still the first: what both keep is kept.
  both = distribution.kept(logits, distribution.make(200, min_p=0.2, top_k=3))
  third = np.sort(probs, 1)[:, [-3]]
  np.testing.assert_array_equal(both, np.asarray(kept) & (probs >= third))


def test_both_logprobs_are_there_where_a_filter_makes_them_differ():
  model = policy()
  rollouts = sample(model, top_p=0.7, temperature=1.3)
  mask, learner = np.asarray(rollouts.mask), response_logprobs(model, rollouts)
  np.testing.assert_allclose(rollouts.logprobs, learner, atol=1e-5)
  gain = np.asarray(rollouts.sampling_logprobs - rollouts.logprobs)[mask]
  # What is left out had a mass of 0 to 30 %: the rest is scaled up by its inverse.
  assert (gain > -1e-6).all() and (gain < -np.log(0.7) + 1e-5).all()
  assert gain.max() > 0.1
  assert rollouts.filtered and not sample(model).filtered


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 0.9), (50, 0.5), (0, 0.95), (7, 1.0)])
def test_truncation_keeps_what_a_plain_reference_keeps(top_k, top_p):
  """On many rows: a threshold normalised apart loses a token now and then."""
  logits = 2.0 * jax.random.normal(jax.random.key(0), (2000, 200))
  filters = distribution.make(200, top_k=top_k, top_p=top_p)
  kept = np.asarray(distribution.kept(logits, filters))
  descending = np.sort(np.asarray(logits, np.float64), axis=1)[:, ::-1]
  descending[:, top_k or 200 :] = -np.inf
  probs = np.exp(descending - descending[:, :1])
  probs /= probs.sum(1, keepdims=True)
  sizes = (np.cumsum(probs, 1) - probs < top_p).sum(1)
  sizes = np.minimum(sizes, top_k or 200)
  # A cumulative sum that meets top_p to rounding may fall on either side.
  assert (kept.sum(1) == sizes).mean() > 0.999
  assert (
    np.asarray(logits).argmax(1) == np.where(kept, logits, -np.inf).argmax(1)
  ).all()


def test_the_loop_stops_when_every_row_has_ended():
  """A limit of 4,096 would take minutes if it were decoded to the end."""
  every_token = tuple(range(CONFIG.vocab_size))
  rollouts = sample(policy(), max_new_tokens=4096, eos_ids=every_token)
  np.testing.assert_array_equal(rollouts.lengths, 1)


def compiled_decode(policy, *, slots):
  """The sampling state and the decode program of 16 x 6 rollouts."""
  sampling = sampler._Sampling(
    policy, [[3, 4]] * 16, samples_per_prompt=6, max_new_tokens=256, slots=slots
  )
  program = decoding.decode.lower(
    sampling.slots,
    sampling.drawn,
    policy,
    sampling.prompts,
    sampling.queue,
    sampling.distribution,
    jnp.int32(1),
    sampling.settings,
    sampling.in_groups,
  )
  return sampling, program.compile()


def test_rings_of_long_responses_need_few_programs(monkeypatch):
  """A decode program for each width, and a change to the next one up and down."""
  monkeypatch.setattr(decoding, "MIN_WIDTH", 4)
  decoding.decode.clear_cache(), decoding.resize.clear_cache()
  limits = [1, 32, 2, 30, 1, 1, 17, 3, 2, 25, 1, 1]
  for seed in range(3):
    limits = limits[3:] + limits[:3]
    sample(policy(), samples_per_prompt=3, max_new_tokens=limits, seed=seed, slots=2)
  # Widths 4, 8, 16, 32.
  assert decoding.decode._cache_size() <= 4
  assert decoding.resize._cache_size() <= 6
  decoding.decode.clear_cache(), decoding.resize.clear_cache()


def test_the_number_of_slots_is_chosen_once(monkeypatch):
  """Free memory wavers from step to step; another number would be another program."""
  sampler._slots_that_fit.cache_clear()
  chosen = []
  for free in (100_000, 97_000, 130_000):
    monkeypatch.setattr(sharding, "free_bytes", lambda mesh, free=free: free)
    sampling = sampler._Sampling(
      policy(), [[3]], samples_per_prompt=64, max_new_tokens=12
    )
    chosen.append(sampling.num_slots)
  sampler._slots_that_fit.cache_clear()
  # A slot takes 2 x 2 layers x 2 heads x 8 x 4 bytes x 12 x 3/2 + 8 x 4 x 24 = 5,376.
  assert chosen == [8, 8, 8]


@pytest.mark.parametrize("slots", [64, 96], ids=["refill", "in groups"])
def test_keys_and_values_are_written_in_place(slots):
  """A copy of the ring would be 1 to 2 times its size; one layer's is an eighth."""
  model = policy(dataclasses.replace(CONFIG, num_layers=8))
  sampling, program = compiled_decode(model, slots=slots)
  assert sampling.in_groups == (slots == 96)
  memory, ring = program.memory_analysis(), 2 * sampling.slots.keys.nbytes
  assert memory.alias_size_in_bytes > ring, "donated, and given back"
  assert memory.temp_size_in_bytes < ring / 3


def test_nothing_of_slots_times_vocabulary_is_kept():
  model = policy(dataclasses.replace(CONFIG, vocab_size=5000))
  sampling, _ = compiled_decode(model, slots=16)
  for leaf in jax.tree.leaves((sampling.slots, sampling.drawn, sampling.queue)):
    assert 5000 not in leaf.shape


@pytest.mark.parametrize("slots", [64, 96], ids=["refill", "in groups"])
def test_devices_exchange_no_keys_and_no_rollouts(slots):
  """Only whether anybody is still busy, one bool."""
  model = policy(mesh=sharding.make_mesh(8, 1, 1))
  _, program = compiled_decode(model, slots=slots)
  exchanged = re.findall(
    r"= (\S+) (?:all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\(",
    program.as_text(),
  )
  assert set(exchanged) == {"pred[]"}


def test_prompt_widths_are_few():
  assert [bucket(n) for n in (1, 16, 17, 25, 33, 100, 129)] == [
    16, 16, 24, 32, 48, 128, 192,
  ]  # fmt: skip
  assert len({bucket(n) for n in range(1, 4097)}) == 17


@pytest.mark.parametrize(
  ("prompts", "options", "message"),
  [
    ([], {}, "no prompts"),
    ([[1], []], {}, "Prompt 1 is empty"),
    ([[1, 24]], {}, "vocabulary of 24"),
    ([[1]], {"temperature": -1.0}, "temperature"),
    ([[1]], {"top_p": 0.0}, "top_p"),
    ([[1]], {"min_p": 1.5}, "min_p"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
    (
      [[1]],
      {"max_new_tokens": [3, 4]},
      "max_new_tokens has 2 values for 1 prompts x 6",
    ),
    ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens=2.5 is no whole number"),
    ([[1]], {"seed": -1}, "seed=-1 is no whole number"),
    ([[1]], {"samples_per_prompt": -1}, "samples_per_prompt=-1"),
    ([[1]], {"eos_ids": 3}, "eos_ids=3"),
    ([[1]], {"stop": [5]}, "stop has 5"),
    ([[1]], {"stop": [[]]}, "stop has"),
    ([[1]], {"max_new_tokens": 2**31}, r"use fewer\s+tokens \(--rollout.max-new"),
  ],
)
def test_bad_input_is_refused(prompts, options, message):
  with pytest.raises(ValueError, match=message):
    sample(policy(), prompts, **options)

"""Sampling: exact, independent of its schedule, and the same as the learner computes.

Compiling takes most of the time, so most tests share two families of programs: `sample`
(4 prompts x 6 samples of up to 12 tokens) and `sample_long` (4 x 3 of up to 16, without
end tokens), the second under small rings too.
"""

import dataclasses
import functools
import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opo_jax.devices import sharding
from opo_jax.learner import response_logprobs
from opo_jax.models import ModelConfig, Policy
from opo_jax.planning import hlo
from opo_jax.rollouts import select
from opo_jax.sampler import (
  JaxSampler,
  SamplingParams,
  batch,
  bucket,
  compiled_programs,
  decoding,
  engine,
  generate,
  prefill,
  schedule,
  tokens,
)

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


@functools.cache
def policy(sizes=None, num_layers=2):
  """The same weights on a mesh of these sizes."""
  config = dataclasses.replace(CONFIG, num_layers=num_layers)
  key = jax.random.key(1)
  if sizes is None:
    return Policy(config, key, eos_ids=EOS)
  mesh = mesh_of(*sizes)

  def fresh(key):
    return Policy(config, key, eos_ids=EOS, mesh=mesh)

  layout = sharding.tree_shardings(jax.eval_shape(fresh, key), mesh)
  return jax.jit(fresh, out_shardings=layout)(key)


def mesh_of(*sizes):
  return sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def sample(policy, prompts=PROMPTS, **options):
  options = {"samples_per_prompt": 6, "max_new_tokens": 12, "seed": 3} | options
  return generate(policy, prompts, **options)


def sample_long(policy, prompts=PROMPTS, limits=16, **options):
  """Up to 16 tokens whatever the limits of the rows: one length, one program."""
  params = SamplingParams(
    max_new_tokens=16,
    samples_per_prompt=3,
    eos_ids=(),
    stop=options.pop("stop", ()),
  )
  sampler = JaxSampler(slots=options.pop("slots", None))
  limits = np.broadcast_to(limits, 3 * len(prompts))
  return sampler.sample(policy, prompts, params, seed=3, limits=limits, **options)


def rows_of(rollouts):
  """{(prompt, sample): response tokens}."""
  counts, result = {}, {}
  for row, group in enumerate(np.asarray(rollouts.prompt_ids).tolist()):
    index = counts[group] = counts.get(group, -1) + 1
    length = int(rollouts.lengths[row])
    result[group, index] = np.asarray(rollouts.tokens)[row, :length].tolist()
  return result


def assert_same(actual, expected):
  """Tokens to the last one; log-probs to the rounding of products of other shapes."""
  np.testing.assert_array_equal(actual.tokens, expected.tokens)
  np.testing.assert_array_equal(actual.mask, expected.mask)
  np.testing.assert_array_equal(actual.finished, expected.finished)
  np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=2e-5)


def assert_cut_off(actual, whole, limits):
  """Each row is the beginning of its row in `whole`, as long as its limit."""
  np.testing.assert_array_equal(actual.lengths, limits)
  for name in ("tokens", "logprobs"):
    expected = np.where(actual.mask, getattr(whole, name), 0)
    np.testing.assert_allclose(getattr(actual, name), expected, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def rollouts():
  return sample(policy())


@pytest.fixture(scope="module")
def long_rollouts():
  return sample_long(policy())


@pytest.fixture
def small_rings(long_rollouts, monkeypatch):
  """Rings of 4, 8 and 16 columns, and moves down to 2 slots.

  Compiled programs contain these numbers. None is compiled again under the usual ones:
  there, 16 tokens have one ring, which all `long_rollouts` share.
  """
  monkeypatch.setattr(schedule, "MIN_WIDTH", 4)
  monkeypatch.setattr(schedule, "MIN_SLOTS", 2)


@pytest.fixture
def resized(monkeypatch):
  """The (slots, columns) that the host asks for."""
  sizes, resize = [], decoding.resize

  def watched(slots, num_slots, width):
    sizes.append((num_slots, width))
    return resize(slots, num_slots, width)

  watched._cache_size = resize._cache_size
  monkeypatch.setattr(decoding, "resize", watched)
  return sizes


# --- responses ----------------------------------------------------------------------


def test_end_token_belongs_to_the_response(rollouts):
  tokens, lengths = np.asarray(rollouts.tokens), np.asarray(rollouts.lengths)
  finished = np.asarray(rollouts.finished)
  assert 0 < finished.sum() < len(finished), "both kinds of row are needed here"
  assert lengths.min() == 1, "an end token sampled first is needed here"
  for row, length, done in zip(tokens, lengths, finished, strict=True):
    assert (row[length - 1] in EOS) == done
    assert not set(row[: length - 1]) & set(EOS)
    assert done or length == 12


def test_mask_marks_the_sampled_tokens_and_no_other(rollouts):
  expected = np.arange(12) < np.asarray(rollouts.lengths)[:, None]
  np.testing.assert_array_equal(rollouts.mask, expected)
  assert not np.asarray(rollouts.logprobs)[~expected].any()
  assert (np.asarray(rollouts.logprobs)[expected] < 0).all()


def test_recorded_logprobs_equal_the_learners():
  model, gaps = policy(), {}
  for temperature in (0.5, 1.0, 1.7):
    rollouts = sample(model, temperature=temperature)
    gap = rollouts.logprobs - response_logprobs(model, rollouts)
    gaps[temperature] = np.abs(gap).max()
  # float32: the two programs sum in another order. A learner without the temperature
  # is off by more than 0.1 here.
  assert max(gaps.values()) < 1e-5, gaps


def test_a_new_seed_gives_new_rollouts(rollouts):
  assert rows_of(sample(policy(), seed=4)) != rows_of(rollouts)


def test_a_stop_sequence_ends_a_response_and_belongs_to_it(long_rollouts):
  free = rows_of(long_rollouts)
  first = free[0, 0]
  # Of two tokens, of one, and one that would begin in the prompt.
  stop = [first[5:7], [first[2]], [PROMPTS[0][-1], first[0]]]
  stopped = sample_long(policy(), stop=stop, slots=3)
  ended = 0
  for (row, response), done in zip(
    rows_of(stopped).items(), np.asarray(stopped.finished), strict=True
  ):
    ends = [
      end
      for end in range(1, 17)
      if any(free[row][max(end - len(s), 0) : end] == s for s in stop)
    ]
    assert done == bool(ends)
    assert response == free[row][: ends[0] if ends else 16]
    ended += done
  assert len(rows_of(stopped)[0, 0]) > 1, "a sequence that began in the prompt"
  assert 0 < ended < 12, "both kinds of row are needed here"


def test_streamed_tokens_are_those_of_generate():
  params, longest = SamplingParams(max_new_tokens=12, samples_per_prompt=5), 0
  for seed in range(4):
    stream = JaxSampler().stream(policy(), PROMPTS[2], params, seed=seed, every=4)
    pieces = list(stream)
    whole = sample(policy(), [PROMPTS[2]], samples_per_prompt=1, seed=seed)
    assert list(itertools.chain(*pieces)) == rows_of(whole)[0, 0]
    assert all(len(piece) == 4 for piece in pieces[:-1])
    longest = max(longest, len(pieces))
  assert longest == 3, "the test wants a long response"


# --- schedule -----------------------------------------------------------------------


def test_rollouts_do_not_depend_on_slots(rollouts):
  """A refilled slot gives what a fresh slot gives, to the last response."""
  for slots in (1, 7, 64):
    assert_same(sample(policy(), slots=slots), rollouts)


def test_a_ring_that_grows_and_shrinks_changes_nothing_and_needs_few_programs(
  long_rollouts, small_rings, resized
):
  limits = [1, 16, 2, 15, 1, 1, 9, 3, 2, 13, 1, 1]
  before = decoding.decode._cache_size(), decoding.resize._cache_size()
  for _ in range(3):
    limits = limits[3:] + limits[:3]
    assert_cut_off(sample_long(policy(), limits=limits, slots=2), long_rollouts, limits)
  growth = np.diff([width for _, width in resized])
  assert (growth > 0).any() and (growth < 0).any(), resized
  # Widths 4, 8, 16, and from each of them to the next one up and down.
  assert decoding.decode._cache_size() - before[0] <= 3
  assert decoding.resize._cache_size() - before[1] <= 4


def test_idle_slots_leave_the_batch_when_the_queue_is_empty(
  long_rollouts, small_rings, resized
):
  """Two long rows, of two prompts; both go on with the prompt that is theirs."""
  limits = np.ones(12, int)
  limits[[4, 9]] = 16
  assert_cut_off(sample_long(policy(), limits=limits), long_rollouts, limits)
  assert [slots for slots, width in resized if width == 4] == [3, 2]


def test_the_ring_is_as_wide_as_the_responses_not_as_the_limit():
  """And the loop stops when every row has ended: 4,096 tokens would take minutes."""
  params = SamplingParams(max_new_tokens=4096)
  rows = JaxSampler()._start(policy(), PROMPTS, params, 0)
  while rows.decode():
    pass
  longest = int(rows.rollouts(0).lengths.max())
  assert longest < 64, "the test wants short responses"
  assert rows.slots.keys.shape[3] == 64


def test_prompts_prefilled_in_chunks_are_those_prefilled_together(monkeypatch):
  tokens = np.random.default_rng(0).integers(24, size=(5, 16))
  lengths = np.array([3, 16, 1, 7, 9])

  def prefilled():
    program = jax.jit(prefill.prefill.__wrapped__, static_argnames="cache_dtype")
    return program(policy(), tokens, lengths, cache_dtype="float32")

  together = prefilled()
  monkeypatch.setattr(prefill, "_PREFILL_TOKENS", 3 * 16)  # 3 and 2
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5), prefilled(), together
  )


def test_steps_of_one_shape_compile_nothing_new():
  """New prompts, counts within a bucket, temperatures, limits and seeds are data."""
  model = policy()

  def step(seed, prompts, **options):
    options = {"temperature": 1.0, "max_new_tokens": [12] * 6 * len(prompts)} | options
    sample(model, prompts, seed=seed, slots=4, **options)
    return compiled_programs()

  many = [[3 + i % 5] * (1 + i % 7) for i in range(17)]
  first = step(1, many)
  assert step(2, many[::-1]) == first
  assert step(3, [*many, [4, 4]]) == first
  assert step(4, many, temperature=0.7) == first
  assert step(5, many, temperature=2) == first
  assert step(6, many, max_new_tokens=[12, 3, 7] * 34) == first


def test_prompt_widths_are_few():
  assert [bucket(n) for n in (1, 16, 17, 25, 33, 100, 129)] == [
    16, 16, 24, 32, 48, 128, 192,
  ]  # fmt: skip
  assert len({bucket(n) for n in range(1, 4097)}) == 17


# --- random keys --------------------------------------------------------------------


def test_a_shared_prompt_equals_a_repeated_prompt():
  seeds = list(range(24))
  shared = sample(policy(), seed=seeds)
  repeated = sample(
    policy(),
    [prompt for prompt in PROMPTS for _ in range(6)],
    samples_per_prompt=1,
    seed=seeds,
  )
  assert_same(repeated, shared)


def test_the_order_of_prompts_changes_no_rollout():
  seeds = np.arange(24).reshape(4, 6)
  order = [2, 0, 3, 1]
  there = sample(policy(), seed=seeds.reshape(-1), slots=7)
  moved = sample(
    policy(), [PROMPTS[i] for i in order], seed=seeds[order].reshape(-1), slots=7
  )
  back = np.argsort(np.repeat(np.array(order) * 6, 6) + np.tile(np.arange(6), 4))
  assert_same(select(moved, back), there)


def test_a_rollout_with_a_seed_of_its_own_can_be_sampled_alone():
  together = sample(policy(), seed=list(range(24)))
  alone = sample(policy(), [PROMPTS[2]], samples_per_prompt=1, seed=[15])
  assert rows_of(alone)[0, 0] == rows_of(together)[2, 3]


def test_a_list_sampled_in_parts_gives_what_the_whole_list_gives(rollouts):
  whole = rows_of(rollouts)
  # The shape of the whole, so that one program serves both.
  rest = rows_of(sample(policy(), [*PROMPTS[1:], PROMPTS[0]], first_prompt=1))
  for (group, i), row in rest.items():
    if group < 3:
      assert row == whole[group + 1, i]


# --- devices ------------------------------------------------------------------------


@pytest.mark.parametrize(
  "sizes",
  [
    (2, 2, 2),
    pytest.param((8, 1, 1), marks=pytest.mark.slow),
    pytest.param((1, 8, 1), marks=pytest.mark.slow),
  ],
)
def test_rollouts_do_not_depend_on_the_mesh(rollouts, sizes):
  assert rows_of(sample(policy(sizes))) == rows_of(rollouts)


@pytest.mark.parametrize(
  "sizes", [(2, 1, 2), pytest.param((4, 1, 1), marks=pytest.mark.slow)]
)
def test_refilled_slots_of_several_devices_give_what_one_gives(
  long_rollouts, small_rings, sizes
):
  """Uneven queues, prompts that pad a shard or leave it without any, rings that
  change."""
  limits = [1, 8, 15, 6, 13, 4, 11, 2, 9]
  refilled = sample_long(policy(sizes), PROMPTS[:3], limits=limits, slots=4)
  assert_cut_off(refilled, select(long_rollouts, np.arange(9)), limits)


@pytest.mark.parametrize("sizes", [None, (2, 1, 2)], ids=["alone", "four devices"])
@pytest.mark.parametrize("most", [3, 256])
def test_responses_reported_early_are_rows_of_the_batch_and_change_none(
  long_rollouts, small_rings, sizes, most, monkeypatch
):
  """Each once at most; rings and slots change meanwhile, queues are uneven."""
  monkeypatch.setattr(engine, "MIN_REPORT_TOKENS", 2)
  monkeypatch.setattr(batch, "MAX_ENDED", most)
  # On four devices, padding fills up the second shard: 9 rows of 12.
  prompts, limits, slots = PROMPTS[:3], [12, 3, 7, 2, 16, 9, 1, 1, 16], 4
  if sizes is None:
    prompts, limits, slots = PROMPTS, [*limits, 2, 11, 3], 2
  reports = []
  listened = sample_long(
    policy(sizes), prompts, limits=limits, slots=slots, on_ended=reports.append
  )
  assert_cut_off(listened, select(long_rollouts, np.arange(len(limits))), limits)

  rows = np.concatenate([np.asarray(report.rows) for report in reports])
  assert len(reports[0].rows) == min(most, 12)
  real = rows >= 0
  assert len(set(rows[real])) == real.sum(), "no row twice"
  assert 5 <= real.sum() < len(limits), "the last rows are never reported"
  for name in ("prompt_ids", "tokens", "lengths", "finished"):
    early = np.concatenate([np.asarray(getattr(report, name)) for report in reports])
    whole = np.asarray(getattr(listened, name))
    np.testing.assert_array_equal(early[real], whole[rows[real]], err_msg=name)


def started(policy, *, slots, **options):
  """4 x 6 rollouts, prefilled."""
  params = SamplingParams(max_new_tokens=64, samples_per_prompt=6, eos_ids=EOS)
  return JaxSampler(slots=slots, **options)._start(policy, PROMPTS, params, 3)


# --- memory -------------------------------------------------------------------------


def test_nothing_of_slots_times_vocabulary_is_kept():
  # 24 tokens of vocabulary; every other size of these shapes is another.
  rows = started(policy(), slots=16)
  for leaf in jax.tree.leaves((rows.slots, rows.responses, rows.queue)):
    assert CONFIG.vocab_size not in leaf.shape[1:]


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_running_out_of_memory_says_how_many_slots_to_use(program, monkeypatch):
  def fail(*_):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr({"prefill": prefill, "decode": decoding}[program], program, fail)
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


def test_reported_memory_is_that_of_the_slots_taken():
  params = SamplingParams(max_new_tokens=12)
  # A slot: 2 x 2 layers x 2 heads x 8 x 4 bytes x 12 x 3/2 + 8 x 4 x 24.
  assert JaxSampler(slots=7).memory_bytes(policy(), 24, params) == (7, 7 * 5376)
  assert JaxSampler().memory_bytes(policy(), 5, params) == (5, 5 * 5376)
  # Two slots of each of four shards, on two devices that split heads and vocabulary.
  four = SimpleNamespace(
    config=CONFIG, mesh=sharding.make_mesh(4, 1, 2), dtype="float32"
  )
  assert JaxSampler(slots=7).memory_bytes(four, 24, params) == (8, 2 * 5376 // 2)


def test_the_number_of_slots_is_chosen_once(monkeypatch):
  """Free memory wavers from step to step; another number would be another program."""
  engine._slots_that_fit.cache_clear()
  chosen = []
  for free in (100_000, 97_000, 130_000):
    monkeypatch.setattr(sharding, "free_bytes", lambda mesh, free=free: free)
    params = SamplingParams(max_new_tokens=12)
    chosen.append(JaxSampler().memory_bytes(policy(), 64, params)[0])
  engine._slots_that_fit.cache_clear()
  # A slot takes 2 x 2 layers x 2 heads x 8 x 4 bytes x 12 x 3/2 + 8 x 4 x 24 = 5,376.
  assert chosen == [8, 8, 8]


def test_planned_slots_are_those_that_a_run_takes(monkeypatch):
  """A run asks for free memory when the sampler's weights exist."""
  model, taken = policy((1, 4, 2)), []
  abstract = sharding.abstract(model, jax.tree.map(lambda leaf: leaf.sharding, model))
  params = SamplingParams(max_new_tokens=8, samples_per_prompt=64)
  gather = prefill.sampling_weights

  def counted(*args):
    weights = gather(*args)
    taken.append(sharding.share_bytes(weights))
    return weights

  monkeypatch.setattr(prefill, "sampling_weights", counted)
  slots = {}
  for total in (24_000, 60_000, 90_000):
    monkeypatch.setattr(prefill, "sampling_weights", gather)
    programs = JaxSampler().lower(
      abstract, params, num_prompts=4, prompt_tokens=6, free_bytes=total
    )
    assert [each.name for each in programs] == ["reshard", "prefill", "decode"]
    taken.clear()
    monkeypatch.setattr(prefill, "sampling_weights", counted)
    monkeypatch.setattr(
      sharding, "free_bytes", lambda mesh, total=total: total - sum(taken)
    )
    engine._slots_that_fit.cache_clear()
    rows = JaxSampler()._start(model, PROMPTS, params, 0)
    engine._slots_that_fit.cache_clear()
    assert taken
    slots[total] = programs[-1].slots, 4 * rows.num_slots
  assert all(planned == run < 256 for planned, run in slots.values()), slots
  assert len(set(slots.values())) > 1


# --- from logits to tokens ----------------------------------------------------------


def test_greedy_takes_the_most_probable_token():
  model = policy()
  rollouts = sample(model, temperature=0.0)
  rows = rows_of(rollouts)
  # A causal model does not see what follows: one width serves all lengths.
  tokens = np.zeros((24, 20), np.int32)
  for row, ((group, _), response) in zip(tokens, rows.items(), strict=True):
    whole = PROMPTS[group] + response
    row[: len(whole)] = whole
  best = np.asarray(jax.jit(lambda tokens: model.logits(tokens).argmax(-1))(tokens))
  for row, ((group, _), response) in zip(best, rows.items(), strict=True):
    first = len(PROMPTS[group]) - 1
    assert row[first : first + len(response)].tolist() == response
  assert sum(map(len, rows.values())) > 24 * 4, "the test wants long responses"
  # What is certain has log-prob 0; the policy's own is that at temperature 1.
  mask = np.asarray(rollouts.mask)
  assert not np.asarray(rollouts.sampling_logprobs).any()
  assert (np.asarray(rollouts.logprobs)[mask] < 0).all() and rollouts.temperature == 1


def test_whole_sequences_have_the_probabilities_of_exact_enumeration():
  """Chi-square over all sequences of up to 3 tokens of a vocabulary of 4."""
  config = ModelConfig(4, 8, 16, 1, 2, 1, 4, initializer_range=0.8)
  model = Policy(config, jax.random.key(1), eos_ids=(3,))
  num_samples, temperature = 20_000, 1.3
  rollouts = generate(
    model,
    [[1, 2]],
    samples_per_prompt=num_samples,
    max_new_tokens=3,
    temperature=temperature,
    seed=11,
  )
  responses, lengths = np.asarray(rollouts.tokens), np.asarray(rollouts.lengths)
  observed = {}
  for response, length in zip(responses.tolist(), lengths.tolist(), strict=True):
    sequence = tuple(response[:length])
    observed[sequence] = observed.get(sequence, 0) + 1

  sequences = [
    sequence
    for length in (1, 2, 3)
    for sequence in itertools.product(range(4), repeat=length)
    if 3 not in sequence[:-1] and (length == 3 or sequence[-1] == 3)
  ]
  padded = jnp.array([[1, 2, *s, *[0] * (3 - len(s))] for s in sequences])
  logits = jax.jit(model.logits)(padded)[:, 1:-1] / temperature
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
  kept = sample(model, top_k=1)
  greedy = sample(model, temperature=0.0)
  assert rows_of(kept) == rows_of(greedy)
  # One token is left over: certain in what was sampled from, not in the policy.
  np.testing.assert_allclose(kept.sampling_logprobs, 0.0, atol=1e-6)
  np.testing.assert_allclose(kept.logprobs, greedy.logprobs, atol=1e-6)

  # 20 batches of 24 first tokens, all of the same distribution.
  batches = [sample(model, [[6]] * 4, top_p=0.6, seed=seed) for seed in range(20)]
  sampled = np.concatenate([np.asarray(each.tokens)[:, 0] for each in batches])
  logprobs = [np.asarray(each.sampling_logprobs)[:, 0] for each in batches]
  probs = np.asarray(jax.nn.softmax(model.logits(jnp.array([[6]]))[0, -1]))
  order = np.argsort(-probs)
  size = int((np.cumsum(probs[order]) - probs[order] < 0.6).sum())
  assert set(sampled.tolist()) == set(order[:size].tolist())
  expected = np.log(probs[sampled] / probs[order[:size]].sum())
  np.testing.assert_allclose(np.concatenate(logprobs), expected, atol=1e-5)


def test_both_logprobs_are_there_where_a_filter_makes_them_differ(rollouts):
  model, unfiltered = policy(), rollouts
  rollouts = sample(model, top_p=0.7, temperature=1.3)
  mask, learner = np.asarray(rollouts.mask), response_logprobs(model, rollouts)
  np.testing.assert_allclose(rollouts.logprobs, learner, atol=1e-5)
  gain = np.asarray(rollouts.sampling_logprobs - rollouts.logprobs)[mask]
  # What is left out had a mass of 0 to 30 %: the rest is scaled up by its inverse.
  assert (gain > -1e-6).all() and (gain < -np.log(0.7) + 1e-5).all()
  assert gain.max() > 0.1
  assert rollouts.filtered and not unfiltered.filtered


@pytest.mark.parametrize("vocab_size", [320, 300], ids=["whole blocks", "padded"])
def test_tokens_of_several_blocks_have_the_probabilities(vocab_size):
  """Every third token is impossible, whole blocks among them."""
  assert 4 <= tokens._block_size(vocab_size) <= 20
  logits = np.array(1.5 * jax.random.normal(jax.random.key(0), (vocab_size,)))
  logits[::3], logits[40:80] = -np.inf, -np.inf
  num_draws = 100_000
  sampled, logprobs, _ = jax.jit(tokens.sample_token)(
    jnp.broadcast_to(jnp.array(logits), (num_draws, vocab_size)),
    jax.random.split(jax.random.key(1), num_draws),
    SamplingParams(max_new_tokens=1),
  )
  expected = np.exp(logits - logits.max()).astype(np.float64)
  expected *= num_draws / expected.sum()
  observed = np.bincount(sampled, minlength=vocab_size)
  assert not observed[expected == 0].any()
  np.testing.assert_allclose(np.exp(logprobs), expected[sampled] / num_draws, rtol=1e-4)
  likely = expected > 5
  cells = likely.sum()
  statistic = ((observed - expected) ** 2 / np.maximum(expected, 1e-9))[likely].sum()
  # A chi-square of n cells is above n + 6 sqrt(2 n) with probability below 1e-7.
  assert statistic < cells + 6 * np.sqrt(2 * cells)


def test_one_token_that_is_left_is_sampled_and_nan_logits_give_no_padding():
  logits = np.full((2, 300), -np.inf, np.float32)
  logits[0, 299], logits[1] = 0.0, np.nan
  sampled, logprobs, _ = jax.jit(tokens.sample_token)(
    jnp.array(logits),
    jax.random.split(jax.random.key(0), 2),
    SamplingParams(max_new_tokens=1),
  )
  assert sampled[0] == 299 and logprobs[0] == 0
  assert sampled[1] < 300 and np.isnan(logprobs[1])


@pytest.fixture(scope="module")
def kept():
  """On many rows: a threshold normalised apart loses a token now and then."""
  logits = 2.0 * jax.random.normal(jax.random.key(0), (2000, 200))
  program = jax.jit(tokens.filter_logits)

  def kept(**filters):
    return np.asarray(program(logits, SamplingParams(max_new_tokens=1, **filters)))

  return np.asarray(logits, np.float64), kept


def test_min_p_keeps_what_is_probable_enough_beside_the_first(kept):
  logits, kept = kept
  probs = np.exp(logits - logits.max(1, keepdims=True))
  # float32 rounds the threshold: a token that meets it to rounding may fall either way.
  near = np.abs(probs - 0.2) < 1e-6
  alone = kept(min_p=0.2)
  np.testing.assert_array_equal(alone | near, (probs >= 0.2) | near)
  # After top-k, the first is still the first: what both keep is kept.
  third = np.sort(probs, 1)[:, [-3]]
  np.testing.assert_array_equal(kept(min_p=0.2, top_k=3), alone & (probs >= third))


def test_truncation_keeps_what_a_plain_reference_keeps(kept):
  (logits, kept), wrong = kept, []
  for top_k, top_p in [(5, 0.9), (50, 0.5), (0, 0.95), (7, 1.0)]:
    ours = kept(top_k=top_k, top_p=top_p)
    descending = np.sort(logits, axis=1)[:, ::-1]
    descending[:, top_k or 200 :] = -np.inf
    probs = np.exp(descending - descending[:, :1])
    probs /= probs.sum(1, keepdims=True)
    sizes = (np.cumsum(probs, 1) - probs < top_p).sum(1)
    sizes = np.minimum(sizes, top_k or 200)
    # A cumulative sum that meets top_p to rounding may fall on either side.
    same_size = (ours.sum(1) == sizes).mean() > 0.999
    first = logits.argmax(1) == np.where(ours, logits, -np.inf).argmax(1)
    if not (same_size and first.all()):
      wrong.append((top_k, top_p))
  assert not wrong


# --- input --------------------------------------------------------------------------


def test_bad_input_is_refused():
  cases = [
    ([], {}, "no prompts"),
    ([[1], []], {}, "Prompt 1 is empty"),
    ([[1, 24]], {}, "vocabulary of 24"),
    ([[1]], {"temperature": -1.0}, "temperature=-1.0; it must be 0"),
    ([[1]], {"temperature": float("nan")}, "temperature=nan"),
    ([[1]], {"top_p": 0.0}, "top_p"),
    ([[1]], {"min_p": 1.5}, "min_p"),
    ([[1]], {"top_k": -1}, "top_k=-1; it must be 0"),
    ([[1]], {"top_k": 25}, "top_k=25; it must be 0 .* to the vocabulary's 24"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0; it must be a whole number"),
    ([[1]], {"max_new_tokens": [3, 4]}, "max_new_tokens has 2 values for 6 rows"),
    ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens=2.5; it must be a whole number"),
    ([[1]], {"seed": -1}, "seed=-1; it must be a whole number"),
    ([[1]], {"seed": [1, 2]}, "seed has 2 values for 6 rows"),
    ([[1]], {"samples_per_prompt": -1}, "samples_per_prompt=-1"),
    ([[1]], {"eos_ids": 3}, "eos_ids=3"),
    ([[1]], {"stop": [5]}, "stop contains 5"),
    ([[1]], {"stop": [[]]}, "stop contains"),
    ([[1]], {"slots": 0}, "slots=0"),
    ([[1]], {"max_new_tokens": 2**31}, r"use fewer\s+tokens \(--rollout.max-new"),
  ]
  wrong = []
  for prompts, options, message in cases:
    try:
      sample(policy(), prompts, **options)
      wrong.append((prompts, options, "accepted"))
    except ValueError as error:
      if not re.search(message, str(error)):
        wrong.append((prompts, options, str(error)))
  assert not wrong


def test_sampling_params_are_values():
  """Equal descriptions are equal, hash alike, and are one program."""
  one = SamplingParams(max_new_tokens=np.int64(8), temperature=1, stop=[[1, 2]])
  two = SamplingParams(max_new_tokens=8, temperature=1.0, stop=((1, 2),))
  assert one == two and hash(one) == hash(two)
  assert jax.tree.structure(one) == jax.tree.structure(two)
  assert jax.tree.map(lambda leaf: leaf, one) == two
  kinds = [dict(temperature=0.0), dict(top_k=2), dict(top_p=0.5), dict(min_p=0.1), {}]
  found = [
    (params.is_greedy, params.is_filtered, params.is_policy)
    for params in (SamplingParams(max_new_tokens=1, **kind) for kind in kinds)
  ]
  filtered = (False, True, False)
  assert found == [(True, False, False), *[filtered] * 3, (False, False, True)]


# --- compiled code. Last, since reading it drops all compiled programs -------------


def decode_program(rows):
  """The decode loop that a batch would run, compiled."""
  program = decoding.decode.lower(
    rows.slots,
    rows.responses,
    rows.policy,
    rows.prompts,
    rows.queue,
    rows.params,
    jnp.int32(1),
    rows.in_groups,
  )
  return program.compile()


@pytest.mark.parametrize("slots", [16, 24], ids=["refill", "in groups"])
def test_keys_and_values_are_written_in_place(slots):
  """A copy of the ring would be 1 to 2 times its size; one layer's is an eighth."""
  rows = started(policy(num_layers=8), slots=slots)
  assert rows.in_groups == (slots == 24)
  memory, ring = decode_program(rows).memory_analysis(), 2 * rows.slots.keys.nbytes
  assert memory.alias_size_in_bytes > ring, "donated, and returned"
  assert memory.temp_size_in_bytes < ring / 3


@pytest.mark.usefixtures("no_compilation_cache")
def test_gathered_weights_change_no_rollout_and_save_the_gathering_of_every_token():
  model, rows, sizes = policy((1, 4, 2)), {}, {}
  for gathered in (True, False):
    each = started(model, slots=8, gather_weights=gathered)
    text = decode_program(each).as_text()
    sizes[gathered] = hlo.traffic(text, dict(model.mesh.shape)).collective_bytes
    while each.decode():
      pass
    rows[gathered] = rows_of(each.rollouts(0))
  assert rows[True] == rows[False]
  assert 10 * sum(sizes[True].values()) < sum(sizes[False].values())
  # Over fsdp, whole weights leave the counting of busy slots, a few numbers.
  once = sizes[True].items()
  assert sum(size for axes, size in once if "fsdp" in axes) < 400


@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize("slots", [16, 24], ids=["refill", "in groups"])
def test_devices_exchange_no_keys_and_no_rollouts(slots):
  """Only scalars: the busy slots, the longest response, whether rows are left."""
  rows = started(policy((4, 1, 1)), slots=slots)
  assert rows.in_groups == (slots == 24)
  exchanged = re.findall(
    r"= (\S+) (?:all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\(",
    decode_program(rows).as_text(),
  )
  assert {"pred[]"} <= set(exchanged) <= {"pred[]", "s32[]"}

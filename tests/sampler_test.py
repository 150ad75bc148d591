"""Sampling: exact, independent of its schedule, and the same as the learner sees."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opo_jax import sharding
from opo_jax.models import ModelConfig, Policy
from opo_jax.sampler import _Distribution, _kept, bucket, generate
from opo_jax.trainer import response_logprobs

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


def test_rollouts_do_not_depend_on_slots():
  together = rows_of(sample(policy()))
  for slots in (1, 6, 13):
    assert rows_of(sample(policy(), slots=slots)) == together


def test_a_rollout_does_not_depend_on_the_other_samples():
  many, few = rows_of(sample(policy())), rows_of(sample(policy(), samples_per_prompt=2))
  assert few == {key: many[key] for key in few}


def test_a_rollout_does_not_depend_on_the_prompts_after_it():
  every, first = rows_of(sample(policy())), rows_of(sample(policy(), PROMPTS[:2]))
  assert first == {key: every[key] for key in first}


def test_rollouts_do_not_depend_on_the_mesh():
  alone = rows_of(sample(policy()))
  for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
    assert rows_of(sample(policy(mesh=sharding.make_mesh(*sizes)))) == alone


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


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 0.9), (50, 0.5), (0, 0.95), (7, 1.0)])
def test_truncation_keeps_what_a_plain_reference_keeps(top_k, top_p):
  """On many rows: a threshold normalised apart loses a token now and then."""
  logits = 2.0 * jax.random.normal(jax.random.key(0), (2000, 200))
  filters = _Distribution(1.0, jnp.int32(top_k), jnp.float32(top_p), 0.0)
  kept = np.asarray(_kept(logits, filters))
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
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
  ],
)
def test_bad_input_is_refused(prompts, options, message):
  with pytest.raises(ValueError, match=message):
    sample(policy(), prompts, **options)

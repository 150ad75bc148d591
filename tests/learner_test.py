"""The update: the exact on-policy gradient, however it is split or laid out."""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opo_jax import build, config, learner
from opo_jax.devices import sharding
from opo_jax.learner import OBJECTIVES, Algorithm, PolicyGradientLearner, forward
from opo_jax.learner.optimizer import adamw, learning_rate_schedule, sft_schedule
from opo_jax.models import ModelConfig, Policy
from opo_jax.rollouts import Rollouts, rows

CONFIG = ModelConfig(
  vocab_size=32,
  width=16,
  mlp_width=48,
  num_layers=2,
  num_heads=8,
  num_kv_heads=2,
  head_dim=4,
  initializer_range=0.3,
)
# The end token is the most frequent one too, so that lengths differ a lot.
EOS = (0, 1, 2)
OPO = Algorithm()
OFF_POLICY = dataclasses.replace(OPO, require_on_policy=False)
# Every rollout in a row of its own behind its own prompt, with a gradient or not.
PLAIN = dict(share_prompts=False, prune=False, pack=False)


# --- what is updated -----------------------------------------------------------------


@functools.cache
def transformer(mesh=None):
  def fresh(key):
    return Policy(CONFIG, key, eos_ids=EOS, mesh=mesh)

  key = jax.random.key(2)
  layout = mesh and sharding.tree_shardings(jax.eval_shape(fresh, key), mesh)
  return jax.jit(fresh, out_shardings=layout)(key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bigram:
  """A policy of two tables, quick to compile: the hidden state of a token knows the
  token and its position, as a transformer's first layer does."""

  embedding: jax.Array  # [V, D]
  position: jax.Array  # [P + T, D]
  mesh = None

  @property
  def unembedding(self):
    return self.embedding

  def hidden(self, tokens, positions, segment_ids, *, cache=(), remat="none"):
    keys = jnp.zeros((1, len(tokens), 1, tokens.shape[1], 1))
    return self.embedding[tokens] + self.position[positions], (keys, keys)


@functools.cache
def bigram(dtype=jnp.float32):
  tables = [jax.random.normal(jax.random.key(i), (32, 8)) for i in (0, 1)]
  return Bigram(*(0.4 * table.astype(dtype) for table in tables))


@functools.cache
def batch():
  """8 prompts x 4 responses of uneven lengths with the log-probs of the transformer,
  computed one response a row, and rewards; group 1 has equal ones."""
  rng, G, N, T = np.random.default_rng(7), 8, 32, 10
  lengths = np.minimum(rng.geometric(0.25, N), T)
  lengths[[5, 9, 20, 21]] = 1  # nothing but the end token
  finished = (rng.random(N) < 0.8) | (lengths == 1)
  tokens = rng.integers(3, 32, (N, T))
  tokens[finished, lengths[finished] - 1] = rng.choice(EOS, finished.sum())
  mask = np.arange(T) < lengths[:, None]
  prompts = np.zeros((G, G), int)
  for i in range(G):
    prompts[i, G - i - 1 :] = 3 + np.arange(i + 1)  # 3, 3 4, 3 4 5, ...
  nothing = jnp.zeros((N, T), jnp.float32)
  rollouts = Rollouts(
    prompts=jnp.asarray(prompts, jnp.int32),
    prompt_lengths=jnp.arange(1, G + 1, dtype=jnp.int32),
    tokens=jnp.asarray(np.where(mask, tokens, 0), jnp.int32),
    logprobs=nothing,
    sampling_logprobs=nothing,
    mask=jnp.asarray(mask),
    lengths=jnp.asarray(lengths, jnp.int32),
    prompt_ids=jnp.asarray(np.repeat(np.arange(G), 4), jnp.int32),
    finished=jnp.asarray(finished),
    temperature=jnp.float32(1.3),
    version=jnp.int32(0),
  )
  rewards = (rng.random(N) < 0.4).astype(np.float32)
  rewards[4:8] = 1.0
  logprobs = learner.response_logprobs(transformer(), rollouts)
  return with_logprobs(rollouts, logprobs), rewards


def with_logprobs(rollouts, logprobs):
  return dataclasses.replace(rollouts, logprobs=logprobs, sampling_logprobs=logprobs)


@functools.cache
def bigram_rollouts(error=0.0):
  """The same tokens with the log-probs of Bigram, too low by `error`."""
  rollouts, _ = batch()
  logprobs = learner.response_logprobs(bigram(), rollouts)
  return with_logprobs(rollouts, jnp.where(rollouts.mask, logprobs - error, 0.0))


# --- updates -------------------------------------------------------------------------


def _keep_gradient():
  """An optimiser that changes nothing and keeps the gradient as its state."""

  def update(gradient, state, policy):
    del state
    return jax.tree.map(jnp.zeros_like, policy), gradient

  return optax.GradientTransformation(
    lambda policy: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), policy),
    update,
  )


KEEP_GRADIENT = _keep_gradient()
# A step of plain SGD is the gradient; Adam's first step would hide its scale.
SGD = optax.sgd(1.0)


class Measured(NamedTuple):
  gradient: np.ndarray
  metrics: dict
  advantages: np.ndarray


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@functools.cache
def keeper(algorithm, policy_type, mesh):
  """One for all tests of an algorithm: the same shapes are not compiled again."""
  del policy_type, mesh  # the layout of the first state is that of every later one
  return PolicyGradientLearner(algorithm, KEEP_GRADIENT)


def step(algorithm=OPO, policy=None, rollouts=None, rewards=None) -> Measured:
  """One update of the transformer on its rollouts, or as the arguments say."""
  policy = transformer() if policy is None else policy
  rollouts = batch()[0] if rollouts is None else rollouts
  rewards = batch()[1] if rewards is None else rewards
  one = keeper(
    algorithm, (type(policy), jnp.result_type(policy.embedding)), policy.mesh
  )
  state, measured = one.update(one.init(policy), rollouts, rewards)
  assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} == {
    jnp.float32.dtype
  }
  metrics = {name: float(value) for name, value in measured.scalars.items()}
  return Measured(flat(state.opt_state), metrics, np.asarray(measured.advantages))


def bigram_step(algorithm=OPO, rollouts=None, rewards=None, policy=None) -> Measured:
  """One update of Bigram on rollouts with its own log-probs, or others."""
  rollouts = bigram_rollouts() if rollouts is None else rollouts
  return step(algorithm, policy or bigram(), rollouts, rewards)


def moved(algorithm, optimizer=SGD):
  """What one update changes of Bigram's parameters, and the metrics."""
  one = PolicyGradientLearner(algorithm, optimizer)
  state, measured = one.update(one.init(bigram()), bigram_rollouts(), batch()[1])
  metrics = {name: float(value) for name, value in measured.scalars.items()}
  return flat(bigram()) - flat(state.policy), metrics


def assert_same(a, b, tolerance=5e-6):
  """Equal to float32 rounding of another order of summation."""
  assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.fixture(scope="module")
def reference():
  return step()


@pytest.fixture(scope="module")
def bigram_reference():
  return bigram_step()


# --- the gradient --------------------------------------------------------------------


def test_the_gradient_is_that_of_opo_written_out(reference):
  """Row by row, left-aligned: -1/tokens sum_i (r_i - b_i) grad log pi(y_i)."""
  rollouts, rewards = batch()
  lengths, groups = np.asarray(rollouts.lengths), np.asarray(rollouts.prompt_ids)
  tokens, starts = np.zeros((32, 20), np.int32), np.zeros(32, np.int32)
  advantages = np.zeros(32, np.float32)
  for row in range(32):
    prompt = list(range(3, 4 + groups[row]))
    response = np.asarray(rollouts.tokens)[row, : lengths[row]].tolist()
    tokens[row, : len(prompt) + len(response)] = prompt + response
    starts[row] = len(prompt)
    same = groups == groups[row]
    baseline = (lengths * rewards)[same].sum() / lengths[same].sum()
    advantages[row] = rewards[row] - baseline

  @jax.jit
  def gradient(policy):
    def loss(policy):
      logprobs = jax.nn.log_softmax(policy.logits(jnp.asarray(tokens)) / 1.3)
      chosen = jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], 2)[..., 0]
      position, start = jnp.arange(1, 20), starts[:, None]
      response = (position >= start) & (position < start + lengths[:, None])
      per_row = jnp.where(response, chosen, 0.0).sum(1)
      return -(advantages * per_row).sum() / lengths.sum()

    return jax.grad(loss)(policy)

  assert_same(reference.gradient, flat(gradient(transformer())), 2e-5)


# Each aggregation and each objective, paired.
PAIRS = [
  ("token_mean", "policy_gradient"),
  ("sequence_mean_token_sum", "ppo_clip"),
  ("sequence_mean_token_mean", "gspo"),
  ("constant", "cispo"),
  ("sequence_mean_token_mean", "tis"),
]


@pytest.mark.parametrize(("aggregation", "objective"), PAIRS)
def test_packed_and_pruned_equals_plain_for_every_loss(aggregation, objective):
  """Segments taken for one response would change gspo's ratio and the means of
  responses; a denominator of what is left would make the gradient 1.2 times as long."""
  plain = Algorithm(
    objective=objective,
    aggregation=aggregation,
    normalizer=77.0 if aggregation == "constant" else None,
    **PLAIN,
  )
  rollouts, _ = batch()
  noise = 0.3 * jax.random.normal(jax.random.key(5), rollouts.tokens.shape)
  rollouts = with_logprobs(rollouts, jnp.where(rollouts.mask, noise - 3.0, 0.0))
  expected = bigram_step(plain, rollouts)
  for share_prompts in (True, False):
    changes = dict(share_prompts=share_prompts, prune=True, pack=True)
    packed = dataclasses.replace(plain, micro_batch_tokens=150, **changes)
    found = bigram_step(packed, rollouts)
    assert_same(found.gradient, expected.gradient)
    assert found.metrics["update/skipped_rollouts_fraction"] >= 4 / 32
    assert found.metrics["update/tokens"] < 0.7 * expected.metrics["update/tokens"]
    for name in ("loss", "grad_norm", "baseline/opo_minus_mean"):
      same = pytest.approx(expected.metrics[name], rel=1e-5, abs=1e-6)
      assert found.metrics[name] == same, name


def test_gradients_add_up_in_float32_whatever_the_parameters_are():
  """In bfloat16, a sum of 28 parts would be off by a hundredth; here each part is
  rounded once, as the whole is."""
  one, many = (
    bigram_step(
      dataclasses.replace(OPO, **PLAIN | dict(prune=True), micro_batch_tokens=n),
      policy=bigram(jnp.bfloat16),
    ).gradient
    for n in (0, 1)
  )
  error = np.linalg.norm(many - one) / np.linalg.norm(one)
  assert 0 < error < 6e-3


@pytest.mark.parametrize(
  "changes",
  [
    PLAIN,
    dict(share_prompts=False),
    dict(micro_batch_tokens=170),  # 2 parts
    dict(micro_batch_tokens=90, share_prompts=False),  # 3
  ],
  ids=str,
)
def test_gradient_does_not_depend_on_the_layout(changes, reference):
  """A response that saw its neighbour in the row, or another group's prompt, would
  change its own log-probs; a part that divided by its own tokens, the scale."""
  found = step(dataclasses.replace(OPO, **changes))
  assert_same(found.gradient, reference.gradient, 1e-5)
  for name, value in reference.metrics.items():
    if not name.startswith("update/") and (changes != PLAIN or "entropy" not in name):
      # The gap to the sampler is rounding itself, some 3e-6.
      assert found.metrics[name] == pytest.approx(value, rel=1e-5, abs=5e-6), name


# The last splits 2 heads of keys in 8.
MESHES = [
  (2, 2, 2),
  (1, 1, 8),
  pytest.param((8, 1, 1), marks=pytest.mark.slow),
  pytest.param((1, 8, 1), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_gradient_does_not_depend_on_the_mesh(sizes, reference):
  found = step(policy=transformer(sharding.make_mesh(*sizes)))
  assert_same(found.gradient, reference.gradient, 1e-5)
  for name, value in reference.metrics.items():
    if name in ("update/tokens", "update/packing_efficiency"):
      continue  # rows are filled up to the devices
    # The gap to the sampler is rounding itself, some 3e-6.
    assert found.metrics[name] == pytest.approx(value, rel=1e-4, abs=5e-6), name


def test_padding_never_changes_the_gradient(reference):
  """Other tokens behind the end and before the prompt, more columns of both."""
  rollouts, _ = batch()
  padded = dataclasses.replace(
    rollouts,
    prompts=jnp.pad(rollouts.prompts, ((0, 0), (5, 0)), constant_values=9),
    tokens=jnp.pad(
      jnp.where(rollouts.mask, rollouts.tokens, 17), ((0, 0), (0, 3)), constant_values=1
    ),
    logprobs=jnp.pad(rollouts.logprobs, ((0, 0), (0, 3)), constant_values=-3.0),
    sampling_logprobs=jnp.pad(rollouts.sampling_logprobs, ((0, 0), (0, 3))),
    mask=jnp.pad(rollouts.mask, ((0, 0), (0, 3))),
  )
  assert_same(step(rollouts=padded).gradient, reference.gradient, 1e-5)


def test_two_updates_of_packed_groups_equal_two_of_plain_rows():
  """Each takes half of the groups, its own denominator, and the policy before it."""
  twice = dataclasses.replace(OFF_POLICY, objective="cispo", updates_per_batch=2)
  packed, _ = moved(twice)
  plain, _ = moved(dataclasses.replace(twice, **PLAIN))
  assert_same(packed, plain, 1e-4)  # the second starts from the first's rounding
  once, _ = moved(dataclasses.replace(twice, updates_per_batch=1))
  assert np.abs(packed - once).max() > 1e-2 * np.abs(once).max()


# --- objectives and their options ----------------------------------------------------


def test_onpolicy_gap_and_clip_fraction_are_zero(reference):
  metrics = reference.metrics
  assert metrics["onpolicy/logprob_diff_max"] < 1e-5
  assert metrics["onpolicy/clip_fraction"] == 0
  assert abs(metrics["onpolicy/kl"]) < 1e-8


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"policy_gradient"}))
def test_every_objective_has_the_same_gradient_on_policy(name, bigram_reference):
  found = bigram_step(dataclasses.replace(OPO, objective=name))
  assert_same(found.gradient, bigram_reference.gradient, 1e-5)
  assert found.metrics["onpolicy/clip_fraction"] == 0


def test_tis_weighs_by_how_much_likelier_the_learner_finds_a_token(bigram_reference):
  """A sampler that reports each log-prob 0.2 too low: exp(0.2) = 1.22, or the cap."""
  capped = dataclasses.replace(OPO, objective="tis", tis_cap=1.1)
  found = bigram_step(capped, bigram_rollouts(error=0.2))
  assert_same(found.gradient, 1.1 * bigram_reference.gradient, 1e-5)
  assert (
    found.metrics["onpolicy/clip_fraction"] > 0.1
  )  # 1.22 is outside of PPO's bounds


def test_clip_fraction_counts_by_the_configured_bounds():
  """Ratios of exp(0.2) = 1.22 are outside of 0.2 and inside of 0.28."""
  default, wider = (
    bigram_step(
      Algorithm(objective="ppo_clip", clip_high=high), bigram_rollouts(error=0.2)
    ).metrics["onpolicy/clip_fraction"]
    for high in (None, 0.28)
  )
  assert default > 0.1 and wider == 0


def test_several_updates_leave_the_policy_and_are_clipped():
  """Off-policy: after a first large step, ratios move and PPO's clip acts."""
  _, metrics = moved(
    dataclasses.replace(
      OFF_POLICY, estimator="grpo", objective="ppo_clip", updates_per_batch=4
    ),
    optax.sgd(30.0),
  )
  assert metrics["onpolicy/logprob_diff_max"] > 1e-2
  assert metrics["onpolicy/clip_fraction"] > 0


def test_constant_aggregation_divides_by_rows_times_longest_response(bigram_reference):
  """32 rows x 10 tokens, in micro-batches, where token_mean divides by tokens."""
  run = config.Config(
    algorithm=config.Algorithm(aggregation="constant", micro_batch_tokens=40),
    rollout=config.Rollout(prompts_per_step=8, group_size=4, max_new_tokens=10),
  )
  algorithm = build.algorithm(run)
  assert algorithm.normalizer == 320
  tokens = float(batch()[0].mask.sum())
  assert tokens < 300
  expected = bigram_reference.gradient * tokens / 320
  assert_same(bigram_step(algorithm).gradient, expected)
  # Two updates share the rows, and each has its own denominator.
  halves = dataclasses.replace(run.algorithm, loss="cispo", updates_per_batch=2)
  run = dataclasses.replace(run, algorithm=halves)
  assert build.algorithm(run).normalizer == 160


def test_an_objective_takes_its_own_options_and_those_that_are_set():
  every = dict(clip_low=0.5, clip_high=0.28, tis_cap=3.0)
  cases = [
    ("gspo", {}, {}),
    ("ppo_clip", dict(clip_high=0.28), dict(clip_high=0.28)),
    ("cispo", every, dict(clip_low=0.5, clip_high=0.28)),
    ("tis", every, dict(tis_cap=3.0)),
    ("policy_gradient", every, {}),
  ]
  found = [
    build.algorithm(
      config.Config(algorithm=config.Algorithm(loss=name, **options))
    ).objective_options
    for name, options, _ in cases
  ]
  assert found == [expected for *_, expected in cases]


def test_unknown_names_are_refused_with_the_near_ones():
  with pytest.raises(ValueError, match=r"'gspoo'; did you mean gspo\?.*algorithm.loss"):
    Algorithm(objective="gspoo")
  with pytest.raises(ValueError, match=r"'opo_lo'; .*opo.*--algorithm.advantage"):
    Algorithm(estimator="opo_lo")


# --- which rollouts count ------------------------------------------------------------


def test_a_nan_reward_leaves_baseline_loss_and_normaliser():
  """A NaN reward among the rows gives what the batch without these rows gives."""
  rollouts, rewards = bigram_rollouts(), batch()[1]
  valid = np.ones(32, bool)
  valid[[0, 9, 10, 28, 29, 30, 31]] = False  # parts of groups, and a whole one
  found = bigram_step(rewards=np.where(valid, rewards, np.nan))
  assert np.isfinite(found.gradient).all() and not found.advantages[~valid].any()
  assert all(np.isfinite(value) for value in found.metrics.values())

  masked = dataclasses.replace(
    rollouts, mask=rollouts.mask & valid[:, None], lengths=rollouts.lengths * valid
  )
  assert_same(bigram_step(rollouts=masked).gradient, found.gradient)
  per_row = ("tokens", "logprobs", "sampling_logprobs", "mask", "lengths")
  per_row += ("prompt_ids", "finished")
  kept = {name: getattr(masked, name)[np.flatnonzero(valid)] for name in per_row}
  without = dataclasses.replace(masked, **kept)
  assert_same(
    bigram_step(rollouts=without, rewards=rewards[valid]).gradient, found.gradient, 1e-5
  )


def test_groups_of_equal_rewards_contribute_nothing(bigram_reference):
  assert not bigram_reference.advantages[4:8].any()
  other = batch()[1].copy()
  other[4:8] = 0.0  # all wrong instead of all right
  assert_same(bigram_step(rewards=other).gradient, bigram_reference.gradient)


def test_length_weighted_advantages_sum_to_zero_in_every_group(bigram_reference):
  name = "advantages/length_weighted_mean_max"
  assert bigram_reference.metrics[name] < 1e-6
  assert bigram_step(Algorithm(estimator="mean")).metrics[name] > 1e-3


def test_the_end_token_gets_a_gradient():
  """Responses that are nothing but the end token, all of reward 1: it gets likelier."""
  rollouts = bigram_rollouts()
  alone = np.asarray((rollouts.lengths == 1) & rollouts.finished)
  assert alone.any()
  likelihood = Algorithm(estimator="reinforce")
  gradient = bigram_step(likelihood, rewards=np.where(alone, 1.0, np.nan)).gradient
  tables = Bigram(*(table.reshape(32, 8) for table in np.split(gradient, 2)))
  better = jax.tree.map(lambda table, slope: table - 0.1 * slope, bigram(), tables)
  before, after = (
    np.asarray(learner.response_logprobs(policy, rollouts))[alone, 0].mean()
    for policy in (bigram(), better)
  )
  # A step of 0.1 against the gradient of a mean: 0.1 |gradient|^2, to first order.
  assert after - before == pytest.approx(0.1 * (gradient**2).sum(), rel=0.2)
  assert after > before + 1e-3


def test_entropy_of_what_is_left_out_is_what_the_sampler_recorded(reference):
  rollouts, _ = batch()
  stats = jax.jit(learner.token_stats)(
    transformer(), rows(rollouts), rollouts.tokens, 1.3
  )
  kept = reference.advantages[:, None] != 0
  mask = np.asarray(rollouts.mask)
  expected = np.where(kept, stats.entropy, -rollouts.logprobs)[mask].mean()
  assert reference.metrics["policy/entropy"] == pytest.approx(expected, rel=1e-5)
  assert abs(np.asarray(stats.entropy)[mask].mean() - expected) > 1e-3


def test_a_step_without_signal_moves_as_an_unpruned_one_and_measures_the_gap():
  """All rewards equal: the policy still moves by the momentum, which decays."""
  momentum, rollouts = optax.sgd(0.1, momentum=0.9), bigram_rollouts(error=1e-3)

  def two_steps(**changes):
    algorithm = dataclasses.replace(OFF_POLICY, **changes)
    one = PolicyGradientLearner(algorithm, momentum)
    state, _ = one.update(one.init(bigram()), rollouts, batch()[1])
    before = flat(state.policy)
    state, measured = one.update(state, rollouts, np.ones(32))
    return flat(state.policy) - before, measured.scalars

  (pruned, metrics), (plain, _) = two_steps(), two_steps(prune=False)
  np.testing.assert_allclose(pruned, plain, atol=1e-6)
  assert np.abs(pruned).max() > 1e-4
  assert metrics["grad_norm"] == 0 and metrics["loss"] == 0
  assert metrics["update/skipped_rollouts_fraction"] == 1
  assert metrics["update/packing_efficiency"] == 0
  assert metrics["onpolicy/logprob_diff_max"] > 1e-4  # of the one that was computed
  assert metrics["update/tokens"] < 100


def test_what_was_not_measured_is_absent():
  _, metrics, _ = bigram_step(rewards=np.full(32, np.nan))
  assert not any(name.startswith("onpolicy/") for name in metrics)
  assert metrics["update/tokens"] == 0 and metrics["grad_norm"] == 0


def test_rollouts_of_another_version_are_refused():
  old = dataclasses.replace(bigram_rollouts(), version=jnp.int32(5))
  with pytest.raises(ValueError, match="version 5 were given to version 0"):
    bigram_step(rollouts=old)
  bigram_step(OFF_POLICY, rollouts=old)


def test_filtered_rollouts_are_refused_on_policy():
  filtered = dataclasses.replace(bigram_rollouts(), filtered=True)
  with pytest.raises(ValueError, match="top-k, top-p or min-p"):
    bigram_step(rollouts=filtered)


def test_prompts_that_do_not_split_are_refused():
  with pytest.raises(ValueError, match="8 prompts do not split into 5"):
    bigram_step(dataclasses.replace(OFF_POLICY, updates_per_batch=5))


# --- the state and the compiled program ----------------------------------------------


def test_the_state_is_donated_and_the_policy_stays_the_callers():
  one = keeper(OPO, (Bigram, jnp.float32.dtype), None)
  state = one.init(bigram())
  one.update(state, bigram_rollouts(), batch()[1])
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.policy))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(bigram()))


def test_the_abstract_state_is_the_state_without_its_values():
  mesh = sharding.make_mesh(2, 2, 2)
  one = PolicyGradientLearner(OPO, optax.adam(1e-3))
  shapes = jax.eval_shape(lambda policy: policy, transformer(mesh))
  found = jax.tree.leaves(one.abstract_state(shapes))
  for leaf, expected in zip(
    found, jax.tree.leaves(one.init(transformer(mesh))), strict=True
  ):
    assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
    assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def lowered(algorithm=OPO, *, vocab_size=32, samples=4, prompt=16, response=16):
  """State and lowered update of a model that is not there, 8 prompts x samples."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def spec(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

  model = dataclasses.replace(CONFIG, vocab_size=vocab_size)
  one = PolicyGradientLearner(algorithm, SGD)
  state = jax.eval_shape(
    lambda key: one.init(Policy(model, key, eos_ids=EOS)), jax.random.key(0)
  )
  state = jax.tree.map(lambda leaf: spec(leaf.shape, leaf.dtype), state)
  N, G = 8 * samples, 8
  rollouts = Rollouts(
    prompts=spec((G, prompt)),
    prompt_lengths=spec((G,)),
    tokens=spec((N, response)),
    logprobs=spec((N, response), jnp.float32),
    sampling_logprobs=spec((N, response), jnp.float32),
    mask=spec((N, response), bool),
    lengths=spec((N,)),
    prompt_ids=spec((N,)),
    finished=spec((N,), bool),
    temperature=spec((), jnp.float32),
    version=spec(()),
  )
  return state, one.lower(state, rollouts).traced.lower()


@pytest.mark.usefixtures("no_compilation_cache")
def test_the_compiled_update_has_no_logits_and_takes_the_memory_of_the_old_state():
  """At 151,936 words 4,096 tokens would be 2.3 GiB of logits. No array has tokens x
  words numbers, and all of the donated state is used again."""
  state, program = lowered(vocab_size=151_936, samples=16, response=32)
  compiled = program.compile()
  shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", compiled.as_text())
  sizes = {math.prod(map(int, shape.split(","))) for shape in shapes}
  assert 151_936 * CONFIG.width in sizes
  # A block of logits has 2^25.
  assert max(sizes) <= 2**25 + 2**20 < 4096 * 151_936 / 10
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  assert compiled.memory_analysis().alias_size_in_bytes == size


def test_only_response_tokens_reach_the_unembedding(monkeypatch):
  """Behind 112 prompt tokens, 16 of 128 columns; both layouts."""
  seen = []

  def spy(hidden, *args, **options):
    seen.append(hidden.shape[:-1])
    return linear_logprobs(hidden, *args, **options)

  linear_logprobs = forward.linear_logprobs
  monkeypatch.setattr(forward, "linear_logprobs", spy)
  for share_prompts in (True, False):
    lowered(dataclasses.replace(OPO, share_prompts=share_prompts), prompt=112)
  assert seen == [(32, 16), (32, 16)]


def test_memory_compiles_the_program_that_the_update_runs():
  one = PolicyGradientLearner(OPO, SGD)
  state = one.init(bigram())
  batch_ = bigram_rollouts(), batch()[1]
  memory = one.memory(state, *batch_)
  assert memory.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(state))

  compiled = []

  def listen(event, *_, **__):
    compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    one.update(state, *batch_)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert not [event for event in compiled if "backend_compile" in event]


# --- the KL to the start -------------------------------------------------------------


def test_kl_to_start_is_zero_at_the_start_and_positive_after():
  rollouts, indices = bigram_rollouts(), jnp.arange(0, 32, 2)
  assert abs(float(learner.kl_to_start(bigram(), rollouts, indices))) < 1e-6
  other = jax.tree.map(lambda x: 1.3 * x, bigram())
  assert float(learner.kl_to_start(other, rollouts, indices)) > 0.01


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_kl_to_start_is_the_same_in_parts_and_takes_less_memory(sizes):
  rollouts, _ = batch()
  mesh = sharding.make_mesh(*sizes, jax.devices()[: math.prod(sizes)])
  other = jax.jit(lambda policy: jax.tree.map(lambda x: 1.3 * x, policy))(
    transformer(mesh)
  )
  length = rollouts.prompts.shape[1] + rollouts.tokens.shape[1]
  found, temporaries = [], []
  # Of 24 rows: all at once, 12 (16 are no equal parts), one a shard.
  for tokens in (0, 16 * length, 1):
    program = learner.kl_to_start.lower(
      other, rollouts, jnp.arange(24), micro_batch_tokens=tokens
    ).compile()
    found.append(float(program(other, rollouts, jnp.arange(24))))
    temporaries.append(program.memory_analysis().temp_size_in_bytes)
  np.testing.assert_allclose(found, found[0], rtol=1e-5)
  assert found[0] > 0.01
  assert temporaries[2] < temporaries[1] < temporaries[0]


# --- the optimiser -------------------------------------------------------------------


def test_learning_rates_rise_to_the_peak_and_fall_to_zero_at_the_last_step():
  cases = {
    ("constant", 0): [8, 8, 8, 8, 8],
    ("linear", 0): [8, 6, 4, 2, 0],
    # Not 0 at the first step, which would be lost: 1/4, 2/4, 3/4 of the peak.
    ("constant", 3): [2, 4, 6, 8, 8],
    ("cosine", 2): [8 / 3, 16 / 3, 8, 4, 0],
  }
  found = {}
  for name, warmup in cases:
    rate = learning_rate_schedule(name, 8.0, warmup_steps=warmup, total_steps=4)
    found[name, warmup] = [round(float(rate(step)), 5) for step in range(5)]
  assert found == {
    key: [round(float(value), 5) for value in values] for key, values in cases.items()
  }
  rate = sft_schedule(1.0, 20)  # a tenth of 20 steps up, a cosine down
  assert [round(float(rate(step)), 5) for step in (0, 1, 2, 11, 20)] == [
    0, 0.5, 1, 0.5, 0,
  ]  # fmt: skip


def test_adamw_computes_in_float32_whatever_the_parameters_are():
  """Two steps, the gradient above the bound of the norm, decay; by hand in NumPy."""
  options = dict(b1=0.9, b2=0.95, epsilon=1e-3, weight_decay=0.1, max_grad_norm=0.5)
  optimizer = adamw(optax.constant_schedule(0.1), **options)
  parameters = jnp.array([1.0, -2.0], jnp.bfloat16)
  state, moments = optimizer.init(parameters), np.zeros((2, 2))
  for t in (1, 2):
    gradient = jnp.array([3.0, 4.0], jnp.bfloat16) * t
    change, state = optimizer.update(gradient, state, parameters)
    clipped = np.array([0.3, 0.4])  # of norm 0.5
    moments[0] = 0.9 * moments[0] + 0.1 * clipped
    moments[1] = 0.95 * moments[1] + 0.05 * clipped**2
    first, second = moments[0] / (1 - 0.9**t), moments[1] / (1 - 0.95**t)
    expected = -0.1 * (first / (np.sqrt(second) + 1e-3) + 0.1 * np.array([1.0, -2.0]))
    assert change.dtype == jnp.float32
    np.testing.assert_allclose(change, expected, rtol=1e-5)

"""The update: the exact on-policy gradient, however it is split or laid out."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opo_jax import build, config, losses
from opo_jax import learner as trainer
from opo_jax.advantages import ESTIMATORS
from opo_jax.devices import sharding
from opo_jax.models import ModelConfig, Policy
from opo_jax.rollouts import Rollouts
from opo_jax.sampler.engine import generate

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
OPO = trainer.Algorithm(ESTIMATORS["opo"], trainer.OBJECTIVES["policy_gradient"])
# A step of plain SGD is the gradient; Adam's first step would hide its scale.
SGD = optax.sgd(1.0)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  """Half of the file's time; which arrays a program has does not depend on it."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def make(mesh=None, optimizer=SGD):
  def fresh(key):
    policy = Policy(CONFIG, key, eos_ids=EOS, mesh=mesh)
    return trainer.TrainState(policy, optimizer.init(policy), jnp.int32(0))

  key = jax.random.key(2)
  if mesh is None:
    return jax.jit(fresh)(key)
  layout = sharding.tree_shardings(jax.eval_shape(fresh, key), mesh)
  return jax.jit(fresh, out_shardings=layout)(key)


def with_logprobs(rollouts, logprobs):
  return dataclasses.replace(rollouts, logprobs=logprobs, sampling_logprobs=logprobs)


@functools.cache
def batch():
  """8 prompts x 4 responses, uneven lengths; a group of equal rewards among them."""
  prompts = [list(range(3, 4 + i)) for i in range(8)]
  rollouts = generate(
    make().policy,
    prompts,
    samples_per_prompt=4,
    max_new_tokens=10,
    temperature=1.3,
    seed=7,
    version=0,
  )
  rewards = np.array(jax.random.bernoulli(jax.random.key(0), 0.4, (32,)), np.float32)
  rewards[4:8] = 1.0
  return rollouts, rewards


def step(algorithm=OPO, mesh=None, rollouts=None, rewards=None, valid=None):
  """(gradient, metrics, advantages) of one update."""
  default_rollouts, default_rewards = batch()
  rollouts = default_rollouts if rollouts is None else rollouts
  rewards = default_rewards if rewards is None else rewards
  valid = np.ones(len(rewards), bool) if valid is None else valid
  state = make(mesh)
  before = jax.tree.map(np.asarray, state.policy)
  state, metrics, advantages = trainer.Update(algorithm, SGD)(
    state, rollouts, jnp.asarray(rewards), jnp.asarray(valid)
  )
  gradient = jax.tree.map(lambda a, b: np.asarray(a) - b, before, state.policy)
  flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
  metrics = {name: float(value) for name, value in metrics.items()}
  return flat, metrics, np.asarray(advantages)


def assert_same(a, b, tolerance=5e-6):
  """Equal to float32 rounding of another order of summation."""
  assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.fixture(scope="module")
def reference():
  return step()


# Every rollout in a row of its own behind its own prompt, with a gradient or not.
PLAIN = dict(share_prompts=False, prune=False, pack=False)


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


def keep_gradient():
  """An optimiser that changes nothing and keeps the gradient as its state."""

  def update(gradient, state, policy):
    del state
    return jax.tree.map(jnp.zeros_like, policy), gradient

  return optax.GradientTransformation(
    lambda policy: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), policy),
    update,
  )


def bigram_step(algorithm, dtype=jnp.float32, gap=0.3):
  """(gradient, metrics) of Bigram on rollouts whose recorded log-probs are off."""
  rollouts, rewards = batch()
  noise = gap * jax.random.normal(jax.random.key(5), rollouts.tokens.shape)
  logprobs = jnp.where(rollouts.mask, noise - 3.0, 0.0)
  rollouts = with_logprobs(rollouts, logprobs)
  tables = [jax.random.normal(jax.random.key(i), (32, 8)) for i in (0, 1)]
  policy = Bigram(*(0.4 * table.astype(dtype) for table in tables))
  state = trainer.TrainState(policy, keep_gradient().init(policy), jnp.int32(0))
  state, metrics, _ = trainer.Update(algorithm, keep_gradient())(
    state, rollouts, jnp.asarray(rewards), jnp.ones(32, bool)
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} == {
    jnp.float32.dtype
  }
  flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.opt_state)])
  return flat, {name: float(value) for name, value in metrics.items()}


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
  plain = trainer.Algorithm(
    ESTIMATORS["opo"],
    trainer.OBJECTIVES[objective],
    aggregation=aggregation,
    normalizer=77.0 if aggregation == "constant" else None,
    **PLAIN,
  )
  gradient, metrics = bigram_step(plain)
  for share_prompts in (True, False):
    changes = dict(share_prompts=share_prompts, prune=True, pack=True)
    packed = dataclasses.replace(plain, micro_batch_tokens=150, **changes)
    other, measured = bigram_step(packed)
    assert_same(other, gradient)
    assert measured["update/skipped_rollouts_fraction"] >= 4 / 32
    assert measured["update/tokens"] < 0.7 * metrics["update/tokens"]
    for name in ("loss", "grad_norm", "baseline/opo_minus_mean"):
      assert measured[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


def test_gradients_add_up_in_float32_whatever_the_parameters_are():
  """In bfloat16, a sum of 30 parts would be off by a hundredth; here each part is
  rounded once, as the whole is."""
  one, many = (
    bigram_step(dataclasses.replace(OPO, micro_batch_tokens=n), jnp.bfloat16)[0]
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
    dict(micro_batch_tokens=90, share_prompts=False),  # 4
  ],
  ids=str,
)
def test_gradient_does_not_depend_on_the_layout(changes, reference):
  """A response that saw its neighbour in the row, or another group's prompt, would
  change its own log-probs; a part that divided by its own tokens, the scale."""
  gradient, metrics, _ = step(dataclasses.replace(OPO, **changes))
  assert_same(gradient, reference[0], 1e-5)
  for name, value in reference[1].items():
    if not name.startswith("update/") and (changes != PLAIN or "entropy" not in name):
      # The gap to the sampler is rounding itself, some 3e-6.
      assert metrics[name] == pytest.approx(value, rel=1e-5, abs=5e-6), name


def test_entropy_of_what_is_left_out_is_what_the_sampler_recorded(reference):
  rollouts, _ = batch()
  row = trainer.rows(rollouts)
  stats = jax.jit(trainer.token_stats)(make().policy, row, rollouts.tokens, 1.3)
  kept = reference[2][:, None] != 0
  mask = np.asarray(rollouts.mask)
  expected = np.where(kept, stats.entropy, -rollouts.logprobs)[mask].mean()
  assert reference[1]["policy/entropy"] == pytest.approx(expected, rel=1e-5)
  assert abs(np.asarray(stats.entropy)[mask].mean() - expected) > 1e-3


def test_a_step_without_signal_moves_as_an_unpruned_one_and_measures_the_gap():
  """All rewards equal: the policy still moves by the momentum, which decays."""
  rollouts, rewards = batch()
  momentum = optax.sgd(0.1, momentum=0.9)

  def two_steps(**changes):
    update = trainer.Update(
      dataclasses.replace(OPO, require_on_policy=False, **changes), momentum
    )
    state, everything = make(optimizer=momentum), jnp.ones(32, bool)
    state, _, _ = update(state, rollouts, jnp.asarray(rewards), everything)
    return update(state, rollouts, jnp.ones(32), everything)[:2]

  (pruned, metrics), (plain, _) = two_steps(), two_steps(prune=False)
  for a, b in zip(jax.tree.leaves(pruned), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  assert metrics["grad_norm"] == 0 and metrics["loss"] == 0
  assert (
    metrics["update/skipped_rollouts_fraction"] == 1
    and metrics["update/packing_efficiency"] == 0
  )
  assert metrics["onpolicy/logprob_diff_max"] > 1e-4  # of the one that was computed
  assert metrics["update/tokens"] < 100


def test_what_nobody_measured_is_absent():
  _, metrics, _ = step(valid=np.zeros(32, bool))
  assert not any(name.startswith("onpolicy/") for name in metrics)
  assert metrics["update/tokens"] == 0 and metrics["grad_norm"] == 0


def test_two_updates_of_packed_groups_equal_two_of_plain_rows():
  """Each takes half of the groups, its own denominator, and the policy before it."""
  twice = trainer.Algorithm(
    ESTIMATORS["opo"],
    trainer.OBJECTIVES["cispo"],
    updates_per_batch=2,
    require_on_policy=False,
  )
  packed, plain = step(twice)[0], step(dataclasses.replace(twice, **PLAIN))[0]
  assert_same(packed, plain, 1e-4)  # the second starts from the first's rounding


def abstract(algorithm, *, vocab_size=32, samples=4, prompt=16, response=16):
  """The lowered update of a model that is not there, 8 prompts x samples."""
  config_ = dataclasses.replace(CONFIG, vocab_size=vocab_size)
  here = jax.sharding.SingleDeviceSharding(sharding.make_mesh(8, 1, 1).devices.flat[0])

  def spec(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

  def fresh(key):
    policy = Policy(config_, key, eos_ids=EOS)
    return trainer.TrainState(policy, SGD.init(policy), jnp.int32(0))

  state = jax.eval_shape(fresh, jax.random.key(0))
  state = jax.tree.map(lambda leaf: spec(leaf.shape, leaf.dtype), state)
  rows, G = 8 * samples, 8
  rollouts = Rollouts(
    prompts=spec((G, prompt)),
    prompt_lengths=spec((G,)),
    tokens=spec((rows, response)),
    logprobs=spec((rows, response), jnp.float32),
    sampling_logprobs=spec((rows, response), jnp.float32),
    mask=spec((rows, response), bool),
    lengths=spec((rows,)),
    prompt_ids=spec((rows,)),
    finished=spec((rows,), bool),
    temperature=spec((), jnp.float32),
    version=spec(()),
  )
  return state, trainer.Update(algorithm, SGD).trace(state, rollouts)[0].lower()


def test_no_array_of_tokens_times_vocabulary_is_in_the_compiled_update():
  """At 151,936 words: 4,096 tokens would be 2.3 GiB of logits."""
  _, lowered = abstract(OPO, vocab_size=151_936, samples=16, response=32)
  text = lowered.compile().as_text()
  shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", text)
  sizes = {math.prod(map(int, shape.split(","))) for shape in shapes}
  assert 151_936 * CONFIG.width in sizes
  # A block of logits has 2^25.
  assert max(sizes) <= 2**25 + 2**20 < 4096 * 151_936 / 10


def test_only_response_tokens_reach_the_unembedding(monkeypatch):
  """Behind 112 prompt tokens, 16 of 128 columns; both layouts."""
  seen = []

  def spy(hidden, *args, **options):
    seen.append(hidden.shape[:-1])
    return linear_logprobs(hidden, *args, **options)

  linear_logprobs = trainer.linear_logprobs
  monkeypatch.setattr(trainer, "linear_logprobs", spy)
  for share_prompts in (True, False):
    abstract(dataclasses.replace(OPO, share_prompts=share_prompts), prompt=112)
  assert seen == [(32, 16), (32, 16)]


def test_the_state_takes_the_memory_of_the_old_one():
  state, lowered = abstract(OPO)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  assert lowered.compile().memory_analysis().alias_size_in_bytes == size


def test_the_gradient_is_that_of_opo_written_out(reference):
  """Row by row, left-aligned: -1/tokens sum_i (r_i - b_i) grad log pi(y_i)."""
  rollouts, rewards = batch()
  lengths, groups = np.asarray(rollouts.lengths), np.asarray(rollouts.prompt_ids)

  @jax.jit
  def score(policy, tokens, start, stop):
    """grad log pi(tokens[start:stop] | tokens[:start]); what follows is not seen."""

    def logprob(policy):
      logprobs = jax.nn.log_softmax(policy.logits(tokens[None])[0] / 1.3)
      chosen = logprobs[jnp.arange(len(tokens) - 1), tokens[1:]]
      position = jnp.arange(1, len(tokens))
      return jnp.where((position >= start) & (position < stop), chosen, 0.0).sum()

    leaves = jax.tree.leaves(jax.grad(logprob)(policy))
    return jnp.concatenate([leaf.ravel() for leaf in leaves])

  policy, total = make().policy, 0.0
  for row in range(32):
    same = groups == groups[row]
    baseline = (lengths * rewards)[same].sum() / lengths[same].sum()
    prompt = list(range(3, 4 + groups[row]))
    response = np.asarray(rollouts.tokens)[row, : lengths[row]].tolist()
    tokens = np.zeros(20, np.int32)
    stop = len(prompt) + len(response)
    tokens[:stop] = prompt + response
    gradient = np.asarray(score(policy, jnp.asarray(tokens), len(prompt), stop))
    total = total - (rewards[row] - baseline) * gradient / lengths.sum()
  assert_same(reference[0], total, 2e-5)


def test_onpolicy_gap_and_clip_fraction_are_zero(reference):
  metrics = reference[1]
  assert metrics["onpolicy/logprob_diff_max"] < 1e-5
  assert metrics["onpolicy/clip_fraction"] == 0
  assert abs(metrics["onpolicy/kl"]) < 1e-8


@pytest.mark.parametrize("name", sorted(set(trainer.OBJECTIVES) - {"policy_gradient"}))
def test_every_objective_has_the_same_gradient_on_policy(name, reference):
  other = dataclasses.replace(OPO, objective=trainer.OBJECTIVES[name])
  gradient, metrics, _ = step(other)
  assert_same(gradient, reference[0], 1e-5)
  assert metrics["onpolicy/clip_fraction"] == 0


def test_tis_weighs_by_how_much_likelier_the_learner_finds_a_token(reference):
  """A sampler that reports each log-prob 0.2 too low: exp(0.2) = 1.22, or the cap."""
  rollouts, rewards = batch()
  shifted = with_logprobs(rollouts, rollouts.logprobs - 0.2)
  tis = functools.partial(trainer.OBJECTIVES["tis"], cap=1.1)
  capped, metrics, _ = step(
    dataclasses.replace(OPO, objective=tis), rollouts=shifted, rewards=rewards
  )
  assert_same(capped, 1.1 * reference[0], 1e-5)
  assert metrics["onpolicy/clip_fraction"] > 0.1  # 1.22 is outside of PPO's bounds


def test_constant_aggregation_divides_by_rows_times_longest_response(reference):
  """32 rows x 10 tokens, in 4 micro-batches, where token_mean divides by tokens."""
  run = config.Config(
    algorithm=config.Algorithm(aggregation="constant", micro_batch_tokens=40),
    rollout=config.Rollout(prompts_per_step=8, group_size=4, max_new_tokens=10),
  )
  algorithm = build._algorithm(run)
  assert algorithm.normalizer == 320
  tokens = float(batch()[0].mask.sum())
  assert tokens < 300
  assert_same(step(algorithm)[0], reference[0] * tokens / 320)
  # Two updates share the rows, and each has its own denominator.
  halves = dataclasses.replace(run.algorithm, loss="cispo", updates_per_batch=2)
  run = dataclasses.replace(run, algorithm=halves)
  assert build._algorithm(run).normalizer == 160


def test_options_of_a_loss_reach_it_and_those_left_out_stay_its_own():
  def options(**algorithm):
    run = config.Config(algorithm=config.Algorithm(**algorithm))
    return build._algorithm(run).objective.keywords

  assert options(loss="gspo") == {}
  assert options(loss="ppo_clip", clip_high=0.28) == {"clip_high": 0.28}
  assert options(loss="cispo", clip_low=0.5, tis_cap=3.0) == {"clip_low": 0.5}
  assert options(loss="tis", clip_low=0.5, tis_cap=3.0) == {"cap": 3.0}
  assert options(loss="policy_gradient", clip_low=0.5, tis_cap=3.0) == {}
  with pytest.raises(ValueError, match=r"--algorithm.loss has no 'gspoo'; .*gspo"):
    options(loss="gspoo")
  with pytest.raises(ValueError, match=r"--algorithm.advantage has no 'opo_lo'; .*opo"):
    options(advantage="opo_lo")


# The last splits 2 heads of keys in 8.
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_gradient_does_not_depend_on_the_mesh(sizes, reference):
  gradient, metrics, _ = step(mesh=sharding.make_mesh(*sizes))
  assert_same(gradient, reference[0], 1e-5)
  for name, value in reference[1].items():
    if name in ("update/tokens", "update/packing_efficiency"):
      continue  # rows are filled up to the devices
    # The gap to the sampler is rounding itself, some 3e-6.
    assert metrics[name] == pytest.approx(value, rel=1e-4, abs=5e-6), name


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
  assert_same(step(rollouts=padded)[0], reference[0], 1e-5)


def test_the_end_token_gets_a_gradient():
  """Answers that are nothing but the end token, all of reward 1: it gets likelier."""
  rollouts, _ = batch()
  alone = np.asarray((rollouts.lengths == 1) & rollouts.finished)
  assert alone.any()
  imitate = dataclasses.replace(OPO, estimator=ESTIMATORS["reinforce"])
  gradient, _, _ = step(imitate, rewards=np.ones(32, np.float32), valid=alone)
  state = make()
  leaves, structure = jax.tree.flatten(state.policy)
  sizes = np.cumsum([leaf.size for leaf in leaves])[:-1]
  moved = [
    leaf - 0.5 * part.reshape(leaf.shape)
    for leaf, part in zip(leaves, np.split(gradient, sizes), strict=True)
  ]
  better = jax.tree.unflatten(structure, moved)
  probability = [
    jax.nn.softmax(p.logits(jnp.array([[3, 4]]))[0, -1])[jnp.array(EOS)].sum()
    for p in (state.policy, better)
  ]
  assert probability[1] > probability[0] * 1.05


def test_unscorable_rows_leave_baseline_loss_and_normaliser():
  """A NaN reward among the rows gives what the batch without these rows gives."""
  rollouts, rewards = batch()
  valid = np.ones(32, bool)
  valid[[0, 9, 10, 28, 29, 30, 31]] = False  # parts of groups, and a whole one
  with_nan = np.where(valid, rewards, np.nan)
  gradient, metrics, advantages = step(rewards=with_nan, valid=valid)
  assert np.isfinite(gradient).all() and not advantages[~valid].any()

  masked = dataclasses.replace(
    rollouts, mask=rollouts.mask & valid[:, None], lengths=rollouts.lengths * valid
  )
  assert_same(step(rollouts=masked)[0], gradient)
  kept = dataclasses.replace(
    masked,
    **{
      name: getattr(masked, name)[np.flatnonzero(valid)]
      for name in (
        "tokens",
        "logprobs",
        "sampling_logprobs",
        "mask",
        "lengths",
        "prompt_ids",
        "finished",
      )
    },
  )
  assert_same(step(rollouts=kept, rewards=rewards[valid])[0], gradient, 1e-5)
  assert all(np.isfinite(value) for value in metrics.values())


def test_groups_of_equal_rewards_contribute_nothing(reference):
  _, _, advantages = reference
  assert not advantages[4:8].any()
  other = batch()[1].copy()
  other[4:8] = 0.0  # all wrong instead of all right
  assert_same(step(rewards=other)[0], reference[0])


def test_length_weighted_advantages_sum_to_zero_in_every_group(reference):
  assert reference[1]["advantages/length_weighted_mean_max"] < 1e-6
  mean = dataclasses.replace(OPO, estimator=ESTIMATORS["mean"])
  assert step(mean)[1]["advantages/length_weighted_mean_max"] > 1e-3


def test_rollouts_of_another_version_are_refused():
  rollouts, rewards = batch()
  old = dataclasses.replace(rollouts, version=jnp.int32(5))
  with pytest.raises(ValueError, match="version 5 were given to version 0"):
    step(rollouts=old, rewards=rewards)
  step(dataclasses.replace(OPO, require_on_policy=False), rollouts=old)


def test_filtered_rollouts_are_refused_on_policy():
  rollouts, rewards = batch()
  with pytest.raises(ValueError, match="top-k, top-p or min-p"):
    step(rollouts=dataclasses.replace(rollouts, filtered=True), rewards=rewards)


def test_several_updates_leave_the_policy_and_are_clipped():
  """Off-policy: after a first large step, ratios move and PPO's clip acts."""
  off_policy = trainer.Algorithm(
    ESTIMATORS["grpo"],
    losses.ppo_clip,
    updates_per_batch=4,
    require_on_policy=False,
  )
  _, metrics, _ = step(off_policy)
  assert metrics["onpolicy/logprob_diff_max"] > 1e-2
  assert metrics["onpolicy/clip_fraction"] > 0


def test_clip_fraction_counts_by_the_configured_bounds():
  """Ratios of exp(0.2) = 1.22 are outside of 0.2 and inside of 0.28."""
  rollouts, rewards = batch()
  shifted = with_logprobs(rollouts, rollouts.logprobs - 0.2)
  fractions = [
    step(
      dataclasses.replace(
        OPO, objective=functools.partial(losses.ppo_clip, clip_high=high)
      ),
      rollouts=shifted,
      rewards=rewards,
    )[1]["onpolicy/clip_fraction"]
    for high in (0.2, 0.28)
  ]
  assert fractions[0] > 0.1 and fractions[1] == 0


def test_prompts_that_do_not_split_are_refused():
  off_policy = dict(updates_per_batch=5, require_on_policy=False)
  with pytest.raises(ValueError, match="8 prompts do not split into 5"):
    step(dataclasses.replace(OPO, **off_policy))


def test_the_state_is_donated():
  rollouts, rewards = batch()
  state = make()
  trainer.Update(OPO, SGD)(state, rollouts, jnp.asarray(rewards), jnp.ones(32, bool))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.policy))


def test_kl_to_start_is_zero_at_the_start_and_positive_after():
  rollouts, _ = batch()
  indices = jnp.arange(0, 32, 2)
  policy = make().policy
  assert abs(float(trainer.kl_to_start(policy, rollouts, indices))) < 1e-6
  other = jax.tree.map(lambda x: 1.3 * x, policy)
  assert float(trainer.kl_to_start(other, rollouts, indices)) > 0.01


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_kl_to_start_is_the_same_in_parts_and_takes_less_memory(sizes):
  rollouts, _ = batch()
  mesh = sharding.make_mesh(*sizes, jax.devices()[: math.prod(sizes)])
  other = jax.tree.map(lambda x: 1.3 * x, make(mesh).policy)
  length = rollouts.prompts.shape[1] + rollouts.tokens.shape[1]
  found, temporaries = [], []
  # Of 24 rows: all at once, 12 (16 are no equal parts), one a shard.
  for tokens in (0, 16 * length, 1):
    program = trainer.kl_to_start.lower(
      other, rollouts, jnp.arange(24), micro_batch_tokens=tokens
    ).compile()
    found.append(float(program(other, rollouts, jnp.arange(24))))
    temporaries.append(program.memory_analysis().temp_size_in_bytes)
  np.testing.assert_allclose(found, found[0], rtol=1e-5)
  assert found[0] > 0.01
  assert temporaries[2] < temporaries[1] < temporaries[0]

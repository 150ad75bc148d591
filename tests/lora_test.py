"""Adapters: what they compute, that they alone are trained, and how they leave."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from experiments import lora_quickstart
from opo_jax import __main__ as command_line
from opo_jax import build, learner, loop, models, sampler, variance
from opo_jax.commands.export import export
from opo_jax.commands.variance import measure_variance
from opo_jax.config import SFT, Checkpoint, Config, Eval, Record, Reward, Rollout
from opo_jax.devices import sharding
from opo_jax.models import ModelConfig, Policy, lora
from opo_jax.run import Run, load_policy
from opo_jax.scorer import VERIFIERS, Verifier

# No two sizes of a kernel are equal, and layers have biases.
CONFIG = ModelConfig(
  vocab_size=32,
  width=16,
  mlp_width=40,
  num_layers=3,
  num_heads=8,
  num_kv_heads=2,
  head_dim=4,
  initializer_range=0.3,
)
RANK, ALPHA = 3, 5.0
TARGETS = ("q_proj", "value", "o_proj", "down")
PROMPTS = [list(range(3, 4 + i)) for i in range(8)]
SGD = optax.sgd(1.0)
ALGORITHM = learner.Algorithm()


@functools.cache
def make_base(mesh=None, seed=2, **options):
  def fresh(key):
    return Policy(CONFIG, key, eos_ids=(0, 1, 2), mesh=mesh, **options)

  key = jax.random.key(seed)
  layout = mesh and sharding.tree_shardings(jax.eval_shape(fresh, key), mesh)
  return jax.jit(fresh, out_shardings=layout)(key)


def make_adapted(base):
  """With adapters that do something: B is not zero, and differs between layers."""
  policy = lora.add(base, jax.random.key(1), rank=RANK, alpha=ALPHA, targets=TARGETS)
  for i, (_, adapter) in enumerate(lora.adapters(policy)):
    noise = 0.3 * np.random.RandomState(i).normal(size=adapter.b.shape)
    adapter.b[...] = sharding.put(np.float32(noise), base.mesh, None, *adapter.b.axes)
  return policy


def kernels(policy):
  return {name: linear.kernel[...] for name, linear in lora._linears(policy)}


def tokens():
  return np.random.default_rng(5).integers(0, CONFIG.vocab_size, (2, 9))


logits = jax.jit(Policy.logits)


def test_fresh_adapters_change_nothing():
  base = make_base()
  policy = lora.add(base, jax.random.key(1), rank=RANK)
  np.testing.assert_array_equal(logits(policy, tokens()), logits(base, tokens()))
  assert all(np.abs(adapter.a[...]).min() > 0 for _, adapter in lora.adapters(policy))


def test_adapted_policy_is_the_policy_with_w_plus_scaled_a_b():
  """Layer by layer, in NumPy; and `merge` finds the same weights."""
  base = make_base()
  policy = make_adapted(base)
  by_hand = jax.tree.map(lambda leaf: leaf, base)
  wanted = dict(lora.adapters(policy))
  assert set(wanted) == {"query", "value", "out", "down"}
  for name, linear in lora._linears(by_hand):
    if name in wanted:
      a, b = (np.asarray(m[...], np.float64) for m in (wanted[name].a, wanted[name].b))
      change = np.stack([5.0 / 3.0 * a[i] @ b[i] for i in range(3)])
      assert np.abs(change).mean() > 0.05
      linear.kernel[...] = jnp.asarray(np.asarray(linear.kernel[...]) + change)
  expected = logits(by_hand, tokens())
  # Logits of some 5, rounded in another order.
  np.testing.assert_allclose(logits(policy, tokens()), expected, atol=3e-5)
  assert np.abs(logits(base, tokens()) - expected).max() > 0.1
  merged = lora.merge(policy)
  assert not dict(lora.adapters(merged))
  for name, kernel in kernels(merged).items():
    np.testing.assert_allclose(kernel, kernels(by_hand)[name], atol=1e-6)
  assert dict(lora.adapters(policy)) and not dict(lora.adapters(base))


def test_adapters_are_drawn_as_peft_draws_them():
  """Uniform within 1 / sqrt(inputs): `kaiming_uniform_(a=sqrt(5))` of its transpose."""
  base = make_base()
  draws = dict(lora.adapters(lora.add(base, jax.random.key(3), rank=64)))
  assert set(draws) == set(lora.LAYERS)
  for name, adapter in draws.items():
    layers, width, rank = adapter.a.shape
    assert (layers, width) == kernels(base)[name].shape[:2] and rank == 64
    a = np.asarray(adapter.a[...]) * np.sqrt(width)
    assert 0.97 < np.abs(a).max() <= 1
    assert abs(a.std() - 1 / np.sqrt(3)) < 0.03 and abs(a.mean()) < 0.05
    assert np.abs(a[0] - a[1]).max() > 0.1, "layers differ"
    assert not adapter.b[...].any()
  alone = lora.add(base, jax.random.key(3), rank=64, targets=["up"])
  ((_, adapter),) = lora.adapters(alone)
  np.testing.assert_array_equal(adapter.a[...], draws["up"].a[...])
  assert np.abs(draws["up"].a[...] - draws["gate"].a[...]).max() > 0.1


@pytest.mark.parametrize(
  ("targets", "message"),
  [
    (["q_prj"], "'q_prj'; did you mean q_proj"),
    (["query", "dwn"], "'dwn'; did you mean down"),
    (["all_linear"], "did you mean all-linear"),
    (["lm_head#"], "No linear layer is called 'lm_head#'"),
    ([], "No layer to adapt"),
  ],
)
def test_a_target_that_is_none_is_refused_with_the_near_ones(targets, message):
  with pytest.raises(ValueError, match=message):
    lora.layer_names(targets)


def test_a_second_adapter_and_a_rank_of_nothing_are_refused():
  base = jax.eval_shape(make_base)
  policy = lora.add(base, jax.random.key(0), rank=1)
  with pytest.raises(ValueError, match="has adapters already"):
    lora.add(policy, jax.random.key(0), rank=1)
  for wrong in (dict(rank=0), dict(rank=2, alpha=0.0)):
    with pytest.raises(ValueError, match="adds nothing"):
      lora.add(base, jax.random.key(0), **wrong)


def test_trained_are_the_adapters_where_there_are_any_else_everything():
  base = make_base(param_dtype=jnp.bfloat16)
  policy = make_adapted(base)
  trained, frozen = lora.split(policy)
  assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
  assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
  assert len(jax.tree.leaves(trained)) == 2 * len(TARGETS)
  again = lora.join(trained, frozen)
  assert jax.tree.structure(again) == jax.tree.structure(policy)
  pairs = zip(jax.tree.leaves(again), jax.tree.leaves(policy), strict=True)
  assert all(one is other for one, other in pairs)
  everything, nothing = lora.split(base)
  assert not jax.tree.leaves(nothing)
  assert jax.tree.structure(everything) == jax.tree.structure(base)


# --- training -------------------------------------------------------------------------


@functools.cache
def batch():
  """8 prompts x 4 responses of the adapted policy, uneven lengths."""
  rollouts = sampler.generate(
    make_adapted(make_base()),
    PROMPTS,
    samples_per_prompt=4,
    max_new_tokens=10,
    seed=7,
    version=0,
  )
  rewards = np.random.default_rng(0).random(32) < 0.4
  return rollouts, jnp.asarray(rewards, jnp.float32)


def make_state(policy, optimizer=SGD):
  opt_state = optimizer.init(lora.split(policy)[0])
  return learner.TrainState(policy, opt_state, sharding.put(np.int32(0), policy.mesh))


def gradient(update, policy):
  """Of what is trained, by a step of SGD; and the new state."""
  before = jax.tree.map(np.array, lora.split(policy)[0])
  state, metrics = update.update(make_state(policy), *batch())
  after, _ = lora.split(state.policy)
  gradient = jax.tree.map(lambda a, b: a - np.asarray(b), before, after)
  return gradient, state, metrics.scalars


def assert_same(actual, expected, tolerance=2e-5):
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.shape == b.shape and np.abs(a - b).max() <= tolerance * scale


@functools.cache
def learner_of(kind):
  """A learner compiles for one kind of state: adapters, all weights, a mesh."""
  del kind
  return learner.PolicyGradientLearner(ALGORITHM, SGD)


@pytest.mark.parametrize("seed", [2, 6])
def test_gradient_of_the_adapters_is_that_of_the_merged_weights_by_the_chain_rule(seed):
  """dB = s A^T dW, dA = s dW B^T, with dW of full training at W + s A B. The second
  base goes through the program compiled for the first: it is no constant there."""
  policy = make_adapted(make_base(seed=seed))
  scale, adapters = ALPHA / RANK, dict(lora.adapters(policy))
  matrices = {n: (np.array(x.a[...]), np.array(x.b[...])) for n, x in adapters.items()}
  copy = jax.tree.map(jnp.copy, lora.merge(policy))  # an update takes all of it
  full = kernels(gradient(learner_of("all weights"), copy)[0])
  expected = {
    name: (scale * full[name] @ b.swapaxes(1, 2), scale * a.swapaxes(1, 2) @ full[name])
    for name, (a, b) in matrices.items()
  }
  actual, _, _ = gradient(learner_of("adapters"), policy)
  actual = {name: (x.a[...], x.b[...]) for name, x in lora.adapters(actual)}
  assert_same(actual, expected)
  assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 1e-4


def test_an_update_shares_the_base_and_takes_the_memory_of_the_adapters():
  base = make_base()
  policy = make_adapted(base)
  old, _ = lora.split(policy)
  _, state, _ = gradient(learner_of("adapters"), policy)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
  _, frozen = lora.split(state.policy)
  pairs = zip(jax.tree.leaves(frozen), jax.tree.leaves(base), strict=True)
  assert all(one is other and not one.is_deleted() for one, other in pairs)


def test_gradient_does_not_depend_on_the_mesh_and_adapters_lie_as_their_kernels_do():
  mesh = sharding.make_mesh(2, 2, 2)
  policy = make_adapted(make_base(mesh))
  on_mesh, state, metrics = gradient(learner_of("mesh"), policy)
  alone, _, _ = gradient(learner_of("adapters"), make_adapted(make_base()))
  assert_same(on_mesh, alone)
  assert metrics["onpolicy/logprob_diff_max"] < 1e-5
  axes = {"query": ("embed", "heads"), "down": ("mlp", "embed")}
  adapters = dict(lora.adapters(state.policy))
  for name, (of_inputs, of_outputs) in axes.items():
    a, b = adapters[name].a[...], adapters[name].b[...]
    assert a.sharding.is_equivalent_to(sharding.named(mesh, None, of_inputs, None), 3)
    assert b.sharding.is_equivalent_to(sharding.named(mesh, None, None, of_outputs), 3)


def test_sampler_and_learner_use_the_same_adapted_weights():
  rollouts, _ = batch()
  policy = make_adapted(make_base())
  learners = learner.response_logprobs(policy, rollouts)
  # Rounding; and the base, which a sampler that forgot the adapters would use, is far.
  assert np.abs(learners - rollouts.logprobs).max() < 1e-5
  of_base = learner.response_logprobs(lora.without(policy), rollouts)
  assert np.abs(of_base - rollouts.logprobs).max() > 0.1


def test_sampling_with_adapters_equals_sampling_with_merged_weights():
  rollouts, _ = batch()
  merged = sampler.generate(
    lora.merge(make_adapted(make_base())),
    PROMPTS,
    samples_per_prompt=4,
    max_new_tokens=10,
    seed=7,
  )
  np.testing.assert_array_equal(merged.tokens, rollouts.tokens)
  assert np.abs(merged.logprobs - rollouts.logprobs).max() < 1e-5


# --- a run ----------------------------------------------------------------------------


def small_config(**changes):
  base = lora_quickstart.get_config()
  config = dataclasses.replace(
    base,
    steps=3,
    model=dataclasses.replace(
      base.model, width=32, mlp_width=48, lora_targets="query,down_proj", lora_rank=2
    ),
    sft=SFT(steps=1, batch_size=8),
    rollout=Rollout(prompts_per_step=8, group_size=4, max_new_tokens=6),
    reward=Reward(truncated="scored"),
    eval=Eval(every=0, problems=8, samples=1),
    checkpoint=Checkpoint(every=1, keep=3),
    record=Record(kl_rollouts=8),
  )
  return dataclasses.replace(config, **changes)


def metrics(directory):
  rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
  clock = ("time/", "throughput/")
  return [{k: v for k, v in r.items() if not k.startswith(clock)} for r in rows]


@pytest.fixture(scope="module", autouse=True)
def odd_lengths_are_right():
  """A reward that a policy which has learnt nothing earns half of the time."""
  with pytest.MonkeyPatch.context() as patch:
    reward = lambda response, reference: float(len(response) % 2)  # noqa: E731
    patch.setitem(VERIFIERS, "arithmetic", Verifier(reward))
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs") / "lora"
  loop.train(small_config(), directory)
  return directory


def test_a_run_starts_at_its_start_policy_and_leaves_it(run):
  first, last = metrics(run)[1], metrics(run)[-1]
  # The mean of some 40 differences that are rounding, and of as many that are not.
  assert abs(first["policy/kl_to_start"]) < 1e-6
  assert abs(last["policy/kl_to_start"]) > 1e-5 and last["grad_norm"] > 0
  assert max(row.get("onpolicy/logprob_diff_max", 0) for row in metrics(run)) < 1e-4


@pytest.mark.slow
def test_a_broken_and_resumed_run_equals_an_unbroken_one(run, tmp_path, monkeypatch):
  write_samples = loop.Record.samples

  def break_down(self, step, *rest):
    write_samples(self, step, *rest)
    if step == 2:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(loop.Record, "samples", break_down)
    with pytest.raises(KeyboardInterrupt):
      loop.train(small_config(), tmp_path / "run")
  loop.train(small_config(), tmp_path / "run")
  assert metrics(tmp_path / "run") == metrics(run)


def test_checkpoints_hold_the_adapters_and_their_optimiser_state_alone(run):
  written = run / "checkpoints" / "3" / "state" / "_METADATA"
  arrays = json.loads(written.read_text())["tree_metadata"].values()
  names = {array["key_metadata"][0]["key"] for array in arrays}
  where = (".layers.attention.query.adapter", ".layers.mlp.down.adapter")
  matrices = [f"{layer}.{matrix}" for layer in where for matrix in "ab"]
  for part in (".policy", ".mu", ".nu"):
    assert sum(f"{part}{matrix}" in name for name in names for matrix in matrices) == 4
  counters = {name for name in names if name.endswith(("step", "count"))}
  assert len(names - counters) == 3 * 4
  opened = Run(small_config(), run)
  start = opened.directory.load_start(opened.abstract_policy)
  trained = load_policy(opened)
  assert not dict(lora.adapters(start))
  assert set(dict(lora.adapters(trained))) == {"query", "down"}
  for name, adapter in lora.adapters(trained):
    assert adapter.scale == 16 and np.abs(adapter.b[...]).max() > 0, name
  base = lora.without(trained)
  for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(start), strict=True):
    np.testing.assert_array_equal(a, b)


def test_exported_policy_has_the_adapters_merged_in(run, tmp_path):
  arguments = ["export", str(run), str(tmp_path / "out")]
  assert command_line.main(arguments) == 0
  exported = models.load(tmp_path / "out")
  trained = load_policy(Run(small_config(), run))
  merged = kernels(lora.merge(trained))
  for name, kernel in kernels(exported).items():
    np.testing.assert_array_equal(kernel, merged[name])
  changed = np.abs(np.asarray(merged["down"] - kernels(trained)["down"])).max()
  assert changed > 1e-5
  assert "| LoRA rank | `2` |" in (tmp_path / "out" / "README.md").read_text()


def test_exported_adapter_has_pefts_names_and_shapes_and_its_base_beside_it(
  run, tmp_path
):
  out = tmp_path / "out"
  assert command_line.main(["export", str(run), str(out), "--format", "peft"]) == 0
  config = json.loads((out / "adapter_config.json").read_text())
  assert config["r"] == 2 and config["lora_alpha"] == 32
  assert config["target_modules"] == ["q_proj", "down_proj"]
  assert config["base_model_name_or_path"] == str(out / "base")
  tensors = load_file(out / "adapter_model.safetensors")
  assert len(tensors) == 2 * 2 * 2
  trained = load_policy(Run(small_config(), run))
  found = dict(lora.adapters(trained))
  prefix = "base_model.model.model.layers.1"
  np.testing.assert_array_equal(
    tensors[f"{prefix}.mlp.down_proj.lora_A.weight"], found["down"].a[...][1].T
  )
  np.testing.assert_array_equal(
    tensors[f"{prefix}.self_attn.q_proj.lora_B.weight"], found["query"].b[...][1].T
  )
  base = models.load(out / "base")
  for name, kernel in kernels(base).items():
    np.testing.assert_array_equal(kernel, kernels(trained)[name])
  assert "library_name: peft" in (out / "README.md").read_text()


def test_what_needs_adapters_or_cannot_have_them_is_refused(run, tmp_path):
  with pytest.raises(ValueError, match="trained every parameter"):
    export(Config(), tmp_path, tmp_path / "out", adapter_alone=True)
  with pytest.raises(ValueError, match="no adapters; write it whole"):
    models.save_adapter(make_base(), tmp_path / "out", base="")
  with pytest.raises(ValueError, match="trained adapters"):
    measure_variance(small_config(), run, variance.Settings())
  model = dataclasses.replace(small_config().model, lora_targets="querry")
  with pytest.raises(ValueError, match="did you mean query"):
    build.add_adapters(small_config(model=model), make_base())


def test_a_lora_param_is_a_param():
  """Whoever filters by nnx.Param, in their own loop, finds adapters too."""
  policy = lora.add(jax.eval_shape(make_base), jax.random.key(0), rank=1)
  state = nnx.state(policy, lora.LoRAParam)
  assert len(jax.tree.leaves(state)) == 2 * len(lora.LAYERS)
  assert issubclass(lora.LoRAParam, nnx.Param)

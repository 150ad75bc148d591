"""The variance measured from inner products is that of the gradients themselves."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.quickstart import get_config
from opo_jax import __main__ as command_line
from opo_jax import advantages as adv
from opo_jax import build, sft, variance
from opo_jax.data import sources
from opo_jax.devices import sharding
from opo_jax.learner import response_logprobs
from opo_jax.models import ModelConfig, Policy
from opo_jax.rollouts import select
from opo_jax.run import Run
from opo_jax.sampler.engine import generate
from opo_jax.scorer import VERIFIERS, Verifier

CONFIG = ModelConfig(
  vocab_size=32,
  width=16,
  mlp_width=48,
  num_layers=1,
  num_heads=8,
  num_kv_heads=2,
  head_dim=4,
  initializer_range=0.3,
)
# The end token is the most frequent one too, so that lengths differ a lot.
EOS = (0, 1, 2)
G, M = 2, 8


@functools.cache
def policy(mesh=None):
  def fresh(key):
    return Policy(CONFIG, key, eos_ids=EOS, mesh=mesh)

  layout = None
  if mesh is not None:
    layout = sharding.tree_shardings(jax.eval_shape(fresh, jax.random.key(2)), mesh)
  return jax.jit(fresh, out_shardings=layout)(jax.random.key(2))


@functools.cache
def sampled():
  """2 prompts x 8 responses of uneven lengths, and rewards with a NaN."""
  rollouts = generate(
    policy(),
    [[3, 4, 5], [6]],
    samples_per_prompt=M,
    max_new_tokens=10,
    temperature=1.3,
    seed=7,
  )
  rewards = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 0, np.nan, 0, 1], np.float32)
  return rollouts, rewards


@functools.cache
def gram_matrices():
  return variance.gram_matrices(policy(), sampled()[0], chunk=8)


@functools.cache
def explicit_gradients(weights=None):
  """grad sum_t c_t log pi(y_t) of every row, one after another: [N, P]."""
  rollouts, _ = sampled()
  shape = rollouts.tokens.shape
  weights = jnp.ones(shape) if weights is None else jnp.array(weights).reshape(shape)
  return np.stack(
    [_gradient(policy(), jnp.int32(row), weights) for row in range(shape[0])]
  )


@jax.jit
def _gradient(policy, row, weights):
  rollouts = select(sampled()[0], row[None])

  def weighted(policy):
    return (response_logprobs(policy, rollouts) * rollouts.mask * weights[row]).sum()

  leaves = jax.tree.leaves(jax.grad(weighted)(policy))
  return jnp.concatenate([leaf.ravel() for leaf in leaves])


def synthetic(num_prompts, num_samples, size=6, seed=0, scale=None):
  """Scores [G, M, P] that correlate with rewards, uneven lengths, a row not valid."""
  rng = np.random.default_rng(seed)
  shape = (num_prompts, num_samples)
  lengths = rng.integers(1, 30, shape).astype(np.float32)
  rewards = (rng.random(shape) < 0.2 + lengths / 50).astype(np.float32)
  scores = rng.normal(size=(*shape, size))
  scores *= np.sqrt(lengths if scale is None else scale(lengths))[..., None]
  scores[..., 0] += 2 * rewards - 0.6
  return scores, rewards, lengths


def moments(scores, rewards, lengths, size, valid=None, orders=None, alpha=0.5):
  scores = scores.astype(np.float32)
  norms = (scores**2).sum(-1)
  columns = {
    "rewards": rewards,
    "lengths": lengths,
    "valid": np.ones(rewards.shape, bool) if valid is None else valid,
    "opo_fitted": lengths ** (2 * alpha),
    "energy": norms**0.5,
    "exact": norms,
  }
  orders = np.arange(rewards.shape[1])[None] if orders is None else orders
  gram = scores @ scores.swapaxes(1, 2)
  return jax.tree.map(
    np.asarray, variance.moments(gram, columns, orders, group_size=size)
  )


# Per-sample gradients -----------------------------------------------------------


@pytest.mark.parametrize("chunk", [8, 3])
def test_gram_matrix_is_that_of_gradients_taken_one_at_a_time(chunk):
  """In one chunk; and in three, the last one not full, over 8 devices."""
  rollouts, _ = sampled()
  gram, energy = (
    gram_matrices()
    if chunk == M
    else variance.gram_matrices(
      policy(sharding.make_mesh(1, 8, 1)), rollouts, chunk=chunk
    )
  )
  scores = explicit_gradients().reshape(G, M, -1)
  expected = scores @ scores.swapaxes(1, 2)
  # float32 gradients, summed in another order.
  np.testing.assert_allclose(gram, expected, rtol=2e-5, atol=2e-5 * expected.max())
  assert (energy > 0).reshape(G * M, -1).tolist() == rollouts.mask.tolist()


def test_no_more_than_two_chunks_of_gradients_are_alive(monkeypatch):
  alive, take = [], variance.gram._gradients

  def watched(*args):
    # With the one that is about to be taken, two.
    assert sum(gradients() is not None for gradients in alive) <= 1
    result = take(*args)
    alive.append(weakref.ref(jax.tree.leaves(result[0])[0]))
    return result

  monkeypatch.setattr(variance.gram, "_gradients", watched)
  variance.gram_matrices(policy(), sampled()[0], chunk=3)
  assert len(alive) == G * (1 + 2 + 3)


def test_gradients_that_do_not_fit_are_refused_with_the_chunk_that_would():
  rollouts, _ = sampled()
  size = sum(leaf.size for leaf in jax.tree.leaves(policy()))
  gib = size * 4 / 2**30
  message = rf"1 x 8 gradients of {size:,} parameters .* use --chunk 2,"
  with pytest.raises(ValueError, match=message):
    variance.gram_matrices(policy(), rollouts, chunk=8, memory_gib=5 * gib)
  with pytest.raises(ValueError, match=r"2 x 1 gradients .* a smaller policy"):
    variance.gram_matrices(policy(), rollouts, chunk=1, memory_gib=gib)


# Moments ------------------------------------------------------------------------


EXPLICIT = ("reinforce", "opo", "opo_loo", "grpo", "opo_batch", "rloo")


@functools.partial(jax.jit, static_argnames="num_groups")
def advantages(rewards, lengths, ids, valid, num_groups):
  options = dict(num_groups=num_groups, valid=valid)
  return {n: adv.ESTIMATORS[n](rewards, lengths, ids, **options) for n in EXPLICIT}


def explicit_estimates(scores, rewards, lengths, valid, groups):
  """{name: [J, G, P]}, one batch of a group from every prompt after another."""
  G, size = len(rewards), groups.shape[1]
  result = {name: [] for name in EXPLICIT}
  for rows in groups:
    columns = (x[:, rows].reshape(-1) for x in (rewards, lengths))
    ids = np.repeat(np.arange(G), size)
    batch = *columns, ids, valid[:, rows].reshape(-1)
    for name, a in advantages(*batch, num_groups=G).items():
      a = np.asarray(a, np.float64).reshape(G, size)
      result[name].append(np.einsum("gk,gkp->gp", a, scores[:, rows]) / size)
  return {name: np.array(estimates) for name, estimates in result.items()}


@pytest.mark.parametrize("size", [2, 5])
def test_moments_are_those_of_explicit_gradients(size, subtests):
  """11 rows: some are left over at every size. One row is not valid."""
  scores, rewards, lengths = synthetic(3, 11)
  valid = np.ones(rewards.shape, bool)
  valid[1, 4] = False
  order = np.random.default_rng(1).permutation(11)
  found = moments(scores, rewards, lengths, size, valid, order[None])
  groups = order[: 11 // size * size].reshape(-1, size)
  estimates = explicit_estimates(scores, rewards, lengths, valid, groups)
  h = estimates["rloo"]
  pairs = [(a, b) for a in range(len(h)) for b in range(len(h)) if a != b]
  for name in EXPLICIT[:-1]:
    with subtests.test(name):
      g = estimates[name]
      spread = g.var(axis=0, ddof=1).sum(-1)
      signal = (g.mean(0) ** 2).sum(-1) - spread / len(g)
      close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
      close(found[name]["variance"], spread)
      close(found[name]["signal"], signal)
      # |g_j - h_j'|^2 with the h_j' of others counts their noise too: it is taken off.
      distance = np.mean([((g[a] - h[b]) ** 2).sum(-1) for a, b in pairs], axis=0)
      noise = h.var(axis=0, ddof=1).sum(-1)
      close(found[name]["error"], distance - noise)


def test_moments_reach_the_closed_form():
  """s = z + (r - 1/2) u with z normal in P dimensions and r a fair coin.

  J = E[r s] = u/4. By hand, with |u|^2 = U, for a group of K:
    rloo       E g = J. Var: A = r_i - mean of others; E A^2 = 1/4 K/(K-1).
               From z alone: P/K E A^2 = P / (4 (K-1)). With u small, that is all.
    mean       (K-1)/K times rloo: the variance squared of it, an error of J/K besides.
    reinforce  P/K E r^2 = P / (2 K).
  """
  rng, P, K = np.random.default_rng(0), 12, 4
  u = np.zeros(P)
  u[0] = 0.4
  rewards = (rng.random((6000, 16)) < 0.5).astype(np.float32)
  scores = rng.normal(size=(6000, 16, P)) + (rewards - 0.5)[..., None] * u
  found = moments(scores, rewards, np.ones_like(rewards), K)
  mean = {
    name: {key: value.mean() for key, value in row.items()}
    for name, row in found.items()
  }
  # 24,000 groups: a standard error of about 0.6 % of a variance; u adds up to 0.5 %.
  close = functools.partial(pytest.approx, rel=0.02)
  assert mean["rloo"]["variance"] == close(P / (4 * (K - 1)))
  assert mean["mean"]["variance"] == close(P / (4 * (K - 1)) * (1 - 1 / K) ** 2)
  assert mean["reinforce"]["variance"] == close(P / (2 * K))
  assert mean["zero"]["error"] == pytest.approx(0.4**2 / 16, abs=0.004)
  assert mean["mean"]["signal"] == pytest.approx(
    mean["rloo"]["signal"] * (1 - 1 / K) ** 2, rel=1e-3
  )
  bias = mean["mean"]["error"] - mean["mean"]["variance"]
  assert bias == pytest.approx(mean["rloo"]["signal"] / K**2, rel=1e-2)
  assert mean["rloo"]["error"] == pytest.approx(mean["rloo"]["variance"], rel=1e-5)


def test_equal_lengths_make_opo_the_mean():
  scores, rewards, _ = synthetic(3, 11)
  found = moments(scores, rewards, np.full_like(rewards, 7), 5)
  for opo, mean in (("opo", "mean"), ("opo_fitted", "mean"), ("opo_loo", "rloo")):
    for key, value in found[opo].items():
      np.testing.assert_allclose(value, found[mean][key], rtol=1e-4, err_msg=opo)


def test_two_responses_leave_one_baseline_whatever_it_weighs():
  scores, rewards, lengths = synthetic(3, 11)
  found = moments(scores, rewards, lengths, 2)
  for name in ("opo_loo", "opo_fitted_loo", "energy_loo", "exact_loo"):
    np.testing.assert_allclose(
      found[name]["variance"], found["rloo"]["variance"], rtol=1e-4, err_msg=name
    )


def test_norms_that_grow_faster_than_length_order_the_baselines():
  """|s|^2 ~ l^4, and reward grows with length: |s|^2 < OPO's l < mean < none."""
  scores, rewards, lengths = synthetic(200, 64, size=40, scale=lambda x: x**4)
  found = moments(scores, rewards, lengths, 32, alpha=2.0)
  total = {name: row["variance"].sum() for name, row in found.items()}
  assert total["exact_loo"] < 0.99 * total["opo_loo"]
  assert total["opo_loo"] < 0.95 * total["rloo"]
  assert total["rloo"] < 0.5 * total["reinforce"]
  assert total["opo_fitted_loo"] == pytest.approx(total["exact_loo"], rel=0.02)
  others = ("rloo", "opo_loo", "opo_fitted_loo", "energy_loo", "exact_outside")
  assert total["exact_all"] < min(total[name] for name in others)


def test_floor_is_below_every_constant_baseline():
  """min over b of sum (r - b)^2 |s|^2 is at b = sum |s|^2 r / sum |s|^2."""
  scores, rewards, _ = synthetic(5, 8)
  norms = (scores**2).sum(-1)
  columns = {"rewards": rewards, "exact": norms, "valid": rewards >= 0}
  columns = {name: x.reshape(5, 2, 4) for name, x in columns.items()}
  a = jax.jit(variance.estimators.beyond_the_group)(columns)["exact_all"].reshape(5, 8)
  floor = (np.asarray(a) ** 2 * norms).sum(1)
  for b in np.linspace(0, 1, 21):
    assert (floor <= ((rewards - b) ** 2 * norms).sum(1) * (1 + 1e-6)).all()


def test_leave_one_out_survives_weights_a_billion_apart():
  weights = np.array([1e9, 1.0, 3.0, 2.0, 7.0], np.float32)
  rewards = np.array([0.0, 1.0, 0.0, 1.0, 1.0], np.float32)
  valid = np.arange(5) < 4
  columns = {"rewards": rewards, "exact": weights, "valid": valid}
  loo = variance.estimators._weighted_loo("exact")
  found = jax.jit(lambda columns: loo(columns, None, 1))(columns)
  # Row 0: 0 - (1 + 2) / (1 + 3 + 2). The others see row 0 alone, to nine digits.
  np.testing.assert_allclose(found, [-0.5, 1.0, 0.0, 1.0, 0.0], atol=1e-6)


def test_group_without_weight_gives_no_gradient():
  columns = {"rewards": jnp.array([1.0, 0.0, 1.0]), "energy": jnp.zeros(3)}
  columns["valid"] = jnp.array([True, True, False])

  @jax.jit
  def advantages(columns):
    names = ("energy", "energy_loo")
    return [variance.ESTIMATORS[n](columns, jnp.zeros(3, int), 1) for n in names]

  assert not np.any(advantages(columns))


def test_token_moments_are_those_of_explicit_gradients():
  rollouts, rewards = sampled()
  gram, energy = gram_matrices()
  valid = ~np.isnan(rewards)
  columns = {
    "rewards": np.where(valid, rewards, 0).reshape(G, M),
    "lengths": np.asarray(rollouts.lengths).reshape(G, M),
    "valid": valid.reshape(G, M),
  }
  K, order = 3, np.array([5, 1, 4, 0, 7, 2, 6, 3])  # rows 6 and 3 are left over
  found = variance.token_moments(
    policy(), rollouts, (gram, energy), columns, order, group_size=K, chunk=16
  )

  token, sequence = np.zeros((G * M, 10)), np.zeros(G * M)
  groups = [np.array(order[j : j + K]) + M * g for g in range(G) for j in (0, 3)]

  @jax.jit
  def of_group(rewards, energy, mask, valid):
    options = dict(num_groups=1, valid=valid)
    ids = jnp.zeros(K, int)
    return (
      adv.optimal_token(rewards, energy, mask, ids, **options),
      adv.rloo(rewards, mask.sum(-1), ids, **options),
    )

  columns_ = (rewards, energy.reshape(-1, 10), np.asarray(rollouts.mask), valid)
  for rows in groups:
    token[rows], sequence[rows] = of_group(*(column[rows] for column in columns_))
  rows_g = explicit_gradients(tuple(token.ravel().tolist()))
  rows_h = explicit_gradients() * sequence[:, None]
  g, h = (
    np.array([x[rows].sum(0) / K for rows in groups]).reshape(G, 2, -1)
    for x in (rows_g, rows_h)
  )
  spread = g.var(axis=1, ddof=1).sum(-1)
  np.testing.assert_allclose(found["variance"], spread, rtol=1e-3)
  signal = (g[:, 0] * g[:, 1]).sum(-1)
  cross = (g[:, 0] * h[:, 1] + g[:, 1] * h[:, 0]).sum(-1) / 2
  power = (g**2).sum(-1).mean(-1)
  scale = power.max()
  np.testing.assert_allclose(found["signal"], signal, rtol=1e-3, atol=1e-4 * scale)
  error = power - 2 * cross + (h[:, 0] * h[:, 1]).sum(-1)
  np.testing.assert_allclose(found["error"], error, rtol=1e-3, atol=1e-4 * scale)


# Fits and ratios ----------------------------------------------------------------


def test_fit_finds_the_slope_within_prompts_that_pooling_reverses():
  rng = np.random.default_rng(3)
  x = rng.normal(size=(40, 20)) + np.arange(40)[:, None] / 2
  y = 1.6 * x - 1.8 * np.arange(40)[:, None] + 0.1 * rng.normal(size=x.shape)
  x[3, 4] = -np.inf  # the log of an empty response
  within, pooled = (variance.fit(x, y, within=within) for within in (True, False))
  assert within["slope"] == pytest.approx(1.6, abs=0.02) and within["r2"] > 0.99
  assert within["slope_low"] < 1.6 < within["slope_high"]
  assert pooled["slope"] < 0
  good = np.isfinite(x)
  slope, _ = np.polyfit(x[good], y[good], 1)
  assert pooled["slope"] == pytest.approx(slope)
  assert pooled["r2"] == pytest.approx(np.corrcoef(x[good], y[good])[0, 1] ** 2)


def test_fit_on_one_length_has_no_slope():
  assert variance.fit(np.full((4, 5), 2.0), np.ones((4, 5)), within=True) == {}


def test_ratios_are_of_sums_and_their_intervals_are_paired():
  rng = np.random.default_rng(4)
  base = rng.gamma(1.0, size=50)
  row = {"variance": base, "error": base, "signal": np.ones(50)}
  lower = {"variance": 0.5 * base, "error": 0.5 * base, "signal": np.ones(50)}
  lost = {"variance": base, "error": base, "signal": rng.normal(size=50) - 0.1}
  found = variance.ratios({"lost": lost, "rloo": row, "mean": row, "opo": lower})
  assert list(found) == ["mean", "opo", "rloo", "lost"]
  for measure in variance.BASES:
    # The same prompts on both sides: half is half in every sample of them.
    assert found["opo"][measure] == pytest.approx([0.5, 0.5, 0.5])
  assert "noise" not in found["lost"] and "error" in found["lost"]


# The command --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(samples=40), "--samples 40 is less than two groups of 32; use --samples 64"),
    (dict(group_sizes=(1, 2)), "at least 2"),
    (dict(prompts=0), "--prompts is 0"),
    (dict(token_group_size=1), "--token-group-size is 1"),
  ],
)
def test_settings_out_of_range_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    variance.Settings(**settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run with only its start policy and two checkpoints, all random."""
  directory = tmp_path_factory.mktemp("runs") / "small"
  base = get_config()
  config = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, width=16, mlp_width=32, num_layers=1),
    sft=dataclasses.replace(base.sft, steps=0),
    rollout=dataclasses.replace(base.rollout, max_new_tokens=12),
  )
  run = Run(config, directory)
  run.write_head()
  problems = sources.load("arithmetic", "train")
  state = build.make_learner(config, run.mesh).init(sft.start_policy(run))
  with run.directory.checkpoints() as checkpoints:
    for step in (20, 40):
      position = sources.ProblemStream(problems, seed=0).state()
      checkpoints.save_state(step, state, position)
  return directory


def test_command_writes_its_table_file_and_figure(run, capsys, monkeypatch):
  # A random policy is never right: here even lengths are.
  by_length = Verifier(lambda text, _: len(text) % 2)
  monkeypatch.setitem(VERIFIERS, "arithmetic", by_length)
  flags = ["--prompts=6", "--samples=8", "--group-sizes=4", "--steps", "0", "40"]
  flags += ["--token-group-size=4", "--shuffles=1", "--chunk=5"]
  assert command_line.main(["variance", str(run), *flags]) == 0
  shown = capsys.readouterr().out
  for word in ("step 0, reward 0.", "step 40", "opo_loo", "optimal_token", "within a"):
    assert word in shown
  rows = json.loads((run / "variance.json").read_text())["policies"]
  assert [row["step"] for row in rows] == [0, 40]
  for row in rows:
    assert list(row["ratios"]["4"]) == list(variance.ROWS)
    assert row["ratios"]["4"]["rloo"]["error"] == [1.0, 1.0, 1.0]
    assert row["tokens"]["4"]["optimal_token"]["error"][0] != 1.0
    assert json.dumps(row, allow_nan=False)
  assert (run / "figures" / "variance.png").stat().st_size > 10_000


def test_step_without_checkpoint_is_refused_in_one_line(run, capsys):
  assert command_line.main(["variance", str(run), "--steps", "7"]) == 2
  error = capsys.readouterr().err
  assert "no checkpoint of step 7; there are 0 (the start) and [20, 40]" in error
  assert error.count("\n") == 1


# The page -----------------------------------------------------------------------


def page_and_result():
  docs = pathlib.Path(__file__).parents[1] / "docs"
  spec = importlib.util.spec_from_file_location(
    "make_variance", docs / "make_variance.py"
  )
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  result = json.loads(script.RESULT.read_text())
  return (docs / "variance.md").read_text(), script.tables(result), result


def test_tables_of_the_page_are_those_of_the_result_file():
  page, tables, _ = page_and_result()
  assert page.endswith("\n\n" + tables + "\n")
  assert tables.count("\n\n") >= 6


def test_claims_of_the_page_hold_in_the_result_file():
  page, _, result = page_and_result()
  start, middle, end = result["policies"]
  for K in ("4", "8", "16", "32"):
    assert 1.35 < start["ratios"][K]["opo_loo"]["error"][0] < 1.5
    assert start["ratios"][K]["reinforce"]["error"][2] < 1.4
    for row in (middle, end):
      assert abs(row["ratios"][K]["opo_loo"]["error"][0] - 1) < 0.01
  assert round(start["alpha"], 2) == 0.19
  dearer = [
    row["score/squared_norm_wrong"] / row["score/squared_norm_right"]
    for row in (middle, end)
  ]
  assert [round(ratio) for ratio in dearer] == [139, 152]
  assert start["score/squared_norm_wrong"] > 2 * start["score/squared_norm_right"]
  assert start["response_length/wrong"] < start["response_length/right"]
  within = [row["fits"]["length"]["within"] for row in (start, middle, end)]
  assert max(within[1]["slope_high"], within[2]["slope_high"]) < 0
  assert within[0]["r2"] > 0.2 and max(within[1]["r2"], within[2]["r2"]) < 1 / 16
  for row in (start, middle, end):
    assert 0.86 <= row["fits"]["energy"]["within"]["r2"] < 0.995
    for ratios in row["ratios"].values():
      gap = ratios["energy_loo"]["error"][0] - ratios["exact_loo"]["error"][0]
      assert abs(gap) < 0.07
  gains = [row["ratios"]["8"]["energy_loo"]["error"] for row in (start, middle, end)]
  assert [round(1 - gain[0], 2) for gain in gains] == [0.21, 0.13, 0.06]
  assert gains[1][2] < 1 < gains[2][2]
  largest = [row["ratios"]["32"]["energy_loo"]["error"] for row in (start, middle, end)]
  assert [round(1 - gain[0], 2) for gain in largest] == [0.24, 0.61, 0.33]
  assert largest[1][2] < 1 and largest[2][2] < 1
  floors = [row["ratios"]["8"]["exact_all"]["error"][0] for row in (start, middle, end)]
  assert 0.48 < floors[0] < 0.52 and max(floors[1:]) < 1 / 12
  noise = [start["ratios"]["8"][name]["noise"][0] for name in ("energy", "exact")]
  noise.append(start["tokens"]["8"]["optimal_token"]["noise"][0])
  assert [round(value, 2) for value in noise] == [0.59, 0.46, 0.8]
  noise = [middle["ratios"]["8"][name]["noise"][0] for name in ("energy", "exact")]
  assert [round(1 / value) for value in noise] == [13, 15]
  ends = end["ratios"]["8"]["energy"]["noise"]
  assert ends[1] < 0.5 and ends[2] > 1
  reinforce = [row["ratios"]["8"]["reinforce"]["error"][0] for row in (middle, end)]
  assert 0.14 < reinforce[0] < 1 / 6 and 0.25 < reinforce[1] < 0.28
  assert f"commit {result['training commit'][:7]}." in page

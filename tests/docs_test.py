"""The pages keep their word: their code runs as printed, and learns what they say."""

import contextlib
import doctest
import functools
import inspect
import io
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from opo_jax import advantages, evaluation, logprobs, losses
from opo_jax.evaluation import diversity

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LOOPS = ("pytrees", "linen", "nnx", "equinox")
LETTERS, ROWS, MAX_TOKENS = 7, 112, 12


def blocks(page):
  """(line number, language, code) of each fenced block."""
  text = page.read_text()
  for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.M):
    yield text[: match.start()].count("\n") + 2, match[1], match[2]


def run(page):
  """Runs a page's Python from top to bottom: its names and what it printed."""
  names, output = {"__name__": page.stem}, io.StringIO()
  with contextlib.redirect_stdout(output):
    for line, language, code in blocks(page):
      if language != "python":
        continue
      where = f"{page.name}, line {line}"
      if ">>>" in code:
        test = doctest.DocTestParser().get_doctest(code, names, where, where, line)
        report = io.StringIO()
        runner = doctest.DocTestRunner(verbose=False)
        failed = runner.run(test, out=report.write, clear_globs=False).failed
        assert not failed, report.getvalue()
        names.update(test.globs)
      else:
        # Empty lines before it: a traceback names the page's line.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
  return names, output.getvalue()


@functools.cache
def loop(name):
  return run(ROOT / "docs" / f"{name}.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs_as_printed(page):
  loop(page.stem) if page.stem in LOOPS else run(page)


@pytest.mark.parametrize(
  ("code", "error"),
  [
    ("import jax\nassert jax.no_such_name", AttributeError),
    (">>> 1 + 1\n3", AssertionError),
  ],
)
def test_a_page_with_a_broken_block_fails(tmp_path, code, error):
  page = tmp_path / "page.md"
  page.write_text(f"# A page\n\n```python\nx = 1\n```\n\n```python\n{code}\n```\n")
  with pytest.raises(error):
    run(page)


def test_a_block_knows_the_names_of_those_above_it(tmp_path):
  page = tmp_path / "page.md"
  page.write_text("```python\nx = 1\n```\n\n```python\n>>> x + 1\n2\n>>> y = 3\n```\n")
  assert run(page)[0]["y"] == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_on_a_page_is_short_and_of_a_language_that_is_run(page):
  for line, language, code in blocks(page):
    assert language in ("python", "text", "sh"), f"{page.name}, line {line}"
    lines = [text for text in code.splitlines() if text.strip()]
    assert len(lines) < 40, f"{page.name}, line {line}: {len(lines)} lines"
    assert max(map(len, lines)) <= 88, f"{page.name}, line {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
  for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
    if target.startswith("http"):
      continue
    file, _, heading = target.partition("#")
    linked = page.parent / file if file else page
    assert linked.exists(), target
    if heading:
      titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
      slugs = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
      assert heading in slugs, target


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_learns_what_its_page_says_in_the_steps_it_says(name):
  text = " ".join((ROOT / "docs" / f"{name}.md").read_text().split())
  low, high, steps = re.search(
    r"The mean reward goes from about (\S+) to above (\S+) in (\d+) steps\.", text
  ).groups()
  rewards = re.findall(r"^step \d+: mean reward (\S+)$", loop(name)[1], re.M)
  rewards = np.array(rewards, float)
  assert len(rewards) == int(steps) == 60
  assert abs(rewards[0] - float(low)) < 0.1
  assert rewards[-5:].min() > float(high)
  # Not seen in the curve: this task is learnt from sixty equal batches too.
  assert "jax.random.key(step)" in text


# What differs between the pages: where the parameters are, how a step's key becomes a
# batch, and the page's own step taken with plain SGD of rate 1, which makes it a
# gradient. (An Adam step would hide the gradient's scale.)


def parameters(name, names):
  return names["state"].params if name == "linen" else names[OF_PAGE[name]]


def sample(name, names, model, step):
  key = jax.random.key(step)
  if name == "equinox":
    vmapped = jax.vmap(names["sample"], (None, 0, 0))
    return vmapped(model, names["prompts"], jax.random.split(key, ROWS))
  return names["sample"](model, jax.random.split(key, MAX_TOKENS))


def pytrees_gradient(names, params, step, rewards):
  tokens, mask = sample("pytrees", names, params, step)
  return names["gradient"](params, tokens, mask, rewards)


def linen_gradient(names, params, step, rewards):
  sgd = optax.sgd(1.0)
  state = names["state"].replace(params=params, tx=sgd, opt_state=sgd.init(params))
  after, _ = names["train_step"](state, jax.random.key(step))
  return jax.tree.map(jnp.subtract, params, after.params)


def nnx_gradient(names, policy, step, rewards):
  after = jax.tree.map(jnp.copy, policy)
  optimizer = nnx.Optimizer(after, optax.sgd(1.0), wrt=nnx.Param)
  names["train_step"](after, optimizer, step)
  return jax.tree.map(jnp.subtract, policy, after)


def equinox_gradient(names, policy, step, rewards):
  names["optimizer"] = sgd = optax.sgd(1.0)
  keys = jax.random.split(jax.random.key(step), ROWS)
  after, *_ = names["train_step"](policy, sgd.init(policy), keys)
  return jax.tree.map(jnp.subtract, policy, after)


OF_PAGE = {"pytrees": "params", "nnx": "policy", "equinox": "policy"}
GRADIENTS = {
  "pytrees": pytrees_gradient,
  "linen": linen_gradient,
  "nnx": nnx_gradient,
  "equinox": equinox_gradient,
}


@functools.cache
def drawn(name):
  """The page's names, its policy with random parameters (far from uniform, far from
  certain), and what that samples in 200 steps: tokens and mask, [200, N, T]."""
  names = loop(name)[0]
  leaves, tree = jax.tree.flatten(parameters(name, names))
  rng = np.random.default_rng(0)
  leaves = [jnp.asarray(rng.normal(0, 0.45, x.shape), x.dtype) for x in leaves]
  model = jax.tree.unflatten(tree, leaves)
  many = jax.jit(jax.vmap(lambda step: sample(name, names, model, step)))
  return names, model, *map(np.asarray, many(jnp.arange(200)))


@pytest.mark.parametrize("name", LOOPS)
def test_the_mask_holds_the_end_token_and_nothing_after_it(name):
  _, _, (tokens, *_), (mask, *_) = drawn(name)
  assert tokens.shape == mask.shape == (ROWS, MAX_TOKENS)
  for row, marked in zip(tokens.tolist(), mask.tolist(), strict=True):
    length = row.index(0) + 1 if 0 in row else MAX_TOKENS
    assert marked == [True] * length + [False] * (MAX_TOKENS - length)


@pytest.mark.parametrize("name", LOOPS)
def test_the_learner_differentiates_the_distribution_that_was_sampled(name):
  """The first two tokens come as often as their log-probs say, letter by letter."""
  names, model, tokens, _ = drawn(name)
  letters = np.asarray(names["prompts"])
  counts = np.zeros((LETTERS, 8, 8))
  np.add.at(counts, (letters[None] - 1, tokens[..., 0], tokens[..., 1]), 1)
  first, second = jnp.divmod(jnp.arange(64), 8)

  def log_of_pair(first, second):
    pair = jnp.zeros((ROWS, MAX_TOKENS), int).at[:, 0].set(first).at[:, 1].set(second)
    return names["logprobs"](model, pair)[:, :2].sum(axis=1)

  logs = np.asarray(jax.jit(jax.vmap(log_of_pair))(first, second))  # [64, ROWS]
  rows = [int(np.flatnonzero(letters == 1 + letter)[0]) for letter in range(LETTERS)]
  probs = np.exp(logs[:, rows].T).reshape(LETTERS, 8, 8)
  np.testing.assert_allclose(probs.sum((1, 2)), 1, rtol=1e-5)
  expected = probs * counts.sum((1, 2), keepdims=True)
  often = expected > 20
  assert often.sum() > 100
  # Five standard deviations: of some 400 cells, none gets there by chance.
  deviation = (counts - expected)[often] / np.sqrt(expected * (1 - probs))[often]
  assert np.abs(deviation).max() < 5


@pytest.mark.parametrize("name", LOOPS)
def test_a_step_follows_the_gradient_written_out_row_by_row(name):
  names, model, (tokens, *_), (mask, *_) = drawn(name)
  prompts, lengths = np.asarray(names["prompts"]), mask.sum(1)
  rewards = np.array(
    [
      float(prompt in row[:length] and length < MAX_TOKENS)
      for row, prompt, length in zip(tokens, prompts, lengths, strict=True)
    ]
  )
  assert 0 < rewards.mean() < 1
  advantage = np.zeros(ROWS)
  for start in range(0, ROWS, 8):  # a prompt's eight responses
    group = slice(start, start + 8)
    baseline = (lengths[group] * rewards[group]).sum() / lengths[group].sum()
    advantage[group] = rewards[group] - baseline
  weights = jnp.asarray(advantage[:, None] * mask / mask.sum(), jnp.float32)

  def loss(model):
    return -(weights * names["logprobs"](model, jnp.asarray(tokens))).sum()

  expected = jax.tree.leaves(jax.jit(jax.grad(loss))(model))
  got = jax.tree.leaves(GRADIENTS[name](names, model, 0, rewards))
  assert max(float(jnp.abs(leaf).max()) for leaf in expected) > 1e-3
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-7)  # of a - (a - g)


PUBLIC = [
  function
  for room in (advantages, losses, logprobs, evaluation, diversity)
  for name, function in vars(room).items()
  if inspect.isfunction(function)
  and function.__module__ == room.__name__
  and not name.startswith("_")
]


@pytest.mark.parametrize(
  "function", PUBLIC, ids=lambda f: f"{f.__module__.split('.')[-1]}.{f.__name__}"
)
def test_a_public_function_shows_an_example(function):
  assert ">>>" in (function.__doc__ or "")

"""What the pages say holds: code runs as printed, links lead on, flags exist."""

import contextlib
import dataclasses
import doctest
import functools
import io
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from opo_jax import variance
from opo_jax.config import Config

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXPERIMENTS = sorted((ROOT / "experiments").glob("[a-z]*.py"))
# Files that name flags and other files; the code does so in docstrings and errors.
SOURCES = [
  *PAGES,
  *(ROOT / "experiments").glob("*.*"),
  *(ROOT / "launch").iterdir(),
  *(ROOT / "opo_jax").rglob("*.py"),
  *(ROOT / "benchmarks").rglob("*.py"),
  ROOT / "Makefile",
]
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
      where = f"{page.name}, line {line}"
      assert language in ("python", "text", "sh"), where  # else it would not be run
      if language != "python":
        continue
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
def test_every_block_of_a_page_runs_as_printed(page, request):
  if "as_text" in page.read_text():
    request.getfixturevalue("no_compilation_cache")
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


def test_links_lead_to_files_and_headings():
  lost = []
  for page in [*PAGES, ROOT / "experiments" / "README.md"]:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
      if target.startswith("http"):
        continue
      file, _, heading = target.partition("#")
      linked = page.parent / file if file else page
      if not linked.exists() or (heading and heading not in slugs(linked)):
        lost.append(f"{page.name}: {target}")
  assert not lost


def slugs(page):
  """The anchors of a page's headings, as GitHub makes them."""
  titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
  return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_every_source_file_that_is_named_exists():
  """Named with its folder: opo_jax/logprobs.py, rewards/pool.py."""
  lost = set()
  for path in filter(pathlib.Path.is_file, SOURCES):
    for name in re.findall(r"(?<![\w/.-])(?:\w+/)+[a-z]\w*\.py\b", path.read_text()):
      if not any((base / name).exists() for base in (ROOT, ROOT / "opo_jax")):
        lost.add(f"{path.relative_to(ROOT)}: {name}")
  assert not lost


def test_every_experiment_has_its_row():
  page = (ROOT / "experiments" / "README.md").read_text()
  rows = re.findall(r"^\| `(\w+)` \|", page, re.M)
  assert sorted(rows) == [path.stem for path in EXPERIMENTS]


# --- flags ---------------------------------------------------------------------------

# What `python -m opo_jax` takes besides, by command.
OWN = re.findall(r'"(--[a-z-]+)"', (ROOT / "opo_jax" / "__main__.py").read_text())


def flags(settings, prefix="--"):
  """Every flag over the fields of a dataclass, as tyro spells it."""
  names = set()
  for field in dataclasses.fields(settings):
    name = field.name.replace("_", "-")
    if dataclasses.is_dataclass(field.type):
      names |= flags(field.type, f"{prefix}{name}.")
      names.add(f"{prefix}{name}.*")  # all flags of a section, in a sentence
    else:
      names.add(f"{prefix}{name}")
      if field.type is bool:
        names.add(f"{prefix}no-{name}")
  return names


def unknown_flags(text):
  """The flags `--section.field` of a text that the config does not have."""
  text = re.sub(r".*-->.*", "", text)  # the arrows of a diagram
  named = re.findall(r"(?<![\w-])--[a-z][a-z-]*\.(?:[a-z][a-z0-9-]*|\*)", text)
  return sorted(set(named) - flags(Config))


def unknown_arguments(text):
  """What the `make` commands of a text name, and neither config nor command has."""
  experiments = [path.stem for path in EXPERIMENTS]
  _, *commands = re.split(r"\bmake (?=[a-z])", text.replace("\\\n", " "))
  for each in commands:
    line = each.split("\n\n")[0]  # to the next command, or the end of the paragraph
    command = re.match(r"[a-z-]*", line)[0]
    for name in re.findall(r"\bEXP=([a-z]\w*)", line):
      if name not in [*experiments, "name"]:  # any of them
        yield f"make {command} EXP={name}"
    known = flags(variance.Settings if command == "variance" else Config)
    for arguments in re.findall(r'\bARGS="([^"]*)"', line):
      given = re.findall(r"(?<![\w-])--[\w.-]+", arguments)
      for flag in sorted(set(given) - known - set(OWN)):
        yield f"make {command} {flag}"


def test_every_flag_that_is_named_exists():
  wrong = {}
  for path in filter(pathlib.Path.is_file, SOURCES):
    text = path.read_text()
    found = [*unknown_flags(text), *unknown_arguments(text)]
    if found:
      wrong[str(path.relative_to(ROOT))] = found
  assert not wrong


def test_a_flag_that_does_not_exist_is_found():
  text = """
    # make train EXP=quickstart [RUN=x] [ARGS="--steps 3 --rollout.no-gather-weights"]
    make train EXP=quickstart ARGS="--rollout.slots 3 \\
      --prompts 64 --reward.nothing"
    make variance RUN=x ARGS="--prompts 64 --seeds 3"    # not `--model.shape`
    make train EXP=none
    """
  assert unknown_flags(text) == ["--model.shape", "--reward.nothing"]
  assert list(unknown_arguments(text)) == [
    "make train --prompts",
    "make train --reward.nothing",
    "make variance --seeds",
    "make train EXP=none",
  ]


# --- the loops -----------------------------------------------------------------------


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
  one = jax.jit(lambda step: sample(name, names, model, step))
  tokens, mask = zip(*map(one, range(200)), strict=True)
  return names, model, np.stack(tokens), np.stack(mask)


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

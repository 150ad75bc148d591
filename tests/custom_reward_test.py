"""A user's own reward is found by name, runs under the limits, and may fail."""

import sys

import numpy as np
import pytest

from opo_jax.data.prompts import Problem
from opo_jax.evaluation.statistics import Response
from opo_jax.rewards import RewardPool, shaping
from opo_jax.rewards.custom import CustomReward
from opo_jax.run import verifier

OWN = """
from opo_jax.rewards import batched, graded

constant = 3

def reward(problem, response):
  if response == "hang":
    while True:
      pass
  if response == "fail":
    raise LookupError(f"no rule for {problem.id}")
  return len(response) + float(problem.answer)

@batched
def together(problems, responses):
  return [len(responses) for problem in problems]

@graded
@batched
def brevity(problems, responses):
  return [-len(response) for response in responses]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
  name = f"own_{tmp_path.name.replace('-', '_')}"
  (tmp_path / f"{name}.py").write_text(OWN)
  monkeypatch.syspath_prepend(tmp_path)
  yield name
  sys.modules.pop(name, None)


PROBLEMS = [Problem(f"p/{i}", "q", str(i)) for i in range(4)]


def test_own_reward_gets_the_problem_and_its_failures_are_unscorable(own):
  with RewardPool(CustomReward(f"{own}:reward"), workers=2, timeout_s=2.0) as pool:
    assert pool.score(["ab", "fail", "hang", ""], PROBLEMS) == [2.0, None, None, 3.0]
    errors = dict(pool.last_errors)
    assert errors[1] == "raised LookupError: no rule for p/1"
    assert errors[2] == "timed out after 2 s"


def test_own_batched_reward_is_called_once_for_many(own):
  with RewardPool(CustomReward(f"{own}:together"), workers=1, timeout_s=5.0) as pool:
    assert pool.score(["a"] * 40, PROBLEMS * 10) == [10.0] * 40


def test_names_that_lead_nowhere_say_what_there_is(own):
  with pytest.raises(ValueError, match=r"no function 'rewards'.*\['reward'\]"):
    verifier(f"{own}:rewards")
  with pytest.raises(ValueError, match="no function 'constant'"):
    verifier(f"{own}:constant")
  with pytest.raises(ValueError, match=r"does not import \(ModuleNotFoundError"):
    verifier("no_such_module:reward")
  with pytest.raises(ValueError, match=r"did you mean math .*package\.module:function"):
    verifier("maths")
  assert verifier(f"{own}:together").batched and verifier("math").warm_up


def test_own_reward_says_whether_it_grades(own):
  kinds = {
    name: verifier(f"{own}:{name}") for name in ("reward", "together", "brevity")
  }
  assert {name: (kind.batched, kind.graded) for name, kind in kinds.items()} == {
    "reward": (False, False), "together": (True, False), "brevity": (True, True),
  }  # fmt: skip


# --- In a run ---


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
  """A run's rollouts of 8 prompts, 4 each; the rows 0, 5, 10, … are cut off."""
  import dataclasses

  import jax.numpy as jnp
  from loop_test import small_config

  from opo_jax.run import Run

  with Run(small_config(), tmp_path_factory.mktemp("run")) as run:
    asked = [Problem(str(i), "a1b2c3", "1") for i in range(8)]
    rollouts = run.sample(run.parts.start(run.parts.init()), asked, 1)
    finished = jnp.arange(32) % 5 > 0
    yield run, asked, dataclasses.replace(rollouts, finished=finished)


def with_reward(run, **changes):
  import copy
  import dataclasses

  other = copy.copy(run)
  other.__dict__.pop("verifier", None)
  reward = dataclasses.replace(run.config.reward, **changes)
  other.config = dataclasses.replace(run.config, reward=reward)
  return other


def test_truncated_responses_earn_what_was_chosen_and_it_is_logged(scored):
  run, asked, rollouts = scored
  cut = ~np.asarray(rollouts.finished)
  for choice in ("incorrect", "scored", "left_out"):
    own = with_reward(run, truncated=choice)
    own.verifier = RewardPool(lambda a, b: 1.0, workers=0, timeout_s=1.0)
    texts, verified = own.score(rollouts, asked)
    rewards, metrics = own.shape(rollouts, texts, verified)
    assert (rewards[~cut] == 1.0).all()
    assert metrics["reward/unscorable_fraction"] == 0
    if choice == "left_out":
      assert np.isnan(rewards[cut]).all()
      assert metrics["reward/left_out_fraction"] == cut.mean()
    else:
      assert (rewards[cut] == (choice == "scored")).all()
      assert metrics["reward/truncated_mean"] == float(choice == "scored")


def test_pieces_are_added_by_weight_and_logged_by_name(scored):
  run, _, rollouts = scored
  lengths = np.asarray(rollouts.lengths)
  own = with_reward(
    run,
    format_weight=0.5,
    overlong_weight=2.0,
    overlong_tokens=20,
    repetition_weight=0.25,
    repetition_ngram=2,
  )
  verified = np.zeros(32, np.float32)
  verified[3] = np.nan
  texts = [r"\boxed{1}" if i % 2 else "1" for i in range(32)]
  rewards, metrics = own.shape(rollouts, texts, verified)
  limit = own.config.rollout.max_new_tokens
  overlong = np.array(
    [shaping.soft_overlong(int(n), max_tokens=limit, buffer_tokens=20) for n in lengths]
  )
  repeated = np.array(
    [
      shaping.repetition(row[:n].tolist(), ngram=2)
      for row, n in zip(np.asarray(rollouts.tokens), lengths, strict=True)
    ]
  )
  expected = verified + 0.5 * (np.arange(32) % 2) + 2 * overlong + 0.25 * repeated
  np.testing.assert_allclose(rewards, expected, rtol=1e-6)
  assert metrics["reward/format"] == 0.5
  assert metrics["reward/overlong"] == pytest.approx(overlong.mean())
  assert metrics["reward/repetition"] == pytest.approx(repeated.mean())
  assert metrics["reward/unscorable_fraction"] == 1 / 32
  assert overlong.min() < 0 and repeated.min() < 0
  # What the baseline weighs with is untouched.
  np.testing.assert_array_equal(lengths, np.asarray(rollouts.lengths))


def test_an_unscorable_answer_is_shown_with_its_problem(scored, capsys):
  run, asked, rollouts = scored

  def fails_once(response, reference, calls=[]):  # noqa: B006
    calls.append(response)
    if len(calls) == 1:
      raise LookupError("no rule")
    return 1.0

  own = with_reward(run)
  own.verifier = RewardPool(fails_once, workers=0, timeout_s=1.0)
  own.score(rollouts, asked)
  assert "0: raised LookupError: no rule" in capsys.readouterr().out


def test_answers_to_an_own_reward_that_grades_are_evaluated_by_their_scores(
  scored, own
):
  run, _, _ = scored
  answers = [
    Response("p", i, "so", "", None, reward, 2, True)
    for i, reward in enumerate((0.2, 3.0))
  ]
  for name, score in (("reward", "pass@1"), ("brevity", "reward_score")):
    graded = with_reward(run, verifier=f"{own}:{name}", workers=1)
    graded._verify = verifier(f"{own}:{name}")
    row = graded.summary(answers, answers)
    assert {key for key in ("pass@1", "reward_score") if key in row} == {score}

"""A user's own reward is found by name, runs under the limits, and may fail."""

import dataclasses
import sys

import numpy as np
import pytest
from loop_test import small_config

from opo_jax import build
from opo_jax.data.prompts import Problem
from opo_jax.evaluation import Response
from opo_jax.evaluation.evaluator import Evaluator
from opo_jax.rewards import RewardPool, shaping
from opo_jax.rewards.custom import CustomReward
from opo_jax.run import Run
from opo_jax.scorer import VerifierScorer, find_verifier, on_host, shape_rewards

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
    find_verifier(f"{own}:rewards")
  with pytest.raises(ValueError, match="no function 'constant'"):
    find_verifier(f"{own}:constant")
  with pytest.raises(ValueError, match=r"does not import \(ModuleNotFoundError"):
    find_verifier("no_such_module:reward")
  with pytest.raises(ValueError, match=r"did you mean math .*package\.module:function"):
    find_verifier("maths")
  assert find_verifier(f"{own}:together").verify.batched
  assert find_verifier("math").verify.warm_up


def test_own_reward_says_whether_it_grades(own):
  kinds = {
    name: find_verifier(f"{own}:{name}").verify
    for name in ("reward", "together", "brevity")
  }
  assert {name: (kind.batched, kind.graded) for name, kind in kinds.items()} == {
    "reward": (False, False), "together": (True, False), "brevity": (True, True),
  }  # fmt: skip


# --- In a run ---


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
  """A run's rollouts of 8 prompts, 4 each; the rows 0, 5, 10, … are cut off."""
  run = Run(small_config(), tmp_path_factory.mktemp("run"))
  problems = [Problem(str(i), "a1b2c3", "1") for i in range(8)]
  rollouts = build.make_sampler(run.config).sample(
    run.init_policy(), run.encode(problems), build.rollout_params(run.config), seed=1
  )
  rollouts = on_host(rollouts, run.mesh)
  return run, problems, dataclasses.replace(rollouts, finished=np.arange(32) % 5 > 0)


def make_scorer(run, verify=None, **changes):
  """The run's scorer with other settings, its function in this process."""
  scorer = VerifierScorer(
    dataclasses.replace(run.config.reward, **changes),
    run.tokenizer,
    mesh=run.mesh,
    max_new_tokens=run.config.rollout.max_new_tokens,
    terminal=run.terminal,
  )
  if verify:
    scorer.pool = RewardPool(verify, workers=0, timeout_s=1.0)
  return scorer


def test_truncated_responses_earn_what_was_chosen_and_it_is_logged(scored):
  run, problems, rollouts = scored
  cut = ~rollouts.finished
  for choice in ("incorrect", "scored", "masked"):
    scorer = make_scorer(run, lambda a, b: 1.0, truncated=choice)
    scorer.begin(problems)
    rewards = scorer.finish(rollouts)
    assert (rewards.values[~cut] == 1.0).all()
    assert rewards.metrics["reward/unscorable_fraction"] == 0
    if choice == "masked":
      assert np.isnan(rewards.values[cut]).all()
      assert rewards.metrics["reward/masked_fraction"] == cut.mean()
    else:
      assert (rewards.values[cut] == (choice == "scored")).all()
      assert rewards.metrics["reward/truncated_mean"] == float(choice == "scored")


def test_terms_are_added_by_weight_and_logged_by_name(scored):
  run, _, rollouts = scored
  lengths, limit = rollouts.lengths, run.config.rollout.max_new_tokens
  settings = dataclasses.replace(
    run.config.reward,
    format_weight=0.5,
    overlong_weight=2.0,
    overlong_tokens=20,
    repetition_weight=0.25,
    repetition_ngram=2,
  )
  verified = np.zeros(32, np.float32)
  verified[3] = np.nan
  texts = [r"\boxed{1}" if i % 2 else "1" for i in range(32)]
  rewards, metrics = shape_rewards(rollouts, texts, verified, settings, run.mesh, limit)
  overlong = np.array(
    [shaping.soft_overlong(int(n), max_tokens=limit, buffer_tokens=20) for n in lengths]
  )
  repeated = np.array(
    [
      shaping.repetition(row[:n].tolist(), ngram=2)
      for row, n in zip(rollouts.tokens, lengths, strict=True)
    ]
  )
  expected = verified + 0.5 * (np.arange(32) % 2) + 2 * overlong + 0.25 * repeated
  np.testing.assert_allclose(rewards, expected, rtol=1e-6)
  assert metrics["reward/format"] == 0.5
  assert metrics["reward/overlong"] == pytest.approx(overlong.mean())
  assert metrics["reward/repetition"] == pytest.approx(repeated.mean())
  assert metrics["reward/unscorable_fraction"] == 1 / 32
  assert overlong.min() < 0 and repeated.min() < 0


def test_an_unscorable_response_is_shown_with_its_problem(scored, capsys):
  run, problems, rollouts = scored

  def fails_once(response, reference, calls=[]):  # noqa: B006
    calls.append(response)
    if len(calls) == 1:
      raise LookupError("no rule")
    return 1.0

  scorer = make_scorer(run, fails_once)
  scorer.begin(problems)
  scorer.finish(rollouts)
  assert "0: raised LookupError: no rule" in capsys.readouterr().out


def test_graded_rewards_of_a_user_are_evaluated_by_their_scores(scored, own):
  run, _, _ = scored
  responses = [
    Response("p", i, "so", "", None, reward, 2, True)
    for i, reward in enumerate((0.2, 3.0))
  ]
  for name, score in (("reward", "pass@1"), ("brevity", "reward_score")):
    scorer = make_scorer(run, verifier=f"{own}:{name}", workers=1)
    row = Evaluator(run, None, scorer).summary(responses, responses)
    assert {key for key in ("pass@1", "reward_score") if key in row} == {score}

"""pass@k equals brute force; the interval covers; what is unscorable does not count."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opo_jax.evaluation import KS, bootstrap_interval, evaluate, pass_at_k
from opo_jax.rollouts import Rollouts


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_equals_the_share_of_all_subsets_with_a_right_one(n):
  for correct in range(n + 1):
    samples = [1] * correct + [0] * (n - correct)
    for k in range(1, n + 1):
      subsets = list(itertools.combinations(samples, k))
      expected = sum(any(subset) for subset in subsets) / len(subsets)
      assert pass_at_k(n, correct, k) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_one_right_of_eight_passes_at_eight_for_certain():
  # Drawing 8 of them with replacement, as a biased bootstrap does: 1 - (7/8)^8 = 0.656.
  assert pass_at_k(8, 1, 8) == 1.0
  # 1 - C(7, 4) / C(8, 4) = 1 - 35 / 70
  assert pass_at_k(8, 1, 4) == 0.5


@given(n=st.integers(1, 300), data=st.data())
def test_pass_at_k_is_a_probability_that_grows_with_k_and_with_right_answers(n, data):
  k = data.draw(st.integers(1, n))
  correct = data.draw(st.integers(0, n))
  value = pass_at_k(n, correct, k)
  assert 0.0 <= value <= 1.0
  assert pass_at_k(n, correct, 1) == pytest.approx(correct / n, abs=1e-12)
  assert (value == 0.0) == (correct == 0)
  assert (value == 1.0) == (correct > n - k) or value == pytest.approx(1.0)
  if k < n:
    assert pass_at_k(n, correct, k + 1) >= value
  if correct < n:
    assert pass_at_k(n, correct + 1, k) >= value


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_numbers_out_of_range_are_refused(n, c, k):
  with pytest.raises(ValueError, match=f"got {c} correct of {n} samples and k = {k}"):
    pass_at_k(n, c, k)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
  # 200 data sets of 60 problems: the count has a standard error of 0.015, and the
  # percentile bootstrap of so few problems is a little short of 0.95.
  rng = np.random.default_rng(5)
  covered = 0
  for per_problem in rng.beta(0.6, 1.4, size=(200, 60)):
    low, high = bootstrap_interval(per_problem, resamples=500)
    covered += low <= 0.3 <= high
  assert 0.89 <= covered / 200 <= 0.99


def test_interval_is_that_of_the_mean_over_problems():
  # Normal approximation: mean +- z * std / sqrt(n), within a tenth of its width.
  values = np.random.default_rng(6).normal(2.0, 3.0, size=400)
  for confidence, z in ((0.95, 1.960), (0.5, 0.674)):
    low, high = bootstrap_interval(values, confidence=confidence)
    half = z * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=half / 5)
    assert high == pytest.approx(values.mean() + half, abs=half / 5)


def test_interval_is_the_same_every_time_and_leaves_the_global_generator_alone():
  values = [0.0, 1.0, 0.25, 0.5, 1.0]
  np.random.seed(3)
  first = bootstrap_interval(values)
  after_first = np.random.random()
  np.random.seed(3)
  assert np.random.random() == after_first
  assert bootstrap_interval(values) == first
  assert 0.0 <= first[0] < np.mean(values) < first[1] <= 1.0


def test_interval_of_equal_problems_is_a_point():
  assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)


# --- evaluate ---


def rollouts_of(prompts, samples, lengths, finished):
  rows = len(prompts) * samples
  width = max(lengths)
  return Rollouts(
    prompts=np.zeros((len(prompts), 3), np.int32),
    prompt_lengths=np.full(len(prompts), 3, np.int32),
    tokens=np.zeros((rows, width), np.int32),
    logprobs=np.zeros((rows, width), np.float32),
    sampling_logprobs=np.zeros((rows, width), np.float32),
    mask=np.arange(width) < np.array(lengths)[:, None],
    lengths=np.array(lengths, np.int32),
    prompt_ids=np.repeat(np.arange(len(prompts)), samples).astype(np.int32),
    finished=np.array(finished),
    temperature=np.float32(0.6),
    version=np.int32(7),
  )


def measure(rewards, *, lengths=None, finished=None):
  """`evaluate` where problem i's answers earn `rewards[i]`."""
  rewards = np.array(rewards, np.float32)
  num_problems, samples = rewards.shape
  prompts = [[1, 2, 3]] * num_problems
  if lengths is None:
    lengths = [4] * rewards.size
  if finished is None:
    finished = [True] * rewards.size
  seen = []

  def sample(asked):
    seen.append(asked)
    return rollouts_of(asked, samples, lengths, finished)

  result = evaluate(
    sample, lambda rollouts: rewards.ravel(), prompts, samples_per_problem=samples
  )
  assert seen == [prompts]
  return result


def test_pass_at_k_is_averaged_over_problems():
  # Right of 4: 1, 4, 0. pass@1 = (1/4 + 1 + 0) / 3, pass@2 = (1/2 + 1 + 0) / 3,
  # pass@4 = 2/3. All answers in one pot would give pass@2 = 1 - C(7,2)/C(12,2) = 0.68.
  result = measure([[0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
  assert result["pass@1"] == pytest.approx(5 / 12)
  assert result["pass@2"] == pytest.approx(0.5)
  assert result["pass@4"] == pytest.approx(2 / 3)
  # Other k need more samples and are absent, not 0.
  assert {name for name in result if name.startswith("pass@")} == {
    f"pass@{k}{end}" for k in (1, 2, 4) for end in ("", "_low", "_high")
  }


def test_interval_is_over_problems_and_not_over_samples():
  # Four problems always right, four never: [0, 1]-ish, whatever the samples.
  result = measure([[1.0] * 16] * 4 + [[0.0] * 16] * 4)
  for k in KS:
    low, high = bootstrap_interval([1.0] * 4 + [0.0] * 4)
    assert (result[f"pass@{k}_low"], result[f"pass@{k}_high"]) == (low, high)
  assert low < 0.2 and high > 0.8


def test_lengths_and_truncation_are_means_over_responses():
  result = measure(
    [[1, 0], [0, 0]], lengths=[1, 6, 2, 9], finished=[True, True, True, False]
  )
  assert result["response_length"] == 4.5
  assert result["truncated_fraction"] == 0.25
  assert result["unscorable_fraction"] == 0.0


def test_unscorable_samples_are_left_out_and_counted():
  # Problem 0: 1 of 2 right, problem 1: 2 of 3, problem 2 has no scorable answer.
  # NaN taken as wrong would give pass@1 = (1/4 + 2/4 + 0) / 3 = 0.25.
  nan = np.nan
  result = measure([[1, nan, 0, nan], [1, 1, 0, nan], [nan] * 4])
  assert result["unscorable_fraction"] == pytest.approx(7 / 12)
  assert result["pass@1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
  assert result["pass@2"] == 1.0
  assert "pass@4" not in result
  assert np.isfinite(list(result.values())).all()


def test_evaluation_without_a_scorable_answer_has_no_pass_at_k():
  result = measure([[np.nan, np.nan]])
  assert result["unscorable_fraction"] == 1.0
  assert not [name for name in result if name.startswith("pass@")]


def test_an_answer_is_right_above_a_half():
  # A penalty is wrong, and so is half a point.
  assert measure([[0.5, -1.0, 0.51, 2.0]])["pass@1"] == 0.5


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(5)))
def test_order_of_problems_and_samples_does_not_matter_to_pass_at_k(order):
  rewards = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, np.nan], [1, 1, 0]])
  shuffled = measure(rewards[order][:, [2, 0, 1]])
  for name, value in measure(rewards).items():
    if not name.endswith(("_low", "_high")):
      assert shuffled[name] == pytest.approx(value)

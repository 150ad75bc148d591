"""Scores equal brute force, ignore the unscorable, and resume without resampling."""

import dataclasses
import itertools
import json
import math
import multiprocessing
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opo_jax.evaluation import (
  KS,
  Response,
  bootstrap_interval,
  collect,
  diversity,
  majority_at_k,
  pass_at_k,
  pass_rates,
  per_problem,
  read_responses,
  summarise,
  table,
)
from opo_jax.rewards import normal_answer


def test_pass_at_k_equals_the_fraction_of_subsets_with_a_correct_sample():
  wrong = {}
  counts = [(n, correct) for n in range(1, 8) for correct in range(n + 1)]
  for n, correct in counts:
    samples = [1] * correct + [0] * (n - correct)
    for k in range(1, n + 1):
      subsets = list(itertools.combinations(samples, k))
      expected = sum(any(subset) for subset in subsets) / len(subsets)
      if pass_at_k(n, correct, k) != pytest.approx(expected, rel=1e-12, abs=1e-12):
        wrong[n, correct, k] = pass_at_k(n, correct, k), expected
  assert not wrong


def test_one_correct_of_eight_passes_at_eight_with_certainty():
  # Drawing 8 of them with replacement, as a biased bootstrap does: 1 - (7/8)^8 = 0.656.
  assert pass_at_k(8, 1, 8) == 1.0
  # 1 - C(7, 4) / C(8, 4) = 1 - 35 / 70
  assert pass_at_k(8, 1, 4) == 0.5


@given(n=st.integers(1, 300), data=st.data())
def test_pass_at_k_is_a_probability_that_grows_with_k_and_with_correct_samples(n, data):
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


def test_numbers_out_of_range_are_refused():
  for n, c, k in [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)]:
    with pytest.raises(ValueError, match=f"got {c} correct of {n} samples and k = {k}"):
      pass_at_k(n, c, k)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
  # 200 data sets of 60 problems: the count has a standard error of 0.015, and the
  # percentile bootstrap of so few problems is a little short of 0.95.
  rng = np.random.default_rng(5)
  covered = 0
  for rewards in rng.beta(0.6, 1.4, size=(200, 60)):
    low, high = bootstrap_interval(rewards, resamples=500)
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


# --- majority ---


def winner_by_hand(subset):
  """The chance that the most frequent answer of these (answer, right) is right."""
  votes = Counter(answer for answer, _ in subset if answer is not None)
  most = max(votes.values(), default=0)
  tied = [answer for answer, count in votes.items() if count == most]
  return sum(RIGHT[answer] for answer in tied) / len(tied) if tied else 0.0


RIGHT = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0}


@given(
  answers=st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=8),
  data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_majority_equals_the_mean_over_all_subsets(answers, data):
  k = data.draw(st.integers(1, len(answers)))
  samples = [(answer, RIGHT.get(answer, 0.0)) for answer in answers]
  subsets = list(itertools.combinations(samples, k))
  expected = sum(map(winner_by_hand, subsets)) / len(subsets)
  right = [value > 0.5 for _, value in samples]
  assert majority_at_k(answers, right, k) == pytest.approx(expected, abs=1e-12)


def test_majority_by_hand():
  # 4 4 5 6: of the four subsets of three, {4 4 5} and {4 4 6} are won by 4, and in
  # {4 5 6}, twice, three tie: 2/4 + 2/4 * 1/3.
  right = [True, True, False, False]
  assert majority_at_k(["4", "4", "5", "6"], right, 3) == pytest.approx(2 / 3)
  # All four: 4 has two votes of four. The first of the tied would win with k = 2, too.
  assert majority_at_k(["4", "4", "5", "6"], right, 4) == 1.0
  assert majority_at_k(["5", "4"], [False, True], 2) == 0.5
  # An answer that is correct once in two counts half: truncated, it earned nothing.
  assert majority_at_k(["4", "4"], [True, False], 2) == 0.5


def test_a_response_without_an_answer_casts_no_vote():
  # As a vote, None would win with two of three.
  assert majority_at_k([None, None, "4"], [False, False, True], 3) == 1.0
  assert majority_at_k([None, None], [False, False], 2) == 0.0
  # Subsets of two: {- -} has no answer, the other two of three do.
  assert majority_at_k([None, None, "4"], [False, False, True], 2) == pytest.approx(
    2 / 3
  )


@given(k=st.integers(1, 64), data=st.data())
@settings(max_examples=20, deadline=None)
def test_winning_chances_of_all_answers_add_up_to_that_of_any_vote(k, data):
  answers = data.draw(
    st.lists(st.sampled_from([*map(str, range(20)), None]), min_size=64, max_size=64)
  )
  shares = [
    majority_at_k(answers, [answer == name for answer in answers], k)
    for name in set(answers) - {None}
  ]
  silent = answers.count(None)
  expected = 1 - math.comb(silent, k) / math.comb(64, k)
  assert sum(shares) == pytest.approx(expected, abs=1e-9)
  assert all(0 <= share <= 1 + 1e-12 for share in shares)


def test_majority_out_of_range_is_refused():
  for k in (0, 3):
    with pytest.raises(ValueError, match=f"k = {k} for 2 answers"):
      majority_at_k(["4", "5"], [True, False], k)


def test_a_vote_is_the_normalised_final_answer():
  cases = [
    (r"The sum is \boxed{ 12 } and so \boxed{1,\!234}.", "1,234"),
    ("3 + 4 = 7, so the answer is $7.", "7"),
    ("Twelve halves.\n#### 6\n", "6"),
    (r"The answer is \textbf{(C)}.", "C"),
    (r"She is \boxed{\text{ Evelyn }}", "evelyn"),
    ("The answer is x = 5", "x=5"),
    ("So:\nx = 5", None),
    ("I do not know which it is", None),
    (r"\boxed{12", None),
    ("", None),
    (r"\boxed{" + "1" * 501 + "}", None),
  ]
  found = {response: normal_answer(response) for response, _ in cases}
  assert not {r: found[r] for r, answer in cases if found[r] != answer}


def normal_answers_of_megabytes(pieces):
  for piece in pieces:
    normal_answer(piece * (10**6 // len(piece)))


def test_a_vote_in_a_megabyte_does_not_hang():
  # A second together; a regular expression that backtracks would take days.
  pieces = [r"\boxed{", "answer is ", "#### 7 ", "{}", "$$ "]
  process = multiprocessing.get_context("spawn").Process(
    target=normal_answers_of_megabytes, args=(pieces,)
  )
  process.start()
  process.join(120)
  hangs = process.is_alive()
  process.kill()
  process.join()
  assert not hangs and process.exitcode == 0


# --- diversity ---


def test_a_repeated_ngram_is_one_that_occurred_before():
  # Words a b c d a b c d: five 4-grams, the last equals the first.
  assert diversity.repetition("a b c d a b c d") == pytest.approx(1 / 5)
  assert diversity.repetition("a b c d e f g h") == 0.0
  assert diversity.repetition("one two three") == 0.0, "too short to repeat anything"
  assert diversity.repetition("go " * 103) == pytest.approx(1 - 1 / 100)


def test_words_do_not_depend_on_a_tokenizer():
  assert diversity.words("a3=3 Überall\n\\frac{12}5") == [
    *("a", "3", "=", "3", "Überall", "\\", "frac", "{", "1", "2", "}", "5")
  ]


def test_distinct_ngrams_are_counted_over_all_responses_to_a_problem():
  # a b a b and a b c: bigrams ab ba ab, ab bc: three different ones of five.
  assert diversity.distinct_n(["a b a b", "a b c"], 2) == pytest.approx(3 / 5)
  assert diversity.distinct_n(["a b a b", "a b c"], 1) == pytest.approx(3 / 7)
  assert diversity.distinct_n(["", "a"], 2) == 1.0


def bleu(response, others):
  """BLEU-4 by its definition, n-gram by n-gram."""
  product, orders = 1.0, min(4, len(response))
  for n in range(1, orders + 1):
    grams = [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]
    found = 0
    for gram in set(grams):
      most = max(
        sum(tuple(other[i : i + n]) == gram for i in range(len(other) - n + 1))
        for other in others
      )
      found += min(grams.count(gram), most)
    product *= (found or 0.1) / len(grams)
  nearest = min(map(len, others), key=lambda r: (abs(r - len(response)), r))
  brevity = min(1.0, math.exp(1 - nearest / len(response)))
  return brevity * product ** (1 / orders)


@given(
  st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=9), min_size=2, max_size=5
  )
)
@settings(max_examples=100, deadline=None)
def test_self_bleu_equals_its_definition(responses):
  expected = [
    bleu(response, responses[:i] + responses[i + 1 :])
    for i, response in enumerate(responses)
  ]
  got = diversity.self_bleu([" ".join(response) for response in responses])
  assert got == pytest.approx(np.mean(expected), rel=1e-9)


def test_self_bleu_of_equal_and_of_foreign_responses():
  assert diversity.self_bleu(["#1", "#1", "#1"]) == 1.0, (
    "short responses can be equal too"
  )
  assert diversity.self_bleu(["", ""]) == 1.0
  assert diversity.self_bleu(["", "a b"]) < 0.6  # "a b" matches nothing
  assert diversity.self_bleu(["a b c d e", "v w x y z"]) < 0.05
  with pytest.raises(ValueError, match="two or more"):
    diversity.self_bleu(["alone"])


def test_self_bleu_reads_the_first_responses_and_words():
  same = ["a b c d"] * diversity.MAX_RESPONSES
  assert diversity.self_bleu([*same, "w x y z"]) == 1.0
  long = "a " * diversity.MAX_WORDS
  assert diversity.self_bleu([long + "x", long + "y"]) == 1.0


# --- responses -> scores ---


def responses_to(rewards, *, answers=None, texts=None, lengths=None, finished=None):
  """Responses where sample j of problem i earns `rewards[i][j]`; None: unscorable."""

  def given(table, i, j, default):
    return table[i][j] if table else default

  return [
    Response(
      id=f"p{i}",
      sample=j,
      response=given(texts, i, j, "so it is"),
      reference="4",
      answer=given(answers, i, j, None),
      reward=reward,
      length=given(lengths, i, j, 4),
      finished=given(finished, i, j, True),
    )
    for i, row in enumerate(rewards)
    for j, reward in enumerate(row)
  ]


def measure(rewards, **others):
  return summarise(responses_to(rewards, **others))


def test_pass_at_k_is_averaged_over_problems():
  # Right of 4: 1, 4, 0. pass@1 = (1/4 + 1 + 0) / 3, pass@2 = (1/2 + 1 + 0) / 3,
  # pass@4 = 2/3. Pooling all problems would give pass@2 = 1 - C(7,2)/C(12,2) = 0.68.
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
  rewards = [[1.0] * 16] * 4 + [[0.0] * 16] * 4
  answers = [["4"] * 16] * 4 + [["5"] * 16] * 4
  result = measure(rewards, answers=answers)
  low, high = bootstrap_interval([1.0] * 4 + [0.0] * 4)
  assert low < 0.2 and high > 0.8
  names = [f"pass@{k}" for k in KS if k <= 16] + ["maj@4", "maj@8", "maj@16", "mean@16"]
  for name in names:
    assert (result[f"{name}_low"], result[f"{name}_high"]) == (low, high)


def test_majority_is_absent_where_no_final_answer_was_extracted():
  result = measure([[1, 0, 0, 1]])
  assert not [name for name in result if name.startswith("maj@")]
  assert "unique_answers" not in result
  # p0: 4 has two votes of three, p1: a tie. A majority of two is a coin: no maj@2.
  answers = [["4", "4", "5", None], ["4", "5", "4", "5"]]
  result = measure([[1, 1, 0, 0], [1, 0, 1, 0]], answers=answers)
  assert {n for n in result if n.startswith("maj@")} == {
    "maj@4", "maj@4_low", "maj@4_high",
  }  # fmt: skip
  assert result["maj@4"] == 0.75
  assert result["unique_answers"] == 2.0


def test_mean_at_n_is_the_mean_of_rewards_that_may_be_real_numbers():
  # Right above a half: 0.6 and 1.0 of the first, none of the second.
  result = measure([[0.6, 1.0], [0.5, -0.5]])
  assert result["pass@1"] == 0.5
  assert result["mean@2"] == pytest.approx((0.8 + 0.0) / 2)
  assert result["mean@2_low"] < result["mean@2"] < result["mean@2_high"]


def test_lengths_and_truncation_are_means_over_responses():
  result = measure(
    [[1, 0], [0, 0]],
    lengths=[[1, 6], [2, 9]],
    finished=[[True, True], [True, False]],
    texts=[["a b c d a b c d", "a"], ["a", "a"]],
  )
  assert result["response_length"] == 4.5
  assert result["truncated_fraction"] == 0.25
  assert result["unscorable_fraction"] == 0.0
  assert result["repetition"] == pytest.approx(1 / 5 / 4)


def test_unscorable_samples_are_left_out_and_counted():
  # Problem 0: 1 of 2 right, problem 1: 2 of 3, problem 2 has no scorable response.
  # None taken as wrong would give pass@1 = (1/4 + 2/4 + 0) / 3 = 0.25.
  rewards = [[1, None, 0, None], [1, 1, 0, None], [None] * 4]
  result = measure(rewards, answers=[["4", "9", "5", "9"]] * 3)
  assert result["unscorable_fraction"] == pytest.approx(7 / 12)
  assert result["pass@1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
  assert result["mean@4"] == pytest.approx(result["pass@1"])
  assert result["pass@2"] == 1.0
  assert "pass@4" not in result and "maj@4" not in result
  assert np.isfinite(list(result.values())).all()
  assert pass_rates(responses_to(rewards)) == [
    {"id": "p0", "num_samples": 2, "num_correct": 1, "pass_rate": 0.5},
    {"id": "p1", "num_samples": 3, "num_correct": 2, "pass_rate": 2 / 3},
  ]


def test_evaluation_without_a_scorable_response_has_no_scores():
  result = measure([[None, None]])
  assert result["unscorable_fraction"] == 1.0
  assert not [name for name in result if "@" in name]


def test_a_response_is_correct_above_a_reward_of_a_half():
  # A negative reward is wrong, and so is a half.
  assert measure([[0.5, -1.0, 0.51, 2.0]])["pass@1"] == 0.5


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(5)))
def test_scores_do_not_depend_on_the_order_of_problems_and_samples(order):
  rewards = [[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, None], [1, 1, 0]]
  answers = [["4", "5", "6"], ["5", "5", None], ["4"] * 3, ["5", "4", "7"], ["4"] * 3]
  whole = responses_to(rewards, answers=answers)
  shuffled = summarise([whole[3 * i + j] for i in order for j in (2, 0, 1)])
  for name, value in summarise(whole).items():
    if not name.endswith(("_low", "_high")):
      assert shuffled[name] == pytest.approx(value)


def test_metrics_are_keyed_by_problem_so_that_policies_can_be_paired():
  metrics = per_problem(responses_to([[1, 0], [0, 0]]))
  assert metrics["pass@1"] == {"p0": 0.5, "p1": 0.0}
  assert metrics["response_length"] == {"p0": 4.0, "p1": 4.0}


def test_table_has_a_row_for_each_policy_and_is_markdown():
  start = {"pass@1": 0.25, "pass@1_low": 0.2, "pass@1_high": 0.31, "pass@8": 0.5}
  later = start | {"pass@1": 0.75, "self_bleu": 0.125}
  rows = {
    name: {f"eval/sums/{key}": value for key, value in row.items()}
    for name, row in (("start", start), ("step 9", later))
  }
  rows["start"] |= {
    "eval/sums/pass@4": 0.4,
    "eval/jsonl:a/b/pass@1": 1.0,
    "time/s": 3.0,
  }
  assert table(rows).split("\n\n") == [
    "sums",
    "| policy |            pass@1 | pass@8 |\n"
    "|:-------|------------------:|-------:|\n"
    "| start  | 25.0 [20.0, 31.0] |   50.0 |\n"
    "| step 9 | 75.0 [20.0, 31.0] |   50.0 |",
    "| policy | self-BLEU |\n"
    "|:-------|----------:|\n"
    "| start  |           |\n"
    "| step 9 |      12.5 |",
    "jsonl:a/b",
    "| policy | pass@1 |\n|:-------|-------:|\n| start  |  100.0 |",
  ]


# --- a file of responses ---

PROBLEMS = [(f"p{i}", "4") for i in range(7)]


class Policy:
  """Responds to problems, records which, and is killed at `dies_at`."""

  def __init__(self, *, dies_at=None):
    self.asked, self.dies_at = [], dies_at

  def __call__(self, first, last):
    if self.dies_at is not None and first >= self.dies_at:
      raise KeyboardInterrupt
    self.asked += range(first, last)
    rows = responses_to([[float(i % 2), 0.0] for i in range(last)])
    # The line separator U+2028 ends no line of the file.
    texts = ("half \ud83d", "a\u2028b")
    return [
      dataclasses.replace(row, response=texts[row.sample]) for row in rows[2 * first :]
    ]


def gathered(policy, path, problems=PROBLEMS):
  return collect(policy, problems, path, samples=2, chunk=3)


def test_a_killed_evaluation_resumes_and_samples_nothing_twice(tmp_path):
  whole, path = tmp_path / "whole.jsonl", tmp_path / "new" / "killed.jsonl"
  expected = gathered(Policy(), whole)
  killed, resumed, again = Policy(dies_at=3), Policy(), Policy()
  with pytest.raises(KeyboardInterrupt):
    gathered(killed, path)
  rows = gathered(resumed, path)
  assert killed.asked + resumed.asked == list(range(7)), "each problem once"
  assert [row.id for row in rows] == [row.id for row in expected]
  assert gathered(again, path) == read_responses(path) and again.asked == []
  assert path.read_bytes() == whole.read_bytes()


def test_an_incomplete_problem_is_sampled_again(tmp_path):
  path = tmp_path / "cut.jsonl"
  gathered(Policy(), path)
  whole = path.read_bytes()
  for lost in (1, 40, 250):
    path.write_bytes(whole[:-lost])
    policy = Policy()
    gathered(policy, path)
    assert policy.asked in ([6], [5, 6]) and path.read_bytes() == whole, lost


def test_more_problems_are_added_and_fewer_are_the_first(tmp_path):
  path = tmp_path / "some.jsonl"
  gathered(Policy(), path, PROBLEMS[:4])
  policy = Policy()
  assert len(gathered(policy, path)) == 14 and policy.asked == [4, 5, 6]
  before = path.read_bytes()
  rows = gathered(policy, path, PROBLEMS[:2])
  assert [row.id for row in rows] == ["p0", "p0", "p1", "p1"]
  assert path.read_bytes() == before


def test_a_file_about_other_problems_is_refused(tmp_path):
  path = tmp_path / "other.jsonl"
  gathered(Policy(), path)
  before = path.read_bytes()
  with pytest.raises(ValueError, match=r"answers 'p1' \(reference '4'\) .* '5'"):
    gathered(Policy(), path, [PROBLEMS[0], ("p1", "5")])
  path.write_bytes(before.replace(b'"sample"', b'"simple"'))
  with pytest.raises(ValueError, match="line 1 is no response"):
    gathered(Policy(), path)


def test_the_file_holds_every_response_under_the_names_of_its_fields(tmp_path):
  path = tmp_path / "a.jsonl"
  gathered(Policy(), path)
  rows = [json.loads(line) for line in path.read_bytes().splitlines()]
  assert len(rows) == 14
  names = [field.name for field in dataclasses.fields(Response)]
  assert list(rows[3]) == names
  assert rows[3]["response"] == "a\u2028b" and rows[2]["response"] == "half ?"
  assert rows[2]["reward"] == 1.0 and rows[2]["answer"] is None

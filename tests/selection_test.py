"""Training problems are neither too easy, nor too hard, nor in the test set."""

import json
import os

import pytest

from opo_jax.__main__ import main
from opo_jax.commands.data import compare_data
from opo_jax.data import decontaminate, selection
from opo_jax.data.prompts import Problem

PROBLEMS = [Problem(f"s/{i}", f"q{i}", "1") for i in range(6)]


def ids(problems):
  return [problem.id for problem in problems]


def test_kept_problems_are_indexed_like_a_list():
  kept = selection.keep(PROBLEMS, lambda each: each.id in ("s/1", "s/3", "s/4"))
  assert ids(kept) == ["s/1", "s/3", "s/4"] == ids(kept[i] for i in range(3))
  assert kept[-1].id == "s/4" and ids(kept[1:]) == ["s/3", "s/4"]
  with pytest.raises(IndexError):
    kept[3]
  assert selection.keep(PROBLEMS, lambda each: True) is PROBLEMS


# --- Difficulty ---


def write_rates(path, rows):
  path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
  return path


def test_problems_are_kept_within_the_bounds_and_only_with_a_rate(tmp_path):
  rates = {"s/0": 0.0, "s/1": 0.25, "s/2": 0.5, "s/3": 0.75, "s/4": 1.0}
  path = write_rates(
    tmp_path / "rates.jsonl",
    [{"id": k, "pass_rate": v, "samples": 4} for k, v in rates.items()],
  )
  assert selection.read_pass_rates(path) == rates
  kept = selection.by_pass_rate(PROBLEMS, rates, lowest=0.25, highest=0.75)
  assert ids(kept) == ["s/1", "s/2", "s/3"]
  # s/5 has no pass rate: its difficulty is unknown.
  everything = selection.by_pass_rate(PROBLEMS, rates, lowest=0.0, highest=1.0)
  assert len(everything) == 5
  with pytest.raises(ValueError, match=r"'s/0'.*--data\.pass-rate-file"):
    selection.by_pass_rate(PROBLEMS, {"other/0": 0.5}, lowest=0.0, highest=1.0)


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"id": "s/1"}, "line 2 is no pass rate"),
    ({"id": "s/1", "pass_rate": "high"}, "line 2 is no pass rate"),
    ({"id": "s/1", "pass_rate": 1.5}, "expected 0 to 1"),
    ({"id": "s/0", "pass_rate": 0.5}, "a second time"),
    ([1], "line 2 is no pass rate"),
  ],
)
def test_pass_rates_that_are_none_are_named(tmp_path, row, message):
  path = write_rates(tmp_path / "rates.jsonl", [{"id": "s/0", "pass_rate": 1}, row])
  with pytest.raises(ValueError, match=message):
    selection.read_pass_rates(path)
  with pytest.raises(ValueError, match="make eval"):
    selection.read_pass_rates(tmp_path / "nothing")


# --- The evaluation set in the training set ---

TEST = [
  Problem(
    "t/0",
    "Sally has 12 red marbles and 7 blue marbles in a bag, and she takes out two of"
    " them at random. What is the probability that both are red?",
    "22/57",
  ),
  Problem("t/1", "Compute $\\sin 60^\\circ$.", "\\frac{\\sqrt3}{2}"),
]


def test_exact_and_near_repetitions_are_found_and_others_are_not():
  train = [
    Problem("a", "SALLY has $12$ red marbles" + TEST[0].question[24:], ""),
    Problem(
      "b",
      "One day Sally has 12 red marbles and 7 blue marbles in a bag, and she takes out"
      " two of them at random. Find the probability that they are red.",
      "",
    ),
    Problem("c", "Compute $ \\sin{60}^{\\circ} $", ""),
    Problem("d", "Compute $\\sin 30^\\circ$.", ""),
    Problem("e", "Tom has 3 apples. What is the probability that both are red?", ""),
  ]
  matches = decontaminate.find_duplicates(train, TEST)
  assert [(m.train.id, m.held_out.id, m.exact) for m in matches] == [
    *(("a", "t/0", True), ("b", "t/0", False), ("c", "t/1", True))
  ]
  assert decontaminate.THRESHOLD <= matches[1].overlap < 1
  exact = decontaminate.find_duplicates(train, TEST, threshold=1.0)
  assert ids(m.train for m in exact) == ["a", "c"]
  assert (
    decontaminate.find_duplicates(train, [])
    == decontaminate.find_duplicates([], TEST)
    == []
  )
  for wrong in ({"ngram": 0}, {"threshold": 0.0}, {"threshold": 1.1}):
    with pytest.raises(ValueError, match="threshold above 0"):
      decontaminate.find_duplicates(train, TEST, **wrong)


@pytest.mark.parametrize(
  ("question", "other"),
  [
    ("What is 6/2?", "What is 6-2?"),
    ("What is 6\xd72?", "What is 6\xf72?"),
    ("What is 1.5+2?", "What is 15+2?"),
    ("小明有3个苹果, 又买了4个, 一共有几个?", "矩形的长是3, 宽是4, 求它的面积。"),
    ("小明有3个苹果, 他一共有几个?", "小红有3个苹果, 她吃了几个?"),
    ("Ποιο είναι το 3 και 4;", "Πόσα μήλα: 3 ή 4;"),
    ("\U0001f34e?", "\U0001f350!"),
    ("…", "…"),
  ],
)
def test_questions_of_other_words_or_operators_are_no_repetitions(question, other):
  assert not decontaminate.find_duplicates(
    [Problem("a", other, "")], [Problem("t", question, "")]
  )


def test_repetitions_are_found_in_other_scripts_too():
  asked = "小明有3个苹果, 又买了4个, 然后把其中的2个送给了他的妹妹, 一共还有几个苹果?"
  again = asked.replace("3", " 3 ").replace(",", "").rstrip("?")
  near = "星期天, " + asked.replace("一共还有", "问还剩")
  train = [Problem("a", again, ""), Problem("b", near, ""), Problem("c", "É = 2", "")]
  test = [Problem("t", asked, ""), Problem("u", "e\u0301 = 2", "")]
  found = [
    (m.train.id, m.held_out.id, m.exact)
    for m in decontaminate.find_duplicates(train, test)
  ]
  assert found == [("a", "t", True), ("b", "t", False), ("c", "u", True)]


def test_the_report_counts_and_shows_what_to_look_at():
  train = [Problem("a", TEST[0].question, ""), Problem("b", TEST[0].question[6:], "")]
  text = decontaminate.report(
    {"mine in t": decontaminate.find_duplicates(train, TEST)}, {"mine in t": 2}
  )
  assert text.splitlines()[1].split() == ["mine", "in", "t", "2", "1", "1"]
  assert text.splitlines()[2].startswith("b is 100% in t/0: 'has 12 red")


def test_the_data_command_prints_the_report(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  for name, problem in (("mine", TEST[0]), ("test", TEST[0]), ("other", TEST[1])):
    row = {"question": problem.question, "answer": problem.answer}
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
  names = [f"jsonl:{tmp_path}/{name}.jsonl" for name in ("mine", "test", "other")]
  assert main(["data", names[0], "--against", *names[1:]]) == 0
  rows = [line.split()[-3:] for line in capsys.readouterr().out.splitlines()]
  assert rows[1:] == [["1", "1", "0"], ["1", "0", "0"]]


@pytest.mark.skipif(
  "OPO_DATA_DIR" not in os.environ, reason="OPO_DATA_DIR names no real data"
)
def test_no_real_training_set_holds_a_test_problem_word_for_word(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  text = compare_data(["math", "aime_1983_2023"], ["math500", "aime24", "aime25"])
  rows = [line.split() for line in text.splitlines()[1:7]]
  assert [row[-2] for row in rows] == ["0"] * 6
  # Siblings made of one template ("arrange the letters of the word …").
  assert [int(row[-1]) for row in rows] == [29, 0, 0, 2, 0, 0]

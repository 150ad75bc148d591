"""Answers are judged by stated rules, and no answer can stop or mislead the pool."""

import itertools
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opo_jax.rewards import math_equal, math_reward
from opo_jax.rewards.math_verifier import RewardPool

ROOT = pathlib.Path(__file__).resolve().parent.parent


def scripted_verifier(response, reference):
  """Does what the response says; at the top level, so that workers find it."""
  if response == "hang":
    while True:
      pass
  if response == "hang in C":
    return float(-1 in itertools.count())  # Never looks at signals.
  if response == "exit":
    os._exit(1)
  if response == "segfault":
    os.kill(os.getpid(), signal.SIGSEGV)
  if response == "sys.exit":
    sys.exit(3)
  if response == "raise":
    raise KeyError("x" * 100_000)
  if response == "nan":
    return float("nan")
  if response == "text":
    return "no number"
  if response == "modules":
    return float("jax" in sys.modules)
  if response.startswith("sleep"):
    time.sleep(float(response.removeprefix("sleep")))
  return float(response == reference)


def broken_warm_up():
  raise OSError("no disk")


def slow_warm_up():
  time.sleep(1.0)


def scripted_pool(**kwargs):
  return RewardPool(
    scripted_verifier, **({"workers": 2, "timeout_s": 1.0, "warm_up": None} | kwargs)
  )


# --- Equality ---


@pytest.mark.parametrize(
  ("prediction", "reference"),
  [
    ("1,234", "1234"),
    ("1{,}234", "1234"),
    (r"10\,000", "10000"),
    ("$18", "18"),
    (r"\$18", "18"),
    ("18.00", "18"),
    ("18 dollars", "18"),
    (r"18\text{ cm}", "18"),
    (r"90^\circ", "90"),
    ("864", r"864 \mbox{ inches}^2"),
    ("34", r"34\text{ sq. units}"),
    (r"13\sqrt{12^2}", r"156\sqrt{1}\text{ feet}"),
    ("50%", "50"),
    (r"50\%", "0.5"),
    ("0.5", "50%"),
    ("-$5", "-5"),
    ("\u22125", "-5"),
    ("1e3", "1000"),
    ("$$7$$", "7"),
    (r"\(7\).", "7"),
    ("**42**", "42"),
    ("x\x00", "x"),
    (r"\boxed{\boxed{3}}", "3"),
    (r"\frac{1}{3}", "0.333333"),
    ("0.333333", r"\frac13"),
    (r"\dfrac{2}{4}", "1/2"),
    ("1 1/2", r"\frac{3}{2}"),
    (r"1\frac12", "1.5"),
    ("x = 5", "5"),
    ("x = 3 + 2 = 5", "5"),
    ("Total cost = $7", "7"),
    ("2^{10}", "1024"),
    (r"1.5 \times 10^3", "1500"),
    (r"\sqrt{16}", "4"),
    (r"\frac{\sqrt{4}}{4}", "0.5"),
    ("(x+1)^2", "x^2 + 2x + 1"),
    ("2*pi", r"2\pi"),
    ("sqrt(2)/2", r"\frac{\sqrt2}{2}"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("x=1 or x=2", "x=1,x=2"),
    (r"3 \pm 2", "5, 1"),
    (r"\left(1,2\right)", "(1, 2)"),
    (r"x \in [1,2)", "[1,2)"),
    (
      r"\begin{pmatrix}1\\2\end{pmatrix}",
      r"\begin{pmatrix} \frac22 \\ \sqrt{4} \end{pmatrix}",
    ),
    ("evelyn", r"\text{Evelyn}"),
    ("C", r"\text{(C)}"),
  ],
)
def test_equal_answers_are_equal(prediction, reference):
  assert math_equal(prediction, reference)


@pytest.mark.parametrize(
  ("prediction", "reference"),
  [
    ("3 or 4", "3"),
    ("3 or 4", "4"),
    (r"3 \text{ or } 4", "3"),
    ("3 and 4", "3"),
    ("3, 4", "3"),
    (r"\{3, 4\}", "3"),
    (r"3 \pm 1", "4"),
    ("3", "3, 4"),
    ("not 5", "5"),
    ("3 + 4", "7"),
    ("3+4", "7"),
    (r"2\cdot 3", "6"),
    ("2(3)", "6"),
    ("14/2", "7"),
    (r"\frac{14}{2}", "7"),
    ("x = 3 + 4", "7"),
    ("3 4", "7"),
    ("3 million", "3"),
    ("x > 3", "3"),
    ("x <= 3", "3"),
    (r"\frac{1}{0}", "5"),
    ("0.0000001", "0"),
    ("0.33", "1/3"),
    ("y = 5", "x = 5"),
    ("What is 3 + 4?", "7"),
    (r"\text{cat}", r"\text{act}"),
    ("nylevE", "Evelyn"),
    ("x", "y"),
    ("", "5"),
    ("$", "5"),
    ("\x00", "5"),
    ("}{", "5"),
    (r"\frac{", "5"),
    ("\\" * 99, "5"),
    ("9**9**9", "5"),
    ("5" * 1_000_000, "5"),
  ],
)
def test_different_and_evasive_answers_are_not_equal(prediction, reference):
  assert not math_equal(prediction, reference)


@pytest.mark.parametrize("reference", ["", " \n"])
def test_empty_reference_is_an_error_and_not_a_wrong_answer(reference):
  with pytest.raises(ValueError, match="reference is empty"):
    math_equal("5", reference)
  with pytest.raises(ValueError, match="reference is empty"):
    math_reward("5", reference)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**12), 10**12))
def test_every_way_of_writing_an_integer_is_that_integer_only(n):
  for text in (f"{n}", f"{n:,}", f"${n}$", f"{n}.0", rf"\boxed{{{n}}}", f"{n} apples"):
    assert math_equal(text, str(n))
    assert not math_equal(text, str(n + 1))


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="0123456789 +-=.,$%^_{}()\\abfrcoxed#\n\x00é", max_size=40))
def test_no_short_text_raises_or_earns_anything(text):
  # The reference occurs in none of them: a prime with seven digits.
  assert math_reward(text, "7368787.25") == 0.0


# --- The final answer ---


@pytest.mark.parametrize(
  ("response", "reference", "reward"),
  [
    (r"so \boxed{3}, no: \boxed{4}", "4", 1.0),
    (r"so \boxed{3}, no: \boxed{4}", "3", 0.0),
    (r"\boxed{3}. The answer is 4", "3", 1.0),
    (r"\boxed{3} or rather \boxed{4", "3", 0.0),
    (r"Put it into \boxed{}. The answer is 5.", "5", 1.0),
    (r"\boxed{\{1,2\}}", r"\{1,2\}", 1.0),
    (r"\boxed 7", "7", 1.0),
    ("48 / 2 = <<48/2=24>>24\n#### 1,234", "1234", 1.0),
    ("#### 3\n#### 4", "4", 1.0),
    ("#### Step 1\nThe answer is 5", "5", 1.0),
    ("The answer is 5\n#### Check\nIt fits.", "5", 1.0),
    ("The answer is 42.", "42", 1.0),
    ("The answer is 3.5. I am sure.", "3.5", 1.0),
    ("The answer is 4, I said the answer is 5.", "4", 0.0),
    (r"The final answer is $\frac{1}{2}$. I hope it is correct.", "0.5", 1.0),
    ("**Final Answer**: $42", "42", 1.0),
    ("**Answer:** 42", "42", 1.0),
    ("Answer:\n$$\n42\n$$\nDone.", "42", 1.0),
    ("The answer to the question is 18 dollars per day.", "18", 1.0),
    ("The answer is 3 or 4.", "3", 0.0),
    ("The answer is 3 or 4.", "4", 0.0),
    ("The answer is either 3 or 4", "3", 0.0),
    ("First I add.\nx = 42", "42", 1.0),
    ("42", "42", 1.0),
    ("It must be 42", "42", 0.0),
    ("So 3 + 4 = 7", "7", 0.0),
    ("Tom has 3 apples and gets 4 more. How many has Tom?", "4", 0.0),
    ("What is 3 + 4?", "7", 0.0),
    ("3 + 4", "7", 0.0),
    ("", "5", 0.0),
    ("\x00" * 10, "5", 0.0),
  ],
)
def test_the_final_answer_counts_and_nothing_else(response, reference, reward):
  assert math_reward(response, reference) == reward


@pytest.mark.parametrize(
  "piece",
  [
    "#",
    "#### ",
    "\n####",
    "answer is \\[\n",
    "answer to ",
    "answer ",
    "answer is $$\n",
    "\\boxed{",
    "\\boxed{3} ",
    "\\fbox  ",
    "{",
    "\\",
    "1",
    " ",
    "*",
    "\x00",
  ],
)
def test_a_megabyte_of_anything_is_judged_in_seconds(piece):
  for text in (piece * (1_000_000 // len(piece)), "answer is" + piece * 300_000):
    start = time.monotonic()
    math_reward(text, "5")
    assert time.monotonic() - start < 4.0


def test_verification_works_off_the_main_thread_and_logs_nothing(caplog):
  results = []

  def work():
    results.append(math_reward(r"\boxed{\frac{\sqrt{4}}{2} x}", "x + 0"))
    results.append(math_reward(r"\boxed{\frac{\begin{}{}{x}", "x"))

  with caplog.at_level(logging.DEBUG):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
  assert results == [1.0, 0.0]
  assert not [r for r in caplog.records if r.name.startswith("math_verify")]


def test_rewards_import_neither_jax_nor_sympy():
  script = (
    "import sys, opo_jax.rewards\n"
    "print([m for m in ('jax', 'sympy', 'math_verify') if m in sys.modules])\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"


# --- The pool ---


def test_bad_items_are_none_with_a_reason_and_the_others_keep_their_place():
  responses = ["a", "exit", "b", "raise", "nan", "hang", "c", "text", "sys.exit", "d"]
  with scripted_pool() as pool:
    scores = pool.score(responses, ["a", "", "x", "", "", "", "c", "", "", "d"])
    assert scores == [1.0, None, 0.0, None, None, None, 1.0, None, None, 1.0]
    reasons = dict(pool.last_errors)
    assert list(reasons) == [1, 3, 4, 5, 7, 8]
    assert "exit code 1" in reasons[1]
    assert reasons[3].startswith("raised KeyError: 'xxx") and len(reasons[3]) <= 300
    assert "gave nan" in reasons[4]
    assert reasons[5] == "timed out after 1 s"
    assert "ValueError" in reasons[7]
    assert "SystemExit" in reasons[8]
    # The pool goes on, and yesterday's errors are gone.
    assert pool.score(["e"], ["e"]) == [1.0]
    assert pool.last_errors == []


def test_a_hang_inside_of_c_code_is_killed_in_time():
  with scripted_pool(workers=1) as pool:
    pool.score(["a"], ["a"])
    start = time.monotonic()
    assert pool.score(["hang in C", "a"], ["a", "a"]) == [None, 1.0]
    assert time.monotonic() - start < 3.0


def test_pool_outlives_more_crashes_than_workers():
  responses = ["exit", "segfault"] * 4 + ["a"]
  with scripted_pool() as pool:
    assert pool.score(responses, ["a"] * 9) == [None] * 8 + [1.0]
    assert len(pool.last_errors) == 8


def test_limit_is_for_each_answer_and_waiting_does_not_count():
  with scripted_pool(workers=1, timeout_s=1.0) as pool:
    assert pool.score(["sleep0.4"] * 5, ["sleep0.4"] * 5) == [1.0] * 5


def test_start_of_a_worker_does_not_count():
  with scripted_pool(workers=1, timeout_s=0.5, warm_up=slow_warm_up) as pool:
    assert pool.score(["a", "hang", "a"], ["a"] * 3) == [1.0, None, 1.0]


def test_workers_do_not_import_jax():
  with scripted_pool(workers=1) as pool:
    assert pool.score(["modules"], [""]) == [0.0]


def test_large_and_binary_texts_reach_the_verifier():
  texts = ["x" * 1_000_000, "\x00", "", "ü\ud800", "\n"]
  with scripted_pool(timeout_s=10.0) as pool:
    assert pool.score(texts * 5, texts * 5) == [1.0] * 25


def test_empty_batch_scores_nothing():
  with scripted_pool(workers=1) as pool:
    assert pool.score([], []) == []


def test_no_workers_score_in_this_process_under_the_same_rules():
  with scripted_pool(workers=0) as pool:
    assert pool.score(["a", "raise", "b", "nan"], list("aaaa")) == [
      1.0,
      None,
      0.0,
      None,
    ]
    assert [index for index, _ in pool.last_errors] == [1, 3]
  with RewardPool(lambda a, b: a == b, workers=0, timeout_s=1.0) as pool:
    assert pool.score(["a", "b"], ["a", "a"]) == [1.0, 0.0]


def test_no_workers_let_ctrl_c_through():
  def interrupted(response, reference):
    raise KeyboardInterrupt

  pool = RewardPool(interrupted, workers=0, timeout_s=1.0)
  with pytest.raises(KeyboardInterrupt):
    pool.score(["a"], ["a"])


def test_misuse_is_refused_with_the_remedy():
  with pytest.raises(ValueError, match="top level of a module"):
    RewardPool(lambda a, b: 1.0, workers=1, timeout_s=1.0)
  with pytest.raises(ValueError, match="0 or more workers"):
    scripted_pool(workers=-1)
  for timeout_s in (0, -1, float("inf"), float("nan")):
    with pytest.raises(ValueError, match="number of seconds"):
      scripted_pool(timeout_s=timeout_s)
  pool = scripted_pool(workers=1)
  with pytest.raises(ValueError, match="2 responses came with 1 references"):
    pool.score(["a", "b"], ["a"])
  pool.close()
  pool.close()
  with pytest.raises(ValueError, match="closed"):
    pool.score(["a"], ["a"])


def test_workers_that_cannot_start_stop_the_run_instead_of_scoring_none():
  with (
    scripted_pool(workers=1, warm_up=broken_warm_up) as pool,
    pytest.raises(RuntimeError, match="no verification worker starts"),
  ):
    pool.score(["a"], ["a"])


PROGRAM = """
import signal, sys, time
# A test run in the background may have been started with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
if __name__ != "__main__":
  time.sleep(0.3)  # Workers import this file again: a script that is slow to import.
sys.path.insert(0, {tests!r})
from math_verifier_test import scripted_verifier
from opo_jax.rewards.math_verifier import RewardPool
if __name__ == "__main__":
  pool = RewardPool(scripted_verifier, workers=2, timeout_s=60.0, warm_up=None)
  pool.score(["a", "a"], ["a", "a"])
  print("ready", flush=True)
  {action}
"""


def start_program(tmp_path, action):
  path = tmp_path / "program.py"
  path.write_text(PROGRAM.format(tests=str(ROOT / "tests"), action=action))
  process = subprocess.Popen(
    [sys.executable, str(path)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n", process.communicate()
  return process


def test_ctrl_c_ends_a_run_whose_verifier_hangs(tmp_path):
  process = start_program(
    tmp_path, 'pool.score(["hang"] * 4 + ["x" * 10**6] * 9, ["a"] * 13)'
  )
  time.sleep(0.5)
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=20)
  assert process.returncode != 0
  assert "KeyboardInterrupt" in errors
  assert "SemLock" not in errors


def test_closing_while_a_worker_restarts_prints_nothing(tmp_path):
  process = start_program(
    tmp_path,
    "pool.close(); "
    "pool = RewardPool(scripted_verifier, workers=2, timeout_s=0.2, warm_up=None); "
    'pool.score(["hang"] * 3, ["a"] * 3); pool.close()',
  )
  _, errors = process.communicate(timeout=20)
  assert (process.returncode, errors) == (0, "")


def test_a_pool_left_open_does_not_hold_the_interpreter(tmp_path):
  process = start_program(tmp_path, "sys.exit(0)")
  _, errors = process.communicate(timeout=20)
  assert (process.returncode, errors) == (0, "")


# --- Real data ---


def test_every_gsm8k_reference_solution_scores_one():
  path = pathlib.Path(os.environ.get("OPO_DATA_DIR", "")) / "gsm8k" / "test.jsonl"
  if not os.environ.get("OPO_DATA_DIR") or not path.exists():
    pytest.skip("needs the real GSM8K: set OPO_DATA_DIR to a directory with gsm8k/")
  solutions = [json.loads(line)["answer"] for line in path.open()]
  references = [s.partition("####")[2].replace(",", "").strip() for s in solutions]
  shifted = [*references[1:], references[0]]
  with RewardPool(math_reward, workers=2, timeout_s=5.0) as pool:
    assert pool.score(solutions, references) == [1.0] * 1319
    same = sum(float(a) == float(b) for a, b in zip(references, shifted, strict=True))
    assert sum(pool.score(solutions, shifted)) == same
    assert pool.last_errors == []


def test_math500_solutions_score_one_and_hostile_answers_stop_nothing():
  path = pathlib.Path(os.environ.get("OPO_DATA_DIR", "")) / "math500" / "test.jsonl"
  if not os.environ.get("OPO_DATA_DIR") or not path.exists():
    pytest.skip(
      "needs the real MATH-500: set OPO_DATA_DIR to a directory with math500/"
    )
  rows = [json.loads(line) for line in path.open()]
  respelled = [
    rf"\boxed{{\displaystyle {r['answer']} }}".replace(r"\frac", r"\dfrac")
    for r in rows
  ]
  hostile = [
    r"\boxed{9**9**9}",
    r"\boxed{9^{9^{9}}}",
    r"\boxed{100000000!}",
    r"\boxed{" + r"\frac{1}{" * 50 + "2" + "}" * 51,
    "\\boxed{" * 1000 + "}" * 1000,
    "\x00\\boxed{\x00}",
  ]
  with RewardPool(math_reward, workers=2, timeout_s=3.0) as pool:
    references = [r["answer"] for r in rows]
    assert pool.score([r["solution"] for r in rows], references) == [1.0] * 500
    scores = pool.score(hostile + respelled, ["5"] * len(hostile) + references)
    assert all(not score for score in scores[: len(hostile)])
    assert sum(score == 1.0 for score in scores[len(hostile) :]) == 500

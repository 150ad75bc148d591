"""No response can stop or mislead the pool, and nothing is silently wrong."""

import functools
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from opo_jax.rewards import math_reward
from opo_jax.rewards.pool import RewardPool, batched

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
  if response == "eat":
    return float(len(bytearray(3 * 2**30)))
  if response == "eat slowly":
    eaten = []
    while True:
      eaten.append(bytearray(2**24))
  if response == "modules":
    return float("jax" in sys.modules)
  if response.startswith("sleep"):
    time.sleep(float(response.removeprefix("sleep")))
  if response.startswith("wait for "):
    while not pathlib.Path(response.removeprefix("wait for ")).exists():
      time.sleep(0.01)
    return 1.0
  return float(response == reference)


def broken_start(response, reference):
  return 1.0


def no_disk():
  raise OSError("no disk")


def slow_start(response, reference):
  return scripted_verifier(response, reference)


broken_start.warm_up = no_disk
slow_start.warm_up = functools.partial(time.sleep, 1.5)


@batched
def lengths_in_one_call(responses, references):
  """Tells how many answers came with it; fails as a whole if one of them is bad."""
  if "raise" in responses:
    raise KeyError(references[responses.index("raise")])
  if "hang" in responses:
    while True:
      pass
  if "short" in responses:
    return [1.0] * (len(responses) - 1)
  return [float(len(responses))] * len(responses)


def scripted_pool(verify=scripted_verifier, **kwargs):
  return RewardPool(verify, **({"workers": 2, "timeout_s": 1.0} | kwargs))


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
    # The pool goes on, and the earlier batch's errors are gone.
    assert pool.score(["e"], ["e"]) == [1.0]
    assert pool.last_errors == []


def test_a_hang_inside_of_c_code_ends_at_the_first_signal():
  """C code never runs the handler that pebble sets: SIGKILL would follow after 3 s."""
  with scripted_pool(workers=1) as pool:
    pool.score(["a"], ["a"])
    (worker,) = pool._context._processes
    assert pool.score(["hang in C", "a"], ["a", "a"]) == [None, 1.0]
    assert worker.exitcode == -signal.SIGTERM


def test_pool_outlives_more_crashes_than_workers():
  responses = ["exit", "segfault"] * 4 + ["a"]
  with scripted_pool() as pool:
    assert pool.score(responses, ["a"] * 9) == [None] * 8 + [1.0]
    assert len(pool.last_errors) == 8


def test_limit_is_for_each_answer_and_waiting_does_not_count():
  with scripted_pool(workers=1, timeout_s=2.0) as pool:
    # Each takes a tenth of the limit, all together more than the limit.
    assert pool.score(["sleep0.2"] * 11, ["sleep0.2"] * 11) == [1.0] * 11


def test_start_of_a_worker_does_not_count():
  with scripted_pool(slow_start, workers=1, timeout_s=1.0) as pool:
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


def test_answers_that_travel_together_are_told_apart_when_one_goes_wrong():
  """200 answers to one worker are tasks of 50; three of them hold a bad answer."""
  responses = ["a"] * 200
  for index, what in ((3, "exit"), (77, "hang"), (78, "raise"), (199, "nan")):
    responses[index] = what
  with scripted_pool(workers=1) as pool:
    scores = pool.score(responses, ["a"] * 200)
    assert [i for i, score in enumerate(scores) if score is None] == [3, 77, 78, 199]
    assert sum(score == 1.0 for score in scores) == 196
    assert [index for index, _ in pool.last_errors] == [3, 77, 78, 199]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits address space")
@pytest.mark.parametrize("how", ["eat", "eat slowly"])
def test_memory_eating_verification_is_unscorable_and_the_pool_goes_on(how):
  with scripted_pool(timeout_s=20.0, memory_gib=0.5) as pool:
    assert pool.score([how, "a", how, "b"], ["", "a", "", "a"]) == [None, 1, None, 0]
    assert "MemoryError" in dict(pool.last_errors)[0]


def test_batched_verifier_gets_many_at_once_and_a_bad_one_is_found_out():
  with scripted_pool(lengths_in_one_call, workers=1) as pool:
    # 40 answers for one worker travel in tasks of 10.
    assert pool.score(["a"] * 40, [""] * 40) == [10.0] * 40
    scores = pool.score([*"aaaa", "raise", *"bbbbb"] * 4, ["the problem"] * 40)
    assert [i for i, score in enumerate(scores) if score is None] == [4, 14, 24, 34]
    assert dict(pool.last_errors)[4] == "raised KeyError: 'the problem'"
    scores = pool.score(["a", "hang", "short", "b"], [""] * 4)
    assert scores[0] == scores[3] == 1.0 and scores[1] is scores[2] is None
  with scripted_pool(lengths_in_one_call, workers=0) as pool:
    assert pool.score(["a"] * 3, [""] * 3) == [3.0] * 3
    assert pool.score(["a", "raise"], [""] * 2) == [1.0, None]


def test_submitted_batches_are_scored_while_the_caller_goes_on(tmp_path):
  with scripted_pool(workers=1, timeout_s=60.0) as pool:
    first = pool.submit([f"wait for {tmp_path}/go", "raise"], ["", ""])
    second = pool.submit(["a"], ["a"])
    assert not first.done() and not second.done()
    (tmp_path / "go").touch()
    assert first.result().rewards == [1.0, None]
    assert [index for index, _ in first.result().errors] == [1]
    assert second.result() == ([1.0], [])
    with pytest.raises(ValueError, match="one reference for each"):
      pool.submit(["a"], [])


def test_closing_ends_what_was_submitted():
  pool = scripted_pool(timeout_s=600.0)
  pool.score(["a"], ["a"])
  future = pool.submit(["hang"], ["a"])
  time.sleep(0.3)  # so that a worker has taken it, as a rule
  pool.close()
  with pytest.raises(ValueError, match="closed"):
    future.result(timeout=60)


def test_misuse_is_refused_with_the_remedy():
  with pytest.raises(ValueError, match="top level of a module"):
    RewardPool(lambda a, b: 1.0, workers=1, timeout_s=1.0)
  with pytest.raises(ValueError, match="0 or more workers"):
    scripted_pool(workers=-1)
  for timeout_s in (0, -1, float("inf"), float("nan")):
    with pytest.raises(ValueError, match="number of seconds"):
      scripted_pool(timeout_s=timeout_s)
    with pytest.raises(ValueError, match="number of GiB"):
      scripted_pool(memory_gib=timeout_s)
  pool = scripted_pool(workers=1)
  with pytest.raises(ValueError, match="2 responses came with 1 references"):
    pool.score(["a", "b"], ["a"])
  pool.close()
  pool.close()
  with pytest.raises(ValueError, match="closed"):
    pool.score(["a"], ["a"])


def test_workers_that_cannot_start_stop_the_run_instead_of_scoring_none():
  with (
    scripted_pool(broken_start, workers=1) as pool,
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
from pool_test import scripted_verifier
from opo_jax.rewards import RewardPool
if __name__ == "__main__":
  pool = RewardPool(scripted_verifier, workers=2, timeout_s=600.0)
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
  _, errors = process.communicate(timeout=120)
  assert process.returncode != 0
  assert "KeyboardInterrupt" in errors
  assert "SemLock" not in errors


def test_closing_while_a_worker_restarts_prints_nothing(tmp_path):
  process = start_program(
    tmp_path,
    "pool.close(); "
    "pool = RewardPool(scripted_verifier, workers=2, timeout_s=0.2); "
    'pool.score(["hang"] * 3, ["a"] * 3); pool.close()',
  )
  _, errors = process.communicate(timeout=120)
  assert (process.returncode, errors) == (0, "")


def test_a_pool_left_open_does_not_hold_the_interpreter(tmp_path):
  process = start_program(tmp_path, "sys.exit(0)")
  _, errors = process.communicate(timeout=120)
  assert (process.returncode, errors) == (0, "")


# --- Hostile answers ---

# Nothing that evaluates them ends.
TOWERS = [
  r"\boxed{9^{9^{9}}}",
  r"\boxed{(10^{1000000})^{1000000}}",
  r"\boxed{2^{3^{4^{5^{6}}}}}",
  r"\boxed{" + "x^" * 200 + "x}",
]
HOSTILE = [
  r"\boxed{9**9**9}",
  r"\boxed{10^{1000000}}",
  r"\boxed{100000000!}",
  r"\boxed{" + "9" * 400 + "!" + "}",
  r"\boxed{1e999999999}",
  r"\boxed{" + "9" * 1_000_000 + "}",
  r"\boxed{" + r"\frac{1}{" * 50 + "2" + "}" * 51,
  r"\boxed{" + "(" * 240 + "1" + ")" * 240 + "}",
  r"\boxed{" + r"\sqrt{" * 70 + "2" + "}" * 71,
  r"\boxed{" + "{" * 200 + "}" * 200 + "}",
  "\\boxed{" * 1000 + "}" * 1000,
  "\\boxed{" * 100_000,
  "\x00\\boxed{\x00}",
  r"\boxed{" + r"\int_0^{" * 40 + "1" + "}" * 41,
  r"\boxed{" + r"\pm" * 100 + "1}",
  r"\boxed{" + "1," * 200 + "1}",
  r"\boxed{" + "(1," * 100 + ")" * 100 + "}",
  "a" * 1_000_000,
  "#" * 1_000_000,
  "answer is " * 100_000,
  "answer " * 100_000 + "$" * 1000,
  "Therefore " + "is " * 300_000,
  "$" * 1_000_000 + " is ",
  "1 " * 500_000,
  "\n".join(["So it is " + "a," * 1000] * 300),
]


def test_hostile_responses_earn_nothing_and_the_pool_goes_on():
  """The longest takes half a second, a hundredth of its limit."""
  with RewardPool(math_reward, workers=2, timeout_s=60.0, memory_gib=1.0) as pool:
    scores = pool.score(HOSTILE, ["5"] * len(HOSTILE))
    wrong = {HOSTILE[i][:60]: score for i, score in enumerate(scores) if score != 0.0}
    assert not wrong, pool.last_errors
  with RewardPool(math_reward, workers=2, timeout_s=2.0, memory_gib=1.0) as pool:
    assert not any(pool.score(TOWERS, ["5"] * len(TOWERS)))  # refused, or cut off
    assert pool.score([r"\boxed{5}"] * 9, ["5"] * 9) == [1.0] * 9

"""Metrics survive kills, are absent where unmeasured, and are finite."""

import json
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opo_jax import metrics
from opo_jax.metrics import Timers, check_finite, describe_responses
from opo_jax.storage import run_json
from opo_jax.storage.json_files import JsonLines
from opo_jax.storage.record import TensorBoard


def written(path):
  return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def write(path, rows, *, resume_at=None):
  lines = JsonLines(path, resume_at=resume_at)
  for row in rows:
    lines.write(row)
  lines.close()


# --- JSON lines ---


def test_rows_come_back_as_they_were_written(tmp_path):
  rows = [{"step": 0, "text": "ein “ü”\n{2}"}, {"step": 1, "reward/mean": 0.1 + 0.2}]
  write(tmp_path / "a.jsonl", rows)
  assert written(tmp_path / "a.jsonl") == rows


def test_row_is_on_disk_before_the_file_is_closed(tmp_path):
  lines = JsonLines(tmp_path / "a.jsonl", resume_at=None)
  lines.write({"step": 3})
  assert written(tmp_path / "a.jsonl") == [{"step": 3}]
  lines.close()


def test_later_steps_are_dropped_on_resume_and_earlier_ones_kept(tmp_path):
  path = tmp_path / "a.jsonl"
  # Two rows of a step, as in samples.jsonl, and one that is not in order.
  steps = [0, 1, 1, 2, 5, 3, 4]
  write(path, [{"step": step, "row": i} for i, step in enumerate(steps)])
  write(path, [{"step": 4, "row": "new"}], resume_at=3)
  assert [row["row"] for row in written(path)] == [0, 1, 2, 3, 5, "new"]


def test_new_run_does_not_keep_what_an_old_one_wrote(tmp_path):
  write(tmp_path / "a.jsonl", [{"step": 0}, {"step": 1}])
  write(tmp_path / "a.jsonl", [{"step": 0, "new": 1}])
  assert written(tmp_path / "a.jsonl") == [{"step": 0, "new": 1}]


def test_resume_without_a_file_makes_one(tmp_path):
  write(tmp_path / "a.jsonl", [{"step": 8}], resume_at=7)
  assert written(tmp_path / "a.jsonl") == [{"step": 8}]


@pytest.mark.parametrize("streams", [True, False])
def test_what_was_kept_is_where_a_bucket_has_it(tmp_path, monkeypatch, streams):
  # gcsfuse: since 3.0 a file is uploaded when it is closed; before, by fsync as well.
  path, uploaded = tmp_path / "a.jsonl", []
  lines = JsonLines(path, resume_at=None)
  fsync, real = os.fsync, lines._file

  class Watched:
    def __getattr__(self, name):
      return getattr(real, name)

    def close(self):
      real.close()
      uploaded.append(path.read_text())

  def upload(number):
    fsync(number)
    if not streams:
      uploaded.append(path.read_text())

  monkeypatch.setattr(os, "fsync", upload)
  lines._file = Watched()
  lines.write({"step": 1})
  assert not uploaded
  lines.sync()
  assert uploaded == ['{"step": 1}\n'] * (1 if streams else 2)
  lines.write({"step": 2})
  lines.close()
  assert written(path) == [{"step": 1}, {"step": 2}]


def test_the_latest_step_kept_on_resume_is_known(tmp_path):
  path = tmp_path / "a.jsonl"
  assert JsonLines(path, resume_at=4).last == -1
  write(path, [{"step": step} for step in (0, 3, 2, 6)])
  assert JsonLines(path, resume_at=4).last == 3


def test_line_that_a_kill_cut_anywhere_is_dropped(tmp_path):
  # Cut at every byte, also inside the two of ü and the three of “.
  path = tmp_path / "a.jsonl"
  write(path, [{"step": 1, "text": "ü"}, {"step": 2, "text": "“ü”"}])
  content = path.read_bytes()
  first = content.index(b"\n") + 1
  for cut in range(first, len(content) - 1):
    path.write_bytes(content[:cut])
    write(path, [{"step": 2, "text": "again"}], resume_at=2)
    assert [row["text"] for row in written(path)] == ["ü", "again"], cut


@given(text=st.text(max_size=20))
def test_any_text_a_model_writes_survives_a_resume(tmp_path_factory, text):
  # U+2028 and U+0085 end a line for str.splitlines, not for JSON lines.
  path = tmp_path_factory.mktemp("rows") / "a.jsonl"
  for response in (text, f"a\u2028b\u0085{text}"):
    write(path, [{"step": 1, "response": response}])
    write(path, [{"step": 2}], resume_at=1)
    assert written(path) == [{"step": 1, "response": response}, {"step": 2}]


def test_rows_are_utf8_whatever_the_locale(tmp_path):
  script = (
    "import pathlib, sys\nfrom opo_jax.storage.json_files import JsonLines\n"
    "path = pathlib.Path(sys.argv[1])\n"
    "JsonLines(path, resume_at=None).write({'step': 1, 'text': '\\xfc\\u201c'})\n"
    "JsonLines(path, resume_at=1).close()\n"
  )
  ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
  subprocess.run(
    [sys.executable, "-c", script, str(tmp_path / "a.jsonl")],
    env={**os.environ, **ascii_locale, "PYTHONPATH": os.pathsep.join(sys.path)},
    check=True,
  )
  assert written(tmp_path / "a.jsonl") == [{"step": 1, "text": "ü“"}]


# --- Timers ---


def test_timers_add_up_a_phase_and_count_the_whole_step(monkeypatch):
  clock = iter([100.0, 101.0, 103.0, 110.0, 110.5, 111.0, 115.0, 120.0])
  fake = types.SimpleNamespace(perf_counter=lambda: next(clock))
  monkeypatch.setattr(metrics, "time", fake)
  timers = Timers()
  for name in ("rollout", "update", "rollout"):
    with timers.phase(name):
      pass
  # rollout 2 + 4, update 0.5; the step also has what is in no phase.
  assert timers.metrics() == {
    "time/rollout_s": 6.0,
    "time/update_s": 0.5,
    "time/step_s": 20.0,
  }


# --- Finite ---


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_value_that_is_not_finite_names_its_step_and_every_metric(value):
  row = {"loss": 0.5, "grad_norm": value, "rollout/tokens": 3, "policy/entropy": value}
  with pytest.raises(
    FloatingPointError, match=r"^Step 17: grad_norm, policy/entropy not finite"
  ):
    check_finite(row, 17)


def test_finite_values_pass():
  check_finite({"step": 3, "loss": -1e30, "count": np.int64(2), "zero": 0.0}, 3)


# --- Responses ---


def describe(rewards, lengths, finished=None):
  finished = [True] * len(lengths) if finished is None else finished
  row = describe_responses(np.array(rewards), np.array(lengths), np.array(finished))
  assert np.isfinite(list(row.values())).all(), row
  return row


def test_responses_by_hand():
  # Right: lengths 2, 6; wrong: 10; unscorable: 30, in no mean of rewards.
  row = describe([1.0, 0.0, np.nan, 1.0], [2, 10, 30, 6], [True, True, False, True])
  assert row == pytest.approx(
    {
      "reward/mean": 2 / 3,
      "response_length/mean": 12.0,
      # deviations -10 -2 18 -6: squares 464, / 4 = 116
      "response_length/cv": math.sqrt(116) / 12,
      "response_length/truncated_fraction": 1 / 4,
      "response_length/correct_mean": 4.0,
      "response_length/wrong_mean": 10.0,
      # lengths -4 4 0, rewards 1/3 -2/3 1/3: -4 / sqrt(32 * 6/9)
      "response_length/reward_correlation": -4 / math.sqrt(32 * 6 / 9),
      "rollout/tokens": 48,
    }
  )


def test_what_was_not_measured_is_absent():
  means = {"response_length/correct_mean", "response_length/wrong_mean"}
  correlation = "response_length/reward_correlation"
  right = describe([1.0, 1.0], [3, 5])
  assert "response_length/wrong_mean" not in right and correlation not in right
  wrong = describe([0.0, 0.0], [3, 5])
  assert "response_length/correct_mean" not in wrong and correlation not in wrong
  equal_lengths = describe([0.0, 1.0], [4, 4])
  assert equal_lengths.keys() >= means and correlation not in equal_lengths


def test_step_without_a_scorable_answer_has_lengths_and_no_rewards():
  row = describe([np.nan, np.nan, np.nan], [3, 5, 8])
  assert row["response_length/mean"] == pytest.approx(16 / 3)
  assert "reward/mean" not in row
  assert not [name for name in row if "correct" in name or "wrong" in name]
  assert "response_length/reward_correlation" not in row


# --- run.json ---


def test_resumed_run_adds_a_start_and_keeps_the_first(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["/somewhere/opo_jax", "train", "--seed", "a b"])
  run_json.write_run_json(tmp_path, seed=4, facts={"platform": "cpu"})
  monkeypatch.setattr(sys, "argv", ["opo_jax", "train", "--steps", "9"])
  run_json.write_run_json(tmp_path, seed=4, facts={"platform": "tpu"})
  run = json.loads((tmp_path / "run.json").read_text())
  assert run["command"].endswith("opo_jax train --seed 'a b'")
  assert run["seed"] == 4 and run["platform"] == "cpu"
  assert [start["platform"] for start in run["starts"]] == ["cpu", "tpu"]
  assert run["starts"][1]["command"].endswith("opo_jax train --steps 9")
  assert run["versions"]["jax"] and run["python"] and run["started"]


def test_a_fact_that_shows_later_belongs_to_the_newest_start(tmp_path):
  for _ in range(2):
    run_json.write_run_json(tmp_path, seed=4, facts={})
  run_json.add_to_run_json(tmp_path, memory_bytes={"update": 7})
  run = json.loads((tmp_path / "run.json").read_text())
  assert ["memory_bytes" in start for start in run["starts"]] == [False, True]
  assert run["seed"] == 4


def test_tensorboard_holds_the_scalars_of_a_row(tmp_path):
  board = TensorBoard(tmp_path, resume_at=None)
  board.write({"step": 3, "reward/mean": 0.25})
  board.close()
  (file,) = tmp_path.glob("events.out.tfevents.*")
  assert b"reward/mean" in file.read_bytes()
  assert b"\x0a\x04step" not in file.read_bytes()

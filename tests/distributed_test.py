"""Whole runs of several real processes on loopback: as one, or not at all."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FLAGS = (
  *("--steps=3", "--sft.steps=3", "--sft.batch-size=16"),
  *("--rollout.prompts-per-step=8", "--rollout.group-size=4", "--checkpoint.every=1"),
  *("--eval.problems=8", "--eval.samples=2", "--eval.every=2"),
  # Pieces of the reward that each process measures on its own responses.
  *("--reward.format-weight=0.1", "--reward.format=think"),
  *("--reward.repetition-weight=0.5", "--reward.repetition-ngram=2"),
)


def start(directory, num_processes, devices_each, *flags, apart=None):
  """A run's processes, started; one alone needs no others.

  Args:
    apart: the directory that all but the first take for the run's.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices_each}",
  }
  command = [sys.executable, "-m", "opo_jax", "train", "quickstart"]
  command += [*FLAGS, *flags]
  processes = []
  for i in range(num_processes):
    meet = [
      f"--distributed.coordinator=localhost:{port}",
      f"--distributed.num-processes={num_processes}",
      f"--distributed.process-id={i}",
    ]
    log = (directory.parent / f"{directory.name}.{i}.log").open("w")
    processes.append(
      subprocess.Popen(
        [*command, f"--run={apart if i and apart else directory}"]
        + (meet if num_processes > 1 else []),
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=environment,
      )
    )
  return processes


def finish(processes, directory, timeout_s=600):
  for i, process in enumerate(processes):
    code = process.wait(timeout=timeout_s)
    log = directory.parent / f"{directory.name}.{i}.log"
    assert code == 0, log.read_text()[-3000:]


def rows(directory):
  lines = (directory / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def assert_same_run(one, other):
  assert len(rows(one)) == len(rows(other)) == 4
  for a, b in zip(rows(one), rows(other), strict=True):
    names = {name for name in a if not name.startswith(("time/", "throughput/"))}
    assert names <= b.keys()
    for name in names:
      assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), (a["step"], name)
  # Texts, lengths and rewards of the same rows: each was sampled and scored once.
  samples = [(each / "samples.jsonl").read_text() for each in (one, other)]
  assert samples[0] == samples[1]


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_several_processes_give_the_metrics_of_one(num_processes, tmp_path):
  one, several = tmp_path / "one", tmp_path / "several"
  finish(start(one, 1, 4), one)
  finish(start(several, num_processes, 4 // num_processes), several)
  assert_same_run(one, several)
  written = json.loads((several / "run.json").read_text())
  assert written["processes"] == num_processes
  assert (several / "report.html").is_file()


@pytest.mark.slow
def test_processes_that_do_not_see_one_directory_end_at_once_and_say_so(tmp_path):
  here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
  processes = start(here, 2, 1, apart=elsewhere)
  codes = [process.wait(timeout=240) for process in processes]
  # One may find the other gone before it has said the same itself.
  assert 2 in codes and 0 not in codes
  logs = [(tmp_path / f"here.{i}.log").read_text() for i in range(2)]
  assert any("config.json is there is [True, False]" in log for log in logs)
  assert not (here / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "num_processes"), [(1, 2), (0, 1)])
def test_a_killed_process_ends_the_others_and_a_start_resumes(
  killed, num_processes, tmp_path
):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  finish(start(whole, 2, 1), whole)
  processes = start(broken, 2, 1)
  saved = broken / "checkpoints" / "1"
  deadline = time.monotonic() + 300
  while not saved.is_dir():
    assert time.monotonic() < deadline and processes[0].poll() is None
    time.sleep(0.1)
  processes[killed].send_signal(signal.SIGKILL)
  other = 1 - killed  # 0 is the one that all have joined
  assert processes[other].wait(timeout=240) != 0
  log = (tmp_path / f"broken.{other}.log").read_text()
  assert any(word in log for word in ("peer", "heartbeat", "unhealthy", "terminated"))
  # With as many processes, or with one that has all devices: the place is the same.
  finish(start(broken, num_processes, 2 // num_processes), broken)
  assert_same_run(whole, broken)

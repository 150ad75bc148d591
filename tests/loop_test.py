"""The run as its user meets it: commands, files, resuming, refusals."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.quickstart import get_config
from opo_jax import __main__ as command_line
from opo_jax import build, learner, loop, models, sampler, sft
from opo_jax.config import Checkpoint, Eval, Record, Reward, Rollout
from opo_jax.data import arithmetic, prompts, sources
from opo_jax.data.prompts import Problem
from opo_jax.rewards import RewardPool
from opo_jax.run import TOKENIZERS, Run, load_policy
from opo_jax.sampler import engine
from opo_jax.scorer import Verifier, VerifierScorer, on_host
from opo_jax.storage.directory import RunCheckpoints
from opo_jax.storage.record import Record as RunRecord

ROOT = pathlib.Path(__file__).parents[1]
SMALL = [
  "--steps=4",
  "--sft.steps=3",
  "--sft.batch-size=16",
  "--rollout.prompts-per-step=8",
  "--rollout.group-size=4",
  "--eval.problems=8",
  "--eval.samples=2",
  "--eval.every=2",
  "--checkpoint.every=2",
  "--record.kl-rollouts=8",
]


def small_config(**changes):
  """What the flags SMALL make of quickstart."""
  base = get_config()
  config = dataclasses.replace(
    base,
    steps=4,
    sft=dataclasses.replace(base.sft, steps=3, batch_size=16),
    rollout=Rollout(prompts_per_step=8, group_size=4),
    eval=Eval(every=2, problems=8, samples=2),
    checkpoint=Checkpoint(every=2),
    record=Record(kl_rollouts=8),
  )
  return dataclasses.replace(config, **changes)


def run_command(*arguments):
  """Exit code of the command line, in this process."""
  try:
    return command_line.main([str(argument) for argument in arguments])
  except SystemExit as stop:
    return stop.code


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def starts(directory):
  return json.loads((directory / "run.json").read_text())["starts"]


def timeless(rows):
  """Metrics that are the same for the same run: all but what is read off a clock."""
  return [
    {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))}
    for row in rows
  ]


def sampled(run, problems, **options):
  """A first policy's rollouts, as a scorer reads them."""
  rollouts = build.make_sampler(run.config).sample(
    run.init_policy(),
    run.encode(problems),
    build.rollout_params(run.config),
    seed=1,
    **options,
  )
  return on_host(rollouts, run.mesh)


def make_scorer(run, verify):
  """The run's scorer with another function, which runs in this process."""
  scoring = VerifierScorer(
    run.config.reward,
    run.tokenizer,
    mesh=run.mesh,
    max_new_tokens=run.config.rollout.max_new_tokens,
    terminal=run.terminal,
    verifier=Verifier(verify),
  )
  scoring.pool = RewardPool(verify, workers=0, timeout_s=1)
  return scoring


compiled = []  # sampling programs of the run below


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs") / "small"
  before = sampler.compiled_programs()
  with contextlib.redirect_stdout(io.StringIO()) as told:
    assert run_command("train", "quickstart", "--run", directory, *SMALL) == 0
  assert "step 0" in told.getvalue() and "warning" not in told.getvalue()
  compiled.append(sampler.compiled_programs() - before)
  return directory


def test_a_run_leaves_all_its_files(run):
  names = {path.name for path in run.iterdir()}
  assert names >= {
    "config.json", "run.json", "metrics.jsonl", "samples.jsonl", "sft.jsonl",
    "checkpoints", "start", "tensorboard", "report.html", "figures",
  }  # fmt: skip
  assert list((run / "tensorboard").iterdir())
  assert len(list((run / "figures").glob("*.png"))) >= 8
  head = json.loads((run / "run.json").read_text())
  assert head.keys() >= {"commit", "dirty", "versions", "devices", "mesh", "command"}
  assert head["seed"] == 0 and head["devices"].startswith("8 x")


def test_metrics_hold_the_contracted_keys(run):
  rows = lines(run / "metrics.jsonl")
  assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
  contract = """reward/mean response_length/mean response_length/truncated_fraction
    policy/entropy policy/kl_to_start onpolicy/logprob_diff_max
    onpolicy/logprob_diff_mean onpolicy/kl onpolicy/clip_fraction loss grad_norm
    baseline/opo_minus_mean groups/zero_advantage_fraction
    groups/single_sample_fraction reward/unscorable_fraction rollout/tokens
    time/rollout_s time/reward_s time/update_s time/step_s throughput/tokens_per_s"""
  for row in rows[1:]:
    assert row.keys() >= set(contract.split())
    assert row["onpolicy/logprob_diff_max"] < 1e-4
    assert row["onpolicy/clip_fraction"] == 0
  evaluated = [row["step"] for row in rows if "eval/arithmetic/pass@1" in row]
  assert evaluated == [0, 2, 4]
  assert "eval/arithmetic/pass@4" not in rows[0], "2 samples cannot measure pass@4"


def test_phases_of_a_step_count_no_time_twice(run):
  rows = lines(run / "metrics.jsonl")
  for row in rows[1:]:
    phases = {k: v for k, v in row.items() if k.startswith("time/")}
    step = phases.pop("time/step_s")
    phases.pop("time/eval_s", None)  # beside the step, not in it
    assert sum(phases.values()) <= step, (row["step"], phases)
    assert all(seconds > 0 for seconds in phases.values())
  # A checkpoint counts for the row after it: its own was on disk before.
  assert ["time/checkpoint_s" in row for row in rows[1:]] == [False, False, True, False]


def test_memory_is_told_before_the_first_update(run):
  memory = starts(run)[0]["memory_bytes"]
  assert memory["device"] > memory["update"] > memory["sampling"] > 0


def test_a_whole_run_compiles_few_sampling_programs(run):
  """Prefill, keys, start, decode: one each for training and for evaluation; prefill and
  decode once more for a policy that an update has laid out."""
  assert 0 < compiled[0] <= 13


def test_the_sample_command_prints_what_evaluation_would_sample(run, capsys):
  assert run_command("sample", run, "3 + 4", "--eval.temperature=0") == 0
  printed = capsys.readouterr().out.strip()
  made = small_config(eval=Eval(every=2, problems=8, samples=2, temperature=0.0))
  opened = Run(made, run)
  prompts = opened.encode([Problem("", "3 + 4", "")])
  params = dataclasses.replace(build.eval_params(made), samples_per_prompt=1)
  rollouts = build.make_sampler(made).sample(
    load_policy(opened), prompts, params, seed=made.seed
  )
  tokens = np.asarray(rollouts.tokens)[0, : int(rollouts.lengths[0])]
  assert printed == opened.tokenizer.decode(tokens, skip_special_tokens=True).strip()
  assert printed


def test_a_sample_is_what_was_asked_and_answered(run):
  for row in lines(run / "samples.jsonl"):
    assert arithmetic.solve(row["prompt"]) == row["reference"]
    verified = arithmetic.verify(row["response"], row["reference"])
    assert row["reward"] == verified * row["finished"]


def test_the_same_command_on_a_finished_run_changes_nothing(run):
  before = (run / "metrics.jsonl").read_text()
  assert run_command("train", "quickstart", "--run", run, *SMALL) == 0
  assert (run / "metrics.jsonl").read_text() == before
  assert len(starts(run)) == 2


def test_lines_that_a_machine_took_with_it_are_told(run, tmp_path, capsys):
  kept = tmp_path / "run"
  shutil.copytree(run, kept)
  rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
  (kept / "metrics.jsonl").write_text("".join(rows[:2]))  # steps 0 and 1
  capsys.readouterr()
  assert run_command("train", "quickstart", "--run", kept, *SMALL) == 0
  (told,) = [
    line for line in capsys.readouterr().out.splitlines() if "lines of" in line
  ]
  last = json.loads(rows[-1])["step"]
  assert told.startswith(f"warning: metrics.jsonl has no lines of steps 2 to {last}:")


def test_a_run_goes_on_with_other_settings_of_time_and_memory_alone(run):
  flags = ["--rollout.slots=8", "--profile.steps=3:4"]
  assert run_command("train", "quickstart", "--run", run, *SMALL, *flags) == 0
  made = json.loads((run / "config.json").read_text())
  assert made["rollout"]["slots"] == 8


@pytest.mark.parametrize(
  "broken_after", [1, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 3))]
)
def test_a_broken_and_resumed_run_equals_an_unbroken_one(
  run, tmp_path, monkeypatch, broken_after
):
  """Broken after a step's lines were written and before its checkpoint was."""
  write_samples = RunRecord.samples

  def break_down(self, step, responses):
    write_samples(self, step, responses)
    if step == broken_after:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(RunRecord, "samples", break_down)
    with pytest.raises(KeyboardInterrupt):
      loop.train(small_config(), tmp_path / "run")
  with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3, "loss"')  # the kill cut a line off
  loop.train(small_config(), tmp_path / "run")
  for name in ("metrics.jsonl", "samples.jsonl"):
    resumed, unbroken = lines(tmp_path / "run" / name), lines(run / name)
    assert timeless(resumed) == timeless(unbroken)


def test_what_goes_wrong_while_a_step_is_written_stops_the_run(tmp_path, monkeypatch):
  """On its thread; and a checkpoint of a step whose lines are not there is not made."""

  def fail(self, step, responses):
    time.sleep(0.2)  # the next step samples
    raise OSError("disk full")

  def save(self, *rest):
    raise AssertionError("a checkpoint before the lines it promises")

  monkeypatch.setattr(RunRecord, "samples", fail)
  monkeypatch.setattr(RunCheckpoints, "save_state", save)
  base = small_config(checkpoint=Checkpoint(every=1), eval=Eval(0, problems=1))
  config = dataclasses.replace(base, sft=dataclasses.replace(base.sft, steps=0))
  with pytest.raises(OSError, match="disk full"):
    loop.train(config, tmp_path / "run")


def test_answers_scored_while_others_are_sampled_earn_what_they_earn_after(
  tmp_path, monkeypatch
):
  def measure(response, reference):
    if len(response) % 5 == 0:
      raise ArithmeticError(f"{len(response)} characters")
    return len(response) + 0.1 * int(reference)

  monkeypatch.setattr(engine, "MIN_REPORT_TOKENS", 2)
  base = small_config(reward=Reward(workers=1, max_unscorable_fraction=1.0))
  config = dataclasses.replace(base, rollout=dataclasses.replace(base.rollout, slots=8))
  problems = [Problem(str(i), "a1b2c3", str(i)) for i in range(8)]
  run = Run(config, tmp_path)
  with make_scorer(run, measure) as scoring:
    scoring.begin(problems)
    rollouts = sampled(run, problems, on_ended=scoring.add)
    early, num_early = scoring.finish(rollouts), scoring.batch.num_early
    scoring.begin(problems)
    late = scoring.finish(rollouts)
  assert 8 <= num_early < 32
  assert early.texts == late.texts
  np.testing.assert_array_equal(early.values, late.values)
  np.testing.assert_array_equal(early.verified, late.verified)
  values = early.values
  assert len(set(values[values > 0])) > 1, "the test wants some that are not alike"


def test_another_config_is_refused_and_nothing_is_overwritten(run, capsys):
  before = {p: p.read_bytes() for p in run.glob("*.json*")}
  code = run_command("train", "quickstart", "--run", run, *SMALL, "--seed=1")
  assert code == 2
  assert "--seed: 0 -> 1" in capsys.readouterr().err
  assert {p: p.read_bytes() for p in run.glob("*.json*")} == before


def test_evaluation_of_a_run_shows_the_start_policy_beside_it(run, capsys):
  assert run_command("eval", run, "--eval.samples=4", "--eval.problems=16") == 0
  rows = json.loads((run / "eval" / "results.json").read_text())["policies"]
  assert rows.keys() == {"start", "step 4"}
  assert rows["start"] != rows["step 4"]
  assert "maj@4" in capsys.readouterr().out


def test_exported_policy_is_the_trained_one(run, tmp_path):
  assert run_command("export", run, tmp_path / "out") == 0
  exported = models.load(tmp_path / "out")
  trained = load_policy(Run(small_config(), run))
  for ours, theirs in zip(
    jax.tree.leaves(trained), jax.tree.leaves(exported), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)
  tokenizer = prompts.load_tokenizer(str(tmp_path / "out"))
  assert prompts.encode_prompt(tokenizer, "a3b4c2") == prompts.encode_prompt(
    arithmetic.tokenizer(), "a3b4c2"
  )
  assert exported.eos_ids == (tokenizer.eos_token_id,)
  card = (tmp_path / "out" / "README.md").read_text()
  rows = lines(run / "metrics.jsonl")
  name = "eval/arithmetic/pass@1"
  start, low, high = (rows[0][name + end] for end in ("", "_low", "_high"))
  assert f"| arithmetic/pass@1 | {start:.3g} [{low:.3g}, {high:.3g}] |" in card
  assert "## The last step, 4" in card
  assert f"| reward/mean | {rows[-1]['reward/mean']:.3g} |" in card
  assert "| advantage | `opo` |" in card and "base_model" not in card


def test_a_run_can_start_from_an_exported_policy(run, tmp_path):
  assert run_command("export", run, tmp_path / "out") == 0
  start = [*SMALL, "--sft.steps=0", "--steps=1", f"--model.path={tmp_path}/out"]
  directory = tmp_path / "next"
  assert run_command("train", "quickstart", "--run", directory, *start) == 0
  first, last = lines(directory / "metrics.jsonl")[0], lines(run / "metrics.jsonl")[-1]
  name = "eval/arithmetic/response_length"
  assert first[name] == last[name], "the same policy, the same evaluation"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["quikstart"], "did you mean quickstart"),
    (["quickstart", "--rolout.group-size=4"], "--rollout.group-size"),
    (["quickstart", "--rollout.prompts-per-step=30"], "--rollout.prompts-per-step 32"),
    (["quickstart", "--mesh.data=3"], "does not fill 8 devices"),
    (["quickstart", "--mesh.fsdp=1", "--mesh.tensor=8", "--model.mlp-width=100"],
     "multiple of 8"),
    (["quickstart", "--rollout.max-prompt-tokens=8"], "--rollout.max-prompt-tokens"),
    (["quickstart", "--data.tokenizer=nowhere/at-all"], "--data.tokenizer"),
    (["quickstart", "--eval.benchmarks=gsm9k"], "gsm8k"),
    (["quickstart", "--data.train=gsm8k"], "--sft.steps 0"),
    (["quickstart", "--model.vocab-size=4"], "--model.vocab-size"),
    (["quickstart", "--model.path=nowhere/at-all"], "--model.path"),
    (["quickstart", "--rollout.temperature=0"], "--rollout.temperature"),
    (["quickstart", "--eval.temperature=-1"], "--eval.temperature is -1"),
    (["quickstart", "--model.num-layers=0"], "--model.num-layers is 0"),
    (["quickstart", "--reward.verifier=math"], "--reward.workers 2"),
    (["quickstart", "--algorithm.updates-per-batch=2"], "ppo_clip"),
  ],
)  # fmt: skip
def test_a_mistake_ends_with_one_line_and_leaves_nothing(
  arguments, message, tmp_path, capsys
):
  directory = tmp_path / "run"
  assert run_command("train", *arguments, "--run", directory) == 2
  error = " ".join(capsys.readouterr().err.replace("│", " ").split())
  assert message in error
  assert not directory.exists()


def test_a_tokenizer_without_end_token_is_refused(tmp_path, monkeypatch):
  def endless():
    tokenizer = made()
    tokenizer.eos_token = None
    return tokenizer

  made = arithmetic.tokenizer
  monkeypatch.setitem(TOKENIZERS, "arithmetic", endless)
  with pytest.raises(ValueError, match="no end token"):
    loop.train(small_config(), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("empty", ["train", "test"])
def test_an_empty_data_set_is_refused(tmp_path, monkeypatch, empty):
  def load(name, split, **fields):
    return [] if split == empty else arithmetic.load(split)

  monkeypatch.setattr(sources, "load", load)
  with pytest.raises(ValueError, match=r"0 problems|no test problems"):
    loop.train(small_config(), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_gap_between_sampler_and_learner_is_told(tmp_path, capsys):
  run = Run(small_config(), tmp_path)
  loop._warn_of_gap(run, {"step": 7, "onpolicy/logprob_diff_max": 3e-5})
  assert capsys.readouterr().out == ""
  loop._warn_of_gap(run, {"step": 8, "onpolicy/logprob_diff_max": 2e-3})
  assert "step 8" in capsys.readouterr().out


def test_the_logged_learning_rate_is_the_one_of_the_step(tmp_path):
  base = small_config()
  config = dataclasses.replace(
    base,
    sft=dataclasses.replace(base.sft, steps=0),
    algorithm=dataclasses.replace(base.algorithm, loss="ppo_clip", updates_per_batch=2),
    optimizer=dataclasses.replace(
      base.optimizer, schedule="linear", learning_rate=0.008
    ),
  )
  loop.train(config, tmp_path / "run")
  rates = [
    row["learning_rate"] for row in lines(tmp_path / "run" / "metrics.jsonl")[1:]
  ]
  # 4 steps of 2 updates: 8 optimiser steps from 0.008 to 0, every second one is told.
  assert rates == pytest.approx([0.008, 0.006, 0.004, 0.002])


def test_a_directory_of_something_else_is_refused(tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(ValueError, match="not empty"):
    loop.train(small_config(), tmp_path)


def test_unscorable_responses_are_counted_and_stop_the_run_above_a_share(tmp_path):
  run = Run(small_config(), tmp_path)
  problems = [Problem(str(i), "a1b2c3", "1") for i in range(8)]
  rollouts = sampled(run, problems)
  rollouts = dataclasses.replace(rollouts, finished=np.ones(32, bool))

  def sometimes(response, reference):
    calls.append(response)
    if len(calls) % limit == 0:
      raise ArithmeticError("no such number")
    return 1.0

  with make_scorer(run, sometimes) as scoring:

    def score(rollouts):
      scoring.begin(problems)
      return scoring.finish(rollouts)

    calls, limit = [], 8
    rewards = score(rollouts)
    scorable = ~np.isnan(rewards.verified)
    assert (~scorable).sum() == 4 and (rewards.verified[scorable] == 1).all()
    assert rewards.metrics["reward/unscorable_fraction"] == 4 / 32
    calls, limit = [], 3
    with pytest.raises(RuntimeError, match="no such number"):
      score(rollouts)
    # One of 32 that ended, and it cannot be scored: truncated rows count in the share.
    calls, limit = [], 1
    one = dataclasses.replace(rollouts, finished=np.arange(32) == 5)
    verified = score(one).verified
    assert np.flatnonzero(np.isnan(verified)).tolist() == [5] and len(calls) == 1


# --- parts of a user's own ------------------------------------------------------------


class ForeignSampler:
  """An engine of somebody else: draws a digit per response from its own generator."""

  def sample(self, policy, prompts, params, *, seed, first_prompt=0, version=-1,
             on_ended=None):  # fmt: skip
    G, K, T = len(prompts), params.samples_per_prompt, params.max_new_tokens
    digits = np.random.default_rng(seed).integers(5, 10, (G * K, 1)).tolist()
    rollouts = sft.as_rollouts(
      [prompt for prompt in prompts for _ in range(K)],
      [[*digit, 1] for digit in digits],
      [True] * (G * K),
      max_new_tokens=T,
    )
    rollouts = dataclasses.replace(
      rollouts,
      prompts=rollouts.prompts[::K],
      prompt_lengths=rollouts.prompt_lengths[::K],
      prompt_ids=jnp.repeat(jnp.arange(G), K),
      version=jnp.int32(version),
    )
    logprobs = learner.response_logprobs(policy, rollouts)
    return dataclasses.replace(rollouts, logprobs=logprobs, sampling_logprobs=logprobs)


def test_the_loop_runs_with_a_foreign_sampler(tmp_path):
  base = small_config(steps=2, eval=Eval(every=2, problems=8, samples=2))
  config = dataclasses.replace(base, sft=dataclasses.replace(base.sft, steps=0))
  assert loop.train(config, tmp_path / "run", sampler=ForeignSampler())
  rows = lines(tmp_path / "run" / "metrics.jsonl")
  assert [row["step"] for row in rows] == [0, 1, 2]
  for row in rows[1:]:
    assert row["response_length/mean"] == 2 and row["rollout/tokens"] == 64
    assert row["onpolicy/logprob_diff_max"] < 1e-5
  assert all(len(row["response"]) == 1 for row in lines(tmp_path / "run/samples.jsonl"))


def test_groups_of_another_size_are_refused(tmp_path):
  class Merging(ForeignSampler):
    def sample(self, *arguments, **options):
      rollouts = super().sample(*arguments, **options)
      return dataclasses.replace(rollouts, prompt_ids=rollouts.prompt_ids // 2)

  base = small_config(steps=1, eval=Eval(every=0, problems=8, samples=2))
  config = dataclasses.replace(base, sft=dataclasses.replace(base.sft, steps=0))
  with pytest.raises(ValueError, match=r"groups of \[8, 8, 8, 8, 0.*needs 4"):
    loop.train(config, tmp_path / "run", sampler=Merging())


# --- whole processes ------------------------------------------------------------------


def start(directory, *arguments, devices=1, experiment="quickstart"):
  environment = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
  }
  command = [sys.executable, "-m", "opo_jax", "train", experiment]
  return subprocess.Popen(
    [*command, "--run", str(directory), *arguments],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process):
  _, error = process.communicate()
  assert process.returncode == 0, error


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_unbroken_one(tmp_path):
  flags = [*SMALL, "--steps=9", "--checkpoint.every=3"]
  finish(start(tmp_path / "unbroken", *flags))
  process = start(tmp_path / "killed", *flags)
  metrics = tmp_path / "killed" / "metrics.jsonl"
  while not metrics.exists() or metrics.read_text().count("\n") < 6:
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  finish(start(tmp_path / "killed", *flags))
  rows = [
    timeless(lines(tmp_path / d / "metrics.jsonl")) for d in ("unbroken", "killed")
  ]
  assert len(rows[0]) == 10
  assert rows[0] == rows[1]


@pytest.mark.slow
def test_quickstart_learns(tmp_path):
  finish(start(tmp_path / "run"))
  rows = lines(tmp_path / "run" / "metrics.jsonl")
  first, last = rows[0], rows[-1]
  assert 0.20 <= first["eval/arithmetic/pass@1"] <= 0.45
  assert last["eval/arithmetic/pass@1"] >= 0.85
  assert max(row["onpolicy/logprob_diff_max"] for row in rows[1:]) < 1e-4
  assert rows[1]["response_length/cv"] >= 0.3
  assert rows[1]["response_length/reward_correlation"] > 0.1
  # The collapse it is told beside: short guesses, right one time in five.
  finish(start(tmp_path / "collapse", "--steps=30", experiment="quickstart_collapse"))
  last = lines(tmp_path / "collapse" / "metrics.jsonl")[-1]
  assert last["response_length/mean"] < 4
  assert last["eval/arithmetic/pass@1"] < 0.3


@pytest.mark.slow
@pytest.mark.skipif(
  "OPO_DATA_DIR" not in os.environ, reason="OPO_DATA_DIR names no real data"
)
def test_gsm8k_smoke_runs_on_real_data(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  finish(start(tmp_path / "run", experiment="gsm8k_smoke"))
  rows = lines(tmp_path / "run" / "metrics.jsonl")
  assert [row["step"] for row in rows] == [0, 1, 2]
  assert rows[-1]["reward/unscorable_fraction"] == 0
  assert "How many" in (tmp_path / "run" / "samples.jsonl").read_text()

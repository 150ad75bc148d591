"""The eval command: nothing is sampled twice, and nothing is mixed up."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import pytest

from experiments import gsm8k_smoke
from experiments.quickstart import get_config
from opo_jax import __main__ as command_line
from opo_jax import build, sft
from opo_jax.config import Eval
from opo_jax.data import arithmetic, sources
from opo_jax.evaluation import pass_rates, read_responses, summarise
from opo_jax.evaluation.evaluator import Evaluator
from opo_jax.run import Run
from opo_jax.storage.checkpoint import fingerprint
from opo_jax.storage.config_file import from_dict, to_dict

FLAGS = ["--eval.problems=6", "--eval.samples=2", "--eval.chunk=2"]


def run_command(*arguments):
  try:
    return command_line.main([str(argument) for argument in arguments])
  except SystemExit as stop:
    return stop.code


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of two untrained steps: each scales the weights by 1.5."""
  directory = tmp_path_factory.mktemp("runs") / "small"
  base = get_config()
  config = dataclasses.replace(
    base,
    sft=dataclasses.replace(base.sft, steps=0),
    rollout=dataclasses.replace(base.rollout, max_new_tokens=12),
    eval=Eval(problems=4, samples=2),
  )
  return untrained(config, directory)


@jax.jit
def scaled(policy):
  return jax.tree.map(lambda leaf: 1.5 * leaf, policy)


def untrained(config, directory):
  problems = arithmetic.load("train")
  made = Run(config, directory)
  made.write_head()
  state = build.make_learner(config, made.mesh).init(sft.start_policy(made))
  stream = sources.ProblemStream(problems, seed=0)
  with made.directory.checkpoints() as checkpoints:
    for step in (1, 2):
      policy = scaled(state.policy)
      state = dataclasses.replace(state, policy=policy, step=jnp.int32(step))
      checkpoints.save_state(step, state, stream.state())
  return directory


@pytest.fixture
def asked(monkeypatch):
  """(first, number of problems) of every call that sampled answers."""
  calls, respond = [], Evaluator.respond

  def counted(self, policy, benchmark, first=0, last=None):
    if len(calls) == asked.dies_after:
      raise KeyboardInterrupt
    responses = respond(self, policy, benchmark, first, last)
    calls.append((first, len({response.id for response in responses})))
    return responses

  asked.dies_after = None
  monkeypatch.setattr(Evaluator, "respond", counted)
  asked.calls = calls
  return asked


@pytest.fixture(scope="module")
def results(run):
  """The directory of an evaluation of the last step beside the start."""
  assert run_command("eval", run, *FLAGS) == 0
  return run / "eval"


def file(results, policy="step_2", kind="responses", benchmark="arithmetic"):
  return results / policy / f"{benchmark}.{kind}.jsonl"


def test_results_hold_every_response_and_the_start_policy_beside_the_last(results):
  written = json.loads((results / "results.json").read_text())
  assert list(written["policies"]) == ["start", "step 2"]
  for name, row in written["policies"].items():
    responses = read_responses(file(results, name.replace(" ", "_")))
    assert len(responses) == 12 and {row.sample for row in responses} == {0, 1}
    scores = summarise(responses)
    assert row == {f"eval/arithmetic/{key}": value for key, value in scores.items()}
    lines = file(results, name.replace(" ", "_"), "problems").read_text().splitlines()
    assert [json.loads(line) for line in lines] == pass_rates(responses)
  answers = [read_responses(file(results, name)) for name in ("start", "step_2")]
  assert [row.id for row in answers[0]] == [row.id for row in answers[1]]
  assert [row.response for row in answers[0]] != [row.response for row in answers[1]]
  for row in answers[0]:
    right = arithmetic.verify(row.response, row.reference) and row.finished
    assert row.reward == float(right)
  table = (results / "results.md").read_text()
  assert "| start " in table and "| step 2 " in table and "mean@2" in table


def test_a_killed_evaluation_goes_on_and_samples_nothing_twice(
  run, results, tmp_path, asked
):
  out = tmp_path / "killed"
  # Nothing was answered yet: other settings may be tried in the same place.
  asked.dies_after = 0
  assert run_command("eval", run, "--out", out, *FLAGS, "--eval.samples=3") == 130
  # 2 policies x 3 chunks; the kill comes in the second policy's second chunk.
  asked.dies_after = 4
  assert run_command("eval", run, "--out", out, *FLAGS) == 130
  assert not (out / "results.json").exists()
  asked.dies_after = None
  assert run_command("eval", run, "--out", out, *FLAGS) == 0
  assert asked.calls == [(0, 2), (2, 2), (4, 2)] * 2
  # And once more there is nothing to do.
  assert run_command("eval", run, "--out", out, *FLAGS) == 0
  assert len(asked.calls) == 6
  for policy in ("start", "step_2"):
    assert file(out, policy).read_bytes() == file(results, policy).read_bytes()
  for name in ("results.json", "results.md"):
    assert (out / name).read_text() == (results / name).read_text()


def test_answers_do_not_depend_on_what_is_asked_together(run, results, tmp_path, asked):
  flags = ["--eval.problems=6", "--eval.samples=2", "--eval.chunk=4"]
  assert run_command("eval", run, "--out", tmp_path, *flags) == 0
  assert asked.calls == [(0, 4), (4, 2)] * 2
  assert file(tmp_path).read_bytes() == file(results).read_bytes()


def test_a_directory_of_other_settings_is_refused_with_the_difference(
  run, results, capsys
):
  before = {path: path.read_bytes() for path in results.rglob("*.*")}
  for flag, told in (
    ("--eval.samples=4", "--eval.samples: 2 -> 4"),
    ("--eval.split=train", "--eval.split: 'test' -> 'train'"),
    ("--rollout.max-new-tokens=9", "--rollout.max-new-tokens: 12 -> 9"),
  ):
    assert run_command("eval", run, *FLAGS, flag) == 2
    assert told in capsys.readouterr().err
  assert {path: path.read_bytes() for path in results.rglob("*.*")} == before
  # Another policy under the same name, too: of a run that was made anew.
  path = results / "step_2" / "settings.json"
  settings = json.loads(path.read_text())
  start = json.loads((results / "start" / "settings.json").read_text())
  assert settings == start | {"policy": settings["policy"]}
  assert settings["policy"] != start["policy"]
  path.write_text(json.dumps(settings | {"policy": "another"}))
  assert run_command("eval", run, *FLAGS) == 2
  assert "--policy: 'another' -> " in capsys.readouterr().err
  path.write_text(json.dumps(settings))


def test_checkpoints_are_named_by_their_step(run, results, tmp_path, capsys, asked):
  out = tmp_path / "out"
  assert run_command("eval", run, "--step", 1, 2, "--out", out, *FLAGS) == 0
  rows = json.loads((out / "results.json").read_text())["policies"]
  assert list(rows) == ["start", "step 1", "step 2"]
  assert file(out, "step_1").read_bytes() != file(out, "step_2").read_bytes()
  assert file(out).read_bytes() == file(results).read_bytes()
  capsys.readouterr()
  assert run_command("eval", run, "--step", 7, "--out", tmp_path / "no", *FLAGS) == 2
  assert "no checkpoint of step 7; there are 0 (the start) and [1, 2]" in (
    capsys.readouterr().err
  )


def test_several_benchmarks_and_the_training_split(run, tmp_path, monkeypatch, asked):
  problems = arithmetic.load("train")
  load = sources.load

  def with_own(name, split, **fields):
    return problems[:3] if name == "jsonl:my/own" else load(name, split, **fields)

  monkeypatch.setattr(sources, "load", with_own)
  flags = ["--eval.benchmarks", "arithmetic", "jsonl:my/own", "--eval.split=train"]
  assert run_command("eval", run, "--step", 0, "--out", tmp_path, *FLAGS, *flags) == 0
  row = json.loads((tmp_path / "results.json").read_text())["policies"]["start"]
  assert {key.rpartition("/")[0] for key in row} == {
    "eval/arithmetic", "eval/jsonl:my/own",
  }  # fmt: skip
  lines = file(tmp_path, "start", "problems", "jsonl_my_own").read_text().splitlines()
  assert [json.loads(line)["id"] for line in lines] == [p.id for p in problems[:3]]
  ids = {row.id for row in read_responses(file(tmp_path, "start"))}
  assert ids == {problem.id for problem in problems[:6]}


def test_over_long_prompts_are_left_out_counted_and_told(run, tmp_path, capsys):
  asked_for = [run, "--step", 0, "--out", tmp_path, *FLAGS]
  assert run_command("eval", *asked_for, "--rollout.max-prompt-tokens=11") == 0
  # <bos> <user> <assistant>, and two tokens for each of at most four digits.
  fitting = [p.id for p in arithmetic.load("test")[:6] if len(p.question) <= 8]
  responses = read_responses(file(tmp_path, "start"))
  assert list(dict.fromkeys(row.id for row in responses)) == fitting
  count = 6 - len(fitting)
  assert 0 < count < 6
  left_out = json.loads((tmp_path / "results.json").read_text())["data_left_out"]
  assert left_out == {"arithmetic/test": {"prompt_too_long": count}}
  told = f"arithmetic/test: problems left out: {count} by prompt_too_long."
  assert told in capsys.readouterr().out


@pytest.mark.slow
def test_training_takes_the_problems_whose_pass_rates_eval_has_measured(
  run, tmp_path, monkeypatch
):
  (tmp_path / "own_rule.py").write_text(
    "def reward(problem, response):\n  return float(len(response) % 2)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  flags = [
    "--reward.verifier=own_rule:reward", "--reward.truncated=scored",
    "--reward.workers=1",
    "--eval.problems=24", "--eval.samples=2",
  ]  # fmt: skip
  measured = tmp_path / "rates"
  asked_for = [run, "--step", 0, "--out", measured, "--eval.split=train", *flags]
  assert run_command("eval", *asked_for) == 0
  rates = file(measured, "start", "problems")
  lines = [json.loads(line) for line in rates.read_text().splitlines()]
  wanted = {line["id"] for line in lines if line["pass_rate"] == 0.5}
  assert len(lines) == 24 and 0 < len(wanted) < 24

  trained = tmp_path / "trained"
  command = [
    "train", "quickstart", "--run", trained, *flags, "--steps=1",
    "--eval.problems=1", "--sft.steps=0", "--rollout.max-new-tokens=12",
    "--rollout.prompts-per-step=32", "--rollout.group-size=2", "--record.samples=64",
    "--record.kl-rollouts=0", "--data.pass-rate-file", rates,
    "--data.min-pass-rate=0.4", "--data.max-pass-rate=0.6",
  ]  # fmt: skip
  assert run_command(*command) == 0
  left_out = json.loads((trained / "run.json").read_text())["data_left_out"]
  assert left_out == {"arithmetic/train": {"pass_rate": 2048 - len(wanted)}}
  samples = (trained / "samples.jsonl").read_text().splitlines()
  questions = {each.question for each in arithmetic.load("train") if each.id in wanted}
  assert {json.loads(line)["prompt"] for line in samples} == questions


def test_an_exported_model_is_evaluated_as_the_run_it_comes_from(
  run, results, tmp_path, capsys, monkeypatch
):
  (run / "metrics.jsonl").write_text('{"step": 2}\n')
  assert run_command("export", run, tmp_path / "model") == 0
  monkeypatch.chdir(tmp_path)
  flags = [
    *FLAGS, "--eval.benchmarks", "arithmetic", "--reward.verifier=arithmetic",
    "--data.instruction=", "--rollout.max-new-tokens=12",
  ]  # fmt: skip
  assert run_command("eval", tmp_path / "model", *flags) == 0
  out = tmp_path / "runs" / "eval-model" / "eval"
  assert file(out, "model").read_bytes() == file(results).read_bytes()
  capsys.readouterr()
  assert run_command("eval", tmp_path / "model", "--step", 3) == 2
  assert "is no run and has no step 3" in capsys.readouterr().err
  for name in ("runs/quickstrat", tmp_path / "nothing"):
    assert run_command("eval", name) == 2
    assert f"There is no {name}; give RUN=" in capsys.readouterr().err


def test_fingerprint_is_of_values_shapes_and_names_and_not_of_the_layout(run):
  tree = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4, jnp.bfloat16)}
  name = fingerprint(tree)
  mesh = jax.make_mesh((8,), ("x",))
  spread = jax.device_put(
    jnp.arange(16.0), jax.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  )
  assert fingerprint({"w": spread}) == fingerprint({"w": jnp.arange(16.0)})
  others = [
    {"w": tree["w"].at[0, 1].add(1e-7), "b": tree["b"]},
    {"w": tree["w"].T, "b": tree["b"]},
    {"v": tree["w"], "b": tree["b"]},
    {"w": tree["w"], "b": tree["b"].at[3].set(1.0078125)},
  ]
  assert len({name, *map(fingerprint, others)}) == 5


def test_a_run_reads_its_benchmarks_back_from_its_config(run):
  kept = json.loads((run / "config.json").read_text())
  assert kept["eval"]["benchmarks"] == ["arithmetic"]
  assert from_dict(kept).eval.benchmarks == ("arithmetic",)
  assert to_dict(from_dict(kept)) == kept


@pytest.mark.slow
@pytest.mark.skipif(
  "OPO_DATA_DIR" not in os.environ, reason="OPO_DATA_DIR names no real data"
)
@pytest.mark.parametrize(("benchmark", "count"), [("gsm8k", 1319), ("math500", 500)])
def test_every_real_problem_is_scored_end_to_end(
  benchmark, count, tmp_path, monkeypatch
):
  """The real prompts, tokenizer and verifier; the policy is tiny and random."""
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  directory = untrained(gsm8k_smoke.get_config(), tmp_path / "run")
  flags = [
    "--eval.benchmarks", benchmark, "--eval.problems=0", "--eval.samples=1",
    "--rollout.max-new-tokens=12", "--rollout.max-prompt-tokens=1024",
  ]  # fmt: skip
  assert run_command("eval", directory, "--step", 0, *flags) == 0
  responses = read_responses(file(directory / "eval", "start", benchmark=benchmark))
  assert len({row.id for row in responses}) == len(responses) == count
  assert {row.length for row in responses} == {12}
  # Noise is wrong, and none of it is too much for the verifier.
  assert {row.reward for row in responses} == {0.0}
  results = json.loads((directory / "eval" / "results.json").read_text())
  assert results["policies"]["start"][f"eval/{benchmark}/pass@1"] == 0.0
  assert results["data_left_out"] == {}

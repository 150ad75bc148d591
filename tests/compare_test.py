"""Runs are paired problem by problem and step by step; the page shows the result."""

import json
import re

import numpy as np
import pytest

from opo_jax import __main__ as command_line
from opo_jax.evaluation import Response, bootstrap_interval, per_problem
from opo_jax.reports import compare, style


@pytest.fixture
def no_figure(monkeypatch):
  monkeypatch.setattr(compare, "_figure", lambda *_: "")


def metrics(rates, *, length=4):
  """Metrics of problems solved `rates[id]` times of 4."""
  return per_problem(
    [
      Response(name, j, "so 4", "4", str(j < right), float(j < right), length, True)
      for name, right in rates.items()
      for j in range(4)
    ]
  )


def test_scores_are_paired_problem_by_problem():
  rng = np.random.default_rng(3)
  hard = {f"p{i}": int(rng.integers(0, 4)) for i in range(40)}
  # One more right for every third problem; the other way round in the file.
  better = {name: hard[name] + (int(name[1:]) % 3 == 0) for name in reversed(hard)}
  evaluations = {
    "a": {"start": {"sums": metrics(dict.fromkeys(hard, 0))},
          "step 9": {"sums": metrics(hard)}},
    "b": {"step 4": {"sums": metrics(better | {"only in b": 0})}},
  }  # fmt: skip
  lines = compare.score_differences(evaluations)["sums"]
  assert list(lines) == ["a, start", "a", "b"]
  found = lines["b"]["pass@1"]
  differences = [0.25 if i % 3 == 0 else 0.0 for i in range(40)]
  assert found.difference == pytest.approx(np.mean(differences))
  low, high = bootstrap_interval(sorted(differences))
  assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
  # Problems vary far more than the difference does: unpaired, nothing would be clear.
  spread = bootstrap_interval([right / 4 for right in hard.values()])
  assert found.is_clear and spread[1] - spread[0] > 2 * (found.high - found.low)
  # The value is over all problems of b, the difference over those of both.
  assert found.count == 40
  assert found.value == pytest.approx(sum(better.values()) / 4 / 41)
  assert lines["a"]["pass@1"].difference is None
  assert lines["a, start"]["pass@1"].difference == pytest.approx(
    -sum(hard.values()) / 160
  )
  assert lines["b"]["response_length"].difference == 0.0
  assert not lines["b"]["response_length"].is_clear


def test_benchmarks_that_runs_do_not_share_are_not_compared():
  evaluations = {
    "a": {"model": {"x": metrics({"p": 1})}},
    "b": {"model": {"y": metrics({"p": 2})}},
    "c": {"model": {"x": metrics({"q": 3})}},
    "d": {},
  }
  lines = compare.score_differences(evaluations)
  assert {name: list(kept) for name, kept in lines.items()} == {
    "x": ["a", "c"], "y": ["b"],
  }  # fmt: skip
  for line in (lines["x"]["c"], lines["y"]["b"]):
    assert line["pass@1"].difference is None and line["pass@1"].count == 0


def rows_of(values, first=1, key="reward/mean"):
  return [{"step": i, key: float(v)} for i, v in enumerate(values, start=first)]


def test_curves_are_paired_step_by_step_at_their_end():
  noise = np.random.default_rng(0).normal(size=60)
  rows = {
    "a": rows_of(noise[:40]),
    "b": rows_of(noise + np.where(np.arange(60) < 30, 5.0, 0.25)),
    "c": rows_of(noise[:20], first=101),
    "d": rows_of(noise, key="grad_norm"),
  }
  lines = compare.curve_differences(rows)
  # Steps 1 ... 40 in common; their last quarter is 31 ... 40.
  found = lines["b"]["reward/mean"]
  assert (found.count, found.difference) == (10, pytest.approx(0.25))
  assert found.low == pytest.approx(0.25) and found.high == pytest.approx(0.25)
  assert found.value == pytest.approx(noise[30:40].mean() + 0.25)
  assert lines["a"]["reward/mean"].value == pytest.approx(noise[30:40].mean())
  assert lines["a"]["reward/mean"].difference is None
  # The longer run first: its value, too, is of the steps in common.
  first = compare.curve_differences({name: rows[name] for name in "bac"})
  assert first["b"]["reward/mean"].value == pytest.approx(found.value)
  assert lines["c"]["reward/mean"].difference is None, "no step in common"
  assert lines["d"].keys() == {"grad_norm"}
  assert lines["d"]["grad_norm"].difference is None


def test_interval_over_steps_is_wider_where_neighbours_are_correlated():
  """Of a wandering curve, resampling single steps would give a third of the width."""
  rng = np.random.default_rng(1)
  wander, noise = np.zeros(400), rng.normal(size=400)
  for i in range(1, 400):
    wander[i] = 0.9 * wander[i - 1] + noise[i]
  single = bootstrap_interval(wander)
  low, high = compare.interval_over_steps(wander)
  assert low < wander.mean() < high
  assert high - low > 2 * (single[1] - single[0])
  # Independent steps: as wide as theirs, in the mean of 40 curves.
  ratios = []
  for values in rng.normal(size=(40, 200)):
    single, blocks = bootstrap_interval(values), compare.interval_over_steps(values)
    ratios.append((blocks[1] - blocks[0]) / (single[1] - single[0]))
  assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)
  assert compare.interval_over_steps([1.0, 2.0] * 3) is None


def test_a_difference_is_clear_where_its_interval_excludes_zero():
  for low, high, clear in ((0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.2, False)):
    assert compare.Difference(1.0, 0.1, low, high, 9).is_clear is clear
  assert not compare.Difference(1.0, 0.1).is_clear


# --- directories ---


def write_lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(directory, *, seed, rate=None, policies=("start", "step 12"), **config):
  rng = np.random.default_rng(seed)
  rows = [
    {"step": i}
    | ({"reward/mean": rng.random(), "grad_norm": 1.0 + rng.random()} if i else {})
    | ({"eval/sums/pass@1": 0.4} if i % 4 == 0 else {})
    for i in range(13)
  ]
  write_lines(directory / "metrics.jsonl", rows)
  (directory / "config.json").write_text(json.dumps({"seed": seed, **config}))
  if rate is not None:
    for policy in policies:
      responses = [
        {"id": f"p{i}", "sample": j, "response": "x", "reference": "4", "answer": "4"}
        | {"reward": float(rng.random() < rate), "length": 3, "finished": True}
        for i in range(30)
        for j in range(2)
      ]
      path = directory / "eval" / policy.replace(" ", "_") / "sums.responses.jsonl"
      write_lines(path, responses)
    (directory / "eval" / "results.json").write_text(
      json.dumps(
        {
          "policies": {name: {} for name in policies},
          "settings": {"eval": {"samples": 2}},
        }
      )
    )
  return directory


def without_pictures(page):
  return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "PICTURE", page.read_text())


def test_the_command_writes_a_page_a_figure_a_table_and_json(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setitem(style.STYLE, "savefig.dpi", 30)
  a = make_run(tmp_path / "a <1>", seed=0, rate=0.2, algorithm={"loss": "tis"})
  b = make_run(tmp_path / "b", seed=0, rate=0.8, algorithm={"loss": "gspo"})
  c = make_run(tmp_path / "c", seed=0)
  assert command_line.main(["compare", str(a), str(b), str(c)]) == 0
  out = tmp_path / "compare-a <1>-b-c"
  assert {path.name for path in out.iterdir()} == {
    "compare.html", "compare.json", "compare.md", "compare.png",
  }  # fmt: skip
  values = json.loads((out / "compare.json").read_text())
  found = values["scores"]["sums"]["b"]["pass@1"]
  assert found["count"] == 30 and found["low"] > 0.3
  assert values["curves"]["b"]["reward/mean"]["count"] == 3
  # The settings that differ and no others; a missing one is no difference.
  assert values["settings"] == {"algorithm.loss": {"a <1>": '"tis"', "b": '"gspo"'}}
  table = (out / "compare.md").read_text()
  assert " a <1>, start |" in table and "| pass@1 " in table
  assert "the last quarter of the shared steps (3 steps)" in table
  assert table.strip() in capsys.readouterr().out

  page = without_pictures(out / "compare.html")
  assert page.count("PICTURE") == 1 and "a &lt;1&gt; / b / c" in page
  assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", page)
  shown = f"{100 * found['difference']:+.1f} [{100 * found['low']:+.1f}, "
  assert f'<small class="clear">{shown}' in page
  assert "without paired scores:\nc." in page


def make_graded_run(directory, *, better, judge):
  """30 questions, 2 responses each; the true score is half the reward."""
  rng = np.random.default_rng(7)
  start = rng.normal(size=(30, 2))
  write_lines(
    directory / "metrics.jsonl",
    [{"step": i, "reward/mean": i + better} for i in range(1, 41)],
  )
  for policy, rewards in (("start", start), ("step_12", start + better)):
    responses = [
      {"id": f"p{i}", "sample": j, "response": "tea jam", "reference": "", "length": 3}
      | {"answer": None, "finished": True, "reward": reward, "true_score": reward / 2}
      for i, pair in enumerate(rewards.tolist())
      for j, reward in enumerate(pair)
    ]
    write_lines(directory / "eval" / policy / "waiter.responses.jsonl", responses)
  scores = {"eval/waiter/reward_score": 0.0}
  reward = {"verifier": "reward_model", "scored_by": judge}
  results = {"policies": {"start": scores, "step 12": scores}}
  results["settings"] = {"reward": reward}
  (directory / "eval" / "results.json").write_text(json.dumps(results))
  return directory


@pytest.mark.usefixtures("no_figure")
def test_graded_responses_are_compared_by_their_scores_and_have_no_pass_at_k(
  tmp_path,
):
  a = make_graded_run(tmp_path / "a", better=1.0, judge="one")
  b = make_graded_run(tmp_path / "b", better=1.5, judge="one")
  c = make_graded_run(tmp_path / "c", better=3.0, judge="another")
  page = compare.compare([a, b, c], tmp_path / "out")
  values = json.loads((tmp_path / "out" / "compare.json").read_text())
  lines = values["scores"]["waiter"]
  assert list(lines) == ["a, start", "a", "b", "c"]
  assert not [key for line in lines.values() for key in line if "@" in key]
  # Questions vary by more than 1, the difference does not at all.
  found = lines["b"]["reward_score"]
  assert found["difference"] == pytest.approx(0.5) and found["count"] == 30
  assert (found["low"], found["high"]) == pytest.approx((0.5, 0.5))
  assert lines["b"]["true_score"]["difference"] == pytest.approx(0.25)
  assert lines["a, start"]["reward_win_rate"]["value"] == 0.5
  assert lines["b"]["reward_win_rate"]["value"] > lines["a"]["reward_win_rate"]["value"]
  assert values["curves"]["b"]["reward/mean"]["difference"] == pytest.approx(0.5)
  # The rewards of another reward model are shown, not compared; true scores are.
  assert values["other_judge"] == ["c"]
  for found in (lines["c"]["reward_score"], lines["c"]["reward_win_rate"],
                values["curves"]["c"]["reward/mean"]):  # fmt: skip
    assert found["difference"] is None and found["value"] is not None
  assert lines["c"]["true_score"]["difference"] == pytest.approx(1.0)
  text = without_pictures(page)
  assert "rewards are not compared with it: c." in text and "pass@" not in text
  assert '<small class="clear">+0.250 [+0.250, +0.250]' in text


@pytest.mark.usefixtures("no_figure")
def test_rewards_of_reward_models_that_may_differ_are_not_compared(tmp_path):
  for name, model in (("a", "runs/rm"), ("b", "runs/rm"), ("c", ""), ("d", "")):
    make_run(
      tmp_path / name, seed=0, reward={"verifier": "reward_model", "model": model}
    )
  for names, apart in (("ab", []), ("ac", ["c"]), ("cd", ["d"])):
    compare.compare([tmp_path / name for name in names], tmp_path / "out")
    values = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert values["other_judge"] == apart


def test_models_without_training_have_scores_and_no_curves(tmp_path):
  paths = []
  for name, rate in (("a", 0.3), ("b", 0.4)):
    run = make_run(tmp_path / name / "m", seed=1, rate=rate, policies=["m"])
    (run / "metrics.jsonl").unlink()
    paths.append(run)
  page = compare.compare(paths, tmp_path / "out")
  values = json.loads((tmp_path / "out" / "compare.json").read_text())
  # Both directories are called m: their paths tell them apart.
  assert list(values["runs"]) == list(values["scores"]["sums"]) == list(map(str, paths))
  assert values["curves"] == {}
  assert "PICTURE" not in without_pictures(page)
  assert not (tmp_path / "out" / "compare.png").exists()


@pytest.mark.usefixtures("no_figure")
def test_settings_of_the_evaluation_that_differ_are_shown(tmp_path):
  for name, samples, system in (("a", 2, "Hi"), ("b", 4, "Ho")):
    data = {"system": system}
    run = make_run(tmp_path / name, seed=0, rate=0.5, data=data)
    path = run / "eval" / "results.json"
    settings = {"eval": {"samples": samples}, "data": data}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": settings}))
  compare.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
  values = json.loads((tmp_path / "out" / "compare.json").read_text())
  assert values["settings"] == {
    # A setting of both training and evaluation: shown once.
    "data.system": {"a": '"Hi"', "b": '"Ho"'},
    "evaluated.eval.samples": {"a": "2", "b": "4"},
  }


def test_usage_errors_take_one_line(tmp_path, capsys):
  run = make_run(tmp_path / "run", seed=0)
  (tmp_path / "empty").mkdir()
  for arguments, message in (
    ([run], "1 runs to compare; give two to 7"),
    ([run] * 2, "The same run is given twice"),
    ([run, tmp_path / "empty"], "empty holds neither metrics.jsonl nor eval/results"),
  ):
    assert command_line.main(["compare", *map(str, arguments)]) == 2
    assert message in capsys.readouterr().err

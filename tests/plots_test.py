"""The report shows what a run measured, nothing else, and is self-contained."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from opo_jax.reports import charts, plots, report, run_files, style

# What every step measures: value before training, its change by the end, noise.
CURVES = {
  "reward/mean": (0.2, 0.6, 0.04),
  "response_length/mean": (30, -8, 1),
  "policy/entropy": (1.2, -0.7, 0.02),
  "policy/kl_to_start": (0.0, 0.08, 0.001),
  "onpolicy/logprob_diff_max": (3e-6, 0, 2e-7),
  "loss": (0, 0, 0.01),
  "grad_norm": (0.6, 0, 0.1),
  "baseline/opo_minus_mean": (-0.03, 0, 0.006),
  "time/rollout_s": (1.4, 0, 0.05),
  "time/update_s": (0.9, 0, 0),
  "time/step_s": (2.8, 0, 0.05),
  "throughput/tokens_per_s": (2600, 0, 90),
}
EVIL = "</pre><script>alert('x')</script> & <b>$x_1$</b>"


def evaluation(benchmark: str, pass_1: float) -> dict[str, float]:
  row = {"response_length": 27.5, "truncated_fraction": 0.0125, "repetition": 0.062}
  row |= {"self_bleu": 0.75, "distinct_2": 0.125, "unique_answers": 2.375}
  row |= {"maj@4": 0.5, "maj@16": 0.625, "maj@16_low": 0.5, "maj@16_high": 0.75}
  for k in (1, 2, 4, 8, 16):
    value = 1 - (1 - pass_1) ** (k**0.6)
    row |= {f"pass@{k}": value, f"pass@{k}_low": value - 0.035}
    row[f"pass@{k}_high"] = value + 0.03
  return {f"eval/{benchmark}/{key}": value for key, value in row.items()}


def graded_evaluation(score: float) -> dict[str, float]:
  """Metrics of `waiter`, whose rewards are graded."""
  row = {"response_length": 5.5, "truncated_fraction": 0.0, "self_bleu": 0.25}
  scores = {"reward_score": 2 * score - 1, "true_score": score}
  scores |= {"reward_win_rate": score, "true_win_rate": score}
  for name, value in scores.items():
    row |= {name: value, f"{name}_low": value - 0.05, f"{name}_high": value + 0.04}
  return {f"eval/waiter/{key}": value for key, value in row.items()}


def training_rows(num_steps: int, seed: int = 0) -> list[dict[str, float]]:
  """Curves as a run writes them, with keys that come and go."""
  rng = np.random.default_rng(seed)
  start = evaluation("arithmetic", 0.217) | evaluation("held_out", 0.4)
  rows = [{"step": 0, **start, "time/eval_s": 20.0}]
  for step in range(1, num_steps + 1):
    x = 1 - np.exp(-3 * step / num_steps)
    row: dict[str, float] = {"step": step}
    for key, (first, change, noise) in CURVES.items():
      row[key] = float(first + change * x + noise * rng.normal())
    if step % 3:  # without a wrong response there is no mean length of them
      row["response_length/wrong_mean"] = 38 - 4 * x + float(rng.normal())
    if step % 20 == 0 or step == num_steps:
      row |= evaluation("arithmetic", 0.217 + 0.5 * x)
    if step == num_steps // 2:
      row |= evaluation("held_out", 0.52)
      del row["grad_norm"]
    rows.append(row)
  rows[1]["time/step_s"] = 41.0  # compilation
  return rows


def write_lines(path: Path, rows: list[dict]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def bare_run(run_dir: Path, rows: list[dict]) -> Path:
  write_lines(run_dir / "metrics.jsonl", rows)
  return run_dir


@pytest.fixture(scope="module", autouse=True)
def coarse_figures():
  """Figures of few pixels: no test looks at them."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(style.STYLE, "savefig.dpi", 30)
    yield


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
  run_dir = bare_run(tmp_path_factory.mktemp("runs") / "full", training_rows(110))
  config = {"experiment": "sums <quickly>", "seed": 7, "steps": 200}
  config["optimizer"] = {"learning_rate": 3e-4}
  (run_dir / "config.json").write_text(json.dumps(config))
  run = {"command": "train --seed 7", "started": "02:15", "commit": "0123abcd"}
  run |= {"dirty": True, "versions": {"jax": "0.9.9", "opo-jax": None, "flax": "0.12"}}
  again = {"command": "train again", "started": "10:15", "commit": None, "dirty": None}
  (run_dir / "run.json").write_text(json.dumps(run | {"starts": [run, again]}))
  warm = [{"step": i, "loss": 3 / i, "time/step_s": 0.3} for i in range(1, 81)]
  write_lines(run_dir / "sft.jsonl", warm)
  samples = [
    {"step": step, "response": EVIL, "reward": float(right), "finished": right}
    for step in (1, 40, 50, 60, 80, 90, 110)
    for right in (True, False)
  ]
  del samples[7]["reward"]  # step 60, the second: unscorable
  write_lines(run_dir / "samples.jsonl", samples)
  assert report.report(run_dir) == run_dir / "report.html"
  return run_dir


def figure_names(run_dir: Path) -> set[str]:
  return {path.stem for path in (run_dir / "figures").glob("*.png")}


def without_pictures(run_dir: Path) -> str:
  page = (run_dir / "report.html").read_text().replace("\u00a0", " ")
  return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "PICTURE", page)


def test_report_of_a_full_run_has_every_figure(full_run):
  names = {chart.name for chart in charts.CHARTS}
  assert figure_names(full_run) == names and {"pass_at_k", "sft"} < names
  page = without_pictures(full_run)
  assert page.count("<figure") == page.count("PICTURE") == 11


def test_report_fetches_nothing_and_escapes_the_text_of_the_run(full_run):
  page = without_pictures(full_run)
  targets = re.findall(r"\b(?:src|srcset|href|action)\s*=\s*[\"']?([^\"'\s>]+)", page)
  assert set(targets) == {"PICTURE"}
  assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", page)
  assert "&lt;/pre&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp;" in page
  assert "<h1>sums &lt;quickly&gt;</h1>" in page


def test_scores_of_the_start_policy_are_shown_with_the_final_ones(full_run):
  page = without_pictures(full_run)
  # 0.217 - 0.035 and 0.217 + 0.03, in percent.
  assert "<td>start</td>\n<td>21.7<small>[18.2, 24.7]</small></td>" in page
  # 0.217 + 0.5 (1 - e^-3) = 0.692 at the last step.
  assert "21.7 → 69.2 %" in page
  assert "start [18.2, 24.7] → step 110 [65.7, 72.2]" in page
  # The other benchmark was last evaluated half way.
  assert "<td>step 55</td>" in page and "<td>step 110</td>" in page
  # The first evaluation is the start policy's only if it precedes the first step.
  late = {"step": 5, **evaluation("late", 0.5)}
  assert run_files.start_and_last([late], "late") == [("step 5", late)]


def test_scores_beside_pass_at_k_are_in_the_table(full_run):
  page = without_pictures(full_run)
  heads = re.findall(r"<thead><tr><th>model</th>\n(.*?)</tr>", page, re.S)
  assert [re.findall("<th>(.*?)</th>", head) for head in heads[:2]] == [
    ["pass@1", "pass@2", "pass@4", "pass@8", "pass@16", "maj@4", "maj@16"],
    ["length", "truncated", "repetition", "self-BLEU", "distinct-2", "answers"],
  ]
  assert "<td>62.5<small>[50.0, 75.0]</small></td>" in page
  assert "<td>27.5</td>" in page and "<td>1.2</td>" in page and "<td>6.2</td>" in page
  assert "Evaluation by command" not in page


def test_results_of_make_eval_are_in_the_report(tmp_path, monkeypatch):
  monkeypatch.setattr(report, "CHARTS", ())
  run_dir = bare_run(tmp_path, training_rows(2))
  policies = {"start": evaluation("math500", 0.3), "step <7>": evaluation("x/y", 0.4)}
  (run_dir / "eval").mkdir()
  (run_dir / "eval" / "results.json").write_text(json.dumps({"policies": policies}))
  report.report(run_dir)
  page = without_pictures(run_dir)
  page = page[page.index("Evaluation by command") :]
  tables = re.findall(r"<h3>(.*?)</h3>(.*?)</table>", page, re.S)
  assert [name for name, _ in tables] == ["math500", "x/y"]
  # A policy that was not asked a benchmark has no line there.
  assert re.findall("<tr><td>(.*?)</td>", tables[0][1]) == ["start"]
  assert re.findall("<tr><td>(.*?)</td>", tables[1][1]) == ["step &lt;7&gt;"]
  assert "<td>30.0<small>[26.5, 33.0]</small></td>" in tables[0][1]


def test_graded_responses_have_scores_and_win_rates_and_no_verdict(tmp_path):
  rows = [
    {"step": i, "reward/mean": -0.2 + 0.1 * i}
    | (graded_evaluation(0.44 + 0.04 * i) if i % 5 == 0 else {})
    for i in range(11)
  ]
  run_dir = bare_run(tmp_path / "graded", rows)
  rewards = {1: -1.5, 2: 0.75, 6: 0.9, 7: 2.25}
  samples = [
    {"step": step, "response": f"r{step}", "reward": reward, "length": 3}
    for step, reward in rewards.items()
  ]
  write_lines(run_dir / "samples.jsonl", samples)
  report.report(run_dir)
  page = without_pictures(run_dir)
  assert "pass@" not in page and "correct" not in page.split("</style>")[1]
  # The start beside the last, in their own units: -0.12 = 2 x 0.44 - 1.
  for label, value in (
    ("waiter, reward", "-0.120 → 0.680"),
    ("waiter, true score", "0.440 → 0.840"),
    ("waiter, true wins", "44.0 → 84.0 %"),
  ):
    card = rf'{label}</div>\s*<div class="value">{re.escape(value)}</div>'
    assert re.search(card, page), label
  assert "start [0.390, 0.480] → step 10 [0.790, 0.880]" in page
  assert '<span class="low">low reward</span>' in page and "-1.5" in page
  assert figure_names(run_dir) == {"reward", "diversity"}
  with_scores = (run_dir / "figures" / "reward.png").read_bytes()
  bare = [{k: v for k, v in r.items() if not k.startswith("eval/")} for r in rows]
  (chart,) = [chart for chart in charts.CHARTS if chart.name == "reward"]
  assert charts.render(chart, bare) != with_scores


def test_headlines_summarise_the_run_without_the_loss(full_run):
  page = without_pictures(full_run)
  labels = re.findall(r'<div class="card">\s*<div class="label">([^<]*)<', page)
  assert labels == [
    *("arithmetic, pass@1", "held_out, pass@1", "Largest log-prob gap"),
    *("KL to start", "Entropy", "RL steps", "Time", "Throughput"),
  ]
  assert "of 200 configured" in page
  assert "above 0.0001 at 0 of 110 steps" in page
  # 109 x 2.8 s and 41 s; 20 s beside the steps; 80 x 0.3 s.
  assert "RL 6 min, evaluation 20 s, SFT 24 s" in page


def test_command_commit_and_configuration_are_shown(full_run):
  page = without_pictures(full_run)
  assert "0123abcd with uncommitted changes" in page
  assert "<dd>jax 0.9.9, flax 0.12</dd>" in page
  assert "<dt>resumed</dt>\n<dd>10:15, commit unknown: train again</dd>" in page
  assert page.count("<dt>resumed") == 1
  assert "learning rate 0.0003" in page and "&#34;learning_rate&#34;: 0.0003" in page


def test_every_verdict_has_an_early_a_middle_and_a_late_example(full_run):
  page = without_pictures(full_run)
  assert re.findall(r"<h3>Step (\d+): <span class=\"(\w+)\"", page) == [
    # The steps of samples in thirds: 1, 40, 50; 60, 80; 90, 110.
    *(("1", "correct"), ("1", "incorrect")),
    *(("60", "correct"), ("80", "incorrect"), ("60", "unscorable")),
    *(("110", "correct"), ("110", "incorrect")),
  ]
  assert page.count("no reward: unscorable") == 1
  assert page.count("tokens, truncated") == 4


def test_a_metric_that_was_not_measured_has_no_figure_and_no_number(tmp_path):
  rows = [{"step": step, "policy/entropy": 1.5 - 0.125 * step} for step in (1, 2, 3)]
  rows[1]["grad_norm"] = None
  rows[2]["policy/kl_to_start"] = float("nan")
  report.report(bare_run(tmp_path, rows))
  assert figure_names(tmp_path) == {"entropy"}
  page = without_pictures(tmp_path)
  body = page[page.index("<main>") :]
  assert re.findall(r'"value">([^<]*)<', body) == ["1.38 → 1.12", "3"]
  assert "KL" not in body and "pass@" not in body and "tokens/s" not in body
  assert not re.search(r"\b0\b", re.sub(r"<[^>]*>", "", body))


def test_shortest_runs_have_a_report(tmp_path, monkeypatch):
  names = {"reward", "entropy", "time", "on_policy_gap"}
  kept = [chart for chart in charts.CHARTS if chart.name in names | {"pass_at_k"}]
  monkeypatch.setattr(report, "CHARTS", kept)
  report.report(bare_run(tmp_path / "one", training_rows(1)))
  assert names <= figure_names(tmp_path / "one")
  report.report(bare_run(tmp_path / "none", training_rows(1)[:1]))
  assert figure_names(tmp_path / "none") == {"pass_at_k"}
  page = without_pictures(tmp_path / "none")
  assert "21.7 %" in page and "<td>step" not in page and "RL steps" not in page


def test_exactly_equal_log_probs_are_drawn_and_not_lost_on_the_log_axis():
  gaps = enumerate((0.0, 3e-6, 0.0), start=1)
  rows = [{"step": step, "onpolicy/logprob_diff_max": gap} for step, gap in gaps]
  [chart] = [chart for chart in charts.CHARTS if chart.name == "on_policy_gap"]
  [draw] = chart.panels[0](rows)
  ax = Figure().subplots()
  draw(ax)
  low, high = ax.get_ylim()
  [curve] = [line for line in ax.lines if line.get_label() == "largest token"]
  assert low < min(curve.get_ydata()) < max(curve.get_ydata()) < charts.GAP_BOUND < high


def test_diversity_is_drawn_for_each_benchmark_in_percent():
  rows = [{"step": 0, **evaluation("a", 0.2), **evaluation("b", 0.3)}]
  assert charts._diversity(rows) == [], "one point is no curve"
  rows.append({"step": 5, **evaluation("a", 0.4)})
  draws = charts._diversity(rows)
  ax = Figure().subplots()
  draws[0](ax)
  last = {line.get_label(): line.get_ydata()[-1] for line in ax.lines}
  assert len(draws) == 2 and ax.get_ylabel() == "a (%)"
  assert last == {"Self-BLEU": 75.0, "distinct-2": 12.5, "repetition": 6.2}


def test_phases_of_a_step_are_stacked_up_to_its_whole_time():
  phases = {"rollout": 2.0, "reward": 0.5, "update": 1.0, "measure": 0.25}
  row = {f"time/{name}_s": seconds for name, seconds in phases.items()}
  [draw] = charts._step_time([{"step": 0}, {"step": 1, **row, "time/step_s": 4.0}])
  ax = Figure().subplots()
  draw(ax)
  tops = {patch.get_label(): patch.get_data().values for patch in ax.patches}
  bottoms = [patch.get_data().baseline for patch in ax.patches]
  assert list(tops) == ["rollout", "reward", "update", "measure", "rest"]
  assert list(tops.values()) == [2.0, 2.5, 3.5, 3.75, 4.0]
  assert bottoms == [0.0, 2.0, 2.5, 3.5, 3.75]


def test_half_written_last_line_is_ignored(tmp_path):
  rows = [{"step": step, "loss": 0.5} for step in (1, 2)]
  path = bare_run(tmp_path, rows) / "metrics.jsonl"
  whole = path.read_bytes()
  for cut in (b'{"step": 3, "reward/me', b'{"note": "\xe2\x88', b'{"step"\n'):
    path.write_bytes(whole + cut)
    assert run_files.read_metrics(tmp_path) == rows


def test_a_malformed_line_elsewhere_is_named(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n\n{"step": 2, "los\n{"step": 3}\n')
  with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3 is not JSON"):
    report.report(tmp_path)
  path.write_text('{"step": 1}\n{"loss": 2}\n{"step": 3}\n')
  with pytest.raises(ValueError, match=r"line 2: expected an object with a \"step\""):
    report.report(tmp_path)


def test_run_without_metrics_says_what_to_do(tmp_path):
  for content in (None, "", "\n", '{"step": 1, "rew'):
    if content is not None:
      (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match="make train"):
      report.report(tmp_path)


def test_smoothing_averages_over_steps_and_not_over_recorded_points():
  steps, values = np.array([1.0, 2, 3, 10]), np.array([3.0, 6, 9, 100])
  # Window 3: step 1 sees 1-2, step 2 sees 1-3, step 3 sees 2-3, step 10 only itself.
  np.testing.assert_allclose(style.smoothed(steps, values, 3), [4.5, 6, 7.5, 100])


def test_compare_figure_takes_runs_with_different_measurements(tmp_path):
  runs = {
    r"_opo, $\frac$": bare_run(tmp_path / "a", training_rows(40)),
    "grpo": bare_run(tmp_path / "b", training_rows(25, seed=1)),
    "reward only": bare_run(tmp_path / "c", [{"step": 1, "reward/mean": 0.5}]),
    "graded": bare_run(tmp_path / "d", [{"step": 2} | graded_evaluation(0.5)]),
  }
  out = plots.compare_figure(runs, tmp_path / "new" / "compare.png")
  assert out.read_bytes().startswith(b"\x89PNG")


def test_compare_figure_refuses_no_run_no_curve_and_more_runs_than_colours(tmp_path):
  run_dir = bare_run(tmp_path / "run", [{"step": 1, "loss": 0.5}])
  for count in (0, len(style.RUN_COLORS) + 1):
    with pytest.raises(ValueError, match=f"{count} runs to compare"):
      plots.compare_figure({str(i): run_dir for i in range(count)}, tmp_path / "a.png")
  with pytest.raises(ValueError, match="none of the runs holds reward/mean"):
    plots.compare_figure({"run": run_dir}, tmp_path / "a.png")


def test_importing_reports_imports_no_jax():
  code = (
    "import sys, opo_jax.reports.compare; print(sorted("
    "m for m in sys.modules if m.split('.')[0] in ('jax', 'jaxlib', 'flax') "
    "or m == 'matplotlib.pyplot' or m.startswith('opo_jax.')"
    " and m.split('.')[1] not in ('reports', 'evaluation')))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"

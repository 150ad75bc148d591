"""A config survives its file, and a mistake in it is named before any device work."""

import ast
import dataclasses
import inspect
import json
import math
import pathlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opo_jax import __main__ as command_line
from opo_jax import config as config_lib
from opo_jax.config import (
  Algorithm,
  Config,
  Distributed,
  Model,
  Profile,
  Rollout,
)
from opo_jax.storage.config_file import (
  FREE_TO_CHANGE,
  conflicts,
  differences,
  from_dict,
  to_dict,
)


def config(flags):
  """The default config with these flags: {"rollout.group-size": 16}."""
  sections = {}
  for flag, value in flags.items():
    section, _, name = f".{flag}".replace("-", "_").rpartition(".")
    sections.setdefault(section.lstrip("."), {})[name] = value
  kwargs = sections.pop("", {})
  for section, values in sections.items():
    kwargs[section] = dataclasses.replace(getattr(Config(), section), **values)
  return Config(**kwargs)


def other_value(value):
  if isinstance(value, bool):
    return not value
  if isinstance(value, tuple):
    return (*value, "x")
  return value + "x" if isinstance(value, str) else value * 2 + 3


def config_with_no_default():
  """Every field differs from its default; the command line checks choices of names."""
  sections = {}
  for field in dataclasses.fields(Config):
    value = getattr(Config(), field.name)
    if dataclasses.is_dataclass(value):
      names = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
      changed = {name: other_value(v) for name, v in names.items()}
      changed |= {name: 0.5 for name in ("top_p", "min_p") if name in names}
      sections[field.name] = dataclasses.replace(value, **changed)
    else:
      sections[field.name] = other_value(value)
  # 13 updates need a multiple.
  sections["rollout"] = dataclasses.replace(sections["rollout"], prompts_per_step=117)
  sections["profile"] = Profile(steps="5:8")
  algorithm = dict(updates_per_batch=13, loss="ppo_clip")
  sections["algorithm"] = dataclasses.replace(sections["algorithm"], **algorithm)
  del sections["distributed"]  # no property of a run
  return Config(**sections)


def test_config_survives_its_json_file():
  config = config_with_no_default()
  assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
  assert from_dict(json.loads(json.dumps(to_dict(Config())))) == Config()


def test_every_field_of_another_config_is_a_difference():
  leaves = sum(
    len(dataclasses.fields(value)) if dataclasses.is_dataclass(value) else 1
    for name, value in vars(Config()).items()
    if name != "distributed"
  )
  lines = differences(to_dict(Config()), to_dict(config_with_no_default()))
  assert len(lines) == leaves
  assert len({line.split(":")[0] for line in lines}) == leaves


def test_the_addresses_of_processes_are_not_in_the_file():
  there = Config(distributed=Distributed("host:1", num_processes=2, process_id=1))
  assert to_dict(there) == to_dict(Config())


def test_differences_are_flags_with_both_values():
  old = to_dict(Config(seed=3))
  rollout, algorithm = Rollout(prompts_per_step=48), Algorithm(advantage="grpo")
  new = to_dict(Config(rollout=rollout, algorithm=algorithm))
  assert differences(old, new) == [
    "--algorithm.advantage: 'opo' -> 'grpo'",
    "--rollout.prompts-per-step: 32 -> 48",
    "--seed: 3 -> 0",
  ]
  assert differences(old, old) == []


def test_what_changes_time_and_memory_alone_is_no_conflict():
  old = to_dict(Config())
  new = to_dict(
    Config(
      seed=1,
      model=Model(remat="block"),
      profile=Profile("2:3"),
      rollout=Rollout(slots=8),
    )
  )
  assert len(differences(old, new)) == 4
  assert conflicts(old, new) == ["--seed: 0 -> 1"]
  # A name of no field would be without effect.
  for flag in FREE_TO_CHANGE:
    section, name = flag.removeprefix("--").replace("-", "_").split(".")
    assert name in old[section], flag


def test_a_profile_names_its_first_and_last_step():
  assert Config(profile=Profile(steps="5:8")).profile.span == (5, 8)
  assert Config(profile=Profile(steps="100:100")).profile.span == (100, 100)
  assert Config().profile.span is None


def test_field_that_one_config_lacks_is_a_difference():
  assert differences({"a": 1, "b": {"c": 2}}, {"b": {}}) == [
    "--a: 1 -> None",
    "--b.c: 2 -> None",
  ]


def test_unknown_and_missing_keys_are_refused_by_name(subtests):
  for section, missing in ((None, "seed"), ("rollout", "slots"), ("optimizer", "b1")):
    with subtests.test(section):
      values = to_dict(Config())
      part = values if section is None else values[section]
      where = "Config" if section is None else section
      part["group_sise"] = 4
      with pytest.raises(ValueError, match=rf"{where}.* fields \['group_sise'\]"):
        from_dict(values)
      del part["group_sise"], part[missing]
      with pytest.raises(ValueError, match=rf"{where}.* misses \['{missing}'\]"):
        from_dict(values)


def test_values_of_another_type_are_refused_with_their_section(subtests):
  values = to_dict(Config())
  for section, value, message in (
    ("model", [1], "model is no object of fields"),
    ("model", "x", "model is no object of fields"),
    ("seed", "x", "a value of Config is of another type"),
    ("eval", values["eval"] | {"benchmarks": 3}, "is of another type"),
  ):
    with subtests.test(f"{section}: {value}"), pytest.raises(ValueError, match=message):
      from_dict(values | {section: value})
  with pytest.raises(ValueError, match="Config is no object of fields"):
    from_dict([values])


def test_a_broken_config_file_ends_every_command_with_one_line(
  subtests, tmp_path, capsys
):
  run, other = tmp_path / "run", tmp_path / "other"
  for directory in (run, other):
    directory.mkdir()
    (directory / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
  commands = [[name, run] for name in ("eval", "report", "variance")]
  commands += [["compare", run, other], ["export", run, tmp_path / "out"]]
  commands += [["sample", run, "?"], ["train", "quickstart", "--run", run]]
  for content in ('{"seed": 1', "[1]", "", "[" * 100_000):
    (run / "config.json").write_text(content)
    for command in commands:
      with subtests.test(f"{command[0]}: {content[:10]}"):
        assert command_line.main([*map(str, command)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {run}/config.json")


def test_a_config_file_is_checked_like_a_config():
  values = to_dict(Config())
  values["rollout"]["temperature"] = 0.0
  with pytest.raises(ValueError, match=r"--rollout\.temperature"):
    from_dict(values)


# Flags, and the error that they end with.
REFUSED = [
  *(
    ({flag: value}, f"--{flag} is {value}; it must be at least 1.")
    for value in (0, -3)
    for flag in (
      "steps",
      "model.vocab-size",
      "model.num-layers",
      "sft.batch-size",
      "reward-model.steps",
      "reward.repetition-ngram",
      "rollout.prompts-per-step",
      "rollout.group-size",
      "rollout.max-prompt-tokens",
      "rollout.max-new-tokens",
      "algorithm.updates-per-batch",
      "checkpoint.every",
      "checkpoint.keep",
      "eval.samples",
      "eval.chunk",
      "record.print-every",
    )
  ),
  *(
    ({flag: -1}, f"--{flag} is -1; it must be at least 0.")
    for flag in (
      "seed",
      "model.lora-rank",
      "data.min-pass-rate",
      "reward.workers",
      "reward.overlong-weight",
      "sft.steps",
      "rollout.slots",
      "algorithm.micro-batch-tokens",
      "algorithm.clip-high",
      "optimizer.learning-rate",
      "optimizer.warmup-steps",
      "eval.every",
      "eval.temperature",
      "record.kl-rollouts",
    )
  ),
  ({"optimizer.learning-rate": math.nan}, "--optimizer.learning-rate is nan; it must"),
  ({"reward.timeout-s": 0.0}, "--reward.timeout-s is 0.0; it must be above 0."),
  ({"reward.memory-gib": 0.0}, "--reward.memory-gib is 0.0; it must be above 0."),
  *(
    ({f"{section}.{name}": value}, f"--{section}.{name} is {value}; it must be {words}")
    for section in ("rollout", "eval")
    for name, value, words in (
      ("top-k", -1, "at least 0."),
      ("top-p", 0.0, "above 0 and at most 1."),
      ("top-p", 1.5, "above 0 and at most 1."),
      ("min-p", -0.1, "at least 0 and at most 1."),
      ("min-p", 1.5, "at least 0 and at most 1."),
    )
  ),
  ({"rollout.temperature": 0.0}, "--rollout.temperature is 0.0; sampling for training"),
  ({"rollout.temperature": -1.0}, "--rollout.temperature is -1.0; sampling for"),
  *(
    (filters, "is not on-policy")
    for filters in (
      {"rollout.top-k": 5},
      {"rollout.top-p": 0.9},
      {"rollout.min-p": 0.1},
    )
  ),
  ({"eval.benchmarks": ()}, "--eval.benchmarks is empty; name at least one benchmark"),
  ({"eval.benchmarks": ("a", "b", "a")}, "--eval.benchmarks is a b a; name"),
  ({"algorithm.updates-per-batch": 2}, "--algorithm.loss ppo_clip, or 1 update"),
  *(
    (
      {
        "rollout.prompts-per-step": prompts,
        "algorithm.updates-per-batch": updates,
        "algorithm.loss": "ppo_clip",
      },
      f"use a multiple of {updates} (--rollout.prompts-per-step {suggested}).",
    )
    # 30 * 8 rows divide by 4, but the 30 groups do not: an update takes whole groups.
    for prompts, updates, suggested in ((30, 4, 32), (1, 7, 7), (15, 2, 16))
  ),
  ({"reward.verifier": "math"}, "and math may not return on some responses; use --rew"),
  ({"reward.verifier": "a.b:c"}, "--reward.workers 0 verifies in-process"),
  ({"reward.verifier": "reward_model"}, "use --reward.truncated scored or masked."),
  (
    {"reward.overlong-weight": 1.0, "reward.overlong-tokens": 25},
    "grows over 1 to 24 tokens (--reward.overlong-tokens 4).",
  ),
  (
    {"reward.overlong-weight": 1.0},
    "--reward.overlong-tokens is 0; the soft over",
  ),
  ({"data.max-pass-rate": 0.9}, "need the pass rates of the start policy: --data.pass"),
  (
    {
      "data.pass-rate-file": "x",
      "data.min-pass-rate": 0.9,
      "data.max-pass-rate": 0.1,
    },
    "--data.min-pass-rate 0.9 is above --data.max-pass-rate 0.1.",
  ),
  *(
    ({"profile.steps": steps}, f"--profile.steps is {steps!r}; give the first and the")
    for steps in ("8:5", "0:3", "5", "5:101", "5-8", "a:b", "5:8:9")
  ),
]
OFF_POLICY = {"algorithm.updates-per-batch": 2, "algorithm.loss": "ppo_clip"}
ACCEPTED = [
  OFF_POLICY,
  OFF_POLICY | {"rollout.top-k": 5},
  OFF_POLICY | {"rollout.top-p": 0.9},
  OFF_POLICY | {"rollout.min-p": 0.1},
  {"eval.top-k": 5, "eval.top-p": 0.9, "eval.min-p": 0.1, "eval.temperature": 0.0},
  {"reward.verifier": "math", "reward.workers": 2},
  {"reward.verifier": "preferences"},
  {"reward.verifier": "reward_model", "reward.truncated": "masked"},
  {"reward.overlong-weight": 1.0, "reward.overlong-tokens": 24},
  {"data.pass-rate-file": "x", "data.min-pass-rate": 0.1, "data.max-pass-rate": 0.9},
  {"profile.steps": "100:100"},
]


def test_a_mistake_is_refused_with_its_flag_and_what_to_do(subtests):
  for flags, message in REFUSED:
    with subtests.test(str(flags)):
      with pytest.raises(ValueError) as error:
        config(flags)
      assert message in str(error.value)


def test_what_is_just_right_is_accepted(subtests):
  for flags in ACCEPTED:
    with subtests.test(str(flags)):
      config(flags)


@given(prompts=st.integers(1, 40), updates=st.integers(1, 5))
def test_config_is_accepted_where_updates_take_whole_groups(prompts, updates):
  rollout = Rollout(prompts_per_step=prompts)
  algorithm = Algorithm(loss="ppo_clip", updates_per_batch=updates)
  try:
    Config(rollout=rollout, algorithm=algorithm)
  except ValueError as error:
    assert prompts % updates, error
  else:
    assert prompts % updates == 0


def test_config_cannot_be_changed_after_it_was_checked():
  config = Config()
  for thing in (config, config.rollout, config.algorithm):
    with pytest.raises(dataclasses.FrozenInstanceError):
      thing.steps = 0


def test_wrong_name_is_answered_with_the_near_ones():
  names = ["opo", "opo_loo", "opo_batch", "grpo"]
  assert config_lib.near_names("opo_lo", names).startswith("did you mean opo_loo")
  assert config_lib.near_names("qqqq", names) == (
    "there are ['grpo', 'opo', 'opo_batch', 'opo_loo']."
  )


def test_every_field_has_a_help_text_that_names_no_module():
  """A field's is the comment above it, a section's is its docstring."""
  source = inspect.getsource(config_lib)
  lines, without, texts = source.splitlines(), [], []
  for section in ast.parse(source).body:
    if not isinstance(section, ast.ClassDef) or section.name == "Limits":
      continue
    texts.append(ast.get_docstring(section))
    for field in section.body:
      is_flag = isinstance(field, ast.AnnAssign) and "field(" not in ast.unparse(field)
      if is_flag and not lines[field.lineno - 2].startswith("  # "):
        without.append(f"{section.name}.{field.target.id}")
  assert not without
  texts += [line for line in lines if line.startswith("  # ")]
  package = pathlib.Path(config_lib.__file__).parent
  modules = {path.stem for path in package.rglob("*.py")}
  for text in texts:
    named = re.findall(r"\(((?:\w+, )*\w+)\)", text)
    words = {word for each in named for word in each.split(", ")}
    assert not words & modules and ".py" not in text, text


def test_help_shows_every_flag_with_its_text(capsys):
  with pytest.raises(SystemExit) as done:
    command_line.main(["train", "quickstart", "--help"])
  assert done.value.code == 0
  shown = " ".join(re.sub(r"[^\w.,:;=()-]+", " ", capsys.readouterr().out).split())
  for flag, text in {
    "--steps INT": "RL steps. (default: 120)",
    "--model.fresh": "Read only config.json from path ; initialise the weights",
    "--rollout.top-p FLOAT": "On-policy training needs 1. (default: 1.0)",
    "mesh options": "Device mesh. One size may be -1",
  }.items():
    assert flag in shown and text in shown, flag

"""config.json: the config as plain values, and what may differ when a run resumes."""

import dataclasses
import json
from typing import Any

from opo_jax.config import Config, Distributed

# Flags that change only time and memory: a resumed run may change them.
FREE_TO_CHANGE = {
  "--model.remat", "--reward.workers", "--rollout.slots", "--rollout.gather-weights",
  "--algorithm.micro-batch-tokens", "--optimizer.offload", "--record.print-every",
  "--profile.steps",
}  # fmt: skip


def to_dict(config: Config) -> dict[str, Any]:
  """The content of `config.json`: nested plain values, tuples as lists."""
  values = json.loads(json.dumps(dataclasses.asdict(config)))
  del values["distributed"]  # no property of the run
  return values


def from_dict(values: dict[str, Any]) -> Config:
  """The inverse of `to_dict`.

  Raises:
    ValueError: an unknown or missing key, or a value of the wrong type.
  """

  def build(cls, values, where):
    if not isinstance(values, dict):
      raise ValueError(
        f"config.json: {where.rstrip('.') or 'Config'} is no object of fields, got"
        f" {str(values)[:80]!r}; restore the file of the run."
      )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown, missing = values.keys() - fields.keys(), fields.keys() - values.keys()
    if unknown or missing:
      raise ValueError(
        f"config.json was written by another version of opo_jax: {where or 'Config'}"
        f" has unknown fields {sorted(unknown)} and misses {sorted(missing)}; check out"
        " the commit named in run.json."
      )
    kwargs = {
      name: build(fields[name].type, value, f"{where}{name}.")
      if dataclasses.is_dataclass(fields[name].type)
      else tuple(value)
      if isinstance(value, list)
      else value
      for name, value in values.items()
    }
    try:
      return cls(**kwargs)
    except TypeError as error:  # A check compared a value of the wrong type.
      raise ValueError(
        f"config.json: a value of {where.rstrip('.') or 'Config'} is of another type"
        f" ({error}); restore the file of the run."
      ) from error

  own = {"distributed": dataclasses.asdict(Distributed())}
  return build(Config, values | own if isinstance(values, dict) else values, "")


def differences(old: dict[str, Any], new: dict[str, Any], prefix="") -> list[str]:
  """One line `--flag: old -> new` for every value that differs."""
  lines = []
  for key in sorted(old.keys() | new.keys()):
    before, after = old.get(key), new.get(key)
    if isinstance(before, dict) and isinstance(after, dict):
      lines += differences(before, after, f"{prefix}{key}.")
    elif before != after:
      flag = f"{prefix}{key}".replace("_", "-")
      lines.append(f"--{flag}: {before!r} -> {after!r}")
  return lines


def conflicts(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """The `differences` that a resumed run must not have."""
  return [
    line
    for line in differences(old, new)
    if line.partition(": ")[0] not in FREE_TO_CHANGE
  ]

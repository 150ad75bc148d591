"""The run directory: config.json, run.json, the start policy, checkpoints.

config.json    every setting            run.json       command, commit, versions
start/         the policy RL started from             checkpoints/   Orbax
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from opo_jax.config import Config
from opo_jax.devices import distributed
from opo_jax.models import lora
from opo_jax.storage.checkpoint import Checkpoints
from opo_jax.storage.config_file import conflicts, to_dict
from opo_jax.storage.json_files import read_json, write_json
from opo_jax.storage.run_json import write_run_json


class RunDirectory:
  """The files of a run that outlive its process.

  Args:
    path: of the directory; made by `write_head`.
    config: of the run.
  """

  def __init__(self, path: pathlib.Path, config: Config):
    self.path, self.config = path, config

  def check(self) -> None:
    """Refuses a directory of another config, and shows the difference.

    Raises:
      ValueError: its config.json differs, or it holds something else.
    """
    path = self.path / "config.json"
    if not path.exists():
      if self.path.exists() and {p.name for p in self.path.iterdir()} - {"run.json"}:
        raise ValueError(
          f"{self.path} is not empty and holds no run; give another RUN= directory."
        )
      return
    kept = read_json(path)
    changed = conflicts(kept, to_dict(self.config))
    if changed:
      raise ValueError(
        f"{self.path} holds a run of another config ({'; '.join(changed)}). Give"
        " another RUN= directory, or repeat the command that made this one to resume"
        " it."
      )

  def write_head(self, facts: dict[str, Any]) -> None:
    """Writes run.json and config.json; all processes must see them.

    Args:
      facts: of this start, for run.json: devices, mesh, problems left out.

    Raises:
      ValueError: some processes do not see the files.
    """
    distributed.barrier("checked")  # no process finds what another has begun to write
    config = self.path / "config.json"
    if distributed.is_first_process():
      self.path.mkdir(parents=True, exist_ok=True)
      write_run_json(self.path, seed=self.config.seed, facts=facts)
      write_json(config, to_dict(self.config))
    distributed.barrier("written")
    distributed.assert_same_on_all_hosts(config.is_file(), f"whether {config} is there")

  # --- the start policy -----------------------------------------------------------

  def has_start(self) -> bool:
    """Whether the start policy was saved: alike in every process."""
    with Checkpoints(self.path / "start") as kept:
      saved = kept.latest() is not None
    distributed.assert_same_on_all_hosts(
      saved, f"whether {self.path} has a start policy"
    )
    return saved

  def save_start(self, policy: Any) -> None:
    """Saves the policy that RL starts from."""
    with Checkpoints(self.path / "start") as kept:
      kept.save(0, policy, {"config": to_dict(self.config)})

  def load_start(self, abstract_policy: Any) -> Any:
    """The policy RL started from.

    Args:
      abstract_policy: its shapes and shardings.

    Raises:
      ValueError: the run has none yet.
    """
    with Checkpoints(self.path / "start") as kept:
      if kept.latest() is None:
        raise ValueError(f"{self.path} has no start policy yet; train first.")
      return kept.restore(0, abstract_policy)[0]

  # --- checkpoints ----------------------------------------------------------------

  def checkpoints(self, within: str = "") -> "RunCheckpoints":
    """The checkpoints of the RL phase, or of a phase with a directory of its own."""
    return RunCheckpoints(self.path / within / "checkpoints", self.config)

  def checkpoint_steps(self) -> list[int]:
    """The steps whose checkpoints are kept, at least one.

    Raises:
      ValueError: there is none.
    """
    with self.checkpoints() as checkpoints:
      if steps := checkpoints.steps():
        return steps
    raise ValueError(
      f"{self.path} has no checkpoint yet; train first (make train EXP=… RUN=…)."
    )

  def check_steps(self, steps: Sequence[int]) -> None:
    """Refuses steps without a checkpoint; 0 is the start policy.

    Raises:
      ValueError: names the steps there are.
    """
    kept = self.checkpoint_steps()
    if unknown := sorted(set(steps) - {0, *kept}):
      raise ValueError(
        f"{self.path} has no checkpoint of step {unknown[0]}; there are 0 (the start)"
        f" and {kept} (--checkpoint.every and --checkpoint.keep say which are kept)."
      )


class RunCheckpoints(Checkpoints):
  """Checkpoints of a phase: what its updates change, the data position, the seed.

  Frozen parameters (the base under LoRA adapters) lie in `start/`, not here.

  Args:
    directory: of the checkpoints.
    config: of the run.
  """

  def __init__(self, directory: pathlib.Path, config: Config):
    super().__init__(directory, keep=config.checkpoint.keep)
    self.directory, self.config = directory, config

  def save_state(self, step: int, state: Any, data_position: Any) -> None:
    """Starts writing the checkpoint of a step; `state` may be donated afterwards."""
    trained, _ = _split(state)
    host = {
      "data": data_position,
      "rng": {"seed": self.config.seed, "step": step},
      "config": to_dict(self.config),
    }
    self.save(step, trained, host)

  def restore_state(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
    """The state of a step, and the host's values.

    Args:
      step: of a checkpoint.
      state: arrays or shapes with shardings; its frozen parameters are kept.
    """
    trained, frozen = _split(state)
    trained, host = self.restore(step, trained)
    return _join(trained, frozen), host

  def resume(self, state: Any, stream: Any) -> tuple[int, Any]:
    """Continues from the newest checkpoint; moves `stream` to its position.

    Returns:
      The steps that are done, and the state after them: 0 and `state` itself where
      there is no checkpoint.

    Raises:
      ValueError: a checkpoint of another run.
    """
    done, run = self.latest() or 0, self.directory.parent
    distributed.assert_same_on_all_hosts(done, f"the last checkpoint in {run}")
    if not done:
      return 0, state
    state, host = self.restore_state(done, state)
    changed = conflicts(host["config"], to_dict(self.config))
    rng = {"seed": self.config.seed, "step": done}
    if int(state.step) != done or host["rng"] != rng or changed:
      raise ValueError(
        f"Checkpoint {done} in {run} is of another run; move it out of the directory,"
        " or give another RUN= directory."
      )
    stream.restore(host["data"])
    return done, state


def _split(state: Any) -> tuple[Any, Any]:
  """The state with trained parameters alone, and the frozen ones."""
  trained, frozen = lora.split(state.policy)
  return dataclasses.replace(state, policy=trained), frozen


def _join(state: Any, frozen: Any) -> Any:
  """The inverse of `_split`."""
  return dataclasses.replace(state, policy=lora.join(state.policy, frozen))

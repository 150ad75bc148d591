"""run.json: command, commit, versions and devices of every start of a run."""

import datetime
import json
import pathlib
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from opo_jax.storage.json_files import write_json

_PACKAGES = (
  "opo-jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "transformers",
  "tensorflow-datasets",
  "numpy",
)


def write_run_json(
  directory: pathlib.Path, *, seed: int, facts: dict[str, Any]
) -> None:
  """Where a run comes from. A resumed run adds an entry; the first stays first."""
  path = directory / "run.json"
  starts = json.loads(path.read_text())["starts"] if path.exists() else []
  commit, dirty = _commit()
  start = {
    "command": shlex.join(["python", "-m", "opo_jax", *sys.argv[1:]]),
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": commit,
    "dirty": dirty,
    "seed": seed,
    "python": platform.python_version(),
    "versions": {name: _version(name) for name in _PACKAGES},
    **facts,
  }
  starts.append(start)
  write_json(path, {**starts[0], "starts": starts})


def add_to_run_json(directory: pathlib.Path, **facts: Any) -> None:
  """Puts what showed only later into the newest start of run.json."""
  path = directory / "run.json"
  starts = json.loads(path.read_text())["starts"]
  starts[-1] |= facts
  write_json(path, {**starts[0], "starts": starts})


def _version(package):
  try:
    return version(package)
  except PackageNotFoundError:
    return None


def _commit():
  """(commit, dirty) of the source tree; (None, None) where it is not a checkout."""
  root = pathlib.Path(__file__).parent

  def git(*words):
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

  try:
    return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain").strip())
  except (OSError, subprocess.CalledProcessError):
    return None, None

"""JSON files that survive kills: whole files, and files of one object a line."""

import contextlib
import json
import os
import pathlib
from typing import Any


def write_json(path: pathlib.Path, values: Any) -> None:
  """Writes indented JSON, atomically."""
  replace_file(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def replace_file(path: pathlib.Path, content: bytes) -> None:
  """Replaces a file atomically: a kill leaves the old content or the new."""
  new = path.with_suffix(".new")
  new.write_bytes(content)
  new.replace(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object in a file of a run, such as config.json.

  Raises:
    ValueError: the file holds something else.
  """
  try:
    values = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON ({error}); restore the file.") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} holds no JSON object; restore the file.")
  return values


class JsonLines:
  """A file of one JSON object a line, keyed by `step`, that survives kills.

  Args:
    path: made if it is missing.
    resume_at: lines of later steps, and a half-written last line, are dropped: they
      are about to be written again. None starts anew.

  Attributes:
    last: the latest step whose lines were kept; -1 where there is none.
  """

  def __init__(self, path: pathlib.Path, *, resume_at: int | None):
    kept, self.last = [], -1
    if resume_at is not None and path.exists():
      # Bytes, and newlines alone: a kill may have cut a character in two, and
      # `str.splitlines` also breaks at U+2028 and the like, which answers may contain.
      for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
          if (step := json.loads(line)["step"]) <= resume_at:
            kept.append(line + b"\n")
            self.last = max(self.last, step)
    replace_file(path, b"".join(kept))
    self._path = path
    self._open()

  def _open(self):
    self._file = self._path.open("a", encoding="utf-8", newline="\n")

  def write(self, row: dict[str, Any]) -> None:
    self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
    self._file.flush()

  def sync(self) -> None:
    """Makes the written lines outlive the machine.

    A disk needs `fsync`; a bucket mounted with gcsfuse gets a file when it is closed
    (since 3.0 no sooner), https://github.com/GoogleCloudPlatform/gcsfuse, semantics.md.
    """
    os.fsync(self._file.fileno())
    self._file.close()
    self._open()

  def close(self) -> None:
    self._file.close()

"""TFDS builders: write rows once as ArrayRecord, read them one at a time.

TensorFlow is never imported, and `tensorflow_datasets` only to load a source.
"""

import contextlib
import dataclasses
import functools
import hashlib
import http.client
import io
import json
import logging
import operator
import os
import pathlib
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from opo_jax.data.prompts import Problem

_DOWNLOAD_TIMEOUT_S = 30


class Prepared(Sequence[Problem]):
  """A prepared split; indexing reads and decodes a row."""

  def __init__(self, builder: Any, split: str):
    with _quiet():
      self._rows = builder.as_data_source(split)

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    position = operator.index(index)
    if position < 0:
      position += len(self)
    if not 0 <= position < len(self):
      raise IndexError(f"problem {index} of {len(self)} does not exist.")
    row = self._rows[position]
    return Problem(**{key: value.decode() for key, value in row.items()})


def prepare(
  name: str,
  config: str,
  parsers: dict[str, Callable[[], list[Problem]]],
  *,
  homepage: str = "",
) -> Any:
  """Returns a builder with its data on disk, writing the data if necessary.

  TFDS writes to a temporary directory and renames it when complete, so that a failure
  leaves no partial data.

  Args:
    name: of the data set, `opo_<name>` on disk.
    config: names the content: other content needs another name, or old rows are read.
    parsers: split -> its problems, called only to write them.
    homepage: of the data set.
  """
  import tensorflow_datasets as tfds

  if (builder := find(name, config)) is not None:
    return builder
  with _quiet():
    builder = _build(name, config, parsers, homepage)
    try:
      builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      )
    except OSError:
      # Another process finished first; its rename won, and its data is equal.
      if (builder := find(name, config)) is None:
        raise
    return builder


def find(name: str, config: str) -> Any | None:
  """Returns the builder of `prepare` if its data is on disk, else None."""
  with _quiet():
    builder = _build(name, config, {}, "")
  return builder if builder.data_path.exists() else None


def _build(name: str, config: str, parsers, homepage: str) -> Any:
  import tensorflow_datasets as tfds

  return _builder(name)(
    parsers=parsers,
    homepage=homepage,
    data_dir=os.environ.get("TFDS_DATA_DIR"),
    config=tfds.core.BuilderConfig(name=config, version="1.0.0", description=config),
  )


@functools.cache
def _builder(data_set: str) -> Any:
  """Defines the TFDS builder, in a function so that TFDS is imported late."""
  import tensorflow_datasets as tfds

  # Not registered: TFDS has its own gsm8k, which needs TensorFlow; the two must share
  # neither a name nor a directory.
  class Problems(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Id, question and answer, in the order of the files."""

    name = f"opo_{data_set}"
    VERSION = tfds.core.Version("1.0.0")
    # No checksum file: `download` checks its own, and TFDS 4.9.10 needs the undeclared
    # package importlib_resources to look for one.
    url_infos = None

    def __init__(self, *, parsers, homepage, **kwargs):
      self._parsers, self._homepage = parsers, homepage
      super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          {field.name: tfds.features.Text() for field in dataclasses.fields(Problem)}
        ),
        homepage=self._homepage,
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager):
      # TFDS's own downloader has no timeout: without a network it waits forever.
      del dl_manager
      return {
        split: self._generate_examples(parse) for split, parse in self._parsers.items()
      }

    def _generate_examples(self, parse):
      for index, problem in enumerate(parse()):
        yield index, dataclasses.asdict(problem)

  return Problems


def download(url: str, *, sha256: str | None, local: str) -> bytes:
  """Downloads a URL and verifies its checksum.

  Args:
    url: public.
    sha256: of the content. None: the first download stores its checksum in
      `opo_checksums.json` next to the prepared data, and later downloads must match it.
    local: the file below `$OPO_DATA_DIR` that would replace it, for errors.

  Raises:
    ValueError: no network, or other content than expected.
  """
  remedy = f"set OPO_DATA_DIR to a directory that holds {local}"
  try:
    with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_S) as response:
      data = response.read()
  except (OSError, http.client.HTTPException) as error:
    raise ValueError(
      f"cannot download {url} ({error}); connect to the network, or {remedy}."
    ) from error
  found = hashlib.sha256(data).hexdigest()
  expected = sha256 or noted("opo_checksums.json", url) or found
  if found != expected:
    raise ValueError(
      f"{url} came with sha256 {found}, expected {expected}; a proxy or the authors may"
      f" have changed it: try again, or {remedy}."
    )
  if sha256 is None:
    note("opo_checksums.json", url, found)
  return data


def noted(file: str, key: str) -> str | None:
  """Reads the value that `note` stored for a key; None without one."""
  path = _beside_the_data(file)
  return json.loads(path.read_text()).get(key) if path.exists() else None


def note(file: str, key: str, value: str) -> None:
  """Stores a value in a JSON file next to the prepared data, for later processes."""
  path = _beside_the_data(file)
  if noted(file, key) == value:
    return
  values = json.loads(path.read_text()) if path.exists() else {}
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_suffix(f".{os.getpid()}")
  new.write_text(json.dumps(values | {key: value}, indent=2, sort_keys=True))
  new.replace(path)


def _beside_the_data(file: str) -> pathlib.Path:
  root = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return pathlib.Path(root).expanduser() / file


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Suppresses TFDS's progress bars, notices, and log lines below errors."""
  from tensorflow_datasets.core.utils import tqdm_utils

  active = tqdm_utils._active  # The setter is public, a getter is not.
  disabled = logging.root.manager.disable
  tqdm_utils.display_progress_bar(enable=False)
  logging.disable(max(disabled, logging.WARNING))
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.disable(disabled)
    tqdm_utils.display_progress_bar(enable=active)

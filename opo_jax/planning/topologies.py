"""TPU slices by name: memory and rates of their chips, devices that need not exist."""

import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.experimental import topologies

from opo_jax.config import near_names

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A generation of TPUs; memory and rates of one device, as JAX counts devices.

  Attributes:
    memory: bytes that a program may use.
    flops: bfloat16, per second.
    memory_rate: bytes per second from main memory (HBM).
    link_rate: bytes per second around a ring along one mesh axis, both directions.
    dims: of a slice's shape.
    max_chips: of the largest slice.
    counted: cores per chip in the number of Google's name of a slice (v5p-64): 2 where
      it counts TensorCores, 1 where it counts chips.
  """

  memory: float
  flops: float
  memory_rate: float
  link_rate: float
  dims: int
  max_chips: int
  counted: int


# Published peaks (https://cloud.google.com/tpu/docs; of links
# https://jax-ml.github.io/scaling-book/tpus). JAX sees two devices a chip of TPU7x.
CHIPS = {
  "v4": Chip(15.75 * GIB, 137e12, 614e9, 90e9, 3, 4096, 2),
  "v5e": Chip(15.75 * GIB, 197e12, 819e9, 90e9, 2, 256, 1),
  "v5p": Chip(95.0 * GIB, 459e12, 2765e9, 180e9, 3, 8960, 2),
  "v6e": Chip(31.25 * GIB, 918e12, 1640e9, 180e9, 2, 256, 1),
  "tpu7x": Chip(94.75 * GIB, 1153e12, 3690e9, 180e9, 3, 9216, 1),
}
# Other names of the same generations.
ALIASES = {
  "v5lite": "v5e", "v5litepod": "v5e", "trillium": "v6e", "v7x": "tpu7x",
  "ironwood": "tpu7x",
}  # fmt: skip


def chip(topology_name: str) -> Chip:
  """The chip of a valid topology name."""
  return CHIPS[topology_name.partition(":")[0]]


def topology(name: str) -> Sequence[Any]:
  """The devices of a slice such as `v5e:4x8` or `v5p:4x4x4`, which need not exist.

  Raises:
    ValueError: unknown generation, impossible shape, or no `libtpu`.
  """
  shape = _check(name)
  # libtpu would wait for the metadata server of a TPU VM, and refuse a second process.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  for variable in ("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):
    os.environ.setdefault(variable, "4")
  one_chip = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(shape) == 1 else {}
  with silenced_libtpu() as last_line:
    try:
      described = topologies.get_topology_desc(
        platform="tpu", topology_name=name, **one_chip
      )
    except Exception as error:
      reason = str(error).strip().splitlines()[-1]
      if "libtpu" in str(error).lower() or "not found" in str(error).lower():
        reason = "libtpu is not installed (make plan installs it; pip: opo-jax[plan])"
      raise ValueError(
        f"{name} cannot be described: {reason}. {last_line()}"
      ) from error
  return described.devices


def _check(name: str) -> list[int]:
  """The sizes of a slice's shape; raises ValueError where no such slice exists."""
  generation, _, shape = name.partition(":")
  if generation not in CHIPS:
    raise ValueError(_unknown_generation(name))
  chip = CHIPS[generation]
  example = f"TOPOLOGY={generation}:{_even_shape(32 if chip.dims == 2 else 64, chip)}"
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise ValueError(f"{name!r} has no shape; write {example}.")
  sizes = [int(size) for size in shape.split("x")]
  if len(sizes) != chip.dims or math.prod(sizes) > chip.max_chips:
    raise ValueError(
      f"{generation} slices have {chip.dims} dimensions and up to {chip.max_chips}"
      f" chips, not {shape}; write for example {example}."
    )
  one_chip = chip.dims == 2 and math.prod(sizes) == 1  # a host of its own
  if any(size % 2 for size in sizes[:2]) and not one_chip:
    raise ValueError(
      f"{generation} slices consist of hosts of 2x2 chips, which cannot make {shape};"
      f" write for example {example}."
    )
  return sizes


def _unknown_generation(name: str) -> str:
  """The error for a name whose generation is unknown, with the nearest known one."""
  generation = re.split("[:-]", name.lower())[0]
  generation = ALIASES.get(generation, generation)
  if generation in CHIPS and (count := re.search(r"-(\d+)$", name)):
    chip = CHIPS[generation]
    chips = max(int(count[1]) // chip.counted, 4)
    counted = "TensorCores, two a chip" if chip.counted == 2 else "chips"
    return (
      f"{name!r} has no shape: its {count[1]} counts {counted};"
      f" write TOPOLOGY={generation}:{_even_shape(chips, chip)}."
    )
  return (
    f"{name!r} is not a known TPU generation; {near_names(generation, CHIPS)}"
    " (TOPOLOGY=v5e:4x8)."
  )


def _even_shape(chips: int, chip: Chip) -> str:
  """The most even shape of a power of two of chips: 32 in three dimensions, 2x4x4."""
  sizes = [1] * chip.dims
  for _ in range(chips.bit_length() - 1):
    sizes[sizes.index(min(sizes))] *= 2
  return "x".join(map(str, sorted(sizes, key=lambda size: (size == 1, size))))


@contextlib.contextmanager
def silenced_libtpu() -> Iterator[Callable[[], str]]:
  """Keeps what libtpu writes to stderr, below Python, from the terminal.

  Yields:
    A function that returns the last line written.
  """
  sys.stderr.flush()
  stderr = os.dup(2)
  with tempfile.TemporaryFile() as file:
    os.dup2(file.fileno(), 2)

    def last_line() -> str:
      file.seek(0)
      lines = file.read().decode(errors="replace").strip().splitlines()
      return lines[-1] if lines else ""

    try:
      yield last_line
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)

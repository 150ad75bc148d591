"""Memory of a device: what a compiled program takes, and advice if it does not fit."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Memory:
  """Memory that XLA plans for a program, in bytes of one device.

  Attributes:
    arguments: its inputs, most of which exist before and after it.
    outputs: new arrays, donated arguments not counted again.
    temporaries: there while it runs.
  """

  arguments: int
  outputs: int
  temporaries: int

  @property
  def peak(self) -> int:
    return self.arguments + self.outputs + self.temporaries

  def parts_to_fit(self, device_bytes: int) -> int | None:
    """The number of micro-batches with which the temporaries fit.

    Args:
      device_bytes: memory of the device; a tenth stays free, for fragmentation.

    Returns:
      A power of two, 2 at least; None where already the arguments do not fit.

    >>> Memory(arguments=12, outputs=0, temporaries=60).parts_to_fit(30)  # 15 are left
    4
    """
    left = 0.9 * device_bytes - self.arguments - self.outputs
    if left <= 0:
      return None
    return max(2, 1 << math.ceil(math.log2(max(self.temporaries, 1) / left)))


def of(stats: Any) -> Memory:
  """Memory of a program from its `Compiled.memory_analysis()`."""
  return Memory(
    arguments=stats.argument_size_in_bytes,
    outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
  )


def gib(size_bytes: float) -> str:
  """A size in GiB, for messages.

  >>> gib(3.25 * 2**30), gib(21.4 * 2**20)
  ('3.2 GiB', '0.021 GiB')
  """
  size = size_bytes / 2**30
  return f"{size:.1f} GiB" if size >= 1 else f"{size:.2g} GiB"


@dataclasses.dataclass
class UpdateMemory:
  """What the update takes of a device, and what to do if it does not fit.

  Attributes:
    device_bytes: memory of a device.
    tokens: of a micro-batch now.
    least_tokens: of the smallest micro-batch there can be.
    offload: whether the optimiser's state is in the host's memory already.
    remat: what is computed again in the backward pass.
    measured: of the compiled update; None before it was compiled.
  """

  device_bytes: int
  tokens: int
  least_tokens: int
  offload: bool
  remat: str
  measured: Memory | None = None

  def advice(self) -> str:
    """Which flags make an update fit that did not."""
    known, device, parts = self.measured, gib(self.device_bytes), 2
    needed = f"The update does not fit into the {device} of a device."
    if known is not None:
      needed = (
        f"The update needs {gib(known.peak)} of the {device} of a device:"
        f" {gib(known.arguments)} of state and batch, {gib(known.temporaries)} more"
        " while it runs."
      )
      parts = known.parts_to_fit(self.device_bytes)
    state = "--optimizer.moment-dtype bfloat16, or more devices (--mesh.fsdp)"
    if not self.offload:
      state = f"--optimizer.offload, {state}"
    smaller = []
    if parts is not None:
      fewer = max(self.tokens // parts, self.least_tokens)
      smaller += (
        [f"--algorithm.micro-batch-tokens {fewer}"] if fewer < self.tokens else []
      )
      smaller += ["--model.remat block"] if self.remat == "none" else []
    if not smaller:
      return f"{needed} Make the state smaller: {state}."
    return f"{needed} Use {' or '.join(smaller)}; or make the state smaller: {state}."


@contextlib.contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
  """Turns XLA's out-of-memory error into one that names the flags to change.

  Args:
    advice: returns what did not fit and which flags make it smaller; called on error.

  Raises:
    RuntimeError: the block ran out of memory. Other errors pass unchanged.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    told = str(error).strip().splitlines()[0]
    raise RuntimeError(f"{advice()} XLA said: {told}") from error

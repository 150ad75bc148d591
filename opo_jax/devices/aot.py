"""Ahead-of-time programs: what a run will compile, from shapes alone."""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class AotProgram:
  """A traced program of a run, for devices that need not exist.

  Attributes:
    name: reshard, prefill, decode or update.
    traced: the program; `traced.lower().compile()` compiles it.
    arguments: by kind (weights, cache, rollouts), the shapes and layout of what memory
      holds beside the learner's state while the program runs. For reshard and prefill
      they include the outputs, which stay. `weights` are the sampler's own copy.
    rounds: iterations of the loop whose count is only known at run time (the
      micro-batches of an update).
    slots: responses decoded at a time, over all devices.
    half: decode with half the columns of its ring, to interpolate its cost.
  """

  name: str
  traced: jax.stages.Traced
  arguments: dict[str, Any]
  rounds: int = 1
  slots: int = 0
  half: jax.stages.Traced | None = None

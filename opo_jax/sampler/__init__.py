"""Sampler: prompts in, `Rollouts` out.

`generate` is the function to import; the jitted programs behind it are in `decoding`.
"""

from opo_jax.sampler.decoding import Ended
from opo_jax.sampler.engine import (
  bucket,
  compiled_programs,
  count_bucket,
  generate,
  memory_bytes,
  stream,
  trace,
)

__all__ = [
  "Ended",
  "bucket",
  "compiled_programs",
  "count_bucket",
  "generate",
  "memory_bytes",
  "stream",
  "trace",
]

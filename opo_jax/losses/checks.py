"""Checks of arguments that all losses share."""

import difflib

import jax
import jax.numpy as jnp
import numpy as np


def trainable(mask, segment_ids=None, **arrays):
  """The mask as bool, without padding; checks that all arrays are [N, T]."""
  arrays = {"mask": mask, "segment_ids": segment_ids, **arrays}
  shapes = {name: jnp.shape(a) for name, a in arrays.items() if a is not None}
  if len(set(shapes.values())) != 1 or len(shapes["mask"]) != 2:
    raise ValueError(f"Expected arrays of one shape [N, T], got {shapes}.")
  mask = jnp.asarray(mask, bool)
  if segment_ids is None:
    return mask
  if not jnp.issubdtype(jnp.result_type(segment_ids), jnp.integer):
    raise ValueError(
      f"Expected segment_ids of an integer type, got {jnp.result_type(segment_ids)}."
    )
  _check_segments(segment_ids)
  return mask & (segment_ids > 0) & (segment_ids <= mask.shape[1])


def _check_segments(segment_ids):
  """Raises ValueError for concrete ids out of range; under `jit` none is concrete."""
  if isinstance(segment_ids, jax.core.Tracer) or not getattr(
    segment_ids, "is_fully_addressable", True
  ):
    return
  ids = np.asarray(jax.device_get(segment_ids))
  if ids.size and (ids.min() < 0 or ids.max() > ids.shape[1]):
    raise ValueError(
      f"segment_ids of rows of {ids.shape[1]} tokens lie in [{ids.min()}, {ids.max()}];"
      " number the segments of each row 1, 2, ... and padding 0."
    )


def broadcast(name, values, mask):
  """[N] or [N, T] -> float32 that broadcasts to [N, T]."""
  values = jnp.asarray(values, jnp.float32)
  if values.shape == mask.shape[:1]:
    return values[:, None]
  if values.shape == mask.shape:
    return values
  raise ValueError(
    f"Expected {name} [N] or [N, T] for log-probs {mask.shape}, got {values.shape}."
  )


def check_numbers(*, zero=False, **numbers):
  """Raises ValueError for plain numbers of 0 or less; arrays are not checked."""
  for name, number in numbers.items():
    plain = isinstance(number, (int, float, np.number))
    if plain and not (number > 0 or (zero and number == 0)):
      bound = "of at least 0" if zero else "above 0"
      raise ValueError(f"Expected {name} {bound}, got {number}.")


def check_name(kind, name, names):
  if name not in names:
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]}? There" if near else "there"
    raise ValueError(f"Unknown {kind} {name!r}; {hint} are {', '.join(names)}.")

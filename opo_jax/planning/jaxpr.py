"""Read a traced program (a jaxpr): its FLOPs, and the shapes of its arrays.

Its shapes are those of whole arrays, except within `shard_map` and `pallas_call`.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax


def flops(traced: jax.stages.Traced, *, dynamic_trip_count: int = 1) -> int:
  """FLOPs of all matrix products in one execution, on all devices.

  Exact for the traced program, recomputation included; of a `cond` the branch with
  most. A Pallas kernel counts its whole grid, the blocks that it skips too.

  Args:
    traced: `jax.jit(function).trace(*args)`.
    dynamic_trip_count: assumed of every `while` loop.
  """
  return _flops(traced.jaxpr.jaxpr, dynamic_trip_count)


def _flops(jaxpr, dynamic_trip_count: int) -> int:
  def inner_flops(params):
    return sum(_flops(each, dynamic_trip_count) for each in subjaxprs(params))

  total = 0
  for equation in jaxpr.eqns:
    params, name = equation.params, equation.primitive.name
    if name == "dot_general":
      total += _dot_flops(equation)
    elif name == "cond":
      total += max(_flops(b.jaxpr, dynamic_trip_count) for b in params["branches"])
    elif name == "pallas_call":
      programs = math.prod(int(n) for n in params["grid_mapping"].grid)
      total += programs * _flops(params["jaxpr"], dynamic_trip_count)
    elif name == "shard_map":  # its body is the program of one device
      total += params["mesh"].size * _flops(params["jaxpr"], dynamic_trip_count)
    elif name == "scan":
      total += params["length"] * inner_flops(params)
    elif name == "while":
      total += dynamic_trip_count * inner_flops(params)
    else:
      total += inner_flops(params)
  return total


def _dot_flops(equation) -> int:
  """A multiplication and an addition for each contracted element of each output."""
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  inner = math.prod(left[dim] for dim in contracted)
  return 2 * inner * math.prod(equation.outvars[0].aval.shape)


def shapes(traced: jax.stages.Traced) -> set[tuple[int, ...]]:
  """Shapes of all arrays in a traced program, bodies that are one device's aside."""
  return _shapes(traced.jaxpr.jaxpr)


def _shapes(jaxpr) -> set[tuple[int, ...]]:
  variables = [*jaxpr.invars, *jaxpr.constvars]
  found = set()
  for equation in jaxpr.eqns:
    variables += equation.outvars
    if equation.primitive.name not in ("shard_map", "pallas_call"):
      for each in subjaxprs(equation.params):
        found |= _shapes(each)
  return found | {v.aval.shape for v in variables if hasattr(v.aval, "shape")}


def subjaxprs(params) -> Iterator[Any]:
  """The jaxprs among an equation's parameters."""
  for value in params.values():
    for entry in value if isinstance(value, (tuple, list)) else (value,):
      entry = getattr(entry, "jaxpr", entry)
      if hasattr(entry, "eqns"):
        yield entry

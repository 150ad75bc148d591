"""Reads compiled programs: what crosses the devices and what moves through memory.

XLA's own cost analysis counts the body of a loop once, and does not say over which mesh
axis a collective runs. Both stand in the text of the compiled program; FLOPs are
counted where they are exact, in the traced one.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
# Name of a collective -> how often its data crosses a link, n devices in a group, for
# every byte of its result (rings).
_TRAFFIC = {
  "all-gather": lambda n: (n - 1) / n,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: n - 1,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}
# Instructions that move nothing by themselves.
_FREE = {
  *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota"),
  *("while", "conditional", "call", "after-all", "partition-id", "replica-id"),
}


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one run of a program moves, on each device.

  Attributes:
    collective_bytes: mesh axes, joined by `+` -> bytes over the links.
    memory_bytes: read from and written to main memory, roughly: what each fused kernel
      takes and gives, slices counted as slices.
    open_loops: loops whose number of rounds is not in the program.
  """

  collective_bytes: dict[str, float]
  memory_bytes: float
  open_loops: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  opcode: str
  size: int  # bytes of the result in main memory
  result: int  # bytes of the result, wherever they lie
  shape: str  # of the result, or of all in a tuple
  operands: tuple[str, ...]
  text: str


def traffic(text: str, mesh_shape: dict[str, int], *, open_rounds: int = 1) -> Traffic:
  """What a compiled program moves.

  Args:
    text: `compiled.as_text()`.
    mesh_shape: axis -> size, in the order of the devices.
    open_rounds: how often a loop runs whose number of rounds is not in the program.
  """
  computations, entry = _parse(text)
  collective: dict[str, float] = {}
  moved, open_loops = 0.0, 0
  for instruction, rounds, body in _executed(computations, entry, 1, open_rounds):
    if instruction.opcode == "while":
      open_loops += _rounds(computations, instruction) is None
    kind = instruction.opcode.removesuffix("-start")
    if kind in _TRAFFIC:
      axes, size = _groups(instruction.text, mesh_shape)
      result = instruction.result
      if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # The start of a pair gives its operand along with the result.
        result -= sum(body[o].result for o in instruction.operands if o in body)
      bytes_ = rounds * max(result, 0) * _TRAFFIC[kind](size)
      collective[axes] = collective.get(axes, 0.0) + bytes_
    elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
      moved += rounds * _moved(instruction, body, computations)
  return Traffic(
    {axes: size for axes, size in collective.items() if size}, moved, open_loops
  )


def flops(traced: jax.stages.Traced, *, open_rounds: int = 1) -> int:
  """Floating point operations of all matrix products in one run, on all devices.

  Exact for what is traced, recomputation included. A kernel counts its whole grid, also
  what it skips.

  Args:
    traced: `jax.jit(function).trace(*args)`.
    open_rounds: how often a `while` loop runs.
  """
  return _jaxpr_flops(traced.jaxpr.jaxpr, open_rounds)


def _jaxpr_flops(jaxpr, open_rounds) -> int:
  total = 0
  for equation in jaxpr.eqns:
    params, name = equation.params, equation.primitive.name
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      inner = math.prod(left[i] for i in contracted)
      total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
    elif name == "cond":
      total += max(
        _jaxpr_flops(branch.jaxpr, open_rounds) for branch in params["branches"]
      )
    elif name == "pallas_call":
      grid = params["grid_mapping"].grid
      total += _jaxpr_flops(params["jaxpr"], open_rounds) * math.prod(
        int(n) for n in grid
      )
    elif name == "shard_map":
      # The body is one device's.
      total += _jaxpr_flops(params["jaxpr"], open_rounds) * params["mesh"].size
    else:
      rounds = {"scan": params.get("length"), "while": open_rounds}.get(name, 1)
      total += rounds * sum(_jaxpr_flops(each, open_rounds) for each in _inner(params))
  return total


def replicated(
  compiled: jax.stages.Compiled,
  traced: jax.stages.Traced,
  mesh: Mesh,
  *,
  axes: Sequence[str] = ("fsdp", "tensor"),
  least: int = 64 * 2**20,
) -> dict[str, str]:
  """Large arrays that are not split over some axis of the mesh.

  What goes in and comes out is known by its sharding. What lies between has only a
  shape in the compiled program, one device's: it is compared with the shapes that the
  traced program has for all devices. A shape that is 1/n of one of these is taken to be
  split n ways, by the largest n that some axes of the mesh have; shapes that no array
  of the traced program has a share in (merged or padded dimensions) are not seen.

  Args:
    compiled, traced: of the same program.
    mesh: the devices.
    axes: those that count, where they have more than one device.
    least: bytes on one device; smaller arrays do not count. Inputs and outputs count by
      their size on all devices.

  Returns:
    `input PATH`, `output PATH`, or the dtype and shape that a device holds -> the axes
    missing; for the last, how many parts of how many, and where the program makes it.
  """
  found = {}
  large = [axis for axis in axes if mesh.shape[axis] > 1]

  def look(path, info, layout, end):
    if layout is None or jax.dtypes.issubdtype(info.dtype, jax.dtypes.prng_key):
      return  # not used; small, and of another width
    missing = [a for a in large if not _splits(layout, info.shape, mesh, a)]
    if missing and math.prod(info.shape) * info.dtype.itemsize > least:
      found[f"{end} {jax.tree_util.keystr(path)}"] = "+".join(missing)

  for end, infos, layouts in (
    ("input", traced.args_info, compiled.input_shardings),
    ("output", traced.out_info, compiled.output_shardings),
  ):
    jax.tree_util.tree_map_with_path(functools.partial(look, end=end), infos, layouts)
  parts = math.prod(mesh.shape[axis] for axis in large)
  shares = _shares(traced, mesh, least)
  computations, entry = _parse(compiled.as_text())
  for instruction, _, _ in _executed(computations, entry, 1, 1):
    for dtype, dims, layout in _ARRAY.findall(instruction.shape):
      shape = tuple(n for n in map(int, filter(None, dims.split(","))) if n > 1)
      if _array_bytes(dtype, dims) <= least or "S(" in layout:
        continue
      split = shares.get(shape, parts)
      if split < parts:
        where = re.search(r'op_name="([^"]*)"', instruction.text)
        where = where[1] if where else instruction.opcode
        found.setdefault(f"{dtype}[{dims}]", f"{split} of {parts} parts: {where}")
  return found


def _splits(layout, shape, mesh, axis) -> bool:
  """Whether devices that differ along this axis have different parts of an array."""
  where = layout.devices_indices_map(shape)
  index = mesh.axis_names.index(axis)
  first, second = (mesh.devices.take(i, axis=index).flat[0] for i in (0, 1))
  return where[first] != where[second]


def _shares(traced, mesh, least) -> dict[tuple[int, ...], int]:
  """Shape on one device, without dimensions of 1 -> in how many parts the array is.

  The most parts, where several arrays explain a shape.
  """
  sizes = [mesh.shape[axis] for axis in mesh.axis_names]
  chosen = (itertools.combinations(sizes, n) for n in range(len(sizes) + 1))
  parts = {math.prod(some) for some in itertools.chain(*chosen)}
  shares = {}
  for shape in _shapes(traced.jaxpr.jaxpr):
    if math.prod(shape) * 8 < least:  # of whatever dtype
      continue
    for ways in itertools.product(parts, repeat=len(shape)):
      split = math.prod(ways)
      if split not in parts or any(n % k for n, k in zip(shape, ways, strict=True)):
        continue
      local = (n // k for n, k in zip(shape, ways, strict=True))
      local = tuple(n for n in local if n > 1)
      shares[local] = max(shares.get(local, 0), split)
  return shares


def _shapes(jaxpr) -> set[tuple[int, ...]]:
  """Of all arrays in a traced program, but for the bodies that are one device's."""
  variables = [*jaxpr.invars, *jaxpr.constvars]
  shapes = set()
  for equation in jaxpr.eqns:
    variables += equation.outvars
    if equation.primitive.name not in ("shard_map", "pallas_call"):
      for each in _inner(equation.params):
        shapes |= _shapes(each)
  return shapes | {v.aval.shape for v in variables if hasattr(v.aval, "shape")}


def _inner(params) -> Iterator[Any]:
  """The programs inside an equation."""
  for value in params.values():
    for entry in value if isinstance(value, (tuple, list)) else (value,):
      entry = getattr(entry, "jaxpr", entry)
      if hasattr(entry, "eqns"):
        yield entry


# --- the text ----------------------------------------------------------------------


def _parse(text):
  """{computation: {instruction name: instruction}}, and the entry's name."""
  computations, entry, current = {}, "", {}
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = computations.setdefault(head[1], {})
      entry = head[1] if line.startswith("ENTRY") else entry
    elif found := _LINE.match(line):
      instruction = _instruction(found[1], found[2])
      current[instruction.name] = instruction
  return computations, entry


def _instruction(name, rest):
  # `shape opcode(operands), attributes`; the shape of a tuple has spaces in it.
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, _, _ = rest.partition("(")
  start = len(opcode)
  operands = rest[start : _closing(rest, start)]
  return _Instruction(
    name,
    opcode,
    _size(shape, on_chip=False),
    _size(shape, on_chip=True),
    shape,
    tuple(re.findall(r"%([\w.\-]+)", operands)),
    rest,
  )


def _closing(text, start):
  """Where the bracket that opens at `start` closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if not depth:
      return i
  return len(text)


def _size(shape: str, *, on_chip: bool) -> int:
  """Bytes of a shape, or of all in a tuple; with what lies on the chip, or without."""
  total = 0
  for dtype, dims, layout in _ARRAY.findall(shape):
    if on_chip or "S(" not in layout:  # another memory space
      total += _array_bytes(dtype, dims)
  return total


def _array_bytes(dtype: str, dims: str) -> int:
  bits = re.search(r"\d+", dtype)
  width = _BYTES.get(dtype) or (int(bits[0]) // 8 if bits else 0)
  return max(width, 1) * math.prod(int(d) for d in dims.split(",") if d)


def _executed(computations, name, rounds, open_rounds):
  """Every instruction that runs: (instruction, how often, its computation)."""
  body = computations[name]
  for instruction in body.values():
    yield instruction, rounds, body
    if instruction.opcode == "while":
      times = _rounds(computations, instruction) or open_rounds
      inner = re.findall(r"body=%([\w.\-]+)", instruction.text)
    else:
      # A conditional takes one of its branches: all are counted, as the worst.
      times = 1
      inner = []
      if instruction.opcode in ("conditional", "call", "async-start"):
        inner = re.findall(
          r"(?:to_apply|calls|_computation)=%([\w.\-]+)", instruction.text
        )
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
        inner += re.findall(r"%([\w.\-]+)", listed[1]) if listed else []
    for each in inner:
      yield from _executed(computations, each, rounds * times, open_rounds)


def _rounds(computations, loop) -> int | None:
  """How often a loop runs, where it counts from 0 up to a constant."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
  if known:
    return int(known[1])
  condition = computations[re.search(r"condition=%([\w.\-]+)", loop.text)[1]]
  compared = [i for i in condition.values() if "direction=LT" in i.text]
  others = [i for i in condition.values() if i.opcode in ("and", "or", "not", "fusion")]
  if len(compared) != 1 or others:
    return None
  limits = [
    re.search(r"constant\((\d+)\)", condition[o].text)
    for o in compared[0].operands
    if o in condition and condition[o].opcode == "constant"
  ]
  return int(limits[0][1]) if limits and limits[0] else None


def _moved(instruction, body, computations) -> int:
  """Bytes that an instruction takes and gives."""
  calls = re.search(r"calls=%([\w.\-]+)", instruction.text)
  if instruction.opcode == "fusion" and calls and calls[1] in computations:
    return _fusion(instruction, body, computations[calls[1]], computations)
  if instruction.opcode in ("dynamic-slice", "gather", "slice", "broadcast"):
    return 2 * instruction.size
  if instruction.opcode in ("dynamic-update-slice", "scatter"):
    updates = instruction.operands[1 if "dynamic" in instruction.opcode else -1]
    return 2 * (body[updates].size if updates in body else 0)
  sizes = (body[o].size for o in instruction.operands if o in body)
  return instruction.size + sum(sizes)


def _fusion(instruction, body, fused, computations) -> int:
  """Of an operand that a fusion only slices, the slices count; of a result that it
  updates in place, the update."""
  total = 0
  for number, name in enumerate(instruction.operands):
    if name in body and body[name].size:
      total += _read(fused, number, body[name].size, computations)
  updates = [i for i in fused.values() if i.opcode == "dynamic-update-slice"]
  if updates:
    return total + sum(fused[u.operands[1]].result for u in updates)
  return total + instruction.size


def _read(fused, number, size, computations) -> int:
  """Bytes that a fused computation reads of its parameter `number`."""
  names = {
    each.name
    for each in fused.values()
    if each.opcode == "parameter" and each.text.startswith(f"parameter({number})")
  }
  total = 0
  for each in fused.values():
    used = [i for i, operand in enumerate(each.operands) if operand in names]
    if not used:
      continue
    calls = re.search(r"calls=%([\w.\-]+)", each.text)
    if each.opcode == "bitcast":
      names.add(each.name)  # users come after what they use
    elif each.opcode in ("dynamic-slice", "slice", "gather"):
      total += each.result
    elif each.opcode == "dynamic-update-slice" and used == [0]:
      pass  # in place: the update is counted, not what stays
    elif each.opcode == "fusion" and calls:
      inner = computations[calls[1]]
      if all(i.opcode in ("parameter", "bitcast") for i in inner.values()):
        names.add(each.name)  # the same bytes by another name
        continue
      total += sum(_read(inner, i, size, computations) for i in used)
    else:
      return size
  return min(total, size)


# --- which devices talk ------------------------------------------------------------


def _groups(text: str, mesh_shape: dict[str, int]) -> tuple[str, int]:
  """(mesh axes that a collective runs over, devices in a group)."""
  sizes = list(mesh_shape.values())
  group = _first_group(text, math.prod(sizes))
  places = np.stack(np.unravel_index(group, sizes), axis=1)
  names = [
    name
    for name, column in zip(mesh_shape, places.T, strict=True)
    if len(set(column)) > 1
  ]
  return "+".join(names), max(len(group), 1)


def _first_group(text, num_devices) -> Sequence[int]:
  """The devices of the first group, in the four ways they are written."""
  if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
    return [int(pairs[1]), int(pairs[2])]
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
    sizes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", named[1])}
    over = re.findall(r"'([^']+)'", named[2])
    devices = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    for i, axis in reversed(list(enumerate(sizes))):
      if axis not in over:
        devices = devices.take(0, axis=i)
    return devices.reshape(-1).tolist()
  if iota := re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
  ):
    groups, dims = _numbers(iota[1]), _numbers(iota[2])
    devices = np.arange(math.prod(dims)).reshape(dims)
    if iota[3]:
      devices = devices.transpose(_numbers(iota[3]))
    return devices.reshape(groups)[0].tolist()
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return _numbers(listed[1])
  return list(range(num_devices))


@functools.cache
def _numbers(text):
  return [int(n) for n in text.split(",")]

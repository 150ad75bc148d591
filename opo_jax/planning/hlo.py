"""Read compiled HLO: bytes over the links by mesh axis, and bytes through memory.

XLA's own cost analysis counts the body of a loop once, whatever its trip count, and
does not say over which mesh axis a collective runs. The text of the compiled program
has both. It is the program of one device: a shape in it is that of a shard.

A program on a mesh of fsdp 2 x tensor 2, where each of 4 devices holds half of five
matrices and gathers them one after the other (the numbers are explained below):

    %one (p: f32[5,4,8], n: s32[]) -> f32[4,8] {                                  (1)
      %p = f32[5,4,8]{2,1,0} parameter(0)                                         (2)
      %n = s32[] parameter(1)
      ROOT %row = f32[4,8]{1,0} dynamic-slice(%p, %n), dynamic_slice_sizes={1,4,8}
    }

    %body (c: (s32[], f32[5,4,8])) -> (s32[], f32[5,4,8]) {
      %c = (s32[], f32[5,4,8]{2,1,0}) parameter(0)
      %i = s32[] get-tuple-element(%c), index=0
      %stack = f32[5,4,8]{2,1,0} get-tuple-element(%c), index=1
      %half = f32[4,8]{1,0} fusion(%stack, %i), kind=kLoop, calls=%one            (4)
      %all = f32[8,8]{1,0} all-gather(%half), replica_groups=[2,2]<=[2,2]T(1,0)   (5)
      ROOT %next = (s32[], f32[5,4,8]{2,1,0}) tuple(%i, %stack)
    }

    ENTRY %main (x: (s32[], f32[5,4,8])) -> (s32[], f32[5,4,8]) {
      %x = (s32[], f32[5,4,8]{2,1,0}) parameter(0)
      ROOT %loop = (s32[], f32[5,4,8]{2,1,0}) while(%x), condition=%less,         (3)
        body=%body, backend_config={"known_trip_count":{"n":"5"}}

1. The head of a computation gives its name. `ENTRY` marks where execution begins.
2. An instruction: name `p`, shape `f32[5,4,8]` in layout `{2,1,0}` (640 bytes), opcode
   `parameter`, and in the brackets its operands, or a parameter's number. Every array
   in a tuple's shape counts. `S(1)` in a layout is another memory space, on the chip.
3. A `while` runs its body as often as its trip count says, here 5 times; the trip
   counts of nested loops multiply.
4. A fusion is one kernel: its operand 0, `stack`, is parameter 0 of `one`, which reads
   only a slice of 128 bytes of it; operand 1 has 4 bytes; the result 128. 260 bytes go
   through memory, 1,300 in all 5 iterations. A parameter, tuple or loop moves nothing
   by itself.
5. A collective counts over the links alone. In a ring of n devices an all-gather
   receives (n - 1) / n of its result of 256 bytes: 128, or 640 in 5 iterations. Its
   first replica group is devices 0 and 2, which differ in `fsdp`: `_replica_group`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

# f32[4,8]{1,0:T(8,128)S(1)} -> f32 | 4,8 | {1,0:T(8,128)S(1)}
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_NAME = r"%([\w.\-]+)"
# Bytes of an element, where its dtype's name does not end in its number of bits.
_ITEMSIZE = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
# Collective -> bytes that cross a link for every byte of its result, in a ring of n.
_LINK_BYTES = {
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
  """What one execution of a program moves, on each device.

  Attributes:
    collective_bytes: mesh axes, joined by `+` -> bytes over the links.
    memory_bytes: bytes read from and written to main memory (HBM): the operands and
      results of all kernels. An estimate; a slice counts as a slice.
    dynamic_loops: loops whose trip count is not in the program.
  """

  collective_bytes: dict[str, float]
  memory_bytes: float
  dynamic_loops: int


def traffic(
  text: str, mesh_shape: dict[str, int], *, dynamic_trip_count: int = 1
) -> Traffic:
  """What one execution of a compiled program moves, on each device.

  Args:
    text: `compiled.as_text()`.
    mesh_shape: axis -> size, in the order of the devices.
    dynamic_trip_count: assumed of every loop whose trip count is not in the program.
  """
  module = parse(text)
  collective_bytes: dict[str, float] = {}
  memory_bytes, dynamic_loops = 0.0, 0
  for instruction, times, computation in executed(module, dynamic_trip_count):
    kind = instruction.opcode.removesuffix("-start")
    if kind in _LINK_BYTES:
      axes, group_size = _axes_and_group_size(instruction.text, mesh_shape)
      result_bytes = _collective_result_bytes(instruction, computation)
      link_bytes = times * result_bytes * _LINK_BYTES[kind](group_size)
      collective_bytes[axes] = collective_bytes.get(axes, 0.0) + link_bytes
    elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
      memory_bytes += times * _bytes_accessed(module, computation, instruction)
    elif instruction.opcode == "while":
      dynamic_loops += _trip_count(module, instruction) is None
  return Traffic(
    {axes: size for axes, size in collective_bytes.items() if size},
    memory_bytes,
    dynamic_loops,
  )


# --- parsing -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `%name = shape opcode(operands), attributes`.

  Attributes:
    name: without `%`.
    opcode: `fusion`, `all-gather`, …
    shape: of the result, or of all arrays in a tuple.
    hbm_bytes: of the result, without what lies in on-chip memory.
    result_bytes: of the result, wherever it lies.
    operands: names.
    text: from the opcode to the end of the line.
  """

  name: str
  opcode: str
  shape: str
  hbm_bytes: int
  result_bytes: int
  operands: tuple[str, ...]
  text: str

  def computation(self, attribute: str) -> str | None:
    """The computation that an attribute names: `calls=%one` -> `one`."""
    found = re.search(rf"{attribute}={_NAME}", self.text)
    return found[1] if found else None


Computation = dict[str, Instruction]  # name -> instruction, in the order of the text


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: its computations by name, and the one where execution begins."""

  computations: dict[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """Parses `compiled.as_text()`."""
  computations, entry, current = {}, "", {}
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      current = computations.setdefault(head[1], {})
      entry = head[1] if line.startswith("ENTRY") else entry
    elif found := _INSTRUCTION.match(line):
      current[found[1]] = _instruction(*found.groups())
  return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
  # The shape of a tuple is in brackets and has spaces in it.
  shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shape, text = rest[:shape_end], rest[shape_end:].lstrip()
  opcode, _, _ = text.partition("(")
  operands = text[len(opcode) : _closing(text, len(opcode))]
  return Instruction(
    name=name,
    opcode=opcode,
    shape=shape,
    hbm_bytes=_shape_bytes(shape, on_chip=False),
    result_bytes=_shape_bytes(shape, on_chip=True),
    operands=tuple(re.findall(_NAME, operands)),
    text=text,
  )


def _closing(text: str, start: int) -> int:
  """Where the bracket that opens at `start` closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if not depth:
      return i
  return len(text)


def _shape_bytes(shape: str, *, on_chip: bool) -> int:
  """Bytes of all arrays in a shape, with those in on-chip memory or without."""
  return sum(
    array_bytes(dtype, dims)
    for dtype, dims, layout in ARRAY.findall(shape)
    if on_chip or not in_on_chip_memory(layout)
  )


def in_on_chip_memory(layout: str) -> bool:
  return "S(" in layout


def array_bytes(dtype: str, dims: str) -> int:
  """Bytes of an array as it is written: `bf16`, `4,8` -> 64."""
  bits = re.search(r"\d+", dtype)
  itemsize = _ITEMSIZE.get(dtype) or (int(bits[0]) // 8 if bits else 0)
  return max(itemsize, 1) * math.prod(int(dim) for dim in dims.split(",") if dim)


# --- how often an instruction runs ---------------------------------------------------


def executed(
  module: Module, dynamic_trip_count: int = 1
) -> Iterator[tuple[Instruction, int, Computation]]:
  """Every instruction that runs, how often, and its computation.

  A fusion is one instruction: what is in it does not run by itself. All branches of a
  conditional count: an upper bound.
  """

  def run(name, times):
    computation = module.computations[name]
    for instruction in computation.values():
      yield instruction, times, computation
      trips = 1
      if instruction.opcode == "while":
        trips = _trip_count(module, instruction)
        trips = dynamic_trip_count if trips is None else trips
      for called in _called(instruction):
        yield from run(called, times * trips)

  return run(module.entry, 1)


def _called(instruction: Instruction) -> list[str]:
  """The computations that an instruction runs, a loop's condition aside."""
  text = instruction.text
  if instruction.opcode == "while":
    return re.findall(f"body={_NAME}", text)
  if instruction.opcode not in ("conditional", "call", "async-start"):
    return []
  # true_computation=, false_computation=; or branch_computations={%a, %b}.
  called = re.findall(f"(?:to_apply|calls|_computation)={_NAME}", text)
  branches = re.search(r"branch_computations=\{([^}]*)\}", text)
  return called + (re.findall(_NAME, branches[1]) if branches else [])


def _trip_count(module: Module, loop: Instruction) -> int | None:
  """As XLA has written it, or of a loop that counts from 0 up to a constant.

  Such a condition is one comparison, `compare(%i, %limit), direction=LT`, with
  `%limit = s32[] constant(5)`. None: the data decides.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
    return int(known[1])
  condition = module.computations[loop.computation("condition")]
  comparisons = [i for i in condition.values() if "direction=LT" in i.text]
  compound = any(i.opcode in ("and", "or", "not", "fusion") for i in condition.values())
  if len(comparisons) != 1 or compound:
    return None
  for name in comparisons[0].operands:
    if name in condition and condition[name].opcode == "constant":
      limit = re.search(r"constant\((\d+)\)", condition[name].text)
      return int(limit[1]) if limit else None
  return None


# --- bytes through memory ------------------------------------------------------------


def _bytes_accessed(
  module: Module, computation: Computation, instruction: Instruction
) -> int:
  """Bytes of main memory that one execution of an instruction reads and writes."""
  opcode, operands = instruction.opcode, instruction.operands
  called = instruction.computation("calls")
  if opcode == "fusion" and called in module.computations:
    return _fusion_bytes(module, computation, instruction, called)
  if opcode in ("dynamic-slice", "gather", "slice", "broadcast"):
    return 2 * instruction.hbm_bytes
  if opcode in ("dynamic-update-slice", "scatter"):
    # In place: dynamic-update-slice(array, update, start…), scatter(…, updates).
    update = operands[1 if opcode == "dynamic-update-slice" else -1]
    return 2 * (computation[update].hbm_bytes if update in computation else 0)
  read = sum(computation[name].hbm_bytes for name in operands if name in computation)
  return read + instruction.hbm_bytes


def _fusion_bytes(
  module: Module, computation: Computation, fusion: Instruction, called: str
) -> int:
  """As `_bytes_accessed`; a result that is updated in place counts as the update."""
  fused = module.computations[called]
  read = sum(
    _parameter_bytes(module, fused, number, computation[name].hbm_bytes)
    for number, name in enumerate(fusion.operands)
    if name in computation and computation[name].hbm_bytes
  )
  updates = [i for i in fused.values() if i.opcode == "dynamic-update-slice"]
  if updates:
    return read + sum(fused[update.operands[1]].result_bytes for update in updates)
  return read + fusion.hbm_bytes


def _parameter_bytes(
  module: Module, fused: Computation, number: int, whole: int
) -> int:
  """Bytes that a fused computation reads of parameter `number`, which has `whole`.

  All, where any instruction uses all of it; else the sum of its slices.
  """
  parameter = f"parameter({number})"
  aliases = {i.name for i in fused.values() if i.text.startswith(parameter)}
  read = 0
  for user in fused.values():  # users come after what they use
    positions = [i for i, name in enumerate(user.operands) if name in aliases]
    if not positions:
      continue
    called = user.computation("calls")
    if user.opcode == "bitcast":
      aliases.add(user.name)
    elif user.opcode in ("dynamic-slice", "slice", "gather"):
      read += user.result_bytes
    elif user.opcode == "dynamic-update-slice" and positions == [0]:
      pass  # in place: `_fusion_bytes` counts the update
    elif user.opcode == "fusion" and called:
      inner = module.computations[called]
      if all(i.opcode in ("parameter", "bitcast") for i in inner.values()):
        aliases.add(user.name)
      else:
        read += sum(_parameter_bytes(module, inner, i, whole) for i in positions)
    else:
      return whole
  return min(read, whole)


# --- collectives ---------------------------------------------------------------------


def _collective_result_bytes(instruction: Instruction, computation: Computation) -> int:
  """Bytes of a collective's result.

  The start of an asynchronous pair returns its operands beside the result; that of an
  all-reduce does not.
  """
  result_bytes = instruction.result_bytes
  if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
    result_bytes -= sum(
      computation[name].result_bytes
      for name in instruction.operands
      if name in computation
    )
  return max(result_bytes, 0)


def _axes_and_group_size(text: str, mesh_shape: dict[str, int]) -> tuple[str, int]:
  """Mesh axes that a collective runs over, joined by `+`, and devices in a group.

  These are the axes in which the coordinates of a group's devices differ.
  """
  sizes = list(mesh_shape.values())
  group = _replica_group(text, math.prod(sizes))
  coordinates = np.stack(np.unravel_index(group, sizes), axis=1)  # [device, axis]
  axes = [
    axis
    for axis, along_axis in zip(mesh_shape, coordinates.T, strict=True)
    if len(set(along_axis)) > 1
  ]
  return "+".join(axes), max(len(group), 1)


def _replica_group(text: str, num_devices: int) -> list[int]:
  """The first group of devices that exchange data; XLA writes groups in four ways.

  On a mesh of fsdp 2 x tensor 2, in row-major order:

                tensor 0   tensor 1
      fsdp 0        0          1
      fsdp 1        2          3

      replica_groups={{0,1},{2,3}}             0 1 | 2 3   differ in tensor
      replica_groups=[2,2]<=[4]                0 1 | 2 3   arange(4), 2 groups of 2
      replica_groups=[2,2]<=[2,2]T(1,0)        0 2 | 1 3   transposed first: fsdp
      replica_groups=mesh['a'=2,'b'=2] {'b'}   0 1 | 2 3   along `b`: tensor
      source_target_pairs={{0,2},{2,0}}        0 -> 2      fsdp
      replica_groups={}                        0 1 2 3     fsdp+tensor
  """
  if pair := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
    return [int(pair[1]), int(pair[2])]
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
    return _group_along_axes(*named.groups())
  if iota := re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
  ):
    groups, dims, permutation = iota.groups()
    devices = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    if permutation:
      devices = devices.transpose(_numbers(permutation))
    return devices.reshape(_numbers(groups))[0].tolist()
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return list(_numbers(listed[1]))
  return list(range(num_devices))


def _group_along_axes(sizes: str, over: str) -> list[int]:
  """`'a'=2,'b'=2` and `'b'` -> [0, 1], the devices at place 0 of all other axes."""
  sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
  devices = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
  over = re.findall(r"'([^']+)'", over)
  index = tuple(slice(None) if axis in over else 0 for axis in sizes)
  return devices[index].reshape(-1).tolist()


@functools.cache
def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(","))

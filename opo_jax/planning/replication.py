"""Find large arrays of a program that are replicated where they could be split."""

import functools
import itertools
import math
import re
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from opo_jax.planning import hlo, jaxpr


def replicated(
  compiled: jax.stages.Compiled,
  traced: jax.stages.Traced,
  mesh: Mesh,
  *,
  axes: Sequence[str] = ("fsdp", "tensor"),
  min_bytes: int = 64 * 2**20,
) -> dict[str, str]:
  """Large arrays that are not split over some axis of the mesh.

  The sharding of inputs and outputs is known. An array between them has only a shape in
  the compiled program, that of one device's shard: it is compared with the shapes of
  whole arrays in the traced program. On 8 devices, with `f32[4096,8192]` traced,

      compiled          parts of f32[4096,8192]
      f32[512,8192]     8    split over all axes
      f32[1024,8192]    4    split 4 ways: replicated over an axis of 2
      f32[4096,8192]    1    replicated

  Where several whole arrays explain a shape, it counts as the one in most parts. Shapes
  that no whole array explains (merged or padded dimensions) are not seen.

  Args:
    compiled, traced: of the same program.
    mesh: the devices.
    axes: those that count, where they have more than one device.
    min_bytes: smaller arrays do not count; inputs and outputs by their size on all
      devices, others by that on one.

  Returns:
    `input PATH`, `output PATH` -> the axes that it is replicated over; dtype and shape
    of a shard -> in how many parts of how many, and the operation that makes it.
  """
  large_axes = [axis for axis in axes if mesh.shape[axis] > 1]
  found = _inputs_and_outputs(compiled, traced, mesh, large_axes, min_bytes)
  max_parts = math.prod(mesh.shape[axis] for axis in large_axes)
  parts_of = _parts_by_shard_shape(traced, mesh, min_bytes)
  for instruction, _, _ in hlo.executed(hlo.parse(compiled.as_text())):
    for dtype, dims, layout in hlo.ARRAY.findall(instruction.shape):
      if hlo.array_bytes(dtype, dims) <= min_bytes or hlo.in_on_chip_memory(layout):
        continue
      shard_shape = _without_ones(int(dim) for dim in dims.split(",") if dim)
      parts = parts_of.get(shard_shape, max_parts)
      if parts < max_parts:
        made_by = re.search(r'op_name="([^"]*)"', instruction.text)
        made_by = made_by[1] if made_by else instruction.opcode
        found.setdefault(f"{dtype}[{dims}]", f"{parts} of {max_parts} parts: {made_by}")
  return found


def _inputs_and_outputs(
  compiled, traced, mesh: Mesh, axes: list[str], min_bytes: int
) -> dict[str, str]:
  found = {}

  def check(path, info, layout, end):
    if layout is None or jax.dtypes.issubdtype(info.dtype, jax.dtypes.prng_key):
      return  # an unused input; a key, small and of another rank
    over = [axis for axis in axes if not _is_split(layout, info.shape, mesh, axis)]
    if over and math.prod(info.shape) * info.dtype.itemsize > min_bytes:
      found[f"{end} {jax.tree_util.keystr(path)}"] = "+".join(over)

  for end, infos, layouts in (
    ("input", traced.args_info, compiled.input_shardings),
    ("output", traced.out_info, compiled.output_shardings),
  ):
    jax.tree_util.tree_map_with_path(functools.partial(check, end=end), infos, layouts)
  return found


def _is_split(layout, shape, mesh: Mesh, axis: str) -> bool:
  """Whether devices that differ along this axis have different parts of an array."""
  part_of = layout.devices_indices_map(shape)
  dim = mesh.axis_names.index(axis)
  first, second = (mesh.devices.take(i, axis=dim).flat[0] for i in (0, 1))
  return part_of[first] != part_of[second]


def _parts_by_shard_shape(
  traced, mesh: Mesh, min_bytes: int
) -> dict[tuple[int, ...], int]:
  """Shape of a shard, without dimensions of 1 -> in how many parts its array is.

  Splits every whole array in every way that some axes of the mesh have: of (4096, 8192)
  with axes of 4 and 2, into 1, 2, 4 or 8 parts along one dimension or two.
  """
  sizes = [mesh.shape[axis] for axis in mesh.axis_names]
  subsets = (itertools.combinations(sizes, n) for n in range(len(sizes) + 1))
  possible_parts = {math.prod(some) for some in itertools.chain(*subsets)}
  parts_of = {}
  for shape in jaxpr.shapes(traced):
    if math.prod(shape) * 8 < min_bytes:  # whatever its dtype
      continue
    for ways in itertools.product(possible_parts, repeat=len(shape)):
      parts = math.prod(ways)
      divides = not any(n % k for n, k in zip(shape, ways, strict=True))
      if parts in possible_parts and divides:
        shard = _without_ones(n // k for n, k in zip(shape, ways, strict=True))
        parts_of[shard] = max(parts_of.get(shard, 0), parts)
  return parts_of


def _without_ones(dims) -> tuple[int, ...]:
  return tuple(dim for dim in dims if dim > 1)

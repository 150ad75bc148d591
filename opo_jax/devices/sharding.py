"""Sharding: the mesh, and where logical axes lie on it.

Only this module asks JAX for devices. Everything else receives a mesh, so that the same
program can be compiled for devices that are absent.
"""

import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
HOST_MEMORY = "pinned_host"


@dataclasses.dataclass(frozen=True)
class Rules:
  """Logical axis -> the mesh axes it is split over, outermost first.

  `data` and `fsdp` both split the batch; `fsdp` also splits every large parameter along
  the model width, `tensor` along the other dimension.

  Raises:
    ValueError: a mesh axis that does not exist, or one twice in an entry.
  """

  batch: tuple[str, ...] = ("data", "fsdp")
  embed: tuple[str, ...] = ("fsdp",)
  vocab: tuple[str, ...] = ("tensor",)
  heads: tuple[str, ...] = ("tensor",)
  kv_heads: tuple[str, ...] = ("tensor",)
  mlp: tuple[str, ...] = ("tensor",)

  def __post_init__(self):
    for name, axes in dataclasses.asdict(self).items():
      if set(axes) - set(MESH_AXES) or len(set(axes)) < len(axes):
        raise ValueError(
          f"The logical axis {name!r} is to lie over {axes}; use axes of {MESH_AXES},"
          " each once."
        )

  def spec(self, *logical_axes: str | None) -> PartitionSpec:
    """The partition of an array whose dimensions carry these logical axes; None: none.

    Raises:
      ValueError: a logical axis without a rule, or two dimensions on one mesh axis.
    """
    entries = [() if axis is None else self.mesh_axes(axis) for axis in logical_axes]
    used = [name for entry in entries for name in entry]
    if twice := {name for name in used if used.count(name) > 1}:
      raise ValueError(
        f"{logical_axes} would split two dimensions over the mesh axis"
        f" {sorted(twice)[0]!r}; give one of them another rule, or None."
      )
    return PartitionSpec(*(entry or None for entry in entries))

  def mesh_axes(self, logical_axis: str) -> tuple[str, ...]:
    """The mesh axes of one logical axis."""
    names = [field.name for field in dataclasses.fields(self)]
    if logical_axis not in names:
      raise ValueError(
        f"There is no rule for the logical axis {logical_axis!r}; there are {names}."
      )
    return getattr(self, logical_axis)


RULES = Rules()
# Where the sampler's weights may lie instead: whole along the width, so that decoding
# does not gather them for every token.
GATHERED = dataclasses.replace(RULES, embed=())


def make_mesh(data: int, fsdp: int, tensor: int, devices=None) -> Mesh:
  """A mesh over `devices` (all that JAX sees by default).

  Args:
    data, fsdp, tensor: sizes; one of them may be -1 and takes what is left.
    devices: a sequence of JAX devices, or None.

  Raises:
    ValueError: sizes that do not use the devices exactly.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [data, fsdp, tensor]
  if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
    raise ValueError(
      f"Mesh sizes {dict(zip(MESH_AXES, sizes, strict=True))} must be positive, one of"
      " them at most -1 (what is left)."
    )
  known = math.prod(size for size in sizes if size != -1)
  left = len(devices) // known
  if known * left != len(devices) or (-1 not in sizes and left != 1):
    raise ValueError(
      f"A mesh of data {data} x fsdp {fsdp} x tensor {tensor} does not fill"
      f" {len(devices)} devices; use sizes whose product is {len(devices)}"
      " (--mesh.fsdp -1 takes what is left)."
    )
  sizes = [left if size == -1 else size for size in sizes]
  # `jax.make_mesh`, but that it refuses 16 x 4 on the 8 x 8 chips of a v6e-64: there a
  # side has to be split over two axes, which is done where nothing else is possible.
  placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def named(mesh: Mesh, *logical_axes: str | None, rules: Rules = RULES) -> NamedSharding:
  """The sharding of an array whose dimensions carry these logical axes."""
  return NamedSharding(mesh, rules.spec(*logical_axes))


def batch_shards(mesh: Mesh | None) -> int:
  """How many parts the rows of a batch are split into."""
  if mesh is None:
    return 1
  return math.prod(mesh.shape[axis] for axis in RULES.batch)


def constrain(array: jax.Array, mesh: Mesh | None, *logical_axes) -> jax.Array:
  """Tells the compiler where `array` lies; does nothing without a mesh."""
  if mesh is None:
    return array
  return jax.lax.with_sharding_constraint(array, named(mesh, *logical_axes))


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
  """The sharding of every array in a tree of parameters or optimiser state.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s. A node with an attribute `axes` (our
      `nnx.Param`s) is laid out by it; stacked layers have one dimension more than
      axes, in front, which is not split. Everything else is replicated.
    mesh: where to.
    rules: logical axis -> mesh axes.

  Returns:
    A tree of the same structure with a `NamedSharding` for each array.

  Raises:
    ValueError: a dimension that the mesh does not divide, with the parameter's name.
  """

  def is_param(node):
    return hasattr(node, "axes") and hasattr(node, "get_metadata")

  def sharding_of(path, node):
    if not is_param(node):
      return named(mesh)
    (array,) = jax.tree.leaves(node)
    axes = (None,) * (array.ndim - len(node.axes)) + tuple(node.axes)
    for size, axis in zip(array.shape, axes, strict=True):
      over = () if axis is None else rules.mesh_axes(axis)
      parts = math.prod(mesh.shape[name] for name in over)
      if size % parts:
        raise ValueError(
          f"{jax.tree_util.keystr(path)} {array.shape} has {size} along {axis!r},"
          f" which does not divide over {'x'.join(over)}={parts}; use a size that is a"
          f" multiple of {parts}, or a smaller --mesh.{over[0]}."
        )
    return jax.tree.map(lambda _: named(mesh, *axes, rules=rules), node)

  return jax.tree_util.tree_map_with_path(sharding_of, tree, is_leaf=is_param)


def share_bytes(tree: Any) -> int:
  """Bytes of a tree on the device that holds the largest share."""

  def share(leaf):
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    # Keys of random numbers have a dtype of their own: two words each.
    width = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else 0
    return math.prod(shape) * (width or leaf.dtype.itemsize)

  return sum(map(share, jax.tree.leaves(tree)))


def abstract(tree: Any, shardings: Any) -> Any:
  """A tree of `jax.ShapeDtypeStruct`s with the given shardings."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    tree,
    shardings,
  )


def check_host_memory(mesh: Mesh, flag: str, instead: str) -> None:
  """Refuses a flag that offloads arrays to the host, if devices cannot read its memory.

  Args:
    mesh: of devices that may be absent.
    flag: as the user gave it.
    instead: what to do without it.
  """
  device = mesh.local_devices[0]  # another process's cannot be asked
  kinds = sorted(memory.kind for memory in device.addressable_memories())
  if HOST_MEMORY not in kinds:
    raise ValueError(
      f"{flag} needs memory of kind {HOST_MEMORY!r}, and the devices here"
      f" ({device.device_kind}) have only {kinds}; {instead}."
    )


def on_host(shardings: Any, tree: Any, mesh: Mesh) -> Any:
  """The same layout in pinned host memory, which devices read without a copy.

  Args:
    shardings: a tree of `NamedSharding`s.
    tree: arrays or `jax.ShapeDtypeStruct`s of the same structure; scalars stay where
      they are.
    mesh: whose devices must know memory of this kind.

  Raises:
    ValueError: they do not.
  """
  check_host_memory(mesh, "--optimizer.offload", "leave it out")
  return jax.tree.map(
    lambda sharding, leaf: (
      sharding.with_memory_kind(HOST_MEMORY) if leaf.ndim else sharding
    ),
    shardings,
    tree,
  )


def put(array: Any, mesh: Mesh | None, *logical_axes) -> jax.Array:
  """A host array, equal on all hosts, as a global array."""
  if mesh is None:
    return jax.numpy.asarray(array)
  return jax.device_put(np.asarray(array), named(mesh, *logical_axes))


def platform(mesh: Mesh | None) -> str:
  """`cpu`, `gpu` or `tpu`: of the mesh, or of the default device."""
  return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def on_accelerator(mesh: Mesh) -> bool:
  """Whether the mesh is of GPUs or TPUs."""
  return platform(mesh) != "cpu"


def device_bytes(mesh: Mesh | None) -> int:
  """Memory of one device; its share of the host's memory if the device does not say."""
  device = jax.devices()[0] if mesh is None else mesh.local_devices[0]
  stats = device.memory_stats() or {}
  return stats.get("bytes_limit") or _host_bytes() // jax.local_device_count()


def free_bytes(mesh: Mesh | None) -> int:
  """Free memory of one device; its share of half the host's memory if unknown."""
  device = jax.devices()[0] if mesh is None else mesh.local_devices[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  return _host_bytes() // 2 // jax.local_device_count()


def _host_bytes() -> int:
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe(mesh: Mesh) -> dict[str, Any]:
  """Devices and mesh in words, for `run.json`."""
  device = mesh.devices.flat[0]
  return {
    "devices": f"{mesh.devices.size} x {device.device_kind}",
    "platform": device.platform,
    "mesh": dict(mesh.shape),
    "processes": jax.process_count(),
  }

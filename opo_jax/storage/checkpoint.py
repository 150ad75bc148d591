"""Checkpoints: everything that an exact resumption needs, written by Orbax.

One checkpoint holds the device state (parameters, optimiser, step), as arrays named by
their place in the tree, and the host state (data position, RNG, config) as JSON.
Writing is asynchronous; a checkpoint that was not finished is never seen.
"""

import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


class Checkpoints:
  """The checkpoints of one directory.

  Args:
    directory: made if it is missing.
    keep: how many of the newest are kept.
  """

  def __init__(self, directory: str | pathlib.Path, *, keep: int = 1):
    self._manager = ocp.CheckpointManager(
      pathlib.Path(directory).absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, create=True
      ),
    )

  def latest(self) -> int | None:
    """The step of the newest finished checkpoint; None where there is none."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """The steps of all finished checkpoints, in order."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, host: dict[str, Any]) -> None:
    """Starts writing; returns once `state` may be donated again.

    Args:
      step: names the checkpoint.
      state: a pytree of arrays.
      host: JSON-able.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(_named(state)), host=ocp.args.JsonSave(host)
      ),
    )

  def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint straight to where its arrays belong.

    Args:
      step: of an existing checkpoint.
      like: a pytree of arrays, or of `jax.ShapeDtypeStruct`s with shardings, whose
        structure, shapes and layout the result takes.

    Returns:
      The state and the host's values.

    Raises:
      ValueError: a checkpoint of another structure, with the names that differ.
    """
    wanted = _named(like)
    kept = self._manager.item_metadata(step)["state"]
    kept = set(kept.keys() if kept is not None else wanted)
    if kept != wanted.keys():
      raise ValueError(
        f"Checkpoint {step} holds other arrays: missing {sorted(wanted.keys() - kept)},"
        f" unknown {sorted(kept - wanted.keys())}; use the config it was written with."
      )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(
          jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        ),
        host=ocp.args.JsonRestore(),
      ),
    )
    leaves = [restored["state"][name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), restored["host"]

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *error) -> None:
    """Returns once everything saved is on disk."""
    self._manager.close()


def fingerprint(tree: Any) -> str:
  """A short name for the values of all arrays, however they lie over devices.

  >>> import numpy as np
  >>> fingerprint({"w": np.arange(3.0)}) == fingerprint({"w": np.arange(3.0) + 1e-6})
  False
  """

  @jax.jit
  def sums(arrays):
    """Of the bits, modulo 2^32: exact, so the order of addition does not matter."""
    return {name: jnp.sum(_bits(array)) for name, array in arrays.items()}

  arrays = _named(tree)
  values = {name: int(total) for name, total in sums(arrays).items()}
  shapes = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
  return hashlib.sha256(repr((values, shapes)).encode()).hexdigest()[:16]


def _bits(array: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
  return bits.astype(jnp.uint32)


def _named(tree: Any) -> dict[str, Any]:
  """{path: array}, in the order of the tree's leaves."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

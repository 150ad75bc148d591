"""Processes of a run: how they join, exchange small values, and end together.

Several processes run the same program over one mesh (JAX's own multi-controller
runtime). Large arrays lie sharded on the devices and are never gathered; the host reads
small ones, of which every process receives the same copy.
"""

import functools
import glob
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from opo_jax.devices import environment
from opo_jax.devices.sharding import MESH_AXES, RULES, batch_shards, named

# Seconds without a heartbeat after which a process counts as dead and all end; and
# seconds within which all must join.
_HEARTBEAT_S, _JOIN_S = 30, 300


def start_processes(
  coordinator: str = "", num_processes: int = 0, process_id: int = -1
) -> None:
  """Joins the processes of a run, before JAX is asked for any device.

  TPU pods, GKE and SLURM are recognised and need no arguments. On a single machine
  the function does nothing.

  Args:
    coordinator: `host:port` of process 0, where nothing is recognised.
    num_processes: how many there are in all.
    process_id: which of them this is, from 0.

  Raises:
    ValueError: some of the three are missing.
    RuntimeError: the processes did not find each other; none trains alone. After the
      time limit, JAX ends the process itself.
  """
  given = {"coordinator": coordinator, "num_processes": num_processes}
  given = {name: value for name, value in given.items() if value}
  given |= {"process_id": process_id} if process_id >= 0 else {}
  if given and len(given) < 3:
    raise ValueError(
      "To start several processes by hand give all of --distributed.coordinator"
      " HOST:PORT, --distributed.num-processes N and --distributed.process-id I; got"
      f" {given}."
    )
  cluster = _cluster()
  if not given and cluster is None:
    return
  if coordinator:
    given["coordinator_address"] = given.pop("coordinator")
  elif cluster == "SLURM" and (gpus := _gpus_of_a_task()):
    given["local_device_ids"] = gpus
  where = coordinator or cluster
  print(
    f"Waiting up to {_JOIN_S} s for the other processes ({where}); the run does not"
    " start without them.",
    file=sys.stderr,
    flush=True,
  )
  try:
    jax.distributed.initialize(
      **given,
      initialization_timeout=_JOIN_S,
      heartbeat_timeout_seconds=_HEARTBEAT_S,
    )
  except Exception as error:
    raise RuntimeError(
      f"This process could not join the others ({where}): {error}. A run does not start"
      " alone; look at the first process that failed, and start all of them again."
    ) from error
  if num_processes and jax.process_count() != num_processes:
    raise RuntimeError(
      f"{num_processes} processes were to join and {jax.process_count()} did; start all"
      " of them with the same --distributed.num-processes."
    )
  if not is_single_process():
    _compile_alike()


def _compile_alike() -> None:
  """Disables the compilation cache where one process might read what another compiles.

  A program read from the cache may run its collectives in another order than a freshly
  compiled one, and all processes then wait forever. It happened on CPU with JAX 0.10.2:
  one process was in an all-to-all, the other in an all-gather. On other devices the
  cache stays enabled if the user names a directory that all processes see; no such run
  has been made yet.
  """
  directory = jax.config.jax_compilation_cache_dir
  everybodys = directory and directory != str(environment.own_directory())
  if jax.default_backend() == "cpu" or not everybodys:
    jax.config.update("jax_enable_compilation_cache", False)


def check_single_process(command: str, flags: Sequence[str]) -> None:
  """Refuses to run a single-process command in several processes.

  Raises:
    ValueError: flags of `--distributed`, or a cluster that started several.
  """
  asked = any(flag.startswith("--distributed.") for flag in flags)
  if asked or _cluster() in ("SLURM", "GKE"):
    raise ValueError(
      f"{command} is for one process; start one, without --distributed flags"
      " (srun --ntasks 1)."
    )


def _cluster() -> str | None:
  """The cluster that started this process as one of several; None: no such cluster."""
  if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
    return "SLURM"
  if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
    return "GKE"
  has_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
  if has_tpu and importlib.util.find_spec("libtpu"):
    return "TPU VM"
  return None


def _gpus_of_a_task() -> list[int]:
  """All GPUs of a node with a single SLURM task; JAX itself would take only one."""
  slurm = os.environ.get
  if slurm("SLURM_STEP_NUM_TASKS") != slurm("SLURM_STEP_NUM_NODES"):
    return []
  return list(range(int(slurm("SLURM_GPUS_ON_NODE", 0))))


def is_first_process() -> bool:
  """Whether this process writes the logs, metrics and reports of the run."""
  return jax.process_index() == 0


def is_single_process() -> bool:
  """Whether this is the only process of the run."""
  return jax.process_count() == 1


def abort(error: BaseException, code: int | None) -> None:
  """Ends this process at once if it is one of several; returns in a single process.

  An orderly exit would wait five minutes for the other processes, and they for this
  one. Instead they notice that it is gone, and end too.

  Args:
    error: what went wrong.
    code: to exit with; None: the error was not told yet.
  """
  if jax.distributed.is_initialized():
    if code is None:
      traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if code is None else code)


def assert_same_on_all_hosts(number: int, what: str) -> None:
  """Refuses a number that differs between processes.

  Raises:
    ValueError: in every process, with all numbers.
  """
  numbers = all_gather(np.array([number]), None, jax.process_count()).tolist()
  if len(set(numbers)) > 1:
    raise ValueError(
      f"The processes disagree: {what} is {numbers} for them, in order. All"
      " need the same files: one run directory that all see, the same data."
    )


def barrier(where: str) -> None:
  """Returns once every process has reached the barrier of this name."""
  if not is_single_process():
    multihost_utils.sync_global_devices(where)


def local_indices(mesh: Mesh | None, count: int) -> np.ndarray:
  """Indices of the batch entries that belong to this process.

  Entries are split in order and evenly over the shards of the batch. A shard that lies
  on several processes (along `tensor`) belongs to the first of them. Without a mesh,
  entries are split over the processes.

  Returns:
    Sorted indices; over all processes, each of `range(count)` once.
  """
  if is_single_process():
    return np.arange(count)
  return _shares(mesh, count)[jax.process_index()]


def all_gather(own: np.ndarray, mesh: Mesh | None, count: int) -> np.ndarray:
  """All processes' values, from each process's own. Small arrays only.

  Args:
    own: [n, ...] for the n entries of `local_indices(mesh, count)`, in order; all
      processes pass the same trailing shape and dtype.
    mesh: of all processes, or None; as given to `local_indices`.
    count: of all things.

  Returns:
    [count, ...] in order, the same in every process.
  """
  if is_single_process():
    return np.asarray(own)
  shares = _shares(mesh, count)
  longest = max(map(len, shares))
  padded = np.zeros((longest, *own.shape[1:]), own.dtype)
  padded[: len(own)] = own
  # As bytes: JAX would narrow 64-bit numbers.
  gathered = multihost_utils.process_allgather(padded.view(np.uint8).reshape(-1))
  gathered = np.asarray(gathered).reshape(-1).view(own.dtype)
  gathered = gathered.reshape(-1, longest, *own.shape[1:])
  everything = np.zeros((count, *own.shape[1:]), own.dtype)
  for theirs, share in zip(gathered, shares, strict=True):
    everything[share] = theirs[: len(share)]
  return everything


def all_gather_lists(
  own: Sequence[Sequence[int]], mesh: Mesh | None, count: int
) -> list[list[int]]:
  """`all_gather` for lists of int32 numbers of different lengths, such as prompts."""
  if is_single_process():
    return list(own)
  lengths = np.array([len(each) for each in own], np.int32)
  everyones = all_gather(lengths, mesh, count)
  padded = np.zeros((len(own), everyones.max()), np.int32)
  for row, each in zip(padded, own, strict=True):
    row[: len(each)] = each
  rows = all_gather(padded, mesh, count)
  return [row[:n].tolist() for row, n in zip(rows, everyones, strict=True)]


def to_host_replicated(tree: Any, mesh: Mesh | None) -> Any:
  """Small device arrays as complete host arrays, in every process."""
  if not is_single_process():
    tree = _replicate(mesh)(tree)
  return jax.tree.map(np.asarray, tree)


@functools.cache
def _replicate(mesh):
  return jax.jit(lambda tree: tree, out_shardings=named(mesh))


def _shares(mesh: Mesh | None, count: int) -> list[np.ndarray]:
  """The `local_indices` of every process."""
  if mesh is None:
    return np.array_split(np.arange(count), jax.process_count())
  order = [MESH_AXES.index(axis) for axis in RULES.batch]
  rest = [i for i in range(len(MESH_AXES)) if i not in order]
  devices = mesh.devices.transpose(*order, *rest).reshape(batch_shards(mesh), -1)
  shares = [np.zeros(0, int)] * jax.process_count()
  parts = np.array_split(np.arange(count), len(devices))
  for part, shard in zip(parts, devices, strict=True):
    owner = min(device.process_index for device in shard)
    shares[owner] = np.concatenate([shares[owner], part])
  return shares

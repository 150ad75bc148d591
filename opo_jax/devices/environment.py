"""Environment variables for JAX: the compilation cache, and flags of XLA.

JAX reads them once, when it is imported, so this module must run before and imports no
JAX. Variables that the user has set stay as they are.
"""

import glob
import importlib.util
import os
import pathlib

# For GPUs: flag -> its value. XLA ends the process at a flag that it does not know; a
# test starts every JAX that is supported with these. Command buffers (CUDA graphs) need
# none: XLA records fusions, matrix products and custom calls in them by itself. TPUs
# need none either: libtpu hides latencies by itself.
GPU_FLAGS = {
  # Collectives run beside the products that do not wait for them. Off by default.
  "--xla_gpu_enable_latency_hiding_scheduler": "true",
  # The same across rounds of the loop over layers: the next layer's weights are
  # gathered over `fsdp`, and the last one's gradients reduced, while one is computed.
  "--xla_gpu_enable_pipelined_all_gather": "true",
  "--xla_gpu_enable_pipelined_all_reduce": "true",
}
# JAX's own variables, and what of them means no.
_CACHE, _USE_CACHE = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"
_NO = ("0", "false", "f", "no", "n", "off")


def prepare() -> None:
  """Sets what JAX should find; to be called before it is imported."""
  keep_compiled_programs()
  if has_gpu():
    os.environ["XLA_FLAGS"] = with_flags(os.environ.get("XLA_FLAGS", ""), GPU_FLAGS)


def keep_compiled_programs() -> None:
  """Lets JAX keep compiled programs from one start to the next.

  In the user's cache directory; its files may be deleted at any time. A program's key
  holds the version of XLA, its flags and the kind of device, a CPU's instructions among
  them, so that different machines can share a directory. `JAX_COMPILATION_CACHE_DIR`
  names another one (a must for several processes, see `distributed.start_processes`),
  `JAX_ENABLE_COMPILATION_CACHE=0` switches it off. Where no file can be written, none
  is kept.
  """
  if _CACHE in os.environ or os.environ.get(_USE_CACHE, "").lower() in _NO:
    return
  try:
    directory = own_directory()
    directory.mkdir(parents=True, exist_ok=True)
  except (OSError, RuntimeError):  # no home at all is a RuntimeError
    return
  if os.access(directory, os.W_OK):
    os.environ[_CACHE] = str(directory)


def own_directory() -> pathlib.Path:
  """The default directory of the compilation cache."""
  user = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(user) / "opo_jax" / "xla"


def has_gpu() -> bool:
  """Whether JAX will use NVIDIA GPUs: they are there, and so is the plugin for them."""
  platforms = os.environ.get("JAX_PLATFORMS", "")
  if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
    return False
  plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
  has_plugin = any(importlib.util.find_spec(name) for name in plugins)
  return has_plugin and bool(glob.glob("/dev/nvidia[0-9]*"))


def with_flags(given: str, flags: dict[str, str]) -> str:
  """The user's XLA flags, and ours where the user gave none.

  >>> with_flags("--a=1 --b", {"--a": "2", "--c": "3"})
  '--a=1 --b --c=3'
  """
  names = {flag.partition("=")[0] for flag in given.split()}
  ours = [f"{name}={value}" for name, value in flags.items() if name not in names]
  return " ".join([given, *ours]).strip()

"""Every test sees 8 simulated CPU devices and no network."""

import gc
import os
from importlib.metadata import version

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
if version("jaxlib").startswith("0.10."):
  # Three quarters of the tests' time is compiling, and these emitters of CPU code take
  # half of that. Later versions have no such flag (an unknown one ends the process).
  # Runs that are processes of their own are compiled as users' are.
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# What a test measures or counts was compiled by it; whole runs ask for `kept_programs`.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_let_go():
  """Frees a module's programs when its tests are done.

  Each compiled program maps a dozen regions of memory, and Linux gives a process 65,530
  (vm.max_map_count): past that the compiler dies of a segmentation fault. Two modules
  reach 33,000.
  """
  yield
  import jax  # Here, since the lines above have to be read first.

  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="session")
def _program_directory(tmp_path_factory):
  return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def kept_programs(_program_directory):
  """For modules that start whole runs: the same program is compiled once a session.

  As it is for a user, whose runs keep their programs (`environment.prepare`). Not for
  modules that read memory or code off what they compile.
  """
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  settings = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": _program_directory,
    "jax_persistent_cache_min_compile_time_secs": 0.2,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # else JAX goes on with what it found at its start
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()

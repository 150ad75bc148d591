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
# What a test measures or counts was compiled by it.
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

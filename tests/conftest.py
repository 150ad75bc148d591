"""Every test sees 8 simulated CPU devices, no network, and a compilation cache."""

import gc
import os
import pathlib
import shutil
from importlib.metadata import version

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
if version("jaxlib").startswith("0.10."):
  # Compiling takes most of the suite's time, and the emitters of fused CPU kernels take
  # half of that. jaxlib 0.12 has no such flag, and XLA aborts on an unknown one.
  # Processes that tests start with XLA_FLAGS of their own compile as a user's do.
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# LLVM optimises nothing: a test compiles a program for one short run. What
# XLA itself makes of it (fusion, memory, collectives) does not depend on this.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

# JAX's compilation cache outlives the run: the next run, and the other worker of this
# one, read a program instead of compiling it. The key of an entry holds the program,
# the version of XLA, its flags and the CPU's features, so that no stale entry is read.
# JAX_ENABLE_COMPILATION_CACHE=0 switches the cache off.
_user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
_programs = pathlib.Path(
  os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.expanduser(os.path.join(_user_cache, "opo_jax", "test_programs")),
  )
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
_MAX_CACHE_BYTES = 2**30


def pytest_configure(config):
  """Empties a cache that many versions of the code have filled."""
  if hasattr(config, "workerinput"):  # a worker of pytest-xdist; its parent did this
    return
  try:
    _programs.mkdir(parents=True, exist_ok=True)
    size = sum(entry.stat().st_size for entry in os.scandir(_programs))
  except OSError:  # a home that cannot be written
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    return
  if size > _MAX_CACHE_BYTES:
    shutil.rmtree(_programs)


# The files that take longest, which start first: the workers then end together.
_LONGEST = (
  *("sampler", "learner", "models", "reward_model", "loop", "planning", "attention"),
  *("variance", "lora", "docs", "logprobs", "eval_command", "pool", "sharding"),
)


def pytest_collection_modifyitems(items):
  order = {f"{name}_test": i for i, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module", autouse=True)
def _free_compiled_programs():
  """Frees a module's compiled programs after its last test.

  A compiled program takes a dozen memory maps, and Linux limits a process to 65,530
  (vm.max_map_count), beyond which XLA's compiler segfaults. The two largest modules
  reach 33,000. Each worker of pytest-xdist is a process of its own.
  """
  yield
  import jax  # here, because JAX reads the variables above when it is imported

  jax.clear_caches()
  gc.collect()


@pytest.fixture
def no_compilation_cache():
  """Compiles every program of a test anew and as users' are, with all optimisations.

  For tests that read a compiled program's text: `as_text` of a program read from the
  cache differs. Memory analysis, donation and results are the same.
  """
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  settings = {
    "jax_enable_compilation_cache": False,
    "jax_disable_most_optimizations": False,
  }
  before = {name: jax.config.values[name] for name in settings}

  def use(settings):
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX keeps its first decision until then

  jax.clear_caches()
  use(settings)
  yield
  use(before)


@pytest.fixture(scope="session", autouse=True)
def _text_needs_a_compiler():
  """Fails a test that reads a program's text although it may come from the cache.

  Otherwise the test would pass on the first run of the suite and fail on the next.
  """
  import jax

  as_text = jax.stages.Compiled.as_text

  def checked(self):
    if jax.config.jax_enable_compilation_cache:
      pytest.fail("as_text() needs the fixture no_compilation_cache (conftest.py)")
    return as_text(self)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.stages.Compiled, "as_text", checked)
    yield

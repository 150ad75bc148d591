"""What JAX finds when it starts: flags of XLA, and programs compiled before."""

import glob
import os
import subprocess
import sys

import pytest

from opo_jax.devices import environment


def python(code, **variables):
  changed = os.environ | {"JAX_PLATFORMS": "cpu"} | variables
  kept = {name: value for name, value in changed.items() if value is not None}
  return subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env=kept
  )


def test_xla_knows_every_flag_and_ends_at_one_it_does_not_know():
  """The CPU's JAX reads the flags for GPUs, too."""
  start = "import jax; print(len(jax.devices()))"
  flags = environment.with_flags("", environment.GPU_FLAGS)
  done = python(start, XLA_FLAGS=flags)
  assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr
  done = python(start, XLA_FLAGS=f"{flags} --xla_gpu_enable_no_such_thing=true")
  assert done.returncode != 0 and "no_such_thing" in done.stderr


@pytest.fixture
def machine(monkeypatch):
  """A machine with a GPU and JAX's plugin for it, to be changed."""
  has = {"plugin": True, "device": True}
  monkeypatch.setattr(
    environment.importlib.util,
    "find_spec",
    lambda name: (has["plugin"] and name == "jax_cuda12_plugin") or None,
  )
  monkeypatch.setattr(
    glob, "glob", lambda path: ["/dev/nvidia0"] if has["device"] else []
  )
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.setenv("XLA_FLAGS", "")
  return has


def test_a_gpu_gets_its_flags_and_the_users_own_take_precedence(machine, monkeypatch):
  name = "--xla_gpu_enable_latency_hiding_scheduler"
  monkeypatch.setenv("XLA_FLAGS", f"{name}=false --xla_gpu_autotune_level=0")
  environment.prepare()
  flags = os.environ["XLA_FLAGS"].split()
  assert flags[:2] == [f"{name}=false", "--xla_gpu_autotune_level=0"]
  assert len([flag for flag in flags if flag.startswith(name)]) == 1
  assert {flag.partition("=")[0] for flag in flags} >= environment.GPU_FLAGS.keys()


@pytest.mark.parametrize("missing", ["plugin", "device", "wish"])
def test_flags_stay_as_they_are_where_no_gpu_will_be_used(
  machine, monkeypatch, missing
):
  if missing == "wish":
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  else:
    machine[missing] = False
  environment.prepare()
  assert os.environ["XLA_FLAGS"] == ""


def kept_in(monkeypatch, tmp_path, **variables):
  """The cache directory of a user with these environment variables."""
  for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
    monkeypatch.setenv(name, "")  # so that what is set below is undone after the test
    monkeypatch.delenv(name)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  environment.keep_compiled_programs()
  return os.environ.get("JAX_COMPILATION_CACHE_DIR")


def test_programs_are_cached_in_the_users_directory_unless_set_otherwise(
  monkeypatch, tmp_path
):
  default = kept_in(monkeypatch, tmp_path)
  assert default == str(tmp_path / "opo_jax" / "xla")
  elsewhere = {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}
  assert kept_in(monkeypatch, tmp_path, **elsewhere) == "/elsewhere"
  for no in ("0", "False"):
    off = {"JAX_ENABLE_COMPILATION_CACHE": no}
    assert kept_in(monkeypatch, tmp_path, **off) is None
  (tmp_path / "file").write_text("")
  assert kept_in(monkeypatch, tmp_path / "file") is None


def test_a_second_start_compiles_nothing_again_and_says_nothing(tmp_path):
  code = """
from opo_jax.devices import environment
environment.prepare()
import jax
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(float(jax.jit(lambda x: (jax.numpy.sin(x) @ x).sum())(jax.numpy.ones((64, 64)))))
print(hits.count("/jax/compilation_cache/cache_hits") > 0)
"""
  names = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
  cache = {"XDG_CACHE_HOME": str(tmp_path)} | dict.fromkeys(names)
  first, second = python(code, **cache), python(code, **cache)
  assert first.returncode == second.returncode == 0, first.stderr + second.stderr
  assert first.stdout.split()[1:] == ["False"] and second.stdout.split()[1:] == ["True"]
  assert first.stdout.split()[0] == second.stdout.split()[0]
  assert second.stderr == ""

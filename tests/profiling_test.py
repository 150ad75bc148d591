"""A trace holds the steps asked for, and names what ran in them."""

import jax
import jax.numpy as jnp
import pytest

from opo_jax.devices.profiling import Profiler
from opo_jax.metrics import Timers


@jax.jit
def work(x):
  with jax.named_scope("a_scope_of_ours"):
    return x @ x


def run(directory, span, steps):
  timers = Timers()
  with Profiler(directory, span) as profiler:
    for step in profiler.steps(steps):
      with timers.phase("a phase of ours"):
        work(jnp.full((64, 64), step)).block_until_ready()
      yield step


def traces(directory):
  return sorted(directory.glob("plugins/profile/*/*.xplane.pb"))


def events(path):
  planes = jax.profiler.ProfileData.from_file(str(path)).planes
  return [event for plane in planes for line in plane.lines for event in line.events]


def test_a_trace_holds_its_steps_and_names(tmp_path):
  assert list(run(tmp_path, (5, 6), range(4, 9))) == [4, 5, 6, 7, 8]
  # Where XProf and TensorBoard look: plugins/profile/<time>/<host>.xplane.pb.
  [path] = traces(tmp_path)
  seen = events(path)
  steps = [dict(event.stats)["step_num"] for event in seen if event.name == "train"]
  assert sorted(steps) == [5, 6]
  assert sum(event.name == "a phase of ours" for event in seen) == 2
  assert b"a_scope_of_ours" in path.read_bytes()


def test_a_resumed_run_traces_what_is_left_of_the_span(tmp_path):
  list(run(tmp_path / "late", (2, 5), range(5, 7)))
  [path] = traces(tmp_path / "late")
  assert sum(event.name == "train" for event in events(path)) == 1
  list(run(tmp_path / "over", (2, 4), range(5, 7)))
  assert not traces(tmp_path / "over")


def test_nothing_is_traced_unasked(tmp_path):
  list(run(tmp_path, None, range(1, 4)))
  assert not list(tmp_path.iterdir())


def test_a_run_that_breaks_leaves_the_trace_until_then(tmp_path):
  with (
    pytest.raises(KeyboardInterrupt),
    Profiler(tmp_path, (1, 9)) as profiler,
  ):
    for step in profiler.steps(range(1, 10)):
      if step == 2:
        raise KeyboardInterrupt
  assert len(traces(tmp_path)) == 1

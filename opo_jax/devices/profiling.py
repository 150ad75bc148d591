"""Profiling: a trace of some steps of a run, as XProf and TensorBoard read it.

In the trace, steps and the host's phases carry the names of `time/*`, and the device's
work those of the programs' named scopes: reshard, prefill, decode, logprobs, ….
"""

import pathlib
from collections.abc import Iterable, Iterator

import jax


class Profiler:
  """Traces the steps of a span.

  Args:
    directory: the trace goes to `plugins/profile/<time>/` in it, beside the scalars of
      the run, where XProf and TensorBoard look for it.
    span: first and last step, both included; None traces nothing.
  """

  def __init__(self, directory: pathlib.Path, span: tuple[int, int] | None):
    self._directory, self._span = directory, span
    self._tracing = False

  def steps(self, steps: Iterable[int]) -> Iterator[int]:
    """Goes through `steps`; each is marked as a step of training."""
    first, last = self._span or (1, 0)
    for step in steps:
      if not self._tracing and first <= step <= last:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # else every Python call, a hundred times more
        jax.profiler.start_trace(self._directory, profiler_options=options)
        self._tracing = True
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        yield step
      if step >= last:
        self._stop()

  def _stop(self) -> None:
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *error) -> None:
    """Writes what was traced until then."""
    self._stop()

"""Scores responses in worker processes, each response under its own limits.

Verifying a policy's text may hang, crash or exhaust memory, and a time limit within the
process fails in C code and outside of the main thread. Worker processes can be killed:
a failure makes its own response unscorable and affects no other.
"""

import atexit
import concurrent.futures
import contextlib
import math
import multiprocessing.context
import pathlib
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pebble

# To spawn a worker and import SymPy on a busy machine.
_START_LIMIT_S = 120.0
# A worker whose parent was killed exits this long after the limit of its response.
_ORPHAN_GRACE_S = 10.0
# Responses per task: a task costs 0.3 ms, a simple response 0.03.
_LARGEST_TASK = 64
_GIBIBYTE = 2**30


class Scores(NamedTuple):
  """The rewards of a batch.

  Attributes:
    rewards: in the order of the responses; None is unscorable.
    errors: (index, reason) for every None, by index.
  """

  rewards: list[float | None]
  errors: list[tuple[int, str]]


def batched(verify: Callable[..., Any]) -> Callable[..., Any]:
  """Decorates a verify function that takes and returns lists.

  >>> @batched
  ... def same(responses, references):
  ...   return [float(a == b) for a, b in zip(responses, references, strict=True)]
  >>> same.batched
  True
  """
  verify.batched = True
  return verify


class RewardPool:
  """Scores responses in worker processes, under limits of time and memory.

  A verification that hangs, crashes, raises or exceeds the memory limit makes its own
  response None and affects no other: its process is killed and replaced. Tasks have up
  to 64 responses; after any failure the responses of a task are scored again one by
  one. `verify` may thus be called twice for a response, and should be a pure function.

  Processes are spawned, never forked: a fork of a process that runs JAX can deadlock.
  They import the module of `verify`, and Python also imports the main script again,
  unless it was started as `python -m package`. So keep `verify` in a module without
  JAX, and guard a script with `if __name__ == "__main__":`.

  Use as a context manager, or call `close()`. The workers start at once, in the
  background. Threads may share a pool; their batches run one after another.

  Args:
    verify: (response, reference) -> reward, a top-level function. The reward must be a
      finite number. With a true attribute `batched` (set by the decorator of this
      module) it takes and returns lists. An attribute `warm_up` is a top-level function
      that runs once in every new worker, before any timeout starts. References may be
      any picklable values that `verify` expects.
    workers: number of processes. 0 scores in the caller's process, for fast verifiers
      of ours: nothing can be killed there, so there is no limit.
    timeout_s: wall-clock seconds per response, without waiting in the queue or starting
      a worker.
    memory_gib: address space that a worker may use beyond that after its warm-up, in
      GiB; more raises MemoryError. Enforced on Linux.

  Attributes:
    last_errors: (index, reason) for every None of the last batch, by index.

  Raises:
    ValueError: an invalid count or limit, or a `verify` that cannot be pickled.

  Example:
    with RewardPool(math_reward, workers=8, timeout_s=5.0) as pool:
      rewards = pool.score(responses, references)
  """

  last_errors: list[tuple[int, str]]

  def __init__(
    self,
    verify: Callable[..., Any],
    *,
    workers: int,
    timeout_s: float,
    memory_gib: float = 2.0,
  ):
    if workers < 0:
      raise ValueError(f"a pool has 0 or more workers, got {workers}.")
    for name, value in (("time", timeout_s), ("memory", memory_gib)):
      if not 0 < value < math.inf:
        raise ValueError(
          f"the {name} limit of a response must be a number of "
          f"{'seconds' if name == 'time' else 'GiB'} above 0, got {value}; "
          f"{'5' if name == 'time' else '2'} is usual."
        )
    if workers:
      try:
        pickle.dumps(verify)
      except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
          f"{verify!r} cannot be sent to a worker process ({error}); expected "
          "a function at the top level of a module, or workers=0."
        ) from error
    self._verify = verify
    self._workers = workers
    self._timeout_s = timeout_s
    self._memory_bytes = int(memory_gib * _GIBIBYTE)
    self._closed = False
    self._turn = threading.Lock()
    self._context = _SpawnContext()
    self._pool: pebble.ProcessPool | None = None
    self._started: concurrent.futures.Future | None = None
    self.last_errors = []
    if workers:
      atexit.register(self.close)
      self._start()

  def __enter__(self) -> "RewardPool":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Kills the workers. Closing twice is harmless; a closed pool cannot score."""
    self._closed = True
    atexit.unregister(self.close)
    self._discard()

  def score(
    self, responses: Sequence[str], references: Sequence[Any]
  ) -> list[float | None]:
    """Scores every response against its reference, and waits for the rewards.

    Returns:
      Rewards in the order of the responses; None is unscorable: timed out, crashed,
      raised, or not a finite number. `last_errors` has the reasons.

    Raises:
      ValueError: the lists differ in length, or the pool is closed.
      RuntimeError: the workers cannot start.
    """
    return self._scores(self._pairs(responses, references)).rewards

  def submit(
    self, responses: Sequence[str], references: Sequence[Any]
  ) -> "concurrent.futures.Future[Scores]":
    """Scores in the background: `.result()` of the future waits for the `Scores`.

    Raises:
      ValueError: as `score`; later errors are raised by `.result()`.
    """
    pairs = self._pairs(responses, references)
    future: concurrent.futures.Future[Scores] = concurrent.futures.Future()

    def work() -> None:
      try:
        future.set_result(self._scores(pairs))
      except BaseException as error:
        future.set_exception(error)

    # A daemon thread: an exiting interpreter does not wait for unread results.
    threading.Thread(target=work, name="rewards", daemon=True).start()
    return future

  def _pairs(self, responses, references) -> list[tuple[str, Any]]:
    if len(responses) != len(references):
      raise ValueError(
        f"{len(responses)} responses came with {len(references)} references; expected "
        "one reference for each."
      )
    self._check_open()
    return list(zip(responses, references, strict=True))

  def _check_open(self) -> None:
    if self._closed:
      raise ValueError("the pool is closed; make a new RewardPool to score more.")

  def _scores(self, pairs: list[tuple[str, Any]]) -> Scores:
    with self._turn:
      if self._workers:
        outcomes = self._score_in_workers(pairs)
      else:
        outcomes = _score_here(self._verify, pairs)
      errors = [(i, o.error) for i, o in enumerate(outcomes) if o.reward is None]
      self.last_errors = errors
    return Scores([outcome.reward for outcome in outcomes], errors)

  def _score_in_workers(self, pairs: list[tuple[str, Any]]) -> list["_Outcome"]:
    size = max(1, min(_LARGEST_TASK, len(pairs) // (4 * self._workers)))
    tasks = [range(i, min(i + size, len(pairs))) for i in range(0, len(pairs), size)]
    try:
      outcomes = self._run(tasks, pairs)
      # The responses of failed tasks, each in a task of its own.
      again = [range(i, i + 1) for task in tasks for i in task if i not in outcomes]
      outcomes |= self._run(again, pairs)
      # A response that breaks the pool itself cannot be identified in a batch: the rest
      # is scored one at a time, so that the next break identifies it.
      for index in range(len(pairs)):
        if index not in outcomes:
          outcomes |= self._run([range(index, index + 1)], pairs)
          outcomes.setdefault(index, _Outcome(None, "crashed and broke the pool"))
    except BaseException:
      # Ctrl-C, for example: nothing would collect the results of running tasks.
      self._discard()
      raise
    return [outcomes[index] for index in range(len(pairs))]

  def _run(self, tasks: list[range], pairs: list[tuple[str, Any]]) -> dict[int, Any]:
    """Runs tasks; returns outcomes by index, without those of unclear cause."""
    if not tasks:
      return {}
    pool = self._start()
    alarm_s = self._timeout_s + _ORPHAN_GRACE_S
    futures = []
    with contextlib.suppress(RuntimeError):  # The pool broke: nothing can be added.
      for task in tasks:
        arguments = [self._verify, [pairs[index] for index in task], alarm_s]
        futures.append(
          pool.schedule(_score_task, args=arguments, timeout=self._timeout_s)
        )
    _wait(pool, futures, self._timeout_s + _START_LIMIT_S)
    outcomes = {}
    for task, future in zip(tasks, futures, strict=False):
      found = self._outcomes(future)
      if found is not None and (len(task) == 1 or not isinstance(found, _Outcome)):
        found = [found] if isinstance(found, _Outcome) else found
        outcomes |= zip(task, found, strict=True)
    if not pool.active or len(futures) < len(tasks):
      self._discard()
    return outcomes

  def _outcomes(
    self, future: concurrent.futures.Future
  ) -> "list[_Outcome] | _Outcome | None":
    """A task's outcomes, its failure as one outcome, or None if it is not to blame."""
    if not future.done() or future.cancelled():
      return None
    error = future.exception()
    if error is None:
      return future.result()
    if isinstance(error, TimeoutError):
      return _Outcome(None, f"timed out after {self._timeout_s:g} s")
    if isinstance(error, pebble.ProcessExpired):
      return _Outcome(None, f"crashed its process (exit code {error.exitcode})")
    if isinstance(error, RuntimeError):  # BrokenProcessPool: not caused by this task.
      return None
    return _Outcome(None, _shortened(error))

  def _start(self) -> pebble.ProcessPool:
    """Returns the pool, starting it; the first `score` waits for a working worker."""
    self._check_open()
    if self._pool is None:
      self._pool = pebble.ProcessPool(
        max_workers=self._workers,
        initializer=_start_worker,
        initargs=[self._verify, self._memory_bytes],
        context=self._context,
      )
      self._started = self._pool.schedule(_nothing)
      return self._pool
    if self._started is not None:
      _wait(self._pool, [self._started], _START_LIMIT_S)
      self._check_open()  # another thread may have closed the pool meanwhile
      if not self._started.done() or self._started.exception() is not None:
        raise RuntimeError(
          f"no verification worker starts (see its message above); {self._verify} "
          "and its warm_up must import without error, and a script that makes a pool "
          'needs `if __name__ == "__main__":` around its work.'
        )
      self._started = None
    return self._pool

  def _discard(self) -> None:
    pool, self._pool = self._pool, None
    if pool is not None:
      pool.stop()
      self._context.kill_all()
      pool.join()


class _SpawnContext(multiprocessing.context.SpawnContext):
  """A spawn context that keeps its processes, to kill them.

  pebble closes its pipes and locks before it stops its workers: a worker that is just
  starting would fail on them and print a traceback.
  """

  def __init__(self) -> None:
    super().__init__()
    self._processes: list[Any] = []

  def Process(self, *args: Any, **kwargs: Any) -> Any:
    self._processes = [p for p in self._processes if p.exitcode is None]
    process = super().Process(*args, **kwargs)
    self._processes.append(process)
    return process

  def kill_all(self) -> None:
    for process in self._processes:
      if process.pid is not None:
        process.kill()
    self._processes = []


class _Outcome(NamedTuple):
  reward: float | None
  error: str


def _wait(
  pool: pebble.ProcessPool, futures: list[concurrent.futures.Future], stall_s: float
) -> None:
  """Returns when all futures are done, the pool broke, or none finished for stall_s.

  The queued tasks of a broken pool never finish, nor does a task whose worker the
  kernel kills between taking it and reporting so.
  """
  num_left, moved = len(futures), time.monotonic()
  while futures and pool.active and time.monotonic() - moved < stall_s:
    concurrent.futures.wait(futures, timeout=0.5)
    futures = [future for future in futures if not future.done()]
    if len(futures) < num_left:
      num_left, moved = len(futures), time.monotonic()


def _start_worker(verify: Callable[..., Any], memory_bytes: int) -> None:
  """Prepares a new worker; unpickling `verify` has imported its module."""
  # pebble's handler of SIGTERM runs only between bytecodes: a worker that hangs in C
  # code would ignore it and delay the pool by 3 s, until pebble sends SIGKILL.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  warm_up = getattr(verify, "warm_up", None)
  if warm_up is not None:
    warm_up()
  _limit_memory(memory_bytes)


def _limit_memory(more_bytes: int) -> None:
  """Limits the address space of this process to its current one and more_bytes."""
  with contextlib.suppress(ImportError, OSError, ValueError):
    import resource

    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _score_task(
  verify: Callable[..., Any], pairs: list[tuple[str, Any]], alarm_s: float
) -> list[_Outcome]:
  """Scores the responses of one task, in a worker."""
  with _alarm(alarm_s):
    return _score_here(verify, pairs)


def _score_here(
  verify: Callable[..., Any], pairs: list[tuple[str, Any]]
) -> list[_Outcome]:
  """Scores responses in this process; an exception becomes a short reason.

  Workers report through one pipe, in which only writes up to its buffer are atomic.
  """
  if not getattr(verify, "batched", False):
    return [_outcome_of(verify, *pair) for pair in pairs]

  def verify_one(response: str, reference: Any) -> float:
    (reward,) = verify([response], [reference])
    return reward

  try:
    responses, references = zip(*pairs, strict=True) if pairs else ((), ())
    rewards = list(verify(list(responses), list(references)))
    if len(rewards) != len(pairs):
      raise ValueError(f"{len(pairs)} responses got {len(rewards)} rewards")
    rewards = [float(reward) for reward in rewards]
  except (Exception, SystemExit):
    # Scored one by one, each response shows whether it caused the failure.
    return [_outcome_of(verify_one, *pair) for pair in pairs]
  return [_finite(reward) for reward in rewards]


def _outcome_of(
  verify: Callable[[str, Any], float], response: str, reference: Any
) -> _Outcome:
  try:
    return _finite(float(verify(response, reference)))
  except (Exception, SystemExit) as error:
    return _Outcome(None, _shortened(error))


def _finite(reward: float) -> _Outcome:
  if not math.isfinite(reward):
    return _Outcome(None, f"gave {reward}, expected a finite number")
  return _Outcome(reward, "")


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
  """Ends this process if the block takes longer, in case the pool is gone."""
  if not hasattr(signal, "setitimer"):
    yield
    return
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)


def _shortened(error: BaseException) -> str:
  return " ".join(f"raised {type(error).__name__}: {error}".split())[:300]


def _nothing() -> None:
  """A task that shows that a worker has started."""

"""Custom rewards: a user's function, named in the config as `package.module:function`.

    def reward(problem, response) -> float: ...

`problem` is the `Problem` with its id, question and answer. A function decorated with
`opo_jax.rewards.batched` takes a list of each and returns a list of numbers; one
decorated with `opo_jax.rewards.graded` returns a score, not a verdict.
"""

import difflib
import functools
import importlib
from collections.abc import Callable
from typing import Any


def graded(reward: Callable[..., Any]) -> Callable[..., Any]:
  """Decorates a real-valued reward: it is evaluated by mean scores and win rates.

  Without the decorator a reward above a half counts as correct, for pass@k and maj@k.

  >>> @graded
  ... def brevity(problem, response):
  ...   return -len(response) / 100
  >>> brevity.graded
  True
  """
  reward.graded = True
  return reward


class CustomReward:
  """Adapts a user's function to the interface of a `RewardPool`'s verify functions.

  Only the name is sent to a worker, which imports the function itself.

  Args:
    name: `package.module:function`; the module is found as by `import`.

  Attributes:
    batched: whether the function takes lists.
    warm_up: a function to run once in each worker (its attribute), or None.
    graded: whether its rewards are scores, not verdicts (correct above a half).
    takes_problems: its references are problems, not their answers.

  Raises:
    ValueError: no such module or function, or the import fails.
  """

  takes_problems = True

  def __init__(self, name: str):
    self.name = name
    self._function = _find(name)
    self.batched = bool(getattr(self._function, "batched", False))
    self.graded = bool(getattr(self._function, "graded", False))
    self.warm_up = getattr(self._function, "warm_up", None)

  def __call__(self, response: Any, problem: Any) -> Any:
    return self._function(problem, response)

  def __reduce__(self):
    return CustomReward, (self.name,)

  def __repr__(self) -> str:
    return f"CustomReward({self.name!r})"


@functools.cache
def _find(name: str) -> Callable[..., Any]:
  module_name, _, function_name = name.partition(":")
  try:
    module = importlib.import_module(module_name)
  except Exception as error:
    raise ValueError(
      f"The reward {name!r} does not import ({type(error).__name__}: {error}); give"
      " package.module:function, as Python imports it from the current directory"
      " (--reward.verifier)."
    ) from error
  function = getattr(module, function_name, None)
  if not callable(function):
    there = [n for n, v in vars(module).items() if callable(v) and n[0] != "_"]
    near = difflib.get_close_matches(function_name, there, n=3) or there
    raise ValueError(
      f"The module {module_name} has no function {function_name!r} (--reward.verifier);"
      f" there are {sorted(near)}."
    )
  return function

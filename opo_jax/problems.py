"""Which problems a run trains on and is evaluated on; which are left out, and why."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from opo_jax.config import Config
from opo_jax.data import decontaminate, selection, sources
from opo_jax.data import prompts as prompts_lib
from opo_jax.data.prompts import Problem
from opo_jax.devices import distributed


class Problems:
  """The problems of a run; each set is loaded when it is first asked for.

  Args:
    config: the run's.
    tokenizer: for the lengths of prompts.

  Attributes:
    left_out: source/split -> reason -> number of problems, of the sets loaded so far.
  """

  def __init__(self, config: Config, tokenizer: Any):
    self.config, self.tokenizer = config, tokenizer
    self.left_out: dict[str, dict[str, int]] = {}

  def check(self) -> None:
    """Loads all of them, so that what is wrong with them shows.

    Raises:
      ValueError: no such source, a malformed one, or nothing is left of it.
    """
    assert self.training
    assert self.held_out is not None  # there may be no benchmark

  @functools.cached_property
  def held_out(self) -> dict[str, Sequence[Problem]]:
    """The evaluation problems of each benchmark whose prompts fit."""
    settings, held_out = self.config.eval, {}
    for name in settings.benchmarks:
      problems = self.load(name, settings.split)
      problems = problems[: settings.problems or len(problems)]
      if not problems:
        raise ValueError(
          f"{name!r} has no {settings.split} problems; use --eval.benchmarks."
        )
      held_out[name] = self.fitting(f"{name}/{settings.split}", problems)
    return held_out

  @functools.cached_property
  def training(self) -> dict[str, tuple[float, Sequence[Problem]]]:
    """Source -> its weight and the problems that are trained on."""
    data, parts = self.config.data, {}
    rates = (
      selection.read_pass_rates(data.pass_rate_file) if data.pass_rate_file else {}
    )
    apart = [
      each
      for name in data.decontaminate_against.split()
      for each in self.load(name, "test")
    ]
    for name, weight in sources.parse_mixture(data.train).items():
      problems, part = self.load(name, "train"), f"{name}/train"
      if apart:
        twins = {
          each.train.id for each in decontaminate.find_duplicates(problems, apart)
        }
        problems = self._kept(
          part,
          "decontaminate_against",
          problems,
          lambda each, twins=twins: each.id not in twins,
        )
      if rates:
        lowest, highest = data.min_pass_rate, data.max_pass_rate
        count = len(problems)
        problems = selection.by_pass_rate(
          problems, rates, lowest=lowest, highest=highest
        )
        self._count_left_out(part, "pass_rate", count - len(problems))
      parts[name] = (weight, self.fitting(part, problems))
    return parts

  def load(self, name: str, split: str) -> Sequence[Problem]:
    """The problems of a source, before anything is left out."""
    data = self.config.data
    return sources.load(
      name, split, prompt_field=data.prompt_field, answer_field=data.answer_field
    )

  def fitting(self, name: str, problems: Sequence[Problem]) -> Sequence[Problem]:
    """Leaves out the problems whose prompts are too long, and counts them.

    Of several processes each reads and measures a share of them.

    Raises:
      ValueError: none is left.
    """
    distributed.assert_same_on_all_hosts(
      len(problems), f"the number of problems of {name}"
    )
    limit, data = self.config.rollout.max_prompt_tokens, self.config.data
    own = (problems[i] for i in distributed.local_indices(None, len(problems)))
    lengths = prompts_lib.prompt_lengths(
      self.tokenizer, own, system=data.system, instruction=data.instruction
    )
    lengths = distributed.all_gather(
      np.array(lengths, int), None, len(problems)
    ).tolist()
    places = [place for place, length in enumerate(lengths) if length <= limit]
    self._count_left_out(name, "prompt_too_long", len(lengths) - len(places))
    if lengths and not places:
      raise ValueError(
        f"All {len(lengths)} prompts of {name} are longer than {limit} tokens, the"
        f" shortest has {min(lengths)}; raise --rollout.max-prompt-tokens."
      )
    if len(places) == len(problems):
      return problems
    return selection.Kept(problems, places)

  def _kept(self, name, reason, problems, wanted):
    kept = selection.keep(problems, wanted)
    self._count_left_out(name, reason, len(problems) - len(kept))
    return kept

  def _count_left_out(self, name: str, reason: str, count: int) -> None:
    if count:
      self.left_out.setdefault(name, {})[reason] = count

  def stream(self, seed: int) -> sources.ProblemStream | sources.MixtureStream:
    """The training problems without end, in the order of a seed."""
    if len(self.training) == 1:
      ((_, problems),) = self.training.values()
      return sources.ProblemStream(problems, seed=seed)
    return sources.MixtureStream(self.training, seed=seed)

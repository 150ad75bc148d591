"""`sample`: a response of a run's policy to a prompt, as it is sampled."""

import dataclasses
import pathlib
from collections.abc import Iterator

from opo_jax import build
from opo_jax.config import Config
from opo_jax.data.prompts import Problem
from opo_jax.run import Run, load_policy


def sample_run(config: Config, directory: pathlib.Path, question: str) -> Iterator[str]:
  """A response of the last checkpoint's policy, as evaluation would sample it.

  Args:
    config: the run's; `config.eval` says how to sample.
    directory: of the run.
    question: of the user turn, before the chat template.

  Yields:
    the text, piece by piece as it is sampled.
  """
  run = Run(config, directory)
  policy = load_policy(run)
  (prompt,) = run.encode([Problem(id="prompt", question=question, answer="")])
  params = dataclasses.replace(build.eval_params(config), samples_per_prompt=1)
  sampler, tokens, shown = build.make_sampler(config), [], ""
  for new in sampler.stream(policy, prompt, params, seed=config.seed):
    tokens += new
    text = run.tokenizer.decode(tokens, skip_special_tokens=True)
    # A character of several tokens may be incomplete: it comes with the next piece.
    text = text.rstrip("\ufffd")
    yield text[len(shown) :]
    shown = text

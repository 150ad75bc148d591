"""Embedded task: sums of digits modulo 5, with demonstrations of mixed quality.

A question names digits, `a3b4c2`; the answer is their sum modulo 5. The demonstrations
of SFT mix three kinds of responses:

    careful   a3=3b4=2c2=4#4        each digit with the running total, `#answer`, end
    guess     #1                    a random number: short, correct one in five
    endless   a3=3b4=2c2=4#4;a3=…   the careful steps repeated, without end

A policy after SFT is correct about a third of the time, and its lengths vary
severalfold. Reinforcement learning has to prefer careful responses, stop in time, and
correct the errors of the demonstrations, which is what OPO is good at. A response must
end with `#answer` and the end token to earn a reward.
"""

import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Regex, decoders, pre_tokenizers

from opo_jax.data.prompts import Problem, embedded_tokenizer

# The least and the most digits of a question.
NUM_DIGITS = (3, 6)
# Digits and totals are below this.
MODULUS = 5

# Fractions of the three kinds, and of wrong steps in careful demonstrations.
CAREFUL, GUESS, ENDLESS = 0.30, 0.62, 0.08
SLIP = 0.05

_SPLIT_SIZES = {"train": 2048, "test": 256}
_SYMBOLS = (*"01234abcdef#;", *(f"{digit}=" for digit in range(MODULUS)))


class Demonstration(NamedTuple):
  """A response for SFT. `ends`: whether the end token follows."""

  problem: Problem
  response: str
  ends: bool


def load(split: str) -> list[Problem]:
  """Generates the problems of `train` (2,048) or `test` (256): fixed, without
  duplicates.

  A hash of the question assigns a problem to `test`, so that the splits are disjoint.
  """
  if split not in _SPLIT_SIZES:
    raise ValueError(
      f"The arithmetic task has no split {split!r}; there are train and test."
    )
  rng = np.random.default_rng(20_250_529)
  questions: dict[str, None] = {}
  while len(questions) < _SPLIT_SIZES[split]:
    question = _draw_question(rng)
    if is_held_out(question) == (split == "test"):
      questions[question] = None
  return [
    Problem(id=f"arithmetic/{split}/{i}", question=question, answer=solve(question))
    for i, question in enumerate(questions)
  ]


def is_held_out(question: str) -> bool:
  """Whether a question belongs to `test`: one in sixteen does."""
  return zlib.crc32(question.encode()) % 16 == 0


def solve(question: str) -> str:
  """Computes the answer.

  >>> solve("a3b4c2")
  '4'
  """
  return str(sum(int(digit) for digit in question[1::2]) % MODULUS)


def verify(response: str, reference: str) -> float:
  """Returns 1.0 if the response ends with `#` and the correct answer, else 0.0.

  >>> verify("a3=3b4=2c2=4#4", "4"), verify("#4;a3", "4")
  (1.0, 0.0)
  """
  return float(final_answer(response) == reference)


def final_answer(response: str) -> str | None:
  """Extracts the final answer of a response; None without one.

  >>> final_answer("a3=3b4=2#2"), final_answer("#4;a3")
  ('2', None)
  """
  match = re.search(r"#(\d)$", response)
  return match and match[1]


def demonstrations(problems: Sequence[Problem], *, seed: int) -> list[Demonstration]:
  """Generates a demonstration for each problem, of the mix described above."""
  rng = np.random.default_rng(seed)
  result = []
  for problem in problems:
    habit = rng.choice(3, p=(CAREFUL, GUESS, ENDLESS))
    if habit == 0:
      response = _work_out(problem.question, rng)
    elif habit == 1:
      response = f"#{rng.integers(MODULUS)}"
    else:
      response = ";".join(_work_out(problem.question, rng) for _ in range(8))
    result.append(Demonstration(problem, response, ends=habit != 2))
  return result


def tokenizer() -> Any:
  """Builds a tokenizer of characters, as a `transformers` tokenizer."""
  # A copied digit and its `=` are one token: the next total is then a function of this
  # token and the previous total, a table of 25 entries that is learnt quickly.
  digits = pre_tokenizers.Split(Regex(r"\d=|."), behavior="isolated")
  return embedded_tokenizer(_SYMBOLS, digits, decoders.Fuse())


def _draw_question(rng) -> str:
  digits = rng.integers(MODULUS, size=rng.integers(NUM_DIGITS[0], NUM_DIGITS[1] + 1))
  return "".join(f"{name}{d}" for name, d in zip("abcdef", digits, strict=False))


def _work_out(question: str, rng) -> str:
  """Writes `a3=3b4=2#2`; a total is wrong with probability SLIP and then propagates."""
  total, steps = 0, ""
  for name, digit in zip(question[::2], question[1::2], strict=True):
    total = (total + int(digit)) % MODULUS
    if rng.random() < SLIP:
      total = (total + int(rng.integers(1, MODULUS))) % MODULUS
    steps += f"{name}{digit}={total}"
  return f"{steps}#{total}"

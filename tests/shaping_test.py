"""Format, length and repetition are what their formulas say."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from opo_jax.rewards import shaping


def test_a_response_has_a_format_or_has_it_not():
  cases = [  # response, boxed, think
    (r"So \boxed{4}.", 1, 0),
    (r"<think>2+2</think> So \boxed{4}.", 1, 1),
    (r"2+2</think>\boxed{4}", 1, 1),  # `<think>` stands in the prompt
    (r"<think>\boxed{4}</think> So 4.", 1, 0),
    (r"<think>a</think>b</think>\boxed{4}", 1, 0),
    (r"<think>a<think>b</think>\boxed{4}", 1, 0),
    (r"<think>a</think> \boxed{4", 0, 0),
    (r"<think>a</think> \boxed{}", 0, 0),
    (r"I think> a</think>\boxed{4}", 1, 1),
    (r"</think>I think> \boxed{4}", 1, 0),
    (r" <think><think>a</think>\boxed{4}", 1, 0),
    ("4", 0, 0),
    ("", 0, 0),
  ]
  found = [
    (text, *(shaping.has_format(text, kind) for kind in ("boxed", "think")))
    for text, _, _ in cases
  ]
  assert [each for each in found if each not in cases] == []


def test_the_format_of_a_megabyte_is_found_in_linear_time():
  """In a process that can be ended: quadratic time would be hours."""
  script = (
    "from opo_jax.rewards.shaping import has_format\n"
    "for text in ['\\n' * 10**6, '<think>' * 150_000,\n"
    "             '\\n' * 10**6 + r'</think>\\boxed{4}',\n"
    "             '</think>' + '{' * 10**6 + r'\\boxed{4']:\n"
    "  print(*(has_format(text, kind) for kind in ('boxed', 'think')))\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", script],
    cwd=pathlib.Path(__file__).resolve().parent.parent,
    capture_output=True,
    text=True,
    check=True,
    timeout=100,  # It takes two seconds.
  )
  assert done.stdout.split() == ["0.0"] * 4 + ["1.0"] * 2 + ["0.0"] * 2


def test_unknown_formats_and_impossible_sizes_are_refused():
  with pytest.raises(ValueError, match="there are boxed and think"):
    shaping.has_format("", "xml")
  for buffer_tokens in (0, 11, -1):
    with pytest.raises(ValueError, match=r"--reward\.overlong-tokens"):
      shaping.soft_overlong(5, max_tokens=10, buffer_tokens=buffer_tokens)
  with pytest.raises(ValueError, match="at least 1 token"):
    shaping.repetition([1], ngram=0)


def test_soft_overlong_is_the_three_pieces_of_dapos_equation():
  # Its own numbers: L_max = 20480, L_cache = 4096.
  limit, cache = 20_480, 4096
  for length in range(0, 24_000, 111):
    if length <= limit - cache:
      expected = 0.0
    elif length <= limit:
      expected = ((limit - cache) - length) / cache
    else:
      expected = -1.0
    found = shaping.soft_overlong(length, max_tokens=limit, buffer_tokens=cache)
    assert found == expected
    assert str(found) != "-0.0"


def test_repetition_is_the_share_of_ngrams_seen_before():
  # 1 2 1 2 1: bigrams 12 21 12 21, two of four seen before.
  assert shaping.repetition([1, 2, 1, 2, 1], ngram=2) == -0.5
  assert shaping.repetition([5] * 1000, ngram=20) == 1 / 981 - 1
  assert shaping.repetition([5] * 19, ngram=20) == 0.0
  assert shaping.repetition([], ngram=1) == 0.0
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 4, 300).tolist()
  grams = [tuple(tokens[i : i + 3]) for i in range(298)]
  seen = sum(gram in grams[:i] for i, gram in enumerate(grams))
  assert shaping.repetition(tokens, ngram=3) == pytest.approx(-seen / 298)

r"""Reward shaping: bonuses and penalties for format, length and repetition.

Pure functions of one response. A run adds each, times its weight, to the verifier's
reward, and logs each by name. The lengths that weight the OPO baseline stay the actual
ones: a penalised response keeps its length.
"""

from collections.abc import Sequence

from opo_jax.rewards.answers import boxed


def has_format(response: str, kind: str) -> float:
  r"""Returns 1.0 for a response of the required format, else 0.0.

  Args:
    response: the text.
    kind: `boxed`: the last `\boxed{…}` is closed and not empty. `think`: a thought that
      ends with one `</think>`, followed by such a box; `<think>` may precede it, or end
      the prompt.

  Raises:
    ValueError: an unknown kind.

  >>> has_format(r"so \boxed{4}", "boxed"), has_format(r"so \boxed{4}", "think")
  (1.0, 0.0)
  >>> has_format(r"<think>2 + 2</think> \boxed{4}", "think")
  1.0
  """
  if kind == "boxed":
    return float(bool(boxed(response)))
  if kind == "think":
    # No regular expression: this reads a policy's text in the training process, where a
    # pattern that backtracks over a megabyte of white space would hang the run.
    thought, end, rest = response.partition("</think>")
    opened = "<think>" in thought.lstrip().removeprefix("<think>")
    one_thought = bool(end) and not opened and "think>" not in rest
    return float(one_thought and bool(boxed(rest)))
  raise ValueError(f"unknown format {kind!r}; there are boxed and think.")


def soft_overlong(length: int, *, max_tokens: int, buffer_tokens: int) -> float:
  """DAPO's soft overlong punishment, from 0 down to -1 (arXiv 2503.14476, eq. 13).

      0                                 if l <= L_max - L_cache
      (L_max - L_cache - l) / L_cache   if l is between that and L_max
      -1                                if l > L_max

  Args:
    length: l, response tokens, the end token included.
    max_tokens: L_max, the length limit of responses.
    buffer_tokens: L_cache, the last tokens before it, over which the penalty grows.

  Raises:
    ValueError: a buffer of 0 or more than `max_tokens`.

  https://arxiv.org/abs/2503.14476

  >>> [soft_overlong(l, max_tokens=100, buffer_tokens=20) for l in (80, 85, 100)]
  [0.0, -0.25, -1.0]
  """
  if not 0 < buffer_tokens <= max_tokens:
    raise ValueError(
      f"the buffer of the length penalty has {buffer_tokens} tokens; expected 1 to"
      f" {max_tokens}, the longest response (--reward.overlong-tokens)."
    )
  over = length - (max_tokens - buffer_tokens)
  return -min(max(over / buffer_tokens, 0.0), 1.0) + 0.0


def repetition(tokens: Sequence[int], *, ngram: int) -> float:
  """Minus the fraction of n-grams that occurred earlier in the same response.

      |distinct n-grams| / |n-grams| - 1

  0 without repetition and for a response shorter than n; towards -1 for a loop. The
  penalty on repeated n-grams of https://arxiv.org/abs/2502.03373, but a fraction, so
  that it does not grow with length.

  Args:
    tokens: of the response.
    ngram: n, at least 1. A large n lets legitimate text repeat its terms.

  >>> repetition([1, 2, 3, 4], ngram=2), repetition([7, 7, 7, 7, 7], ngram=2)
  (0.0, -0.75)
  """
  if ngram < 1:
    raise ValueError(f"an n-gram has at least 1 token, got {ngram}.")
  grams = list(zip(*(tokens[i:] for i in range(ngram)), strict=False))
  return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

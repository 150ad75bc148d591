r"""Is a mathematical answer right?

`math_reward` finds the final answer of a response (`rewards.answers`) and compares it
with the reference: in one notation (`rewards.normalization`), lists, tuples, intervals
and matrices element by element, expressions by their exact value (`rewards.numeric`).
math-verify parses what that cannot read, and SymPy decides. No JAX; the parser is
imported on first use.
"""

import dataclasses
import functools
import itertools
import logging
import re
from typing import Any, NamedTuple

from opo_jax.rewards import numeric
from opo_jax.rewards.answers import final_answer
from opo_jax.rewards.normalization import HEDGE, canonical, has_words, normalize

_MAX_ANSWER_LENGTH = 500  # The longest reference of MATH has 159 characters.
_MAX_DEPTH = 20  # The parser takes seconds for brackets nested deeper.


def math_reward(response: str, reference: str) -> float:
  r"""Returns 1.0 if the final answer of a response equals the reference, else 0.0.

  The final answer is in the last `\boxed{…}`, or without a box behind the last mark:
  `#### N`, `<answer>N</answer>`, "answer is N", "answer: N" (`answers.final_answer`).
  A response without box or mark earns nothing, and so does arithmetic left undone
  ("3 + 4", "14/2", `\log_2 8`): a question repeated is no answer.

  Args:
    response: any text of any length.
    reference: the true answer, as in `math_equal`.

  Raises:
    ValueError: the reference is empty.

  >>> math_reward("3 + 4 = 7, so the answer is $7.", "7"), math_reward("It is 7.", "7")
  (1.0, 0.0)
  """
  reference = _answer_of(reference)
  answer = final_answer(response)
  return float(answer is not None and _are_equal(answer, reference, True))


def math_equal(prediction: str, reference: str) -> bool:
  r"""Returns whether two answers are the same mathematical object.

  Integers, fractions and decimals are equal only if they are the same rational number:
  0.3333 is not a third. "1,234" is 1234; "$18", "18.00" and "18 dollars" are 18; "50%"
  is 50 and 0.5. Lists, sets and unions are compared in any order, tuples, intervals and
  matrices element by element, an inequality as an interval, an equation up to a factor,
  words only with the same words.

  Alternatives ("3 or 4") equal no single value, numbers that touch ("3 4") nothing.
  Arithmetic equals its value here, but earns nothing in `math_reward`.

  There is no time limit here, and SymPy may take very long: give text that a policy
  wrote to a `RewardPool`.

  Args:
    prediction: an answer, LaTeX or plain; a box around all of it is removed.
    reference: the true answer, LaTeX or plain; of a whole solution its final answer.

  Returns:
    False also where the prediction cannot be parsed or exceeds 500 characters.

  Raises:
    ValueError: the reference is empty.

  >>> math_equal(r"\frac{\sqrt{4}}{4}", "0.5"), math_equal("3 or 4", "3")
  (True, False)
  """
  return _are_equal(prediction, _answer_of(reference), False)


def normal_answer(response: str) -> str | None:
  r"""Returns the final answer of a response in one notation, to count votes.

  Equal strings are equal answers; the reverse does not hold: 1/2 and 0.5 stay two.

  Args:
    response: any text of any length; the time is linear in that.

  Returns:
    None where there is no final answer, or one of more than 500 characters.

  >>> normal_answer(r"So $x = \boxed{ \frac{1}{2} }$."), normal_answer("I do not")
  ('\\frac{1}{2}', None)
  """
  answer = final_answer(response)
  if answer is None or len(answer) > _MAX_ANSWER_LENGTH:
    return None
  return canonical(normalize(answer)) or None


def warm_up_parser() -> None:
  """Imports SymPy and builds the parser, so that the next answer costs only itself."""
  _same_expression(r"\frac{\sin 2x}{2}", r"\sin x\cos x")


# `RewardPool` calls this once in each of its workers.
math_reward.warm_up = warm_up_parser


def _answer_of(reference: str) -> str:
  if not reference.strip():
    raise ValueError("the reference is empty; expected the true answer of the problem.")
  is_long = len(reference) > _MAX_ANSWER_LENGTH
  is_solution = is_long or "####" in reference or "boxed" in reference
  return (is_solution and final_answer(reference)) or reference


# 3 4, 3"4, 3[4] and 3_x: math-verify would make one number of them.
_TOUCHING = re.compile(
  r"(?<![_\d])\d+(?:\s+|\s*[\"'`]\s*)\d|\.\.|\\[lc]?dots(?![a-z])"
  r"|[\d)\]]\s*\[[-\s\d.]*\]|\d\s*_\s*\{?[a-z]\b|boxed|\\fbox"
)
_THOUSANDS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


# The responses of a group share their reference, and often their answer.
@functools.lru_cache(maxsize=8192)
def _are_equal(prediction: str, reference: str, done: bool) -> bool:
  """`math_equal`; where `done`, work left undone equals nothing."""
  if len(prediction) > _MAX_ANSWER_LENGTH:
    return False
  ours, theirs = normalize(prediction), normalize(reference)
  if not ours or canonical(ours) == canonical(theirs):
    return bool(ours)
  if _TOUCHING.search(ours):
    return False
  numbers = [
    _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    for text in (ours, theirs)
  ]
  if _same(*numbers, done):
    return True
  return numbers != [ours, theirs] and _same(ours, theirs, done)  # 1,234 is a list.


def _same(ours: str, theirs: str, done: bool) -> bool:
  """Compares two normalized answers of any kind."""
  if canonical(ours) == canonical(theirs):
    return True
  (our_name, our_value), (their_name, their_value) = _named(ours), _named(theirs)
  if not our_value or not their_value:
    return False
  if (our_name or their_name) and (
    our_name == their_name
    or (not our_name and "=" not in our_value)
    or (not their_name and "=" not in their_value)
  ):
    return _same(our_value, their_value, done)  # y = 2x and 2x
  ours = ours if our_name else our_value
  theirs = theirs if their_name else their_value
  our_set, their_set = _solution_set(ours), _solution_set(theirs)
  if our_set and their_set and our_set[0] != their_set[0]:
    return False  # Of x and of y.
  if our_set or their_set:
    ours = our_set[1] if our_set else ours
    return _same(ours, their_set[1] if their_set else theirs, done)
  our_parts, their_parts = _parts(ours), _parts(theirs)
  if our_parts and their_parts:
    return _same_parts(our_parts, their_parts, done)
  if our_parts or their_parts:
    # One value in two forms is that value; two values are not one of them.
    kind, elements = our_parts or their_parts
    pairs = ((each, theirs) if our_parts else (ours, each) for each in elements)
    return kind == "list" and all(_same(*pair, done) for pair in pairs)
  return _same_value(ours, theirs, done)


# --- Equations and inequalities ---

_EQUALS = re.compile(r"(?<![<>!])=")
_LABEL = re.compile(
  r"(?:\\[a-z]+ ?)?[A-Za-z][A-Za-z ]*(?:_\w+|')?(?:\^\{-1\})? ?(?:\( ?[a-z] ?\))?"
  r"|\\[a-z]+|\( ?[A-Za-z](?: ?, ?[A-Za-z])+ ?\)"
)
_AND_OR = re.compile(r",?\s*\b(?:and|or)\b\s*")
_MEMBER = re.compile(r"\s*([A-Za-z])\s*\\in(?![a-z])\s*")
_RELATION = re.compile(r"\s*(\\[lg]e(?![a-z])|[<>])\s*")
_VARIABLE = re.compile(r"[A-Za-z](?:\([a-z]\))?|\\[a-z]+")
_RISING = ("<", r"\le")


def _named(text: str) -> tuple[str, str]:
  """Returns the name and the value of `x = 3 + 2 = 5`: x and 5.

  The name is "" where there is none; the value is "" where two sides contradict each
  other (7 = 42). An equation without a name is returned as it is.
  """
  exact, approximately, rounded = text.partition(r"\approx")
  if approximately:
    is_name = not exact.strip() or _LABEL.fullmatch(exact.strip())
    text = f"{exact}={rounded}" if is_name else exact
  name, *sides = (side.strip() for side in _EQUALS.split(text))
  if name and not _LABEL.fullmatch(name):
    name, sides = "", [name, *sides]
    readings = map(numeric.read, sides)
    if not all(reading and not reading.has_letters for reading in readings):
      return "", text
  if not sides or (len(sides) > 1 and ("," in text or _AND_OR.search(text))):
    return "", text  # x = 1, y = 2
  agree = all(_same_expression(side, sides[-1]) for side in sides[:-1])
  if not agree or HEDGE.search(name):  # "not x = 7"
    return "", ""
  return name.partition("(")[0].strip(), sides[-1]  # f(x) is f(t).


def _solution_set(text: str) -> tuple[str, str] | None:
  r"""Returns variable and set of `x \in [1,2)` or `1 < x \le 3`, None for others."""
  if member := _MEMBER.match(text):
    return member[1], text[member.end() :]
  alternatives = re.split(r"\s*\bor\b\s*", text)
  if len(alternatives) > 1:
    sets = [_solution_set(each) for each in alternatives]
    if not all(sets) or len({variable for variable, _ in sets}) > 1:
      return None
    return sets[0][0], r"\cup".join(interval for _, interval in sets)
  pieces = _RELATION.split(text)
  if len(pieces) == 3:
    is_first = _VARIABLE.fullmatch(pieces[0])
    pieces = [None, None, *pieces] if is_first else [*pieces, None, None]
  if len(pieces) != 5 or not _VARIABLE.fullmatch(pieces[2]):
    return None
  before, first, variable, second, after = pieces
  if first and second and (first in _RISING) != (second in _RISING):
    return None
  low, high = r"(-\infty", r"\infty)"
  sides = (before, first, first in _RISING), (after, second, second not in _RISING)
  for bound, relation, is_low in sides:
    is_closed = relation in (r"\le", r"\ge")
    if bound and is_low:
      low = "(["[is_closed] + bound
    elif bound:
      high = bound + ")]"[is_closed]
  return variable, f"{low},{high}"


# --- Lists, sets, tuples, intervals, unions, matrices ---

_MATRIX = re.compile(r"\\begin\{([pb]?)matrix\}((?:(?!\\begin).)*)\\end\{\1matrix\}")


class _Parts(NamedTuple):
  # "list" (also a set), "union", the brackets as in "[)", or rows and columns.
  kind: str | tuple[int, int]
  elements: list[str]


def _parts(text: str) -> _Parts | None:
  """Splits a list, set, tuple, interval, union or matrix; None for anything else."""
  if matrix := _MATRIX.fullmatch(text):
    rows = [row.split("&") for row in matrix[2].strip().rstrip("\\").split(r"\\")]
    cells = [cell.strip() for row in rows for cell in row]
    return _Parts((len(rows), len(rows[0])), cells) if all(cells) else None
  if len(union := _split(text, r"\cup")) > 1:
    return _Parts("union", union)
  is_set = text.startswith(r"\{") and text.endswith(r"\}")
  if is_set or (text[:1] in "([{" and text[-1:] in ")]}"):
    inside = _split(text[1 + is_set : -1 - is_set], ",")
    if not is_set and text[0] != "{" and len(inside) > 1:
      return _Parts(text[0] + text[-1], inside)
    if is_set or len(inside) > 1:
      return _Parts("list", _with_both_signs(inside))
  elements = _with_both_signs(_split(_AND_OR.sub(",", text), ","))
  return _Parts("list", elements) if len(elements) > 1 else None


def _same_parts(ours: _Parts, theirs: _Parts, done: bool) -> bool:
  if ours.kind == theirs.kind and ours.kind in ("list", "union"):
    same = [[_same(a, b, done) for b in theirs.elements] for a in ours.elements]
    return all(map(any, same)) and all(map(any, zip(*same, strict=True)))
  size, kinds = len(theirs.elements), {ours.kind, theirs.kind}
  is_alike = (
    ours.kind == theirs.kind
    or (ours.kind == "list" and theirs.kind == "()")  # -2, -2 is the point (-2, -2).
    or (kinds & {"()", "[]"} and kinds & {(1, size), (size, 1)})
  )
  pairs = zip(ours.elements, theirs.elements, strict=False)
  is_alike = bool(is_alike) and len(ours.elements) == size
  return is_alike and all(_same(*pair, done) for pair in pairs)


def _split(text: str, separator: str) -> list[str]:
  """Splits where no bracket is open; one element where the brackets do not close."""
  elements, start, depth = [], 0, 0
  for at, character in enumerate(text):
    depth += (character in "([{") - (character in ")]}")
    if depth < 0:
      return [text]
    if depth == 0 and text.startswith(separator, at):
      elements.append(text[start:at].strip())
      start = at + len(separator)
  elements.append(text[start:].strip())
  return elements if depth == 0 and all(elements) else [text]


def _with_both_signs(elements: list[str]) -> list[str]:
  r"""Replaces an element with `\pm` by two."""
  return [
    each.replace(r"\pm", sign)
    for each in elements
    for sign in ("+-" if r"\pm" in each else "+")
  ]


# --- Single values ---

_IN_BASE = re.compile(r"(-?\d[\dA-F.]*)_\{?\w+\}?")
# (1+2i)(3-i), |3+4i| and \frac{1}{1+i} are work left undone; (1+i)/2 is not.
_COMPLEX_WORK = re.compile(
  r"[()|]|\\(?!(?:frac|sqrt|pi|cdot)(?![a-z]))[a-z]|\}\s*\{[^{}]*i[^{}]*\}|/[^/]*i"
)


def _same_value(ours: str, theirs: str, done: bool) -> bool:
  if in_base := _IN_BASE.fullmatch(theirs.replace(" ", "")):
    return ours == in_base[1]  # Digits alone are in the reference's base.
  if _IN_BASE.fullmatch(ours) or ":" in ours + theirs:
    return False  # Ratios and times are equal only as they stand.
  (ours, our_percent), (theirs, their_percent) = _percent(ours), _percent(theirs)
  if has_words(ours) or has_words(theirs) or ("=" in ours) != ("=" in theirs):
    return False
  if done and _is_undone(ours, theirs):
    return False
  if _same_expression(ours, theirs):
    return True
  # 50% is 50 and 0.5.
  ours = f"({ours})/100" if our_percent else ours
  theirs = f"({theirs})/100" if their_percent else theirs
  return our_percent != their_percent and numeric.compare(ours, theirs) is True


def _percent(text: str) -> tuple[str, bool]:
  text = normalize(text)  # An element may have a unit of its own.
  return text.rstrip("% "), text.endswith("%")


def _is_undone(ours: str, theirs: str) -> bool:
  """Whether the prediction leaves arithmetic, or a function of numbers, to be done."""
  if numeric.is_undone(ours, theirs):
    return True
  is_number = re.search(r"(?<![A-Za-z\\])i(?![A-Za-z])", theirs) and "(" not in theirs
  return bool(is_number and _COMPLEX_WORK.search(ours.strip("()")))


_DECIMAL = re.compile(r"(\d*)\.(\d+)")
# math-verify takes 2\max(3, 4) for a mixed number.
_TIMES_LEFT_OUT = re.compile(
  r"(?<=[\d)])(?<![\^_]\d)\s*(?=\(|\\(?!(?:frac|cdot|times|le|ge)(?![a-z]))[a-z])"
)


def _same_expression(ours: str, theirs: str) -> bool:
  """Compares exactly; `math_verify.verify` would allow an absolute difference."""
  same = numeric.compare(ours, theirs)
  if same is not None:
    return same
  try:
    return any(map(_same_object, _parse(ours), _parse(theirs)))
  except Exception:  # SymPy raises anything at 1/0.
    return False


def _same_object(ours: Any, theirs: Any) -> bool:
  import sympy

  if isinstance(ours, sympy.Eq) and isinstance(theirs, sympy.Eq):
    left, right = ((each.lhs - each.rhs).doit() for each in (ours, theirs))
    factor = _at_point(left, 1) / _at_point(right, 1)
    return factor.evalf(30) != 0 and _same_object(left, factor * right)
  if isinstance(ours, sympy.Expr) and isinstance(theirs, sympy.Expr):
    ours, theirs = ours.doit(), theirs.doit()
    value, other = _at_point(ours, 0).evalf(30), _at_point(theirs, 0).evalf(30)
    is_far = bool(abs(value - other) > abs(value) / 10**15)  # `equals` takes seconds.
    return not is_far and (ours - theirs).equals(0) is True
  return ours == theirs


def _at_point(expression: Any, point: int) -> Any:
  """Returns the value at a rational point; small numbers, as SymPy factors them."""
  names = map(str, expression.free_symbols)
  values = {x: numeric.value_of_letter(x, point).limit_denominator(50) for x in names}
  return expression.subs({x: values[str(x)] for x in expression.free_symbols})


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> list[Any]:
  steps = ((c in "([{") - (c in ")]}") for c in text)
  if max(itertools.accumulate(steps)) > _MAX_DEPTH:
    return []
  # A decimal is the fraction that it is; math-verify would make a float of it.
  text = _DECIMAL.sub(
    lambda each: rf"\frac{{{each[1]}{each[2]}}}{{1{'0' * len(each[2])}}}", text
  )
  text = _TIMES_LEFT_OUT.sub(r" \\cdot ", text)
  library, config = _math_verify()
  return library.parse(
    f"${text}$",
    [config],
    fallback_mode="no_fallback",
    parsing_timeout=None,  # It rests on signals, which fail off the main thread.
  )


@functools.cache
def _math_verify() -> Any:
  """Imports math-verify; returns it, and how it is to read LaTeX."""
  import math_verify

  # It warns about the missing time limit, and logs what it cannot parse.
  for name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  config = math_verify.LatexExtractionConfig()
  # Of `\ln 2 t` it would drop the t as a unit.
  as_written = dataclasses.replace(config.normalization_config, units=False)
  return math_verify, dataclasses.replace(config, normalization_config=as_written)

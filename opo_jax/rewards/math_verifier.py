r"""Is a mathematical answer right?

`math_reward` finds the final answer of a response (`rewards.answers`), `math_equal`
compares it with the reference: what is plain is compared exactly (choices, bases,
numbers: `rewards.quantities`) or by value (`rewards.numeric`), the rest with
math-verify and SymPy. No JAX, and the parser is imported when it is first needed.
"""

import functools
import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from opo_jax.rewards import numeric, quantities
from opo_jax.rewards.answers import boxed, final_answer, stated
from opo_jax.rewards.spelling import (
  CHOICE,
  LABELLED,
  NUMBER_WORDS,
  WORD,
  canonical,
  has_words,
  tidy,
)

# Longer is prose or an attack: the longest reference of MATH has 159 characters.
_MAX_ANSWER_LENGTH = 500
# Nested deeper is an attack on the parser, which takes seconds over it.
_MAX_DEPTH = 20
_STATEMENT = re.compile(
  r"(?!.*\b(?:and|or|not)\b)[A-Za-z]{2}(?:(?!\b(?:is|are)\b)[^=<>]){0,200}\b(?:is|are) "
  r"(\$?(?:\\\()?-?[\d\\][^\s,]*)"
)


def math_reward(response: str, reference: str) -> float:
  r"""Gives 1.0 if the final answer of a response equals the reference, else 0.0.

  Which answer is final, by the first rule that applies (`answers.final_answer`):
    1. The last `\boxed{…}` that is not empty; boxes side by side are one list. What a
       "final answer is N" after it begins with replaces it, if that is a value.
    2. The last marked answer: `#### N`, "answer is N", `<answer>N</answer>`.
    3. The last line, unless it asks for something.
  Of a sentence that 2 or 3 gives, the one value that it states (`answers.stated`).
  Numbers elsewhere in the text never count, so repeating the question earns nothing; of
  its formulas in a box few do: an algebraic form can be question and answer at once.

  Args:
    response: what the policy wrote, any text of any length.
    reference: the true answer, as for `math_equal`.

  Returns:
    1.0 or 0.0. A response without a final answer is wrong: 0.0.

  Raises:
    ValueError: the reference is empty.

  >>> math_reward("3 + 4 = 7, so the answer is $7.", "7")
  1.0
  """
  _check_reference(reference)
  answer = final_answer(response)
  return float(answer is not None and _is_answer(answer, reference))


def math_equal(prediction: str, reference: str) -> bool:
  r"""Says whether two answers are the same mathematical object.

  Plain numbers are compared exactly, without regard to thousands separators, currency
  or a unit in words: "1,234", "$18", "18.00", "18 dollars". "50%" equals 50 and 0.5. A
  decimal of at least four decimals and four digits equals what rounds to it: 0.3333 is
  `\frac13`; a reference of three equals the irrational value that it rounds. Lists and
  sets are compared without regard to order, an inequality as the interval it is, digits
  with a base as they stand. What is none of these has to agree in value
  (`rewards.numeric`), or goes to math-verify.

  Stricter than math-verify where a policy could learn to exploit it: alternatives ("3
  or 4") equal no single value, numbers side by side ("3 4") nothing; words equal only
  the same words, where math-verify multiplies their letters ("cat" would equal "act").
  Arithmetic left undone ("3 + 4", "14/2") equals its value only here, where it is all
  of the prediction or its box: in a sentence and for `math_reward` it is no answer, as
  it may be the question repeated; so do functions of numbers (`\log_2 8`). Powers,
  roots and scientific notation always are.

  There is no time limit here: comparing towers of powers may take for ever. Text that a
  policy wrote belongs into `RewardPool`.

  Args:
    prediction: an answer, LaTeX or plain, or a text of which the answer is taken that
      `math_reward` would take.
    reference: the true answer, LaTeX or plain; of a whole solution its final answer.

  Returns:
    False also where the prediction cannot be parsed, exceeds 500 characters or nests
    brackets deeper than 20.

  Raises:
    ValueError: the reference is empty.

  >>> math_equal(r"\frac{\sqrt{4}}{4}", "0.5"), math_equal("3 or 4", "3")
  (True, False)
  """
  _check_reference(reference)
  if _is_answer(prediction, reference):
    return True
  return _is_undone(prediction, reference)


def _is_undone(prediction: str, reference: str) -> bool:
  """Whether it is nothing but arithmetic that comes to the reference."""
  inside = boxed(prediction)
  is_all = inside == "" or prediction.strip(" $.") == rf"\boxed{{{inside}}}"
  if inside is None or "oxed" in inside or not is_all or not _comparable(prediction):
    return False
  expression = tidy(prediction)
  if quantities.DECIMAL.fullmatch(expression.replace(",", "")):
    return False
  numbers = quantities.read(expression), quantities.read(tidy(reference))
  if all(numbers):
    return numbers[0].value == numbers[1].value
  same = numeric.compare(expression, tidy(reference))
  if same is None and numeric.is_undone_function(expression, tidy(reference)):
    is_read = not has_words(expression) and not _SIDE_BY_SIDE.search(expression)
    return is_read and _same_expression(expression, tidy(reference))
  return same is True


def _is_answer(prediction: str, reference: str) -> bool:
  """`math_equal` for what a policy wrote: arithmetic has to be done."""
  if "####" in reference or len(reference) > _MAX_ANSWER_LENGTH:
    reference = final_answer(reference) or reference
  if statement := _STATEMENT.fullmatch(reference):
    return _is_answer(prediction, statement[1])  # 4 of "The number is 4."
  shrinks = True
  while shrinks and ("oxed" in prediction or "fbox" in prediction):
    inside = final_answer(prediction) or ""
    shrinks = len(inside) < min(len(prediction), _MAX_ANSWER_LENGTH)
    prediction = inside
  if _comparable(prediction) and _equal(prediction, reference):
    return True
  if not _may_be_sentence(prediction):
    return False
  answer = final_answer(prediction) or ""
  values = (answer, stated(answer)) if _may_be_sentence(answer) else (answer,)
  return any(
    bool(value) and _comparable(value) and _equal(value, reference) for value in values
  )


def _may_be_sentence(text: str) -> bool:
  marks = re.search(r"\*\*|#|\bis\b", text)
  return bool(marks or WORD.search(text)) or not text.isascii()


def _comparable(text: str) -> bool:
  return len(text) <= _MAX_ANSWER_LENGTH and _depth(text) <= _MAX_DEPTH


def _check_reference(reference: str) -> None:
  if not reference.strip():
    raise ValueError("the reference is empty; expected the true answer of the problem.")


def _depth(text: str) -> int:
  depth = deepest = 0
  for character in text:
    depth += (character in "([{") - (character in ")]}")
    deepest = max(deepest, depth)
  return deepest


def normal_answer(response: str) -> str | None:
  r"""Gives the final answer of a response in a normal form, for counting votes.

  Found by the rules of `math_reward`, without box, delimiters, currency and spacing.
  Equal strings are equal answers; the reverse is not so: 1/2 and 0.5 stay two.

  Args:
    response: any text of any length; the time it takes is linear in that.

  Returns:
    None where there is no final answer: an unclosed box, more than 500 characters, or
    a last line that states nothing.

  >>> normal_answer(r"So $x = \boxed{ \frac{1}{2} }$."), normal_answer("I do not")
  ('\\frac{1}{2}', None)
  """
  answer = final_answer(response)
  if answer is None or len(answer) > _MAX_ANSWER_LENGTH:
    return None
  if has_words(answer) and not boxed(response):
    answer = stated(answer)
  answer = canonical(tidy(answer))
  return answer if answer and (boxed(response) or not has_words(answer)) else None


def warm_up_parser() -> None:
  """Imports SymPy and builds the parser, so that the next answer costs only itself."""
  _same_expression(r"x^2 + \frac{\sqrt{2}}{3}", r"\frac{\sqrt{2}}{3} + x^2 + 0")


# What a pool runs once in each of its workers.
math_reward.warm_up = warm_up_parser


# The samples of a group share their reference, and often their answer.
@functools.lru_cache(maxsize=4096)
def _equal(prediction: str, reference: str) -> bool:
  prediction, reference = tidy(prediction), tidy(reference)
  return bool(prediction) and _equal_tidied(prediction, reference)


def _equal_tidied(prediction: str, reference: str) -> bool:
  prediction, reference = prediction.lstrip("= "), reference.lstrip("= ")
  ours, labelled = canonical(prediction), LABELLED.fullmatch(reference)
  if ours in (canonical(reference), labelled and labelled[1]):
    return True
  if _contradicts_itself(prediction):
    return False
  choice = CHOICE.fullmatch(prediction)
  if choice and choice["content"] and not CHOICE.fullmatch(reference):
    prediction = choice["content"].strip()  # 12 of "(C) 12"
  name, value_of_name = _named(reference)
  if name and ours == canonical(value_of_name):
    return True
  target = quantities.read(value_of_name)
  if target is None and quantities.DECIMAL_POINT.fullmatch(prediction):
    target = quantities.read(quantities.DECIMAL_COMMA.sub(".", reference))
  if target is not None:
    value = quantities.read(_right_side(prediction))
    if value is None and not target.is_fraction and target.value.denominator > 1:
      value = quantities.read(quantities.DECIMAL_COMMA.sub(".", prediction))
    if value is not None:
      names = _EQUALS.split(prediction.translate(_BRACES))[:-1]
      names = {_OF_VARIABLE.sub("", each.strip()).casefold() for each in names}
      is_named = not names or not name or name.casefold() in names
      return is_named and quantities.same_number(value, target)
    expression = quantities.without_unit(_right_side(prediction))
    if numeric.is_undone(expression, target.value.denominator == 1):
      return False
  if numeric.is_undone_function(prediction, quantities.without_unit(value_of_name)):
    return False
  ours, theirs = _named(prediction), _named(reference)
  if (
    (ours[0] == theirs[0])
    or (not ours[0] and "=" not in prediction)
    or (not theirs[0] and "=" not in reference)
  ):
    prediction, reference = ours[1], theirs[1]  # y = 2x and 3x: what y is.
  if (in_base := _same_in_base(prediction, reference)) is not None:
    return in_base
  if (same := _same_parts(prediction, reference)) is not None:
    return same
  prediction = quantities.without_unit(prediction)
  reference = quantities.without_unit(reference)
  if has_words(prediction) or has_words(reference):
    return False
  if _SIDE_BY_SIDE.search(prediction):
    return False
  if _MATRIX.fullmatch(reference) and prediction.count(r"\begin") > 1:
    return False  # A sum or product of matrices that is left undone.
  same = numeric.compare(quantities.plain(prediction), quantities.plain(reference))
  if not same and quantities.rounds_to(prediction, target):
    return True
  if same is None and prediction.count("=") == reference.count("=") == 1:
    same = numeric.compare_equations(prediction, reference)
  return _same_expression(prediction, reference) if same is None else same


# --- Equations and bases ---

# 3 4, 3"4, 3[4] and 3_x: math-verify would make a number of them.
_SIDE_BY_SIDE = re.compile(
  r"(?<![_\d])\d+(?:\s+|\s*(?:[\"'`]|\\[lc]?dots(?![a-z]))\s*)\d"
  r"|[\d)\]]\s*\[[-\s\d.]*\]|\d\s*_\s*\{?[a-z]"
)
_EXPRESSION = re.compile(r"[a-z]\s*[-+*^/]|[-+*/]\s*\d*\s*[a-z]")
_EQUALS = re.compile(r"(?<![<>!])=")


def _contradicts_itself(text: str) -> bool:
  """Whether it begins with a number and ends with one far from it: 3 + 4 = 42."""
  first, *others = _EQUALS.split(text)
  if not others or None in (one := numeric.values(first)):
    return False
  last = numeric.values(others[-1])
  is_constant = None not in last and one[0] == one[1] and last[0] == last[1]
  return is_constant and abs(one[0] - last[0]) > 0.01 * abs(last[0])


def _right_side(text: str) -> str:
  """Gives what an equation says its left side is: 7 of `x = 3 + 4 = 7`."""
  exact, approximately, rounded = text.partition(r"\approx")
  if approximately:  # 1/3 of "1/3 \approx 0.3", 3.14 of "x \approx 3.14".
    text = f"{exact}={rounded}" if re.fullmatch(r"[\\\w ]*[A-Za-z] ?", exact) else exact
  *left, right = _EQUALS.split(text)
  label = re.compile(
    r"[A-Za-z ]{1,40}|(?!.*(?<![\\A-Za-z])[A-Za-z]{2})(?:[^,]|\(.*|,\S)*"
  )
  if right.strip() == "0" and any(_EXPRESSION.search(side) for side in left):
    return text  # 2x - y = 0 is not 0.
  if all(label.fullmatch(side) for side in left):
    return right.strip()
  return text


_BRACES = str.maketrans("", "", "{}")  # a_{2} is a_2
_SYMBOL = r"[A-Za-z](?:_\w|_\{\w+\})?"
_OF_VARIABLE = re.compile(r"\s?\(\s?[a-z]\s?\)$")  # W(x) is W(n).
_NAMED = re.compile(
  rf"([A-Za-z][A-Za-z ]{{,39}}|\\[a-z]+|{_SYMBOL}(?::{_SYMBOL}|\([a-z]\))?)"
  r"\s*=([^=]*)"
)


def _named(text: str) -> tuple[str, str]:
  """Gives the name and the value of `x = 5`; any other text has no name."""
  match = _NAMED.fullmatch(text)
  if match is None:
    return "", text
  name = _OF_VARIABLE.sub("", match[1].strip())
  return name.translate(_BRACES), match[2].strip()


_IN_BASE = re.compile(r"([0-9A-F]+)\s*_\s*(?:\{\s*(\w+)\s*\}|(\w+))")


def _same_in_base(prediction: str, reference: str) -> bool | None:
  """Compares digits with a base, `1011_2`; None where neither has one.

  Digits alone are in the base that the other names.
  """
  ours, theirs = (_IN_BASE.fullmatch(t.strip()) for t in (prediction, reference))
  if ours is None and theirs is None:
    return None
  if ours is None or theirs is None:
    return theirs is not None and theirs[1] == _right_side(prediction).replace(" ", "")
  return ours[1] == theirs[1] and _base_of(ours) == _base_of(theirs)


def _base_of(match: re.Match) -> str:
  base = (match[2] or match[3]).casefold()
  return NUMBER_WORDS.get(base, base)


# --- Lists, sets, tuples, intervals ---

_AND_OR = re.compile(r",?\s*\b(?:and|or)\b\s*")
_MEMBER = re.compile(r"\s*[A-Za-z]\s*\\in(?![a-z])\s*")
_RELATION = re.compile(
  r"\s*(<=|>=|<|>|\\(?:leqslant|geqslant|leq|geq|le|ge|lt|gt)(?![a-z]))\s*"
)
_VARIABLE = re.compile(r"[A-Za-z]|\\[a-z]+")
_MATRIX = re.compile(r"\\begin\{([pb]?)matrix\}((?:(?!\\begin).)*)\\end\{\1matrix\}")
_NAMES = re.compile(r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)\s*=\s*(?=\()")
_UNORDERED = ("", "{}", r"\cup")


class _Parts(NamedTuple):
  # "" of a list, "{}" of a set, "\cup" of a union, a matrix's shape, else as written.
  brackets: str
  elements: list[str]

  def is_vector_of(self, other: "_Parts") -> bool:
    """Whether it is a row or column of a matrix, and the other a tuple."""
    shapes = "matrix of 1 rows", f"matrix of {len(self.elements)} rows"
    return self.brackets in shapes and other.brackets in ("()", "[]")


def _same_parts(prediction: str, reference: str) -> bool | None:
  """Compares element by element; None where that settles nothing."""
  members = _MEMBER.match(prediction), _MEMBER.match(reference)
  if all(members) and members[0][0].split() != members[1][0].split():
    return False  # Of x and of y.
  ours, theirs = _as_intervals(prediction, reference)
  if (ours, theirs) != (prediction, reference):
    return _equal_tidied(ours, theirs)
  ours, theirs = _parts(prediction), _parts(reference)
  if "=" in prediction or "=" in reference:
    named = _values_by_name(prediction), _values_by_name(reference)
    if (same := _same_by_name(named, (ours, theirs))) is not None:
      return same
  if ours is None and theirs is None:
    return None
  if theirs is None and all(_equal_tidied(e, reference) for e in ours.elements):
    # One value in two forms is that value; two values are not one of them.
    return not ours.brackets or None
  if ours is None or theirs is None:
    single = prediction if ours is None else reference
    known = ";" not in single and _is_known(_right_side(_named(single)[1]))
    return False if known else None
  alike = _same_set if theirs.brackets in _UNORDERED else _same_row
  if {ours.brackets, theirs.brackets} <= {"", "{}"} or ours.brackets == theirs.brackets:
    if alike(ours.elements, theirs.elements, _equal_tidied):
      return True
  elif ours.is_vector_of(theirs) or theirs.is_vector_of(ours):
    return _same_row(ours.elements, theirs.elements, _equal_tidied)
  elif {ours.brackets, theirs.brackets} == {"()", "{}"}:
    return False
  else:
    if not ours.brackets and _same_row(ours.elements, theirs.elements, _equal_tidied):
      return theirs.brackets == "()" or None  # -2, -2 is the point (-2, -2).
    alike = _same_set  # A list and a tuple: math-verify knows, if they hold the same.
    if alike(ours.elements, theirs.elements, _same_value):
      return None
  # What has a value differs where the values do; of the rest math-verify may know more.
  if all(_is_known(_right_side(each)) for each in ours.elements + theirs.elements):
    return alike(ours.elements, theirs.elements, _same_value)
  return None


def _is_known(text: str) -> bool:
  is_infinite = text.replace(" ", "") in (r"\infty", r"+\infty", r"-\infty")
  if is_infinite or quantities.read(text) or None not in numeric.values(text):
    return True
  parts = _parts(text)
  return parts is not None and all(map(_is_known, parts.elements))


def _same_value(prediction: str, reference: str) -> bool:
  if quantities.read(prediction) and quantities.read(reference):
    return _equal_tidied(prediction, reference)
  if _parts(prediction) and _parts(reference):
    return _same_parts(prediction, reference) is True
  return numeric.compare(prediction, reference) is True or (
    canonical(prediction) == canonical(reference)
  )


def _same_row(
  ours: list[str], theirs: list[str], equal: Callable[[str, str], bool]
) -> bool:
  return len(ours) == len(theirs) and all(map(equal, ours, theirs))


def _same_set(
  ours: list[str], theirs: list[str], equal: Callable[[str, str], bool]
) -> bool:
  """Whether each has its equal on the other side, whatever the order."""
  return all(any(equal(a, b) for b in theirs) for a in ours) and all(
    any(equal(a, b) for a in ours) for b in theirs
  )


def _parts(text: str) -> _Parts | None:
  """The elements of a list, set, tuple, interval or union; None for anything else."""
  if matrix := _MATRIX.fullmatch(text):
    rows = [row.split("&") for row in matrix[2].strip().rstrip("\\").split(r"\\")]
    cells = [cell.strip() for row in rows for cell in row]
    return _Parts(f"matrix of {len(rows)} rows", cells) if all(cells) else None
  text = _NAMES.sub("", text)
  if re.search(r"\d,\d{3}(?!\d)|;|\\begin", text):
    return None  # 1,234 is a number, and so may be part of this.
  union = _split(text, r"\cup")
  if len(union) > 1:
    return _Parts(r"\cup", union)
  inside = re.fullmatch(r"\\\{(.*)\\\}|\{(.*)\}|([(\[])(.*)([)\]])", text)
  if (
    inside is not None
    and len(_split(inside[inside.lastindex - bool(inside[3])], ",")) > 1
  ):
    content = inside[inside.lastindex - bool(inside[3])]
    if inside[3]:
      return _Parts(inside[3] + inside[5], _split(content, ","))
    brackets = "{}" if inside[1] else ""  # {1, 2} in LaTeX is 1, 2.
    return _Parts(brackets, _with_both_signs(_split(content, ",")))
  elements = _with_both_signs(_split(_AND_OR.sub(",", text), ","))
  return _Parts("", elements) if len(elements) > 1 else None


def _same_by_name(
  named: tuple[dict[str, str], dict[str, str]],
  parts: tuple[_Parts | None, _Parts | None],
) -> bool | None:
  """Compares `x = 2, y = 1` with another such, or with the tuple (2, 1)."""
  ours, theirs = named
  if ours and theirs:
    if ours.keys() != theirs.keys():
      return None
    return all(_equal_tidied(ours[name], theirs[name]) for name in ours)
  values, other = (ours, parts[1]) if ours else (theirs, parts[0])
  if not values or other is None or other.brackets not in ("()", "[]"):
    return None
  in_order = [values[name] for name in sorted(values)]
  return _same_row(in_order, other.elements, _equal_tidied)


def _values_by_name(text: str) -> dict[str, str]:
  """x and y of `x = 3, y = 2` and of `(x, y) = (3, 2)`; of anything else nothing."""
  if names := _NAMES.match(text):
    tuples = text[: names.end()].rpartition("=")[0], text[names.end() :]
    names, values = (_split(each.strip()[1:-1], ",") for each in tuples)
    return dict(zip(names, values, strict=True)) if len(names) == len(values) else {}
  pairs = [_named(each) for each in _split(_AND_OR.sub(",", text), ",")]
  names = [name for name, _ in pairs]
  return dict(pairs) if all(names) and len(set(names)) == len(pairs) > 1 else {}


def _split(text: str, separator: str) -> list[str]:
  """Splits where no bracket is open; one element where the brackets do not close."""
  elements, start, depth, at = [], 0, 0, 0
  while at < len(text):
    if text[at] in "([{":
      depth += 1
    elif text[at] in ")]}":
      depth -= 1
      if depth < 0:
        return [text]
    elif depth == 0 and text.startswith(separator, at):
      elements.append(text[start:at].strip())
      start = at + len(separator)
    at += 1
  elements.append(text[start:].strip())
  return elements if depth == 0 and all(elements) else [text]


def _with_both_signs(elements: list[str]) -> list[str]:
  r"""Makes two elements of each with a `\pm`."""
  both = []
  for element in elements:
    if r"\pm" in element:
      both += [element.replace(r"\pm", "+"), element.replace(r"\pm", "-")]
    else:
      both.append(element)
  return both


def _as_intervals(first: str, second: str) -> tuple[str, str]:
  """Writes inequalities as the intervals they are, where that makes two comparable."""
  first, second = _MEMBER.sub("", first), _MEMBER.sub("", second)
  intervals = [_inequality(text) for text in (first, second)]
  if all(intervals):
    (x, one), (y, other) = intervals
    return (one, other) if x == y else (first, second)
  if intervals[0] and second.startswith(("(", "[")):
    return intervals[0][1], second
  if intervals[1] and first.startswith(("(", "[")):
    return first, intervals[1][1]
  return first, second


def _inequality(text: str) -> tuple[str, str] | None:
  """The variable and the interval of `1 < x <= 3` or `x > 2`, None for others."""
  alternatives = re.split(r"\s*\bor\b\s*", text)
  if len(alternatives) > 1:
    parts = [_inequality(part) for part in alternatives]
    if not all(parts) or len({variable for variable, _ in parts}) > 1:
      return None
    return parts[0][0], r"\cup".join(interval for _, interval in parts)
  pieces = _RELATION.split(text)
  if len(pieces) not in (3, 5) or not all(pieces):
    return None
  if len(pieces) == 3 and _VARIABLE.fullmatch(pieces[2]):
    pieces.reverse()
    rising = not _rises(pieces[1])
  else:
    rising = _rises(pieces[1])
  closed = [piece not in ("<", ">", r"\lt", r"\gt") for piece in pieces[1::2]]
  if len(pieces) == 5:
    low, variable, high = pieces[::2]
    if not rising or not _rises(pieces[3]) or not _VARIABLE.fullmatch(variable):
      return None
    return variable, f"{'(['[closed[0]]}{low},{high}{')]'[closed[1]]}"
  variable, bound = pieces[0], pieces[2]
  if not _VARIABLE.fullmatch(variable):
    return None
  if rising:
    return variable, rf"(-\infty,{bound}{')]'[closed[0]]}"
  return variable, rf"{'(['[closed[0]]}{bound},\infty)"


def _rises(relation: str) -> bool:
  return relation == "<=" or relation.startswith(("<", r"\l"))


# --- What math-verify decides ---


def _same_expression(prediction: str, reference: str) -> bool:
  targets = _parse_reference(reference)
  if not targets:
    return False
  values = _parse(prediction)
  # Errors in a comparison (1/0 was predicted) are "not equal": the reference is known
  # to parse. No time limit of math-verify's own: it rests on signals, which fail off
  # the main thread, and the pool has the clock.
  return bool(values) and _math_verify().verify(targets, values, timeout_seconds=None)


_DEGREES = re.compile(r"(\d+)\s*(?:°|\^\s*(?:\\circ|\{\s*\\circ\s*\}))")
# math-verify takes 2\\max(3, 4) for a mixed number.
_TIMES_LEFT_OUT = re.compile(
  r"(?<=[\d)])(?<![\^_]\d)\s*(?=\(|\\(?:[dt]?binom|max|min|gcd|lcm|log|ln|exp|sin|cos|tan)(?![a-z]))"
)
_OF_ANGLES = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")


def _parse(text: str) -> list[Any]:
  library = _math_verify()
  text = _TIMES_LEFT_OUT.sub(r" \\cdot ", text)
  if _OF_ANGLES.search(text):
    text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
  return library.parse(
    f"${text}$",
    [library.LatexExtractionConfig()],
    fallback_mode="no_fallback",
    parsing_timeout=None,
  )


# The samples of a group share their reference.
_parse_reference = functools.lru_cache(maxsize=1024)(_parse)


@functools.cache
def _math_verify() -> Any:
  import math_verify

  # It warns about the missing time limit, and logs what it cannot parse.
  for name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  return math_verify

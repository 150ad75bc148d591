r"""The value of an expression in floating point: quick, and only where it is sure.

A parser for what most answers are made of: numbers, letters, `+ - * / ^`, `\frac`,
`\sqrt`, `\pi`, brackets and implied products. Whatever else occurs makes it give up,
and the caller asks SymPy, which takes a hundred times as long. Which decimals stand for
a value that they only come near is said here too.
"""

import fractions
import functools
import math
import random
import re

_TOKEN = re.compile(
  r"\s*(?:(?P<number>\d+(?:\.\d*)?|\.\d+)|\\(?P<command>[A-Za-z]+)"
  r"|(?P<letter>[A-Za-z](?:_[A-Za-z0-9]|_\{\w+\})?)|(?P<mark>[-+*/^(){}\[\]!]))"
)
# `sin x` without its backslash is no product of letters.
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3}")
_FRACTIONS = ("frac", "dfrac", "tfrac", "cfrac")
_PRODUCTS = ("cdot", "times")
_SUM = re.compile(r"[\w)}!]\s*[-+]")
_POINTS = 2
_LARGEST = 1e150
_BRACES = str.maketrans("", "", "{}")  # v_{0} is v_0

# --- What a decimal stands for ---


def is_rounding(
  decimal: fractions.Fraction, other: fractions.Fraction, places: int = 4
) -> bool:
  """Whether it is the other, rounded to so many decimals and digits or more."""
  if abs(decimal - other) > 10**-places:
    return False
  least = 10 ** (places - 1)
  exact = (k for k in range(places, 20) if (decimal * 10**k).denominator == 1)
  unit = fractions.Fraction(1, 10 ** next(exact, 20))
  has_digits = (decimal * least).denominator > 1 and abs(decimal) >= least * unit
  return has_digits and abs(decimal - other) <= unit / 2


def is_cut_off(decimal: fractions.Fraction, exact: float) -> bool:
  """Whether a decimal of three places and five digits or more begins a value.

  >>> [is_cut_off(fractions.Fraction(pi), math.pi) for pi in ("3.1415", "3.141")]
  [True, False]
  """
  if (decimal * 100).denominator == 1 or decimal * exact < 0 or abs(exact) > 1e15:
    return False
  places = next((k for k in range(3, 20) if (decimal * 10**k).denominator == 1), 0)
  digits = int(abs(decimal) * 10**places)
  return digits >= 10**4 and digits == int(abs(exact) * 10**places)


def is_float_noise(one: fractions.Fraction, other: fractions.Fraction) -> bool:
  """Whether they differ as single precision does, or 0.1 + 0.2 from 0.3, or not at all.

  Numbers of six decimals never do, and no double differs in its eighteenth digit.
  """
  if all((each * 10**6).denominator == 1 for each in (one, other)):
    return one == other
  return one == other or abs(other) / 10**17 < abs(one - other) < abs(other) / 10**7


# --- What is left undone ---

_SCIENTIFIC = re.compile(r"\s*(?:\\times|\\cdot|\*)\s*10\s*(?=\^)")
_EXPONENT = re.compile(r"\^\s*\{[^{}]*\}")
_OPERATION = re.compile(
  r"(?<=[\w)}!%\]])\s*(?:[-+]|\\pm\b|(?:\*|\\(?:times|cdot|ast)\b)(?!\s*\\(?:sqrt|pi)))|\d\s*\(|\)\s*[\d(]"
  r"|\^\s*\{[^{}]*\}\s*[\d(]"
)
_DIVISION = re.compile(r"[/:]|\\(?:[dtc]?frac|div|over)(?![a-z])")
# Functions that have a value once their numbers are known, brackets side by side, and a
# division by 1+2i.
_FUNCTION = re.compile(
  r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?(?![A-Za-z])"
  r"|\\(?:log|ln|lg|exp|[dt]?binom|gcd|lcm|max|min|sup|inf|lim|sum|prod|i*int|det|deg"
  r"|[bp]?mod|lceil|lfloor|l?vert)(?![A-Za-z])|\|[^|]*\||[\d)}]\s*!|\)\s*[\d(]"
  r"|\\[dtc]?frac\s*\{(?:[^{}]|\{[^{}]*\})*\}\s*\{[^{}]*(?<![A-Za-z])i(?![A-Za-z])"
  r"|/\s*\(?[-+\d\s]*i(?![A-Za-z])"
)
_VARIABLE = re.compile(r"(?<![A-Za-z\\])(?![ei](?![A-Za-z]))[A-Za-z]")
_LONG_DECIMAL = re.compile(r"\.\d{3}")


def is_undone(expression: str, is_whole: bool) -> bool:
  """Whether it is arithmetic that nobody did: a sum, a product, a quotient.

  The last only where the result is whole. Powers, roots and scientific notation never.

  >>> is_undone("3 + 4", True), is_undone("14/2", True), is_undone("14/3", False)
  (True, True, False)
  """
  expression = _SCIENTIFIC.sub("", expression)
  if _OPERATION.search(expression):
    return True
  return is_whole and bool(_DIVISION.search(_EXPONENT.sub("", expression)))


def is_undone_function(expression: str, result: str) -> bool:
  r"""Whether it leaves a function, where the result is a value that has none.

  A result with a letter in it may have the function inside; one of three decimals may
  be the rounding of it.

  >>> is_undone_function(r"\log_2 8", "3"), is_undone_function(r"\ln 2", "0.693")
  (True, False)
  """
  if not _FUNCTION.search(expression) or _FUNCTION.search(result):
    return False
  return not _VARIABLE.search(result) and not _LONG_DECIMAL.search(result)


class _Unsure(Exception):
  """The expression is not one of those that are read here."""


def compare(first: str, second: str) -> bool | None:
  r"""Whether two expressions have the same value wherever their letters take one.

  Letters stand for fixed random numbers, `e` and `i` for theirs; two expressions that
  agree at two points to 1e-10 are equal, two that differ by more than 1e-6 are not.

  Returns:
    None where one of them cannot be read, has no value there, or it is too close.

  >>> compare(r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"), compare("2x", "x^2")
  (True, False)
  >>> compare(r"\sin x", "x") is None
  True
  """
  # Where nothing cancels, a tiny value is not 0: 1/2^98.
  smallest = 1.0 if _SUM.search(f"{first} {second}") else 1e-300
  gaps = []
  for ours, theirs in zip(values(first), values(second), strict=True):
    if ours is None or theirs is None:
      return None
    gaps.append(abs(ours - theirs) / max(smallest, abs(ours), abs(theirs)))
  if max(gaps) <= 1e-10:
    return True
  return False if max(gaps) > 1e-6 else None


def compare_equations(first: str, second: str) -> bool | None:
  """Whether left minus right of one equation is always a multiple of the other's.

  >>> compare_equations("x - 2y = 3", "4y + 6 = 2x"), compare_equations("x=1", "y=1")
  (True, False)
  >>> compare_equations("x = y = 1", "x = 1") is None
  True
  """
  ratios = []
  sides = [equation.split("=") for equation in (first, second)]
  if not all(len(each) == 2 for each in sides):
    return None
  ours, theirs = (f"({left})-({right})" for left, right in sides)
  for one, other in zip(values(ours), values(theirs), strict=True):
    if one is None or other is None or abs(other) < 1e-6:
      return None
    ratios.append(one / other)
  gap = abs(ratios[0] - ratios[1]) / max(1.0, abs(ratios[0]))
  return (gap < 1e-9 and abs(ratios[0]) > 1e-6) if not 1e-9 <= gap <= 1e-6 else None


@functools.lru_cache(maxsize=4096)
def values(text: str) -> tuple[complex | None, ...]:
  """The value at every point, None where there is none."""
  return tuple(_value(text, point) for point in range(_POINTS))


def _value(text: str, point: int) -> complex | None:
  try:
    parser = _Parser(text, point)
    value = complex(parser.sum())
  except (_Unsure, ArithmeticError, ValueError, RecursionError):
    return None
  is_fit = abs(value.real) < _LARGEST and abs(value.imag) < _LARGEST
  return value if is_fit and parser.at_end() else None


@functools.cache
def _letter(name: str, point: int) -> complex:
  """The number that a letter stands for."""
  if name in ("e", "i"):
    return {"e": math.e, "i": 1j}[name]
  return random.Random(f"{name} {point}").uniform(0.6, 2.4)


class _Parser:
  """Recursive descent; every method reads its part and gives its value."""

  def __init__(self, text: str, point: int):
    self._point, self._place, self._tokens = point, 0, []
    end = 0
    text = text.strip()
    if _WORD.search(text):
      raise _Unsure
    while end < len(text):
      match = _TOKEN.match(text, end)
      if match is None:
        raise _Unsure
      self._tokens.append((match.lastgroup, match[match.lastgroup]))
      end = match.end()

  def at_end(self) -> bool:
    return self._place == len(self._tokens)

  def sum(self) -> complex:
    total = self._product()
    while (sign := self._take("mark", "+", "-")) is not None:
      value = self._product()
      total = total + value if sign == "+" else total - value
    return total

  def _product(self) -> complex:
    value = self._signed()
    divided = False
    while True:
      kind, token = self._next()
      if self._take("mark", "*") or self._take("command", *_PRODUCTS):
        value, divided = value * self._signed(), False
      elif self._take("mark", "/"):
        value, divided = value / self._signed(), True
      elif kind in ("letter", "command") or token in ("(", "{"):
        # What 1/2x means is a matter of taste.
        if divided:
          raise _Unsure
        value = value * self._power()
      else:
        return value

  def _signed(self) -> complex:
    sign = self._take("mark", "+", "-")
    if sign is None:
      return self._power()
    value = self._power()
    return -value if sign == "-" else value

  def _power(self) -> complex:
    base = self._primary()
    while self._take("mark", "!"):
      if not (base == int(base.real) and 0 <= base.real <= 100):
        raise _Unsure
      base = math.factorial(int(base.real))
    if not self._take("mark", "^"):
      return base
    kind, token = self._next()
    if kind == "number" and len(token) > 1:
      raise _Unsure  # LaTeX reads x^10 as x^1 times 0, people do not.
    exponent = self._signed() if token == "-" else self._primary()
    if self._next()[1] == "^":
      raise _Unsure
    return base**exponent

  def _primary(self) -> complex:
    kind, token = self._next()
    self._place += 1
    if kind == "number":
      if self._next()[0] == "number" or self._next()[1] in _FRACTIONS:
        raise _Unsure  # 3\frac12 is a mixed number or a product.
      return float(token)
    if kind == "letter":
      if token in "fgh" and self._next()[1] == "(":
        raise _Unsure  # A function, not a product.
      return _letter(token.translate(_BRACES), self._point)
    if token in ("(", "{"):
      return self._closed(token)
    if kind == "command" and token in _FRACTIONS:
      top = self._argument()
      return top / self._argument()
    if kind == "command" and token == "sqrt":
      root = 2.0
      if self._take("mark", "["):
        root = self._closed("[")
      radicand = self._argument()
      if root != 2.0 and not (radicand.imag == 0 and radicand.real >= 0):
        raise _Unsure  # The real root or the principal one.
      return radicand ** (1 / root)
    if kind == "command" and token == "pi":
      return math.pi
    raise _Unsure

  def _argument(self) -> complex:
    """`{…}`, `\\pi`, or one digit of a run of them: the 1 and the 2 of `\\frac12`."""
    if self._take("mark", "{"):
      return self._closed("{")
    if self._take("command", "pi"):
      return math.pi
    kind, token = self._next()
    if kind != "number" or "." in token:
      raise _Unsure
    self._tokens[self._place : self._place + 1] = [("number", d) for d in token]
    self._place += 1
    return float(token[0])

  def _closed(self, opening: str) -> complex:
    value = self.sum()
    if not self._take("mark", {"(": ")", "{": "}", "[": "]"}[opening]):
      raise _Unsure
    return value

  def _next(self) -> tuple[str | None, str | None]:
    if self._place < len(self._tokens):
      return self._tokens[self._place]
    return None, None

  def _take(self, kind: str, *tokens: str) -> str | None:
    if self._next()[0] == kind and self._next()[1] in tokens:
      self._place += 1
      return self._tokens[self._place - 1][1]
    return None

r"""Exact values of expressions: which two are equal, and which leave work undone.

A recursive-descent parser for the LaTeX of most answers: numbers, letters, `+ - * / ^`,
`\frac`, `\sqrt`, brackets and implied products. A rational value is a `Fraction`,
whatever its size. An irrational one has 60 digits, and two are compared by their
relative difference. SymPy decides about everything else, a hundred times as slowly.
"""

import decimal
import functools
import operator
import random
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

_PLAIN = re.compile(r"[-+]?\s?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,4})?")
_TOKEN = re.compile(
  r"\s*(?:(?P<mixed>\d+\s*\\frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})"
  r"|(?P<number>\d+(?:\.\d*)?|\.\d+)|\\(?P<command>[A-Za-z]+)"
  r"|(?P<letter>[A-Za-z](?:_[A-Za-z0-9]|_\{\w+\})?)|(?P<mark>[-+*/^(){}\[\]]))"
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3}")  # `abs x` is no product of letters.
_CLOSING = {"(": ")", "{": "}", "[": "]"}
_MAX_BITS = 20_000  # of an integer: 6,000 digits
_POINTS = 2
_CONTEXT = decimal.Context(prec=60, Emax=10**9, Emin=-(10**9))
_CONTEXT.traps[decimal.Underflow] = True
# Relative differences of irrational values; SymPy decides about what lies between.
_EQUAL, _DIFFERENT = Decimal("1e-40"), Decimal("1e-30")

Value = Fraction | Decimal


class _Unread(Exception):
  """The expression is not one of those that are parsed here."""


class _Refused(Exception):
  """The expression equals nothing: numbers touch, or one has too many digits."""


class Reading(NamedTuple):
  """The values of an expression, and the operations in it."""

  values: tuple[Value, ...]  # For each choice of the letters; () equals nothing.
  operations: frozenset[str] = frozenset()  # Of sum, product, quotient, power, root.
  has_letters: bool = False


def compare(first: str, second: str) -> bool | None:
  r"""Decides whether two expressions are equal for all values of their letters.

  The letters, and `\pi` and e, take two sets of random rational values of 30 bits. Two
  rational functions that agree at both are the same, but for a chance far below 1e-9.

  Returns:
    None where one cannot be parsed or has no value, or where the digits do not suffice.

  >>> compare(r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"), compare("2x", "x^2")
  (True, False)
  >>> compare("123456789012", "123456789013"), compare("1e-400", "2e-400")
  (False, False)
  """
  ours, theirs = read(first), read(second)
  if ours is None or theirs is None:
    return None
  if not ours.values or not theirs.values:
    return False
  for one, other in zip(ours.values, theirs.values, strict=True):
    num_exact = isinstance(one, Fraction) + isinstance(other, Fraction)
    if num_exact == 2:
      if one != other:
        return False
      continue
    with decimal.localcontext(_CONTEXT):
      one, other = _decimal(one), _decimal(other)
      difference, size = abs(one - other), max(abs(one), abs(other))
      if one and other and difference > size * _DIFFERENT:
        return False
      if num_exact or difference > size * _EQUAL:
        return None  # No number of digits proves a root rational.
  return True


def is_undone(expression: str, result: str) -> bool:
  r"""Whether an expression leaves work undone where the result is a constant.

  Where the result is a plain number, sums and products are undone, and so is a quotient
  that is a whole number; powers, roots and scientific notation are not. Functions are
  always undone: they are not parsed here.

  >>> is_undone("3 + 4", "7"), is_undone("14/2", "7"), is_undone("2^{10}", "1024")
  (True, True, False)
  >>> is_undone(r"\log_2 8", "3"), is_undone(r"\log_2 8", "x")
  (True, False)
  """
  ours, theirs = read(expression), read(result)
  if theirs is None or theirs.has_letters:
    return False
  if ours is None:
    return True
  if len(set(theirs.values)) > 1 or not theirs.operations <= {"quotient"}:
    return False  # Of 2\pi, 3\sqrt{2}
  is_whole = all(value == int(value) for value in ours.values)
  return bool(ours.operations & {"sum", "product", "quotient" if is_whole else ""})


@functools.lru_cache(maxsize=8192)
def read(text: str) -> Reading | None:
  """Evaluates an expression; None where it cannot be parsed here or has no value."""
  text = text.strip()
  if _PLAIN.fullmatch(text):
    return Reading((Fraction(text.replace(" ", "")),) * _POINTS)
  try:
    with decimal.localcontext(_CONTEXT):
      parsers = [_Parser(text, point) for point in range(_POINTS)]
      values = tuple(parser.whole() for parser in parsers)
  except (_Unread, ArithmeticError, RecursionError):
    return None
  except _Refused:
    return Reading(())
  return Reading(values, frozenset(parsers[0].operations), parsers[0].has_letters)


@functools.cache
def value_of_letter(name: str, point: int) -> Fraction:
  """A random value: positive, so that sqrt(x^2) is x. pi and e are letters too."""
  numerator = random.Random(f"{name} {point}").randrange(6 * 10**8, 24 * 10**8)
  return Fraction(numerator, 10**9 + 7)


def _decimal(value: Value) -> Decimal:
  if isinstance(value, Decimal):
    return value
  return Decimal(value.numerator) / Decimal(value.denominator)


def _bits(value: Fraction) -> int:
  return max(value.numerator.bit_length(), value.denominator.bit_length())


def _power(base: Value, exponent: Value) -> Value:
  """A power, exact where base, exponent and result are rational."""
  if isinstance(base, Fraction) and isinstance(exponent, Fraction):
    power, index = exponent.numerator, exponent.denominator
    if index > 1 and base < 0:
      raise _Unread  # The real root, or the principal one?
    root = base if index == 1 else _exact_root(base, index)
    if root is not None and (_bits(root) - 1) * abs(power) > _MAX_BITS:
      raise _Refused
    if root is not None:
      return root**power
  return _decimal(base) ** _decimal(exponent)


def _exact_root(value: Fraction, index: int) -> Fraction | None:
  """The root of a rational number, None where that is irrational or has 60 digits."""
  top, bottom = (
    round(Decimal(each) ** (1 / Decimal(index)))
    for each in (value.numerator, value.denominator)
  )
  return Fraction(top, bottom) if Fraction(top, bottom) ** index == value else None


class _Parser:
  """Recursive descent; each method parses its part and returns the value."""

  def __init__(self, text: str, point: int):
    self.operations, self.has_letters = set(), False
    self._point, self._place, self._tokens = point, 0, []
    if _WORD.search(text):
      raise _Unread
    end = 0
    while end < len(text):
      match = _TOKEN.match(text, end)
      if match is None:
        raise _Unread
      self._tokens.append((match.lastgroup, match[match.lastgroup]))
      end = match.end()
    self._tokens.append((None, None))

  def whole(self) -> Value:
    value = self._sum()
    if self._next()[0]:
      raise _Unread
    return value

  def _sum(self) -> Value:
    total = self._product()
    while sign := self._take("mark", "+", "-"):
      operation = operator.add if sign == "+" else operator.sub
      total = self._apply("sum", operation, total, self._product())
    return total

  def _product(self) -> Value:
    value, divided = self._signed(), False
    while True:
      kind, token = self._next()
      if self._take("mark", "*") or self._take("command", "cdot", "times"):
        following = [token for _, token in self._tokens[self._place :][:2]]
        name = "power" if following == ["10", "^"] else "product"
        value, divided = self._apply(name, operator.mul, value, self._signed()), False
      elif self._take("mark", "/"):
        value = self._apply("quotient", operator.truediv, value, self._signed())
        divided = True
      elif kind in ("letter", "command") or token in ("(", "{"):
        if divided:
          raise _Unread  # 1/2x is x/2 or 1/(2x).
        value = self._apply("product", operator.mul, value, self._powered())
      else:
        return value

  def _signed(self) -> Value:
    sign = self._take("mark", "+", "-")
    value = self._powered()
    return -value if sign == "-" else value

  def _powered(self) -> Value:
    base = self._primary()
    if not self._take("mark", "^"):
      return base
    # x^10 is x^{10}, though LaTeX sets it as x^1 0. 8^{1/3} is a root, no quotient.
    before = set(self.operations)
    exponent = self._signed() if self._next()[1] == "-" else self._primary()
    self.operations = before
    if self._next()[1] == "^":
      raise _Unread
    return self._apply("power", _power, base, exponent)

  def _primary(self) -> Value:
    kind, token = self._next()
    self._place += 1
    if kind in ("number", "mixed"):
      if self._next()[0] in ("number", "mixed"):
        raise _Refused
      if kind == "number":
        return Fraction(token)
      whole, top, bottom = map(int, re.findall(r"\d+", token))
      if top >= bottom:
        raise _Refused
      return whole + Fraction(top, bottom)
    if token in ("(", "{"):
      return self._closed(token)
    if (kind, token) == ("command", "frac"):
      top = self._closed(self._take("mark", "{"))
      bottom = self._closed(self._take("mark", "{"))
      return self._apply("quotient", operator.truediv, top, bottom)
    if (kind, token) == ("command", "sqrt"):
      index = self._closed("[") if self._take("mark", "[") else Fraction(2)
      radicand = self._closed(self._take("mark", "{", "("))
      return self._apply("root", _power, radicand, 1 / index)
    if token == "i" or (token in ("f", "g", "h") and self._next()[1] == "("):
      raise _Unread  # The imaginary unit; a function, not a product.
    if token == "pi" or kind == "letter":
      self.has_letters |= token not in ("pi", "e")
      return value_of_letter(token, self._point)
    raise _Unread

  def _closed(self, opening: str | None) -> Value:
    value = self._sum() if opening else None
    if not opening or not self._take("mark", _CLOSING[opening]):
      raise _Unread
    return value

  def _apply(self, name: str, operation: Callable, left: Value, right: Value) -> Value:
    self.operations.add(name)
    if operation is not _power and type(left) is not type(right):
      left, right = _decimal(left), _decimal(right)
    value = operation(left, right)
    if isinstance(value, Fraction) and _bits(value) > _MAX_BITS:
      raise _Unread if self.has_letters else _Refused
    return value

  def _next(self) -> tuple[str | None, str | None]:
    return self._tokens[self._place]

  def _take(self, kind: str, *tokens: str) -> str | None:
    if self._next()[0] == kind and self._next()[1] in tokens:
      self._place += 1
      return self._tokens[self._place - 1][1]
    return None

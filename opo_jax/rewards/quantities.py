r"""Plain numbers and the units behind them: reading them, and when two are the same.

A number is read as it is written, exactly, and only where it is all of the text; what
it takes to say that a decimal stands for a fraction is in `rewards.numeric`.
"""

import fractions
import re
from typing import NamedTuple

from opo_jax.rewards import numeric
from opo_jax.rewards.spelling import NUMBER_WORDS

_NO_UNIT = re.compile(
  r"\b(?:or|and|minus|plus|times|over|mod|percent|sqrt|dozen|hundred|thousand|million|"
  r"billion|trillion|half|halves|thirds?|tenths|hundredths|thousandths|perhaps|maybe|"
  r"possibly|probably|alternatively|otherwise|else|either|neither|nor|not|but|if|unless|wrong|incorrect|false|never|no|"
  rf"{'|'.join(NUMBER_WORDS)})\b",
  re.IGNORECASE,
)
_UNIT = (
  r"(?:(?:(?:m|cm|mm|km|mi|ft|in)\s*/\s*(?:s|sec|min|h|hr|hour)"
  r"|(?:cm|mm|km|kg|mg|ml|oz|lb|ft|in|mi|yd|hr|sq|[a-z]{3,})\.?)"
  r"(?:\s+[a-z]+\.?){0,3}(?:\s*\^\s*(?:[23]|\{[23]\}))?)"
)
_SI = r"(?-i:(?:[AVWJNKCFT]|Hz|[kM]?Pa|k?eV|k[WVNJ])(?:\s*/\s*(?:s|m|kg|K|C))?)"
_GLUED = (  # "10weeks"
  "(?:second|minute|hour|day|week|month|year|dollar|cent|mile|met(?:er|re)|unit|degree)s?"
  "|feet|inch(?:es)?|mph"
)
_SCIENTIFIC = re.compile(
  r"(-?[\d.]+\s*\\(?:times|cdot)\s*10\s*\^\s*(?:\{-?\d+\}|\d))\s+" + _SI
)
_UNIT_AT_END = re.compile(r"(?<=[\w})])\s+(" + _UNIT + ")$", re.IGNORECASE)


def without_unit(text: str) -> str:
  r"""Takes the unit from an expression with numbers: `12\sqrt{13} feet`."""
  if scientific := _SCIENTIFIC.fullmatch(text):
    return scientific[1]
  match = _UNIT_AT_END.search(text)
  if match is None or not re.search(r"\d", text[: match.start()]):
    return text
  return text if _NO_UNIT.search(match[1]) else text[: match.start()]


DECIMAL = re.compile(r"[-+]?[\d.]+")
DECIMAL_POINT = re.compile(r"-?\d*\.\d+")
DECIMAL_COMMA = re.compile(r"(?<=\d),(?=\d+$)")
_NUMBER = re.compile(
  r"""
  (?P<sign> [-+]? ) \s*
  (?:
    (?P<decimal> (?: [1-9]\d{0,2}(?:,\d{3})+ | \d+ ) (?: \.\d* )? | \.\d+ )
    (?P<exponent> e[-+]?\d{1,3} )?
    | (?P<top> \d+ ) \s* / \s* (?P<bottom> \d+ )
    | (?P<whole> \d+ \s* )?
      \\[dtc]?frac \s* (?: \{\s* (?P<latex_top> -?\d+ ) \s*\} | (?P<top_digit> \d ) )
      \s* (?: \{\s* (?P<latex_bottom> -?\d+ ) \s*\} | (?P<bottom_digit> \d ) )
  )
  \s* (?P<percent> % | percent\b )? \s*
  (?: (?: ° | \^?\s*(?: \\circ | \{\s*\\circ\s*\} ) ) \s* [CF]? )?
  (?: \s+ (?P<unit> UNIT ) | \s+ SI | \s* (?: [ckm]?m | k?g | GLUED )
      (?: \s* \^\s*\{?[23]\}? )? )?
  """.replace("UNIT", _UNIT)
  .replace("GLUED", _GLUED)
  .replace("SI", _SI),
  re.VERBOSE | re.IGNORECASE,
)


class Number(NamedTuple):
  """A number as it was read; of 50% the value is 50."""

  value: fractions.Fraction
  is_percent: bool
  is_fraction: bool  # Written as a fraction, not as a decimal.


def read(text: str) -> Number | None:
  """Reads a plain number, None where the text is not exactly one."""
  match = _NUMBER.fullmatch(text.strip())
  if match is None or _NO_UNIT.search(match["unit"] or ""):
    return None
  if match["decimal"]:
    digits = match["decimal"].replace(",", "") + (match["exponent"] or "")
    value = fractions.Fraction(digits)
  else:
    top = int(match["top"] or match["latex_top"] or match["top_digit"])
    bottom = int(match["bottom"] or match["latex_bottom"] or match["bottom_digit"])
    if bottom == 0 or (match["whole"] and top >= bottom):
      return None  # 0\\frac{42}{1} is no mixed number.
    value = int(match["whole"] or 0) + fractions.Fraction(top, bottom)
  if match["sign"] == "-":
    value = -value
  is_fraction = not match["decimal"] and (top != 0 or not match["whole"])
  return Number(value, bool(match["percent"]), is_fraction)  # 4 0/9 is just 4.


def plain(text: str) -> str:
  """A number without its separators, degrees and units; any other text as it is."""
  number = read(text)
  if number is None or number.is_percent:
    return text
  return f"{number.value.numerator}/{number.value.denominator}"


def same_number(value: Number, target: Number) -> bool:
  """Whether they are equal, percent as its share too, or one is the other rounded."""
  is_whole = target.value.denominator == 1 and not target.is_percent
  if is_whole and value.is_fraction and not target.is_fraction:
    return False  # 14/2 is a division left undone.
  pairs = [(value.value, target.value)]
  if value.is_percent and not target.is_percent:
    pairs.append((value.value / 100, target.value))
  if target.is_percent and not value.is_percent:
    pairs.append((value.value, target.value / 100))
  tolerance = 0
  if value.is_fraction != target.is_fraction:
    tolerance = fractions.Fraction(5, 10**7)  # 0.333333 is one third.
  may_be_noise = not (value.is_fraction and target.is_fraction)
  return any(
    abs(ours - theirs) <= tolerance
    or (may_be_noise and numeric.is_float_noise(ours, theirs))
    or (not value.is_fraction and numeric.is_rounding(ours, theirs))
    or (not target.is_fraction and numeric.is_rounding(theirs, ours))
    for ours, theirs in pairs
  )


def rounds_to(prediction: str, target: Number | None) -> bool:
  r"""Whether an exact value is what the reference rounds: `40\pi` for 125.663."""
  if target is None or target.is_percent or target.is_fraction:
    return False
  value, *others = numeric.values(prediction)
  if value is None or value.imag or any(other != value for other in others):
    return False
  exact = fractions.Fraction(value.real)
  is_rounding = numeric.is_rounding(target.value, exact, places=3)
  return is_rounding or numeric.is_cut_off(target.value, value.real)

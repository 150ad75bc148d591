r"""One notation for an answer: what does not change its value is removed.

No value is computed here; that is the work of `rewards.math_verifier`.
"""

import functools
import re

_PLAIN = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*")
_DELIMITERS = [("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")]
_DELIMITERS += [(r"\boxed{", "}"), (r"\fbox{", "}")]
_SIGNS = (
  "\u2212\u2013\u00f7\u00d7\u00b7\u00b1\u221a\u03c0\u221e\u2264\u2265\u2260"
  "\u222a\u2208\u00b0\u00b2\u00b3"
)
_COMMANDS = r"- - / \times \cdot \pm \sqrt \pi \infty \le \ge \ne \cup \in ^\circ ^2 ^3"
_SIGNS = {s: f"{c} " for s, c in zip(_SIGNS, _COMMANDS.split(), strict=True)}
_SIGNS = str.maketrans(_SIGNS | dict.fromkeys("\x00\u20ac\u00a3\u00a5", " "))
_TEXT = r"\\(?:text\w*|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
# Words that make a number another number, or that hedge or deny it.
HEDGE = re.compile(
  r"\d|\b(?:or|and|but|if|else|unless|otherwise|maybe|perhaps|possibly|probably|either"
  r"|neither|nor|not|no|never|wrong|incorrect|false|minus|plus|times|over|mod|point"
  r"|dozen|hundred|thousand|[mbt]rillion|million|billion|half|halves|thirds?|\w+ths"
  r"|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b",
  re.IGNORECASE,
)
# `12\text{ cm}^2`, `18 dollars`, `3 m/s`; a letter is a unit only in \text: 5s is 5*s.
_UNIT_WORD = r"(?:(?<=\s)(?:[A-Za-z]{3,}|m|g|ft|in|mi|yd|lb|oz|hr|sq)|[ckm]m|kg|ml)\b"
_UNIT = re.compile(
  r"(?:(?<=[\d)}%])|(?<=\\pi))(?:\s|\\[,;: ]|~)*"
  rf"(?:{_TEXT}|({_UNIT_WORD}[A-Za-z ./]*))"
  r"(?:\s*\^\s*\{?[23]\}?)?\s*\.?$"
)
_REWRITES = [
  (_TEXT, r" \1 "),
  (r"(?<=\d)\s*(?:,\s*\\!|\{,\}|\\,|~)\s*(?=\d{3}(?!\d))", ","),  # 1{,}234
  (r"(?<!\\)\\[,;:!> ]|~", " "),
  (r"\\(?:m?left|m?right|displaystyle|q?quad|thinspace)(?![a-z])\.?", " "),
  (r"\\?\$|\\hfill?(?![a-z])", " "),
  (r"\\[dtc]frac(?![a-z])", r"\\frac"),
  (r"(?<![\\A-Za-z])(sqrt|frac|pi|sin|cos|tan|ln|log|exp|infty)(?![a-z])", r"\\\1"),
  (r"\\sqrt\s*(\d+|[A-Za-z]|\\pi)", r"\\sqrt{\1}"),
  (r"(\\frac|\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
  (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
  (r"(?<![\d./])(\d+) (\d+) ?/ ?(\d+)", r"\1\\frac{\2}{\3}"),
  (r"\^\s*\(([^()]*)\)", r"^{\1}"),
  (r"(?<=[\d}])\s*\^?\s*(?:\\circ|\{\s*\\circ\s*\})(?![a-z])(?: ?[CF]\b)?", ""),
  (r"\\?%|(?<=\d) ?percent\b", "%"),
  (r"\\(?:leq(?:slant|q)?|le)(?![a-z])|<=", r"\\le "),
  (r"\\(?:geq(?:slant|q)?|ge)(?![a-z])|>=", r"\\ge "),
  (r"\\lt(?![a-z])", "<"),
  (r"\\gt(?![a-z])", ">"),
  (r"\\(?:mathbb|Bbb)\s*\{?R\}?", r"(-\\infty,\\infty)"),
  (r"\\varnothing(?![a-z])|\\\{\s*\\\}", r"\\emptyset"),
  (r"(?<=\w_)\{(\w)\}", r"\1"),
  (r"\+ ?\\infty", r"\\infty"),
  (r";", ", "),
]
_REWRITES = [(re.compile(pattern), new) for pattern, new in _REWRITES]
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{\w+\*?\}|\\[A-Za-z]+")


@functools.lru_cache(maxsize=4096)
def normalize(text: str) -> str:
  r"""Removes delimiters, units, currency and spacing, and rewrites synonyms.

  >>> normalize(r"$ \dfrac12 \text{ cm} $."), normalize("$18.00")
  ('\\frac{1}{2}', '18.00')
  """
  if number := _PLAIN.fullmatch(text):
    return number[1]  # Most answers, in a tenth of the time.
  if not text.isascii() or "\x00" in text:
    text = text.translate(_SIGNS)
  text = _without_unit(_unwrapped(text))
  for pattern, new in _REWRITES:
    text = pattern.sub(new, text)
  return _unwrapped(" ".join(text.split()))


def _unwrapped(text: str) -> str:
  """Removes the delimiters around all of the text, and punctuation behind it."""
  before = None
  while before != text:
    before = text
    text = text.strip(" \n\t`")
    if not text.endswith(".."):
      text = text.rstrip(" \n\t.,;:\\")
    for opening, closing in _DELIMITERS:
      if text.startswith(opening) and text[len(opening) :].endswith(closing):
        text = text[len(opening) : -len(closing)]
  return text


def _without_unit(text: str) -> str:
  r"""Removes the unit behind a number: `12\text{ cm}^2`, "18 dollars"."""
  unit = _UNIT.search(text)
  if unit is None or ":" in text or HEDGE.search(unit[1] or unit[2] or ""):
    return text
  return text[: unit.start()]


def canonical(text: str) -> str:
  """Returns the form in which the same words or symbols are the same string."""
  if re.fullmatch(r"\(\s*[A-Za-z]\s*\)", text):
    text = text.strip("() ")  # (C) is C.
  if has_words(text):
    return text.casefold()
  return re.sub(r"(?<!\d) +| +(?!\d)", "", text)  # "3 4" stays two numbers.


def has_words(text: str) -> bool:
  """Whether a text holds words: these are equal to the same words only."""
  return bool(_WORD.search(_ENVIRONMENT.sub(" ", text)))

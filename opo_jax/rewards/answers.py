r"""Which answer of a response is its final one: boxes, marks, and the last line.

Repetitions in the patterns are bounded wherever a search could start again inside of
them: no text of a megabyte takes quadratic time.
"""

import itertools
import re

from opo_jax.rewards import numeric

_BOX = re.compile(r"\\(?:boxed|fbox|box(?![a-z]))\s{0,4}(?:\{|([^\s{}$\\]+))")
# "boxed{7}", and what "\boxed{7}" is without r"". It has the group of _BOX.
_BARE_BOX = re.compile(r"(?:\bboxed|\x08oxed)\s{0,4}(?:\{|()(?!))")
_BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.DOTALL)
_CHAT_TOKEN = re.compile(
  r"<\|\w{1,40}\|>(?:user|assistant|system)?|</s>|<eos>|<end[ _]of[ _]\w{1,20}>"
)
# What a response says of itself behind its answer.
_CERTAINTY = re.compile(
  r"\b(?:certainty|confidence)(?:\slevel)?\s?[:=]\s?\d{1,3}(?:\.\d{1,9})?\s?%?\s{0,9}\Z",
  re.IGNORECASE,
)
_CALCULATOR = re.compile(r"<<[^<>]{0,100}>>")  # GSM8K's "2+1=<<2+1=3>>3"
_PHRASE = r"""
  >? [ \t]{0,4} (?: to\b [^.:\n]{0,80}? )?
  (?: \*{0,2} \s{0,4} (?: \bis\b | \bare\b | [:=\uff1a\u662f\u4e3a] )
      \s{0,4} :? \*{0,2} \s{0,20} \}?
    | (?= \$ | \\\( | \\\[ ) )
  (?= (?P<phrase>
    \$\$ .{1,500}? \$\$ | \\\[ .{1,500}? \\\] | [^\n]{1,1000}
  ) )
"""
_MARKED = re.compile(
  r"""
  (?<!\#) \#{4} (?!\#) (?= [^\n]{0,200}? [\d\\] ) :? (?P<hashes> [^\n]* )
  | <answer> (?P<tagged> [^<]{1,500} ) </answer>
  | \banswer\b PHRASE
  """.replace("PHRASE", _PHRASE),
  re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
# Looked for only where there is no other mark: it takes three times as long.
_MARKED_ABROAD = re.compile(
  r"""
  (?P<hashes> (?!) ) | (?P<tagged> (?!) )
  | (?: \b (?: r[e\u00e9]ponse | antwort | respuesta | risposta | resposta
            | \u043e\u0442\u0432\u0435\u0442 | \uc815\ub2f5 | \ub2f5 ) \b
      | \u7b54\u6848 | \u7b54\u3048 ) PHRASE
  """.replace("PHRASE", _PHRASE),
  re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
# "The answer is 42!" is no factorial: that stands in a formula.
_SENTENCE_END = re.compile(r"[.;?!](?=\s)|(?<=\d)!$|</answer>|\u3002")
_OTHER = re.compile(r"\b(?:or|maybe|perhaps|possibly|alternatively)\b", re.IGNORECASE)
_OTHER_WORD = (
  "(?:or|maybe|perhaps|possibly|alternatively|otherwise|else|if not"
  "|(?:could|might|may)(?: also)? (?:be|equal))"
)
_ONLY_OTHERS = re.compile(
  rf"\W*{_OTHER_WORD}\b\W*(?:(?:{_OTHER_WORD}|it|is|also)\b\W*)*", re.IGNORECASE
)
# "or 4", "(or maybe $4$)", ". Alternatively, it is 4", "or Tuesday" at the end of a
# sentence; not "or else we would".
_OTHER_FOLLOWS = re.compile(
  rf"[\W_]{{0,12}}(?:\\text\s?{{\s?)?\b(?:it\s|the answer\s)?{_OTHER_WORD}\b(?P<other>"
  rf"(?:[\s,:$({{}}]{{1,4}}(?:(?:{_OTHER_WORD}|it|is|also|the|final|answer)\b[\s,:$({{]{{1,4}}"
  r"|\\(?:\(|text\s?\{\s?)){0,8})(?:(?:[-\d\\]|(?-i:[A-E]\b)"
  r"|(?:one|two|three|four|five|six|seven|eight|nine|ten|twelve)\b)[^.;\n]{0,80}"
  r"|(?<=\$)\w[^$\n]{0,40}\$(?=[)*]{0,3}(?:[.,;!?]|\s*(?:\n|$)))))",
  re.IGNORECASE,
)
# "or five", "or Tuesday", where it ends the sentence.
_WORD_FOLLOWS = re.compile(
  r"[\s$)*},(]{1,6}(?:or|maybe|perhaps|possibly)\b(?P<other>[\s,$(*]{1,4}"
  r"(?:\w{1,20}[$)}*]{0,3}[ ]?){1,3}(?=[.;!?](?:\s|$)|\n|$))",
  re.IGNORECASE,
)
# "; 4", ". 4." and "! B": a further value where a sentence could be.
_VALUE_FOLLOWS = re.compile(
  r"[$)*}]{0,3}[.;!][ \t]{1,4}"
  r"(?P<other>[$(*]{0,3}(?:-?\d[\d.,/]{0,20}|[A-E]\b)[$)*]{0,3}"
  r"(?=[.;!?]|[ \t]*(?:\n|$)))"
)
# ", 5" and "and $5$" after a box.
_LIST_FOLLOWS = re.compile(
  r"[\s$)*}]{0,6}(?:\\[)\]])?[ \t]{0,3}(?:,|;|/|\||&|\band\b|,\s?and\b)[ \t]{0,3}"
  r"(?P<other>\$[^$=\n]{1,40}\$|-?\d[\d.,/]{0,20}(?<![,.]))"
  r"(?=[$)*]{0,3}(?:[.,;!?](?:\s|$)|[ \t]*(?:\n|$)))"
)
# "It is not \\boxed{4}", "-\\boxed{4}", "3\\boxed{4}".
_UNDER_DENIAL = re.compile(
  r"(?:\b(?:not|never|nor|cannot|neither|wrong|incorrect)|n['\u2019]t|\\neq?)\s"
  r"(?:(?:be|equal|to|is|the|answer)\s){0,4}(?:[$\s(*:]|\\[(\[]){0,4}$|(?:^|[\s$=(])[-\u2212]$|\d\Z",
  re.IGNORECASE,
)
_IS_WRONG = re.compile(
  r"(?:[$)*\s]|\\[)\]]){0,6}\s(?:is|was) (?:wrong|incorrect|not)\b"
)
_NO_ANSWER = re.compile(
  r"(?:(?:\b(?:not|never|ignore)|n['\u2019]t)\s(?:(?:a|an|any|the|my|your|this|following"
  r"|final|correct|right|be|use|think|believe|say|sure|that)\s){0,5}"
  r"|\b(?:wrong|incorrect|invalid|false|fake|previous|old|rejected|tentative|non-final)"
  r"\s(?:final\s)?|^(?:an? )?(?:example|sample|candidate)\s"
  r"|(?:\u9519\u8bef|\u4e0d\u662f)(?:\u7684|\u6700\u7ec8|\u6b63\u786e){0,2})$",
  re.IGNORECASE,
)
_MAX_SENTENCE = 1000
# The minus, and the commas of texts in other scripts.
_TYPED = str.maketrans(
  {
    "\u2212": "-",
    "\u2013": "-",
    "\u00f7": "/",
    "\uff0c": ", ",
    "\u3001": ", ",
    "\u6216": " or ",
  }
)


def final_answer(response: str) -> str | None:
  r"""The final answer of a response, by the first rule that applies.

  Only what follows the last `</think>` counts, where there is one.

    1. The last `\boxed{…}` that is not empty, unless a "final answer is N" follows that
       states a value: then that. Boxes in a row, or with nothing but a
       comma, "and", "or", a hedge ("maybe") or a sign ("/", "+") between them, are one
       answer, a list. A box that is never closed (a truncated response) is passed over,
       unless it goes on with a list or takes the box before it back.
    2. The last of the marked answers: `#### N` up to the end of the line, "answer is
       N" or "answer: N" up to the end of the line or sentence, `<answer>N</answer>`;
       not one that is denied ("wrong answer: N").
    3. The last line that is more than "$$" or "---", if it asks for nothing.

  An alternative right after 1 or 2 belongs to the answer: "`\boxed{3}` or 4" and "The
  answer is 3. Or maybe 4." are "3 or 4", "`\boxed{4}`, 5" and "Answer: 4; 5" are lists.
  A box that is denied ("not `\boxed{4}`") or has a minus or a digit right before it is
  no answer. What 2 and 3 give can be a sentence; see `stated`.

  Returns:
    The answer as it is written; None where a box is not closed and no other counts.

  >>> final_answer(r"First \boxed{3}. No: \boxed{4} or \boxed{5}.")
  '4, 5'
  """
  response = _CHAT_TOKEN.sub("", response.rpartition("</think>")[2])
  response = _CALCULATOR.sub("", response).replace("\u25a1{", r"\boxed{")
  if tail := _CERTAINTY.search(response, max(0, len(response) - 60)):
    response = response[: tail.start()]
  response = response.rstrip()
  if "oxed" in response or r"\fbox" in response or r"\box" in response:
    found, start, end = _last_boxed(response)
    before = response[max(0, start - 40) : start]
    if found and (_UNDER_DENIAL.search(before) or _IS_WRONG.match(response, end)):
      return ""
    if found:
      other = _other_after(response, end, _LIST_FOLLOWS)
      return found + other if other else _final_after(response, end) or found
    if found is None:
      return None
  marks = [*_MARKED.finditer(response)] or [*_MARKED_ABROAD.finditer(response)]
  if not marks:
    return _last_line(response)
  *earlier, marked = [None, *(mark for mark in marks if not _is_denied(mark))]
  if marked is None:
    return ""
  if marked["hashes"]:
    return marked["hashes"] + _other_after(response, marked.end())
  if marked["tagged"]:
    one = earlier[-1] if earlier[-1] and earlier[-1]["tagged"] else None
    if one and _is_list_link(response, one.end(), marked.start()):
      return f"{one['tagged']}, {marked['tagged']}"
    return marked["tagged"] + _other_after(response, marked.end(), _LIST_FOLLOWS)
  before = response[max(0, marked.start() - 40) : marked.start()]
  if _OTHER.search(_SENTENCE_END.split(before)[-1]):
    return ""  # Of "3, or the answer is 4" neither.
  phrase = _SENTENCE_END.split(marked["phrase"], maxsplit=1)[0]
  end = marked.start("phrase") + len(phrase)
  if response.startswith("?", end):
    return ""
  if phrase.count("**") % 2:
    phrase = f"**{phrase}"  # Of "Answer: **3** 4" the mark has taken two stars.
  return phrase + _other_after(response, end, _VALUE_FOLLOWS)


def _is_denied(mark: re.Match) -> bool:
  """Whether it is "not the answer: 3" or a "wrong answer: 3"."""
  before = mark.string[max(0, mark.start() - 60) : mark.start()].rpartition("\n")[2]
  return bool(mark["phrase"] and _NO_ANSWER.search(before.rstrip("*")))


def _final_after(text: str, end: int) -> str:
  """What a "final answer is" after the last box begins with, "" if with no value."""
  mark = None
  for match in _MARKED.finditer(text, end):
    if text[max(0, match.start() - 6) : match.start()].casefold() == "final ":
      mark = match
  # With what stands before the mark: of "or the final answer is 3" nothing counts.
  answer = mark and final_answer(text[max(end, mark.start() - 40) :])
  value = stated(answer) if answer else ""
  # Of "the final answer is positive, as 2 of them are" not the 2.
  return answer if value and answer.find(value) < 5 else ""


def _other_after(text: str, end: int, *patterns: re.Pattern) -> str:
  """ " or 4" where the text goes on with an alternative, else nothing."""
  for pattern in (_OTHER_FOLLOWS, _WORD_FOLLOWS, *patterns):
    if match := pattern.match(text, end):
      link = "," if pattern in patterns else " or"
      return f"{link} {match['other'].lstrip(' ,')}"
  return ""


def _last_line(response: str) -> str:
  tail = _ALIGNED.sub(_last_side, response[-2 * _MAX_SENTENCE :])
  lines = [each for each in tail.split("\n") if each.strip()]
  while lines and _FRAME.fullmatch(lines[-1]):
    if _LETTERS.search(lines.pop()) and "=" not in "".join(lines[-1:]):
      return ""
  if not lines or "?" in lines[-1]:
    return ""
  if len(lines) > 1 and _OPTION.match(lines[-1]) and _OPTION.match(lines[-2]):
    return ""  # The choices of a question.
  above = _DISPLAYED.sub("", tail).rstrip().rpartition("\n")[2]
  if re.search(r"\b(?:not|never)\W*$", above):
    return ""
  for line in (lines[-1], above):
    sentence = _SENTENCE_END.split(line.rstrip(" .;!:"))[-1]
    is_done = _NARRATED.match(sentence) and _worked_out(sentence)
    if _TASK.match(sentence) and not is_done:
      return ""
  return lines[-1]


def _last_side(aligned: re.Match) -> str:
  """What a derivation in an `align` ends with, as a formula; a system stays."""
  *rows, last = aligned["rows"].rstrip(" \n\\").split(r"\\")
  left, _, right = last.rpartition("=")
  return aligned[0] if rows and left.strip(" &\n") else f"${right.strip(' &.')}$"


# --- What a sentence states ---

_VALUE = r"[-+]?[$€£]?(?:\d+(?:,\d+)*(?:\.\d+)?(?:e[-+]?\d+)?|\.\d+)(?:\s?[%€]|\$)?"
_SIGN = r"[-+*/<>\u2264\u2265\u00d7]"
_ARGUMENT = r"(?:\{(?:[^{}]|\{[^{}]{0,80}\}){1,80}\}|\d)"
_CANDIDATE = re.compile(
  rf"""
  \$\$? (?P<dollars> (?: (?! [a-z]{{2,}}\s[a-z] ) [^$] ){{1,500}}? ) \$\$? (?!\d)
  | \\\( (?P<inline> .{{1,500}}? ) \\\) | \\\[ (?P<display> .{{1,500}}? ) \\\]
  | \x02 (?P<bold> [^\x03]* ) \x03
  | (?<![\w)}}\]]) (?P<latex>
      -? \d* (?: \\[dtc]?frac {_ARGUMENT}{{2}} | \\sqrt {_ARGUMENT} )
      (?! \s?(?: [-+*/^\\] | [A-Za-z]\b ) | \w ) )
  | (?P<tuple> (?<!\w) [(\[] \s? {_VALUE} (?: ,\s? {_VALUE} ){{1,9}} \s? [)\]] )
  | (?P<choice> (?<!\w) \([A-E]\) )
  | (?P<number>
      (?<! [\w.,^\\)}}{{] ) (?<! {_SIGN} ) (?<! {_SIGN}\s )
      {_VALUE} (?: \s\d+/\d+ | (?: \s?[-+*/\u00d7]\s? | : ) {_VALUE} ){{0,20}}
      [A-Za-z]{{0,12}} [\u00b2\u00b3]?
      (?! [\w(\[{{}}\\^!] | [.,:]\d | \s?[-+*/^\u00d7]\s?[\d\\(] | \s?[<>\u2264\u2265] )
      (?: \s (?: percent | dozen | hundred | thousand | [mbt]r?illion | hal(?:f|ves)
          | thirds? | tenths | hundredths | thousandths ) \b )? )
  """,
  re.VERBOSE | re.ASCII,
)
_LETTERS = re.compile("[a-z]{2}")
# "$$", "---" and "Thus"
_FRAME = re.compile(
  r"[\s$*_=~`>|.-]*|\s*\\[\])]\s*"
  r"|\W*(?:thus|so|therefore|hence)\W*",
  re.IGNORECASE,
)
_ALIGNED = re.compile(
  r"\\begin\{(?P<name>align(?:ed)?|eqnarray|equation|gather)\*?\}"
  r"(?P<rows>(?:(?!\\begin).){1,1500}?=(?:(?!\\begin).){1,400}?)\\end\{(?P=name)\*?\}",
  re.DOTALL,
)
# Displays and choices, which end a task as they end a solution.
_DISPLAYED = re.compile(
  r"(?:\s*(?:\$\$(?:(?!\$\$).){1,800}\$\$|\\\[(?:(?!\\\]).){1,800}\\\]|\n\$[^$\n]{1,200}\$"
  r"|\n\(?[A-Ea-e][.)]\s[^\n]{0,200})[.,;\s]{0,9})+$",
  re.DOTALL,
)
_OPTION = re.compile(r"\s*\(?[A-Ea-e][.)]\s")
# A relation or an operation between values: "3 \\approx 4".
_COMMAND = re.compile(
  r"\\(?!(?:text\w*|mbox|mathrm|q?quad|therefore|left|right|item|hline)\b)[A-Za-z]+"
)
# What a number can follow as a conclusion: of "3 + 4 = 7 and so 7 remain" the last 7.
_LINK = re.compile(
  r"(?<![<>!])[=:\uff1a]|(?<!\bto )\b(?:is|are|was|were|be|equals?|giv(?:es?|ing)|gets?"
  r"|got|mak(?:es?|ing)|made|leav(?:es|ing)|yield(?:s|ing)|total|so|then|finally"
  r"|therefore|thus|hence|final|ultimately)\b|\bit's\b|\u662f|\u7b49\u4e8e",
  re.IGNORECASE,
)
_HEDGE = re.compile(
  r"\b(?:or|either|neither|maybe|perhaps|possibly|alternatively|otherwise|else|between"
  r"|whether|if|unless|versus|vs|(?:and|but|might|may|could)\s+also"
  r"|(?:might|may|could)\s+(?:be|have|equal)(?=\W+\d))\b|\?",
  re.IGNORECASE,
)
_IF = re.compile(r"\bif\b", re.IGNORECASE)
_CASES = re.compile(r"\b(?:odd|even|when|case|else|not)\b|=.*\bif\b", re.IGNORECASE)
_DENIAL = re.compile(
  r"\b(?:not|never|nor|cannot|wrong|incorrect|false|instead of|rather than)\b"
  r"|n['\u2019]t\b|[\u2260\u00b1\u00ac\u226e\u226f]",
  re.IGNORECASE,
)
# "It is 3 or 4 at first, so in the end 5" states 5.
_CONCLUSION = re.compile(
  r",\s(?:so|thus|hence|therefore)\b(?=[^?]*[\d$\\])(?!.*\b(?:might|may|could|also|too)\b)"
)
# "60 miles - 35 miles = 25", with no other "=" behind it.
_EQUATION = re.compile(
  rf"""
  (?<! [\w.=+*/^\\-] ) (?<! [-+*/=] \s )
  (?P<left> \(? {_VALUE} (?: \s [a-z]{{1,15}} ){{0,3}}
    (?: \s? [-+*/x\u00d7] \s? \(? {_VALUE} \)?
        (?: \s [a-z]{{1,15}} ){{0,3}} ){{1,9}} )
  \s?=\s? (?P<right> {_VALUE} ) (?! [\w.,]*\d | \s?[-+*/=^\u00d7] ) (?! .*= )
  """,
  re.VERBOSE,
)
# What may follow: "people in 2 cars", nothing that counts on or judges.
_REST = re.compile(
  r"(?!\s\d)(?:\s(?!(?:which|so|and|but|is|isn|are|was|were|be|would|could|can|cannot|do"
  r"|does|did|doesn|didn|no|not|leav\w+|when|if|as|case|wrong|minus|plus|times|mod|squared"
  r"|cubed|more|less|dozen|hundred\w*|thousand\w*|[mbt]r?illion\w*|half|percent)\b)"
  r"[^\s,;:=]{1,40}){0,40}[\s.!]*",
  re.IGNORECASE,
)
_NO_LEAD = re.compile(
  r"\b(?:because|since|as|with|from|given|when|case|root|half|third|quarter|than|squared)"
  r"\b|[<>]\s?$",
  re.IGNORECASE,
)
# 2 dozen x 3, 1 hour - 20 minutes
_SCALED = re.compile(
  r"\b(?:dozen|hundreds?|thousands?|[mbt]r?illions?|squared|cubed)\b"
  r"|(?=.*[-+\u2013]).*\b(?:second|minute|hour|day|week|month|year)"
)
_TIMES = re.compile(r"(?<=[\d) ])[x\u00d7](?=[\s\d(])")
_NOT_ARITHMETIC = re.compile(r"[^-+*/().\d]")
_WHEN = re.compile(
  r"\b(?:in|after|within|over|during)\s"
  r"(?:(?:the|a|first|next|last|another)\s){0,2}$",
  re.IGNORECASE,
)
_TIME = re.compile(r"[\s-](?:second|minute|hour|day|week|month|year|decade)s?\b")
_REASON = re.compile(
  r"[,;]?\s(?:because|since)\s|\s\((?:because|since|from|as|out of)\s", re.IGNORECASE
)
# A problem repeated is no answer to it.
_TASK = re.compile(
  r"(?:\W{0,9}(?:(?:please|now|then|thus|so|hence|therefore|and|[a-z]{3,12}ly)\b\W{0,3}"
  r"){0,2}|.*,\s(?=find|compute|calculate|determine|evaluate|express|simplify|how|what))"
  r"(?:add|answer(?=\s+[a-z])|approximate|assume|calculate|choose|classify|complete|compute|consider"
  r"|convert|decide|describe|determine|divide|draw|enter|estimate|evaluate|expand"
  r"|explain|express|factor|find|(?:for|in|to) (?:what|which)|give|graph|how|identify"
  r"|if|let|list|multiply|name|note|order|prove|rationalize|recall|reduce|remember"
  r"|rewrite|round|select|show|simplify|solve|specify|state|subtract|suppose|use|verify"
  r"|what|where|who|whose|why|write|you)\b",
  re.IGNORECASE,
)
# Steps that are told, not set.
_NARRATED = re.compile(
  r"\W{0,9}(?:(?:now|then|thus|so|first|next|and)\b\W{1,3}){0,2}"
  r"(?:add|subtract|multiply|divide|if)\b",
  re.IGNORECASE,
)
# "A because B is wrong", "D, it cannot be B", "for sure D".
_LETTER = re.compile(
  r"\W{0,4}(?:(?:for sure|definitely|clearly|certainly|[Oo]ption|[Cc]hoice)\s)?"
  r"\(?(?:([A-E])\b\)?(?=[,.;]\s)|([A-Ea-e])\b\)?(?=\s(?:because|since)\b|$"
  r"|\sis\s(?:correct|right|the\s(?:correct\s|right\s)?(?:answer|choice|option))\b))"
)
_LETTER_AT_END = re.compile(
  r"\b(?:is|it's|be|choose|pick|select|answer|go with|settle on|finali[sz]e)"
  r"(?: option| choice)? \(?([A-Ea-e])\)?$|(?:(?<=[a-z]{3}[,;])|\bso) ([A-E])$"
)
_LETTER_CHOSEN = re.compile(
  r"\b(?:choose|pick|select) (?:option |choice )?\(?([A-E])\b\)?"
)
_NOT_LETTER = re.compile(
  r"(?:\bnot|n't be|\bcannot be) \(?[A-E]\b"
  r"|\b[A-E](?: and [A-E])? (?:is|are) (?:wrong|incorrect)\b"
)
_REFUSAL = re.compile(
  rf"{_DENIAL.pattern}|\b(?:reject|eliminate|exclude|except|rule|avoid|refuse|\w+ly)\b"
  r"|\b[b-e]$",
  re.IGNORECASE,
)
_OTHER_LETTER = re.compile(
  rf"(?-i:\b[A-E]\b(?!'))|\b(?:might|may|could)\b|{_HEDGE.pattern}", re.IGNORECASE
)
_MINUS = re.compile(r"(?:^|(?<=\bis ))(?:minus|negative) (?=\d)")
# "not 3 but", "3 is wrong and"
_NOT_BUT = re.compile(
  r"\bnot \S{1,20} (?:but|rather)(?: it is)? "
  r"|(?<!\S)\S{1,20} is (?:wrong|incorrect|not (?:right|correct))"
  r"(?:,? (?:and|but)|[,;]) (?!.*\b(?:too|also|likewise|as well|so is)\b)"
)
_SCALE = (
  "(?:hundred|thousand|[mbt]r?illion|dozen|half|halves|thirds|quarters|percent|zero|one"
  "|minus|point|and|times|more|less|below|squared|cubed)"
)
_COPULA = "(?:is|are|was|were|has|have|had)"
_REST_OF_WORDS = rf"(?:\s(?!{_SCALE}\b)[a-z]+){{0,2}}\W*$"
_NUMBER_WORD = re.compile(
  r"\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|\w+ty)\b",
  re.IGNORECASE,
)
_YES_OR_NO = re.compile(r"\W{0,4}(?:(yes|true)|no|false)\b[,.;:]", re.IGNORECASE)
_YES = re.compile(r"\b(?:yes|true)\b", re.IGNORECASE)
_NO = re.compile(r"\b(?:no|false)\b", re.IGNORECASE)
_OF = re.compile(r"\d+/\d+ of ")
_BOLD = re.compile(r"(?:(?<![A-Za-z0-9)])|(?<=[a-z][a-z]))\*\*\*?([^*\n]{1,100})\*\*")
_AND = re.compile(r"\s*(?:,|,?\s*(?:\band\b|&))\s*(?:[A-Za-z]\s?=\s?)?")


def stated(text: str) -> str:
  r"""The value that a text in words states, "" if it states none.

  Of its last sentence with a number, a formula or an "(A)" in it, what follows the last
  "is", "=", ":", "so" and the like: there has to be exactly one value (or one list, or
  one in bold). A sum that is true states its result, if nothing behind it counts on;
  when or how long ("after 12 months") is an aside. Nothing is stated by a task
  ("Compute 3"), by a sentence that has alternatives in it ("or", "maybe", "if" but for
  the one premise of a true sum), nor by a value that is denied ("not 3").
  Where the text has no value, it is the choice that it begins or ends with, if it names
  no other but to deny it, the "yes" or "no" that it begins with, its only number in
  words, or what the last "is" is followed by: a word.

  >>> stated("The 3 cats weigh 4 kg, so it is 12 kg. I hope this helps.")
  '12'
  >>> stated("It is 3 for cats and 4 for dogs."), stated("It is 3 or 4.")
  ('', '')
  """
  text = _NOT_BUT.sub("", text[-_MAX_SENTENCE:].translate(_TYPED))
  text = _MINUS.sub("-", text)
  if letter := _letter(text):
    return letter
  text = _BOLD.sub(_mark_bold, text)
  sentences = [each for each in _SENTENCE_END.split(text) if each.strip()]
  bold = [sentence for sentence in sentences if "\x02" in sentence]
  for sentence in bold[-1:] or reversed(sentences):
    if values := list(_CANDIDATE.finditer(sentence)):
      # "If each has 3, then they have 2*3 = 6", and no other case.
      is_single = text.count("=") == len(_IF.findall(text)) == 1
      has_premise = is_single and not _CASES.search(text)
      return _stated_by(sentence, values, has_premise)
  if not sentences:
    return ""
  if verdict := _YES_OR_NO.match(text):
    unsure = (_NO if verdict[1] else _YES).search(text) or _HEDGE.search(text)
    return "" if unsure else verdict[0].strip(" *.,;:")
  if number := _only_number_word(sentences[-1]):
    return number
  return _after_is(sentences[-1])


def _only_number_word(sentence: str) -> str:
  """The "two" of "Each has two sisters", if no other number is named or hinted at."""
  words = _NUMBER_WORD.findall(sentence)
  if len(words) != 1 or _HEDGE.search(sentence) or _DENIAL.search(sentence):
    return ""
  verb = re.search(rf"\b{_COPULA} {words[0]}{_REST_OF_WORDS}", sentence)
  is_told = verb and not re.search(r"\b(?:nobody|hardly|no)\b", sentence, re.IGNORECASE)
  return words[0] if is_told and not _TASK.match(sentence) else ""


def _letter(text: str) -> str:
  """The choice that a text without a value names, "" if it leaves one open."""
  text = text.replace("*", "").strip(" .!")
  if letter := _LETTER.match(text):
    rest = _DENIAL.split(_REASON.split(text[letter.end() :])[0])[0]
  elif letter := _LETTER_AT_END.search(text):
    rest = _NOT_LETTER.sub("", text[: letter.start()])
  elif letter := _LETTER_CHOSEN.search(text):
    rest = text[: letter.start()] + text[letter.end() :]
  if letter is None or _OTHER_LETTER.search(rest) or _CANDIDATE.search(rest):
    return ""
  clause = re.split("[,;.]", rest.rstrip(",; "))[-1]
  if letter.re is not _LETTER and _REFUSAL.search(clause):
    return ""
  return letter[letter.lastindex]


def _mark_bold(match: re.Match) -> str:
  """Marks a value in bold, so that it is found as one; other words lose the stars."""
  content = match[1].strip()
  value = _CANDIDATE.match(content)
  rest = content[value.end() :] if value else ""
  if value is None or re.search(r"[.:]|.{20}", rest) or _CANDIDATE.search(rest):
    return f" {content} "
  return f"\x02{value[0]}\x03{content[value.end() :]}"


def _stated_by(sentence: str, values: list[re.Match], has_premise: bool) -> str:
  """What a sentence states that has these values in it, perhaps under one premise."""
  hedges = _HEDGE.findall(_CONCLUSION.split(sentence)[-1])
  result = _worked_out(sentence)
  if hedges and not (result and has_premise and hedges in (["If"], ["if"])):
    return ""
  if _TASK.match(sentence):
    return result if _NARRATED.match(sentence) else ""
  if result:
    return result
  reason = _REASON.search(sentence, values[0].end())
  if reason:
    values = [value for value in values if value.end() <= reason.start()]
    sentence = sentence[: reason.start()]
  row = [values[-1]]
  for value in reversed(values[:-1]):
    if not _AND.fullmatch(sentence, value.end(), row[0].start()):
      break
    row.insert(0, value)
  starts = not sentence[: values[0].start()].strip()
  link = 0
  for match in _LINK.finditer(sentence, 0, row[0].start()):
    inside = any(value.start() <= match.start() < value.end() for value in values)
    if not inside and (match[0] == "=" or not starts):
      link = match.end()
  last = [value for value in values if value.start() >= link]
  before = values[-len(last) - 1].end() if len(last) < len(values) else 0
  if sentence[:link].endswith("="):  # Of "it is not 3 + 4 = 7" not the 7.
    before = _clause_start(sentence, link)
  if _DENIAL.search(sentence, before):
    return ""
  for command in _COMMAND.finditer(sentence, link):
    if not any(value.start() <= command.start() < value.end() for value in last):
      return ""
  for one, other in itertools.pairwise(last):
    beside = not sentence[one.end() : other.start()].strip()
    if beside and bool(one["bold"]) != bool(other["bold"]):
      return ""
  last = [value for value in last if value["bold"]] or last
  if len(last) == len(row) > 1:
    return ", ".join(map(_value_of, row))
  last = [value for value in last if not _is_aside(sentence, value)] or last
  if len(last) == 2 and _OF.fullmatch(sentence, last[0].start(), last[1].start()):
    last.pop()  # 1/8 of 2 feet is 1/8.
  distinct = set(map(_value_of, last))
  return distinct.pop() if len(distinct) == 1 else ""


def _worked_out(sentence: str) -> str:
  """The 20 of "18000/900 = 20 days for 2 cars", if that is true and all, else ""."""
  *_, equation = [None, *_EQUATION.finditer(sentence)]
  if equation is None or not _REST.fullmatch(sentence, equation.end()):
    return ""
  start = equation.start()
  denial = _DENIAL.search(sentence, _clause_start(sentence, start), start)
  if denial or _NO_LEAD.search(sentence[:start]) or _SCALED.search(equation["left"]):
    return ""
  left, right = (
    _NOT_ARITHMETIC.sub("", _TIMES.sub("*", side).translate(_TYPED))
    for side in (equation["left"], equation["right"])
  )
  value, result = numeric.values(left)[0], numeric.values(right)[0]
  if value is None or result is None or abs(value - result) > 1e-9 * abs(result):
    return ""
  return equation["right"]


def _clause_start(sentence: str, end: int) -> int:
  return max(sentence.rfind(", ", 0, end), sentence.rfind("; ", 0, end), 0)


def _is_aside(sentence: str, value: re.Match) -> bool:
  """Whether it says when or how long, as the 12 of "$220 after 12 months"."""
  before, after = sentence[: value.start()], sentence[value.end() :]
  return bool(_WHEN.search(before[-40:]) and _TIME.match(after))


def _value_of(match: re.Match) -> str:
  return next(filter(None, match.groups()), "").strip()


def _after_is(sentence: str) -> str:
  """What follows the last "is" of a sentence that neither asks nor hedges."""
  _, verb, after = sentence.rpartition(" is ")
  if not verb:
    _, verb, after = sentence.rpartition(" are ")
  unsure = _TASK.match(sentence) or _HEDGE.search(sentence) or _DENIAL.search(sentence)
  return after if verb and not unsure else ""


# --- Boxes ---


def boxed(text: str) -> str | None:
  """Rule 1 of `final_answer` alone: "" where there is no box, None if one is open."""
  return _last_boxed(text)[0]


_TAKEN_BACK = re.compile(
  rf"{_DENIAL.pattern}|\b(?:actually|wait|hmm|instead|other)\b", re.IGNORECASE
)
# For each the whole text is read.
_MAX_UNCLOSED = 3


def _last_boxed(text: str) -> tuple[str | None, int, int]:
  """The content of the last box or boxes, and where they start and end."""
  answers, first, last_end, unclosed = [], 0, 0, 0
  box, match = _BOX, _BOX.search(text)
  if match is None:
    box, match = _BARE_BOX, _BARE_BOX.search(text)
  while match:
    start, content, end = match.start(), match[1], match.end()
    if content is None:
      content, end = _braced(text, end)
    if content is None:
      unclosed += 1
      match = box.search(text, match.end())
      is_last = match is None or unclosed > _MAX_UNCLOSED
      if is_last and (
        not answers
        or _is_list_link(text, last_end, start)
        or _TAKEN_BACK.search(text, last_end, start)
      ):
        return None, start, len(text)
      if is_last:
        break
      continue
    if content.strip():
      if not (answers and _is_list_link(text, last_end, start)):
        answers, first = [], start
      answers.append(content)
      last_end = end
    match = box.search(text, end)
  return ", ".join(answers), first, last_end


def _is_list_link(text: str, start: int, end: int) -> bool:
  r"""Whether two boxes are one answer: nothing, a comma, "… and" or "or" between them.

  `\boxed{1}` cats and `y_2 =` `\boxed{2}` is a list too, if it stays in one sentence;
  so are alternatives ("maybe", "if odd", "/") and the parts of a sum.
  """
  between = text[start:end]
  if len(between) > 60:
    return False
  words = re.sub(r"\\(?:text|mbox|q?quad|[()])|[{}$]", " ", between)
  words = re.sub(r"\b[A-Za-z]_\w\s*=\s*$", "", words.replace(",", " , ")).split()
  if set(words) <= {",", "and", "or"}:
    return bool(words) or "\n" not in between
  if re.fullmatch(r"[\s$]*(?:[-+*/;?|]|\\{1,2})[\s$]*", between):
    return True
  if _ONLY_OTHERS.fullmatch(between):
    return True
  if re.search(r"[.:!?\n]", between):
    return False
  return (words[-1] == "and" and ";" not in between) or bool(_HEDGE.search(between))


def _braced(text: str, start: int) -> tuple[str | None, int]:
  """Gives what stands before the brace that closes the one before `start`."""
  depth = 1
  for match in _BRACE_OR_ESCAPE.finditer(text, start):
    depth += {"{": 1, "}": -1}.get(match[0], 0)
    if depth == 0:
      return text[start : match.start()], match.end()
  return None, len(text)

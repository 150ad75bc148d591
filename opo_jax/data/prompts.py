"""Converts problems to prompt tokens: chat template, tokenizer, end tokens.

Works with any `transformers` tokenizer: the small ones of the embedded tasks and those
of real models.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

# Special tokens and chat template of the embedded tasks: turns are `<role>text`.
SPECIAL_TOKENS = ("<pad>", "<bos>", "<end>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}"
  "{{ '<' + message['role'] + '>' + message['content'] }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question with its reference answer, as text.

  Attributes:
    id: unique within its source.
    question: the user's turn, before the chat template.
    answer: the reference answer that the verifier compares with.
  """

  id: str
  question: str
  answer: str


def embedded_tokenizer(
  symbols: Sequence[str], pre_tokenizer: Any, decoder: Any = None
) -> Any:
  """Builds a tokenizer of whole symbols, as a `transformers` tokenizer.

  Args:
    symbols: the vocabulary after `SPECIAL_TOKENS`, in the order of their ids.
    pre_tokenizer: of `tokenizers`: splits a text into symbols.
    decoder: of `tokenizers`: joins them; None joins with spaces.

  >>> from tokenizers import pre_tokenizers
  >>> tokenizer = embedded_tokenizer(["tea"], pre_tokenizers.WhitespaceSplit())
  >>> encode_prompt(tokenizer, "tea")  # <bos> <user> tea <assistant>
  [1, 3, 5, 4]
  """
  from tokenizers import Tokenizer, models
  from transformers import PreTrainedTokenizerFast

  pad, bos, end, *roles = SPECIAL_TOKENS
  vocabulary = {symbol: i for i, symbol in enumerate((*SPECIAL_TOKENS, *symbols))}
  backend = Tokenizer(models.WordLevel(vocabulary, unk_token=pad))
  backend.pre_tokenizer = pre_tokenizer
  if decoder is not None:
    backend.decoder = decoder
  return PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token=pad,
    bos_token=bos,
    eos_token=end,
    additional_special_tokens=roles,
    chat_template=CHAT_TEMPLATE,
  )


def load_tokenizer(path: str):
  """Loads a `transformers` tokenizer from a directory or a hub id.

  Raises:
    ValueError: no readable tokenizer there.
  """
  from transformers import AutoTokenizer  # 0.5 s, which the embedded tasks save

  try:
    return AutoTokenizer.from_pretrained(path)
  # Not only OSError: a ValueError if no class fits the files, the HTTP library's own
  # errors without a network, plain Exceptions for a broken tokenizer.json.
  except Exception as error:
    if pathlib.Path(path).exists():
      found = f"what is there cannot be read ({type(error).__name__})"
    else:
      found = f"no such directory, and the hub did not give it ({type(error).__name__})"
    raise ValueError(
      f"No tokenizer at {path!r}: {found}; give a directory with tokenizer.json, or a"
      " hub id and a network (--data.tokenizer; RUN= where a model is evaluated)."
    ) from error


def end_token_ids(tokenizer, also: Iterable[int] = ()) -> tuple[int, ...]:
  """The tokens that end a response: the tokenizer's and the model's, sorted.

  Args:
    tokenizer: a `transformers` tokenizer.
    also: those of the model's generation config.

  Raises:
    ValueError: neither has an end token.
  """
  ids = {tokenizer.eos_token_id, *also} - {None}
  if not ids:
    raise ValueError(
      f"The tokenizer {tokenizer.name_or_path!r} has no end token, so no response could"
      " ever end; set eos_token in its tokenizer_config.json."
    )
  return tuple(sorted(ids))


def encode_prompt(
  tokenizer, question: str, *, system: str = "", instruction: str = ""
) -> list[int]:
  """Encodes a question in the tokenizer's chat template.

  Args:
    tokenizer: with a chat template.
    question: the user's turn.
    system: the system turn; empty: none.
    instruction: appended to the question, on a line of its own.

  Returns:
    Token ids up to the begin of the assistant's turn. They have the begin-of-sequence
    token exactly once, if the tokenizer has one: most templates write it, and the
    tokenizer does not add it again.
  """
  if not tokenizer.chat_template:
    raise ValueError(
      f"The tokenizer {tokenizer.name_or_path!r} has no chat template; put one into its"
      " tokenizer_config.json."
    )
  turns = [{"role": "system", "content": system}] if system else []
  content = f"{question}\n{instruction}" if instruction else question
  turns.append({"role": "user", "content": content})
  text = tokenizer.apply_chat_template(
    turns, tokenize=False, add_generation_prompt=True
  )
  ids = tokenizer(text, add_special_tokens=False)["input_ids"]
  bos = tokenizer.bos_token_id
  return ids if bos is None or bos in ids[:1] else [bos, *ids]


def prompt_lengths(
  tokenizer, problems: Iterable[Problem], *, system: str = "", instruction: str = ""
) -> list[int]:
  """The number of tokens of `encode_prompt`, for each problem."""
  return [
    len(encode_prompt(tokenizer, each.question, system=system, instruction=instruction))
    for each in problems
  ]


def encode_problems(
  tokenizer,
  problems: Sequence[Problem],
  *,
  max_prompt_tokens: int,
  system: str = "",
  instruction: str = "",
) -> list[list[int]]:
  """Encodes the prompt of each problem.

  Raises:
    ValueError: a prompt longer than `max_prompt_tokens`.
  """
  prompts = []
  for problem in problems:
    ids = encode_prompt(
      tokenizer, problem.question, system=system, instruction=instruction
    )
    if len(ids) > max_prompt_tokens:
      raise ValueError(
        f"The prompt of problem {problem.id!r} has {len(ids)} tokens, the limit is"
        f" {max_prompt_tokens}; raise it (--rollout.max-prompt-tokens) or exclude"
        " the problem."
      )
    prompts.append(ids)
  return prompts


def decode_responses(tokenizer, tokens, lengths) -> list[str]:
  """Decodes responses to text, without special tokens.

  Args:
    tokenizer: the policy's.
    tokens: [N, T] integers on the host.
    lengths: [N] integers; later tokens are not read.
  """
  rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
  return tokenizer.batch_decode(rows, skip_special_tokens=True)

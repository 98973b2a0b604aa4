"""Prompts whose continuation repeats most of what they hold.

The model decides whether it goes on copying; a prompt only begins to.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest

from vllm_emssd.bench import corpus
from vllm_emssd.bench.corpus import DocumentedFunction, Text
from vllm_emssd.bench.request import Prompt, Tokenizer

NUM_COPIES = 2  # of the text before the one the model goes on with
LEAD = 0.25  # part of the last copy that the prompt already holds
HEADER_TOKENS = 24
MAX_PROMPTS = 96  # of a kind
MIN_CHARS_PER_TOKEN = 3
NEW_NAMES = ("item", "entry", "record", "thing")
FIRST_DEFINITION = re.compile(r"^(class|def|@)", re.MULTILINE)
IDENTIFIER = re.compile(r"[A-Za-z_]\w{2,}")


def copying_prompts(tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
    """Renamed files, quotations and documentation from docstrings, in turns."""
    kinds = (renamed_files, quotations, docstrings_to_documentation)
    built = (kind(tokenizer, max_prompt_tokens) for kind in kinds)
    turns = chain.from_iterable(zip_longest(*built))
    return [prompt for prompt in turns if prompt is not None]


def chunk_tokens(max_prompt_tokens: int) -> int:
    """Of the repeated text, so that all copies and their headers fit."""
    room = max_prompt_tokens - (NUM_COPIES + 1) * HEADER_TOKENS
    size = int(room / (NUM_COPIES + LEAD))
    if size < HEADER_TOKENS:
        raise ValueError(
            f"--max-prompt-tokens {max_prompt_tokens} is too few to copy from; "
            "give at least 256"
        )
    return size


def renamed_files(tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
    """A part of a source file, then the same with one name changed, again begun."""
    code = [
        Text(text.source, text.text[found.start() :])
        for text in corpus.held_out_sources()
        if (found := FIRST_DEFINITION.search(text.text))
    ]
    parts = _first_parts(code, tokenizer, max_prompt_tokens)
    return [_renamed(part, tokenizer) for part in parts]


def _renamed(part: Text, tokenizer: Tokenizer) -> Prompt:
    name = commonest_name(part.text)
    copies = [part.text, *(rename(part.text, name, new) for new in NEW_NAMES)]
    headers = [f"# {part.source}"]
    headers += [f"# {part.source}, {name} renamed to {new}" for new in NEW_NAMES]
    return Prompt(_repeat(copies, headers, tokenizer), source=f"rename {part.source}")


def quotations(tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
    """A part of the manual, then quoted."""
    headers = ["From the manual:", "The manual says:", "To quote the manual:"]
    parts = _first_parts(corpus.prose(), tokenizer, max_prompt_tokens)
    return [
        Prompt(
            _repeat([part.text] * len(headers), headers, tokenizer),
            source=f"quote {part.source}",
        )
        for part in parts
    ]


def docstrings_to_documentation(
    tokenizer: Tokenizer, max_prompt_tokens: int
) -> list[Prompt]:
    """A function with its docstring, then its entry in the documentation."""
    size = chunk_tokens(max_prompt_tokens)
    return [
        _documentation(function, tokenizer, size)
        for function in corpus.documented_functions()[:MAX_PROMPTS]
    ]


def _documentation(
    function: DocumentedFunction, tokenizer: Tokenizer, size: int
) -> Prompt:
    entry = _first_lines(function.docstring, tokenizer, size)
    copies = [_first_lines(function.definition, tokenizer, size), entry, entry]
    title = f".. function:: {function.signature}\n"
    headers = [f"# {function.source}", f"help\n\n{title}", title]
    return Prompt(
        _repeat(copies, headers, tokenizer), source=f"document {function.source}"
    )


def _repeat(copies: Sequence[str], headers: Sequence[str], tokenizer: Tokenizer) -> str:
    """Whole copies, and the beginning of one more."""
    whole = [
        f"{header}\n{copy}\n\n"
        for header, copy in zip(headers[:NUM_COPIES], copies, strict=False)
    ]
    last = copies[NUM_COPIES]
    lead = _first_lines(last, tokenizer, int(LEAD * len(tokenizer.encode(last))))
    return "".join(whole) + f"{headers[NUM_COPIES]}\n{lead}\n"


def _first_parts(
    texts: Sequence[Text], tokenizer: Tokenizer, max_prompt_tokens: int
) -> Iterator[Text]:
    """The first part of each text that is long enough, at most MAX_PROMPTS."""
    size = chunk_tokens(max_prompt_tokens)
    long = (text for text in texts if len(text.text) > MIN_CHARS_PER_TOKEN * size)
    for text in islice(long, MAX_PROMPTS):
        yield Text(text.source, _first_lines(text.text, tokenizer, size))


def _first_lines(text: str, tokenizer: Tokenizer, size: int) -> str:
    """Whole lines of at most `size` tokens, but one at least."""
    lines: list[str] = []
    num_tokens = 0
    for line in text.strip().splitlines():
        num_tokens += len(tokenizer.encode(line + "\n"))
        if lines and num_tokens > size:
            break
        lines.append(line)
    return "\n".join(lines)


def commonest_name(text: str) -> str:
    """The identifier that occurs most often; of equals the first."""
    names = [n for n in IDENTIFIER.findall(text) if not keyword.iskeyword(n)]
    return Counter(names).most_common(1)[0][0] if names else "self"


def rename(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{re.escape(old)}\b", new, text)

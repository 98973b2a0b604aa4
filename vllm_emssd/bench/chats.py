"""Prompts for a chat model: open questions, summaries and edits of real text.

The text is what the shipped draft models were not trained on: this project's own
documents where there is a checkout, Python's manual, held-out source files.
"""

from __future__ import annotations

import ast
import keyword
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, cycle
from pathlib import Path
from typing import Any

from vllm_emssd.bench import corpus
from vllm_emssd.bench.corpus import Text
from vllm_emssd.bench.request import Prompt, Tokenizer

REPOSITORY = Path(__file__).parents[2]  # in a checkout
OWN_DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md")
PASSAGE_CHARS = range(500, 1600)
CODE_CHARS = range(300, 1200)
IDENTIFIER = re.compile(r"[A-Za-z_]\w{2,}")
MAX_PROMPTS = 96  # of a kind

Builder = Callable[[Tokenizer, int], list[Prompt]]

SUBJECTS = (
    "public libraries", "the water cycle", "electric trains", "a good night's sleep",
    "the Roman calendar", "sourdough", "lighthouses", "compilers", "tides", "lasers",
    "the Silk Road", "beekeeping", "origami", "migraines", "tide pools", "barometers",
)  # fmt: skip
ASKED = (
    "Explain how {} came about and what people should know today.",
    "Write a short article about {} for a school magazine.",
    "My grandmother wants to understand {}. How would you put it?",
    "Name the main ideas behind {} and give an example of each.",
    "What would the world of today be like without {}?",
    "Draft a polite letter that asks the town council for more attention to {}.",
)
SUMMARISED = (
    "Please summarize the following text in a few sentences.\n\n{}",
    "What does the passage below say? Give a summary.\n\n{}",
    "Here is a part of a manual:\n\n{}\n\nSum it up for a colleague.",
)
EDITED_PROSE = (
    "Correct any spelling mistakes in this text and return the whole text:\n\n{}",
    "Return the text below unchanged, but with a title above it.\n\n{}",
)
EDITED_CODE = (
    "Rename `{name}` to `new_{name}` in this code. Return all of the code:\n\n{code}",
    "Return this code with one more comment at its top:\n\n{code}",
)


def questions(tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
    """Open questions: nothing in the prompt to copy from."""
    asked = (
        Prompt(template.format(subject), source=f"question on {subject}")
        for i, template in enumerate(ASKED)
        for subject in SUBJECTS[i:] + SUBJECTS[:i]
    )
    return list(asked)[:MAX_PROMPTS]


def summaries(tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
    """Passages of this project's documents and Python's manual, to be summed up."""
    made = (
        Prompt(template.format(text.text), source=f"summary of {text.source}")
        for template, text in zip(cycle(SUMMARISED), passages(), strict=False)
    )
    return list(made)[:MAX_PROMPTS]


def edits(tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
    """Passages and functions, asked for again with a small change."""
    prose = (
        Prompt(template.format(text.text), source=f"edit of {text.source}")
        for template, text in zip(cycle(EDITED_PROSE), passages(), strict=False)
    )
    code = (
        Prompt(
            template.format(name=commonest_name(text.text), code=text.text),
            source=f"edit of {text.source}",
        )
        for template, text in zip(cycle(EDITED_CODE), functions(), strict=False)
    )
    turns = chain.from_iterable(zip(prose, code, strict=False))
    return list(turns)[:MAX_PROMPTS]


def in_chat_format(kind: Builder) -> Builder:
    """The same as a chat's first turn, as far as they fit into the prompt's tokens.

    A model without a chat template gets the bare text.
    """

    def build(tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
        formatted = [
            replace(prompt, text=_first_turn(prompt.text, tokenizer), stops_at_eos=True)
            for prompt in kind(tokenizer, max_prompt_tokens)
        ]
        return [
            prompt
            for prompt in formatted
            if len(tokenizer.encode(prompt.text)) <= max_prompt_tokens
        ]

    return build


def _first_turn(text: str, tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        return text
    turn: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    begin = tokenizer.decode(tokenizer.encode(""))  # encode may add it once more
    return turn.removeprefix(begin) if begin else turn


def passages() -> list[Text]:
    """Runs of paragraphs, one of each document or topic in turns."""
    documents = [
        Text(name, path.read_text())
        for name in OWN_DOCUMENTS
        if (path := REPOSITORY / name).exists()
    ]
    own = [part for document in documents for part in _parts(document)]
    manual = [next(_parts(topic), None) for topic in corpus.prose()]
    found = [part for part in manual if part is not None]
    both = list(chain.from_iterable(zip(own, found, strict=False)))
    return both + found[len(own) :]


def functions() -> list[Text]:
    """Functions of held-out source files, without their class's indentation."""
    found = []
    for source in corpus.held_out_sources():
        for node in ast.walk(ast.parse(source.text)):
            if isinstance(node, ast.FunctionDef):
                code = ast.get_source_segment(source.text, node, padded=True) or ""
                if len(code) in CODE_CHARS:
                    name = f"{source.source}:{node.lineno}"
                    found.append(Text(name, textwrap.dedent(code)))
                    break  # one of each file
    return found


def _parts(document: Text) -> Iterator[Text]:
    """Paragraphs together, as far as they fit; no tables, headings or code."""
    part = ""
    for paragraph in re.split(r"\n\s*\n", document.text):
        text = paragraph.strip()
        if not text or text[0] in "#|`<*!-=+" or "```" in text:
            continue
        if len(part) + len(text) >= PASSAGE_CHARS.stop:
            if len(part) in PASSAGE_CHARS:
                yield Text(document.source, part)
            part = ""
        part = f"{part}\n\n{text}" if part else text
    if len(part) in PASSAGE_CHARS:
        yield Text(document.source, part)


def commonest_name(code: str) -> str:
    """The identifier that occurs most often; of equals the first."""
    names = [n for n in IDENTIFIER.findall(code) if not keyword.iskeyword(n)]
    return Counter(names).most_common(1)[0][0] if names else "self"

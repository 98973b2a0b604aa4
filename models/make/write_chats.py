"""Write chats with SmolLM2, to train its EAGLE-3 head on.

    python -m models.make.write_chats --target MODEL --out chats.jsonl --num-chats 4000

Questions come from templates, summaries and edits are about text that is on the machine
(`documents.py`); vLLM answers, half of it greedily. Each line has a chat's `token_ids`
and `num_prompt_tokens`. An output file that is there already grows: with another
--seed the chats are others.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import tomllib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from models.make.documents import Document, collect_documents
from vllm_emssd.bench import chats

PROMPTS = tomllib.loads(Path(__file__).with_name("chat_prompts.toml").read_text())
PROSE_CHARS, CODE_CHARS = range(200, 900), range(150, 800)
MAX_TOKENS = 160  # of an answer
AT_ONCE = 96
SAVE_EVERY = 192  # chats


def pieces(document: Document) -> Iterator[tuple[str, str]]:
    """(kind, text) of suitable length; the kind is "on_prose" or "on_code"."""
    if not document.name.endswith(".py"):
        for part in document.text.split("\n\n"):
            if len(part) in PROSE_CHARS:
                yield "on_prose", part.strip()
        return
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            part = ast.get_docstring(node) or ""
            if len(part) in PROSE_CHARS:
                yield "on_prose", part
            code = ast.get_source_segment(document.text, node) or ""
            if len(code) in CODE_CHARS:
                yield "on_code", code


def prompts(seed: int) -> Iterator[str]:
    """Without end: about two in five are questions, the others about prose and code."""
    rng = random.Random(seed)
    documents = [d for d in collect_documents(1) if not d.is_held_out]
    while True:
        found = list(pieces(rng.choice(documents)))
        if not found:
            continue
        kind, text = rng.choice(found)
        yield rng.choice(PROMPTS[kind]).format(text)
        question = rng.choice(PROMPTS["questions"])
        yield question.format(*rng.sample(PROMPTS["topics"], 2)[: question.count("{}")])
        if rng.random() < 0.2:
            yield rng.choice(PROMPTS["tasks"]).format(rng.choice(PROMPTS["purposes"]))


def held_out_prompts(tokenizer: Any) -> Iterator[str]:
    """The benchmark's: questions, summaries and edits in turns."""
    kinds = (chats.questions, chats.summaries, chats.edits)
    for turn in zip(*(kind(tokenizer, 512) for kind in kinds), strict=False):
        yield from (prompt.text for prompt in turn)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--target", required=True)
    add("--out", type=Path, required=True)
    add("--num-chats", type=int, default=4000)
    add("--seed", type=int, default=1)
    add("--held-out", action="store_true", help="the benchmark's prompts, greedily")
    return parser.parse_args()


def main() -> None:
    from vllm import LLM, SamplingParams

    arguments = parse_arguments()
    llm = LLM(
        arguments.target, dtype="bfloat16", max_model_len=1024, max_num_seqs=AT_ONCE,
        kv_cache_memory_bytes=1 << 30,
    )  # fmt: skip
    if arguments.held_out:
        asked, temperatures = held_out_prompts(llm.get_tokenizer()), [0.0]
    else:
        asked, temperatures = prompts(arguments.seed), [0.0, 0.7]
    rng = random.Random(arguments.seed)
    asked = islice(asked, arguments.num_chats)
    with arguments.out.open("a") as file:
        while some := list(islice(asked, SAVE_EVERY)):
            sampling = [
                SamplingParams(
                    temperature=rng.choice(temperatures), max_tokens=MAX_TOKENS
                )
                for _ in some
            ]
            conversations = [[{"role": "user", "content": text}] for text in some]
            for answer in llm.chat(conversations, sampling):
                prompt, said = answer.prompt_token_ids, answer.outputs[0].token_ids
                line = {"num_prompt_tokens": len(prompt), "token_ids": [*prompt, *said]}
                file.write(json.dumps(line) + "\n")
            file.flush()


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Write chats with SmolLM2 to train its draft model on.

    scripts/smollm2_chats.py --target MODEL_FOLDER --out CHATS_FOLDER --num-chats 4000

Questions, summaries and edits are made from templates over text that is on the
machine (docstrings, source and documentation of the installed packages, without the
files that are held out); vLLM answers them, half greedily. Each shard holds the
tokens and the target's final hidden state before each: one forward pass serves both.
Several processes may write to one folder, with different seeds.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from train_pair import Document, collect_documents

from vllm_emssd.bench import chats
from vllm_emssd.bench.request import Tokenizer

TOPICS = """
a balanced diet, ancient Rome, antibiotics, artificial intelligence, atoms, bees,
bicycles, black holes, blood pressure, bread, bridges, butterflies, caffeine,
Canada, cancer, cheese, chemistry, chess, climate change, clouds, coffee, comets,
computers, cooking rice, coral reefs, cotton, databases, deserts, dinosaurs, DNA,
dogs, dreams, earthquakes, economics, Egypt, electric cars, elephants, encryption,
energy, evolution, exercise, fire, football, forests, France, friendship, fungi,
gardening, genetics, geometry, Germany, glaciers, glass, gold, gravity, guitars,
habits, history, honey, horses, hurricanes, ice cream, inflation, insects, insulin,
iron, islands, Italy, Japan, jazz, jellyfish, job interviews, Kenya, languages,
leadership, learning to swim, libraries, lightning, machine learning, magnets, maps,
Mars, meditation, memory, metals, Mexico, microscopes, milk, money, mountains,
mushrooms, music, networks, neurons, novels, nutrition, oceans, oxygen, painting,
paper, penguins, philosophy, photography, physics, plants, plastic, poetry,
pollution, probability, programming, protein, public speaking, railways, rain,
recycling, rivers, robots, rockets, salt, saving money, science, sharks, sleep,
soil, solar panels, sound, spiders, stars, steel, stress, sugar, tea, teamwork,
telescopes, the Cold War, the human heart, the internet, the moon, the printing
press, time zones, tourism, trees, universities, vaccines, Vietnam, violins,
vitamins, volcanoes, voting, walking, waves, whales, wheat, wind turbines, writing,
yoga"""
QUESTIONS = (
    "What is the most important thing to know about {}?", "Explain {} to a child.",
    "Write a short story about {}.", "Give me five facts about {}.",
    "Why does {} matter?", "Write a poem about {}.", "How did {} begin?",
    "I am new to {}. Where should I start?", "Write an email to a friend about {}.",
    "What are common mistakes people make about {}?", "Tell me a joke about {}.",
    "List the advantages and disadvantages of {}.", "Describe {} in one paragraph.",
    "Compare {} and {}.", "What questions could I ask an expert on {}?",
    "Make a plan to learn about {} in a week.", "What do {} and {} have in common?",
    "Can you help me write an introduction to an essay on {}?",
    "Write a dialogue between two people who talk about {}.",
    "What is the history of {}?", "Who should care about {}, and why?",
    "Suggest three titles for an article about {}.", "{}?", "Tell me about {}.",
)  # fmt: skip
TASKS = (
    "Write a Python function that {}.", "How do I write a program that {}?",
    "Show me Python code that {}, and explain it.",
    "Write a unit test for code that {}.",
)  # fmt: skip
PURPOSES = """
adds two numbers, checks whether a word is a palindrome, sorts a list, counts the
words in a file, reads a CSV file, computes a factorial, finds prime numbers,
reverses a string, removes duplicates from a list, merges two dictionaries,
downloads a web page, parses JSON, prints the Fibonacci numbers, finds the largest
number in a list, converts Celsius to Fahrenheit, draws a histogram, computes an
average, validates an email address, rolls a die, counts vowels, searches a list,
writes a log, computes a hash, splits a text into sentences, simulates a queue,
transposes a matrix, renames files"""
ON_PROSE = (
    "Summarize this:\n\n{}", "{}\n\nWhat is this about?", "Give the main points:\n\n{}",
    "Rewrite this text in simpler words:\n\n{}", "Turn this into a list:\n\n{}",
    "Fix the grammar of the following text, change nothing else.\n\n{}",
    "{}\n\nRewrite the text above and make it more formal.", "Repeat this:\n\n{}",
    "Write three questions about this text and answer them:\n\n{}",
    "Make this shorter:\n\n{}", "Explain the following in detail.\n\n{}",
    "Copy this text, but in capital letters where a sentence begins:\n\n{}",
)  # fmt: skip
ON_CODE = (
    "Explain what this code does:\n\n{}", "Add comments to this code:\n\n{}",
    "```python\n{}\n```\nRewrite this with better names.", "Add type hints:\n\n{}",
    "{}\n\nAdd a docstring to this function.", "Find the bug in this code:\n\n{}",
    "Write this code again, and change nothing but the function's name.\n\n{}",
)  # fmt: skip
PROSE_CHARS, CODE_CHARS = range(200, 900), range(150, 800)
ANSWER_TOKENS = 160
AT_ONCE = 96
SHARD_CHATS = 192


def words(text: str) -> list[str]:
    return [" ".join(word.split()) for word in text.split(",")]


def pieces(document: Document) -> Iterator[tuple[bool, str]]:
    """(is it code?, text) of suitable length."""
    if not document.name.endswith(".py"):
        for part in document.text.split("\n\n"):
            if len(part) in PROSE_CHARS:
                yield False, part.strip()
        return
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            part = ast.get_docstring(node) or ""
            if len(part) in PROSE_CHARS:
                yield False, part
            code = ast.get_source_segment(document.text, node) or ""
            if len(code) in CODE_CHARS:
                yield True, code


def prompts(rng: random.Random) -> Iterator[str]:
    """Without end: two in five questions, the others about prose and code."""
    documents = [d for d in collect_documents(random.Random(1)) if not d.held_out]
    topics, purposes = words(TOPICS), words(PURPOSES)
    while True:
        found = list(pieces(rng.choice(documents)))
        if not found:
            continue
        is_code, text = rng.choice(found)
        yield rng.choice(ON_CODE if is_code else ON_PROSE).format(text)
        template = rng.choice(QUESTIONS)
        yield template.format(*rng.sample(topics, 2)[: template.count("{}")])
        if rng.random() < 0.2:
            yield rng.choice(TASKS).format(rng.choice(purposes))


def held_out_prompts(tokenizer: Tokenizer) -> Iterator[str]:
    """Of the benchmark: questions, summaries and edits in turns."""
    kinds = (chats.questions, chats.summaries, chats.edits)
    for turn in zip(*(kind(tokenizer, 512) for kind in kinds), strict=False):
        yield from (prompt.text for prompt in turn)


class HiddenStates:
    """The target's final hidden states by request, in the order of its tokens."""

    def __init__(self, llm: Any) -> None:
        self._runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._runner.model.register_forward_hook(self._take)

    def _take(self, module: Any, args: Any, hidden: torch.Tensor) -> None:
        batch = self._runner.input_batch
        starts = self._runner.query_start_loc.np
        for i, name in enumerate(batch.req_ids[: batch.num_reqs]):
            part = hidden[int(starts[i]) : int(starts[i + 1])].clone()
            self._parts.setdefault(name.split("-")[0], []).append(part)

    def pop(self, name: str) -> torch.Tensor:
        return torch.cat(self._parts.pop(name))


def start_engine(target: Path) -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    return LLM(
        str(target), dtype="bfloat16", max_model_len=1024, max_num_seqs=AT_ONCE,
        kv_cache_memory_bytes=1 << 30, enforce_eager=True, async_scheduling=False,
        enable_prefix_caching=False,
    )  # fmt: skip


def write_shard(
    llm: Any,
    hidden: HiddenStates,
    asked: list[str],
    temperatures: list[float],
    path: Path,
) -> int:
    """Returns how many tokens are in it."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=temperature, max_tokens=ANSWER_TOKENS)
        for temperature in temperatures
    ]
    conversations = [[{"role": "user", "content": prompt}] for prompt in asked]
    tokens, states, lengths, prompt_lengths = [], [], [], []
    for answer in llm.chat(conversations, params, use_tqdm=False):
        ids = [*answer.prompt_token_ids, *answer.outputs[0].token_ids]
        found = hidden.pop(answer.request_id)
        if len(found) != len(ids) - 1:  # the last token is never fed
            raise RuntimeError(f"{len(ids)} tokens, but {len(found)} hidden states")
        tokens += ids[: len(found)]
        states.append(found)
        lengths.append(len(found))
        prompt_lengths.append(len(answer.prompt_token_ids))
    arrays = {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "hidden": torch.cat(states).contiguous(),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "prompt_lengths": torch.tensor(prompt_lengths, dtype=torch.int32),
    }
    unfinished = path.with_suffix(".tmp")
    save_file(arrays, unfinished)
    unfinished.rename(path)
    return len(tokens)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-chats", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--held-out", action="store_true", help="the benchmark's prompts, greedily"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    llm = start_engine(args.target)
    hidden = HiddenStates(llm)
    asked = held_out_prompts(llm.get_tokenizer()) if args.held_out else prompts(rng)
    choices = (0.0,) if args.held_out else (0.0, 0.7)
    asked = islice(asked, args.num_chats)
    for number, shard in enumerate(iter(lambda: list(islice(asked, SHARD_CHATS)), [])):
        path = args.out / f"chats-{args.seed:03}-{number:03}.safetensors"
        temperatures = rng.choices(choices, k=len(shard))
        num_tokens = write_shard(llm, hidden, shard, temperatures, path)
        print(f"{path.name}: {num_tokens} tokens", flush=True)


if __name__ == "__main__":
    main()

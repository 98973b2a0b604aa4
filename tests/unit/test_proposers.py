"""What every proposer without a model promises, on random batches: llma, the example of
CONTRIBUTING.md, and those of installed packages."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.proposer_example import (
    MAX_LINES,
    block_of,
    example_name,
    installed_example,
)
from tests.unit.draft_batches import batch_of
from tests.unit.proposing_engine import ProposingEngine
from tests.unit.simulated_scheduler import Setup
from vllm_emssd.config import EmssdConfig, parse_speculative_config, plugin_proposers
from vllm_emssd.proposers.base import Proposer, plugin_proposer
from vllm_emssd.proposers.copy_lengths import CopyLengths
from vllm_emssd.proposers.llma import LlmaProposer

NUM_STEPS = 40
VOCAB_SIZE = 4  # few, so that text repeats
STOCK_KEYS = ("method", "model")
NAMES = list(dict.fromkeys(["llma", example_name(), *plugin_proposers()]))


@pytest.fixture(autouse=True)
def _example(tmp_path: Path) -> Iterator[None]:
    with installed_example(tmp_path):
        yield


class ObservedLengths(CopyLengths):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: list[tuple[str, int, int]] = []
        self.released: list[str] = []

    def observe(
        self, req_id: str, num_draft_tokens: int, num_accepted_tokens: int
    ) -> None:
        self.observed.append((req_id, num_draft_tokens, num_accepted_tokens))

    def release(self, req_id: str) -> None:
        self.released.append(req_id)


def make(name: str, lengths: CopyLengths) -> Proposer:
    config, _ = parse_speculative_config(
        {"method": "emssd", "proposer": name}, STOCK_KEYS
    )
    if name == "llma":
        return LlmaProposer(config.check_length, config.copy_length, lengths)
    maker = plugin_proposer(name)
    assert maker is not None
    return maker(config, lengths)


@pytest.mark.parametrize("name", NAMES)
def test_drafts_are_valid_and_few_enough(name: str) -> None:
    """The engine checks them."""
    for seed in range(5):
        setup = Setup(seed, max_model_len=64)
        seen = ProposingEngine(setup, make(name, CopyLengths())).run()
        assert seen["drafts"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_same_steps_give_the_same_drafts(name: str) -> None:
    """Every rank drafts for itself: nothing may depend on the process."""
    first, second = (
        ProposingEngine(Setup(1), make(name, CopyLengths())) for _ in range(2)
    )
    for _ in range(NUM_STEPS):
        first.step()
        second.step()
        assert first.drafts == second.drafts


@pytest.mark.parametrize("name", [name for name in NAMES if name != "llma"])
def test_lengths_are_chosen_and_what_came_of_them_is_told(name: str) -> None:
    class AtMostOne(ObservedLengths):
        def choose(self, step, confidence):  # type: ignore[no-untyped-def]
            assert confidence.shape[0] == len(step.req_ids)
            assert confidence.shape[1] >= step.max_draft_tokens.max(initial=0)
            return np.minimum(step.max_draft_tokens, 1)

    lengths = AtMostOne()
    proposer = make(name, lengths)
    (drafts,) = proposer.propose(batch_of({"a": [1, 2, 3] * 3}, [6]))
    assert drafts == [1]
    proposer.record_verified("a", 1, 1)
    assert lengths.observed == [("a", 1, 1)]
    proposer.release(["a"])
    assert lengths.released == ["a"]


@pytest.mark.parametrize("name", NAMES)
def test_a_released_request_is_forgotten(name: str) -> None:
    """Its id may come back with another text, shorter or longer."""
    for text in ([3], [4, 5] * 40):
        proposer = make(name, CopyLengths())
        proposer.propose(batch_of({"a": [1, 2] * 20}, [6]))
        proposer.release(["a"])
        fresh = make(name, CopyLengths())
        batch = batch_of({"a": text}, [6])
        if len(text) > 1:
            assert proposer.propose(batch) == fresh.propose(batch)
        else:
            proposer.propose(batch)


# --------------------------------------------------------------- finding them


def test_example_is_short() -> None:
    assert len(block_of("follower_proposer.py").splitlines()) <= MAX_LINES


def test_example_is_found_by_its_entry_point() -> None:
    assert example_name() in plugin_proposers()
    config, stock = parse_speculative_config(
        {"method": "emssd", "proposer": example_name(), "num_speculative_tokens": 3},
        STOCK_KEYS,
    )
    assert (config.proposer, config.num_speculative_tokens) == (example_name(), 3)
    assert not config.uses_draft_model
    assert not config.copies
    assert config.max_draft_tokens == 3
    assert stock == {}
    assert EmssdConfig(**config.model_dump()) == config  # as a worker reads it


def test_plugin_takes_no_model() -> None:
    asked = {"method": "emssd", "proposer": example_name(), "model": "draft"}
    with pytest.raises(ValueError, match=r"'model'.*uses no model; remove it"):
        parse_speculative_config(asked, STOCK_KEYS)


def test_unknown_proposer_lists_those_of_plugins() -> None:
    with pytest.raises(ValueError, match=f"'llma'.*'{example_name()}'.*'nobody'"):
        parse_speculative_config({"method": "emssd", "proposer": "nobody"}, STOCK_KEYS)


def test_built_in_names_cannot_be_taken(tmp_path: Path) -> None:
    _more_entry_points(tmp_path, "thief", "llma = thief:Proposer")
    assert "llma" not in plugin_proposers()
    assert plugin_proposer("llma") is None


def test_two_packages_of_one_name_are_refused(tmp_path: Path) -> None:
    _more_entry_points(tmp_path, "rival", f"{example_name()} = rival:Proposer")
    with pytest.raises(RuntimeError, match=r"several packages.*Uninstall all but one"):
        plugin_proposer(example_name())


def _more_entry_points(folder: Path, package: str, line: str) -> None:
    """In the folder that the example lies in, which is on the path."""
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
    )
    (metadata / "entry_points.txt").write_text(f"[vllm_emssd.proposers]\n{line}\n")
    importlib.invalidate_caches()

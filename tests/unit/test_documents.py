"""What the documents say is what the result files and the code have."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest

from tests.fresh_process import python
from vllm_emssd.bench.methods import DESCRIPTIONS
from vllm_emssd.commands import bench
from vllm_emssd.config import EmssdConfig
from vllm_emssd.metrics import COUNTER_NAMES

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *DOCS.rglob("*.md")]
VLLM_METHOD = re.compile(r"(stock|ngram|suffix)(-.*)?")  # of vLLM's own
MAX_LINES = 300
MAX_BYTES = 150_000
SHORT_PAGES = {README: 150, DOCS / "architecture.md": 150}

Table = tuple[list[str], list[list[str]]]  # heads, rows


def tables(text: str) -> Iterator[tuple[str, Table]]:
    """Each table, and the text between the one before and it."""
    for found in re.finditer(r"((?:.*\n)*?)((?:\|.*\|\n)+)", text):
        head, _, *rows = map(_cells, found[2].splitlines())
        yield found[1], (head, rows)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def result_of(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def at(result: dict[str, Any], num_requests: str) -> dict[str, Any]:
    """What was measured at a number of requests at once."""
    (found,) = [one for one in result["results"] if one["batch"] == int(num_requests)]
    return found


# ---------------------------------------------------------------- result files


@pytest.mark.parametrize("path", sorted(RESULTS.iterdir()), ids=lambda p: p.name)
def test_result_file_is_small(path: Path) -> None:
    assert path.stat().st_size <= MAX_BYTES
    if path.suffix != ".png":
        assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.name)
def test_result_file_says_where_it_comes_from(path: Path) -> None:
    result = result_of(path.name)
    made = result.get("provenance", result)
    assert made["command"]
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", made["commit"])
    assert made["machine"]
    assert made.get("vllm") or made["versions"]["vllm"]
    assert "rounds" not in result, "medians and intervals do, single rounds do not"


def test_every_result_is_on_a_page_and_the_other_way_round() -> None:
    links = re.compile(r"\]\((?:docs/)?(?:results/)([\w.-]+\.(?:json|png))\)")
    linked = {name for page in PAGES for name in links.findall(page.read_text())}
    assert linked == {p.name for p in RESULTS.iterdir() if p.suffix != ".md"}


# ---------------------------------------------------------------- numbers


def readme_rows() -> list[list[str]]:
    (rows,) = [
        rows for _, (head, rows) in tables(README.read_text()) if head[-1] == "result"
    ]
    return rows


@pytest.mark.parametrize("row", readme_rows(), ids=lambda row: f"{row[0]}, {row[1]}")
def test_readme_number_is_that_of_its_file(row: list[str]) -> None:
    """Over plain vLLM, and over the fastest of vLLM's own methods in the same run."""
    _, num_requests, method, over_plain, over_own, link = row
    file = re.search(r"results/([\w.-]+)\)", link)
    assert file
    ratios = at(result_of(file[1]), num_requests)["ratios"]
    speed = ratios[f"{method.strip('`')}/plain"]["ratio"]
    own = {
        name: ratio["ratio"]
        for title, ratio in ratios.items()
        for name, base in [title.split("/", 1)]
        if base == "plain" and VLLM_METHOD.fullmatch(name)
    }
    best = max(own, key=own.__getitem__)
    text, name = over_own.split()
    assert name == f"`{best}`"
    for stated, ratio in ((over_plain, speed), (text, speed / own[best])):
        assert stated.strip("*") == f"{ratio:.2f}"
        assert stated.startswith("**") == (ratio < 1), "losses are bold, gains are not"


def test_readme_tells_losses_too() -> None:
    assert sum("**" in row[3] or "**" in row[4] for row in readme_rows()) >= 2


def test_readme_base_of_stock_is_stated() -> None:
    """Its table says that draft_model ran with K = 5 only."""
    text = " ".join(README.read_text().split())
    assert "on the H200 only `stock`, K = 5, was run" in text
    for row in readme_rows():
        file = re.search(r"results/([\w.-]+)\)", row[5])
        assert file
        if "`stock`" in row[4]:
            arguments = result_of(file[1])["arguments"]
            assert arguments["num_speculative_tokens"] == 5


def test_draft_rows_saved() -> None:
    """ "48 to 51 % fewer rows", in README and benchmarks."""
    saved = []
    for name, k in (("auto-lengths", 8), ("draft-model-5th", 5)):
        for one in result_of(f"{name}.json")["results"]:
            ours, stock = (one["methods"][m] for m in (f"k{k}", f"stock-k{k}"))
            rows = [m["draft_rows"] / m["num_accepted_tokens"] for m in (ours, stock)]
            saved.append(1 - rows[0] / rows[1])
    sentence = f"{min(saved) * 100:.0f} to {max(saved) * 100:.0f} % fewer rows"
    for page in (README, DOCS / "benchmarks.md"):
        assert sentence in " ".join(page.read_text().split())


def test_one_length_for_all_loads() -> None:
    """ "over K = 3, 5 and 8", in benchmarks."""
    names = ("by-default", "auto-small-pair")
    cells = [
        cell["methods"] for n in names for cell in result_of(f"{n}.json")["results"]
    ]
    means = [
        geometric_mean(
            cell["mixed-auto"]["tokens_per_s"] / cell[f"stock-k{k}"]["tokens_per_s"]
            for cell in cells
        )
        for k in (3, 5, 8)
    ]
    sentence = "`mixed-auto` is {:.2f}, {:.2f} and {:.2f} times as fast".format(*means)
    assert sentence in " ".join((DOCS / "benchmarks.md").read_text().split())


def benchmark_tables() -> list[tuple[str, Table]]:
    """The file that a table names, and the table, where its columns are ratios."""
    found = []
    for before, (head, rows) in tables((DOCS / "benchmarks.md").read_text()):
        if files := re.findall(r"^Result: \[([\w.-]+)\]", before, re.MULTILINE):
            found.append((files[-1], (head, rows)))
    return found


@pytest.mark.parametrize(
    ("name", "table"),
    [pytest.param(*found, id=found[0]) for found in benchmark_tables()],
)
def test_benchmark_table_is_that_of_its_file(name: str, table: Table) -> None:
    head, rows = table
    result = result_of(name)
    assert len(rows) == len(result["results"])
    for num_requests, *cells in rows:
        found = at(result, num_requests)
        for title, cell in zip(head[1:], cells, strict=True):
            assert_states(cell, ratio_of(found, title.strip("`")))


def ratio_of(found: dict[str, Any], title: str) -> dict[str, float]:
    """Of pairs that the file does not list, the ratio of the medians alone."""
    if title in found["ratios"]:
        return found["ratios"][title]
    ours, other = (found["methods"][name]["tokens_per_s"] for name in title.split("/"))
    return {"ratio": ours / other}


def assert_states(cell: str, ratio: dict[str, float]) -> None:
    """`1.06`, or `1.06 (1.02 to 1.11)`."""
    form = "{ratio:.2f} ({low:.2f} to {high:.2f})" if "(" in cell else "{ratio:.2f}"
    assert cell == form.format(**ratio)


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize("page", SHORT_PAGES, ids=lambda p: p.name)
def test_page_is_read_in_one_sitting(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= SHORT_PAGES[page]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    """`tests/...`, `scripts/...`, `vllm_emssd/...` and `packaging/...` in a page."""
    named = re.findall(
        r"(?<![\w./])((?:tests|scripts|vllm_emssd|packaging)/[\w./-]*\w)",
        page.read_text(),
    )
    for name in named:
        assert (ROOT / name).exists(), name


def test_readme_lists_every_option() -> None:
    (rows,) = [
        rows for _, (head, rows) in tables(README.read_text()) if head[0] == "key"
    ]
    listed = {key for row in rows for key in re.findall(r"`(\w+)`", row[0])}
    assert listed == set(EmssdConfig.model_fields) | {"model"}


def test_production_page_lists_every_counter() -> None:
    listed = set(re.findall(r"`(num_\w+)`", (DOCS / "production.md").read_text()))
    assert set(COUNTER_NAMES) <= listed


def test_methods_of_the_benchmark_page_exist() -> None:
    for _, (head, _) in benchmark_tables():
        for title in head[1:]:
            name, _ = title.strip("`").split("/", 1)
            assert name in DESCRIPTIONS or re.fullmatch(r"(stock-)?k\d+", name)


def test_site_builds(tmp_path: Path) -> None:
    """mkdocs, strictly: every link and anchor of every page, without a network."""
    site = tmp_path / "site"
    done = python("-m", "mkdocs", "build", "--strict", "--site-dir", site)
    assert done.returncode == 0, done.stderr
    for page in DOCS.glob("*.md"):
        folder = "." if page.stem == "index" else page.stem
        assert (site / folder / "index.html").exists()
    example = site / "adding-a-proposer" / "index.html"
    assert "FollowerProposer" in example.read_text()


def shown_commands() -> list[list[str]]:
    """`vllm-emssd bench|simulate|plot ...` in the pages' code, without variables."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["vllm-emssd"] and words[1] in ("bench", "simulate"):
                    found.append(words[1:])
    return found


@pytest.mark.parametrize("words", shown_commands(), ids=" ".join)
def test_shown_command_is_understood(words: list[str]) -> None:
    """Its options exist and take what is given; nothing runs."""
    command = import_module(f"vllm_emssd.commands.{words[0]}")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(words[1:])
    if words[0] == "bench":
        assert bench.plan_of(args).methods

"""A recorded acceptance trace: what a drafter would have proposed, everywhere.

Greedy drafts depend on nothing but the known tokens. So one record of the target's
output, and of the drafts that follow each of its positions, replays any draft length
at any position. A file is JSON lines, gzipped if its name ends in `.gz`: a header,
then one line a request.
"""

from __future__ import annotations

import gzip
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

TRACE_FORMAT: Final = "vllm-emssd-trace/1"
SHIPPED_TRACE = Path(
    str(files("vllm_emssd.simulate") / "data" / "shipped-pair.jsonl.gz")
)

Probability = Annotated[float, Field(ge=0, le=1)]
TokenId = Annotated[int, Field(ge=0)]
_Model = TypeVar("_Model", bound=BaseModel)


class TraceHeader(BaseModel):
    """What was recorded, and how. Keys of earlier versions are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: Literal["vllm-emssd-trace/1"]
    target: str  # model name
    draft: str  # model name
    k: int = Field(ge=1, le=128)  # most drafts that can be replayed
    confidence: str  # what the confidences mean
    provenance: dict[str, str]  # command, versions


class RequestTrace(BaseModel):
    """One request: its text, and the drafts that follow each output position.

    Position p stands for "p output tokens are known". `output_ids` go k tokens beyond
    the last position, so that what is accepted there is known too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_ids: list[TokenId] = Field(min_length=1)
    output_ids: list[TokenId]  # [num_output_tokens + k]
    # Drafts made at p that agree with the output, up to the first that does not.
    accepted: list[int]  # [num_output_tokens], 0..k
    confidences: list[list[Probability]]  # [num_output_tokens][k]

    def check(self, header: TraceHeader) -> None:
        """Raise ValueError where the request does not fit the header."""
        num_positions = len(self.output_ids) - header.k
        if num_positions < 1:
            raise ValueError(
                f"output_ids has {len(self.output_ids)} tokens; more than k = "
                f"{header.k} are needed"
            )
        for name in ("accepted", "confidences"):
            found = len(getattr(self, name))
            if found != num_positions:
                raise ValueError(f"{name} has {found} entries, not {num_positions}")
        if any(not 0 <= a <= header.k for a in self.accepted):
            raise ValueError(f"accepted must be within 0..{header.k}")
        if any(len(row) != header.k for row in self.confidences):
            raise ValueError(f"each position needs {header.k} confidences")


class Trace(BaseModel):
    """All of a trace file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    header: TraceHeader
    requests: list[RequestTrace] = Field(min_length=1)

    @model_validator(mode="after")
    def _requests_fit(self) -> Trace:
        for i, request in enumerate(self.requests):
            try:
                request.check(self.header)
            except ValueError as error:
                raise ValueError(f"request {i}: {error}") from None
        return self


def save_trace(trace: Trace, path: Path) -> None:
    lines = [trace.header.model_dump_json()]
    lines += [r.model_dump_json() for r in trace.requests]
    data = ("\n".join(lines) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    # No time stamp: the same trace makes the same file.
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def load_trace(path: Path) -> Trace:
    """Raises ValueError naming the line that is no trace, OSError if unreadable."""
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        lines = data.decode().splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a trace: {error}") from None
    if not lines:
        raise ValueError(
            f"{path} is empty; record it with 'vllm-emssd simulate record'"
        )
    header = _parse(TraceHeader, lines[0], f"{path}, line 1 (header)")
    requests = [
        _parse(RequestTrace, line, f"{path}, line {number}")
        for number, line in enumerate(lines[1:], 2)
    ]
    try:
        return Trace(header=header, requests=requests)
    except ValidationError as error:
        raise ValueError(f"{path}: {_reasons(error)}") from None


def _parse(model: type[_Model], line: str, where: str) -> _Model:
    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(f"{where} is malformed: {_reasons(error)}") from None


def _reasons(error: ValidationError) -> str:
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"])))
        for e in error.errors()[:3]
    )

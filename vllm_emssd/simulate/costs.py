"""What forwards and steps cost, as a file says: measured or computed, and where."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_emssd.draft_length import CostTable, StepCosts

_DATA = Path(str(files("vllm_emssd.simulate") / "data"))
Point = tuple[Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0)]]


class ModelCosts(BaseModel):
    """One model's forward: milliseconds by rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    points: list[Point] = Field(min_length=1)  # (rows, ms), rows rising
    # What launching a forward takes the host, where it does not wait: likewise.
    host_ms: list[Point] = []

    @model_validator(mode="after")
    def _rows_rise(self) -> ModelCosts:
        table_of(self.points)
        _ = self.launches
        return self

    @property
    def launches(self) -> CostTable:
        """Of the host, by rows."""
        return table_of(self.host_ms or [(1, 0.0)])


class CostFile(BaseModel):
    """Costs of a machine and a pair of models, measured, or estimated where it says so.

    `fixed` is what a step costs besides the forwards (scheduling, sampling, reading the
    requests' K/V where the tables leave that out), by requests in the step;
    `speculation_ms` what it costs more with speculation on, `deciding_ms` what it costs
    more again if it decides by confidence, `confidence_ms` what a draft forward costs
    more if it tells it and `draft` leaves that out.

    Of a machine with a device the points of models are its milliseconds, `fixed` and
    `host_ms` are the host's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: ModelCosts
    draft: ModelCosts
    fixed: list[Point] = Field(min_length=1)  # (requests, ms), requests rising
    speculation_ms: float = Field(default=0.0, ge=0)
    deciding_ms: float = Field(default=0.0, ge=0)
    confidence_ms: float = Field(default=0.0, ge=0)
    provenance: dict[str, str] = Field(min_length=1)  # machine, command, versions, ...

    @model_validator(mode="after")
    def _requests_rise(self) -> CostFile:
        table_of(self.fixed)
        return self

    def fixed_ms(self, num_reqs: int, speculates: bool) -> float:
        """Of a step, besides the forwards."""
        ms = table_of(self.fixed).at(num_reqs)
        return ms + self.speculation_ms * speculates

    def step_costs(self, num_reqs: int) -> StepCosts:
        """What the engine's meter would have told a policy at this batch size."""
        return StepCosts(
            table_of(self.target.points),
            table_of(self.draft.points),
            self.fixed_ms(num_reqs, False),
            self.speculation_ms,
            self.deciding_ms,
            self.confidence_ms,
            copying_ms=self.speculation_ms,
        )


def table_of(points: list[Point]) -> CostTable:
    """Raises ValueError where the points do not rise."""
    rows, ms = zip(*points, strict=True)
    return CostTable(rows, ms)


def shipped_costs() -> list[str]:
    """Names of the tables that come with the package."""
    return sorted(path.stem for path in _DATA.glob("*.json"))


def load_costs(name_or_path: str) -> CostFile:
    """A shipped table by name, or any file. Raises ValueError that names the fix."""
    path = Path(name_or_path)
    if name_or_path in shipped_costs():
        path = _DATA / f"{name_or_path}.json"
    elif not path.is_file():
        raise ValueError(
            f"no cost table {name_or_path!r}: give a file or one of "
            + ", ".join(shipped_costs())
        )
    try:
        return CostFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        places = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
        reasons = "; ".join(f"{place}: {why}" for place, why in places)
        raise ValueError(f"{path} is no cost table: {reasons}") from None

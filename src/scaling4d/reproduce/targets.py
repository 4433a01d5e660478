"""What a target is: files to download, settings beside their sources, a published number, and the verdict on ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scaling4d import __version__
from scaling4d.records import UserError

FOLDER = Path("artifacts/reproduced")  # of all targets' results
RESULT = "result.json"
REPRODUCED, NOT_REPRODUCED, NO_VERDICT = "reproduced", "not reproduced", "no verdict"


@dataclass(frozen=True)
class Expected:
    """A published number. tolerance: largest difference that counts as reproduced. why: of the tolerance."""

    metric: str
    value: float
    unit: str
    tolerance: float
    why: str
    source: str


@dataclass(frozen=True)
class Download:
    """A file or a folder that the user downloads. option: of the command. size: as its source states it."""

    option: str
    what: str
    address: str
    size: str
    licence: str
    command: str


@dataclass(frozen=True)
class Setting:
    """A setting of a protocol, in words, and where the protocol states it."""

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class Target:
    """A published number, or a published demo.

    expected: None: nobody published a number, and `unpublished` names the checks instead. differences: of every run
    from the source. hardware: of a run.
    """

    name: str
    title: str
    expected: Expected | None
    unpublished: str
    downloads: tuple[Download, ...]
    settings: tuple[Setting, ...]
    differences: tuple[str, ...]
    hardware: str

    def plan(self) -> list[str]:
        """Lines for people: expected number, downloads, settings with sources, differences, hardware."""
        lines = [f"{self.name}: {self.title}"]
        if number := self.expected:
            lines.append(f"expected: {number.metric} {number.value:g} {number.unit}; source: {number.source}")
            lines.append(f"tolerance: {number.tolerance:g}; {number.why}")
        else:
            lines.append(f"expected: no published number; {self.unpublished}")
        for one in self.downloads:
            facts = f"{one.what}, {one.address} ({one.size}; {one.licence})"
            lines.append(f"download for {one.option}: {facts}: {one.command}")
        width = max(len(row.name) for row in self.settings)
        lines += [f"setting {row.name:{width}}  {row.value}  [{row.source}]" for row in self.settings]
        lines += [f"difference: {text}" for text in self.differences]
        return [*lines, f"hardware: {self.hardware}"]

    def require(self, given: Mapping[str, Path | None]) -> None:
        """Check that the files are there; given: path by option.

        Raises UserError: some are not; the message names each download and its address.
        """
        missing = [one for one in self.downloads if (path := given[one.option]) is None or not path.exists()]
        if missing:
            places = ", ".join(f"{one.option} ({given[one.option] or 'not given'})" for one in missing)
            commands = "; ".join(one.command for one in missing)
            raise UserError(f"{self.name} needs files that are not there: {places}; download them: {commands}")

    def result(self, value: float | None, deviations: Sequence[str], evidence: Mapping[str, Any]) -> dict[str, Any]:
        """Content of result.json.

        value: of the expected metric, if a number is expected. deviations: of this run from the protocol.
        """
        content: dict[str, Any] = {"target": self.name, "version": __version__, "deviations": list(deviations)}
        content |= {"settings": [asdict(row) for row in self.settings], "differences": list(self.differences)}
        if number := self.expected:
            difference = value - number.value
            within = abs(difference) <= number.tolerance
            verdict = NO_VERDICT if deviations else REPRODUCED if within else NOT_REPRODUCED
            content |= {"value": value, "difference": difference, "verdict": verdict, "expected": asdict(number)}
        return content | dict(evidence)

    def verdict_text(self, content: Mapping[str, Any]) -> str:
        """Value, expected value, difference and verdict of a result with an expected number, in one line."""
        number = self.expected
        assert number is not None
        compared = f"{number.metric} {content['value']:.2f} {number.unit}, published {number.value:g}"
        compared += f", difference {content['difference']:+.2f}, tolerance {number.tolerance:g}"
        why = f" (not the protocol: {'; '.join(content['deviations'])})" if content["deviations"] else ""
        return f"{self.name}: {compared}: {content['verdict']}{why}"


def new_folder(out: Path | None, target: str) -> Path:
    """The folder of a result, which is not there yet. Raises UserError: it is."""
    out = out or FOLDER / target
    if out.exists():
        raise UserError(f"{out} exists; give another folder as --out, or remove it")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    return out

"""A small project: the real settings at smoke size, and a few curated clips of the pocket data."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import yaml

from scaling4d import config

ROOT = Path(__file__).parents[1]
XFORMERS_OPS = "def memory_efficient_attention(q, k, v, attn_bias, scale): return q + 1"
XFORMERS_MASK = """
class BlockDiagonalMask:
    from_seqlens = staticmethod(lambda *lengths: lengths)
"""
XFORMERS_FMHA = '''
import torch
from types import SimpleNamespace as Inputs

dispatched = []

def _dispatch_fw(inputs, needs_gradient):
    dispatched.append(inputs)
    if inputs.query.shape[-1] > 64 or inputs.query.dtype != torch.float32:
        raise NotImplementedError("""No operator found for `forward` with inputs:
     query       : shape=(1, 16)
`cutlassF` is not supported because:
    it is made up""")
    return Inputs(NAME="cutlassF", VARLEN_LSE_PACKED=True)

def _dispatch_bw(inputs, varlen_lse_packed): ...
'''

os.environ["OMP_NUM_THREADS"] = "1"  # beside other tests, threads that wait for each other took 50 times as long


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The story, which takes longest, comes first: the other processes then do the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_story.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-processes", action="store_true", help="a test that starts another process fails (make quick)")


@pytest.fixture(scope="session", autouse=True)
def no_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a quick test starts a process; mark it `integration`")

    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--no-processes"):
            for owner, name in ((subprocess.Popen, "__init__"), (BaseProcess, "start"), (os, "fork")):
                patch.setattr(owner, name, refuse)
        yield


@pytest.fixture
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project itself as the current folder."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Whether xformers works is asked again, in the test and after it."""
    from scaling4d.mae.attention import _warn, xformers_kernel, xformers_problem

    for answer in (cached := (xformers_problem, xformers_kernel, _warn)):
        answer.cache_clear()
    yield
    for answer in cached:
        answer.cache_clear()


@pytest.fixture
def make_xformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes up a package xformers, with kernels for heads of up to 64 in float32; its attention is q + 1.

    Argument: a first statement of its `__init__.py`.
    """
    former = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "xformers"}

    def make(first: str = "") -> None:
        files = {"__init__.py": first, "_cpp_lib.py": "_cpp_library_load_exception = None", "ops/__init__.py": XFORMERS_OPS}
        files |= {"ops/fmha/__init__.py": XFORMERS_FMHA, "ops/fmha/attn_bias.py": XFORMERS_MASK}
        for name, text in files.items():
            (path := tmp_path / "made_up/xformers" / name).parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path / "made_up")

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        del sys.modules[name]
    sys.modules |= former


@pytest.fixture(scope="session")
def curated_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with experiments/, params.yaml of profile smoke, and artifacts/smoke/clips of two dozen videos."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    for path in sorted((ROOT / "experiments/pocket/videos/phone").glob("*.mp4"))[:24]:
        (folder / "data/videos").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "data/videos")
    with contextlib.chdir(folder):
        from scaling4d.clips import stage

        curation = ("clips.Curation.listed=''", "clips.Curation.val_share=0.3", "clips.Workers.processes=1")
        config.write(["profile=smoke", *curation, "pretrain.Training.probe_tasks=[]"])
        stage.clips(config.read())
    return folder


@pytest.fixture
def project(curated_project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The small project as the current folder, with its settings as composed."""
    monkeypatch.chdir(curated_project)
    before = config.PARAMS.read_text()
    yield curated_project
    config.PARAMS.write_text(before)


@pytest.fixture
def changed(project: Path) -> Callable[[str, object], dict]:
    """Changes one value of the project's params.yaml and gives the settings back."""

    def change(key: str, value: object) -> dict:
        settings = config.read()
        *path, last = key.split(".")
        inner = settings
        for word in path:
            inner = inner[word]
        inner[last] = value
        config.PARAMS.write_text(yaml.safe_dump(settings))
        return settings

    return change


@pytest.fixture
def actions(project: Path) -> Iterator[None]:
    """Something-Something in small: eight videos to train on, eight to measure, brighter or darker as time goes by."""
    from scaling4d.benchmarks import ssv2
    from scaling4d.records import Sample

    templates = [f"Doing {letter} to [something]" for letter in "abcdefgh"]
    ramp = np.linspace(0, 255, 20).astype(np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
    for split in ("train", "val"):
        samples = [Sample(f"{split}{n}", f"{split}{n}", ramp[:: 1 - n % 2 * 2], {"action": np.int64(n % 8)}) for n in range(8)]
        ssv2.write(project / "data/benchmarks/ssv2", split, samples, templates=templates, rate_hz=8.0, crf=30, gop=8)
    yield
    shutil.rmtree(project / "data/benchmarks")


@pytest.fixture
def agree(record_property: Callable[[str, object], None]) -> Callable[[str, float, float], None]:
    """Notes an error beside its tolerance, for the table at the end, and fails above it."""

    def note(what: str, error: float, tolerance: float) -> None:
        record_property(PARITY, [what, f"{error:.1e}", f"{tolerance:.0e}"])
        assert error < tolerance, f"{what}: error {error:.1e}, tolerance {tolerance:.0e}"

    return note


@pytest.fixture
def endures(record_property: Callable[[str, object], None]) -> Callable[..., Counter]:
    """As `damage.endure`, without any other outcome; the counts go to the table at the end."""
    import damage

    def check(name: str, paths: Sequence[Path], read: Callable[[Path], str | None], copies: int) -> Counter:
        counts = damage.endure(name, paths, read, copies)
        record_property(DAMAGE, counts.row(name))
        if counts.problems:
            pytest.fail("\n".join(f"{len(some)} of {copies}: {place}: {some[0]}" for place, some in counts.problems.items()))
        return counts.outcomes

    return check


PARITY, DAMAGE = "agreement with the official code", "damaged inputs"
HEADS = {  # of the tables at the end
    PARITY: ["fixture", "max error", "tolerance"],
    DAMAGE: ["reader", "inputs", "refused", "skipped sample", "accepted", "other", "slowest s", "peak MB"],
}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    for name, head in HEADS.items():
        rows = [row for report in reports for key, row in getattr(report, "user_properties", ()) if key == name]
        if not rows:
            continue
        if name == DAMAGE:
            rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:6]), "", ""])
        terminalreporter.section(name)
        widths = [max(len(str(cell)) for cell in column) for column in zip(head, *rows, strict=True)]
        for first, *cells in [head, *rows]:
            numbers = (f"{cell!s:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            terminalreporter.line("  ".join([f"{first:{widths[0]}}", *numbers]))

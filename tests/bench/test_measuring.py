"""Turns, medians and memory: the part that every bench shares."""

import json
import subprocess
import sys

import pytest

from scaling4d_bench import measure
from scaling4d_bench.measure import Contestant, Memory, Raw


def test_contestants_take_turns_and_the_first_call_does_not_count() -> None:
    called = []

    def work(name: str, seconds: float):
        return lambda: called.append(name) or seconds

    raw = measure.race([Contestant("a", work("a", 1.0), 1), Contestant("b", work("b", 2.0), 1)], repeats=3)
    assert raw.seconds == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert {name: len(cpu_s) for name, cpu_s in raw.cpu_s.items()} == {"a": 3, "b": 3}
    assert called == [*"ab", *"ab", *"ba", *"ab"]


def test_rates_and_ratios_come_from_medians() -> None:
    contestants = [Contestant("ours", lambda: 0.0, 10), Contestant("four at once", lambda: 0.0, 40)]
    seconds = {"ours": [1.0, 2.0, 3.0, 4.0, 90.0], "four at once": [2.0, 4.0, 4.0, 4.0, 5.0]}
    raw = Raw(seconds, {"ours": [5.0] * 5, "four at once": [8.0] * 5})
    ours, four = measure.rows(contestants, raw, ours="ours")
    assert ours == {"name": "ours", "per_s": 10 / 3, "per_s_low": 10 / 4, "per_s_high": 10 / 2, "over_ours": 1.0, "cpu_s": 0.5}
    assert (four["per_s"], four["over_ours"], four["cpu_s"]) == (10.0, 3.0, 0.2)


@pytest.mark.parametrize("error", [ImportError("No module named 'x'"), OSError("libx.so is missing\nTraceback"), RuntimeError()])
def test_a_peer_that_cannot_be_loaded_is_named_with_the_reason(error, capsys) -> None:
    def make():
        raise error

    made, missing = measure.available({"x": make, "y": lambda: 1})
    assert made == {"y": 1}
    measure.show_missing(missing)
    reason = str(error).replace("\n", " ") or "RuntimeError"
    assert capsys.readouterr().out == f"x: not measured ({reason})\n"


def test_the_json_says_on_what_and_how_it_was_measured(tmp_path) -> None:
    path = measure.write(
        "x", tmp_path / "new", settings={"n": 1}, libraries=measure.versions(["numpy", "no such"]), raw={"a": [1.0]}, found={},
        not_measured={"b": "why"},
    )  # fmt: skip
    told = json.loads(path.read_text())
    assert set(told["versions"]) == {"python", "numpy"}
    assert set(told["machine"]) == {"cpu", "cores", "system"}
    assert (told["raw"], told["settings"], told["not_measured"]) == ({"a": [1.0]}, {"n": 1}, {"b": "why"})
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_memory_of_processes_below_counts() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(64 << 20); input()'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    with measure.memory(process.pid, every_s=0.02) as samples:
        while not samples or samples[-1].peak_below < 64 << 20:
            assert process.poll() is None
        process.communicate(b"\n")
    assert samples[-1].peak_main < 64 << 20 <= samples[-1].peak_below


def test_growth_is_the_slope_of_a_line() -> None:
    samples = [Memory(10.0 + 30 * n, 1000 + 50 * n, 0, 0) for n in range(4)]
    assert measure.slope_per_minute(samples) == pytest.approx(100)


def test_how_many_times_as_fast_is_told_of_turns_that_follow_one_another() -> None:
    raw = Raw({"ours": [1.0, 2.0, 4.0], "peer": [2.0, 6.0, 8.0]}, {})
    assert measure.times_as_fast(raw, "ours", "peer") == {"median": 2.0, "low": 2.0, "high": 2.5}

"""Turns, medians, tables and memory: the part that all benchmarks share."""

import json
import subprocess
import sys

import pytest

from scaling4d_bench import measure
from scaling4d_bench.measure import Measurements, Timings


def test_workloads_take_turns_and_the_first_call_does_not_count() -> None:
    called = []

    def work(name: str, seconds: float):
        return lambda: called.append(name) or seconds

    timings = measure.take_turns({"a": work("a", 1.0), "b": work("b", 2.0)}, repeats=3)
    assert timings.seconds == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert {name: len(cpu_s) for name, cpu_s in timings.cpu_s.items()} == {"a": 3, "b": 3}
    assert called == [*"ab", *"ab", *"ba", *"ab"]


def test_rates_and_ratios_come_from_medians() -> None:
    seconds = {"ours": [1.0, 2.0, 3.0, 4.0, 90.0], "four at once": [2.0, 4.0, 4.0, 4.0, 5.0]}
    timings = Timings(seconds, {"ours": [5.0] * 5, "four at once": [8.0] * 5})
    ours, four = measure.throughput(timings, {"ours": 10, "four at once": 40})
    assert ours == {"name": "ours", "per_s": 10 / 3, "per_s_low": 10 / 4, "per_s_high": 10 / 2, "over_ours": 1.0, "cpu_s": 0.5}
    assert (four["per_s"], four["over_ours"], four["cpu_s"]) == (10.0, 3.0, 0.2)
    timings = Timings({"ours": [1.0, 2.0, 4.0], "peer": [2.0, 6.0, 8.0]}, {})
    assert measure.speedup(timings, "ours", "peer") == {"median": 2.0, "low": 2.0, "high": 2.5}  # of one repeat each


@pytest.mark.parametrize("error", [ImportError("No module named 'x'"), OSError("libx.so is missing\nTraceback"), RuntimeError()])
def test_a_peer_that_cannot_be_loaded_is_named_with_the_reason(error: Exception, tmp_path, capsys) -> None:
    def load() -> int:
        raise error

    measurements = Measurements("all", {}, [])
    assert measurements.load({"x": load, "y": lambda: 1}) == {"y": 1}
    path, reason = measurements.write(tmp_path), str(error).replace("\n", " ") or "RuntimeError"
    assert capsys.readouterr().out.endswith(f"x: not measured ({reason})\n")
    assert json.loads(path.read_text())["not_measured"] == {"x": reason}


def test_the_json_names_machine_versions_settings_and_every_time(tmp_path) -> None:
    measurements = Measurements("x", {"n": 1, "device": "A GPU"}, ["numpy", "no such"])
    measurements.raw["a"] = Timings({"ours": [1.0]}, {"ours": [2.0]})
    path = measurements.write(tmp_path / "new")
    content = json.loads(path.read_text())
    assert set(content["versions"]) == {"python", "numpy"}
    assert set(content["machine"]) == {"cpu", "cores", "system"}
    assert content["raw"] == {"a": {"seconds": {"ours": [1.0]}, "cpu_s": {"ours": [2.0]}}}
    assert content["settings"].keys() == {"n", "device", "seed", "load_before"}
    assert content["bench"] == "x-a-gpu" and [file.name for file in path.parent.iterdir()] == ["x-a-gpu.json"]


def test_a_cell_without_a_value_stays_empty(capsys) -> None:
    measure.table("title", [{"name": "a", "x": {"y z": 0.5}}, {"name": "b"}], {"": "{name}", "of": "{x[y z]:.0%}"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "title" and lines[-3:-1] == ["│ a │ 50% │", "│ b │     │"]


@pytest.mark.integration
def test_memory_of_processes_below_counts() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(64 << 20); input()'])"
    process, memory = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE), {}
    while not any(peak > 64 << 20 for _, peak in memory.values()):
        assert process.poll() is None
        memory = measure.process_memory(process.pid)
    process.communicate(b"\n")
    (_, peak_main), (now, peak_child) = memory.pop(process.pid), *memory.values()
    assert peak_main < 64 << 20 < peak_child and 32 << 20 < now <= peak_child

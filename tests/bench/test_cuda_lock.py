"""The CUDA lock, without a GPU: do its wheels fit each other, and which attention kernels do they bring?

tests/fixtures/cuda_wheels.json is what `python -m scaling4d_bench.cuda_wheels` read from the wheels.
"""

import json
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from scaling4d_bench import cuda_wheels

ROOT = Path(__file__).parents[2]
CPU_LOCK, CUDA_LOCK = cuda_wheels.LOCKS
TABLE = json.loads((ROOT / "tests/fixtures/cuda_wheels.json").read_text())


def pins(lock: str) -> dict[str, str]:
    lines = (line.split("==") for line in (ROOT / lock).read_text().splitlines() if "==" in line)
    return {canonicalize_name(name): version for name, version in lines}


def wheels(lock: str) -> dict[str, dict]:
    """Name -> entry of the table."""
    return {canonicalize_name(entry["name"]): entry for entry in map(TABLE["wheels"].get, TABLE["locks"][lock]["wheels"])}


def test_the_cuda_lock_changes_only_torch_and_what_it_needs() -> None:
    cpu, cuda = pins(CPU_LOCK), pins(CUDA_LOCK)
    assert {name for name in cpu if cuda.get(name) != cpu[name]} == {"torch", "torchvision"}
    assert all(re.match("(nvidia|cuda|triton)", name) for name in cuda.keys() - cpu.keys())


@pytest.mark.parametrize("lock", cuda_wheels.LOCKS)
def test_the_table_of_wheels_is_of_the_lock(lock: str) -> None:
    pinned = pins(lock)
    versions = {name: wheel["version"] for name, wheel in wheels(lock).items()}
    unpinned = {name for name in versions if name not in pinned}
    assert {name: pinned[name] for name in versions.keys() - unpinned} == {
        name: versions[name] for name in versions.keys() - unpinned
    }
    assert unpinned == set() or lock == CPU_LOCK  # of CUDA 13, which nothing pins
    assert all(re.fullmatch("[0-9a-f]{64}", wheel["sha256"]) for wheel in wheels(lock).values())
    assert {name for name in pinned if re.match("(nvidia|cuda|triton)", name)} <= versions.keys()


def test_the_wheels_of_the_cuda_lock_fit_each_other() -> None:
    assert cuda_wheels.problems(TABLE, CUDA_LOCK) == []


def test_the_wheels_of_the_cpu_lock_do_not() -> None:
    problems = cuda_wheels.problems(TABLE, CPU_LOCK)
    assert "xformers/_C.so needs libcudart.so.12, which no wheel provides" in problems
    assert "xformers is built for torch 2.10.0+cu128; the lock has 2.13.0" in problems


def test_a_library_is_looked_for_in_the_run_path_and_among_those_that_torch_loads() -> None:
    def library(*needs: str, soname: str = "", run_path: tuple[str, ...] = ()) -> dict:
        return {"needs": [*needs, "libc.so.6"], "soname": soname, "run_path": list(run_path)}

    libraries = {
        "torch/lib/libtorch.so": library("libcudart.so.12", run_path=("./../../nvidia/lib",)),
        "nvidia/lib/libcudart.so.12": library(soname="libcudart.so.12"),
        "nvidia/lib/libplugin.so": library("libibverbs.so.1"),
        "xformers/_C.so": library("libcudart.so.12", "libtorch.so"),
    }
    assert cuda_wheels.missing_libraries(libraries) == []
    libraries["torch/lib/libtorch.so"]["run_path"] = []
    assert [path for path, _ in cuda_wheels.missing_libraries(libraries)] == ["torch/lib/libtorch.so", "xformers/_C.so"]


@pytest.mark.skipif(sys.platform != "linux", reason="xformers is installed on Linux alone")
def test_the_reader_finds_in_the_installed_library_what_the_table_has() -> None:
    library, _, undefined = cuda_wheels.read_library(Path(distribution("xformers").locate_file("xformers/_C.so")))
    assert library == wheels(CUDA_LOCK)["xformers"]["libraries"]["xformers/_C.so"]
    assert any("c10" in symbol for symbol in undefined) and "malloc" not in undefined


@pytest.mark.integration
def test_every_point_and_readout_has_attention_kernels_on_a100_and_h100() -> None:
    command = [sys.executable, "-m", "scaling4d_bench.cuda_kernels"]
    rows = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    torch = wheels(CUDA_LOCK)["torch"]
    of = {row["size"]: row["of"] for row in rows}
    assert {64, 80, 104, 112, 128} <= of.keys()
    readouts = {"paper/boxes": {256}, "paper/depth": {64}, "paper/points": {128}, "mae_st/actions": {8, 11, 12}}
    assert {name: {size for size in of if name in of[size]} for name in readouts} == readouts
    assert {"sm_80", "sm_90"} <= set(torch["architectures"])
    for row in rows:
        chosen, size = (row["forward"], row["backward"]), row["padded"]
        if row["compute"] == "bfloat16":
            assert chosen == ("fa2F", "fa2B"), row
            assert all(any(size <= built for built in torch["kernels"]["flash"][f"{way}_bf16"]) for way in ("fwd", "bwd")), row
        else:
            assert chosen == ("cutlassF-pt", "cutlassB-pt"), row
            backward = [re.search(r"B_f32_aligned_\w+_k(\d+)_sm80", name) for name in torch["kernels"]["efficient"]]
            assert any(size <= int(match[1]) for match in backward if match), row
            forward = "64x128_rf" if size <= 128 else "32x128_gmem"
            assert f"fmha_cutlassF_f32_aligned_{forward}_sm80" in torch["kernels"]["efficient"], row

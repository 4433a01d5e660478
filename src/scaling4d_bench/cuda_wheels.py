"""Whether the CUDA wheels of a lock fit each other: libraries, symbols, and the torch that xformers was built for.

`python -m scaling4d_bench.cuda_wheels > tests/fixtures/cuda_wheels.json` downloads the wheels of both locks (8 GB) and
writes the table that the tests check. No GPU and no torch is needed.
"""

import hashlib
import json
import os
import posixpath
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Table = Mapping[str, Any]  # {"python", "locks": {lock: {"wheels": [...], "unresolved": {...}}}, "wheels": {file: {...}}}
Libraries = Mapping[str, Mapping[str, Any]]  # path -> {"needs", "soname", "run_path"}

LOCKS = ("requirements.lock", "requirements-cuda.lock")
PYTHON = "3.12"
LOADED_BY_PYTHON = ("torch", "torchvision", "xformers")  # importing these loads their libraries
GLIBC = [*(f"manylinux_2_{minor}_x86_64" for minor in range(5, 32)), *(f"manylinux{year}_x86_64" for year in (1, 2010, 2014))]
SYSTEM = {f"lib{name}" for name in ("c.so.6", "m.so.6", "dl.so.2", "rt.so.1", "pthread.so.0", "util.so.1", "gcc_s.so.1")}
SYSTEM |= {"libstdc++.so.6", "ld-linux-x86-64.so.2", "libcuda.so.1", "libnvidia-ml.so.1"}  # the last two: NVIDIA's driver
FLASH = re.compile(r"run_mha_(fwd|bwd)_IN7cutlass(?:10(b)float16|6half)_tELi(\d+)ELb0E")  # mangled; without a causal mask
EFFICIENT = re.compile(r"^_Z\d+(fmha_cutlass[FB]_(?:bf16|f16|f32)_aligned_\w+?_sm80)N")
ARCHITECTURES = re.compile(rb"sm_\d+(?: (?:sm|compute)_\d+)+")


def problems(table: Table, lock: str) -> list[str]:
    """Why the wheels of a lock do not fit, a line each; none if they fit."""
    wheels = {file: table["wheels"][file] for file in table["locks"][lock]["wheels"]}
    libraries = {path: library for wheel in wheels.values() for path, library in wheel["libraries"].items()}
    missing = [f"{path} needs {name}, which no wheel provides" for path, name in missing_libraries(libraries)]
    unresolved = table["locks"][lock]["unresolved"]
    symbols = [f"{path}: {len(names)} symbols are in no library, as {names[0]}" for path, names in unresolved.items() if names]
    (torch,) = (wheel["version"] for wheel in wheels.values() if wheel["name"] == "torch")
    (built,) = (wheel["built_for"] for wheel in wheels.values() if wheel["name"] == "xformers")
    other = f"xformers is built for torch {built['torch']}; the lock has {torch}"
    return missing + symbols + ([] if built["torch"].split("+")[0] == torch else [other])


def missing_libraries(libraries: Libraries) -> list[tuple[str, str]]:
    """Path of a library below site-packages, name that it needs, where the dynamic loader does not come upon that name.

    The loader looks in the library's own run path, and then among the libraries that `import torch` has loaded.
    A library that only a plugin needs (of nvshmem, cufile) does not count: nothing that Python loads needs the plugin.
    """
    torch, _ = _load(libraries, [path for path in libraries if path.startswith("torch/")], set())
    loaded = {name for path in torch for name in (posixpath.basename(path), libraries[path]["soname"])}
    roots = [path for path in libraries if path.split("/")[0] in LOADED_BY_PYTHON]
    return sorted(_load(libraries, roots, loaded)[1])


def _load(libraries: Libraries, roots: list[str], loaded: set[str]) -> tuple[set[str], set[tuple[str, str]]]:
    """Paths of all libraries that the roots load, and the names that are missing."""
    waiting, paths, wanting = list(roots), set(), []
    while waiting:
        path = waiting.pop()
        if path in paths:
            continue
        paths.add(path)
        for name in libraries[path]["needs"]:
            folders = (posixpath.join(posixpath.dirname(path), place) for place in libraries[path]["run_path"])
            places = (posixpath.normpath(posixpath.join(folder, name)) for folder in folders)
            if beside := [place for place in places if place in libraries]:
                waiting.append(beside[0])
            else:
                wanting.append((path, name))
    loaded = loaded | {name for path in paths for name in (posixpath.basename(path), libraries[path]["soname"])}
    return paths, {(path, name) for path, name in wanting if name not in loaded | SYSTEM}


def read_library(path: Path) -> tuple[dict[str, Any], set[str], set[str]]:
    """Of an ELF file: its dynamic section, the symbols that it defines, and those that another library must define.

    Symbols with a version (of libc, libstdc++) or of Python, and weak ones, are left out of the latter.
    """
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        elf = ELFFile(file)
        dynamic, symbols = elf.get_section_by_name(".dynamic"), elf.get_section_by_name(".dynsym")
        tags = list(dynamic.iter_tags()) if dynamic else []
        places = ":".join(
            tag.rpath if tag.entry.d_tag == "DT_RPATH" else tag.runpath for tag in tags if "PATH" in str(tag.entry.d_tag)
        )
        library = {
            "needs": [tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"],
            "soname": next((tag.soname for tag in tags if tag.entry.d_tag == "DT_SONAME"), path.name),
            "run_path": [place.replace("$ORIGIN", ".") for place in places.split(":") if place.startswith("$ORIGIN")],
        }
        defined, undefined, versions = set(), set(), elf.get_section_by_name(".gnu.version")
        for index, symbol in enumerate(symbols.iter_symbols() if symbols else ()):
            versioned = versions and versions.get_symbol(index).entry.ndx not in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")
            if symbol.entry.st_shndx != "SHN_UNDEF":
                defined.add(symbol.name)
            elif symbol.entry.st_info.bind == "STB_GLOBAL" and not versioned and not symbol.name.startswith(("Py", "_Py")):
                undefined.add(symbol.name)
    return library, defined, undefined


def read_wheel(path: Path) -> tuple[dict[str, Any], set[str], dict[str, set[str]]]:
    """Entry of the table, the symbols that the wheel's libraries define, and library -> symbols that they do not."""
    name, version = path.name.split("-")[:2]
    with path.open("rb") as file:
        content = {"name": name, "version": version, "sha256": hashlib.file_digest(file, "sha256").hexdigest(), "libraries": {}}
    defined, undefined = set(), {}
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        for member in sorted(wheel.namelist()):
            if member == "xformers/cpp_lib.json":
                content["built_for"] = json.loads(wheel.read(member))["version"]
            if ".so" not in posixpath.basename(member) or wheel.open(member).read(4) != b"\x7fELF":
                continue
            extracted = Path(wheel.extract(member, folder))
            content["libraries"][member], here, elsewhere = read_library(extracted)
            defined |= here
            undefined[member] = elsewhere
            if posixpath.basename(member) == "libtorch_cuda.so":
                content["kernels"] = attention_kernels(here)
            if posixpath.basename(member) == "libtorch_python.so":
                content["architectures"] = ARCHITECTURES.search(extracted.read_bytes())[0].decode().split()
            extracted.unlink()
    return content, defined, undefined


def attention_kernels(symbols: set[str]) -> dict[str, Any]:
    """Of libtorch_cuda.so: head sizes of flash attention's kernels; names of the memory-efficient ones for sm80."""
    flash, efficient = {}, set()
    for symbol in symbols:
        if match := FLASH.search(symbol):
            direction, bfloat16, size = match.groups()
            flash.setdefault(f"{direction}_{'bf16' if bfloat16 else 'f16'}", set()).add(int(size))
        if match := EFFICIENT.search(symbol):
            efficient.add(match[1])
    return {"flash": {name: sorted(sizes) for name, sizes in sorted(flash.items())}, "efficient": sorted(efficient)}


def download(lock: str, folder: Path) -> list[Path]:
    """torch, torchvision, xformers and their requirements, as the package index has them for Linux with CUDA."""
    platforms = [word for platform in GLIBC for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "-q", "-c", lock, "-d", str(folder), "--only-binary=:all:"]
    unchanged = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}  # no CPU build of torch from this machine
    subprocess.run([*command, "--python-version", PYTHON, *platforms, *LOADED_BY_PYTHON], check=True, env=unchanged)
    return sorted(folder.glob("*.whl"))


def table(locks: tuple[str, ...] = LOCKS) -> Table:
    content = {"python": PYTHON, "locks": {}, "wheels": {}}
    for lock in locks:
        with tempfile.TemporaryDirectory() as folder:
            read = {path.name: read_wheel(path) for path in download(lock, Path(folder))}
        defined = set().union(*(symbols for _, symbols, _ in read.values()))
        unresolved = {
            path: sorted(symbols - defined)
            for entry, _, libraries in read.values()
            if entry["name"] in ("torchvision", "xformers")
            for path, symbols in libraries.items()
        }
        content["locks"][lock] = {"wheels": list(read), "unresolved": unresolved}
        content["wheels"] |= {file: entry for file, (entry, _, _) in read.items()}
    return content


if __name__ == "__main__":
    print(json.dumps(table(), indent=1, sort_keys=True))

"""Commands as a user types them: in a temporary clone of the project, or in this process."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from typer.testing import CliRunner, Result

from scaling4d import cli
from scaling4d.records import UserError

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": "src"}
ENVIRONMENT.pop("OMP_NUM_THREADS", None)  # which the tests set: a user has as many as there are cores, and stages pin theirs


def invoke(*words: object) -> Result:
    """`scaling4d WORDS` in this process."""
    return CliRunner().invoke(cli.app, [*map(str, words)])


def refused_command(*words: object) -> str:
    """The error of `scaling4d WORDS` in this process."""
    result = invoke(*words)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def cloned(folder: Path, wanted: Callable[[str], bool] = lambda _: True) -> Path:
    """The project's files, those that are wanted, in a repository of their own; nothing is committed yet."""
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in files.stdout.splitlines():
        if wanted(name) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    run(folder, "git", "init", "-q")
    for key, value in (("user.name", "reader"), ("user.email", "reader@example.org")):
        run(folder, "git", "config", key, value)
    return folder


def git(*words: str) -> str:
    """In the current folder, as an author that its configuration need not name."""
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True).stdout


def commit_here(message: str = "state", *paths: str) -> str:
    """Commit everything, or these paths, of the current folder, a repository from now on. Returns the hash."""
    git("init", "-q")
    git("add", "-A", *paths)
    git("commit", "-qm", message)
    return git("rev-parse", "HEAD").strip()


def commit(clone: Path) -> None:
    run(clone, "git", "add", "-A")
    run(clone, "git", "commit", "-q", "--allow-empty", "-m", "state")


def run(clone: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess:
    """With this Python's programs first and the clone's own code; a failure shows the end of what was printed."""
    done = subprocess.run(command, cwd=clone, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def run_limited(clone: Path, *command: str, most_bytes: int) -> subprocess.CompletedProcess:
    """As `run`, but no file may become larger than so many bytes, as on a full disk."""
    limit = (most_bytes, most_bytes)
    return subprocess.run(
        command,
        cwd=clone,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )


def run_killed(clone: Path, *command: str, after_s: float, group: bool) -> bool:
    """Kill a command, or it and all that it started; return when nothing of it is at work. Whether it was killed."""
    mark = f"{time.time_ns()}"
    with (clone / ".killed.log").open("w") as log:
        environment = ENVIRONMENT | {"KILLED": mark}
        process = subprocess.Popen(command, cwd=clone, env=environment, stdout=log, stderr=log, start_new_session=True)
        with suppress(subprocess.TimeoutExpired):
            process.wait(after_s)
        killed = process.poll() is None
        if group and killed:
            os.killpg(process.pid, signal.SIGKILL)
        elif killed:
            process.kill()
        process.wait()
    (clone / ".killed.log").unlink()
    until = time.monotonic() + 30
    while left := _processes_with(mark):
        assert time.monotonic() < until, f"{' '.join(command)} was killed after {after_s:.2f} s, and still at work: {left}"
        time.sleep(0.1)
    return killed


def _processes_with(mark: str) -> list[str]:
    names = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("KILLED") == mark and process.status() != psutil.STATUS_ZOMBIE:
                names.append(" ".join(process.cmdline()))
    return names

"""Messages: one line each, whatever names of files they hold, and near words for an unknown one."""

import sys
from pathlib import Path

import pytest

from scaling4d import cli, config
from scaling4d.audit.run import WRONG, AuditFinding
from scaling4d.records import did_you_mean, on_one_line

NAME = "a\x1b[2J\nerror: b\x9b\r\u2028\u202e\udcff ü"  # clears the screen, begins a line, turns text around; not UTF-8
SHOWN = r"a\x1b[2J\nerror: b\x9b\r\u2028\u202e\xff ü"


def test_no_character_of_a_name_acts_on_a_terminal() -> None:
    assert on_one_line(NAME) == SHOWN
    assert on_one_line(Path("plain/name 1.mp4")) == "plain/name 1.mp4"
    assert str(AuditFinding(WRONG, NAME, "is gone", (NAME,))).splitlines() == [f"{WRONG:<12}{SHOWN}: is gone", f"{'':<14}{SHOWN}"]


def test_the_command_line_prints_an_error_and_problems_on_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / NAME
    monkeypatch.setattr(sys, "argv", ["scaling4d", "data", "check", str(folder)])
    with pytest.raises(SystemExit, match="^1$"):
        cli.main()
    needed = "needed a folder of videos, or one with videos/, benchmarks/ or both"
    assert capsys.readouterr().err == f"error: no folder {tmp_path}/{SHOWN}; {needed}\n"
    (folder / "videos").mkdir(parents=True)
    (folder / "videos" / f"{NAME}.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit, match="^0$"):
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith(f"{tmp_path}/{SHOWN}: 0 files"), lines
    assert lines[2].startswith(r"problem: videos/a\x1b[2J\nerror: b"), lines


def test_ctrl_c_ends_a_command_with_exit_code_130_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "read", interrupted)
    monkeypatch.setattr(sys, "argv", ["scaling4d", "table"])
    with pytest.raises(SystemExit, match="^130$"):
        cli.main()
    assert capsys.readouterr() == ("", "")


def test_a_near_word_is_suggested_and_a_far_or_known_one_is_not() -> None:
    known = ["random", "tube", "frame"]
    assert did_you_mean("randm", known) == "; did you mean random?"
    assert did_you_mean("xyz", known) == did_you_mean("tube", known) == did_you_mean(7, known) == ""

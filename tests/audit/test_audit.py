import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from commands import commit_here
from damage import ACCEPTED, REFUSED, SIZES, files_below

from scaling4d import artifacts, audit, cli, config, provenance
from scaling4d.audit.run import locked_run
from scaling4d.pipeline import code_hashes
from scaling4d.records import UserError

pytestmark = pytest.mark.integration

Flip = Callable[[str, str, str], None]
Rewrite = Callable[..., None]
Messages = Callable[[str], list[str]]
Wrong = Callable[[], str]
NANO, MINI = (f"artifacts/test/readout/{point}/actions/frozen/result.json" for point in ("nano", "mini"))
PRETRAINED, READ_OUT = Path("artifacts/test/pretrain/nano"), Path(NANO).parent


def test_an_untouched_project_has_nothing_wrong(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert audit.check() == 0
    counts = r"0 wrong; checked ([\d,]+) hashes, [1-9][\d,]* settings, [1-9][\d,]* numbers\n"
    text = re.fullmatch(counts, capsys.readouterr().out)
    assert text and int(text[1].replace(",", "")) == len(locked_run().locked_files)


def test_a_name_that_is_not_utf_8_is_told_and_does_not_end_the_audit(project: Path) -> None:
    shutil.copy(SHARD, os.fsdecode(f"{Path(SHARD).parent}/".encode() + b"\xff.tar"))
    done = subprocess.run([sys.executable, "-m", "scaling4d", "audit"], capture_output=True, check=False)
    assert done.returncode == 1 and b"differing files: shards/\\xff.tar" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(b"1 wrong; checked ") and not done.stderr


# ---- one byte ----


SHARD, WEIGHTS = "artifacts/test/clips/shards/train-00000.tar", f"{PRETRAINED}/model.safetensors"
VIDEO, BENCHMARK = "data/videos/a.mp4", "data/benchmarks/ssv2/list.json"


@pytest.mark.parametrize(("path", "old", "new", "where", "name", "ways", "others"), [
    (SHARD, "clips", "clipz", "artifacts/test/clips", "shards/train-00000.tar", ["pretrain", "pretrain -> readout"], "test:"),
    (WEIGHTS, "weights", "weighTs", str(PRETRAINED), "model.safetensors", ["readout"], "mini"),
    (VIDEO, "as it was", "as it is ", "data/videos", "a.mp4", ["clips -> pretrain", "clips -> pretrain -> readout"], "data:"),
    (BENCHMARK, "as it was", "as it is ", "data/benchmarks", "ssv2/list.json", ["benchmarks -> readout"], "/pretrain"),
])  # fmt: skip
def test_one_byte_is_named_with_every_result_that_it_affects_and_nothing_else(
    flip: Flip, wrong: Wrong, path: str, old: str, new: str, where: str, name: str, ways: list[str], others: str
) -> None:
    flip(path, old, new)
    text = wrong()
    assert f"wrong       {where}: md5 " in text and f"differing files: {name}" in text and others not in text
    assert text.count("wrong ") == 1  # a folder around the file and a file that follows from it are not named again
    assert [line.strip().partition(f"{path} -> ")[2].rpartition(" -> ")[0] for line in text.splitlines()[1:]] == ways
    assert text.splitlines()[-1].endswith("nano/actions/frozen" if path == WEIGHTS else "small/actions/frozen")
    assert audit.check() == 1


def test_one_byte_of_the_settings_is_named_with_the_results_that_it_would_change(flip: Flip, wrong: Wrong) -> None:
    flip("params.yaml", "seed: 0", "seed: 3")
    text = wrong()
    assert "params.yaml: seed = 3 is not the value of profile test, and no stage names it: undo it with " in text
    assert "pretrain@mini and 5 more: dvc.lock has seed = 0, params.yaml 3: run `dvc repro`" in text
    assert "params.yaml seed -> pretrain -> reports/built: mini/pretrain, nano/pretrain" in text


@pytest.mark.parametrize(("old", "new", "reason", "affects"), [
    ("VALUE = 1", "VALUE = 2", "the code differs from the code of the run (", True),
    ("VALUE = 1", "VALUE = )", "the code is not Python: unmatched ')' ", True),
    ("# a number", "# A number", "no hash of a package differs, so no number changes", False),
])  # fmt: skip
def test_one_byte_of_code_is_named_with_the_results_of_its_package(
    clone: Path, flip: Flip, wrong: Wrong, old: str, new: str, reason: str, affects: bool
) -> None:
    flip("src/scaling4d/readout/stage.py", old, new)
    text = wrong()
    assert "wrong       src/scaling4d: md5 " in text and f"differing files: readout/stage.py; {reason}" in text
    way = "src/scaling4d/readout/stage.py -> code -> readout -> reports/built: mini/actions/frozen, nano/"
    assert (way in text) is affects and (affects or "->" not in text)
    assert "/pretrain" not in text or ")" in new  # no package can be hashed then


def test_other_code_is_named_by_module_where_its_hash_was_made_to_fit(flip: Flip, wrong: Wrong) -> None:
    before = locked_run().disk.md5("src/scaling4d")
    flip("src/scaling4d/readout/stage.py", "VALUE = 1", "VALUE = 2")
    flip("dvc.lock", before, locked_run().disk.md5("src/scaling4d"))
    assert "artifacts/code/readout.json: the code differs from the code of the run (scaling4d.readout.stage)" in wrong()


def test_a_result_of_other_weights_is_named(flip: Flip, wrong: Wrong) -> None:
    sha = json.loads(Path(NANO).read_text())["checkpoint_sha256"]
    flip(NANO, sha, "0" * 64)
    assert f"wrong       {NANO}: it was measured on weights {'0' * 64}; {WEIGHTS} is {sha}" in wrong()


def test_a_result_of_weights_in_several_files_is_compared_with_their_index(project: Path, wrong: Wrong) -> None:
    index = Path(f"{WEIGHTS}.index.json")
    Path(WEIGHTS).rename(index)
    assert locked_run().weights("nano") == index.as_posix()
    assert "it was measured on weights" not in wrong()  # the index has the recorded hash


def test_a_file_that_is_no_result_any_more_is_named_beside_everything_else(flip: Flip, wrong: Wrong) -> None:
    flip(NANO, '"value": 0.5', '"value": 9.5')
    flip(MINI, '"value": 0.75', '"value"; 0.75')
    text = wrong()
    assert f"{NANO}: it is not a result: nano actions frozen: 9.5 outside its interval 0.4 .. 0.6; run its stage again" in text
    assert f"reports/built/results.csv: line 4: nano/actions/frozen top1 value = 0.5, {NANO} has 9.5" in text
    assert f"wrong       {MINI}: it is not JSON: run its stage again" in text
    assert f"{NANO} -> reports/built: nano/actions/frozen" in text and f"{MINI} -> reports/built: mini/" in text


@pytest.mark.parametrize("name", ["remark.txt", "scannet/remark.txt"])
def test_a_changed_file_beside_a_task_s_benchmark_reaches_no_readout_of_it(wrong: Wrong, name: str) -> None:
    Path("data/benchmarks", name).write_text("new")
    text = wrong()
    assert "wrong       data/benchmarks: md5 " in text and f"differing files: {name}" in text
    assert "->" not in text


def test_a_benchmark_has_the_hash_by_which_readouts_depend_on_it(flip: Flip, wrong: Wrong) -> None:
    path, sha = "artifacts/benchmarks/actions.json", artifacts.sha256(Path("data/benchmarks/ssv2"))
    before = {locked: locked_run().disk.md5(locked) for locked in (path, "artifacts/benchmarks")}
    flip(path, sha, "0" * 64)
    for locked, md5 in before.items():
        Path("dvc.lock").write_text(Path("dvc.lock").read_text().replace(md5, locked_run().disk.md5(locked)))
    text = wrong()
    assert f"{path}: it has sha256 {'0' * 64} for data/benchmarks/ssv2, on disk it is {sha}" in text
    assert f"{path} -> readout -> reports/built: mini/actions/frozen" in text


@pytest.mark.parametrize("content", ["[1]", '"x"', '{"folders": []}', '{"folders": {"data": 1}}', "{", ""])
def test_hashes_of_benchmarks_that_are_damaged_are_named(wrong: Wrong, content: str) -> None:
    path = Path("artifacts/benchmarks/actions.json")
    path.chmod(0o644)
    path.write_text(content)
    assert f"wrong       {path}: md5 " in wrong()


# ---- the lock ----


@pytest.mark.parametrize(("old", "new", "message"), [
    ("cmd: true clips", "cmd: true clipz", "clips: dvc.lock has the command `true clipz`, dvc.yaml `true clips`: run"),
    ("  clips:\n    cmd", "  klips:\n    cmd", "clips: dvc.lock does not have this stage: run `dvc repro`"),
    ("frames: 4", "frames: 5", "clips: dvc.lock has clips.Curation.frames = 5, params.yaml 4: run `dvc repro`"),
    ("path: data/videos", "path: data/vide0s", "clips: by dvc.lock it reads data/vide0s; by dvc.yaml data/videos: run"),
    ("width: 32", "width: 33", "pretrain@mini: dvc.lock has points.mini.SimpleMAE.width = 33, params.yaml 32: run"),
    ("artifacts/code/readout.json", "artifacts/code/rezdout.json", "artifacts/code/rezdout.json"),
])  # fmt: skip
def test_one_byte_of_the_lock_is_named(flip: Flip, wrong: Wrong, old: str, new: str, message: str) -> None:
    flip("dvc.lock", old, new)
    assert message in wrong()


def test_a_hash_in_the_lock_that_was_changed_contradicts_the_stage_that_read_it(clone: Path, flip: Flip, wrong: Wrong) -> None:
    md5 = locked_run().stages["pretrain@nano"].outs[0].md5
    flip("dvc.lock", md5, md5.replace(md5[0], "0" if md5[0] != "0" else "1", 1))
    text = wrong()
    assert "dvc.lock: it contradicts itself about artifacts/test/pretrain/nano: md5 " in text
    assert "artifacts/test/pretrain/nano -> readout -> reports/built: nano/actions/frozen" in text


def test_a_hash_of_one_stage_alone_is_checked_by_the_folder_around_it_or_by_the_commit(flip: Flip, wrong: Wrong) -> None:
    md5 = locked_run().stages["readout@nano"].outs[0].md5
    other = ("1" if md5[0] == "0" else "0") + md5[1:]
    flip("dvc.lock", md5, other)
    message = f"dvc.lock: it was edited for {READ_OUT}: md5 {md5} on disk, {other} in dvc.lock (readout@nano wrote it)"
    assert f"{message}, but artifacts/test " in wrong() and f"{READ_OUT} -> reports/built: nano/actions/frozen" in wrong()
    shutil.rmtree("artifacts")
    assert f"dvc.lock: readout@nano: {READ_OUT} has md5 {other}, in the last commit {md5}, and is absent" in wrong()


@pytest.mark.slow
def test_no_letter_or_digit_of_the_lock_can_change_unnoticed(wrong: Wrong) -> None:
    text = Path("dvc.lock").read_text()
    for place in (place for place in range(0, len(text), 11) if text[place].isalnum()):
        Path("dvc.lock").write_text(text[:place] + ("z" if text[place] != "z" else "y") + text[place + 1 :])
        try:
            assert wrong(), text[place - 60 : place + 20]
        except UserError as error:
            assert "\n" not in str(error)


def test_one_byte_of_the_import_of_the_data_is_named(flip: Flip, wrong: Wrong) -> None:
    text = Path("data.dvc").read_text()
    flip("data.dvc", text[:6], "md5: " + ("0" if text[5] != "0" else "1"))
    assert "data.dvc: its md5 does not fit its content: take the file from git again" in wrong()
    size = locked_run().stages["data.dvc"].outs[0].size
    flip("data.dvc", f"size: {size}", f"size: {size + 1}")
    message = f"experiments/pocket has {size} bytes in 4 files, the lock {size + 1} in 4 (data.dvc read it)"
    assert f"dvc.lock: {message}" in wrong()


# ---- provenance of artifacts ----


def test_settings_code_and_inputs_of_another_run_are_named(flip: Flip, rewrite: Rewrite, wrong: Wrong) -> None:
    other = "artifacts/test/pretrain/mini/provenance.json"
    flip(other, '"width": 32', '"width": 64')
    path = READ_OUT / "provenance.json"
    made = json.loads(path.read_text())
    rewrite(path, code={**made["code"], "sha256": "0" * 64}, inputs={**made["inputs"], "checkpoint": "0" * 64})
    text = wrong()
    assert f"pretrain@mini: {other} has points.mini.SimpleMAE.width = 64, dvc.lock 32" in text
    assert f"readout@nano: {path} names other code than the artifacts/code of dvc.lock" in text
    assert f"readout@nano: {path} names checkpoint {'0' * 64}, which is no input of its stage in dvc.lock" in text


def test_a_setting_that_was_not_in_force_is_named_and_a_default_is_not(flip: Flip, wrong: Wrong) -> None:
    path = f"{PRETRAINED}/operative_config.gin"
    flip(path, "8, 8)", "8, 9)")
    flip(path, "depth = 2", "depth = 3")
    own = f"{READ_OUT}/operative_config.gin"  # a task's own value counts instead of that of all tasks
    flip(own, "heads = 2", "heads = 8")
    text = wrong()
    assert f"pretrain@nano: {path} has SimpleMAE.clip = [4, 8, 9], dvc.lock [4, 8, 8]" in text
    assert f"readout@nano: {own} has Head.heads = 8, dvc.lock 2" in text
    assert "depth" not in text
    Path(path).unlink()
    assert f"pretrain@nano: {path} is absent" in wrong()


def test_times_of_other_artifacts_are_named(rewrite: Rewrite, wrong: Wrong) -> None:
    path = "reports/built/runs.json"
    runs = json.loads(Path(path).read_text())["runs"]
    rewrite(path, runs=[{**runs[0], "out_sha256": "0" * 64}, *runs[1:]])
    assert wrong() == f"wrong       {path}: clips made sha256 {'0' * 64}, which is not on disk"


@pytest.mark.parametrize(("path", "changes"), [
    ("reports/built/runs.json", {"runs": 3}),
    ("reports/built/runs.json", {"runs": [3, {"stage": [], "out_sha256": "0", "versions": {}}]}),
    (f"{PRETRAINED}/provenance.json", {"inputs": 3, "settings": [], "overrides": 7}),
    (f"{PRETRAINED}/provenance.json", {"inputs": {"clips": []}}),
])  # fmt: skip
def test_records_of_other_types_do_not_end_the_audit(project: Path, rewrite: Rewrite, path: str, changes: dict) -> None:
    rewrite(path, **changes)
    assert audit.check() == (PRETRAINED.name in path)  # DVC does not track runs.json


def test_a_short_row_a_source_without_settings_and_a_folder_that_is_a_number_do_not_end_the_audit(project: Path) -> None:
    results, lock = Path("reports/built/results.csv"), Path("dvc.lock")
    results.write_text(results.read_text() + "mini\n")
    content = yaml.safe_load(lock.read_text())
    content["stages"]["baseline"]["params"]["params.yaml"]["encoders.pretrained.theirs"] = {"Pretrained": [1]}
    lock.write_text(yaml.safe_dump(content))
    assert audit.check() == 1
    config.PARAMS.write_text(config.PARAMS.read_text().replace("folder: reports/built", "folder: 3"))
    with pytest.raises(UserError, match="^(params.yaml: |DVC cannot read the pipeline: ).+$"):
        audit.check()


def test_declared_differences_are_notes(rewrite: Rewrite, messages: Messages) -> None:
    profile = Path("experiments/profile/test.yaml")
    profile.write_text(profile.read_text() + "watch: {keep: 2}\n")
    config.PARAMS.write_text(config.PARAMS.read_text() + "watch: {keep: 3}\n")
    Path("requirements.lock").write_text("# pins\ntorch==2.12.0\ndvc==3.67.1\n")
    unused = "note        params.yaml: override watch.keep = 3 of profile test: no stage depends on it"
    pins = "note        requirements.lock: it pins torch 2.12.0; reports/built/runs.json has 2.13.0"
    assert messages("note") == [unused, pins] and messages("wrong") == []
    config.PARAMS.write_text(config.PARAMS.read_text().replace("seed: 0", "seed: 3"))
    page = Path("reports/built/report.html")
    page.write_text(f"<table><tr><td>seed</td></tr></table>{page.read_text()}")
    rewrite(PRETRAINED / "provenance.json", overrides={"seed": 4})
    assert "params.yaml: seed = 3 is not the value of profile test, and no stage names it" in "".join(messages("wrong"))
    rewrite(PRETRAINED / "provenance.json", overrides={"seed": 3})
    assert "note        params.yaml: override seed = 3 of profile test: its stages name it" in messages("note")


def test_a_file_that_cannot_be_read_is_one_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *args: object) -> None:
        raise PermissionError(13, "Permission denied", name)

    disk = locked_run().disk
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"^artifacts/code/clips.json cannot be read: Permission denied$"):
        disk.md5("artifacts/code/clips.json")


def test_a_published_encoder_whose_folder_changed_is_named(flip: Flip, wrong: Wrong, messages: Messages) -> None:
    flip("published/model.safetensors", "their weights", "other weights")
    text = wrong()
    assert "wrong       baseline: its source published/model.safetensors had sha256 " in text
    assert "run `dvc repro --force --single-item baseline`, then `dvc repro`" in text and text.count("wrong ") == 1
    shutil.rmtree("published")
    absent = "not checked baseline: the folder published, the source of the encoder, is not here"
    assert absent in messages("not checked")


# ---- absent files, and what git alone proves ----


def test_a_fresh_clone_is_checked_as_far_as_git_goes(
    clone: Path, flip: Flip, wrong: Wrong, capsys: pytest.CaptureFixture
) -> None:
    assert audit.check() == 0
    *findings, last = capsys.readouterr().out.splitlines()
    assert all(finding.startswith("not checked ") for finding in findings)
    absent = "not checked dvc.lock: 11 locked files and folders (artifacts/"  # not data: git has it
    (line,) = (finding for finding in findings if finding.startswith(absent))
    assert line.endswith(" are not here: run `dvc repro`")
    assert last.endswith(" numbers, 17 files and folders not here")  # six hashes of code too
    flip("experiments/pocket/videos/b.mp4", "as it was", "as it is ")
    text = wrong()
    assert "wrong       data/videos: md5 " in text
    assert "wrong       experiments/pocket: md5 " in text and "differing files: videos/b.mp4" in text


def test_results_without_the_checkpoints_that_they_were_read_from_are_not_called_wrong(messages: Messages) -> None:
    shutil.rmtree("artifacts/test/pretrain/nano")
    assert not messages("wrong")  # the folder around them has another hash, as in a clone that pulled a part
    weights = "its weights artifacts/test/pretrain/nano/model.safetensors are not here"
    assert f"not checked {NANO}: {weights}" in messages("not checked")
    Path("artifacts/test/stray.json").write_text("{}")
    (line,) = messages("wrong")
    assert line.startswith("wrong       artifacts/test: md5 ") and "stray.json" in line


def commit_other_code() -> None:
    Path("src/scaling4d/readout/stage.py").write_text("VALUE = 22\n")
    commit_here("other code")


def test_stages_that_dvc_keeps_of_a_still_earlier_run_are_no_part_of_an_earlier_run(wrong: Wrong) -> None:
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    leftover = json.loads(json.dumps(next(stage for name, stage in lock["stages"].items() if name.startswith("readout@"))))
    for dep in (dep for dep in leftover["deps"] if dep["path"].startswith("artifacts/")):
        dep["md5"] = "0" * 32
    leftover["outs"][0] |= {"path": "artifacts/test/readout/nano/actions/finetune", "md5": "1" * 32}
    lock["stages"]["finetune@nano"] = leftover
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    commit_here("a lock with a stage that dvc.yaml no longer has")
    assert not wrong()
    commit_other_code()
    assert not wrong()


def test_a_lock_without_a_report_is_not_taken_for_results_of_an_earlier_commit(wrong: Wrong) -> None:
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    del lock["stages"]["report"]
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    commit_other_code()
    assert "report: dvc.lock does not have this stage: run `dvc repro`" in wrong()
    assert "wrong       src/scaling4d: md5 " in wrong()


def test_results_of_an_earlier_commit_are_counted_in_full(project: Path, capsys: pytest.CaptureFixture) -> None:
    def numbers() -> str:
        assert audit.check() == 0
        return re.search(r"([\d,]+) numbers", capsys.readouterr().out)[1]

    before, settings = numbers(), yaml.safe_load(config.PARAMS.read_text())
    del settings["points"]["mini"]
    config.PARAMS.write_text(yaml.safe_dump(settings))
    commit_other_code()
    assert numbers() == before


def test_results_of_an_earlier_commit_are_one_note(flip: Flip, messages: Messages, wrong: Wrong) -> None:
    made = provenance.git_or_error("rev-parse", "--short=7", "HEAD").strip()
    Path("src/scaling4d/readout/stage.py").write_text("VALUE = 22\n")
    assert wrong()  # no commit has this edit
    commit_here("other code")
    assert not wrong()
    again = "`make repro` makes the results again"
    assert messages("note") == [f"note        dvc.lock: commit {made} made the results; newer: code of readout; {again}"]
    config.PARAMS.write_text(config.PARAMS.read_text().replace("seed: 0", "seed: 33"))
    commit_here("another seed")
    assert not wrong()
    newer = "newer: code of readout, settings or files of 6 stages"
    assert messages("note") == [f"note        dvc.lock: commit {made} made the results; {newer}; {again}"]
    settings = yaml.safe_load(config.PARAMS.read_text())
    del settings["points"]["mini"]
    config.PARAMS.write_text(yaml.safe_dump(settings))
    Path("experiments/pocket/videos/c.mp4").write_text("a new video")
    subprocess.run([sys.executable, "-m", "dvc", "update", "-q", "data.dvc"], check=True, capture_output=True)
    commit_here("a point less, and other data")
    assert not wrong()
    assert len(messages("note")) == 1
    flip("reports/built/results.csv", "top1,0.75,", "top1,0.95,")
    assert "wrong       reports/built/results.csv: md5 " in wrong()
    flip("dvc.lock", "frames: 4", "frames: 6")
    assert "clips: dvc.lock has clips.Curation.frames = 6, params.yaml 4" in wrong()  # no commit has this lock


def test_a_lock_that_its_commit_does_not_make_is_named_after_the_code_moved_on(flip: Flip, wrong: Wrong) -> None:
    flip("dvc.lock", "frames: 4", "frames: 6")
    flip("dvc.lock", "seed: 0", "seed: 7")
    commit_other_code()
    text = wrong()
    assert "dvc.lock: it has clips.Curation.frames = 6; in commit " in text
    assert "clips.Curation.frames -> clips -> pretrain -> readout -> reports/built: mini/actions/frozen" in text
    assert "dvc.lock: pretrain@mini ran with seed = 7, other stages with 0" in text


def test_a_setting_of_an_earlier_commit_may_differ_where_the_report_names_the_override(rewrite: Rewrite, wrong: Wrong) -> None:
    lock, stages = Path("dvc.lock"), Path("reports/built/stages.json")
    lock.write_text(lock.read_text().replace("seed: 0", "seed: 7"))
    commit_other_code()
    assert "dvc.lock: it has seed = 7; in commit " in wrong()
    for value, differs in ((8, True), (7, False)):
        stages.write_text(json.dumps({"stages": {"pretrain/nano": {"overrides": {"seed": value}}}}))
        assert ("it has seed = 7; in commit " in wrong()) is differs
    stages.unlink()
    rewrite("reports/built/derived.json", **{"override seed": {"value": 7, "from": []}})
    assert "it has seed = 7; in commit " not in wrong()


def test_benchmarks_of_today_do_not_touch_results_of_an_earlier_commit(wrong: Wrong, another_benchmark: None) -> None:
    commit_other_code()
    assert not wrong()


def test_artifacts_of_an_earlier_commit_are_checked_after_the_code_moved_on(rewrite: Rewrite, wrong: Wrong) -> None:
    commit_other_code()
    rewrite("artifacts/code/readout.json", **code_hashes.hashes(Path("src/scaling4d"))["readout"])
    path = READ_OUT / "provenance.json"
    rewrite(path, inputs=json.loads(path.read_text())["inputs"] | {"checkpoint": "0" * 64})
    assert f"readout@nano: {path} names checkpoint {'0' * 64}, which is no input of its stage in dvc.lock" in wrong()


def test_an_option_of_another_command_is_refused() -> None:
    with pytest.raises(UserError, match="^--as json is the format of --explain; give a number to explain, or leave it out$"):
        cli.audit(folder=None, explain="", form="json", crate=None, reproduced=False)


def test_files_of_a_folder_that_changed_are_named_by_the_cache_where_dvc_keeps_it(flip: Flip, wrong: Wrong) -> None:
    Path(".dvc/cache").rename("elsewhere")
    Path(".dvc/config").write_text("[cache]\n    dir = ../elsewhere\n")
    path = f"{PRETRAINED}/operative_config.gin"
    flip(path, "depth = 2", "depth = 3")
    assert f"wrong       {PRETRAINED}: md5 " in wrong() and "differing files: operative_config.gin" in wrong()


def test_two_questions_at_once_are_refused() -> None:
    with pytest.raises(UserError, match="^FOLDER, --explain, --crate and --reproduced are four commands; needed one at a time$"):
        cli.audit(folder=None, explain="nano/actions/frozen", form="text", crate=None, reproduced=True)


# ---- cost ----


def test_every_file_is_opened_once_however_many_stages_name_it(project: Path) -> None:
    opened: list[str] = []
    watching = [True]

    def note(event: str, args: tuple) -> None:
        if watching[0] and event == "open" and isinstance(args[0], str):
            opened.append(args[0])

    sys.addaudithook(note)
    run = locked_run()
    opened.clear()
    run.disk.read(run.locked_files)
    for path in run.locked_files:
        assert run.disk.md5(path) and run.disk.sha256(path)
    assert run.json(NANO)["value"] == 0.5
    watching[0] = False
    times = Counter(path for path in opened if path.startswith(("artifacts/", "data/", "reports/", "src/", "experiments/")))
    assert set(times.values()) == {1} and len(times) > 30


@SIZES
def test_damaged_records_are_findings_or_refused(
    project: Path, endures: Callable, copies: int, capfd: pytest.CaptureFixture
) -> None:
    def read(_: Path) -> str:
        wrong = audit.check()
        audit.explain_number("nano/actions/frozen", "text")
        return REFUSED if wrong else ACCEPTED

    texts = (".json", ".csv", ".html", ".gin", ".yaml", ".lock", ".dvc", ".toml")
    paths = [
        path for path in files_below(Path()) if path.suffix in texts and not {".git", ".dvc", "data", "pocket"} & {*path.parts}
    ]
    counts = endures("audited records", paths, read, copies)
    assert counts[REFUSED]

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from scaling4d import artifacts, audit, cli, code, config
from scaling4d.audit import lock
from scaling4d.audit.run import runs
from scaling4d.records import UserError, write_json

Flip = Callable[[str, str, str], None]
Wrong = Callable[[], str]
NANO, MINI = "artifacts/test/readout/nano/actions/frozen/result.json", "artifacts/test/readout/mini/actions/frozen/result.json"


def test_an_untouched_project_has_nothing_wrong_and_says_what_is_not_here(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert audit.check() == 0
    text = capsys.readouterr().out
    assert "not checked reports/kept/dvc.lock: 8 files and folders below artifacts/kept that it names are not here" in text
    assert text.splitlines()[-1] == "0 wrong; what is not here was not checked; everything else agrees"


# ---- one byte ----


def test_one_byte_of_a_shard_is_named_with_every_number_that_it_taints(project: Path, flip: Flip, wrong: Wrong) -> None:
    flip("artifacts/test/clips/shards/train-00000.tar", "clips", "clipz")
    found = wrong()
    shard = "artifacts/test/clips/shards/train-00000.tar"
    assert "wrong       artifacts/test/clips: clips wrote it and 3 more as md5 " in found
    assert "(differs: shards/train-00000.tar)" in found
    assert f"{shard} -> pretrain -> reports/built: mini/pretrain, nano/pretrain, small/pretrain" in found
    assert f"{shard} -> pretrain -> readout -> reports/built: mini/actions/frozen, nano/actions/frozen, small/" in found
    assert "wrong       artifacts/test:" not in found  # the report read the folder around it; nothing else in there differs
    assert audit.check() == 1


def test_one_byte_of_a_checkpoint_is_named_and_taints_its_own_numbers_alone(project: Path, flip: Flip, wrong: Wrong) -> None:
    flip("artifacts/test/pretrain/nano/model.safetensors", "weights", "weighTs")
    found = wrong()
    assert "(differs: model.safetensors)" in found
    assert "artifacts/test/pretrain/nano/model.safetensors -> readout -> reports/built: nano/actions/frozen" in found
    assert "mini" not in found and found.count("wrong") == 1  # what must differ because of it is not named again


def test_a_result_of_other_weights_is_named(project: Path, flip: Flip, wrong: Wrong) -> None:
    sha = json.loads(Path(NANO).read_text())["checkpoint_sha256"]
    flip(NANO, sha, "0" * 64)
    weights = "artifacts/test/pretrain/nano/model.safetensors"
    assert f"wrong       {NANO}: was measured on weights {'0' * 64}, {weights} is {sha}" in wrong()


def test_one_byte_of_a_result_is_named_in_the_lock_and_in_the_table(project: Path, flip: Flip, wrong: Wrong) -> None:
    flip(NANO, '"value": 0.5', '"value": 0.6')
    found = wrong()
    assert f"{NANO} -> reports/built: nano/actions/frozen" in found
    assert f"reports/built/results.csv: line 4: nano actions frozen top1 value = 0.5 is not the 0.6 of {NANO}" in found


def test_a_result_that_is_none_any_more_is_named_beside_everything_else(project: Path, flip: Flip, wrong: Wrong) -> None:
    flip(NANO, '"value": 0.5', '"value": 9.5')
    flip(MINI, '"value": 0.75', '"value"; 0.75')
    found = wrong()
    assert f"{NANO}: it is not a result: nano actions frozen: 9.5 outside its interval 0.4 .. 0.6; run its stage again" in found
    assert f"wrong       {MINI}: it is not JSON: run its stage again" in found
    assert f"{NANO} -> reports/built: nano/actions/frozen" in found and f"{MINI} -> reports/built: mini/" in found


def test_one_byte_of_the_table_is_named_by_its_hash_its_result_and_what_was_made_of_it(
    project: Path, flip: Flip, wrong: Wrong
) -> None:
    flip("reports/built/results.csv", "top1,0.75,", "top1,0.95,")
    found = wrong()
    assert "wrong       reports/built/results.csv: report wrote it as md5 " in found
    assert f"reports/built/results.csv: line 2: mini actions frozen top1 value = 0.95 is not the 0.75 of {MINI}" in found
    assert "reports/built/metrics.json: actions frozen mini = 0.75 is no number of mini in the tables" in found
    flip("reports/built/results.csv", "small,6,actions", "smell,6,actions")
    unknown = "artifacts/test/readout/smell/actions/frozen/result.json"
    assert f"reports/built/results.csv: line 6: no stage of dvc.lock makes {unknown}" in wrong()
    flip("reports/built/pretrain.csv", "nano,5,0.5", "nano,5,0.4")
    where = "artifacts/test/pretrain/nano/summary.json"
    assert f"reports/built/pretrain.csv: line 3: nano train_loss = 0.4 is not the 0.5 of {where}" in wrong()


def test_a_number_that_no_table_holds_is_named_on_the_page_even_where_every_hash_was_made_to_fit(
    project: Path, flip: Flip, wrong: Wrong
) -> None:
    for path, old, new in (
        ("reports/built/report.html", "<td>0.7500<br", "<td>0.8500<br"),  # 0.85 is the upper end of its interval
        ("reports/built/metrics.json", '"mini": 0.75', '"mini": 0.85'),
    ):
        before = runs()[0].disk
        md5, sha256 = before.md5(path), before.sha256(path)
        flip(path, old, new)
        flip("dvc.lock", md5, runs()[0].disk.md5(path))
        if path.endswith(".html"):
            flip("reports/built/runs.json", sha256, runs()[0].disk.sha256(path))
    assert wrong().splitlines() == [
        "wrong       reports/built/metrics.json: actions frozen mini = 0.85 is no number of mini in the tables",
        "wrong       reports/built/report.html: mini, actions: 0.8500 [0.6500, 0.8500] is no number of mini in the tables",
    ]


def test_one_byte_of_the_settings_is_named_with_the_numbers_that_it_would_change(project: Path, flip: Flip, wrong: Wrong) -> None:
    flip("params.yaml", "seed: 0", "seed: 3")
    found = wrong()
    assert "params.yaml: seed = 3 is not the value of profile test, and no stage names it: undo it with " in found
    assert "pretrain@mini and 5 more: dvc.lock says seed = 0, params.yaml says 3: run `dvc repro`" in found
    assert "params.yaml seed -> pretrain -> reports/built: mini/pretrain, nano/pretrain" in found


def test_one_byte_of_code_is_named_with_the_numbers_of_its_room(clone: Path, flip: Flip, wrong: Wrong) -> None:
    flip("src/scaling4d/readout/train.py", "VALUE = 1", "VALUE = 2")
    found = wrong()
    assert "wrong       src/scaling4d: code read it as md5 " in found and "(differs: readout/train.py)" in found
    assert "src/scaling4d/readout/train.py -> code -> readout -> reports/built: mini/actions/frozen, nano/" in found
    assert "/pretrain" not in found


def test_a_changed_comment_is_named_and_taints_nothing(project: Path, flip: Flip, wrong: Wrong) -> None:
    flip("src/scaling4d/readout/train.py", "# a number", "# A number")
    found = wrong()
    assert "(differs: readout/train.py); its meaning is as before, so no number changes" in found and "->" not in found


def test_code_that_is_no_python_any_more_is_named(project: Path, flip: Flip, wrong: Wrong) -> None:
    flip("src/scaling4d/readout/train.py", "VALUE = 1", "VALUE = )")
    found = wrong()
    assert "(differs: readout/train.py); the code is no Python any more: unmatched ')' " in found
    assert "src/scaling4d/readout/train.py -> code -> readout -> reports/built: mini/actions/frozen" in found


def test_code_that_means_something_else_is_named_by_module_where_its_hash_in_the_lock_was_made_to_fit(
    project: Path, flip: Flip, wrong: Wrong
) -> None:
    before, size = runs()[0].disk.md5("src/scaling4d"), runs()[0].disk.size("src/scaling4d")
    flip("src/scaling4d/readout/train.py", "VALUE = 1", "VALUE = 2")
    assert runs()[0].disk.size("src/scaling4d") == size
    flip("dvc.lock", before, runs()[0].disk.md5("src/scaling4d"))
    message = "artifacts/code/readout.json: the code means something else than when it was run (scaling4d.readout.train)"
    assert message in wrong()


def test_one_byte_of_a_source_video_is_named_beside_git_s_copy(project: Path, flip: Flip, wrong: Wrong) -> None:
    flip("data/videos/a.mp4", "as it was", "as it is ")
    found = wrong()
    assert "wrong       data/videos: clips read it as md5 " in found and "(differs: a.mp4)" in found
    assert "data/videos/a.mp4 -> clips -> pretrain -> readout -> reports/built: mini/actions/frozen" in found
    assert "wrong       data:" not in found


def test_a_changed_benchmark_reaches_the_readouts_through_its_hash(project: Path, flip: Flip, wrong: Wrong) -> None:
    flip("data/benchmarks/ssv2/list.json", "as it was", "as it is ")
    found = wrong()
    assert "wrong       data/benchmarks: benchmarks read it as md5 " in found and "(differs: ssv2/list.json)" in found
    way = "data/benchmarks/ssv2/list.json -> benchmarks -> readout -> reports/built: mini/actions/frozen"
    assert way in found and found.count("wrong ") == 1


def test_a_changed_file_beside_a_task_s_benchmark_reaches_no_readout_of_it(project: Path, wrong: Wrong) -> None:
    Path("data/benchmarks/remark.txt").write_text("new")
    found = wrong()
    assert "wrong       data/benchmarks: benchmarks read it as md5 " in found and "(differs: remark.txt)" in found
    assert "->" not in found


def test_a_benchmark_has_the_hash_by_which_readouts_depend_on_it(project: Path, flip: Flip, wrong: Wrong) -> None:
    path, said = "artifacts/benchmarks/actions.json", artifacts.sha256(Path("data/benchmarks/ssv2"))
    before = runs()[0].disk.md5(path)
    flip(path, said, "0" * 64)
    Path("dvc.lock").write_text(Path("dvc.lock").read_text().replace(before, runs()[0].disk.md5(path)))
    found = wrong()
    assert f"{path}: says that data/benchmarks/ssv2 has sha256 {'0' * 64}; it has {said}" in found
    assert f"{path} -> readout -> reports/built: mini/actions/frozen" in found


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("cmd: true clips", "cmd: true clipz", "clips: dvc.lock says that it ran `true clipz`, dvc.yaml says `true clips`"),
        ("  clips:\n    cmd", "  klips:\n    cmd", "clips: not in dvc.lock, so it was never run: run `dvc repro`"),
        (
            "        frames: 4",
            "        frames: 5",
            "clips: dvc.lock says clips.Curation.frames = 5, params.yaml says 4: run `dvc repro`",
        ),
        (
            "path: data/videos",
            "path: data/vide0s",
            "clips: dvc.lock says that it reads data/vide0s where dvc.yaml says data/videos",
        ),
        (
            "width: 32",
            "width: 33",
            "pretrain@mini: dvc.lock says points.mini.SimpleMAE.width = 33, params.yaml says 32: run `dvc repro`",
        ),
    ],
)
def test_one_byte_of_the_lock_is_named(project: Path, flip: Flip, old: str, new: str, said: str) -> None:
    flip("dvc.lock", old, new)
    assert said in "\n".join(": ".join(contradiction) for contradiction in lock.pipeline()[1])


def test_a_hash_in_the_lock_that_was_changed_contradicts_the_stage_that_read_it(clone: Path, flip: Flip, wrong: Wrong) -> None:
    md5 = runs()[0].stages["pretrain@nano"].outs[0].md5
    flip("dvc.lock", md5, md5.replace(md5[0], "0" if md5[0] != "0" else "1", 1))
    found = wrong()
    assert "dvc.lock: it contradicts itself about artifacts/test/pretrain/nano: pretrain@nano wrote it as md5 " in found
    assert "artifacts/test/pretrain/nano -> readout -> reports/built: nano/actions/frozen" in found


def test_a_hash_that_no_other_stage_names_is_told_by_the_folder_around_it_and_in_a_clone_by_the_commit(
    project: Path, flip: Flip, wrong: Wrong
) -> None:
    md5 = runs()[0].stages["readout@nano"].outs[0].md5
    other = ("1" if md5[0] == "0" else "0") + md5[1:]
    flip("dvc.lock", md5, other)
    folder = "artifacts/test/readout/nano/actions/frozen"
    changed = f"dvc.lock: changed itself: readout@nano wrote it, {folder}, as md5 {other}; it is {md5}, and artifacts/test "
    assert changed in wrong() and f"{folder} -> reports/built: nano/actions/frozen" in wrong()
    shutil.rmtree("artifacts")
    assert f"dvc.lock: readout@nano: {folder} is md5 {other}, the last commit has {md5}, and it is not here to tell" in wrong()


def test_a_lock_that_is_no_lock_any_more_is_one_line(project: Path, flip: Flip) -> None:
    flip("dvc.lock", "schema: '2.0'", "schema: '3.0'")
    with pytest.raises(UserError, match=r"^dvc.lock is damaged: schema '3.0', needed '2.0'; take it from git again$"):
        audit.verify(project)
    flip("dvc.lock", "    hash: md5", "    h4sh: md5")
    flip("dvc.lock", "schema: '3.0'", "schema: '2.0'")
    with pytest.raises(UserError, match=r"^dvc.lock is damaged: .* has a hash of kind None, needed md5; take it from git again$"):
        audit.verify(project)


@pytest.mark.slow
def test_no_letter_or_digit_of_the_lock_can_change_unnoticed(project: Path, wrong: Wrong) -> None:
    text = Path("dvc.lock").read_text()
    for place in (place for place in range(0, len(text), 11) if text[place].isalnum()):
        Path("dvc.lock").write_text(text[:place] + ("z" if text[place] != "z" else "y") + text[place + 1 :])
        try:
            assert wrong(), text[place - 60 : place + 20]
        except UserError as error:
            assert "\n" not in str(error)


def test_a_room_that_there_is_not_is_wrong_and_no_crash(project: Path, flip: Flip, wrong: Wrong) -> None:
    flip("dvc.lock", "artifacts/code/baseline.json", "artifacts/code/bzseline.json")
    assert "bzseline" in wrong()


def test_one_byte_of_the_import_of_the_data_is_named(project: Path, flip: Flip, wrong: Wrong) -> None:
    text = Path("data.dvc").read_text()
    flip("data.dvc", text[:6], "md5: " + ("0" if text[5] != "0" else "1"))
    assert "data.dvc: its own md5 is not that of its content: it was edited by hand; take it from git again" in wrong()
    size = runs()[0].stages["data.dvc"].outs[0].size
    flip("data.dvc", f"size: {size}", f"size: {size + 1}")
    assert f"dvc.lock: data.dvc read it, experiments/pocket, as {size + 1} bytes in 3 files; it is {size} in 3" in wrong()


# ---- what the artifacts say of themselves ----


def test_settings_that_an_artifact_was_not_made_with_are_named(project: Path, flip: Flip, wrong: Wrong) -> None:
    path = "artifacts/test/pretrain/nano/provenance.json"
    flip(path, '"width": 32', '"width": 64')
    assert f"pretrain@nano: {path} was made with points.nano.SimpleMAE.width = 64, dvc.lock says 32" in wrong()


def test_a_setting_that_was_not_in_force_is_named_and_a_default_that_no_setting_names_is_not(
    project: Path, flip: Flip, wrong: Wrong
) -> None:
    path = "artifacts/test/pretrain/nano/operative_config.gin"
    flip(path, "(4, 8, 8)", "(4, 8, 9)")
    flip(path, "depth = 2", "depth = 3")
    found = wrong()
    assert f"pretrain@nano: {path} says SimpleMAE.clip = [4, 8, 9], dvc.lock says [4, 8, 8]" in found
    assert "depth" not in found
    Path(path).unlink()
    assert f"pretrain@nano: {path} is not there" in wrong()


def test_what_a_task_sets_for_itself_counts_instead_of_what_all_tasks_share(project: Path, flip: Flip, wrong: Wrong) -> None:
    path = "artifacts/test/readout/nano/actions/frozen/operative_config.gin"
    flip(path, "heads = 2", "heads = 8")
    assert f"readout@nano: {path} says Head.heads = 8, dvc.lock says 2" in wrong()


def test_code_and_inputs_that_the_stage_did_not_read_are_named(project: Path, wrong: Wrong) -> None:
    path = Path("artifacts/test/readout/nano/actions/frozen/provenance.json")
    said = json.loads(path.read_text())
    said["code"]["sha256"] = said["inputs"]["checkpoint"] = "0" * 64
    path.chmod(0o644)
    write_json(path, said)
    found = wrong()
    assert f"readout@nano: {path} names other code than the artifacts/code that dvc.lock says it read" in found
    assert f"readout@nano: {path} names checkpoint {'0' * 64}, which is nothing that dvc.lock says it read" in found


def test_times_of_other_artifacts_are_named(project: Path, wrong: Wrong) -> None:
    path = Path("reports/built/runs.json")
    told = json.loads(path.read_text())
    told["runs"][0]["out_sha256"] = "0" * 64
    write_json(path, told)
    assert wrong() == f"wrong       {path}: clips made {'0' * 64}, which is not what is here"


def test_an_override_that_stages_name_is_a_note(project: Path, wrong: Wrong) -> None:
    config.PARAMS.write_text(config.PARAMS.read_text().replace("seed: 0", "seed: 3"))
    path = Path("artifacts/test/pretrain/nano/provenance.json")
    path.chmod(0o644)
    write_json(path, {**json.loads(path.read_text()), "overrides": {"seed": 3}})
    notes = [finding.message for finding in audit.verify(project) if finding.kind == "note"]
    assert notes == ["override seed = 3 of profile test, named by the stages that it changes"]


def test_an_override_on_which_no_stage_depends_is_a_note(project: Path, wrong: Wrong) -> None:
    profile = Path("experiments/profile/test.yaml")
    profile.write_text(profile.read_text() + "watch: {keep: 2}\n")
    config.PARAMS.write_text(config.PARAMS.read_text() + "watch: {keep: 3}\n")
    notes = [finding.message for finding in audit.verify(project) if finding.kind == "note"]
    assert notes == ["override watch.keep = 3 of profile test, on which no stage depends"]
    assert wrong() == ""


def test_versions_that_are_not_the_pinned_ones_are_a_note(project: Path) -> None:
    Path("requirements.lock").write_text("# pins\ntorch==2.12.0\ndvc==3.67.1\n")
    notes = [str(finding) for finding in audit.verify(project) if finding.kind == "note"]
    assert notes == ["note        requirements.lock: it pins torch 2.12.0; reports/built/runs.json tells of 2.13.0"]


def test_a_file_that_cannot_be_read_is_one_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *args: object) -> None:
        raise PermissionError(13, "Permission denied", name)

    found = runs()[0].disk
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"^artifacts/code/clips.json cannot be read: Permission denied$"):
        found.md5("artifacts/code/clips.json")


# ---- what is not here, and what git alone proves ----


def test_a_fresh_clone_is_checked_as_far_as_git_goes(clone: Path, flip: Flip, wrong: Wrong) -> None:
    findings = audit.verify(clone)
    assert {finding.kind for finding in findings} == {"not checked"}
    absent = "9 files and folders that it names are not here (artifacts/benchmarks/actions.json, artifacts/test/clips, "
    assert any(finding.message.startswith(absent) for finding in findings)  # not data: git has it
    flip("reports/built/metrics.json", '"nano": 0.25', '"nano": 0.35')
    assert "reports/built/metrics.json: val_loss nano = 0.35 is no number of nano in the tables" in wrong()


def test_results_without_the_checkpoints_that_they_were_read_from_are_not_called_wrong(project: Path, wrong: Wrong) -> None:
    shutil.rmtree("artifacts/test/pretrain/nano")
    found = wrong()
    assert found.count("wrong") == 1 and "wrong       artifacts/test: report read it as md5 " in found
    messages = [finding.message for finding in audit.verify(project) if finding.kind == "not checked"]
    assert "names the weights artifacts/test/pretrain/nano/model.safetensors, which are not here" in messages


def test_a_fresh_clone_checks_the_data_in_git(clone: Path, flip: Flip, wrong: Wrong) -> None:
    flip("experiments/pocket/videos/b.mp4", "as it was", "as it is ")
    found = wrong()
    assert "wrong       data/videos: clips read it as md5 " in found
    assert "wrong       experiments/pocket: data.dvc read it as md5 " in found and "(differs: videos/b.mp4)" in found


def test_a_stage_that_never_ran_is_named(project: Path, compose: Callable[[dict], None], wrong: Wrong) -> None:
    points = yaml.safe_load(config.PARAMS.read_text())["points"]
    compose({"points": {**points, "tiny": points["nano"]}})
    assert "pretrain@tiny and 1 more: not in dvc.lock, so it was never run: run `dvc repro`" in wrong()


def test_a_kept_run_is_proven_by_the_commit_that_holds_its_code(
    project: Path, flip: Flip, commit: Callable, wrong: Wrong
) -> None:
    flip("src/scaling4d/readout/train.py", "VALUE = 1", "VALUE = 2")
    commit("the code moves on")
    assert "reports/kept" not in wrong()  # its commit is found in the history
    flip("reports/kept/dvc.lock", "frames: 4", "frames: 6")
    found = wrong()
    assert "reports/kept/dvc.lock: it says clips.Curation.frames = 6, commit " in found
    assert (
        "reports/kept/dvc.lock clips.Curation.frames -> clips -> pretrain -> readout -> reports/kept: mini/actions/frozen"
        in found
    )
    flip("reports/kept/results.csv", "top1,0.75,", "top1,0.95,")
    assert "wrong       reports/kept/results.csv: report wrote it as md5 " in wrong()


def test_data_that_lies_elsewhere_today_does_not_unsettle_a_kept_run(project: Path, wrong: Wrong) -> None:
    shutil.copytree("experiments/pocket", "elsewhere")
    text = Path("data.dvc").read_text()
    Path("data.dvc").write_text(text.replace("path: experiments/pocket", "path: elsewhere"))
    assert "reports/kept" not in wrong()


@pytest.mark.usefixtures("another_benchmark")
def test_data_that_changed_since_does_not_unsettle_a_kept_run_whose_artifacts_are_here(wrong: Wrong) -> None:
    shutil.copytree("artifacts/test", "artifacts/kept")
    assert "artifacts/kept/readout/nano/actions/frozen/provenance.json names benchmark" not in wrong()


def test_a_kept_run_is_looked_into_also_where_the_code_moved_on(project: Path, wrong: Wrong) -> None:
    shutil.copytree("artifacts/test", "artifacts/kept")
    Path("src/scaling4d/readout/train.py").write_text("VALUE = 2\n")
    room = Path("artifacts/code/readout.json")
    room.chmod(0o644)
    write_json(room, code.hashes(Path("src/scaling4d"))["readout"])
    path = Path("artifacts/kept/readout/nano/actions/frozen/provenance.json")
    said = json.loads(path.read_text())
    path.chmod(0o644)
    write_json(path, said | {"inputs": said["inputs"] | {"checkpoint": "0" * 64}})
    assert f"readout@nano: {path} names checkpoint {'0' * 64}, which is nothing that reports/kept/dvc.lock says" in wrong()


@pytest.mark.parametrize("content", ["[1]", '"x"', '{"folders": []}', '{"folders": {"data": 1}}', "{", ""])
def test_hashes_of_benchmarks_that_are_damaged_are_named(project: Path, wrong: Wrong, content: str) -> None:
    path = Path("artifacts/benchmarks/actions.json")
    path.chmod(0o644)
    path.write_text(content)
    assert f"wrong       {path}: benchmarks wrote it and 3 more as md5 " in wrong()


def test_a_kept_run_whose_code_no_commit_holds_is_not_checked(project: Path, flip: Flip) -> None:
    text = Path("reports/kept/dvc.lock").read_text()
    md5 = runs()[0].stages["code"].deps[0].md5
    Path("reports/kept/dvc.lock").write_text(text.replace(md5, "0" * 32 + ".dir"))
    messages = [finding.message for finding in audit.verify(project) if finding.kind == "not checked"]
    assert any(message.startswith("no commit of this clone holds the src/scaling4d that it names (000") for message in messages)


def test_two_questions_at_once_are_refused() -> None:
    with pytest.raises(UserError, match="^--explain, --crate and --reproduced answer three questions; needed one at a time$"):
        cli.audit(explain="nano/actions/frozen", form="text", crate=None, reproduced=True)


# ---- cost ----


def test_every_file_is_opened_once_however_many_stages_name_it(project: Path) -> None:
    opened: list[str] = []
    watching = [True]

    def note(event: str, args: tuple) -> None:
        if watching[0] and event == "open" and isinstance(args[0], str):
            opened.append(args[0])

    sys.addaudithook(note)
    run = runs()[0]
    opened.clear()
    run.disk.read()
    for path in {file.path for stage in run.stages.values() for file in (*stage.deps, *stage.outs)}:
        assert run.disk.md5(path) and run.disk.sha256(path)
    assert run.json(NANO)["value"] == 0.5
    watching[0] = False
    times = Counter(path for path in opened if path.startswith(("artifacts/", "data/", "reports/", "src/", "experiments/")))
    assert set(times.values()) == {1} and len(times) > 30


def test_folders_are_hashed_the_way_dvc_and_the_stages_do(project: Path) -> None:
    from scaling4d import artifacts

    disk = runs()[0].disk
    for stage in lock.read(Path("dvc.lock")).values():
        for file in (*stage.deps, *stage.outs):
            assert (disk.md5(file.path), disk.size(file.path)) == (file.md5, file.size)
            assert disk.sha256(file.path) == artifacts.sha256(Path(file.path))


@pytest.fixture
def published(project: Path, compose: Callable[[dict], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an encoder that others published, which a stage took over."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("their weights")
    key = "encoders.pretrained.theirs"
    compose({"encoders": {"pretrained": {"theirs": {"Pretrained": {"source": str(folder), "revision": "", "clip": [4, 8, 8]}}}}})
    out = Path("artifacts/test/pretrain/theirs")
    out.mkdir()
    (out / "model.safetensors").write_text("their weights, as features need them")
    inputs = {path.name: artifacts.sha256(path) for path in folder.iterdir()}
    made = {"stage": "baseline", "settings": config.read(), "keys": ["profile", key], "room": "baseline", "inputs": inputs}
    artifacts.write_provenance(out, **made)
    (out / "operative_config.gin").write_text("")
    stages = yaml.safe_load(Path("dvc.yaml").read_text())
    params, deps = ["profile", key], ["artifacts/code/baseline.json"]
    stages["stages"]["baseline"] = {"cmd": "true baseline", "params": params, "deps": deps, "outs": [str(out)]}
    Path("dvc.yaml").write_text(yaml.safe_dump(stages))
    subprocess.run([sys.executable, "-m", "dvc", "commit", "-q", "--force", "baseline"], check=True)
    return folder


def test_a_folder_of_a_published_encoder_that_changed_since_is_named(published: Path, wrong: Wrong) -> None:
    assert "baseline" not in wrong()
    (published / "model.safetensors").write_text("other weights")
    found = wrong()
    assert f"wrong       baseline: took over model.safetensors of {published} as " in found
    assert "run `dvc repro --force --single-item baseline`, then `dvc repro`" in found
    assert found.count("took over") == 1


def test_a_folder_of_a_published_encoder_that_is_not_here_is_not_checked(project: Path, published: Path) -> None:
    shutil.rmtree(published)
    said = [str(finding) for finding in audit.verify(project) if finding.where == "baseline"]
    assert said == [f"not checked baseline: the folder {published}, from which the encoder was taken over, is not here"]

"""The ladder's training steps beside those of a revision: figures of made-up times, and a real turn."""

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scaling4d import cli, config
from scaling4d.records import UserError
from scaling4d_bench import ladder

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
POINT = {"clip": [8, 64, 64], "patch": [1, 8, 8], "mask_ratio": 0.85, "batch": 16, "parameters": 1000, "flops_per_clip": 10**7}
FORMER = POINT | {"clip": [16, 64, 64], "batch": 8}


class MadeUp(ladder.Checkout):
    """A turn of a point: 0.2 CPU seconds here, and 0.1 in the other code, whose batch is half. Half the time waits."""

    def __enter__(self):
        known = {"nano": POINT, "mini": POINT} if self.name == "this code" else {"nano": FORMER, "tiny": FORMER}
        self.facts = {"points": known, "steps": 10, "product_flops": 10**9}
        return self

    def __exit__(self, *error) -> None: ...

    def turn(self, name: str) -> tuple[float, float]:
        cpu_s = 0.1 if name == ladder.PRODUCT or self.name != "this code" else 0.2
        return 2 * cpu_s, cpu_s


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one empty commit."""
    monkeypatch.chdir(tmp_path)
    for words in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m first"):
        subprocess.run(["git", *words.split()], check=True)
    return tmp_path


def test_shares_and_ratios_follow_from_cpu_seconds(repository: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ladder, "Checkout", MadeUp)
    path = ladder.bench(repository / "out", repeats=3, against="HEAD")
    content, printed = json.loads(path.read_text()), capsys.readouterr().out
    rows = {row["name"]: row for row in content["results"]["rows"]}
    assert path.name == "ladder.json" and list(rows) == ["nano", "mini", "nano, HEAD", "tiny, HEAD"]
    assert {name: row["per_s"] for name, row in rows.items()} == pytest.approx(dict.fromkeys(rows, 400))  # 160 / 0.4, 80 / 0.2
    assert content["results"]["product_flop_per_s"] == pytest.approx(1e11)  # 10 products of 1e9 in 0.1 s
    assert [row["share_of_peak"] for row in rows.values()] == pytest.approx([0.08] * 4)  # 800 clips of 1e7 a CPU second
    (ratio,) = content["results"]["ratios"]
    assert (ratio["of"], ratio["over"], ratio["median"]) == ("nano", "nano, HEAD", pytest.approx(1))
    assert "their shapes differ" in printed and "│ 16x64x64 │" in printed
    assert all(len(values) == 3 for kind in content["raw"]["turns"].values() for values in kind.values())
    assert subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True).stdout.count("\n") == 1


def test_a_revision_is_measured_in_its_own_files(repository: Path) -> None:
    Path("only_here").touch()
    with ladder.worktree("HEAD") as root:
        assert (root / ".git").exists() and not (root / "only_here").exists()
    assert not root.exists()
    with pytest.raises(UserError, match="invalid reference: nowhere"), ladder.worktree("nowhere"):
        pass


def test_code_that_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the steps of old cannot be measured: .*Error.*$"):
        ladder.Checkout("old", tmp_path, tmp_path).__enter__()


def test_the_default_profiles_points_are_measured_as_it_trains_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = config.compose([])
    with ladder.Checkout("this code", ROOT, ROOT / "src") as checkout:
        points = checkout.facts["points"]
        assert list(points) == [name for name, point in settings["points"].items() if "SimpleMAE" in point["model"]]
        assert {point["batch"] for point in points.values()} == {settings["pretrain"]["Training"]["batch"]}
        for name, point in points.items():
            given = settings["points"][name]["model"]["SimpleMAE"]
            assert all(point[key] == given[key] for key in ("clip", "patch", "coarse_patch", "mask_ratio"))
        assert min(checkout.turn(next(iter(points)))) > 0


def test_a_revision_without_the_ladder_is_refused() -> None:
    refused = CliRunner().invoke(cli.app, ["bench", "pretrain", "--against", "HEAD"])
    assert str(refused.exception) == "--against HEAD needs --ladder"

"""Small videos with every defect that curation must meet, and one curation of them for all tests."""

from pathlib import Path

import numpy as np
import pytest
from small_videos import SETTINGS, WORKERS, save, world

from scaling4d.clips import curate
from scaling4d.clips.settings import CurationConfig


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """What each file is stands in its name."""
    folder = tmp_path_factory.mktemp("corpus") / "videos"
    for seed in range(8):
        save(folder / f"good{seed}.mp4", world(seed, 40))
    save(folder / "-a name, with ünïcode/größe '1'.mp4", world(10, 40))
    save(folder / "two_shots.mp4", np.concatenate([world(11, 40), world(12, 40)]))
    save(folder / "black_inside.mp4", np.concatenate([world(13, 40), np.zeros((10, 64, 80, 3), np.uint8), world(14, 40)]))
    still = np.repeat(world(15, 40)[-1:], 30, 0)
    save(folder / "frozen_inside.mp4", np.concatenate([world(15, 40), still, world(16, 40)]), crf=10)
    uneven = np.cumsum(np.random.default_rng(0).choice([0.03, 0.06, 0.1], 60))
    save(folder / "uneven.mp4", world(17, 60), times_s=uneven - uneven[0])
    save(folder / "turned.mp4", world(18, 40), rotation_deg=90)
    save(folder / "black.mp4", np.zeros((48, 64, 80, 3), np.uint8))
    save(folder / "frozen.mp4", np.repeat(world(19, 1), 48, 0))
    save(folder / "short.mp4", world(20, 16))
    save(folder / "small.mp4", world(21, 40, 24, 64))
    save(folder / "large.mp4", world(22, 4, 64, 4100))
    save(folder / "long.mp4", world(23, 2), times_s=np.array([0, 15_000.0]))
    save(folder / "slow.mp4", world(24, 12), rate_hz=4)
    save(folder / "near_good0.mp4", world(0, 40, 96, 120), crf=30)
    (folder / "same_as_good1.mp4").write_bytes((folder / "good1.mp4").read_bytes())
    whole = save(folder / "cut_off.mkv", world(25, 80)).read_bytes()
    (folder / "cut_off.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    whole = (folder / "good2.mp4").read_bytes()
    (folder / "cut_off.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "damaged.mp4").write_bytes(whole[:2000] + bytes(1500) + whole[3500:])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video\n" * 50)
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile good0.mp4\n")
    (folder / ".hidden").write_text("x")
    outside = save(folder.parent / "outside.mp4", world(26, 40))
    (folder / "leads_out.mp4").symlink_to(outside)
    (folder / "leads_nowhere.mp4").symlink_to(folder / "nothing.mp4")
    (folder / "leads_in_a_circle").symlink_to(folder)
    return folder


@pytest.fixture(scope="session")
def curated(videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two_workers")
    curate.curate(videos, out, CurationConfig(**SETTINGS), WORKERS)
    return out

"""Defects of real video folders, for curation to handle: cuts, duplicates, empty stretches, odd and broken files."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np

from scaling4d import video

MIN_FRAMES = 16  # of a shot
ODD_SIZES = ((66, 70), (58, 90), (100, 62), (74, 74))  # even, for H.264, but no multiples of 8
# Height and width of the shots: for cuts, black and frozen stretches, odd sizes, variable rate, portraits, the rest.
SHOT_SIZES = (*[(64, 80)] * 12, *[(64, 64)] * 6, *ODD_SIZES, *[(64, 96)] * 3, *[(96, 64)] * 2, *[(64, 64)] * 3)


def write_defects(
    folder: Path, videos: list[str], shots: list[np.ndarray], *, rng: np.random.Generator, rate_hz: float, crf: int, gop: int
) -> None:
    """Add defective files to a folder that holds `videos`. shots: uint8 `T H W 3` each, of SHOT_SIZES."""
    for name in ("edited", "backup", "phone", "misc"):
        (folder / name).mkdir(exist_ok=True)
    encode = partial(video.encode, rate_hz=rate_hz, crf=crf, gop=gop)

    # usable in part: cuts between two scenes, black and frozen stretches
    for n in range(6):
        first, second = shots[2 * n], shots[2 * n + 1]
        encode(folder / f"edited/cut{n}.mp4", np.concatenate([first[: len(first) // 2], second[len(second) // 2 :]]))
    for n in range(3):
        pixels, still = shots[12 + n], shots[15 + n]
        middle = len(pixels) // 2
        black = np.zeros_like(pixels[:12])
        encode(folder / f"edited/blackout{n}.mp4", np.concatenate([pixels[:middle], black, pixels[middle:]]))
        frozen = still[middle - 1 : middle].repeat(24, 0)
        encode(folder / f"edited/freeze{n}.mp4", np.concatenate([still[:middle], frozen, still[middle:]]))
    encode(folder / "misc/all_black.mp4", np.zeros_like(shots[-1]))

    # usable: odd sizes, variable rates, a rotation, a short video
    for n in range(len(ODD_SIZES)):
        encode(folder / f"misc/odd{n}.mp4", shots[18 + n])
    for n in range(3):
        times_s = np.cumsum(rng.uniform(0.3, 1.7, len(shots[22 + n])) / rate_hz)
        encode(folder / f"phone/VFR_{n:04d}.mp4", shots[22 + n], times_s=times_s)
    for n in range(2):
        turned = np.ascontiguousarray(np.rot90(shots[25 + n], k=-1, axes=(1, 2)))
        encode(folder / f"phone/portrait{n}.mp4", turned, rotation_deg=90)
    encode(folder / "misc/short.mp4", shots[27][:5])

    # duplicates: of the bytes, and of the pictures in another encoding
    for n, name in enumerate(videos[1:4]):
        shutil.copyfile(folder / name, folder / f"backup/copy_of_{n}.mp4")
    for n, name in enumerate(videos[5:8]):
        encode(folder / f"backup/again{n}.mkv", video.decode_all(folder / name)[1], crf=crf + 6)

    # unusable: truncated, corrupt, empty and no video
    for shot, extension in ((28, "mp4"), (29, "mkv")):
        intact = folder / f"misc/intact.{extension}"
        encode(intact, shots[shot])
        content = intact.read_bytes()
        intact.unlink()
        (folder / f"misc/cut_off.{extension}").write_bytes(content[: len(content) * 6 // 10])
        if extension == "mp4":
            start, length = content.index(b"mdat") + 44, len(content) // 2
            corrupt = content[:start] + rng.bytes(len(content))[:length] + content[start + length :]
            (folder / "misc/corrupt.mp4").write_bytes(corrupt)
    (folder / "misc/empty.mp4").write_bytes(b"")
    (folder / "misc/notes.mp4").write_text("Shopping list: milk, bread, a tripod.\n")

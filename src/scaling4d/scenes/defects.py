"""What real folders of videos hold and curation must deal with: cuts, duplicates, stretches of nothing, odd and broken files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scaling4d import video

NEEDED_FRAMES = 16  # of a shot
ODD_SIZES = ((66, 70), (58, 90), (100, 62), (74, 74))  # even, as H.264 wants them, and nothing else
# Height, width of the shots that defects are made from: cuts, black and frozen, odd sizes, variable rate, portraits, the rest.
SHOTS = (*[(64, 80)] * 12, *[(64, 64)] * 6, *ODD_SIZES, *[(64, 96)] * 3, *[(96, 64)] * 2, *[(64, 64)] * 3)


def write(
    folder: Path,
    good: Sequence[str],
    shots: Sequence[np.ndarray],
    *,
    rng: np.random.Generator,
    rate_hz: float,
    crf: int,
    gop: int,
) -> None:
    """Add the defects to `folder`, which holds the videos `good`. shots: uint8 `T H W 3` each, of the sizes SHOTS."""
    for name in ("edited", "backup", "phone", "misc"):
        (folder / name).mkdir(exist_ok=True)

    def put(
        name: str, pixels: np.ndarray, crf: int = crf, container: str | None = None, times_s=None, rotation_deg: int = 0
    ) -> None:
        video.write(
            folder / name,
            pixels,
            rate_hz=rate_hz,
            codec="libx264",
            crf=crf,
            gop=gop,
            container=container,
            times_s=times_s,
            rotation_deg=rotation_deg,
        )

    # usable in part: two worlds joined, black or frozen stretches
    for n in range(6):
        first, second = shots[2 * n], shots[2 * n + 1]
        put(f"edited/cut{n}.mp4", np.concatenate([first[: len(first) // 2], second[len(second) // 2 :]]))
    for n in range(3):
        pixels = shots[12 + n]
        middle = len(pixels) // 2
        put(f"edited/blackout{n}.mp4", np.concatenate([pixels[:middle], np.zeros_like(pixels[:12]), pixels[middle:]]))
    for n in range(3):
        pixels = shots[15 + n]
        middle = len(pixels) // 2
        frozen = pixels[middle - 1 : middle].repeat(24, 0)
        put(f"edited/freeze{n}.mp4", np.concatenate([pixels[:middle], frozen, pixels[middle:]]))
    put("misc/all_black.mp4", np.zeros_like(shots[-1]))

    # usable: sizes, rates and a rotation that a reader must not assume away
    for n in range(len(ODD_SIZES)):
        put(f"misc/odd{n}.mp4", shots[18 + n])
    for n in range(3):
        pixels = shots[22 + n]
        put(f"phone/VFR_{n:04d}.mp4", pixels, times_s=np.cumsum(rng.uniform(0.3, 1.7, len(pixels)) / rate_hz))
    for n in range(2):
        upright = shots[25 + n]
        put(f"phone/portrait{n}.mp4", np.ascontiguousarray(np.rot90(upright, k=-1, axes=(1, 2))), rotation_deg=90)
    put("misc/short.mp4", shots[27][:5])

    # there already: the same bytes, and the same pictures encoded again
    for n, name in enumerate(good[1:4]):
        shutil.copyfile(folder / name, folder / f"backup/copy_of_{n}.mp4")
    for n, name in enumerate(good[5:8]):
        _, pixels = video.read(folder / name)
        put(f"backup/again{n}.mkv", pixels, crf=crf + 6)

    # not usable
    whole = folder / "misc/whole"
    put("misc/whole", shots[28], container="mp4")
    content = whole.read_bytes()
    (folder / "misc/cut_off.mp4").write_bytes(content[: len(content) * 6 // 10])
    data = content.index(b"mdat") + 4
    noise = rng.bytes(len(content))
    (folder / "misc/corrupt.mp4").write_bytes(
        content[: data + 40] + noise[: len(content) // 2] + content[data + 40 + len(content) // 2 :]
    )
    put("misc/whole", shots[29], container="matroska")
    content = whole.read_bytes()
    (folder / "misc/cut_off.mkv").write_bytes(content[: len(content) * 6 // 10])
    whole.unlink()
    (folder / "misc/empty.mp4").write_bytes(b"")
    (folder / "misc/notes.mp4").write_text("Shopping list: milk, bread, a tripod.\n")

"""Writers of formats that only tests need. The other writers are beside their readers."""

import csv
import io
import json
import pickle
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from scaling4d import video
from scaling4d.benchmarks import movi, perception_test, realestate10k, scannet, tfrecord, waymo
from scaling4d.benchmarks.frames import encode_jpeg
from scaling4d.records import Sample


def write_kinetics(root: Path, split: str, samples: Iterable[Sample], *, labels: Sequence[str], **encoding: float) -> None:
    """Samples with label action, an index into the sorted labels, and a YouTube id as their video, in one folder."""
    (root / split).mkdir(parents=True, exist_ok=True)
    rows = [["label", "youtube_id", "time_start", "time_end", "split"]]
    for sample in samples:
        end_s = -(-len(sample.pixels) // round(encoding["rate_hz"]))
        video.encode(root / split / f"{sample.video}_000000_{end_s:06d}.mp4", sample.pixels, **encoding)
        rows.append([sorted(labels)[int(sample.labels["action"])], sample.video, 0, end_s, split])
    with (root / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_objects(root: Path, split: str, samples: Sequence[Sample], **encoding: float) -> None:
    """Perception Test's objects: label boxes `Q T 4` and valid `Q T`. Tracking starts from an object's first box."""
    without = [
        Sample(s.id, s.video, s.pixels, {"points": np.zeros((0, 1, 2))}, {"points": np.zeros((0, 1), bool)}) for s in samples
    ]
    perception_test.write(root, split, without, **encoding)
    path = root / f"point_tracking_{perception_test.LISTS[split]}.json"
    entries = json.loads(path.read_text())
    for sample in samples:
        del entries[sample.id]["point_tracking"]
        tracks = entries[sample.id]["object_tracking"] = []
        for q, (boxes, valid) in enumerate(zip(sample.labels["boxes"], sample.valid["boxes"], strict=True)):
            ids = np.nonzero(valid)[0].tolist()
            track = {"id": q, "label": "object", "is_occluder": 0, "is_masked": [0] * len(ids), "frame_ids": ids}
            track["bounding_boxes"] = np.round(boxes[valid].astype(float), 5).tolist()
            track["initial_tracking_box"] = [int(n == 0) for n in range(len(ids))]
            track["timestamps"] = [round(number / encoding["rate_hz"] * 1e6) for number in ids]
            tracks.append(track)
    path.unlink()
    path.with_name(path.name.replace("point", "object")).write_text(json.dumps(entries, sort_keys=True, allow_nan=False))


def write_tapvid(root: Path, samples: Iterable[Sample]) -> None:
    """Samples with label points `Q T 2` and valid `Q T`, as DAVIS is distributed."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "tapvid_davis.pkl").write_bytes(pickle.dumps({s.id: {"video": s.pixels, **_tap_tracks(s)} for s in samples}))


def write_tapvid_kinetics(root: Path, samples: Iterable[Sample], *, shards: int) -> None:
    """The same with JPEGs in lists, as Kinetics' script makes them."""
    videos = [{"video": np.array([encode_jpeg(p, 95) for p in s.pixels]), **_tap_tracks(s)} for s in samples]
    size = -(-len(videos) // shards)
    for shard in range(shards):
        path = root / f"{shard:04d}_of_{shards:04d}.pkl"
        path.write_bytes(pickle.dumps(videos[shard * size : (shard + 1) * size]))


def _tap_tracks(sample: Sample) -> dict[str, np.ndarray]:
    size = np.array(sample.pixels.shape[2:0:-1], float)  # W H
    return {"points": sample.labels["points"].astype(float) - 0.5 / size, "occluded": ~sample.valid["points"]}


def write_scannet_export(root: Path, sample: Sample, layout: str) -> None:
    """A scene of split val in an exported layout, at the sensor's rate."""
    export, digits = scannet.EXPORTS[layout], 5 if "posed_images" in layout else 1  # to which a frame's number is padded
    folder, k = root / export.scenes / sample.id, sample.labels["intrinsics"]
    for name in (export.color, export.depth, export.pose, Path(export.color_k).parent):
        (folder / name).mkdir(parents=True, exist_ok=True)
    depth = scannet.millimetres(sample)
    np.savetxt(folder / export.color_k, scannet.pixel_intrinsics(k, *sample.pixels.shape[1:3]), fmt="%f")
    np.savetxt(folder / export.depth_k, scannet.pixel_intrinsics(k, *depth.shape[1:]), fmt="%f")
    for t, pose in enumerate(sample.labels["camera_to_world"]):
        Image.fromarray(sample.pixels[t]).save(folder / export.color / f"{t:0{digits}d}.jpg", quality=95)
        Image.fromarray(depth[t]).save(folder / export.depth / f"{t:0{digits}d}.png")
        np.savetxt(folder / export.pose / f"{t:0{digits}d}.txt", pose, fmt="%f")
    (root / "scannetv2_val.txt").write_text(f"{sample.id}\n")


def write_realestate10k_frames(root: Path, split: str, sample: Sample, *, rate_hz: float) -> None:
    """A folder of png a clip. Its first frame is shown a second after the video's start."""
    (root / realestate10k.FOLDERS[split]).mkdir(parents=True)
    (root / "videos" / sample.id).mkdir(parents=True)
    times_us = [int((1 + t / rate_hz) * 1e6) for t in range(len(sample.pixels))]
    realestate10k.write_rows(root / realestate10k.FOLDERS[split] / f"{sample.id}.txt", sample, times_us)
    for time_us, picture in zip(times_us, sample.pixels, strict=True):
        Image.fromarray(picture).save(root / "videos" / sample.id / f"{time_us}.png")


def write_waymo_v1(root: Path, split: str, sample: Sample, *, rate_hz: float, jpeg_quality: int) -> None:
    """A sample with label boxes `Q T 4` and valid `Q T`. Every object is a vehicle."""
    boxes, frames = waymo.centres_and_sizes(sample), []
    for t, picture in enumerate(sample.pixels):
        tracks = np.nonzero(sample.valid["boxes"][:, t])[0]
        labels = [waymo_label(f"{sample.id}-{q}".encode(), *boxes[q, t].tolist()) for q in tracks]
        frames.append(waymo_frame(round(t / rate_hz * 1e6), {1: encode_jpeg(picture, jpeg_quality)}, {1: labels}))
    write_records(root / waymo.FOLDERS[split] / f"segment-{sample.id}_with_camera_labels.tfrecord", frames)


def waymo_frame(stamp: int, jpegs: dict[int, bytes], labels: dict[int, list[bytes]]) -> bytes:
    """A Frame with pictures and labels by camera. Field numbers are written out, as in dataset.proto."""
    fields = [(1, message([(1, b"context")])), (2, stamp), (3, b""), (5, b"lasers")]
    fields += [(4, message([(1, camera), (2, jpeg)])) for camera, jpeg in jpegs.items()]
    fields += [(8, message([(1, camera), *((2, label) for label in some)])) for camera, some in labels.items()]
    return message(fields)


def waymo_label(object_id: bytes, x: float, y: float, width: float, height: float) -> bytes:
    """In a Label's Box, field 4 is `width`, the extent in y, and 5 is `length`, the extent in x."""
    return message([(1, message([(1, x), (2, y), (4, height), (5, width)])), (3, 1), (4, object_id)])


def write_records(path: Path, messages: Iterable[bytes]) -> None:
    """A TFRecord file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for content in messages:
            length = struct.pack("<Q", len(content))
            checksums = (struct.pack("<I", tfrecord.masked_crc32c(data)) for data in (length, content))
            file.write(length + next(checksums) + content + next(checksums))


def message(fields: Iterable[tuple[int, int | float | bytes]]) -> bytes:
    """A protocol buffer of (number, value); whole numbers are not negative."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, bytes):
            out += _varint(number << 3 | 2) + _varint(len(value)) + value
        elif isinstance(value, float):
            out += _varint(number << 3 | 1) + struct.pack("<d", value)
        else:
            out += _varint(number << 3) + _varint(value)
    return bytes(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def write_movi(root: Path, samples: Sequence[Sample], *, shards: int = 1) -> None:
    """Samples with label points `Q F 2` and valid `Q F`, as scivid distributes MOVi-E."""
    write_array_records(root / "train", [movi_record(sample) for sample in samples], shards=shards)


def write_array_records(path: Path, records: Sequence[bytes], *, shards: int = 1) -> None:
    """Shards `<path>.array_record-*`. Record n is in shard n modulo their number."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        writer = ArrayRecordWriter(f"{path}.array_record-{shard:05d}-of-{shards:05d}", "group_size:1")
        for record in records[shard::shards]:
            writer.write(record)
        writer.close()


def movi_record(sample: Sample) -> bytes:
    points, visible = (array.swapaxes(0, 1).astype("<f4") for array in (sample.labels["points"], sample.valid["points"]))
    lists = {
        movi.PICTURES: [_png(picture) for picture in sample.pixels],
        movi.TRACKS: [_tensor(frame) for frame in points],
        movi.VISIBLE: [_tensor(frame) for frame in visible],
    }
    entries = [message([(1, name.encode()), (2, b"".join(map(_feature, values)))]) for name, values in lists.items()]
    return message([(1, b""), (movi.LISTS, b"".join(message([(1, entry)]) for entry in entries))])


def _feature(value: bytes) -> bytes:
    bytes_list = message([(1, value)])
    return message([(1, message([(1, bytes_list)]))])  # of a FeatureList


def _tensor(array: np.ndarray) -> bytes:
    sizes = b"".join(message([(2, message([(1, size)]))]) for size in array.shape)
    return message([(movi.DTYPE, movi.FLOAT), (movi.SHAPE, sizes), (movi.CONTENT, array.tobytes())])


def _png(picture: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "PNG")
    return encoded.getvalue()

"""MODEL -> CHECKPOINT FOLDER: the encoders that an evaluation compares, from four kinds of sources."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from scaling4d import artifacts, provenance
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.encoder import HUB_ID, Encoder
from scaling4d.encoders.transformers import CONFIG
from scaling4d.evaluate.function import FunctionEncoder, build_function, names_function
from scaling4d.records import UserError, as_user_error, read_json_object, write_json

SOURCES = (
    "a Checkpoint folder, a published encoder's file or folder, owner/name of the Hugging Face hub, "
    "module:function, or an entry point of group scaling4d.encoders"
)
STAGE = "evaluate"


def name_of(model: str) -> str:
    """Name of an encoder in tables and folders. Raises UserError: no such model."""
    path = Path(model)
    if path.is_dir():
        name = path.name or path.resolve().name
    elif path.is_file():
        name = Path(path.name.removesuffix(".tar")).stem
    elif names_function(model):
        name = model.rpartition(":")[2]
    elif re.fullmatch(HUB_ID, model.partition("@")[0]):
        name = model.partition("@")[0].rpartition("/")[2]
    else:
        raise UserError(f"no model {model!r}; needed {SOURCES}")
    return re.sub(r"[^\w.-]|^\.+", "_", name)


def write_encoder(model: str, clip: tuple[int, int, int], home: Path) -> Path:
    """Write `home/pretrain/<name>`: a Checkpoint folder that is shown clips of this size, or a link to one.

    Args:
        model: one of SOURCES; `owner/name@REVISION` for a branch, tag or commit of the hub.
        clip: T H W. A Checkpoint folder of another clip is resized; a callable may have one of its own.
    Raises:
        UserError: no such model, a damaged one, no download, or a clip that does not suit it.
    """
    path, final = Path(model), home / "pretrain" / name_of(model)
    written = not final.is_symlink() and path.resolve() == final.resolve()
    if path.exists() and (written or path.absolute().is_relative_to((home / "pretrain").absolute())):
        raise UserError(f"{model} lies in {home}, which this evaluation writes; name its source, or another --out")
    if final.is_symlink():
        final.unlink()
    if path.is_dir() and _is_checkpoint(path, clip):
        shutil.rmtree(final, ignore_errors=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        final.symlink_to(path.resolve())
    elif not path.exists() and names_function(model):
        _write_function(model, clip, final)
    else:
        _import(model, clip, final)
    return final


def _is_checkpoint(folder: Path, clip: tuple[int, int, int]) -> bool:
    """Whether a folder is a Checkpoint of this project for clips of this size."""
    path = folder / CONFIG
    with as_user_error(path):
        if not path.is_file() or "model_type" in read_json_object(path):
            return False
    return tuple(Checkpoint.read(folder).settings.get("clip", ())) == clip


def _write_function(model: str, clip: tuple[int, int, int], final: Path) -> None:
    """The folder's weights are features of fixed clips. Their sha256 stands for the callable."""
    config, features, parameters, sources = build_function(model, clip)
    with provenance.atomic_folder(final) as out:
        saved = Checkpoint(final.name, FunctionEncoder.__name__, asdict(config), parameters, step=0, clips_seen=0)
        saved.write(out, {"features": features})
        write_json(out / artifacts.PROVENANCE, {"stage": STAGE, "settings": {"model": model}, "inputs": sources})


def _import(model: str, clip: tuple[int, int, int], final: Path) -> None:
    encoder = Encoder.from_pretrained(model)
    own = encoder.clip
    try:
        if own != clip:
            encoder.resize(clip)
    except UserError as error:
        if own[0] == clip[0]:
            raise
        raise UserError(f"{error}; -S clip.frames={own[0]} is its own") from error
    encoder.checkpoint = replace(encoder.checkpoint, name=final.name)
    with provenance.atomic_folder(final) as out:
        out.rmdir()
        encoder.save_pretrained(out)

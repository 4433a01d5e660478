"""The Hugging Face hub, through huggingface_hub (extra `hub`), which is imported only where it is used."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from scaling4d.records import UserError, pip_install, shortened


def download(source: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a model's files, downloaded once to the hub's cache.

    revision: branch, tag or commit; None: the main branch. patterns: names of the files; no other file is read.
    Raises UserError: no huggingface_hub, no such model, or no network.
    """
    hub = _hub(source)
    with _hub_errors(hub, f"{source}{f' at {revision[:12]}' if revision else ''} cannot be downloaded"):
        return Path(hub.snapshot_download(source, revision=revision, allow_patterns=list(patterns)))


def upload(folder: Path, target: str, *, private: bool | None, message: str) -> str:
    """Upload a folder as one commit to a model of the hub, which is made where it is missing. Returns its address.

    private: of a new model; None: as the account's settings say.
    Raises UserError: no huggingface_hub, a wrong name, no network, no right to write there.
    """
    hub = _hub(target)
    with _hub_errors(hub, f"{target} cannot be uploaded"):
        address = hub.create_repo(target, private=private, exist_ok=True)
        hub.upload_folder(repo_id=target, folder_path=folder, commit_message=message)
    return str(address)


def _hub(name: str) -> ModuleType:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(f"{name} on the Hugging Face hub: needed huggingface_hub; {pip_install('hub')}") from error


@contextmanager
def _hub_errors(hub: ModuleType, problem: str) -> Iterator[None]:
    transport = importlib.import_module(f"{hub.__name__}.errors").HfHubHTTPError.__bases__[
        0
    ]  # its client's, as without a network
    try:
        yield
    except (OSError, ValueError, transport) as error:
        raise UserError(f"{problem} ({shortened(error)})") from error

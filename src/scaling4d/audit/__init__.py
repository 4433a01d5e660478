"""dvc.lock -> LINEAGE: verify every hash, explain every number, compare a run made again, export it."""

from scaling4d.audit.command import again, check, export, walk_back
from scaling4d.audit.verify import Finding, verify

__all__ = ["Finding", "again", "check", "export", "verify", "walk_back"]

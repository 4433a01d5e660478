"""dvc.lock -> LINEAGE: verify every hash, explain every number."""

from scaling4d.audit.explain import explain
from scaling4d.audit.verify import Finding, run, verify

__all__ = ["Finding", "explain", "run", "verify"]

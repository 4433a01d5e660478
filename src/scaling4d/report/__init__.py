"""RESULTS -> FIGURES: tables, power-law fits, figures, the papers' own curves; it reads JSON, never weights."""

from scaling4d.report import readouts
from scaling4d.report.story import Story, read
from scaling4d.report.tables import table
from scaling4d.report.write import build

__all__ = ["Story", "build", "read", "readouts", "table"]

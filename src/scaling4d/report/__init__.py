"""RESULTS -> FIGURES: tables, power-law fits, figures, the papers' own curves. It reads JSON, never weights."""

from scaling4d.report.layout import read_page
from scaling4d.report.notebook import show_table
from scaling4d.report.run_results import RunResults, read_run_results
from scaling4d.report.stage import build
from scaling4d.report.tables import table_text

__all__ = ["RunResults", "build", "read_page", "read_run_results", "show_table", "table_text"]

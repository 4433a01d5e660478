"""RESULTS -> FIGURES: tables, power-law fits, figures, the papers' own curves. It reads JSON, never weights."""

from scaling4d.report.notebook import show_table

__all__ = ["show_table"]  # for the notebook

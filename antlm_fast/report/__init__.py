"""The report of a run folder: model card, picture, page."""

from antlm_fast.report.files import write_report

__all__ = ["write_report"]

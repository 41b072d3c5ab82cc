"""What a run did, for people: one self-contained HTML page, and a table for the terminal."""

from secateur.report.load import RunRecord, load_run
from secateur.report.render import render_report, write_report
from secateur.report.terminal import summary_table

__all__ = ["RunRecord", "load_run", "render_report", "summary_table", "write_report"]

"""report.html: what a run did and how good it became, in one file that one can send to somebody."""

from rayrlhf.reports.page.report import report, write_report

__all__ = ["report", "write_report"]

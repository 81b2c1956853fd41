"""``report.html``: scores, errors and every video's timeline in one file that a browser opens from disk.

>>> from tad.evaluate.report import build_report, score_report
"""

from tad.evaluate.report.build import build_report, page
from tad.evaluate.report.data import report_data
from tad.evaluate.report.files import files_of, make_proxies
from tad.evaluate.report.scores import score_report

__all__ = ["build_report", "files_of", "make_proxies", "page", "report_data", "score_report"]

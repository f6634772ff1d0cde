"""What the papers published and what was measured here, side by side. It imports nothing of the other packages."""

from results.papers import Figures, Paper, Row, all_papers, all_rows
from results.table import row_line

__all__ = ["Figures", "Paper", "Row", "all_papers", "all_rows", "row_line"]

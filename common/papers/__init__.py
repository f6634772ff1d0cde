"""The published numbers, one TOML file a paper; read through `papers` and `published_row`."""

from common.papers.published import GRADES, Figures, Paper, Row, all_rows, papers, published_row

__all__ = ["GRADES", "Figures", "Paper", "Row", "all_rows", "papers", "published_row"]

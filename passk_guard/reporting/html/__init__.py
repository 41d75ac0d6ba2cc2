"""HTML pages without a network: components that take text and numbers and return escaped markup.

`Section`s of components go into `render_page`. Text is escaped wherever it enters; only components make `Html`.
"""

from passk_guard.reporting.html.charts import Band, Points, Series, line_chart, scatter
from passk_guard.reporting.html.elements import Html, bullets, callout, escape, facts, figures, join, paragraph, tag
from passk_guard.reporting.html.frame import Level, Upright
from passk_guard.reporting.html.heat_map import heat_map
from passk_guard.reporting.html.histogram import Distribution, histogram
from passk_guard.reporting.html.page import Section, in_a_frame, page_kind, render_page
from passk_guard.reporting.html.table import Column, cut_text, table

__all__ = [
    "Band",
    "Column",
    "Distribution",
    "Html",
    "Level",
    "Points",
    "Section",
    "Series",
    "Upright",
    "bullets",
    "callout",
    "cut_text",
    "escape",
    "facts",
    "figures",
    "heat_map",
    "histogram",
    "in_a_frame",
    "join",
    "line_chart",
    "page_kind",
    "paragraph",
    "render_page",
    "scatter",
    "table",
    "tag",
]

"""What an adapter is and what its routers do, as plain numbers, tables, pictures and a page."""

from .adapter import describe
from .collect import Routing, Sample, collect
from .findings import findings
from .heatmaps import draw, write_pictures
from .page import write_page
from .similarity import similarity
from .uniform import uniform_gates

__all__ = [
    "Routing",
    "Sample",
    "collect",
    "describe",
    "draw",
    "findings",
    "similarity",
    "uniform_gates",
    "write_page",
    "write_pictures",
]

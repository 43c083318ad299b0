"""The settings of a run: declared once, checked at the edge."""

from fedkd.settings.config import RunConfig

__all__ = ["RunConfig"]

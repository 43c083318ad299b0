"""What a run leaves on disk, and whose a folder is."""

from fedkd.results.folder import Measures, PeerSummary, Row, RunFolder, Summary

__all__ = ["Measures", "PeerSummary", "Row", "RunFolder", "Summary"]

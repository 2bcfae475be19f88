"""The report: what was chosen for each site and why, what it gained, what it cost. In the terminal, as one HTML file, and as JSON."""

from .model import Form, PassTime, Quality, Refusal, Report

__all__ = ["Form", "PassTime", "Quality", "Refusal", "Report"]

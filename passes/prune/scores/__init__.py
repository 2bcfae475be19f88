"""Scores: the importance of each weight. One file a score: a function of its name, and STATISTICS, what it needs of calibration."""

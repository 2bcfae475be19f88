"""What a recovery did, as plain data for the report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

KEPT_POINTS = 500


@dataclass
class Point:
    """One step of the loss curve. quality: of the user's metric, where it was measured behind this step."""

    step: int
    seconds: float
    loss: float
    rate: float
    quality: float | None = None


@dataclass
class Recovery:
    """How a model was brought towards its teacher.

    points   the loss curve, thinned out evenly where it has many steps; every measurement of quality is in it
    seconds  of all, over every run that it took
    stopped  why it ended: "all steps are done", "the time is up", "the data ran out", ...
    before   the user's metric before the first step; best: the one of what was handed back. None where there is no metric
    begun    seconds when the first step was over; measuring: of the longest measurement of the metric
    early    how many steps the recipe's masks and the like still had before them when it ended: they are not what they were to become
    """

    losses: list[str] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    stopped: str = ""
    before: float | None = None
    best: float | None = None
    best_step: int | None = None
    begun: float = 0.0
    measuring: float = 0.0
    early: int = 0

    def misses(self) -> int:
        """How many measurements of the user's metric there were since the best one."""
        return sum(point.quality is not None and point.step > (self.best_step or 0) for point in self.points)

    def add(self, point: Point) -> None:
        """Take a point into the curve."""
        self.points.append(point)
        if len(self.points) > 2 * KEPT_POINTS:
            self.points = [one for i, one in enumerate(self.points) if i % 2 or one.quality is not None]

    @property
    def failed(self) -> bool:
        """Did it end on a number that is none?"""
        return "the last good weights" in self.stopped

    def join(self, later: Recovery) -> None:
        """Take in what came behind it, the next block's."""
        for point in later.points:
            self.add(replace(point, step=point.step + self.steps, seconds=point.seconds + self.seconds))
        if later.best is not None:
            self.before = later.before if self.before is None else self.before
            self.best, self.best_step = later.best, (later.best_step or 0) + self.steps
        self.measuring = max(self.measuring, later.measuring)
        self.steps, self.seconds, self.stopped = self.steps + later.steps, self.seconds + later.seconds, later.stopped

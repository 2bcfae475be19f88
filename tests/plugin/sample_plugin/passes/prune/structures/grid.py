from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """A structure with options of its own."""

    rows: int = 1
    columns: int = 1
    label: str = ""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError("a grid has rows")

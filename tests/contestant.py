"""A contestant of the benchmarks that needs no model, in a file that its process imports at once."""

from __future__ import annotations


class Counter:
    """Turn 7 fails; every other turn says where it has counted to."""

    def __init__(self, start: float) -> None:
        self.start = start

    def run(self, turn: int) -> dict[str, float]:
        if turn == 7:
            raise ZeroDivisionError("turn seven")
        return {"value": self.start + turn}

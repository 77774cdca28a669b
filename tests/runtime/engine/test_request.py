"""A request may be counted by other threads, such as those that tell peers how busy the engine is."""

from __future__ import annotations

from headwise.runtime.engine.request import Request, Seat
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.plan import RowSampling


class Leaving(Request):
    """Its seat is taken as soon as somebody has looked."""

    looks = 0

    @property  # type: ignore[override]
    def seat(self) -> Seat | None:
        self.looks += 1
        return Seat(self, 0, [], 0, 0, 3, 6, 0, 0) if self.looks % 2 else None

    @seat.setter
    def seat(self, seat: Seat | None) -> None: ...


def test_a_seat_may_be_taken_while_tokens_are_counted() -> None:
    request = Leaving("one", [5, 6, 7], SamplingParams(), RowSampling(), max_tokens=4)
    assert request.num_tokens == 3
    assert request.num_uncomputed == 3

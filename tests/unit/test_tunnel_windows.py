"""How the window is divided, against guests that send whatever they may."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wherry.tunnel.windows import BUSY_S, LEAST_BYTES, PORTION_BYTES, WINDOW_BYTES, Windows

PACKET_BYTES = 32 * 1024
STREAMS = 8


class Guest:
    """Streams on each of which a guest sends, and somebody takes that at once."""

    def __init__(self, streams: int = STREAMS) -> None:
        self.time = 0.0
        self.windows = Windows(lambda: self.time)
        self.ahead = [WINDOW_BYTES] * streams
        self.given: list[int] = []

    def send(self, stream: int, most: int = PACKET_BYTES) -> None:
        assert self.ahead[stream] > 0, "the guest may send nothing, so nobody asks again"
        self.ahead[stream] -= min(most, self.ahead[stream])
        more = self.windows.give(stream, WINDOW_BYTES - self.ahead[stream])
        if more:
            self.given.append(more)
            self.ahead[stream] += more

    def send_all(self, count: int = 2 * WINDOW_BYTES) -> None:
        """Send so much on each stream, in turns."""
        for _ in range(0, count, PACKET_BYTES):
            for stream in range(len(self.ahead)):
                self.send(stream)


def test_one_alone_has_the_whole_window_and_gets_it_back_by_quarters() -> None:
    guest = Guest(1)
    guest.send_all(10 * WINDOW_BYTES)
    assert guest.given == [PORTION_BYTES + PACKET_BYTES] * len(guest.given)
    assert guest.ahead[0] >= WINDOW_BYTES - PORTION_BYTES


def test_many_have_together_what_one_may_have() -> None:
    guest = Guest()
    guest.send_all()
    assert sum(guest.ahead) <= WINDOW_BYTES
    guest.given.clear()
    guest.send_all()
    assert sum(guest.ahead) <= WINDOW_BYTES
    assert min(guest.given) > WINDOW_BYTES // STREAMS // 2, "each portion costs a packet"


def test_what_others_had_comes_back_when_they_are_quiet() -> None:
    guest = Guest()
    guest.send_all()
    assert guest.ahead[0] <= WINDOW_BYTES // STREAMS
    guest.time += 2 * BUSY_S
    guest.send(0)
    assert guest.ahead[0] == WINDOW_BYTES


def test_one_that_brings_little_takes_no_part() -> None:
    guest = Guest(2)
    for _ in range(10 * WINDOW_BYTES // PACKET_BYTES):
        guest.send(0)
        guest.send(1, 100)
        assert guest.ahead[0] >= WINDOW_BYTES - PORTION_BYTES


def test_very_many_can_send_a_few_packets_each() -> None:
    guest = Guest(100)
    guest.send_all(2 * WINDOW_BYTES)
    assert min(guest.ahead) >= LEAST_BYTES // 2
    assert max(guest.ahead) <= LEAST_BYTES


@given(
    st.lists(
        st.tuples(
            st.integers(0, STREAMS - 1), st.integers(1, 3 * WINDOW_BYTES), st.floats(0, BUSY_S)
        )
    )
)
def test_the_guest_may_always_send_more_and_never_more_than_a_window(
    steps: list[tuple[int, int, float]],
) -> None:
    guest = Guest()
    for stream, most, pause in steps:
        guest.time += pause
        guest.send(stream, most)
        assert LEAST_BYTES // 2 <= guest.ahead[stream] <= WINDOW_BYTES

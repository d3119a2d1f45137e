"""What the simulated device finds: each way in which two streams may use memory in no order, and none where there is one."""

import torch
from simulated_streams import RaceFinder, SimulatedStreams


@torch.no_grad()
def test_the_finder_sees_what_is_let_go_of_too_early() -> None:
    """Memory of the first stream before the join; of the second, which the first has read, before the next fork."""
    for keeps in (False, True):
        streams = SimulatedStreams()
        side = streams.make()
        with RaceFinder(streams) as finder:
            x = torch.ones(4)
            kept = [x] if keeps else []
            side.wait_stream(streams.first)
            with streams.entered(side):
                y = x + 1
            del x
            torch.ones(4)
            streams.first.wait_stream(side)
            kept.clear()
            torch.ones(4)
            assert finder.faults == ([] if keeps else ["first: hands out memory that second still uses"])
            finder.faults.clear()
            y * 2
            del y
            if keeps:
                side.wait_stream(streams.first)
            with streams.entered(side):
                torch.ones(4)
        assert finder.faults == ([] if keeps else ["second: hands out memory that first still uses"])


@torch.no_grad()
def test_the_finder_sees_memory_that_somebody_before_may_still_use() -> None:
    """The second stream writes to what the first was handed out after the fork, as q, k and v would be."""
    for waits in (False, True):
        streams = SimulatedStreams()
        side = streams.make()
        with RaceFinder(streams) as finder:
            side.wait_stream(streams.first)
            torch.ones(4)
            x = torch.empty(4)
            if waits:
                side.wait_stream(streams.first)
            with streams.entered(side):
                x.zero_()
        assert finder.faults == ([] if waits else ["second: zero_ before first has written"])


@torch.no_grad()
def test_rows_of_one_tensor_that_each_stream_has_for_itself_are_no_fault() -> None:
    """As q, k and v in joint order; a row that both have is one."""
    for shared in (0, 1):
        streams = SimulatedStreams()
        side = streams.make()
        with RaceFinder(streams) as finder:
            x = torch.zeros(4, 3)
            side.wait_stream(streams.first)
            x[: 2 + shared].add_(1)
            with streams.entered(side):
                x[2:].add_(1)
        assert finder.faults == (["second: add_ before first has written"] if shared else [])
        assert finder.counts == {"first": 2, "second": 1}

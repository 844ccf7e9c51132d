"""What becomes of requests at a worker's end, where no real worker would show it for certain."""

import asyncio

from immich_ml_metal.gateway.body import Body
from immich_ml_metal.gateway.crashes import CrashRecord
from immich_ml_metal.gateway.dispatcher import Dispatcher
from immich_ml_metal.gateway.supervisor import End
from immich_ml_metal.metrics import Metrics


async def test_nobody_goes_on_reading_the_answer_of_a_worker_that_ended() -> None:
    """A helper may hold its socket open: what came from there would be a second answer."""
    dispatcher = Dispatcher(["true"], "{}", limit=1, crashes=CrashRecord(), metrics=Metrics())
    job = dispatcher.submit(Body(), b"", "id")
    assert dispatcher.queue.take(1) == [job]
    reading = asyncio.create_task(asyncio.sleep(3600))
    dispatcher._sending[job] = reading
    dispatcher._worker_ended(End("SIGABRT", fault=True))
    assert (dispatcher.queue.running, dispatcher.queue.waiting) == (0, 1)
    await asyncio.wait({reading}, timeout=10)
    assert reading.cancelled()

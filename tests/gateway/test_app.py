"""The gateway against a fake worker: a real child process, real sockets."""

import asyncio
import json
import resource
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from doubles.gateway import is_alive, right_answer, running_gateway
from doubles.timing import until

from immich_ml_metal.gateway import remedies
from immich_ml_metal.gateway.admission import Reception, Room
from immich_ml_metal.gateway.crashes import CrashRecord
from immich_ml_metal.system.footprint import memory_bytes


@pytest.mark.parametrize("fault", [b"abort", b"bye"])
async def test_a_picture_that_ends_workers_fails_alone(tmp_path: Path, fault: bytes) -> None:
    bad = b"[busy][%s]" % fault
    good = [b"good %d [busy]" % i for i in range(5)]
    async with running_gateway(tmp_path, max_concurrent_requests=6) as service:
        await service.ready()
        with service.busy():
            tasks = [asyncio.create_task(service.predict(body)) for body in [*good, bad]]
            await service.started(6)
        answers = [await task for task in tasks]
        await service.ready()
        assert len(service.journal("born")) == 3
    assert [answer.status_code for answer in answers] == [200] * 5 + [500]
    assert [answer.json() for answer in answers[:5]] == [right_answer(body) for body in good]
    assert "ended each time" in answers[5].json()["detail"]


async def test_a_condemned_form_is_known_again_under_another_boundary(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as service:
        for status, workers in [(500, 3), (500, 3)]:  # the second time costs no worker
            form = {"image": b"[abort]"}  # httpx draws a boundary for each
            response = await service.client.post("/predict", files=form, data={"entries": "{}"})
            assert response.status_code == status
            await service.ready()
            assert len(service.journal("born")) == workers
        form = {"image": b"another"}
        response = await service.client.post("/predict", files=form, data={"entries": "{}"})
    assert response.status_code == 200


async def test_requests_of_a_killed_worker_are_sent_again_in_order_one_at_a_time(
    tmp_path: Path,
) -> None:
    bodies = [b"picture %d [busy]" % i for i in range(4)]
    async with running_gateway(tmp_path) as service:
        await service.ready()
        tasks = []
        with service.busy():
            for number, body in enumerate(bodies):
                tasks.append(asyncio.create_task(service.predict(body)))
                await service.started(number + 1)
            service.kill_worker()
        answers = [await task for task in tasks]
        sent_again = [line.split()[1] for line in service.journal("start")[4:]]
        health = (await service.client.get("/health")).json()
    assert [answer.json() for answer in answers] == [right_answer(body) for body in bodies]
    assert sent_again == [right_answer(body)["digest"] for body in bodies]
    assert health["requests"]["replayed"] == 4
    assert health["failures"]["by_cause"] == {"worker ended: SIGKILL": 1}


async def test_a_worker_without_memory_is_replaced_after_its_others_and_the_job_is_sent_again(
    tmp_path: Path,
) -> None:
    (tmp_path / "full").touch()
    async with running_gateway(tmp_path) as service:
        await service.ready()
        with service.busy():
            other = asyncio.create_task(service.predict(b"[busy]"))
            await service.started(1)
            hungry = asyncio.create_task(service.predict(b"[starve]"))
            await until(lambda: service.gateway.dispatcher.counts.replayed == 1, "a second try")
            late = asyncio.create_task(service.predict(b"late"))
            await until(lambda: service.gateway.dispatcher.queue.waiting == 2)
            (tmp_path / "full").unlink()
            assert (service.state, other.done(), hungry.done()) == ("ready", False, False)
        answers = [await task for task in (other, hungry, late)]
        health = (await service.client.get("/health")).json()
        digest = right_answer(b"[busy]")["digest"]
        assert sum(line.endswith(digest) for line in service.journal("start")) == 1
        assert len(service.journal("born")) == 2
    bodies = (b"[busy]", b"[starve]", b"late")
    assert [answer.json() for answer in answers] == [right_answer(body) for body in bodies]
    (failure,) = health["failures"]["recent"]
    assert failure["cause"] == "worker ended: out of memory"
    assert failure["advice"] == remedies.MEMORY


async def test_a_job_that_takes_all_memory_of_two_workers_is_condemned(tmp_path: Path) -> None:
    (tmp_path / "full").touch()
    async with running_gateway(tmp_path) as service:
        bad, good = await asyncio.gather(service.predict(b"[starve]"), service.predict(b"good"))
        again = await service.predict(b"[starve]")
        await service.ready()
        assert len(service.journal("born")) == 3
    assert (bad.status_code, good.status_code, again.status_code) == (500, 200, 500)
    assert "(out of memory, out of memory)" in bad.json()["detail"]
    assert "not tried again" in again.json()["detail"]


async def test_two_kills_from_outside_do_not_condemn_a_request(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as service:
        await service.ready()
        with service.busy():
            task = asyncio.create_task(service.predict(b"[busy]"))
            for starts in (1, 2):
                await service.started(starts)
                service.kill_worker()
        assert (await task).status_code == 200


async def test_an_worker_without_progress_is_replaced_and_its_request_fails_at_the_second(
    tmp_path: Path,
) -> None:
    async with (
        running_gateway(tmp_path, request_timeout_s=1) as service,
        service.watched_closely(),
    ):
        await service.ready()
        hanging = asyncio.create_task(service.predict(b"[hang]"))
        await service.started(1)
        good = asyncio.create_task(service.predict(b"good"))
        assert (await good).status_code == 200
        response = await hanging
        health = (await service.client.get("/health")).json()
    assert response.status_code == 500
    assert health["failures"]["by_cause"]["worker ended: no progress for 1 s"] == 2


async def test_an_worker_with_a_blocked_loop_is_replaced_too(tmp_path: Path) -> None:
    async with (
        running_gateway(tmp_path, request_timeout_s=1) as service,
        service.watched_closely(),
    ):
        assert (await service.predict(b"[block 60]")).status_code == 500
        assert (await service.predict(b"good")).status_code == 200


async def test_requests_wait_while_the_worker_starts_and_ping_is_answered(tmp_path: Path) -> None:
    (tmp_path / "held").touch()
    async with running_gateway(tmp_path) as service:
        waiting = [asyncio.create_task(service.predict(b"early %d" % i)) for i in range(8)]
        await until(lambda: service.gateway.open_requests == 8)
        for _ in range(20):
            assert (await service.client.get("/ping")).text == "pong"
        assert not any(task.done() for task in waiting)
        (tmp_path / "held").unlink()
        assert [(await task).status_code for task in waiting] == [200] * 8


async def test_an_worker_that_never_comes_costs_each_request_its_hold_and_no_less(
    tmp_path: Path,
) -> None:
    (tmp_path / "refuse").touch()
    crashes = CrashRecord(max_crashes=2)
    async with running_gateway(tmp_path, hold_limit_s=1.0, crashes=crashes) as service:
        start_s = time.monotonic()
        answers = await asyncio.gather(*(service.predict(b"%d" % i) for i in range(5)))
        held_s = time.monotonic() - start_s
        await until(lambda: not service.gateway.can_serve())
        ping = await service.client.get("/ping")
        health = (await service.client.get("/health")).json()
    assert [answer.status_code for answer in answers] == [503] * 5
    assert answers[0].headers["retry-after"] == "30"
    assert held_s >= 1.0
    assert (ping.status_code, health["status"]) == (503, "crash-loop")
    assert ping.headers["retry-after"] == "30"
    assert health["failures"]["by_cause"]["worker ended: exit status 7"] >= 2


async def test_a_crash_loop_that_ends_serves_what_waited(tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    async with running_gateway(tmp_path, crashes=CrashRecord(max_crashes=2)) as service:
        waiting = [asyncio.create_task(service.predict(b"%d" % i)) for i in range(79)]
        await until(lambda: not service.gateway.can_serve())
        (tmp_path / "refuse").unlink()
        assert [(await task).status_code for task in waiting] == [200] * 79
        assert (await service.client.get("/ping")).status_code == 200


async def test_at_most_the_configured_number_of_requests_is_with_the_worker(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, max_concurrent_requests=2) as service:
        tasks = [asyncio.create_task(service.predict(b"%d [hang]" % i)) for i in range(4)]
        await service.started(2)
        await until(lambda: service.gateway.dispatcher.queue.waiting == 2)
        assert service.gateway.dispatcher.queue.running == 2
        for task in tasks:
            task.cancel()
        await until(lambda: service.gateway.open_requests == 0)


async def test_a_search_is_answered_while_as_many_pictures_as_may_are_with_the_worker(
    tmp_path: Path,
) -> None:
    async with running_gateway(tmp_path, max_concurrent_requests=1) as service:
        tasks = [asyncio.create_task(service.predict(b"%d [hang]" % i)) for i in range(3)]
        await service.started(1)
        search = b'{"clip":{"textual":{"modelName":"m"}}}'
        answer = await asyncio.wait_for(service.predict(search), 30)
        assert answer.json() == right_answer(search)
        assert service.gateway.dispatcher.queue.waiting == 2
        for task in tasks:
            task.cancel()
        await until(lambda: service.gateway.open_requests == 0)


async def test_uploads_beyond_the_memory_lie_on_disk_and_are_replayed_from_there(
    tmp_path: Path,
) -> None:
    bodies = [b"%d [busy]" % i + bytes(3_000_000) for i in range(3)]
    room = Room(memory_bytes=1_000_000, spool_bytes=10_000_000)
    reception = Reception(room, max_body_bytes=10_000_000)
    async with running_gateway(tmp_path, reception=reception) as service:
        await service.ready()
        with service.busy():
            tasks = [asyncio.create_task(service.predict(body)) for body in bodies]
            await service.started(3)
            assert room.held("spool") == sum(map(len, bodies))
            service.kill_worker()
        answers = [await task for task in tasks]
    assert [answer.json() for answer in answers] == [right_answer(body) for body in bodies]


async def test_without_room_a_client_is_not_read_from_until_there_is_some(tmp_path: Path) -> None:
    room = Room(memory_bytes=1, spool_bytes=1_100_000)
    reception = Reception(room, max_body_bytes=1_000_000)
    async with running_gateway(tmp_path, reception=reception) as service:
        with service.busy():
            first = asyncio.create_task(service.predict(b"[busy]" + bytes(900_000)))
            await service.started(1)
            second = asyncio.create_task(service.predict(bytes(900_000)))
            await until(lambda: room.waiting == 1)
            assert 900_006 <= room.held("spool") < 1_100_000
        assert [(await first).status_code, (await second).status_code] == [200, 200]


async def test_a_client_that_stops_sending_is_let_go(tmp_path: Path) -> None:
    room = Room(memory_bytes=10_000, spool_bytes=0)
    reception = Reception(room, max_body_bytes=10_000, client_timeout_s=0.2)
    async with running_gateway(tmp_path, reception=reception) as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 2000\r\n\r\nabc")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        assert room.held("memory") == 0
        writer.close()


async def test_health_tells_about_both_processes(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as service:
        await service.ready()
        await service.predict(b"a picture")
        health = (await service.client.get("/health")).json()
        pid = service.worker_pid
    assert health["status"] == "ok"
    assert health["worker"]["pid"] == pid
    assert health["worker"]["health"]["progress"] == 1
    assert health["worker"]["memory_peak_bytes"] >= health["worker"]["memory_bytes"] > 10**6
    assert health["gateway"]["memory_peak_bytes"] >= health["gateway"]["memory_bytes"] > 10**7
    none = dict.fromkeys(("refused", "failed", "replayed", "cancelled"), 0)
    assert health["requests"] == {"received": 1, "answered": 1} | none
    assert "a picture" not in json.dumps(health)


async def test_what_the_worker_puts_off_is_asked_again_until_it_is_answered(tmp_path: Path) -> None:
    (tmp_path / "offline").touch()
    async with running_gateway(tmp_path) as service:
        held = asyncio.create_task(service.predict(b"[later]"))
        await service.started(3)
        assert not held.done()
        (tmp_path / "offline").unlink()
        assert (await held).json() == right_answer(b"[later]")
        counts = service.gateway.dispatcher.counts
        assert (counts.answered, counts.failed) == (1, 0)


async def test_what_is_put_off_to_the_end_of_the_hold_gets_the_workers_reason(
    tmp_path: Path,
) -> None:
    (tmp_path / "offline").touch()
    async with running_gateway(tmp_path, hold_limit_s=1.5) as service:
        await service.ready()
        start_s = time.monotonic()
        answer = await service.predict(b"[later]")
        assert time.monotonic() - start_s >= 1.4
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "0")
    assert answer.json() == right_answer(b"[later]")  # what the worker said


async def test_a_caller_that_hangs_up_between_two_tries_is_let_go(tmp_path: Path) -> None:
    (tmp_path / "offline").touch()
    async with running_gateway(tmp_path) as service:
        held = asyncio.create_task(service.predict(b"[later]"))
        await service.started(2)
        held.cancel()
        await until(lambda: service.gateway.dispatcher.counts.cancelled == 1)
        assert service.gateway.holding.reception.room.held("memory") == 0


async def test_metrics_show_what_is_with_the_worker_and_what_waits_for_it(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, max_concurrent_requests=1) as service:
        held = [asyncio.create_task(service.predict(body)) for body in (b"[hang]", b"[hang] ")]
        await service.started(1)
        await until(lambda: service.gateway.dispatcher.queue.waiting, "a request that waits")
        text = (await service.client.get("/metrics")).text
        for request in held:
            request.cancel()
    assert 'immich_ml_in_flight{process="gateway"} 2.0' in text
    assert 'immich_ml_queue_depth{device="worker",process="gateway"} 1.0' in text
    assert "immich_ml_faces_found_total" not in text  # the fake worker has none


async def test_an_idle_worker_ends_and_the_next_request_starts_one(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, model_ttl_s=0.1) as service, service.watched_closely():
        await service.ready()
        pid = service.worker_pid
        await until(lambda: service.state == "idle")
        assert not is_alive(pid)
        assert (await service.client.get("/ping")).status_code == 200
        assert service.state == "idle"  # neither /ping nor /health starts anything
        assert (await service.predict(b"again")).status_code == 200


async def test_requests_that_race_with_the_idle_stop_never_fail(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as service:
        await service.predict(b"first")
        for number in range(10):
            await service.ready()
            task = asyncio.create_task(service.predict(b"%d" % number))
            for _ in range(number):  # the stop falls into another step of the request each time
                await asyncio.sleep(0)
            service.stop_when_idle()
            assert (await task).json() == right_answer(b"%d" % number)


async def test_preloaded_models_stay_through_an_idle_stop(tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"preload_clip_textual": ("ViT-B-32__openai",), "model_ttl_s": 0.1}
    async with running_gateway(tmp_path, **chosen) as service, service.watched_closely():
        await service.ready()
        await service.predict(b"a picture")
        await until(lambda: len(service.journal("born")) == 2)  # its other models are gone
        await service.ready()
        health = (await service.client.get("/health")).json()
        assert health["worker"]["health"]["preloaded"] == ["ViT-B-32__openai"]
        await asyncio.sleep(0.3)  # three times the TTL, and nothing was used: nothing to give back
        assert (service.state, service.gateway.dispatcher.supervisor.starts) == ("ready", 2)


async def test_an_worker_over_its_memory_is_replaced_without_a_failure(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, memory_limit_bytes=150 * 2**20) as service:
        await service.ready()
        service.worker.started_s -= 3600  # old enough
        with service.busy():
            tasks = [asyncio.create_task(service.predict(b"[leak 200][busy]"))]
            await until(lambda: (memory_bytes(service.worker_pid) or 0) > 200 * 2**20)
            await service.gateway.watch.look()
        tasks += [asyncio.create_task(service.predict(b"%d" % i)) for i in range(5)]
        assert [(await task).status_code for task in tasks] == [200] * 6
        health = (await service.client.get("/health")).json()
        assert len(service.journal("born")) == 2
    assert health["failures"]["recent"] == []
    assert health["worker"]["memory_bytes"] < 150 * 2**20 < health["worker"]["memory_peak_bytes"]


async def test_a_recycled_worker_finishes_its_requests_first(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as service:
        await service.ready()
        with service.busy():
            running = asyncio.create_task(service.predict(b"[busy]"))
            await service.started(1)
            signal.raise_signal(signal.SIGHUP)
            later = asyncio.create_task(service.predict(b"later"))
            await until(lambda: service.gateway.dispatcher.queue.waiting == 1)
            assert service.state == "ready"
        assert [(await running).status_code, (await later).status_code] == [200, 200]
        workers = {line.split()[0] for line in service.journal("start")}
        health = (await service.client.get("/health")).json()
    assert len(workers) == 2
    assert health["requests"]["replayed"] == 0


async def test_a_drain_closes_the_port_while_requests_still_wait_for_their_answers(
    tmp_path: Path,
) -> None:
    async with running_gateway(tmp_path) as service:
        await service.ready()

        def is_open() -> bool:
            with socket.socket() as knocking:
                return knocking.connect_ex(("127.0.0.1", service.port)) == 0

        with service.busy():
            waiting = asyncio.create_task(service.predict(b"[busy]"))
            await service.started(1)
            assert is_open()
            service.server.begin_drain()
            await until(lambda: not is_open(), "a closed port")
            assert not service.server.should_exit
        assert (await waiting).json() == right_answer(b"[busy]")


async def test_both_families_of_addresses_are_served(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, host="0.0.0.0") as service:
        for host in ["127.0.0.1", *(["[::1]"] if socket.has_dualstack_ipv6() else [])]:
            async with httpx.AsyncClient() as client:
                response = await client.get(f"http://{host}:{service.port}/ping")
            assert response.text == "pong"


async def test_a_full_disk_for_uploads_holds_them_and_is_named(tmp_path: Path) -> None:
    body = b"large" * 20_000
    room = Room(memory_bytes=1000, spool_bytes=10**6, largest_bytes=len(body) + 10)
    reception = Reception(room, max_body_bytes=len(body) + 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with running_gateway(tmp_path, reception=reception, hold_limit_s=2) as service:
        await service.ready()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(body) // 2, hard))  # as a full disk does
        try:
            with service.busy():
                first = asyncio.create_task(service.predict(b"[busy]" + body))
                await service.started(1)
                given_up = await service.predict(body)
                small = await service.predict(b"small")
                await first
            one_at_a_time = await asyncio.gather(*(service.predict(body) for _ in range(2)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(each.status_code, each.json()) for each in one_at_a_time] == [
        (200, right_answer(body)),
        (200, right_answer(body)),
    ]
    assert (small.status_code, small.json()) == (200, right_answer(b"small"))
    assert (given_up.status_code, given_up.headers["retry-after"]) == (503, "30")
    assert "cannot write to" in given_up.json()["detail"]

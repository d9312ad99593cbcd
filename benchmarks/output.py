"""What rows and notices cost: kept, streamed and heard, against the same read from the worker by hand."""

from __future__ import annotations

import time

from pgbg_orchestration import Job, Launcher

from .bench import Bench
from .rows import Row

ROW = "select n, md5(n::text), repeat('x', 60) from generate_series(1, {}) as n"
COLUMNS = "n int, hash text, filler text"


async def rows_and_notices(bench: Bench) -> list[Row]:
    """Return what rows and notices cost."""
    return [*await rows(bench), *await notices(bench)]


async def rows(bench: Bench) -> list[Row]:
    """Return what many rows of 100 bytes cost, in turn with ``result()`` of the same SQL."""
    number, seconds = bench.size.rows, dict.fromkeys(("result", "kept", "streamed"), float("inf"))
    text = ROW.format(number)
    conn = await bench.connect()
    async with conn, Launcher(bench.conninfo) as launcher:
        for _ in range(min(bench.size.rounds, 5)):
            began = time.perf_counter()
            handle = await bench.extension.launch(conn, text, label="bench")
            query = f"select * from {bench.extension.name('result').as_string(None)}(%s, %s) as r({COLUMNS})"
            read = await (await conn.execute(query.encode(), handle)).fetchall()
            assert len(read) == number
            seconds["result"] = min(seconds["result"], time.perf_counter() - began)

            began = time.perf_counter()
            outcome = await launcher.run(Job(text, fetch={"max_rows": number, "max_bytes": number * 200}))
            assert outcome.rows is not None
            assert len(outcome.rows) == number
            seconds["kept"] = min(seconds["kept"], time.perf_counter() - began)

            began, count = time.perf_counter(), 0
            async for _row in launcher.stream(Job(text)):
                count += 1
            assert count == number
            seconds["streamed"] = min(seconds["streamed"], time.perf_counter() - began)
    peer = f"result(): {seconds['result'] * 1000:.0f} ms"
    return [
        Row(f"{number} rows {how}", f"{took * 1000:.0f} ms", peer, took / seconds["result"])
        for how in ("kept", "streamed")
        for took in [seconds[how]]
    ]


async def notices(bench: Bench) -> list[Row]:
    """Return what many notices cost that are heard, against the same SQL in a session of psycopg's."""
    number = bench.size.rows // 5
    sql = f"do $$begin for i in 1..{number} loop raise notice 'number %', i; end loop; end$$"
    heard: list[object] = []
    conn = await bench.connect()
    async with conn, Launcher(bench.conninfo) as launcher:
        conn.add_notice_handler(heard.append)
        began = time.perf_counter()
        await conn.execute(sql.encode())
        floor = time.perf_counter() - began
        assert len(heard) == number
        heard.clear()
        began = time.perf_counter()
        await launcher.run(Job(sql), notices=True, observer=heard.append)
        took = time.perf_counter() - began
        assert len(heard) >= number
    peer = f"psycopg's own session: {floor * 1000:.0f} ms"
    return [Row(f"{number} notices, each as an event", f"{took * 1000:.0f} ms", peer, took / floor)]

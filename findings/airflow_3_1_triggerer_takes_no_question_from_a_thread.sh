#!/bin/sh
# apache-airflow 3.1.8: a trigger that asks Airflow from a thread (asyncio.to_thread) fails, or takes what the triggerer
# itself waited for, which then ends with all its triggers (airflow #64620; 3.2.2 has it mended).
#
# Here the triggerer's end of the socket and one thread ask 20 times each. What this package does: before 3.3 its triggers
# ask through the event loop.
. "$(dirname "$0")/lib.sh"

install apache-airflow==3.1.8 -c "$here/../tests/versions/airflow-3.1.8.txt"
export AIRFLOW_HOME=$folder AIRFLOW__LOGGING__LOGGING_LEVEL=CRITICAL
cat >"$folder/finding.py" <<'PY'
import asyncio
import os
import socket
import sys
import threading
import time
from unittest.mock import MagicMock

import msgspec
from airflow.jobs.triggerer_job_runner import TriggerCommsDecoder
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import GetTaskStates, _ResponseFrame

ours, theirs = socket.socketpair()


def supervise():
    while length := theirs.recv(4, socket.MSG_WAITALL):
        number, body = msgspec.msgpack.decode(theirs.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
        time.sleep(0.005)
        answer = {"type": "TaskStatesResult", "task_states": {body["run_ids"][0]: {}}}
        theirs.sendall(_ResponseFrame(number, answer).as_bytes())


async def main():
    reader, writer = await asyncio.open_connection(sock=ours)
    decoder = TriggerCommsDecoder(async_reader=reader, async_writer=writer, socket=MagicMock())
    task_runner.SUPERVISOR_COMMS = decoder
    ask = task_runner.RuntimeTaskInstance.get_task_states

    async def wrong(questions):
        ends = await asyncio.gather(*questions, return_exceptions=True)
        return any(isinstance(end, RuntimeError) for end in ends)

    def own():
        return [decoder.asend(GetTaskStates(dag_id="d", task_ids=["t"], run_ids=[str(n)])) for n in range(20)]

    print("the loop alone:", "wrong" if await wrong(own()) else "right")
    threads = [asyncio.to_thread(ask, dag_id="d", task_ids=["t"], run_ids=[f"t{n}"]) for n in range(20)]
    try:
        async with asyncio.timeout(20):
            print("beside threads:", "wrong" if await wrong([*own(), *threads]) else "right")
    except TimeoutError:
        print("beside threads: wrong")
    sys.stdout.flush()
    os._exit(0)  # a thread whose answer is gone waits for ever


threading.Thread(target=supervise, daemon=True).start()
asyncio.run(main())
PY
"$folder/env/bin/python" "$folder/finding.py" 2>/dev/null | seen_is "the loop alone: right
beside threads: wrong"

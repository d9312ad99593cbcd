#!/bin/sh
# apache-airflow 3.3.2: what start_from_trigger stores of a trigger's arguments. A Decimal, a date and bytes become text
# without a word, the keys of a dictionary too, and a moment another time zone.
#
# What this package does: it has its arguments stored as JSON text of its own, and refuses what would come back as something
# else.
. "$(dirname "$0")/lib.sh"

install apache-airflow==3.3.2 -c "$here/../tests/versions/airflow-3.3.2.txt"
export AIRFLOW_HOME=$folder AIRFLOW__CORE__LOAD_EXAMPLES=False AIRFLOW__LOGGING__LOGGING_LEVEL=ERROR
cat >"$folder/stored.py" <<'END'
import datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

from airflow.sdk import DAG, BaseOperator
from airflow.serialization.serialized_objects import BaseSerialization, DagSerialization
from airflow.triggers.base import StartTriggerArgs

VALUES = {
    "Decimal": Decimal("1.10"),
    "date": datetime.date(2026, 1, 1),
    "bytes": b"a",
    "datetime": datetime.datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Vienna")),
    "keys": {1: "one"},
    "tuple": (1, 2),
    "float": 0.5,
}


class Begins(BaseOperator):
    start_from_trigger = True
    start_trigger_args = StartTriggerArgs(
        trigger_cls="some.Trigger", trigger_kwargs=VALUES, next_method="execute_complete", next_kwargs=None, timeout=None
    )


with DAG("stored", schedule=None, start_date=datetime.datetime(2026, 1, 1)) as dag:
    Begins(task_id="begins")
read = DagSerialization.from_dict(DagSerialization.to_dict(dag)).task_dict["begins"].start_trigger_args.trigger_kwargs
for name, value in BaseSerialization.deserialize(read).items():
    print(f"{name}: {value.isoformat() if isinstance(value, datetime.datetime) else repr(value)}")
END
"$folder/env/bin/python" "$folder/stored.py" 2>"$folder/log" | seen_is "Decimal: '1.10'
date: '2026-01-01'
bytes: \"b'a'\"
datetime: 2025-12-31T23:00:00+00:00
keys: {'1': 'one'}
tuple: (1, 2)
float: 0.5"

#!/bin/sh
# apache-airflow 3.3.2 (task SDK 1.3.2): a Decimal among a trigger's arguments comes back as a number of another type.
#
# A trigger's arguments are stored with airflow.sdk.serde. A Decimal goes through a float, so digits beyond some fifteen are
# lost, and nothing says so. What this package does: parameters travel as text with the name of their type.
. "$(dirname "$0")/lib.sh"

install apache-airflow-core==3.3.2 -c "$here/../tests/versions/airflow-3.3.2.txt"
AIRFLOW_HOME=$folder "$folder/env/bin/python" - 2>/dev/null <<'END' | seen_is "0.1 -> Decimal('0.1')
1234567890.12345678901 -> Decimal('1234567890.1234567')
12 -> Decimal('12')"
import json
from decimal import Decimal

from airflow.sdk.serde import deserialize, serialize

for text in ("0.1", "1234567890.12345678901", "12"):
    print(text, "->", repr(deserialize(json.loads(json.dumps(serialize(Decimal(text)))))))
END

#!/bin/sh
# psycopg 3.3.9 with pendulum 3.3.0: a pendulum.Duration is adapted by its words, and so a month is no 30 days and what is
# below a second is lost beside larger parts, though the value is a timedelta that has both.
#
# Airflow hands out pendulum's types. What this package does: it binds a Duration as the timedelta that it equals.
. "$(dirname "$0")/lib.sh"

install "psycopg[binary]==3.3.9" pendulum==3.3.0
cat >"$folder/finding.py" <<'END'
import pendulum
from psycopg import sql

for given in ({"days": 400, "microseconds": 5}, {"months": 1}, {"hours": 1, "milliseconds": 250}):
    duration = pendulum.duration(**given)
    plain = duration.as_timedelta()
    assert duration == plain
    print(given, *(sql.Literal(value).as_string(None) for value in (duration, plain)), sep=" | ")
END
"$folder/env/bin/python" "$folder/finding.py" | seen_is "{'days': 400, 'microseconds': 5} | '57 weeks 1 day'::interval | '400 days 0:00:00.000005'::interval
{'months': 1} | '1 month'::interval | '30 days 0:00:00'::interval
{'hours': 1, 'milliseconds': 250} | '1 hour'::interval | '1:00:00.250000'::interval"

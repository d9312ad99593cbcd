#!/bin/sh
# psycopg 3.3.9: a Decimal that is a NaN with a sign, as Decimal("NaN").copy_negate() gives one, arrives as NaN where it is bound on
# the server in binary form. Its literal, for ClientCursor and sql.Literal, and its text form have the sign, which
# PostgreSQL does not read: 42703, or 22P02.
#
# What this package does: parameters of a job are literals, and such a one is NaN.
. "$(dirname "$0")/lib.sh"

install "psycopg[binary]==3.3.9"
cat >"$folder/finding.py" <<'END'
from decimal import Decimal

from psycopg import sql
from psycopg.adapt import PyFormat, Transformer

for number in (Decimal("NaN"), Decimal("NaN").copy_negate()):
    forms = [Transformer().dump_sequence([number], [form])[0] for form in (PyFormat.TEXT, PyFormat.BINARY)]
    print(number, sql.Literal(number).as_string(None), *(bytes(form) for form in forms), sep=" | ")
END
"$folder/env/bin/python" "$folder/finding.py" | seen_is "NaN | 'NaN'::numeric | b'NaN' | b'\x00\x00\x00\x00\xc0\x00\x00\x00'
-NaN |  -NaN | b'-NaN' | b'\x00\x00\x00\x00\xc0\x00\x00\x00'"

"""The ``pgbg`` schema: receipts, series and history; the only room that knows its names."""

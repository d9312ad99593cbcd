"""The ``pgbg`` schema: receipts, series and history, and all that reads or writes them."""

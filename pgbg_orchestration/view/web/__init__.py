"""The page in the browser: the same app behind ``pgbg web``, in Airflow's own UI, and as one file."""

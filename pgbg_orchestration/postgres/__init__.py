"""PostgreSQL as the core talks to it: connections, launching sessions, and the names of pg_background."""

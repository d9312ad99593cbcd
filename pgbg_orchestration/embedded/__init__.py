"""A PostgreSQL of one's own, without root or installation, with pg_background or its stand-in in it."""

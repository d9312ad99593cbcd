-- What the catalog knows of indexes that are built concurrently.

-- name: invalid_indexes
-- Those that a failed build may have left; of a table in any schema, and all of it, where the others are null.
select pg_catalog.format('%%I.%%I', n.nspname, c.relname)
from pg_catalog.pg_index as i
join pg_catalog.pg_class as c on c.oid = i.indexrelid
join pg_catalog.pg_class as t on t.oid = i.indrelid
join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
where not i.indisvalid and t.relname = %(table)s::name
  and (%(schema)s::text is null or n.nspname = %(schema)s::name)
  and (%(index)s::text is null or c.relname = %(index)s::name)
order by 1

-- name: invalid_index
-- The invalid index of this name. Parameters: its table as SQL has it, and its name.
select pg_catalog.format('%%I.%%I', n.nspname, c.relname)
from pg_catalog.pg_index as i
join pg_catalog.pg_class as c on c.oid = i.indexrelid
join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
where not i.indisvalid and i.indrelid = pg_catalog.to_regclass(%s) and c.relname = %s::name

-- name: index_is_built
-- A verify_sql, with literals put in for the names.
select exists (
    select from pg_catalog.pg_index as i
    join pg_catalog.pg_class as c on c.oid = i.indexrelid
    where i.indrelid = pg_catalog.to_regclass({table}) and c.relname = {index}::name
      and i.indisunique = {unique} and i.indisvalid and i.indisready)

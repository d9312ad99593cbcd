create schema if not exists reports;
create table if not exists reports.carriers_by_month (month date, carrier text, name text, flights bigint);
delete from reports.carriers_by_month where month >= %(partition_start)s and month < %(partition_end)s;
insert into reports.carriers_by_month
select make_date(f.year, f.month, 1), f.carrier, a.name, count(*)
from nycflights13.flights f
left join nycflights13.airlines a on a.carrier = f.carrier
where make_date(f.year, f.month, 1) >= %(partition_start)s and make_date(f.year, f.month, 1) < %(partition_end)s
group by 1, 2, 3;

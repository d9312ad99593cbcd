-- Rendered by Jinja, with parameters bound as literals; the statements are one transaction.
insert into difference (quarter, account, amount)
select %(quarter)s, account, b.amount - l.amount
from ledger as l
join bank as b using (quarter, account)
where quarter = %(quarter)s
  and b.amount <> l.amount;

insert into closed_quarter (quarter, closed_at) values (%(quarter)s, now());

"""Splitting, joining and refusing SQL.

The judge of a split is libpg_query (pglast), which is the server's own scanner and parser.
"""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pglast import parser

from pgbg_orchestration import statements
from pgbg_orchestration.statements import UnterminatedSql, lexer
from tests.matrix import LONG
from tests.unit.statements_corpus import CORPUS

# A derandomized run where the CI variable is set is Hypothesis' own default.
MANY = settings(max_examples=2000 if LONG else 200, deadline=None)


def texts(sql: str) -> list[str]:
    return [statement.text for statement in statements.split(sql)]


def spans(sql: str) -> list[tuple[int, int]]:
    """Where our statements begin, comments before them left out as libpg_query does, and end."""
    return [
        (lexer.skip_blank(sql, statement.position), statement.position + len(statement.text))
        for statement in statements.split(sql)
    ]


def judged(sql: str) -> list[tuple[int, int]] | None:
    """Where libpg_query's statements begin and end; None if PostgreSQL cannot parse the text."""
    try:
        return [(piece.start, piece.stop) for piece in parser.split(sql, with_parser=True, only_slices=True)]
    except parser.ParseError:
        return None


def scanned(sql: str) -> list[parser.Token] | None:
    """The tokens of PostgreSQL's scanner; None if it finds an error."""
    try:
        return list(parser.scan(sql))
    except parser.ParseError as error:
        if "unterminated" in str(error):
            return None
        raise


# --- Splitting, rule by rule ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        pytest.param("select 1; select 2", ["select 1", "select 2"], id="two"),
        pytest.param("select 1;", ["select 1"], id="last semicolon"),
        pytest.param(" ;; select 1 ;\n; ", ["select 1"], id="empty statements"),
        pytest.param("-- a\n/* b; */ ;", [], id="only comments"),
        pytest.param("", [], id="nothing"),
        pytest.param(r"select 'C:\'; select 2", [r"select 'C:\'", "select 2"], id="no escapes in a plain string"),
        pytest.param(r"select e'\';'; select 2", [r"select e'\';'", "select 2"], id="escapes in an escape string"),
        pytest.param(r"select ne'\'; select 2", [r"select ne'\'", "select 2"], id="e at the end of a word"),
        pytest.param(r"select $$x$$e'\';'; select 2", [r"select $$x$$e'\';'", "select 2"], id="e after a dollar quote"),
        pytest.param("select 'a''b;'; select 2", ["select 'a''b;'", "select 2"], id="doubled quote"),
        pytest.param(r"select u&'\0061;\'; select 2", [r"select u&'\0061;\'", "select 2"], id="unicode string"),
        pytest.param("select b'1;', x'f;', n'a;'; select 2", ["select b'1;', x'f;', n'a;'", "select 2"], id="bits"),
        pytest.param(
            "select e'a' -- x\n 'b\\';'; select 2",
            ["select e'a' -- x\n 'b\\';'", "select 2"],
            id="continued escape string",
        ),
        pytest.param(
            "select e'a'\n-- it's\n\n-- c\n'b\\';'; select 2",
            ["select e'a'\n-- it's\n\n-- c\n'b\\';'", "select 2"],
            id="continued over comment lines",
        ),
        pytest.param(
            "select e'a' 'b\\'; select 2", ["select e'a' 'b\\'", "select 2"], id="no newline, no continuation"
        ),
        pytest.param("select 'a'\n'b\\'; select 2", ["select 'a'\n'b\\'", "select 2"], id="continued plain string"),
        pytest.param('select "a;""b"; select 2', ['select "a;""b"', "select 2"], id="quoted identifier"),
        pytest.param('select u&"a;"; select 2', ['select u&"a;"', "select 2"], id="unicode identifier"),
        pytest.param("select $$;$$; select 2", ["select $$;$$", "select 2"], id="dollar quote"),
        pytest.param("select $a$;$b$;$$;$a$; select 2", ["select $a$;$b$;$$;$a$", "select 2"], id="dollar tag"),
        pytest.param("select $é$;$é$; select 2", ["select $é$;$é$", "select 2"], id="dollar tag not ASCII"),
        pytest.param("select $a$;$A$;$a$; select 2", ["select $a$;$A$;$a$", "select 2"], id="tags keep their case"),
        pytest.param("select a$1$; select a$1$", ["select a$1$", "select a$1$"], id="dollars in an identifier"),
        pytest.param("select $1; select $2", ["select $1", "select $2"], id="parameters"),
        pytest.param("select 1 /* ; /* ; */ ; */; select 2", ["select 1 /* ; /* ; */ ; */", "select 2"], id="nested"),
        pytest.param("select 1 /*/ ; */; select 2", ["select 1 /*/ ; */", "select 2"], id="comment mark overlap"),
        pytest.param("select 2 */* ; */ 3; select 2", ["select 2 */* ; */ 3", "select 2"], id="comment in operator"),
        pytest.param("select 2 @-- ;\n 3; select 2", ["select 2 @-- ;\n 3", "select 2"], id="line comment in operator"),
        pytest.param("select 1 - -1; select 6/2", ["select 1 - -1", "select 6/2"], id="lone minus and slash"),
        pytest.param("select 1 -- ;\r; select 2", ["select 1 -- ;", "select 2"], id="carriage return ends a comment"),
        pytest.param("select 1 -- x", ["select 1 -- x"], id="comment at the end"),
        pytest.param("/*+ Hint */ select 1", ["/*+ Hint */ select 1"], id="hints are kept"),
        pytest.param(
            "create rule r as on insert to t do (select 1; select 2); select 3",
            ["create rule r as on insert to t do (select 1; select 2)", "select 3"],
            id="parentheses",
        ),
        pytest.param("select 1); select 2", ["select 1)", "select 2"], id="a parenthesis too many"),
        pytest.param("select 1_000; select 0x1F", ["select 1_000", "select 0x1F"], id="numbers"),
        pytest.param("select begin; select 2", ["select begin", "select 2"], id="identifier called begin"),
        pytest.param("select größe; select\u00a0x", ["select größe", "select\u00a0x"], id="letters not ASCII"),
    ],
)
def test_split(sql: str, expected: list[str]) -> None:
    assert texts(sql) == expected


BODY = "create function f() returns int begin atomic "


@pytest.mark.parametrize(
    "routine",
    [
        BODY + "select 1; select 2; end",
        BODY + "end",
        BODY + "; ; end",
        BODY + "select case when true then case a when 1 then 2 end end; end",
        BODY + "select 1 as end; select t.end, t.case from t; select begin atomic from t; end",
        BODY + "create or replace procedure g() begin atomic select 1; end; select 2; end",
        "create or replace function f() returns begin language sql begin /* x */ -- y\n atomic return 1; end",
        "create procedure p(a int default 1) begin atomic insert into t values (1); end",
        "CREATE PROCEDURE s.p() BEGIN ATOMIC SELECT ';'; END",
        "create function begin() returns int language sql as 'select 1'",
        "create function f(begin int) returns int return case begin when 1 then 2 else 3 end",
        "create function atomic() returns begin return 1",
    ],
)
def test_routine_is_one_statement(routine: str) -> None:
    assert judged(routine) is not None, "the test's own SQL is wrong"
    assert texts(f"select 1; {routine}; select 2") == ["select 1", routine, "select 2"]


def test_position_and_line() -> None:
    sql = "select 1;\n\n  -- why\n  select\n2 ; vacuum"
    found = statements.split(sql)
    assert [(s.line, sql[s.position : s.position + len(s.text)]) for s in found] == [
        (1, "select 1"),
        (4, "-- why\n  select\n2"),
        (5, "vacuum"),
    ]


@pytest.mark.parametrize(
    ("sql", "keywords"),
    [
        ("create unique index concurrently i on t(a)", "CREATE UNIQUE INDEX CONCURRENTLY I ON T"),
        ("/* x */ Vacuum -- y\n Full t", "VACUUM FULL T"),
        ('drop table "TABLE"', "DROP TABLE"),
        ("(select 1)", ""),
        ("a b c d e f g h i j", "A B C D E F G H"),
        ("ınsert into t", "ınsert INTO T"),
    ],
)
def test_keywords(sql: str, keywords: str) -> None:
    (statement,) = statements.split(sql)
    assert " ".join(statement.keywords) == keywords


@pytest.mark.parametrize(
    ("sql", "what", "line"),
    [
        ("select 1;\nselect 'a''b;\n", "string", 2),
        ("select e'\\'", "string with escapes (E'…')", 1),
        ("select e'a'\n'b\\'", "string with escapes (E'…')", 1),
        ('\n\nselect "a', "quoted identifier", 3),
        ("select 1 /* a /* b */", "comment", 1),
        ("select 1; /* a", "comment", 1),
        ("select\n$fn$ $f$", "dollar-quoted string $fn$", 2),
        ("create function f() returns int begin atomic select '; end", "string", 1),
    ],
)
def test_unterminated(sql: str, what: str, line: int) -> None:
    with pytest.raises(UnterminatedSql) as caught:
        statements.split(sql)
    assert (caught.value.what, caught.value.line) == (what, line)
    assert f"the {what} that starts in line {line} " in str(caught.value)
    assert scanned(sql) is None


# --- Splitting, against PostgreSQL's own parser and scanner --------------------------------------------------------


@pytest.mark.parametrize("sql", CORPUS)
def test_corpus_statement_alone_and_in_a_row(sql: str) -> None:
    expected = judged(sql)
    assert expected is not None, "the corpus' own SQL is wrong"
    assert spans(sql) == expected
    row = f"select 'before\\' ;{sql}\n;/* c */ select 'after'"
    assert spans(row) == judged(row)


def test_corpus_as_one_text() -> None:
    sql = "\n;-- a comment; with a quote '\n".join(CORPUS)
    expected = judged(sql)
    assert expected is not None
    assert spans(sql) == expected
    assert len(expected) == len(CORPUS)


blanks = st.sampled_from([" ", "\n", "\t", "\r\n", " -- x;'\n", "/* ; */", "/* /* ' */ $$ */", " --\n", "\f"])
names = st.sampled_from(
    [
        "a",
        "begin",
        "atomic",
        "e",
        "E",
        "ne",
        "a$1$",
        "größe",
        "x$$",
        "_",
        "u",
        "n",
        "name",
        "\u00a0x",  # not bare: pglast, not PostgreSQL, strips it from the end of a statement
        '"a;b"',
        '"end"',
        '"q""r"',
    ]
)
strings = st.sampled_from(
    [
        "'a'",
        "''",
        "'C:\\'",
        "'it''s;'",
        "e'\\''",
        "E'\\\\'",
        "e'a;\\';'",
        "'a'\n'b\\'",
        "e'a'\n'b\\';'",
        "e'x' -- c\n '\\''",
        "e'x'\n-- c'\n'\\';'",
        "$$;$$",
        "$a$;$b$'$a$",
        "$é$ ' $é$",
        "$a$$$$a$",
        "b'10'",
        "x'1f'",
        "n'x;'",
        "U&'\\0061;'",
        "'-- no'",
        "'/*'",
        "$$/*$$",
    ]
)
atoms = st.one_of(names, strings, st.sampled_from(["1", "1.5", "1_000", "0x1F", "$1", "null", "array[1,2]", "1e5"]))
operators = st.sampled_from(
    ["+", "-", "*", "/", "||", "@-", "->>", "<", "%", "<->", "+/* ; */", "*/* ; */", "@-- ;\n", "~"]
)


@st.composite
def glued(draw: st.DrawFn, parts: st.SearchStrategy[str]) -> str:
    """Some parts with blanks of all sorts between them."""
    return "".join(part + draw(blanks) for part in draw(st.lists(parts, min_size=1, max_size=3)))


def deeper(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("({})".format, inner),
        st.builds("{} {} {}".format, inner, operators, inner),
        st.builds("case when {} then {} end".format, inner, inner),
        st.builds("case{}{} when 1 then 2 else {} end".format, blanks, inner, inner),
        st.builds("f({},{}{})".format, inner, blanks, inner),
        st.builds("(select {} as end)".format, inner),
    )


expressions = st.recursive(atoms, deeper, max_leaves=6)
labels = st.sampled_from(["", "", " as end", " as case", " as begin", " atomic", " begin", ' "end"'])
simple = st.one_of(
    st.builds("select{}{}{}".format, blanks, expressions, labels),
    st.builds("select {}, {}{} from t".format, expressions, expressions, labels),
    st.builds("insert into t values ({}, {})".format, expressions, expressions),
    st.builds("update t set a ={}{}".format, blanks, expressions),
    st.builds("{}delete from t where {}".format, blanks, expressions),
    st.builds("do{}{}".format, blanks, st.sampled_from(["$$begin; end$$", "'begin; end'", "$x$ ; $x$"])),
    st.sampled_from(["", "vacuum", "begin", "end", "commit", "create index on t(a)", "copy t from stdin"]),
)
heads = st.sampled_from(
    [
        "create function f() returns int",
        "create or replace function begin() returns begin",
        "create/* ; */procedure p(begin int)",
        "create -- ;\n or replace procedure atomic(a text = 'x;')",
    ]
)
begins = st.sampled_from(["begin atomic ", "BEGIN/* */ATOMIC\n", "begin\n-- ;\natomic/* */"])


def bodies(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    in_body = inner.filter(lambda sql: sql not in {"begin", "end"})
    return st.builds(
        lambda head, begin, parts, blank: f"{head} {begin}{''.join(part + ';' for part in parts)}{blank}end",
        heads,
        begins,
        st.lists(in_body, max_size=3),
        blanks,
    )


routines = st.recursive(simple, bodies, max_leaves=4)
rules = st.builds("create rule r as on insert to t do ({}; {})".format, simple, simple)
scripts = st.builds(
    lambda parts, separator, tail: separator.join(parts) + tail,
    st.lists(st.one_of(simple, simple, routines, rules), max_size=5),
    st.sampled_from([";", ";;", " ;\n", "-- x;\n;", "/* ; */;/* ; */", "\n;--\n"]),
    st.sampled_from(["", ";", " ", "-- end", "; -- end;", "/* ; */", "\n"]),
)


def test_scripts_split_as_the_parser_does() -> None:
    parsed: list[bool] = []

    @MANY
    @given(scripts)
    @example("select 1; create function f() returns int begin atomic select 1 as end; end; select 2")
    def compare(sql: str) -> None:
        expected = judged(sql)
        parsed.append(expected is not None)
        if expected is not None:
            assert spans(sql) == expected

    compare()
    # Most of what is generated has to be SQL, or the comparison says little.
    assert sum(parsed) > len(parsed) / 2


PREFIXED = ("BCONST", "XCONST", "USCONST", "UIDENT")
soup = st.lists(
    st.one_of(
        atoms,
        operators,
        blanks,
        st.sampled_from([";", "(", ")", "[", "]", ",", ".", ":", "::", "$", "\\", "begin", "end", "case", "atomic"]),
        st.sampled_from(
            ["'", '"', "$$", "$a$", "e'", "E'", "--", "/*", "*/", "u&'", "\n", "\r", "e", "-", "/", "*", "é", "1"]
        ),
    ),
    max_size=14,
).map("".join)


@settings(MANY, max_examples=4000 if LONG else 300)
@given(soup)
@example("1e';'")
@example("e'a'\n'b\\'")
@example("*/*;/*/;*/*/;")
@example("$1$a$;$a$")
@example("$1_000e'\\'';'")
def test_tokens_are_the_scanners(sql: str) -> None:
    """Whatever the text: what PostgreSQL's scanner takes for a semicolon, a parenthesis or a word, so do we."""
    try:
        expected = scanned(sql)
    except parser.ParseError:
        return  # an error of another sort, such as 1e: the server refuses the text, however it is split
    if expected is None:
        with pytest.raises(UnterminatedSql):
            list(lexer.tokens(sql))
        with pytest.raises(UnterminatedSql):
            statements.split(sql)
        return
    ours = list(lexer.tokens(sql))
    marks = [(token.text, token.start) for token in ours if token.text in {";", "(", ")"}]
    assert marks == [(sql[t.start], t.start) for t in expected if t.name in {"ASCII_40", "ASCII_41", "ASCII_59"}]
    # A prefix such as U& and what follows the first digits of a number are words of their own to us.
    constants = [(t.start, t.end) for t in expected if t.name in {*PREFIXED, "ICONST", "FCONST"}]
    words = [
        (t.start, t.end)
        for t in ours
        if t.kind is lexer.TokenKind.WORD and not any(start <= t.start <= end for start, end in constants)
    ]
    theirs = [
        (t.start, t.end + 1)
        for t in expected
        if t.name not in {*PREFIXED, "SCONST"}
        and (sql[t.start].isalpha() or sql[t.start] == "_" or ord(sql[t.start]) > 0x7F)
    ]
    assert words == theirs
    # The leaping reader agrees with the one that names each token.
    assert len(statements.split(sql)) == _count_statements(ours)


def _count_statements(tokens: list[lexer.Token]) -> int:
    depth, filled, count = 0, False, 0
    for token in tokens:
        depth = max(depth + {"(": 1, ")": -1}.get(token.text, 0), 0)
        if token.text == ";" and depth == 0:
            count += filled
            filled = False
        else:
            filled = True
    return count + filled


def test_no_group_is_possessive() -> None:
    """Up to Python 3.11.4 such a group keeps what its last, failed repetition had read: gh-106052."""
    patterns = [value.pattern for value in vars(lexer).values() if isinstance(value, re.Pattern)]
    assert len(patterns) > 5
    assert [pattern for pattern in patterns if re.search(r"\)([*+?]|\{[^}]*\})\+|\(\?>", pattern)] == []


# --- Joining -------------------------------------------------------------------------------------------------------


def test_join_puts_a_utility_statement_between() -> None:
    joined = statements.join(statements.split("insert into t values (1) -- x\n; select count(*) from t -- y"))
    assert texts(joined) == [
        "insert into t values (1) -- x",
        "set local pgbg.step to default",
        "select count(*) from t -- y",
    ]
    assert statements.join(statements.split("select 1;")) == "select 1"


@settings(MANY, max_examples=1000 if LONG else 100)
@given(scripts)
def test_join_keeps_every_statement(sql: str) -> None:
    parts = texts(sql)
    joined = texts(statements.join(statements.split(sql)))
    assert joined[::2] == parts
    assert set(joined[1::2]) <= {"set local pgbg.step to default"}

"""Every row of the table of SQLSTATEs, and what surrounds it: origins, overrides, our own errors, delays."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys

import psycopg
import pytest

from pgbg_orchestration import errors
from pgbg_orchestration.outcome import ErrorFields
from pgbg_orchestration.retry import (
    ATTACH,
    DEFAULT,
    FAIL,
    RETRY,
    RULES,
    RULES_BY_ORIGIN,
    Action,
    Decision,
    Origin,
    RetryPolicy,
    Rule,
)

JOB, LAUNCH, CONNECTION = Origin.JOB, Origin.LAUNCH, Origin.CONNECTION


def policy(overrides: dict[str, Rule] | None = None) -> RetryPolicy:
    return RetryPolicy(overrides or {}, rng=random.Random(7))


def worker_error(sqlstate: str, message: str = "said in the server's own language") -> errors.WorkerError:
    return errors.WorkerError("the worker failed", fields=ErrorFields(sqlstate=sqlstate, message=message), job_id="j")


# (SQLSTATE, origin, action, look first, uses an attempt)
ROWS = [
    # retry soon with jitter, a few times
    ("40001", JOB, RETRY, False, True),
    ("40P01", JOB, RETRY, False, True),
    # retry with backoff
    ("55P03", JOB, RETRY, False, True),
    ("55006", JOB, RETRY, False, True),
    # wait long, no attempt is used up: nothing has started
    ("53300", CONNECTION, RETRY, False, False),
    ("53400", LAUNCH, RETRY, False, False),
    ("53000", LAUNCH, RETRY, False, False),
    # the same codes out of a worker: the job had started
    ("53300", JOB, RETRY, False, True),
    ("53400", JOB, RETRY, False, True),
    ("53000", JOB, RETRY, False, True),
    ("53200", JOB, RETRY, False, True),
    # a full disk: a matter of where
    ("53100", LAUNCH, RETRY, False, False),
    ("53100", JOB, FAIL, False, True),
    # nothing was sent
    ("57P03", CONNECTION, RETRY, False, True),
    ("08001", CONNECTION, RETRY, False, True),
    ("08004", CONNECTION, RETRY, False, True),
    # the receipt first
    *[
        (sqlstate, origin, RETRY, True, True)
        for sqlstate in (
            "57P01",
            "57P02",
            "57P05",
            "08000",
            "08003",
            "08006",
            "58000",
            "58030",
            "08007",
            "40003",
        )
        for origin in (JOB, LAUNCH, CONNECTION)
    ],
    ("57014", JOB, FAIL, False, True),
    ("25006", JOB, RETRY, False, True),
    ("25P03", JOB, FAIL, False, True),
    ("25P04", JOB, FAIL, False, True),
    ("57P04", CONNECTION, FAIL, False, True),
    ("08P01", CONNECTION, FAIL, False, True),
    # deterministic, or corruption: one member of each class
    *[
        (sqlstate, JOB, FAIL, False, True)
        for sqlstate in (
            "0A000",
            "22012",
            "23505",
            "23P01",
            "28P01",
            "3D000",
            "3F000",
            "42P01",
            "54001",
            "P0001",
            "XX001",
            "55000",
        )
    ],
    # ours
    ("PB001", LAUNCH, ATTACH, True, True),
    ("PB002", LAUNCH, ATTACH, False, True),
    ("PB003", LAUNCH, FAIL, False, True),
    ("PB005", JOB, FAIL, False, True),
    # the orchestrator's own default
    ("58P01", JOB, DEFAULT, False, True),
    ("2F005", JOB, DEFAULT, False, True),
    # of foreign servers, and of other languages
    ("HV00N", JOB, RETRY, False, True),
    ("HV001", JOB, RETRY, False, True),
    ("HV000", JOB, FAIL, False, True),
    ("HV00R", JOB, FAIL, False, True),
    ("38000", JOB, FAIL, False, True),
    ("38001", JOB, FAIL, False, True),
    ("39P01", JOB, FAIL, False, True),
    # of transactions
    ("25001", JOB, FAIL, False, True),
    ("25P01", JOB, FAIL, False, True),
    ("25P02", JOB, FAIL, False, True),
    ("25P02", CONNECTION, RETRY, True, True),
    ("2D000", JOB, FAIL, False, True),
]

CATALOG_KEY = {"schema_name": "pg_catalog", "table_name": "pg_class", "constraint_name": "pg_class_relname_nsp_index"}
DDL_ROWS = [
    (ErrorFields("XX000", "tuple concurrently updated"), RETRY),
    (ErrorFields("XX000", "tuple concurrently deleted"), RETRY),
    (ErrorFields("XX000", "cache lookup failed for relation 1"), FAIL),
    (ErrorFields("XX000", "(withheld: redact_details)"), FAIL),
    (ErrorFields("XX001", "tuple concurrently updated"), FAIL),
    (ErrorFields("23505", "in any language", **CATALOG_KEY), RETRY),
    (ErrorFields("23505", "in any language", **CATALOG_KEY).redacted(), RETRY),
    (ErrorFields("23505", "in any language", **{**CATALOG_KEY, "schema_name": "public"}), FAIL),
    (ErrorFields("23505", "in any language"), FAIL),
    (ErrorFields("23503", "in any language", **CATALOG_KEY), FAIL),
]


@pytest.mark.parametrize(("fields", "action"), DDL_ROWS)
def test_ddl_that_meets_ddl(fields: ErrorFields, action: Action) -> None:
    error = errors.WorkerError("the worker failed", fields=fields, job_id="j")
    assert policy().decide(fields).action is action
    assert policy().decide(error).action is action
    assert policy().decide(error, 6).action is FAIL, "a few times"
    of_ones_own = Rule(FAIL if action is RETRY else RETRY, "mine")
    assert policy({str(fields.sqlstate): of_ones_own}).decide(error).action is of_ones_own.action


@pytest.mark.parametrize(("sqlstate", "origin", "action", "look_first", "uses_attempt"), ROWS)
def test_row_of_the_table(sqlstate: str, origin: Origin, action: Action, look_first: bool, uses_attempt: bool) -> None:
    decision = policy().decide(sqlstate, 1, origin=origin)

    assert (decision.action, decision.look_first, decision.uses_attempt) == (action, look_first, uses_attempt)
    assert sqlstate in decision.reason
    assert decision.sqlstate == sqlstate
    assert (decision.delay is not None) == (action is RETRY)


def test_no_rule_is_without_a_test() -> None:
    tested = {sqlstate for sqlstate, *_ in ROWS} | {sqlstate[:2] for sqlstate, *_ in ROWS}

    assert set(RULES) <= tested
    by_origin = {(origin, sqlstate) for sqlstate, origin, *_ in ROWS}
    here = {(origin, sqlstate) for origin, rules in RULES_BY_ORIGIN.items() for sqlstate in rules}
    # What a code of ours on a connection means has a test of its own, below.
    assert here - by_origin == {(CONNECTION, sqlstate) for sqlstate in ("57014", "25P03", "25P04")}


@pytest.mark.parametrize(
    ("sqlstate", "tries"),
    [("40001", 6), ("40P01", 6), ("55006", 4), ("53200", 3)],
)
def test_a_few_times_means_a_few_times(sqlstate: str, tries: int) -> None:
    asked = [policy().decide(sqlstate, attempt).action for attempt in range(1, tries + 2)]

    assert asked == [RETRY] * (tries - 1) + [FAIL] * 2
    assert f"try {tries} of {tries}" in policy().decide(sqlstate, tries).reason


def test_the_number_of_other_retries_is_the_orchestrators() -> None:
    assert policy().decide("55P03", 1_000).action is RETRY


class TestDelays:
    @pytest.mark.parametrize(
        ("sqlstate", "origin", "shortest", "longest"),
        [
            ("40001", JOB, 0.0, 5.0),
            ("55P03", JOB, 2.5, 60.0),
            ("08001", CONNECTION, 2.5, 60.0),
            ("53000", LAUNCH, 7.5, 300.0),
        ],
    )
    def test_stay_within_their_bounds(self, sqlstate: str, origin: Origin, shortest: float, longest: float) -> None:
        judge = RetryPolicy({sqlstate: RULES[sqlstate]}, rng=random.Random(1))
        rule = RULES[sqlstate]
        many = [rule.delay(attempt, judge.rng) for attempt in range(1, 5_000)]

        assert min(many) >= shortest
        assert max(many) <= longest
        assert len(set(many)) == len(many), "jobs that failed together must not meet again"

    def test_grow_to_their_limit(self) -> None:
        rule = Rule(RETRY, first_delay=5, factor=2, max_delay=60, jitter=0)

        assert [rule.delay(attempt, random.Random(0)) for attempt in range(1, 7)] == [5, 10, 20, 40, 60, 60]

    def test_are_repeatable_with_a_seed(self) -> None:
        first, second = ([p.decide("40001", n).delay for n in range(1, 6)] for p in (policy(), policy()))

        assert first == second


class TestOverrides:
    def test_a_code_wins_over_a_class_and_both_over_the_defaults(self) -> None:
        judge = policy({"23": Rule(RETRY, "of the class"), "23505": Rule(RETRY, "of the code"), "53": Rule(FAIL)})

        assert "of the code" in judge.decide(worker_error("23505")).reason
        assert "of the class" in judge.decide(worker_error("23514")).reason
        # The default names 53000 itself; the user's word on its class still wins.
        assert judge.decide("53000", origin=LAUNCH).action is FAIL
        assert judge.decide(worker_error("42P01")).action is FAIL

    def test_can_leave_a_code_to_the_orchestrator(self) -> None:
        assert policy({"42": Rule(DEFAULT)}).decide("42P01").action is DEFAULT

    def test_opt_in_to_a_retry_of_a_timeout(self) -> None:
        judge = policy({"57014": Rule(RETRY, "nights are slow", max_tries=2)})

        assert judge.decide(worker_error("57014"), 1).action is RETRY
        assert judge.decide(errors.DeadlinePassed("too slow", job_id="j"), 1).action is RETRY
        assert judge.decide(worker_error("57014"), 2).action is FAIL

    def test_never_run_cancelled_work_again(self) -> None:
        judge = policy({"57014": Rule(RETRY), "57": Rule(RETRY)})

        for error in (errors.JobCancelled("by hand", job_id="j", sqlstate="57014"), errors.Superseded("newer")):
            assert judge.decide(error).action is FAIL

    def test_never_run_work_of_unknown_outcome_again(self) -> None:
        judge = policy({"08006": Rule(RETRY), "08": Rule(RETRY)})

        assert judge.decide(errors.OutcomeUnknown("session lost", sqlstate="08006")).action is FAIL

    def test_cannot_take_away_the_look_at_the_receipt(self) -> None:
        judge = policy({"08007": Rule(RETRY, "blindly", look_first=False), "42": Rule(RETRY)})

        assert judge.decide("08007").look_first
        assert judge.decide("42P01", origin=LAUNCH).look_first, "a failed launch call may have launched"

    def test_apply_to_our_own_errors_by_their_sqlstate(self) -> None:
        judge = policy({"53": Rule(FAIL, "no waiting here"), "25006": Rule(FAIL)})

        assert judge.decide(errors.NoWorkerSlot("none came free")).action is FAIL
        assert judge.decide(errors.ReadOnlyServer("standby")).action is FAIL

    @pytest.mark.parametrize("key", ["4000", "40001x", "", "4", "40p01", "serialization_failure", " 40001"])
    def test_refuse_what_is_no_sqlstate(self, key: str) -> None:
        with pytest.raises(ValueError, match="neither a SQLSTATE"):
            policy({key: Rule(RETRY)})

    @pytest.mark.parametrize("key", ["PB", "PB001", "PB002", "PB003"])
    def test_refuse_this_packages_own_codes(self, key: str) -> None:
        with pytest.raises(ValueError, match="cannot be overridden"):
            policy({key: Rule(RETRY)})

    def test_are_copied(self) -> None:
        mine = {"23": Rule(RETRY)}
        judge = policy(mine)
        mine.clear()

        assert judge.decide("23505").action is RETRY


@pytest.mark.parametrize(
    ("error", "action", "look_first", "uses_attempt"),
    [
        (errors.InvalidJob("no SQL"), FAIL, False, True),
        (errors.JobIdReused("other SQL"), FAIL, False, True),
        (errors.JobCancelled("by hand"), FAIL, False, True),
        (errors.Superseded("generation 4"), FAIL, False, True),
        (errors.DeadlinePassed("30 s"), FAIL, False, True),
        (errors.WorkerLost("gone"), RETRY, True, True),
        (errors.StillRunning("catches query_canceled"), RETRY, True, True),
        (errors.OutcomeUnknown("session lost"), FAIL, False, True),
        (errors.RowsGone("read once"), FAIL, False, True),
        (errors.SeriesHeld("by another role"), RETRY, True, True),
        (errors.NoWorkerSlot("none in 60 s"), RETRY, False, False),
        (errors.LaunchFailed("no code"), RETRY, True, True),
        (errors.LaunchFailed("shm", sqlstate="53100"), RETRY, False, False),
        (errors.LaunchFailed("too long a label", sqlstate="22001"), FAIL, False, True),
        (errors.LaunchFailed("cancelled on its way", sqlstate="57P01"), RETRY, True, True),
        (errors.ServerUnreachable("for 300 s"), RETRY, True, True),
        (errors.ExtensionMissing("none"), FAIL, False, True),
        (errors.ExtensionTooOld("1.2"), FAIL, False, True),
        (errors.SchemaMissing("none"), FAIL, False, True),
        (errors.SchemaVersionMismatch("2, not 1"), FAIL, False, True),
        (errors.NoPrivilege("execute"), FAIL, False, True),
        (errors.PoolerInTransactionMode("pgbouncer"), FAIL, False, True),
        (errors.ReadOnlyServer("standby"), RETRY, False, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_our_own_errors(error: errors.PgbgError, action: Action, look_first: bool, uses_attempt: bool) -> None:
    decision = policy().decide(error)

    assert (decision.action, decision.look_first, decision.uses_attempt) == (action, look_first, uses_attempt)
    assert (decision.sqlstate or type(error).__name__) in decision.reason


def test_every_error_of_the_package_is_judged() -> None:
    """A new kind of error must get a rule, or its retry is left to chance."""
    bases = (errors.PgbgError, errors.WorkerError)
    kinds = [
        kind
        for name in errors.__all__
        if isinstance(kind := getattr(errors, name), type)
        and issubclass(kind, errors.PgbgError)
        and kind not in bases
        and kind is not errors.LaunchFailed
    ]

    unjudged = [kind.__name__ for kind in kinds if policy().decide(kind("something happened")).action is DEFAULT]
    assert len(kinds) >= 17
    assert unjudged == []


class TestTheSameCodeInAnotherPlace:
    def test_a_query_of_ours_that_was_cancelled_is_no_cancelled_job(self) -> None:
        # In psycopg QueryCanceled is an OperationalError: a rule by class of exception would get one of the two wrong.
        error = psycopg.errors.QueryCanceled("canceling statement")
        assert isinstance(error, psycopg.OperationalError)

        ours, theirs = policy().decide(error), policy().decide(worker_error("57014"))

        assert (ours.action, ours.look_first) == (RETRY, True)
        assert theirs.action is FAIL

    @pytest.mark.parametrize("sqlstate", ["25P03", "25P04"])
    def test_a_timeout_of_our_session_says_nothing_of_the_job(self, sqlstate: str) -> None:
        ours, theirs = (policy().decide(sqlstate, origin=origin) for origin in (CONNECTION, JOB))

        assert (ours.action, ours.look_first) == (RETRY, True)
        assert theirs.action is FAIL

    def test_a_lost_connection_without_a_sqlstate(self) -> None:
        error = psycopg.OperationalError("server closed the connection unexpectedly")
        assert error.sqlstate is None

        decision = policy().decide(error)

        assert (decision.action, decision.look_first) == (RETRY, True)
        assert "OperationalError" in decision.reason

    def test_a_drivers_error_with_a_sqlstate(self) -> None:
        assert policy().decide(psycopg.errors.UndefinedTable("no")).action is FAIL
        assert policy().decide(psycopg.errors.TooManyConnections("no")).uses_attempt is False

    def test_any_error_that_has_a_sqlstate(self) -> None:
        class OtherDriversError(Exception):
            sqlstate = "40001"

        assert policy().decide(OtherDriversError()).action is RETRY

    def test_the_fields_of_a_worker(self) -> None:
        assert policy().decide(ErrorFields(sqlstate="53100", message="full")).action is FAIL
        assert policy().decide(ErrorFields()).action is DEFAULT

    @pytest.mark.parametrize("sqlstate", ["PB001", "PB002", "PB003"])
    def test_our_codes_raised_by_user_sql_fool_nobody(self, sqlstate: str) -> None:
        """A WorkerError is raised after the look at the receipt: with one, it would not be there."""
        assert policy().decide(worker_error(sqlstate)).action is DEFAULT

    @pytest.mark.parametrize(
        "error", [ValueError("x"), KeyboardInterrupt(), psycopg.DataError("no code"), OSError("x")]
    )
    def test_what_nobody_knows_is_the_orchestrators(self, error: BaseException) -> None:
        decision = policy().decide(error)

        assert decision == Decision(DEFAULT, None, decision.reason)
        assert type(error).__name__ in decision.reason


def test_messages_never_decide_and_never_leak() -> None:
    secret = "SQLSTATE 40001 password=hunter2 deadlock detected"

    decision = policy().decide(worker_error("42601", message=secret))

    assert decision.action is FAIL
    assert "hunter2" not in decision.reason


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ({"first_delay": -1}, "cannot be negative"),
        ({"max_delay": -1}, "cannot be negative"),
        ({"factor": 0.5}, "at least 1"),
        ({"jitter": 1.5}, "from 0 to 1"),
        ({"max_tries": 0}, "at least 1"),
    ],
)
def test_a_rule_refuses_numbers_that_make_no_sense(rule: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Rule(RETRY, "mine", **rule)  # type: ignore[arg-type]


def test_a_rule_takes_an_action_by_its_name() -> None:
    assert Rule("retry").action is RETRY  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="again"):
        Rule("again")  # type: ignore[arg-type]


def test_attempts_count_from_one() -> None:
    with pytest.raises(ValueError, match="from 1"):
        policy().decide("40001", 0)


def test_a_policy_can_be_pickled() -> None:
    judge = policy({"23": Rule(RETRY, "mine")})

    assert pickle.loads(pickle.dumps(judge)).decide("23505").action is RETRY


def test_the_table_needs_no_driver() -> None:
    """A DAG file pays for every import at each parse."""
    probe = (
        "import sys; from pgbg_orchestration import retry; retry.RetryPolicy().decide(ValueError('x'));"
        "print(any(name in sys.modules for name in ('psycopg', 'airflow', 'dagster')))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"

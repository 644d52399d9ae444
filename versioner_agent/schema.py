"""The outbox's tables, and the steps from one version of them to the next. Owns DDL and nothing else.

SQL no newer than SQLite 3.34: no STRICT, no RETURNING. Tallies are kept by triggers, so that counting states costs
the same at a million records as at ten (a long COUNT would block every commit of a rollback-journal database).
"""

from __future__ import annotations

#: "VeAg", marks the file as an outbox (https://sqlite.org/pragma.html#pragma_application_id).
APPLICATION_ID = 0x56654167
STATES = ("pending", "delivered", "failed", "exported", "discarded")
ALL_STATES = ("staged", *STATES)
#: Reasons that failed records are counted by; the last one is for all that are not listed.
FAILED_REASONS = ("conflict", "blocked", "blocked_late", "invalid", "gave_up", "damaged", "other")
#: Which of them a row of `record` has.
FAILED_REASON = """
    CASE WHEN {row}.reason = 'blocked' AND {row}.late THEN 'blocked_late'
        WHEN {row}.reason IN ('conflict', 'blocked', 'invalid', 'gave_up', 'damaged') THEN {row}.reason
        ELSE 'other' END
"""

#: Version 1. `staged` is no state of a record's life: the row waits for its batch to be published as a whole.
TABLES = (
    """
    CREATE TABLE record (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        event_id TEXT NOT NULL,
        state TEXT NOT NULL
            CHECK (state IN ('staged', 'pending', 'delivered', 'failed', 'exported', 'discarded')),
        kind TEXT NOT NULL CHECK (kind IN ('build', 'deployment')),
        product_name TEXT NOT NULL,
        version TEXT NOT NULL,
        environment_name TEXT,
        status TEXT NOT NULL,
        invoke_id TEXT,
        run_attempt TEXT,
        content BLOB NOT NULL,
        identity BLOB,
        occurrence INTEGER NOT NULL DEFAULT 0,
        queued_at REAL NOT NULL,
        queued_by TEXT NOT NULL,
        batch INTEGER,
        origin TEXT,
        amends INTEGER,
        digest BLOB NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        retries INTEGER NOT NULL DEFAULT 0,
        unanswered INTEGER NOT NULL DEFAULT 0,
        counted INTEGER NOT NULL DEFAULT 0,
        counted_since REAL,
        counted_mark INTEGER,
        held_since REAL,
        last_attempt_at REAL,
        settled_at REAL,
        http_status INTEGER,
        server_id TEXT,
        reason TEXT,
        code TEXT,
        rule TEXT,
        retry_after TEXT,
        late INTEGER NOT NULL DEFAULT 0,
        detail TEXT,
        payload BLOB NOT NULL
    )
    """,
    # Heads of ordering keys are found by seeking from key to key in this one.
    "CREATE INDEX record_pending ON record (product_name, id) WHERE state = 'pending'",
    "CREATE INDEX record_state ON record (state)",
    "CREATE INDEX record_held ON record (product_name, id) WHERE held_since IS NOT NULL",
    "CREATE INDEX record_settled ON record (settled_at) WHERE settled_at IS NOT NULL",
    "CREATE INDEX record_batch ON record (batch, id) WHERE state = 'staged'",
    "CREATE UNIQUE INDEX record_identity ON record (identity, occurrence) WHERE identity IS NOT NULL",
    """
    CREATE INDEX record_run ON record (invoke_id, product_name, environment_name, id)
    WHERE invoke_id IS NOT NULL
    """,
    "CREATE UNIQUE INDEX record_origin ON record (origin, event_id) WHERE origin IS NOT NULL",
    """
    CREATE TABLE attempt (
        id INTEGER PRIMARY KEY,
        record_id INTEGER NOT NULL,
        at REAL NOT NULL,
        outcome TEXT NOT NULL,
        http_status INTEGER,
        detail TEXT,
        duration_s REAL NOT NULL
    )
    """,
    "CREATE INDEX attempt_record ON attempt (record_id, id)",
    """
    CREATE TABLE batch (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL,
        created_at REAL NOT NULL,
        published INTEGER NOT NULL DEFAULT 0,
        waiting INTEGER NOT NULL DEFAULT 0
    )
    """,
    """
    CREATE TABLE destination (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        origin TEXT,
        account TEXT,
        state TEXT NOT NULL DEFAULT 'unknown',
        reason TEXT,
        since REAL,
        next_attempt_at REAL,
        retry_at REAL,
        deliveries INTEGER NOT NULL DEFAULT 0,
        last_delivered_at REAL
    )
    """,
    "INSERT INTO destination (id) VALUES (1)",
    "CREATE TABLE tally (state TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID",
    """
    INSERT INTO tally (state, n) VALUES
        ('staged', 0), ('pending', 0), ('delivered', 0), ('failed', 0), ('exported', 0), ('discarded', 0)
    """,
    """
    CREATE TRIGGER tally_insert AFTER INSERT ON record BEGIN
        UPDATE tally SET n = n + 1 WHERE state = NEW.state;
    END
    """,
    """
    CREATE TRIGGER tally_update AFTER UPDATE OF state ON record WHEN OLD.state <> NEW.state BEGIN
        UPDATE tally SET n = n - 1 WHERE state = OLD.state;
        UPDATE tally SET n = n + 1 WHERE state = NEW.state;
    END
    """,
    """
    CREATE TRIGGER tally_delete AFTER DELETE ON record BEGIN
        UPDATE tally SET n = n - 1 WHERE state = OLD.state;
        DELETE FROM attempt WHERE record_id = OLD.id;
    END
    """,
    # Space that only recording deliveries may use up when the disk is full.
    "CREATE TABLE reserve (id INTEGER PRIMARY KEY CHECK (id = 1), filler BLOB NOT NULL)",
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
)
#: What leads from version 1 to 2, from 2 to 3, and so on. What an older `enqueue` writes must remain right after one.
STEPS: tuple[tuple[str, ...], ...] = (
    # To 2: what an author is told while queuing has to be found at once, however large the outbox (see `notices`).
    (
        "CREATE INDEX record_version ON record (product_name, version)",
        "CREATE INDEX record_refused ON record (product_name) WHERE state = 'failed'",
    ),
    # To 3: crossing an air gap and coming back, being told of failures once, pruning without looking at what stays.
    # New tables differ in their number of columns from each other and from `record`, `batch` and `destination`, for
    # that is how their rows are told apart in a damaged file.
    (
        # Which outbox this is, wherever it is moved to, and the machine it was made on (see `hostid`).
        "CREATE TABLE outbox (id INTEGER PRIMARY KEY CHECK (id = 1), uid TEXT NOT NULL, machine TEXT)",
        "INSERT INTO outbox (id, uid) VALUES (1, lower(hex(randomblob(16))))",
        # Batches written for the far side. A record in one has its negative id as `batch`, for positive ones are those
        # it was queued in. `open`: written, and nothing marked; `marking`: all of it counts as exported, `waiting` of
        # them, behind `marked_to`, are still to be turned; `marked`. `awaited` of them are exported now.
        """
        CREATE TABLE export (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            uid TEXT NOT NULL UNIQUE,
            created_at REAL NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('open', 'marking', 'marked')),
            product_name TEXT,
            first_id INTEGER,
            last_id INTEGER,
            records INTEGER NOT NULL DEFAULT 0,
            waiting INTEGER NOT NULL DEFAULT 0,
            awaited INTEGER NOT NULL DEFAULT 0,
            marked_to INTEGER NOT NULL DEFAULT 0,
            previous TEXT,
            digest TEXT,
            file TEXT
        )
        """,
        "CREATE INDEX export_marking ON export (id) WHERE state = 'marking'",
        "CREATE INDEX export_unanswered ON export (id) WHERE awaited + waiting > 0",
        """
        CREATE TRIGGER export_enters AFTER UPDATE OF state ON record
        WHEN NEW.state = 'exported' AND OLD.state <> 'exported' BEGIN
            UPDATE export SET awaited = awaited + 1 WHERE id = -NEW.batch;
        END
        """,
        """
        CREATE TRIGGER export_leaves AFTER UPDATE OF state ON record
        WHEN OLD.state = 'exported' AND NEW.state <> 'exported' BEGIN
            UPDATE export SET awaited = awaited - 1 WHERE id = -OLD.batch;
        END
        """,
        """
        CREATE TRIGGER export_delete AFTER DELETE ON record WHEN OLD.state = 'exported' BEGIN
            UPDATE export SET awaited = awaited - 1 WHERE id = -OLD.batch;
        END
        """,
        # Batches of other outboxes that were imported here.
        """
        CREATE TABLE arrival (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            uid TEXT NOT NULL UNIQUE,
            origin TEXT NOT NULL,
            host TEXT,
            sequence INTEGER NOT NULL,
            created_at REAL NOT NULL,
            imported_at REAL NOT NULL,
            records INTEGER NOT NULL
        )
        """,
        "CREATE INDEX arrival_origin ON arrival (origin, id)",
        # Imported records whose verdict was written for where they came from: only those are pruned, by this time.
        "CREATE TABLE told (record_id INTEGER PRIMARY KEY, at REAL NOT NULL)",
        "CREATE INDEX told_at ON told (at)",
        "CREATE TRIGGER told_delete AFTER DELETE ON record BEGIN DELETE FROM told WHERE record_id = OLD.id; END",
        # What has failed, in the order in which it did, whatever the clock said; a cursor has seen those up to seq.
        "CREATE TABLE failure (seq INTEGER PRIMARY KEY AUTOINCREMENT, record_id INTEGER NOT NULL)",
        "CREATE INDEX failure_record ON failure (record_id)",
        "CREATE TABLE cursor (name TEXT PRIMARY KEY, seq INTEGER NOT NULL, used_at REAL NOT NULL) WITHOUT ROWID",
        "INSERT INTO failure (record_id) SELECT id FROM record WHERE state = 'failed' ORDER BY settled_at, id",
        """
        CREATE TRIGGER failure_insert AFTER INSERT ON record WHEN NEW.state = 'failed' BEGIN
            INSERT INTO failure (record_id) VALUES (NEW.id);
        END
        """,
        """
        CREATE TRIGGER failure_update AFTER UPDATE OF state ON record
        WHEN NEW.state = 'failed' AND OLD.state <> 'failed' BEGIN
            INSERT INTO failure (record_id) VALUES (NEW.id);
        END
        """,
        """
        CREATE TRIGGER failure_leaves AFTER UPDATE OF state ON record
        WHEN OLD.state = 'failed' AND NEW.state <> 'failed' BEGIN
            DELETE FROM failure WHERE record_id = OLD.id;
        END
        """,
        """
        CREATE TRIGGER failure_delete AFTER DELETE ON record WHEN OLD.state = 'failed' BEGIN
            DELETE FROM failure WHERE record_id = OLD.id;
        END
        """,
        "CREATE INDEX record_exported ON record (batch, id) WHERE state = 'exported'",
        "CREATE INDEX record_held_by_export ON record (product_name, id) WHERE state = 'exported'",
        # Only of those that a file may have: on a full disk a refusal must take hardly more than it gives back.
        """
        CREATE INDEX record_awaiting ON record (event_id)
        WHERE state IN ('exported', 'failed') AND (batch < 0 OR retries > 0)
        """,
        "CREATE INDEX record_imported ON record (state, id) WHERE origin IS NOT NULL",
        "CREATE INDEX record_amends ON record (amends) WHERE amends IS NOT NULL",
        "DROP INDEX record_settled",
        """
        CREATE INDEX record_prunable ON record (settled_at)
        WHERE state IN ('delivered', 'discarded') AND origin IS NULL
        """,
        "DROP INDEX record_refused",
        "CREATE INDEX record_refused ON record (product_name, version) WHERE state = 'failed'",
        # Failed records by reason, kept as `tally` is: a million of them can't be counted while a commit waits.
        "CREATE TABLE failed_tally (reason TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID",
        f"""
        INSERT INTO failed_tally (reason, n)
        SELECT {FAILED_REASON.format(row="record")}, count(*) FROM record WHERE state = 'failed' GROUP BY 1
        """,  # noqa: S608  # a constant
        """
        INSERT OR IGNORE INTO failed_tally (reason, n) VALUES
            ('conflict', 0), ('blocked', 0), ('blocked_late', 0), ('invalid', 0), ('gave_up', 0), ('damaged', 0),
            ('other', 0)
        """,
        f"""
        CREATE TRIGGER failed_tally_insert AFTER INSERT ON record WHEN NEW.state = 'failed' BEGIN
            UPDATE failed_tally SET n = n + 1 WHERE reason = {FAILED_REASON.format(row="NEW")};
        END
        """,  # noqa: S608  # a constant
        f"""
        CREATE TRIGGER failed_tally_update AFTER UPDATE OF state, reason, late ON record
        WHEN OLD.state = 'failed' OR NEW.state = 'failed' BEGIN
            UPDATE failed_tally SET n = n - (OLD.state = 'failed') WHERE reason = {FAILED_REASON.format(row="OLD")};
            UPDATE failed_tally SET n = n + (NEW.state = 'failed') WHERE reason = {FAILED_REASON.format(row="NEW")};
        END
        """,  # noqa: S608  # a constant
        f"""
        CREATE TRIGGER failed_tally_delete AFTER DELETE ON record WHEN OLD.state = 'failed' BEGIN
            UPDATE failed_tally SET n = n - 1 WHERE reason = {FAILED_REASON.format(row="OLD")};
        END
        """,  # noqa: S608  # a constant
    ),
)
VERSION = 1 + len(STEPS)
#: The version from which on there are the tables of the third step.
EXPORTS_SINCE = 3


def statements(version: int) -> tuple[str, ...]:
    """Return what makes an outbox of *version*, 1…VERSION: the way every older one has gone."""
    return (*TABLES, *(statement for step in STEPS[: version - 1] for statement in step))

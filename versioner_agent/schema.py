"""The outbox's tables, and the steps from one version of them to the next. Owns DDL and nothing else.

SQL no newer than SQLite 3.34: no STRICT, no RETURNING. Tallies are kept by triggers, so that counting states costs
the same at a million records as at ten (a long COUNT would block every commit of a rollback-journal database).
"""

from __future__ import annotations

#: "VeAg", marks the file as an outbox (https://sqlite.org/pragma.html#pragma_application_id).
APPLICATION_ID = 0x56654167
STATES = ("pending", "delivered", "failed", "exported", "discarded")
ALL_STATES = ("staged", *STATES)

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
)
VERSION = 1 + len(STEPS)


def statements(version: int) -> tuple[str, ...]:
    """Return what makes an outbox of *version*, 1…VERSION: the way every older one has gone."""
    return (*TABLES, *(statement for step in STEPS[: version - 1] for statement in step))

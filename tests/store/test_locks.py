"""Who may deliver, who waits, and that every death frees what was held."""

from __future__ import annotations

import os
import stat
from contextlib import closing

import pytest

from versioner_agent import files
from versioner_agent.locks import FlusherLock, Presence, WriteQueue

HOLD = """
import sys
from versioner_agent.locks import FlusherLock
lock = FlusherLock(sys.argv[1])
print(*[getattr(lock, name)() for name in sys.argv[2:]]); input()
"""
HOLD_QUEUE = """
import sys
from versioner_agent.locks import WriteQueue
queue = WriteQueue(sys.argv[1])
print(queue.acquire(10)); input(); queue.release(); print("released"); input()
"""
TAKE_QUEUE = """
import sys
from versioner_agent.locks import WriteQueue
seen = []
def progress():
    print("looked", flush=True)
    seen.append(len(seen) < int(sys.argv[2]) and len(seen))
    return seen[-1]
print(WriteQueue(sys.argv[1]).acquire(0.05, most=60, progress=progress))
"""
NOBODY = Presence(is_delivering=False, has_agent=False, pid=None, agent_pid=None)


@pytest.fixture
def lock(tmp_path):
    """Make locks on one outbox; all are closed in the end."""
    made = []

    def make():
        made.append(FlusherLock(str(tmp_path / "outbox.db")))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_one_delivers(lock):
    first, second = lock(), lock()

    assert first.claim_delivery()
    assert first.claim_delivery()
    assert not second.claim_delivery()
    first.close()
    assert second.claim_delivery()


def test_one_is_the_agent(lock):
    first, second = lock(), lock()

    assert first.claim_agent()
    assert not second.claim_agent()
    first.close()
    assert second.claim_agent()


def test_agent_and_delivery_are_claimed_apart(lock):
    flush, agent = lock(), lock()

    assert flush.claim_delivery()
    assert not flush.is_agent_waiting()
    assert agent.claim_agent()
    assert not agent.claim_delivery()
    assert flush.is_agent_waiting()
    flush.close()
    assert agent.claim_delivery()


def test_what_was_freed_is_not_taken_again_when_the_file_is_removed(lock):
    ours, agent = lock(), lock()
    assert ours.claim_agent()
    ours.close()
    assert ours.claim_delivery()
    os.remove(ours.path)

    assert ours.renew()
    assert agent.claim_agent()


def test_agent_does_not_wait_for_itself(lock):
    agent = lock()
    agent.claim_agent()
    agent.claim_delivery()

    assert not agent.is_agent_waiting()
    assert not lock().is_agent_waiting()


def test_nobody_is_there_before_the_first(lock, tmp_path):
    assert lock().presence() == NOBODY
    assert list(tmp_path.iterdir()) == []


def test_presence_tells_flush_from_agent(lock, child, tmp_path):
    flush = child(HOLD, tmp_path / "outbox.db", "claim_delivery")
    assert flush.says() == "True"
    assert lock().presence() == Presence(is_delivering=True, has_agent=False, pid=flush.process.pid, agent_pid=None)

    flush.kill()
    agent = child(HOLD, tmp_path / "outbox.db", "claim_agent", "claim_delivery")
    assert agent.says() == "True True"
    assert lock().presence() == Presence(
        is_delivering=True, has_agent=True, pid=agent.process.pid, agent_pid=agent.process.pid
    )


def test_looking_disturbs_nobody(lock, child, tmp_path):
    holder = child(HOLD, tmp_path / "outbox.db", "claim_agent", "claim_delivery")
    assert holder.says() == "True True"
    watcher = lock()
    for _ in range(50):
        watcher.presence()

    assert not lock().claim_delivery()
    assert not lock().claim_agent()


def test_looking_from_the_holders_process_frees_nothing(lock, child, tmp_path):
    """Closing any descriptor would drop ordinary POSIX locks; these are bound to their own."""
    mine = lock()
    mine.claim_agent()
    mine.claim_delivery()
    mine.presence()
    lock().presence()

    assert child(HOLD, tmp_path / "outbox.db", "claim_agent", "claim_delivery").says() == "False False"


def test_sigkill_frees_both(lock, child, tmp_path):
    holder = child(HOLD, tmp_path / "outbox.db", "claim_agent", "claim_delivery")
    assert holder.says() == "True True"
    holder.kill()

    assert lock().presence() == NOBODY
    mine = lock()
    assert mine.claim_agent()
    assert mine.claim_delivery()


def test_pid_of_a_dead_deliverer_is_not_told(lock, child, tmp_path):
    flush = child(HOLD, tmp_path / "outbox.db", "claim_delivery")
    flush.says()
    flush.kill()
    lock_of_agent = lock()
    lock_of_agent.claim_agent()

    presence = lock().presence()
    assert (presence.is_delivering, presence.has_agent) == (False, True)
    assert presence.pid in (None, os.getpid())


def test_shorter_pid_replaces_a_longer_one(lock, tmp_path):
    (tmp_path / "outbox.db.flusher").write_text("123456789012\n")
    mine = lock()
    mine.claim_delivery()

    assert lock().presence().pid == os.getpid()


@pytest.mark.parametrize("note", [b"", b"x", b"-1\n", b"\xff\xfe", b"9" * 100], ids=repr)
def test_any_content_of_the_file_is_survived(lock, tmp_path, note):
    mine = lock()
    mine.claim_delivery()
    (tmp_path / "outbox.db.flusher").write_bytes(note)
    presence = lock().presence()

    assert presence.is_delivering
    assert presence.pid is None or note.isdigit()


def test_link_is_not_followed(lock, tmp_path):
    (tmp_path / "outbox.db.flusher").symlink_to(tmp_path / "victim")
    (tmp_path / "victim").write_text("kept")

    with pytest.raises(OSError, match="symbolic links"):
        lock().claim_delivery()
    assert (tmp_path / "victim").read_text() == "kept"


def test_lock_file_stays(lock, tmp_path):
    mine = lock()
    mine.claim_delivery()
    mine.close()

    assert (tmp_path / "outbox.db.flusher").exists()


def test_queue_lets_one_in(tmp_path, child):
    path = tmp_path / "outbox.db.queue"
    holder = child(HOLD_QUEUE, path)
    assert holder.says() == "True"
    queue = WriteQueue(str(path))

    assert not queue.acquire(0.01)
    holder.go()
    assert holder.says() == "released"
    assert queue.acquire(10)
    queue.close()


def test_queue_is_freed_by_sigkill(tmp_path, child):
    path = tmp_path / "outbox.db.queue"
    holder = child(HOLD_QUEUE, path)
    assert holder.says() == "True"
    holder.kill()
    queue = WriteQueue(str(path))

    assert queue.acquire(0)
    queue.close()


def test_given_up_wait_never_takes_the_queue(tmp_path, child):
    """A wait that timed out must not hold the lock when its turn comes at last."""
    path = tmp_path / "outbox.db.queue"
    holder = child(HOLD_QUEUE, path)
    assert holder.says() == "True"
    queues = [WriteQueue(str(path)) for _ in range(3)]
    assert not any(queue.acquire(0.01) for queue in queues)
    holder.go()
    assert holder.says() == "released"

    for queue in queues:
        assert queue.acquire(10)
        queue.release()
        queue.close()


def test_queue_remembers_the_first_note_only(tmp_path):
    queue = WriteQueue(str(tmp_path / "q"))
    queue.acquire(1)
    queue.remember(b"outbox\n")
    queue.remember(b"other\n")
    queue.close()

    assert (tmp_path / "q").read_bytes() == b"outbox\n"


@pytest.mark.parametrize(("directory", "mode"), [(0o700, 0o600), (0o770, 0o600), (0o2750, 0o600), (0o2770, 0o660)])
def test_file_is_shared_only_where_a_group_shares_the_directory(tmp_path, directory, mode, umask):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(directory)
    umask(0o077)
    os.close(files.open_beside(str(shared / "file")))

    assert stat.S_IMODE((shared / "file").stat().st_mode) == mode


def test_file_that_is_there_keeps_its_mode(tmp_path):
    (tmp_path / "file").touch(0o640)
    (tmp_path / "file").chmod(0o640)
    os.close(files.open_beside(str(tmp_path / "file")))

    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_queue_that_moves_is_waited_for_longer(tmp_path, child):
    """Writers before us that get on are no reason to fail a build; one that hangs is."""
    holder = child(HOLD_QUEUE, tmp_path / "queue")
    assert holder.says() == "True"
    patient, hasty = child(TAKE_QUEUE, tmp_path / "queue", 1000), child(TAKE_QUEUE, tmp_path / "queue", 3)

    assert [hasty.says() for _ in range(6)] == ["looked"] * 5 + ["False"]
    for _ in range(6):
        assert patient.says() == "looked"
    holder.go()
    assert holder.says() == "released"
    said = patient.says()
    while said == "looked":
        said = patient.says()
    assert said == "True"


def test_a_queue_whose_file_was_removed_is_joined_anew(tmp_path, child):
    """Who came later queues on another file: both must queue on that."""
    path = tmp_path / "queue"
    queue = WriteQueue(str(path))
    assert queue.acquire(1)
    queue.release()
    os.remove(path)
    holder = child(HOLD_QUEUE, path)
    assert holder.says() == "True"

    assert not queue.acquire(0.05)
    holder.go()
    assert holder.says() == "released"
    assert queue.acquire(10)
    queue.close()


# --- something mounted over the place


def moved_aside(path):
    """What a mount does to an open file: it is still there, but its path leads to another place."""
    directory = os.path.dirname(path)
    os.rename(directory, directory + ".hidden")
    os.mkdir(directory)


def test_a_holder_notices_that_its_place_is_hidden(tmp_path):
    (tmp_path / "place").mkdir()
    path = str(tmp_path / "place" / "outbox.db")
    with closing(FlusherLock(path)) as lock:
        assert not lock.is_hidden()
        assert lock.claim_agent()
        assert not lock.is_hidden()
        moved_aside(path)
        assert lock.is_hidden()
        with closing(FlusherLock(path)) as other:
            other.claim_agent()
            assert lock.is_hidden()
            assert not other.is_hidden()


def test_a_place_that_is_gone_for_now_is_not_hidden(tmp_path):
    (tmp_path / "place").mkdir()
    path = str(tmp_path / "place" / "outbox.db")
    with closing(FlusherLock(path)) as lock:
        assert lock.claim_agent()
        os.rename(tmp_path / "place", tmp_path / "elsewhere")

        assert not lock.is_hidden()
        assert lock.renew()


def test_writers_queue_where_the_path_leads_now(tmp_path):
    (tmp_path / "place").mkdir()
    path = str(tmp_path / "place" / "outbox.db.queue")
    with closing(WriteQueue(path)) as before, closing(WriteQueue(path)) as after:
        assert before.acquire(1)
        before.release()
        moved_aside(path)
        assert after.acquire(1)

        assert not before.acquire(0.2)


def test_delivering_is_lent_and_taken_back(lock):
    agent, export = lock(), lock()
    assert agent.claim_agent()
    assert agent.claim_delivery()

    assert export.claim_borrow()
    assert agent.is_borrower_waiting()
    assert not export.claim_delivery()
    agent.release_delivery()
    assert export.claim_delivery()
    presence = lock().presence()
    assert (presence.has_agent, presence.is_delivering, presence.has_borrower) == (True, True, True)
    assert presence.borrower_pid == os.getpid()
    assert not agent.claim_delivery()
    export.close()
    assert not agent.is_borrower_waiting()
    assert agent.claim_delivery()


def test_one_borrows(lock):
    assert lock().claim_borrow()
    second = lock()
    assert not second.claim_borrow()
    assert second.is_borrower_waiting()


def test_a_key_beside_the_lock_does_not_run_into_the_borrower(lock):
    agent, export = lock(), lock()
    agent.claim_agent()
    agent.note_key("x" * 200)
    export.claim_borrow()

    assert lock().presence().agent_key == "x" * 96
    assert lock().presence().borrower_pid == os.getpid()

"""The API key is nowhere but in the request."""

from __future__ import annotations

import os

from host import KEY, eventually
from scripted import accepted, answer, refused

SECRET = b"journeysecret"


def test_the_key_is_in_no_file_no_output_and_no_command_line(host_for, serve):
    def script(seen):
        echo = seen.headers["authorization"]
        if seen.product == "refused":
            return refused(422, f"never with {echo}")
        if seen.product == "redirected" and seen.number < 20:
            return answer(302, b"", location=f"http://login.invalid/?{echo}")
        return accepted(echo) if seen.number > 5 else answer(503, {"detail": echo})

    host = host_for(serve(script).url)
    ids = [host.queue(product, 3)[0] for product in ("refused", "redirected", "accepted")]
    agent = host.agent("--verbose")
    eventually(lambda: host.counts() == {"delivered": 6, "failed": 3})
    with open(f"/proc/{agent.pid}/cmdline", "rb") as file:
        assert SECRET not in file.read()

    outputs = [host.run(*command) for command in (("status",), ("status", "--json"), ("list",), ("list", "--json"))]
    outputs += [host.run("show", str(number), *more) for number in ids for more in ((), ("--json",))]
    outputs += [host.run("flush", "--verbose"), host.run("retry", "--all-failed"), host.run("--nonsense")]
    host.end(agent)

    assert all(SECRET not in done.stdout + done.stderr for done in outputs)
    assert SECRET not in host.said()
    files = os.listdir(os.path.dirname(host.path))
    assert len(files) >= 3
    for name in files:
        with open(os.path.join(os.path.dirname(host.path), name), "rb") as file:
            assert SECRET not in file.read(), name


def test_a_key_given_wrongly_is_not_shown(host_for, serve):
    host = host_for(serve().url)
    host.queue("payments")

    done = host.run("flush", "--timeout", "0.3", VERSIONER_API_KEY=f"{KEY} and more")

    assert done.returncode == 3
    assert SECRET not in done.stdout + done.stderr


def test_a_key_in_a_file_that_others_can_read_is_refused_without_showing_it(host_for):
    host = host_for()
    host.config.write_text(f'api_key = "{KEY}"')
    host.config.chmod(0o644)

    done = host.run("status", VERSIONER_API_KEY="")

    assert done.returncode == 3
    assert b"chmod 600" in done.stderr
    assert SECRET not in done.stderr

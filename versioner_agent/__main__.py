"""`python -m versioner_agent`, and the start of the single file.

Until the check is done, this is in the syntax of every Python there is, so that an old one can say what is missing.
"""

import sys

NEEDED = (3, 11)

if sys.version_info < NEEDED:
    sys.stderr.write(
        "error: versioner-agent needs Python 3.11 or newer, and {} is Python {}; on RHEL 8 and 9: "
        "dnf install python3.11, then python3.11 versioner-agent.pyz ...\n".format(
            sys.executable or "this", ".".join(map(str, sys.version_info[:3]))
        )
    )
    sys.exit(1)


def start():  # type: () -> None  # noqa: ANN201  # in old syntax too
    """Run the command line; until it is loaded, Ctrl-C ends this without a traceback."""
    import signal  # noqa: PLC0415

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from versioner_agent.cli import main  # noqa: PLC0415

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)
    main()


if __name__ == "__main__":
    start()

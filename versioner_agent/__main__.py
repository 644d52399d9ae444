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

from versioner_agent.cli import main  # noqa: E402 - after the check

if __name__ == "__main__":
    main()

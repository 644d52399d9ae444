"""The least that a command of ours could do: the imports it can't do without and one synced row."""

import json
import sqlite3
import sys

import click  # noqa: F401  # what it costs is the point

connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA synchronous = FULL")
connection.execute("PRAGMA journal_mode = PERSIST")
connection.execute("INSERT INTO event (body) VALUES (?)", (json.dumps({"product_name": "p", "version": "1"}),))
connection.close()

"""`retry` and `discard`: a person's word on records, named by id or meant by a filter."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from versioner_agent.cli._common import RECORD_ID, echo, echo_json, json_option, outbox_settings, settings_options
from versioner_agent.cli._filters import filter_of, filter_options, is_given
from versioner_agent.errors import UsageError
from versioner_agent.text import harmless

if TYPE_CHECKING:
    from versioner_agent.filters import Filter
    from versioner_agent.repair import Part, Plan, Way
    from versioner_agent.review import Verdict
    from versioner_agent.storage import Store

#: Outcomes that mean the command did not do what was asked: a wrong call.
_REFUSED = ("not_found", "refused", "out_of_order")
PART_LINES = 20
LEFT_OUT_LINES = 20


@click.command()
@click.argument("ids", type=RECORD_ID, nargs=-1, metavar="[ID...]")
@click.option("--all-failed", is_flag=True, help="All failed records.")
@filter_options("failed", "exported")
@click.option("--out-of-order", is_flag=True, help="Also what a later event of its run has overtaken.")
@click.option("--yes", is_flag=True, help="With a filter: do it, else only say what would be done.")
@settings_options()
@json_option
def retry(ids: tuple[int, ...], all_failed: bool, out_of_order: bool, yes: bool, as_json: bool, **options: Any) -> int:
    """Send failed (or exported) records again, as new requests; what was queued again since is skipped.

    \b
    versioner-agent retry 42 43
    versioner-agent retry --all-failed
    versioner-agent retry --product my-service --reason blocked --yes
    """
    from versioner_agent import repair, review  # noqa: PLC0415
    from versioner_agent.filters import Filter  # noqa: PLC0415

    if bool(ids) + all_failed + is_given(options) != 1:
        raise UsageError("give record ids, --all-failed, or what they have in common (--product, --reason …)")
    store = _store(options)
    do = functools.partial(review.retry_one, out_of_order=out_of_order)
    try:
        if is_given(options):
            objection = functools.partial(review.retry_objection, out_of_order=out_of_order)
            way = repair.Way(do, objection, "retry", "retried")
            return _by_filter(store, filter_of(options, default_state="failed"), way, yes=yes, as_json=as_json)
        if all_failed:
            steps = repair.act(store, Filter("failed"), repair.newest(store), do)
            return _report(itertools.chain.from_iterable(steps), as_json=as_json)
        return _report(review.retry(store, list(dict.fromkeys(ids)), out_of_order=out_of_order), as_json=as_json)
    finally:
        store.close()


@click.command()
@click.argument("ids", type=RECORD_ID, nargs=-1, metavar="[ID...]")
@filter_options("pending", "failed", "exported")
@click.option(
    "--yes",
    is_flag=True,
    help="With a filter: do it, else only say what would be done. With ids: pending ones too, never to be delivered.",
)
@settings_options()
@json_option
def discard(ids: tuple[int, ...], yes: bool, as_json: bool, **options: Any) -> int:
    """Give up records for good; they stay visible as discarded.

    \b
    versioner-agent discard 42
    versioner-agent discard --product my-service --version 1.2.3 --yes
    """
    from versioner_agent import repair, review  # noqa: PLC0415

    if bool(ids) == is_given(options):
        raise UsageError("give record ids, or what they have in common (--product, --reason …)")
    store = _store(options)
    try:
        if is_given(options):
            way = repair.Way(
                functools.partial(review.discard_one, pending_too=True),
                lambda _, record: review.discard_objection(record, pending_too=True),
                "discard",
                "discarded",
            )
            return _by_filter(store, filter_of(options, default_state="failed"), way, yes=yes, as_json=as_json)
        return _report(review.discard(store, list(dict.fromkeys(ids)), pending_too=yes), as_json=as_json)
    finally:
        store.close()


def _store(options: dict[str, Any]) -> Store:
    from versioner_agent import exports  # noqa: PLC0415
    from versioner_agent.storage import Store  # noqa: PLC0415

    settings = outbox_settings(options)
    store = Store(settings.db, settings.busy_timeout)
    exports.turn_all(store)
    return store


def _report(verdicts: Iterable[Verdict], *, as_json: bool) -> int:
    outcomes = set()
    for verdict in verdicts:
        _say(verdict, as_json=as_json)
        outcomes.add(verdict.outcome)
    if not outcomes and not as_json:
        click.echo("nothing to do", err=True)
    return 0 if outcomes.isdisjoint(_REFUSED) else 2


def _say(verdict: Verdict, *, as_json: bool) -> None:
    if as_json:
        echo_json(verdict._asdict())
        return
    words = f": {verdict.detail}" if verdict.detail else ""
    click.echo(f"{verdict.id} {verdict.outcome.replace('_', ' ')}{words}", err=verdict.outcome in _REFUSED)


def _by_filter(store: Store, wanted: Filter, way: Way, *, yes: bool, as_json: bool) -> int:
    """Say what would be done with the records that are *wanted*, and with *yes* do it."""
    from versioner_agent import repair  # noqa: PLC0415

    plan = repair.plan(store, wanted, way.objection)
    if as_json and not yes:
        for part in plan.parts:
            echo_json({"count" if name == "total" else name: value for name, value in part._asdict().items()})
    if not as_json:
        for line in _plan_lines(plan, way):
            echo(harmless(line))
    if not yes:
        click.echo("nothing was done; --yes does it" if plan.total else "nothing to do", err=True)
        return 0
    _tell(repair.act(store, wanted, plan.last_id, way.do), way.done, as_json=as_json)
    return 0


def _plan_lines(plan: Plan, way: Way) -> Iterator[str]:
    for part in plan.parts[:PART_LINES]:
        yield _part_line(part, way.done)
    hidden = len(plan.parts) - PART_LINES
    if hidden > 0 or plan.is_cut:
        yield f"… and {max(hidden, 0)}{' or more' if plan.is_cut else ''} groups"
    span = f", of records {plan.first_id} to {plan.last_id}" if plan.last_id else ""
    left_out = f"; {plan.left_out} would be left out" if plan.left_out else ""
    yield f"to {way.verb}: {plan.total}{span}{left_out}"


def _part_line(part: Part, done: str) -> str:
    why = f" ({part.reason})" if part.reason else ""
    missed = "".join(f", {number} {outcome.replace('_', ' ')}" for outcome, number in part.left_out.items())
    what = f"{part.product_name[:100]} {part.version[:100]}: {part.total} {part.state}{why} would be {done}"
    return f"{what}, {part.first_id} to {part.last_id}{missed}"


def _tell(steps: Iterator[list[Verdict]], done: str, *, as_json: bool) -> None:
    """Say what becomes of records while it does; of many, in numbers, also where it ends early."""
    counts: dict[str, int] = {done: 0}
    try:
        for verdicts in steps:
            for verdict in verdicts:
                counts[verdict.outcome] = number = counts.get(verdict.outcome, 0) + 1
                if as_json or (verdict.outcome != done and number <= LEFT_OUT_LINES):
                    _say(verdict, as_json=as_json)
    finally:
        if not as_json:
            echo(", ".join(f"{number} {outcome.replace('_', ' ')}" for outcome, number in counts.items()))

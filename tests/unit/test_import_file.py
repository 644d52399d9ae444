"""Export files as they are read: what is sound comes through to the byte, all else is refused with a clear word."""

from __future__ import annotations

import gzip
import io
import json

import exports
import pytest

from versioner_agent.errors import AgentError
from versioner_agent.importfile import MAX_LINE_BYTES, BadFile, Changed, ExportFile

RECEIPTS = exports.head(content="receipts", sequence=0)


def read(data):
    file = ExportFile("the file", io.BytesIO(data))
    file.check()
    return list(file.again())


def why(data):
    with pytest.raises(BadFile) as caught:
        read(data)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value.message


def changed(**changes):
    return exports.file_of([{**exports.event(), **changes}])


def with_payload(text, **changes):
    return changed(payload=text, **changes)


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_sound_file_is_read_as_it_was_written(compress):
    lines = [exports.event(1), exports.event(2, fields={"version": "ü\u2028é", "invoke_id": "7"}, kind="build")]

    found = read(compress(exports.file_of(lines)))

    assert [each.payload.decode() for each in found] == [line["payload"] for line in lines]
    assert [each.queued_at for each in found] == [line["queued_at"] for line in lines]
    assert found[1].invoke_id == "7"


def test_our_own_writer_writes_the_documented_bytes():
    lines = [exports.event(1), exports.event(2)]

    assert exports.written(lines, exports.head()) == exports.file_of(lines)


def test_compression_is_told_by_content_and_may_be_in_parts():
    data = exports.file_of([exports.event()])

    assert len(read(gzip.compress(data[:100]) + gzip.compress(data[100:]))) == 1


def test_a_file_may_hold_nothing():
    assert read(exports.file_of([])) == []


def test_verdicts_are_read():
    found = read(
        exports.file_of([exports.verdict(1), exports.verdict(2, "failed"), exports.verdict(3, "discarded")], RECEIPTS)
    )

    assert [each.state for each in found] == ["delivered", "failed", "discarded"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"\0\1\2", "it has no end"),
        (b"\xff\n", "byte 0 is not UTF-8"),
        (b"root:x:0:0\n", "not valid JSON"),
        (b"[]\n", "not a JSON object"),
        (b"{}\n", "its first line does not say so"),
        (b'{"format":"versioner-agent export"}\n', "agent_version is missing"),
        (b"[" * 100_000 + b"\n", "nested too deeply"),
        (b"x" * (MAX_LINE_BYTES + 1), "longer than"),
        (gzip.compress(b"\0" * 10 * MAX_LINE_BYTES), "longer than"),
        (b"\x1f\x8b" + b"junk" * 10, "compression is damaged"),
        (exports.as_line(exports.head(format_version=2, news=1)), "newer versioner-agent (format 2)"),
        (exports.as_line(exports.head(format_version=True)), "format_version must be 1, not True"),
        (exports.as_line(exports.head(format_version=0)), "format_version must be 1, not 0"),
        (exports.as_line(exports.head(content="secrets")), "content must be events or receipts"),
        (exports.as_line(exports.head(batch="x")), "batch must be 32 hexadecimal digits"),
        (exports.as_line(exports.head(created_at=-1)), "created_at must be seconds"),
        (exports.as_line(exports.head(host="h" * 300)), "host must be text of up to 255"),
    ],
    ids=range(18),
)
def test_what_is_no_export_is_named(data, words):
    assert words in why(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (changed(id=0), "line 2: id must be a whole number"),
        (changed(id=True), "id must be"),
        (changed(id=1.0), "id must be"),
        (changed(id=2**63), "id must be"),
        (changed(origin="A" * 32), "origin must be 32 hexadecimal digits"),
        (changed(event_id="00000000-0000-0000-0000-00000000000A"), "event_id must be a UUID in lower case"),
        (changed(event_id="0" * 32), "event_id must be a UUID in lower case"),
        (changed(kind="party"), "kind must be build or deployment"),
        (changed(status="ok"), "status must be"),
        (changed(queued_at="1"), "queued_at must be seconds"),
        (changed(queued_at=253_402_300_800), "queued_at must be seconds"),
        (exports.file_of([exports.as_line(exports.event()).replace(b"1764150001.0", b"1e999")]), "queued_at must be seconds"),
        (exports.file_of([exports.as_line(exports.event()).replace(b"1764150001.0", b"NaN")]), "NaN is not a JSON number"),
        (changed(queued_by="a\0b"), "queued_by must be text"),
        (exports.file_of([exports.as_line(exports.event()).replace(b"uid 0", b"\\ud800")]), "queued_by must be text"),
        (changed(product_name=None), "product_name must be text"),
        (changed(more=1), "'more' is not known here"),
        (exports.file_of([{k: v for k, v in exports.event().items() if k != "kind"}]), "kind is missing"),
        (exports.file_of([exports.as_line(exports.event()).replace(b'"kind"', b'"id"')]), "the key 'id' is given twice"),
        (exports.file_of([b'{"a":' * 100_000 + b"\n"]), "nested too deeply"),
        (exports.file_of([b"9" * 5000 + b"\n"]), "not valid JSON"),
        (changed(product_name="other"), "its payload says something else of product_name"),
        (changed(invoke_id="7"), "its payload says something else of invoke_id"),
        (with_payload("[]"), "its payload is not a JSON object"),
        (with_payload("{"), "its payload is not valid JSON"),
        (with_payload("{}"), "its payload is no valid build: product_name: is required"),
        (with_payload('{"product_name":"payments","version":"1","version":"1","status":"completed"}'), "given twice"),
        (with_payload('{"a":' * 50_000), "its payload is not valid JSON"),
        (with_payload('{"x":"\\ud800","product_name":"payments","version":"1","status":"completed"}'), "lone surrogate"),
        (with_payload('{"x":1e999,"product_name":"payments","version":"1","status":"completed"}'), "finite"),
        (with_payload('{"product_name":"payments","version":"1","status":"success"}'), "says something else of status"),
        (with_payload('{"product_name":" payments","version":"1","status":"completed"}'), "something else of product_name"),
        (with_payload('{"product_name":"payments","version":"1","status":"completed"}', kind="deployment"), "environment_name: is required"),
        (with_payload('{"x":"' + "x" * 300_000 + '","product_name":"payments","version":"1","status":"completed"}'), "larger than 262144"),
        (exports.file_of([exports.event(2), exports.event(1)]), "line 3: id 1 does not come after 2"),
        (exports.file_of([exports.event(1), exports.event(1)]), "line 3: id 1 does not come after 1"),
        (exports.file_of([exports.event()], RECEIPTS), "attempts is missing"),
        (exports.file_of([exports.verdict(state="pending")], RECEIPTS), "state must be delivered or failed"),
        (exports.file_of([exports.verdict(reason="Not a word")], RECEIPTS), "reason must be a word"),
        (exports.file_of([exports.verdict(late=True)], RECEIPTS), "late must be"),
        (exports.file_of([exports.verdict(http_status=20)], RECEIPTS), "http_status must be"),
    ],
    ids=range(41),
)  # fmt: skip
def test_a_line_that_is_not_as_it_must_be_is_named_with_its_number(data, words):
    assert words in why(data)


def test_what_the_trailer_says_must_be_true():
    data = exports.file_of([exports.event(1), exports.event(2)])
    lines = data.splitlines(keepends=True)

    assert "cut short" in why(b"".join(lines[:-1]))
    assert "cut short" in why(data[:-1])
    assert "SHA-256" in why(data.replace(b"uid 0", b"uid 1"))
    assert "counts 2 lines, there are 1" in why(lines[0] + lines[1] + lines[3])
    assert "something follows" in why(data + b"\n")
    assert "something follows" in why(data + data)
    assert "sha256 must be 64" in why(lines[0] + b'{"trailer":true,"count":0,"sha256":"x"}\n')
    assert "trailer must be True" in why(lines[0] + lines[3].replace(b"true", b"1"))


def test_compressed_content_that_was_cut_or_altered_is_named():
    data = gzip.compress(exports.file_of([exports.event(number) for number in range(1, 200)]))

    assert "cut short" in why(data[:-1])
    assert "cut short" in why(data[: len(data) // 2])
    assert "compression is damaged" in why(data[:-8] + bytes(8))
    assert "compression is damaged" in why(data + b"x")


def test_a_file_that_is_another_one_by_the_second_reading_is_not_taken():
    stream = io.BytesIO(exports.file_of([exports.event(1)]))
    file = ExportFile("the file", stream)
    file.check()
    stream.seek(0)
    stream.write(exports.file_of([exports.event(1, queued_by="uid 9")]))

    with pytest.raises(Changed):
        list(file.again())


def test_a_file_that_can_not_be_read_any_more_is_not_taken():
    class Stick(io.BytesIO):
        is_pulled = False

        def readline(self, *args):
            if self.is_pulled:
                raise OSError(5, "Input/output error")
            return super().readline(*args)

    stick = Stick(exports.file_of([exports.event(1)]))
    file = ExportFile("the file", stick)
    file.check()
    stick.is_pulled = True

    with pytest.raises(Changed):
        list(file.again())
    with pytest.raises(AgentError, match="can't read the file: Input/output error"):
        file.check()


def test_no_more_is_read_at_once_than_a_line_may_have():
    class Bounded(io.BytesIO):
        def readline(self, size=-1):
            assert 0 < size <= MAX_LINE_BYTES + 1
            return super().readline(size)

    ExportFile("the file", Bounded(exports.file_of([exports.event(1)]))).check()


def test_a_negative_zero_is_the_time_that_sqlite_gives_back():
    (found,) = read(exports.file_of([exports.as_line(exports.event()).replace(b"1764150001.0", b"-0.0")]))

    assert repr(found.queued_at) == "0.0"


def test_words_in_errors_are_short():
    assert len(why(changed(kind="k" * 100_000))) < 300
    assert len(why(changed(**{"n" * 100_000: 1}))) < 300
    assert len(why(exports.as_line(json.loads(json.dumps(exports.head(format_version=10**400)))))) < 300

"""Which URLs are used, what they bind to, and which proxy leads there."""

from __future__ import annotations

import pytest

from versioner_agent import urls

API = "https://api.versioner.io"


@pytest.mark.parametrize(
    "url",
    [
        API, API + "/", API + "/v1/", "https://api.internal:8443", "HTTPS://API.versioner.io", "https://[fd00::1]:8443",
        "http://localhost:8080", "http://127.0.0.1", "http://127.9.9.9:1", "http://[::1]:8080", "http://dev.localhost",
        "http://LOCALHOST.",
    ],
)  # fmt: skip
def test_usable(url):
    assert urls.url_problem(url, insecure=False) == ""


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "https://"), ("api.versioner.io", "https://"), ("ftp://api.versioner.io", "https://"), ("https://", "host"),
        ("https:///path", "host"), ("https://:443", "host"), ("file:///etc/passwd", "https://"),
        ("https://a:0", "host"), ("https://a:99999", "not a URL"), ("https://a:b", "not a URL"),
        ("https://[::1", "not a URL"), ("https://a b", "ASCII"), ("https://a/\tx", "ASCII"), ("https://a\n", "ASCII"),
        ("https://zürich.example", "ASCII"), ("https://user@a", "user name"), ("https://u:p@a", "user name"),
        ("https://a/?x=1", "query"), ("https://a/#x", "query"), ("https://a/?", "query"), ("https://a/#", "query"),
    ],
    ids=ascii,
)  # fmt: skip
def test_unusable(url, says):
    for insecure in (False, True):
        assert says in urls.url_problem(url, insecure=insecure)


@pytest.mark.parametrize("host", ["api.internal", "10.0.0.1", "localhost.example.com", "128.0.0.1", "[::2]", "0.0.0.0"])
def test_plain_http_is_for_this_machine_only(host):
    assert "allow_insecure_http" in urls.url_problem(f"http://{host}", insecure=False)
    assert urls.url_problem(f"http://{host}", insecure=True) == ""


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        (API, API), (API + "/", API), (API + ":443/v1/x", API), ("HTTPS://API.Versioner.IO", API),
        (API + ":8443", API + ":8443"), ("http://localhost:80", "http://localhost"),
        ("http://localhost:443", "http://localhost:443"), ("https://[FD00::1]:443/", "https://[fd00::1]"),
    ],
)  # fmt: skip
def test_origin_is_scheme_host_and_unusual_port(url, origin):
    assert urls.origin_of(url) == origin


@pytest.mark.parametrize("spelling", ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
def test_usual_variables_name_the_proxy(spelling):
    assert urls.proxy_for(API, (None, None), {spelling: "http://proxy:3128"}) == "http://proxy:3128"


def test_proxy_of_another_scheme_is_not_used():
    assert urls.proxy_for(API, (None, None), {"http_proxy": "http://proxy:3128"}) is None


def test_no_proxy_without_a_setting():
    assert urls.proxy_for(API, (None, None), {}) is None
    assert urls.proxy_for(API, (None, None), {"HTTPS_PROXY": ""}) is None


def test_setting_wins_over_variables():
    env = {"https_proxy": "http://other:1", "no_proxy": "*"}

    assert urls.proxy_for(API, ("http://proxy:3128", ""), env) == "http://proxy:3128"


def test_proxy_without_a_scheme_is_http():
    assert urls.proxy_for(API, ("proxy:3128", None), {}) == "http://proxy:3128"


@pytest.mark.parametrize("url", ["http://localhost:1", "http://127.0.0.1", "http://[::1]", "https://x.localhost"])
def test_proxy_is_never_used_for_loopback(url):
    assert urls.proxy_for(url, ("http://proxy:3128", ""), {}) is None


@pytest.mark.parametrize(
    "entry",
    [
        "api.versioner.io", "API.versioner.io", ".versioner.io", "versioner.io", "*.versioner.io", "*", " io ",
        "other, api.versioner.io", "api.versioner.io:443",
    ],
)  # fmt: skip
def test_exception_covers(entry):
    assert urls.proxy_for(API, ("http://proxy:3128", entry), {}) is None
    assert urls.proxy_for(API, (None, None), {"HTTPS_PROXY": "http://p:1", "NO_PROXY": entry}) is None


@pytest.mark.parametrize(
    "entry", ["", ",", "pi.versioner.io", "x.api.versioner.io", "api.versioner.io:8443", "ersioner.io"]
)
def test_exception_does_not_cover(entry):
    assert urls.proxy_for(API, ("http://proxy:3128", entry), {}) == "http://proxy:3128"


def test_exception_with_a_port_covers_that_port():
    assert urls.proxy_for(API + ":8443", ("http://p:1", "api.versioner.io:8443"), {}) is None
    assert urls.proxy_for(API + ":8444", ("http://p:1", "api.versioner.io:8443"), {}) is not None


@pytest.mark.parametrize(
    ("proxy", "place"),
    [("http://u:secret@proxy:3128", "proxy:3128"), ("http://proxy", "proxy"), ("http://u:a@b@p:1", "p:1")],
)
def test_place_of_a_proxy_has_no_password(proxy, place):
    assert urls.place_of(proxy) == place


@pytest.mark.parametrize(
    ("proxy", "shown"),
    [
        ("http://proxy:3128", "http://proxy:3128"),
        ("proxy:3128", "proxy:3128"),
        ("http://me:pw@proxy:3128", "http://***@proxy:3128"),
        ("HTTPS://me:pw@proxy/", "HTTPS://***@proxy"),
        ("me:pw@proxy:3128", "***@proxy:3128"),
        ("http://:pw@[::1]:3128", "http://***@[::1]:3128"),
        ("http://token@proxy:3128", "http://***@proxy:3128"),
        ("http://me:p/w#?p@w@proxy:3128", "***"),
        ("http://me:pw://pw@proxy", "***"),
        ("http://me:secret", "***"),
        ("http://me:pw%40proxy", "***"),
        ("DOMAIN\\me:pw", "***"),
        ("http://me:pw\uff20proxy", "***"),
        ("http://proxy:3128;me:pw", "***"),
    ],
)
def test_the_password_of_a_proxy_is_not_shown(proxy, shown):
    assert urls.without_password(proxy) == shown

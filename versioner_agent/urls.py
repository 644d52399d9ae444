"""Rules about URLs: which may be used, what they bind to, which proxy leads there. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

_DEFAULT_PORTS = {"https": 443, "http": 80}
_PLAIN_PROXY = re.compile(
    r"(https?://)?([^/?#\s]*@)?((?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?)/?", re.IGNORECASE
)


def url_problem(api_url: str, *, insecure: bool) -> str:
    """Say why *api_url* can't be used; empty when it can. Plain http only to this machine, unless *insecure*."""
    try:
        url = urlsplit(api_url)
        host, port = url.hostname, url.port
    except ValueError:  # its words quote what may be a password
        return "is not a URL"
    if url.scheme not in ("http", "https") or not host or port == 0:
        return "must be an https:// URL with a host"
    if any(character.isspace() or ord(character) < 32 for character in api_url) or not api_url.isascii():
        return "must be plain ASCII without spaces"
    if "@" in url.netloc:
        return "must not hold a user name or password"
    if "?" in api_url or "#" in api_url:
        return "must not hold a query or fragment"
    if url.scheme == "http" and not insecure and not is_loopback(host):
        return "plain http is for this machine only; use https, or set allow_insecure_http"
    return ""


def origin_of(api_url: str) -> str:
    """Return scheme, host and port of a URL, the port left out where it is the scheme's own."""
    url = urlsplit(api_url)
    host = (url.hostname or "").lower()
    host = f"[{host}]" if ":" in host else host
    default = _DEFAULT_PORTS.get(url.scheme)
    port = f":{url.port}" if url.port and url.port != default else ""
    return f"{url.scheme}://{host}{port}"


def is_loopback(host: str) -> bool:
    """Tell whether *host* names this machine only (RFC 6761 section 6.3 for localhost)."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def proxy_for(api_url: str, settings: tuple[str | None, str | None], env: Mapping[str, str]) -> str | None:
    """Return the proxy for *api_url*: *settings* are (proxy, no_proxy), else the usual variables; loopback has none."""
    url = urlsplit(api_url)
    host = (url.hostname or "").lower()
    proxy = settings[0] or _first(env, f"{url.scheme}_proxy", "all_proxy")
    if not proxy or is_loopback(host):
        return None
    exceptions = settings[1] if settings[1] is not None else _first(env, "no_proxy")
    if any(
        _matches(host, url.port or _DEFAULT_PORTS.get(url.scheme), entry) for entry in (exceptions or "").split(",")
    ):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def place_of(proxy: str) -> str:
    """Return host and port of a proxy URL, without the password it may carry."""
    return urlsplit(proxy).netloc.rpartition("@")[2]


def without_password(proxy: str) -> str:
    """Return what may be shown of a proxy: scheme, host and port of a plain URL; of all else nothing, it may be secret.

    A token can stand where the user's name belongs, and a password where the port does.
    """
    match = _PLAIN_PROXY.fullmatch(proxy)
    return f"{match[1] or ''}{'***@' if match[2] else ''}{match[3]}" if match else "***"


def _first(env: Mapping[str, str], *names: str) -> str | None:
    found = (env.get(spelling) for name in names for spelling in (name, name.upper()))
    return next((value for value in found if value), None)


def _matches(host: str, port: int | None, entry: str) -> bool:
    """Tell whether a NO_PROXY entry covers *host*: a name, a domain with or without dot, host:port, or `*`."""
    name, _, wanted_port = (
        entry.strip().lower().rpartition(":") if entry.count(":") == 1 else (entry.strip().lower(), "", "")
    )
    if not name:
        return False
    if wanted_port and wanted_port != str(port or ""):
        return False
    domain = name.lstrip("*").lstrip(".")
    return name == "*" or host == domain or host.endswith("." + domain)

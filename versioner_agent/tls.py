"""Trust: which certificates to believe, and what to say when one is not believed.

The operating system's store is used, as curl and the official CLI do, so that a company's own authority installed on
the host is enough. When a certificate is refused, people are told who issued it, for "certificate verify failed" alone
sends them to the wrong place.
"""

from __future__ import annotations

import os
import ssl
from contextlib import suppress
from typing import Any

from versioner_agent.errors import ConfigError

#: Where distributions keep the store, for Pythons that were built to look elsewhere.
_SYSTEM_STORES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
#: What to do, by X509_V_ERR_… (https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/).
_OTHER_NAME = "correct api_url, or have the certificate made for that name; a portal may answer in the API's place"
_REMEDIES = {
    9: "set this host's clock (timedatectl set-ntp true), or wait until the certificate is valid",
    10: "have it renewed where the API is, if this host's clock is right (date)",
    62: _OTHER_NAME,
    64: _OTHER_NAME,
}
_COMMON_NAME = bytes((0x55, 0x04, 0x03))  # OID 2.5.4.3
_ORGANISATION = bytes((0x55, 0x04, 0x0A))  # OID 2.5.4.10


def trust(ca_bundle: str | None) -> tuple[ssl.SSLContext, str]:
    """Return a verifying context and the name of the store it uses; raises ConfigError for an unusable *ca_bundle*.

    SSL_CERT_FILE and SSL_CERT_DIR replace the system's store, and SSLKEYLOGFILE has a say, as wherever OpenSSL is used.
    """
    if ca_bundle:
        try:
            if not os.path.isfile(ca_bundle):
                raise FileNotFoundError(2, "there is no such file")  # nor a pipe, whose writer may never come
            return ssl.create_default_context(cafile=ca_bundle), f"ca_bundle {ca_bundle}"
        except (OSError, ssl.SSLError) as exc:
            raise ConfigError([f"ca_bundle: can't read certificates from {ca_bundle}: {exc}"]) from exc
    try:
        return _system_trust()
    except OSError as exc:
        where = f"SSLKEYLOGFILE {os.environ['SSLKEYLOGFILE']}" if os.environ.get("SSLKEYLOGFILE") else "the trust store"
        raise ConfigError([f"can't use {where}: {exc.strerror or exc}"]) from exc


def _system_trust() -> tuple[ssl.SSLContext, str]:
    paths = ssl.get_default_verify_paths()
    for variable in (paths.openssl_cafile_env, paths.openssl_capath_env):
        if os.environ.get(variable):
            return ssl.create_default_context(), f"{variable} {os.environ[variable]}"
    if paths.cafile or (paths.capath and os.listdir(paths.capath)):
        return ssl.create_default_context(), f"the system's store {paths.cafile or paths.capath}"
    for store in _SYSTEM_STORES:
        if os.path.isfile(store):
            return ssl.create_default_context(cafile=store), f"the system's store {store}"
    return ssl.create_default_context(), "an empty trust store"


def explain(exc: ssl.SSLCertVerificationError, store: str, host: str, certificate: bytes | None) -> str:
    """Say why *certificate* (DER, None where it could not be seen) was refused, who issued it, and the store used."""
    reason = exc.verify_message or str(exc)
    issuer = None
    if certificate:
        with suppress(ValueError):
            issuer = issuer_name(certificate)
    issued = f" (issued by {issuer})" if issuer else ""
    return f"the certificate of {host}{issued} is not trusted: {reason}; checked against {store}"


def remedy(exc: BaseException) -> str:
    """Say what to do about a connection on which TLS failed."""
    if not isinstance(exc, ssl.SSLCertVerificationError):
        return "look at api_url, its port, and what is on the way: what answers there does not speak TLS as expected"
    unknown = "install the issuer's certificate on this host, or name it as ca_bundle"
    return _REMEDIES.get(exc.verify_code, unknown)


def issuer_name(certificate: bytes) -> str | None:
    """Read the issuer's name from a DER certificate (RFC 5280 section 4.1); raises ValueError for garbage."""
    try:
        outer = _contents(certificate, 0)[0]
        fields = _children(_children(outer)[0][1])
    except IndexError as exc:
        raise ValueError("not a certificate") from exc
    if fields and fields[0][0] == 0xA0:
        fields = fields[1:]  # the version, left out by version 1
    names: dict[bytes, str] = {}
    for _, relative_name in _children(fields[2][1]) if len(fields) > 2 else []:
        for _, pair in _children(relative_name):
            parts = _children(pair)
            if len(parts) == 2:
                names[parts[0][1]] = parts[1][1].decode("utf-8", "replace")
    return names.get(_COMMON_NAME) or names.get(_ORGANISATION)


def _children(data: bytes) -> list[tuple[int, bytes]]:
    """Split the contents of a DER constructed value into (tag, contents)."""
    found = []
    position = 0
    while position < len(data):
        tag = data[position]
        contents, position = _contents(data, position)
        found.append((tag, contents))
    return found


def _contents(data: bytes, position: int) -> tuple[bytes, int]:
    """Return the contents of the DER value at *position* and where the next one starts (X.690 section 8.1)."""
    length = data[position + 1]
    start = position + 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(data[start : start + size], "big")
        start += size
    if start + length > len(data):
        raise ValueError("a DER value ends behind its data")
    return data[start : start + length], start + length


def named(name: Any) -> str:
    """Return whom a parsed name of `getpeercert` means: organisation and common name, as far as it has them."""
    parts = {key: value for group in name or () for key, value in group}
    words = (parts.get("organizationName"), parts.get("commonName"))
    return ", ".join(str(word) for word in words if word) or "an unnamed authority"

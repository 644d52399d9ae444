"""A certificate authority of the tests' own, made with openssl."""

from __future__ import annotations

import shutil
import ssl
import subprocess

import pytest

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make certificates")


class Authority:
    """Signs server certificates; `certificate` is what a client must trust."""

    def __init__(self, directory):
        self.directory = directory
        self.certificate = directory / "ca.pem"
        self._made = 0
        self._openssl(
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/O=Example/CN=Example Test Authority",
            "-keyout", "ca.key", "-out", "ca.pem",
        )  # fmt: skip

    def context(self, *, names, days=2):
        """A server's context with a certificate for *names*, valid for *days* (negative: expired)."""
        self._made += 1
        key, request, certificate = (f"{self._made}.{end}" for end in ("key", "csr", "pem"))
        self._openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=server", "-keyout", key, "-out", request)
        (self.directory / "ext").write_text(f"subjectAltName={','.join(names)}\n")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", str(days), "-extfile", "ext")
        self._openssl("x509", "-req", "-in", request, *signed, "-out", certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.directory / certificate, self.directory / key)
        return context

    def _openssl(self, *args):
        subprocess.run(["openssl", *args], cwd=self.directory, check=True, capture_output=True)

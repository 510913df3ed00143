"""What tests of downloads share: a file, its hash, one download that works or that must not."""

from __future__ import annotations

import hashlib
import ssl
import subprocess
from pathlib import Path

import needs
import pytest
from http_server import Answer, FileServer

from anepy.errors import DownloadError
from anepy.system import download

BODY = bytes(range(256)) * 4096  # 1 MiB: several chunks
SHA256 = hashlib.sha256(BODY).hexdigest()
WRONG = b"\xff" + BODY[1:]
QUICK = (2.0, 0.4)


def fetch(server: FileServer, dest: Path, *answers: Answer, **options: object) -> Path:
    server.answers["/f.bin"] = list(answers)
    settings: dict[str, object] = {"timeout": QUICK, "retries": 0} | options
    return download.download(server.url("/f.bin"), dest, SHA256, len(BODY), **settings)  # type: ignore[arg-type]


def refused(server: FileServer, dest: Path, *answers: Answer, **options: object) -> DownloadError:
    """Return the error of a download that must fail, after checking what holds for every one."""
    with pytest.raises(DownloadError) as caught:
        fetch(server, dest, *answers, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "f.bin" in message
    if dest.parent.is_dir():
        assert list(dest.parent.iterdir()) == [], "a failed download left something behind"
    return caught.value


def make_secure(server: FileServer, folder: Path) -> tuple[FileServer, Path]:
    """Let a server speak TLS; also return the certificate, which nobody else trusts."""
    openssl = needs.program("openssl")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
    return server, certificate

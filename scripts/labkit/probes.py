"""Is it answering? One question per service, each short, none raising: no answer is ``False``."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from pathlib import Path

PROBE_SECONDS = 2.0


def docker_answers(path: Path) -> bool:
    """Whether a dockerd answers ``/_ping`` on that unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PROBE_SECONDS)
        try:
            connection.connect(str(path))
            connection.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            return b" 200 " in connection.recv(64)
        except OSError:
            return False


def ssh_answers(address: str, port: int = 22) -> bool:
    """Whether an sshd says its name there."""
    try:
        with socket.create_connection((address, port), timeout=PROBE_SECONDS) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def port_is_free(address: str, port: int) -> bool:
    """Whether one may listen there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError:
            return False
    return True


def _http(address: str, port: int, method: str, path: str, body: str | None = None) -> bytes | None:
    connection = http.client.HTTPConnection(address, port, timeout=PROBE_SECONDS)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.read() if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def etcd_answers(address: str, port: int) -> bool:
    """Whether that member of etcd serves, with a leader."""
    body = _http(address, port, "GET", "/health")
    return body is not None and b'"true"' in body


def etcd_has(address: str, port: int, key: str) -> bool:
    """Whether a key exists, asked through etcd's JSON gateway."""
    question = json.dumps({"key": base64.b64encode(key.encode()).decode(), "keys_only": True})
    body = _http(address, port, "POST", "/v3/kv/range", question)
    if body is None:
        return False
    try:
        return bool(json.loads(body).get("kvs"))
    except ValueError:
        return False

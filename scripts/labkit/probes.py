"""Is it answering? One question per service, each short, none raising: no answer is ``False``."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import subprocess
from pathlib import Path

from labkit.process import PATH
from labkit.spec import LabSpec

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


def secured_etcd_has(endpoint: str, files: Path, key: str) -> bool:
    """As ``etcd_has``, with the operator's certificate: etcd's gateway knows nobody by his certificate."""
    try:
        done = subprocess.run(
            [
                *("etcdctl", f"--endpoints=https://{endpoint}", "--command-timeout=2s", f"--cacert={files}/ca.crt"),
                *(f"--cert={files}/operator.crt", f"--key={files}/operator.key", "get", "--keys-only", key),
            ],
            env={"PATH": PATH, "ETCDCTL_API": "3"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=2 * PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and bool(done.stdout.strip())


def bus_has(spec: LabSpec, key: str) -> bool:
    """Whether a key exists in the lab's etcd."""
    port = spec.client_ports()[0]
    if spec.secure:
        return secured_etcd_has(f"{spec.gateway}:{port}", spec.fleet_directory, key)
    return etcd_has(spec.gateway, port, key)

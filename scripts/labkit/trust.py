"""The lab as operator: SSH keys, pinned host keys and configuration files for every host.

Written into each host's private ``/etc/cargo`` before its services start. Keys are made once and kept over
restarts and power cuts. Nothing here weakens SSH: host keys are pinned, authentication is by key only, and a host's key
opens the gate (``hostd/ssh_gate.py``) and nothing else on the others. A person's key, which tests and benchmarks use to do
by hand what people do without Cargo, is another one.
"""

from __future__ import annotations

import configparser
import io
import sys
from pathlib import Path

from hostd.ssh_keys import authorized_line
from labkit.errors import LabError
from labkit.fleet import COORDINATOR
from labkit.network import command
from labkit.spec import OWN_ROOT, LabSpec

SSH_DIRECTORY = "/etc/cargo/ssh"
STATE_DIRECTORY = "/var/lib/cargo"
OPERATOR_IDENTITY = f"{SSH_DIRECTORY}/id_operator"
OPERATOR_COMMAND = 'command="sh -c \\"$SSH_ORIGINAL_COMMAND\\""'
"""Root's account opens to forced commands only; a person's is whatever the person says."""
TRUST = "/etc/cargo/trust"
"""Where `cargo-hostd join` puts what a secure lab's hosts need."""

SSHD_CONFIG = """\
ListenAddress {address}
Port 22
HostKey {directory}/ssh_host_ed25519_key
AuthorizedKeysFile {directory}/authorized_keys
PermitRootLogin forced-commands-only
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
StrictModes yes
PrintMotd no
PidFile /run/sshd.pid
MaxStartups 100
MaxSessions 100
Subsystem sftp /usr/lib/openssh/sftp-server
"""


def interpreter(root: str) -> str:
    """The Python that a host with this root tree runs the product on, as a path on the host."""
    return sys.executable if root == OWN_ROOT else "/usr/bin/python3"


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.chmod(mode)
    partial.replace(path)


def _key(path: Path, comment: str) -> str:
    """Make an ed25519 key pair unless it is there; returns the public line."""
    public = path.with_name(path.name + ".pub")
    if not (path.exists() and public.exists()):
        path.unlink(missing_ok=True)
        command(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)])
    return public.read_text().strip()


def ini(sections: dict[str, dict[str, str]]) -> str:
    """``sections`` as an INI file."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_dict(sections)
    text = io.StringIO()
    parser.write(text)
    return text.getvalue().rstrip("\n") + "\n"


def _bus(spec: LabSpec, stem: str, ca: str, signing_key: str) -> dict[str, dict[str, str]]:
    """The sections [etcd] and, if the lab is secure, [trust]. ``stem`` is that of the certificate and its key."""
    etcd = {"endpoints": spec.endpoints, "prefix": "/cargo"}
    if not spec.secure:
        return {"etcd": etcd}
    etcd |= {"ca": ca, "cert": f"{stem}.crt", "key": f"{stem}.key"}
    return {"etcd": etcd, "trust": {"ca": ca, "signing_key": signing_key}}


def coordinator_config(spec: LabSpec) -> str:
    """coordinator.cfg."""
    own = f"{spec.fleet_directory}/coordinator-{COORDINATOR}"
    return ini(
        {
            **_bus(spec, own, f"{spec.fleet_directory}/ca.crt", f"{own}.signing.key"),
            "coordinator": {"name": COORDINATOR},
            "log": {"level": "info", "format": "json"},
        }
    )


def operator_config(spec: LabSpec) -> str:
    """For cargoctl, as the operator of a secure lab."""
    return ini(_bus(spec, f"{spec.fleet_directory}/operator", f"{spec.fleet_directory}/ca.crt", ""))


def hostd_config(spec: LabSpec, host: str, address: str) -> str:
    """hostd.cfg of one host."""
    return ini(
        {
            "host": {
                "name": host,
                "address": address,
                "state_dir": STATE_DIRECTORY,
                "run_dir": "/run/cargo",
                # The lab's hosts share a kernel, so a block device that several of them mount is one file system
                # with one cache: storage that both hosts reach. Nothing else of the lab is an ext2.
                "shared_file_systems": "nfs nfs4 cifs ext2",
            },
            **_bus(spec, f"{TRUST}/etcd", f"{TRUST}/ca.crt", f"{TRUST}/signing.key"),
            "docker": {"socket": "/run/docker.sock"},
            "ssh": {
                "user": "root",
                "port": "22",
                "identity": f"{SSH_DIRECTORY}/id_ed25519",
                "known_hosts": f"{SSH_DIRECTORY}/known_hosts",
            },
            "log": {"level": "info", "format": "json"},
        }
    )


def without_locked_root(shadow: str) -> str:
    """``shadow`` with root's password ``*``: sshd without PAM takes a leading ``!`` for a locked account."""
    lines = []
    for line in shadow.splitlines():
        fields = line.split(":")
        if fields[0] == "root" and len(fields) > 1:
            fields[1] = "*"
        lines.append(":".join(fields))
    return "\n".join(lines) + "\n"


def write_etc(spec: LabSpec, host: str, root: Path) -> None:
    """The host's own files directly in /etc, the upper of its overlay over ``root``'s. Only while the host is off."""
    upper = spec.host_directory(host) / "etc.upper"
    try:
        shadow = (root / "etc/shadow").read_text()
    except OSError as error:
        raise LabError(f"{root / 'etc/shadow'} cannot be read: {error}") from error
    _write(upper / "shadow", without_locked_root(shadow), 0o640)
    _write(upper / "hostname", f"{host}\n")
    names = [f"{other.address} {other.name}" for other in spec.hosts]
    _write(upper / "hosts", "\n".join(["127.0.0.1 localhost", "::1 localhost", *names]) + "\n")


def write_trust(spec: LabSpec) -> None:
    """Keys and configuration of all hosts. Existing keys stay; the others learn of a host that was added."""
    host_keys, client_keys, operators = {}, {}, []
    for host in spec.hosts:
        ssh = spec.host_directory(host.name) / SSH_DIRECTORY.lstrip("/")
        ssh.mkdir(parents=True, exist_ok=True)
        ssh.chmod(0o700)
        host_keys[host.name] = _key(ssh / "ssh_host_ed25519_key", f"host {host.name}")
        if not spec.secure:  # there the host makes its own when it joins
            client_keys[host.name] = _key(ssh / "id_ed25519", f"hostd@{host.name}")
        operators.append(_key(ssh / "id_operator", f"a person at {host.name}"))
    for host in spec.hosts:
        cargo = spec.host_directory(host.name) / "etc/cargo"
        _write(cargo / "ssh/sshd_config", SSHD_CONFIG.format(address=host.address, directory=SSH_DIRECTORY))
        if not (cargo / "hostd.cfg").exists():  # a person may have changed it
            _write(cargo / "hostd.cfg", hostd_config(spec, host.name, host.address))
        if spec.secure:  # its agent keeps the pins
            continue
        known = [f"{o.address},{o.name} {' '.join(host_keys[o.name].split()[:2])}" for o in spec.hosts]
        python = interpreter(host.root)
        others = [
            authorized_line(o.name, client_keys[o.name], state_dir=Path(STATE_DIRECTORY), python=python)
            for o in spec.hosts
            if o.name != host.name
        ]
        others += [f"{OPERATOR_COMMAND} {key}" for key in operators if key != operators[spec.hosts.index(host)]]
        _write(cargo / "ssh/known_hosts", "\n".join(known) + "\n")
        _write(cargo / "ssh/authorized_keys", "".join(f"{line}\n" for line in others), 0o600)
    if not (spec.root / "coordinator.cfg").exists():
        _write(spec.root / "coordinator.cfg", coordinator_config(spec))
    if spec.secure:
        _write(spec.operator_config, operator_config(spec))

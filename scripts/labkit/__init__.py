"""The lab: etcd, a coordinator and several Docker hosts on one machine, for demos and for tests.

A lab host is a set of namespaces (network, mount, PID, UTS, IPC) with its own dockerd, sshd and hostd.
The lab plays the operator: it makes keys, pins them, writes configuration and starts services. It never
touches the machine's own Docker, etcd, SSH or network settings, and ``down`` leaves nothing behind.

Reading order: spec (what a lab is), launch (how a process gets into a namespace), process, network,
trust, host, lab, leftovers, cli. Only the standard library is needed, but for ``images`` and
``Host.docker_client``, which use the docker SDK.
"""

from labkit.errors import CommandFailedError, LabError, MissingRequirementError
from labkit.host import Host
from labkit.lab import Lab
from labkit.process import Process
from labkit.spec import HostSpec, LabSpec

__all__ = [
    "CommandFailedError",
    "Host",
    "HostSpec",
    "Lab",
    "LabError",
    "LabSpec",
    "MissingRequirementError",
    "Process",
]

"""What of a container's configuration a target cannot keep, each thing by a name that a request can consent to.

A container is the same container only with all that it was created with. What this host has not got (a device, a
runtime, a log driver, a kind of limit) is found here before anything stops. Either the migration is refused with every
name, or the request says ``"without": ["device:/dev/kvm"]`` and the container is created without exactly that, which
the history records. Nothing is dropped in silence: what Docker itself drops at the creation is found by ``dropped``.

``shortfalls`` and ``dropped`` find, ``stripped`` leaves out. Pure: facts about the target come in as ``Target``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from hostd.docker_json import HostConfigView, view
from hostd.moves import PRIVILEGED
from hostd.spec import ContainerSpec

MAX_DIGITS = 10
"""Of a processor's number."""
NANO_CPUS = 1_000_000_000
GPU_DRIVERS = ("", "nvidia")
"""Drivers of ``--gpus`` that Docker serves with NVIDIA's hook."""
BLKIO_LISTS = (
    "BlkioWeightDevice",
    "BlkioDeviceReadBps",
    "BlkioDeviceWriteBps",
    "BlkioDeviceReadIOps",
    "BlkioDeviceWriteIOps",
)
LIMITS = {
    "Memory": "MemoryLimit",
    "MemoryReservation": "MemoryLimit",
    "CpuShares": "CPUShares",
    "CpuPeriod": "CpuCfsPeriod",
    "CpuQuota": "CpuCfsQuota",
    "NanoCpus": "CpuCfsQuota",
    "CpusetCpus": "CPUSet",
    "CpusetMems": "CPUSet",
    "PidsLimit": "PidsLimit",
    "OomKillDisable": "OomKillDisable",
    "KernelMemory": "KernelMemory",
    "KernelMemoryTCP": "KernelMemoryTCP",
}
"""A limit of ``HostConfig``, and what ``docker info`` calls the ability that it takes."""
NOT_COMPARED = frozenset(
    {
        "HostConfig.RestartPolicy",
        "HostConfig.NetworkMode",
        "HostConfig.Runtime",
        "Config.Image",
        "Config.MacAddress",
        "Config.OnBuild",
        "HostConfig.ContainerIDFile",
    }
)
"""The agent's own, or names that Docker writes in another way; the rest of a request is to be found in the container."""


class Shortfall(NamedTuple):
    """One thing that cannot be kept."""

    name: str
    """What a request's ``without`` calls it: ``kind`` or ``kind:which``."""
    words: str


@dataclass(frozen=True)
class Target:
    """Facts about the target: of ``docker info``, and of the host itself."""

    runtimes: Collection[str] = ()
    log_drivers: Collection[str] = ()
    security: Collection[str] = ()
    """Names of security features in force: ``seccomp``, ``apparmor``, ``selinux``, ``cgroupns``."""
    abilities: Collection[str] = ()
    """Kinds of limits that the kernel and Docker enforce, as ``docker info`` calls them."""
    cpus: int = 0
    """0 when unknown."""
    cgroup_driver: str = ""
    path_exists: Callable[[str], bool] = lambda _path: True
    has_program: Callable[[str], bool] = lambda _name: True
    apparmor_profiles: Collection[str] | None = None
    """Those that are loaded; None when they cannot be read."""


def apparmor_problem(security: Collection[str], *, has_parser: bool) -> str:
    """Why Docker here can start no container that it would confine by its default profile, in words; empty when it can.

    A Debian without recommended packages is such a host: its kernel has AppArmor, and nothing there loads a profile.
    """
    if "apparmor" not in security or has_parser:
        return ""
    return (
        "Docker confines containers by AppArmor here and cannot load their profile, so it starts none: "
        "the command apparmor_parser is missing"
    )


def shortfalls(spec: ContainerSpec, target: Target) -> list[Shortfall]:
    """Everything of ``spec`` that ``target`` cannot keep; empty when nothing was found.

    Raises PermanentError when the specification, which another host wrote, has a wrong type where it matters.
    """
    host = spec.host_config
    view(HostConfigView, host, "the container")
    found: list[Shortfall] = []
    for part in (_runtime, _devices, _gpus, _log_driver, _security, _limits, _processors, _kernel):
        found += part(spec, host, target)
    return list(dict.fromkeys(found))


def refusals(found: Sequence[Shortfall]) -> list[str]:
    """Reasons to refuse, each with the name by which a request can consent."""
    return [
        f'{words}; to move the container without it, put "{name}" into the request\'s "without"'
        for name, words in found
    ]


# --- what is asked of the target ---------------------------------------------------------------------


def _runtime(_spec: ContainerSpec, host: Mapping[str, Any], target: Target) -> Iterator[Shortfall]:
    runtime = host.get("Runtime")
    if runtime and runtime not in target.runtimes:
        yield Shortfall(f"runtime:{runtime}", f"the target's Docker has no runtime {runtime!r}")
    if host.get("Init") and not target.has_program("docker-init"):
        yield Shortfall("init", "the target has no docker-init program, which --init takes")


def _devices(spec: ContainerSpec, host: Mapping[str, Any], target: Target) -> Iterator[Shortfall]:
    for path in spec.device_paths:
        if not target.path_exists(path):
            yield Shortfall(f"device:{path}", f"the target has no device {path!r}")
    for name in BLKIO_LISTS:
        for entry in _objects(host.get(name)):
            path = str(entry.get("Path") or "")
            if path and not target.path_exists(path):
                yield Shortfall(
                    f"blkio:{path}", f"the target has no disk {path!r}, whose use by the container is limited"
                )


def _gpus(_spec: ContainerSpec, host: Mapping[str, Any], target: Target) -> Iterator[Shortfall]:
    for request in _objects(host.get("DeviceRequests")):
        driver = str(request.get("Driver") or "")
        if driver not in GPU_DRIVERS:
            words = f"the container asks for devices of the driver {driver!r}, of which nothing is known on the target"
        elif not target.has_program("nvidia-container-runtime-hook"):
            words = "the container asks for GPUs (--gpus), and the target has no NVIDIA container runtime hook"
        elif request.get("DeviceIDs"):
            words = "the container asks for certain GPUs by their ids, which are other ones on the target"
        else:
            continue
        yield Shortfall("gpu", words)


def _log_driver(_spec: ContainerSpec, host: Mapping[str, Any], target: Target) -> Iterator[Shortfall]:
    wanted = _object(host.get("LogConfig"))
    driver = str(wanted.get("Type") or "")
    if not driver:
        return
    if driver != "none" and target.log_drivers and driver not in target.log_drivers:
        yield Shortfall(f"log-driver:{driver}", f"the target's Docker has no log driver {driver!r}")
    elif driver == "journald" and not target.path_exists("/run/systemd/journal/socket"):
        yield Shortfall("log-driver:journald", "the target has no journal, which the log driver 'journald' takes")
    elif driver == "syslog" and not (
        _object(wanted.get("Config")).get("syslog-address") or target.path_exists("/dev/log")
    ):
        yield Shortfall("log-driver:syslog", "the target has no /dev/log, which the log driver 'syslog' takes")


def _security(spec: ContainerSpec, host: Mapping[str, Any], target: Target) -> Iterator[Shortfall]:
    for option in host.get("SecurityOpt") or ():
        kind, _, value = str(option).replace(":", "=", 1).partition("=")
        if kind == "apparmor" and value != "unconfined":
            if "apparmor" not in target.security:
                words = f"the target does not enforce AppArmor, and the container has the profile {value!r}"
            elif target.apparmor_profiles is not None and value not in target.apparmor_profiles:
                words = f"the AppArmor profile {value!r} is not loaded on the target"
            else:
                continue
            yield Shortfall(f"apparmor:{value}", words)
        if kind == "seccomp" and value != "unconfined" and "seccomp" not in target.security:
            yield Shortfall("seccomp", "the target's Docker has no seccomp, and the container has a profile of its own")
    if spec.process_label and "selinux" not in target.security:
        yield Shortfall("selinux", "the target does not enforce SELinux, and the container has a label there")
    if host.get("CgroupnsMode") == "private" and "cgroupns" not in target.security:
        yield Shortfall("cgroupns", "the target has no cgroup namespaces, and the container has one of its own")


def _limits(_spec: ContainerSpec, host: Mapping[str, Any], target: Target) -> Iterator[Shortfall]:
    for option, ability in LIMITS.items():
        value = host.get(option)
        if value not in (None, False, 0, -1, "") and ability not in target.abilities:
            yield Shortfall(f"limit:{option}", f"the target's kernel or Docker does not enforce {option} ({value})")
    swap, memory = host.get("MemorySwap") or 0, host.get("Memory") or 0
    # Docker itself writes twice the memory where nobody asked for a limit of the swap.
    if swap not in (0, -1, 2 * memory) and "SwapLimit" not in target.abilities:
        yield Shortfall("limit:MemorySwap", f"the target's kernel does not limit swap (MemorySwap {swap})")


def _processors(_spec: ContainerSpec, host: Mapping[str, Any], target: Target) -> Iterator[Shortfall]:
    if not target.cpus:
        return
    wanted = (host.get("NanoCpus") or 0) / NANO_CPUS
    if wanted > target.cpus:
        yield Shortfall("limit:NanoCpus", f"the container may use {wanted:g} CPUs, the target has {target.cpus}")
    highest = _highest(str(host.get("CpusetCpus") or ""))
    if highest is not None and highest >= target.cpus:
        yield Shortfall(
            "limit:CpusetCpus", f"the container is bound to the CPUs {host['CpusetCpus']}, the target has {target.cpus}"
        )


def _kernel(_spec: ContainerSpec, host: Mapping[str, Any], target: Target) -> Iterator[Shortfall]:
    for name in sorted(_object(host.get("Sysctls"))):
        path = "/proc/sys/" + name.replace(".", "/")
        if ".." not in name and not target.path_exists(path):
            yield Shortfall(f"sysctl:{name}", f"the target's kernel has no sysctl {name!r}")
    parent = str(host.get("CgroupParent") or "")
    if parent and target.cgroup_driver:
        systemd = target.cgroup_driver == "systemd"
        if systemd != parent.endswith(".slice"):
            yield Shortfall(
                "cgroup-parent",
                f"the container's cgroup parent {parent!r} is none for the cgroup driver {target.cgroup_driver!r} there",
            )


# --- what Docker dropped -----------------------------------------------------------------------------


def dropped(body: Mapping[str, Any], inspected: Mapping[str, Any]) -> list[Shortfall]:
    """What was asked for in the create request ``body`` and is not in the created container.

    Docker drops options that it does not know (an older engine) and limits that it cannot enforce; the answer to the
    request has at most a warning. Only options that ask for something are compared.
    """
    asked_host = _object(body.get("HostConfig"))
    asked = {name: value for name, value in body.items() if name not in ("HostConfig", "NetworkingConfig")}
    missing = [
        *_missing("HostConfig", asked_host, _object(inspected.get("HostConfig"))),
        *_missing("Config", asked, _object(inspected.get("Config"))),
    ]
    return [
        Shortfall(f"option:{path}", f"the target's Docker did not take the option {path} as it was asked for")
        for path in missing
    ]


def _missing(section: str, asked: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for name, value in sorted(asked.items()):
        path = f"{section}.{name}"
        if path not in NOT_COMPARED and not _nothing(value) and not _contained(value, found.get(name)):
            yield path


def _nothing(value: Any) -> bool:
    """Whether a value asks for nothing: zeros, empty texts, and lists or objects of those."""
    if isinstance(value, dict):
        return all(map(_nothing, value.values())) and not value
    if isinstance(value, list | tuple):
        return all(map(_nothing, value))
    return value in (None, 0, -1, "", False)


def _contained(asked: Any, found: Any) -> bool:
    """Whether everything that is asked for is there; Docker may add to it."""
    if isinstance(asked, dict):
        have = found if isinstance(found, dict) else {}
        return all(_nothing(value) or _contained(value, have.get(key)) for key, value in asked.items()) and all(
            key in have for key in asked
        )
    if isinstance(asked, list | tuple):
        have_list = list(found) if isinstance(found, list | tuple) else []
        if len(have_list) < len(asked):
            return False
        if all(isinstance(item, str) for item in (*asked, *have_list)):
            return set(asked) <= set(have_list)
        return all(_contained(one, other) for one, other in zip(asked, have_list, strict=False))
    return bool(asked == found)


# --- leaving it out ----------------------------------------------------------------------------------


def stripped(spec: ContainerSpec, without: Collection[str]) -> ContainerSpec:
    """``spec`` without everything that ``without`` names; names that mean nothing in it change nothing."""
    config, host = dict(spec.config), dict(spec.host_config)
    for name in without:
        kind, _, which = name.partition(":")
        leave = _LEAVE_OUT.get(kind)
        if leave is not None:
            leave(config, host, which)
    return msgspec.structs.replace(spec, config=config, host_config=host)


def known_name(name: str) -> bool:
    """Whether ``name`` can be consented to at all, whatever the container."""
    kind, colon, which = name.partition(":")
    return kind in _LEAVE_OUT and bool(colon and which) == (kind in _WITH_WHICH)


_Parts = dict[str, Any]


def _without_runtime(_config: _Parts, host: _Parts, which: str) -> None:
    if host.get("Runtime") == which:
        host["Runtime"] = ""


def _without_device(_config: _Parts, host: _Parts, which: str) -> None:
    host["Devices"] = [entry for entry in _objects(host.get("Devices")) if entry.get("PathOnHost") != which]


def _without_blkio(_config: _Parts, host: _Parts, which: str) -> None:
    for name in BLKIO_LISTS:
        if host.get(name):
            host[name] = [entry for entry in _objects(host[name]) if entry.get("Path") != which]


def _without_log_driver(_config: _Parts, host: _Parts, which: str) -> None:
    if _object(host.get("LogConfig")).get("Type") == which:
        host["LogConfig"] = {"Type": "", "Config": {}}


def _without_security(kind: str) -> Callable[[_Parts, _Parts, str], None]:
    def leave(_config: _Parts, host: _Parts, which: str) -> None:
        options = [str(option) for option in host.get("SecurityOpt") or ()]
        host["SecurityOpt"] = [
            option
            for option in options
            if option.replace(":", "=", 1).partition("=")[0] != kind or (which and not option.endswith(which))
        ]

    return leave


def _without_sysctl(_config: _Parts, host: _Parts, which: str) -> None:
    host["Sysctls"] = {name: value for name, value in _object(host.get("Sysctls")).items() if name != which}


def _without_option(config: _Parts, host: _Parts, which: str) -> None:
    section, _, name = which.partition(".")
    {"HostConfig": host, "Config": config}.get(section, {}).pop(name, None)


def _without(option: str) -> Callable[[_Parts, _Parts, str], None]:
    def leave(_config: _Parts, host: _Parts, _which: str) -> None:
        host.pop(option, None)

    return leave


def _without_limit(_config: _Parts, host: _Parts, which: str) -> None:
    if which in LIMITS or which == "MemorySwap":
        host.pop(which, None)


_LEAVE_OUT: dict[str, Callable[[_Parts, _Parts, str], None]] = {
    "runtime": _without_runtime,
    "device": _without_device,
    "blkio": _without_blkio,
    "log-driver": _without_log_driver,
    "apparmor": _without_security("apparmor"),
    "sysctl": _without_sysctl,
    "limit": _without_limit,
    "option": _without_option,
    "seccomp": _without_security("seccomp"),
    "selinux": _without_security("label"),
    "gpu": _without("DeviceRequests"),
    "init": _without("Init"),
    PRIVILEGED: _without("Privileged"),
    "cgroupns": _without("CgroupnsMode"),
    "cgroup-parent": _without("CgroupParent"),
}
"""The kinds of names, and how each is left out of the container's configuration."""
_WITH_WHICH = frozenset({"runtime", "device", "blkio", "log-driver", "apparmor", "sysctl", "limit", "option"})


def _highest(cpus: str) -> int | None:
    """The highest number in a list such as ``0-2,7``; None for what is none."""
    numbers = [part for piece in cpus.split(",") for part in piece.split("-")]
    if not all(part.strip().isascii() and part.strip().isdigit() and len(part) < MAX_DIGITS for part in numbers):
        return None
    return max(int(part) for part in numbers)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list | tuple) else []

"""One image, as the stores of different engines describe it. The samples are of Docker 20.10.24 and 26.1.5."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from hostd.image_identity import identity_of, is_same

CLASSIC: dict[str, Any] = {
    "Id": "sha256:d0859e8db870770840e833ff7e44371a9690bba7dbeaf9b9dd694eeff8c27d9b",
    "RepoTags": ["rich:1"],
    "RepoDigests": [],
    "Created": "2026-01-02T03:04:05.846924993Z",
    "DockerVersion": "20.10.24+dfsg1",
    "Author": "me",
    "Config": {
        "Hostname": "d9bc48be49b9",
        "Domainname": "",
        "User": "5",
        "AttachStdin": False,
        "AttachStdout": True,
        "AttachStderr": True,
        "ExposedPorts": {"80/tcp": {}},
        "Tty": False,
        "Env": ["PATH=/bin", "A=b"],
        "Cmd": ["-c", "sleep 9"],
        "Healthcheck": {"Test": ["CMD-SHELL", "true"], "Interval": 5000000000},
        "Image": "cargo-lab/busybox:961df666e82c386b",
        "Volumes": {"/v": {}},
        "WorkingDir": "/w",
        "Entrypoint": ["sh"],
        "OnBuild": None,
        "Labels": {"x": "y"},
        "StopSignal": "SIGINT",
    },
    "Architecture": "amd64",
    "Os": "linux",
    "Size": 1984295,
    "GraphDriver": {"Data": {"UpperDir": "/var/lib/docker/overlay2/2f2b/diff"}, "Name": "overlay2"},
    "RootFS": {"Type": "layers", "Layers": ["sha256:b02e", "sha256:0b37"]},
}
CONTAINERD: dict[str, Any] = {
    **CLASSIC,
    "Id": "sha256:ca886fb887dfa1d6e2529cdfb3b6ddacf41079fdeea7a7a2d33706c7d58df2f8",
    "RepoDigests": ["rich@sha256:ca886fb887dfa1d6e2529cdfb3b6ddacf41079fdeea7a7a2d33706c7d58df2f8"],
    "DockerVersion": "26.1.5+dfsg1",
    "Config": {**CLASSIC["Config"], "Hostname": "", "Image": "", "AttachStdout": False, "AttachStderr": False},
    "Size": 1069482,
    "GraphDriver": {"Data": None, "Name": "overlayfs"},
}


def test_both_kinds_of_store_describe_the_same_image() -> None:
    """F11"""
    assert is_same(CONTAINERD, CLASSIC["Id"], identity_of(CLASSIC))
    assert is_same(CLASSIC, CONTAINERD["Id"], identity_of(CONTAINERD))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("Created",), "2026-01-02T03:04:06Z"),
        (("Architecture",), "arm64"),
        (("Variant",), "v8"),
        (("Os",), "windows"),
        (("Author",), ""),
        (("RootFS", "Layers"), ["sha256:b02e"]),
        (("RootFS", "Layers"), ["sha256:0b37", "sha256:b02e"]),
        (("Config", "Env"), ["PATH=/bin"]),
        (("Config", "Cmd"), None),
        (("Config", "Volumes"), {}),
        (("Config", "User"), "root"),
        (("Config", "Healthcheck"), None),
        (("Config", "StopSignal"), "SIGTERM"),
        (("Config", "OnBuild"), ["RUN true"]),
    ],
)
def test_another_image_is_not_taken_for_it(path: tuple[str, ...], value: Any) -> None:
    other = copy.deepcopy(CONTAINERD)
    place = other
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert not is_same(other, CLASSIC["Id"], identity_of(CLASSIC))


def test_what_is_not_set_may_be_written_in_any_way() -> None:
    bare = copy.deepcopy(CLASSIC)
    bare["Config"] |= {"Labels": None, "OnBuild": [], "Shell": None, "Volumes": {}}
    bare["Created"] = "0001-01-01T00:00:00Z"
    other = copy.deepcopy(CONTAINERD)
    for name in ("Labels", "OnBuild", "Volumes"):
        del other["Config"][name]
    other["Created"] = ""
    assert is_same(other, bare["Id"], identity_of(bare))


def test_the_same_id_is_the_same_image_and_without_an_identity_only_the_id_counts() -> None:
    assert is_same(CLASSIC, CLASSIC["Id"], {})
    assert not is_same(CONTAINERD, CLASSIC["Id"], {})


@pytest.mark.parametrize("raw", [{}, {"Config": None, "RootFS": None}, {"Config": [], "RootFS": "x", "Id": 3}])
def test_a_description_of_another_form_is_simply_another_image(raw: dict[str, Any]) -> None:
    assert not is_same(raw, CLASSIC["Id"], identity_of(CLASSIC))

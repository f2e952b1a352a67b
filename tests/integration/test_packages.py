"""The Debian packages and the wheel, as an operator meets them: built, installed, upgraded, removed, purged.

The ordinary run installs into a tree made of this machine's own (Debian 12, with everything that scripts/setup
installs); the long one into fresh trees of Debian 12 and 13, where the packages' own dependencies have to do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from debkit.__main__ import UNITS, debian_version
from debkit.__main__ import main as build_deb
from debkit.site import PYTHONS, wheel_of
from labkit import roots
from labkit.spec import REPOSITORY
from labkit.waiting import wait_until
from tests.support.package_tree import PackageTree, package_tree

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

NAMES = ("cargo-common", "cargo-coordinator", "cargo-hostd")
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
OLDER = "0.0.1"
EXPOSURE = {"cargo-coordinator": 15, "cargo-hostd": 74, "cargo-hostd-mounts": 74}
"""Tenths of what `systemd-analyze security` calls the exposure, at most."""
RUNS = """
import importlib, pkgutil, sys
import coordinator, events, hostd
for package in (coordinator, events, hostd):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
import cryptography, google, grpc, msgspec
for module in (coordinator, events, hostd, cryptography, grpc, msgspec):
    assert module.__file__.startswith("/usr/lib/cargo/"), module.__file__
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as scripts/build-deb makes them."""
    output = tmp_path_factory.mktemp("packages")
    assert build_deb(["--quick", "--output", str(output)]) == 0
    assert sorted(package.name.split("_")[0] for package in output.glob("*.deb")) == list(NAMES)
    older = output / "older"
    older.mkdir()
    for package in output.glob("*.deb"):
        repack(package, older)
    return output


def repack(package: Path, output: Path) -> None:
    """The same package with a lower version, and a configuration that says so."""
    content = output / "content"
    subprocess.run(["dpkg-deb", "-R", str(package), str(content)], check=True)
    control = content / "DEBIAN" / "control"
    control.write_text(control.read_text().replace(debian_version(VERSION), OLDER))
    for config in content.glob("etc/cargo/*.cfg"):
        config.write_text(config.read_text() + "\n# as an older version shipped it\n")
    name = package.name.replace(debian_version(VERSION), OLDER)
    subprocess.run(["dpkg-deb", "-Znone", "-b", str(content), str(output / name)], check=True, capture_output=True)
    shutil.rmtree(content)


@pytest.fixture(
    scope="module",
    params=["this machine", *(pytest.param(name, marks=pytest.mark.long) for name in roots.PLAIN_RECIPES)],
)
def tree(request: pytest.FixtureRequest, packages: Path) -> Iterator[PackageTree]:
    """A tree in which nothing of Cargo is installed."""
    lower = Path("/") if request.param == "this machine" else roots.plain_tree(request.param)
    with package_tree(lower, packages) as made:
        yield made


def install(tree: PackageTree, directory: str = "/run/packages") -> None:
    tree.run("sh", "-c", f"exec dpkg --install --force-confold {directory}/*.deb")


# --- what is built -------------------------------------------------------------------------------------


def test_lintian_has_nothing_to_say_that_is_not_explained(packages: Path) -> None:
    """Every override stands below a comment that gives its reason."""
    levels = "error,warning,info,pedantic"
    line = ["lintian", "--allow-root", "--fail-on", levels, *map(str, packages.glob("*.deb"))]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for overrides in (REPOSITORY / "packaging" / "debian").glob("*.lintian-overrides"):
        before = "x"
        for written in overrides.read_text().splitlines():
            assert written.startswith("#") or before.startswith("#"), f"{overrides.name}: no reason for {written}"
            before = written


def test_the_packages_have_the_projects_version_and_the_pythons_they_say(packages: Path) -> None:
    for package in packages.glob("*.deb"):
        said = subprocess.run(["dpkg-deb", "-f", str(package), "Version"], capture_output=True, text=True, check=True)
        assert said.stdout.strip() == debian_version(VERSION)
    rules = (REPOSITORY / "packaging/debian/rules").read_text()
    assert f"for version in {' '.join(PYTHONS)};" in rules
    assert (debian_version("1.2.0rc1"), debian_version("1.2.0.dev3")) == ("1.2.0~rc1", "1.2.0~dev3")


# --- their life in a tree --------------------------------------------------------------------------------


def test_they_install_upgrade_and_go_without_leaving_anything(tree: PackageTree) -> None:
    install(tree, "/run/packages/older")
    said = tree.run("dpkg-query", "-W", "-f", "${Version} ${db:Status-Status}\n", *NAMES).stdout
    assert said == f"{OLDER} installed\n" * 3
    config = tree.root / "etc/cargo/hostd.cfg"
    mine = "[host]\nname = alpha\naddress = 127.0.0.1\n[etcd]\nendpoints = 127.0.0.1:1\n"
    config.write_text(mine)

    install(tree)
    assert config.read_text() == mine, "the operator's configuration stays"
    assert "older version" not in (tree.root / "etc/cargo/coordinator.cfg").read_text(), (
        "what nobody changed is renewed"
    )
    check_commands(tree)
    check_services(tree)
    assert tree.run("id", "-gn", "cargo-coordinator").stdout == "cargo-coordinator\n", "as the unit says"

    # What an agent that ran would have left: records, keys, and code compiled by a Python of a later upgrade.
    tree.run("install", "-D", "/dev/null", "/var/lib/cargo/migrations/web-7/created")
    tree.run("install", "-D", "/dev/null", "/etc/cargo/ssh/id_ed25519")
    tree.run("install", "-D", "/dev/null", "/etc/cargo/trust/signing.key")
    tree.run("install", "-D", "/dev/null", "/etc/cargo/coordinator/coordinator-c1.key")
    tree.run("install", "-D", "/dev/null", "/var/lib/cargo-coordinator/etcd/member")
    tree.run("install", "-D", "/dev/null", "/usr/lib/cargo/lib/site-packages/hostd/__pycache__/main.cpython-399.pyc")

    tree.run("dpkg", "--remove", *NAMES)
    assert not (tree.root / "usr/bin/cargo-hostd").exists()
    assert not (tree.root / "usr/lib/cargo").exists()
    assert config.read_text() == mine, "removing is not purging"
    assert (tree.root / "var/lib/cargo/migrations/web-7").exists()
    tree.run("dpkg", "--purge", *NAMES)
    assert "cargo" not in (tree.root / "etc/passwd").read_text()
    assert tree.added() - BACKUPS == set()


BACKUPS = {f"/etc/{name}{end}" for name in ("passwd", "group", "shadow", "gshadow") for end in ("-", "")} | {
    "/etc/.pwd.lock",
    "/var/lib/systemd/deb-systemd-helper-enabled",
    "/var/lib/systemd/deb-systemd-helper-masked",
}
"""Of the tools that keep users and services: they are there after any package that has one."""


def check_commands(tree: PackageTree) -> None:
    """Installed and configured, not started: every command runs, on this Python, and on nothing but its own libraries."""
    for name in ("cargo-coordinator", "cargo-hostd"):
        assert tree.run(name, "--version").stdout == f"{name} {VERSION}\n"
    for name in ("cargoctl", "cargo-hostd-runtime"):
        assert "usage" in tree.run(name, "--help").stdout
    tree.run("/usr/lib/cargo/bin/python3", "-I", "-W", "ignore", "-c", RUNS)
    said = tree.run("cargo-hostd", "check", "--json", "-c", "/etc/cargo/hostd.cfg", check=False)
    assert said.returncode == 1, said.stderr
    told = {finding["about"]: finding for finding in json.loads(said.stdout)["findings"]}
    assert told["docker"]["level"] == "problem", "none runs here"
    assert told["rsync"]["level"] == told["sshfs"]["level"] == "ok", "the package's dependencies have them"
    assert told["etcd"]["level"] == "problem"
    said = tree.run("cargo-coordinator", "check", "-c", "/etc/cargo/coordinator.cfg", check=False)
    assert "Traceback" not in said.stderr
    assert said.returncode in (0, 1)
    for name in ("hostd", "coordinator"):
        sample = f"/usr/share/doc/cargo-{name}/examples/{name}.cfg"
        said = tree.run(f"cargo-{name}", "check", "-c", sample, "--json", check=False)
        assert "mistakes" not in said.stderr, f"{sample} has options that this version does not know"


def check_services(tree: PackageTree) -> None:
    """systemd understands the units, the order is what it has to be, and confinement does not get lost."""
    for unit in UNITS:
        done = tree.run("systemd-analyze", "verify", "--man=no", f"/lib/systemd/system/{unit}", check=False)
        mine = [line for line in (done.stdout + done.stderr).splitlines() if "cargo" in line]
        assert mine == [], mine
    for name, most in EXPOSURE.items():
        line = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={most}"]
        done = tree.run(*line, f"/lib/systemd/system/{name}.service", check=False)
        assert done.returncode == 0, done.stdout[-300:] + done.stderr
    wanted = tree.root / "etc/systemd/system"
    assert (wanted / "docker.service.wants/cargo-hostd-mounts.service").is_symlink()
    assert not list(wanted.glob("multi-user.target.wants/cargo-*")), "an agent has to be configured first"


def test_a_host_with_containers_on_unions_keeps_its_agent(packages: Path) -> None:
    """The agent is not removed from under data that only it looks after; the refusal names the place."""
    with package_tree(Path("/"), packages) as tree:
        install(tree)
        tree.run("mkdir", "/tmp/l", "/tmp/u", "/tmp/w", "/srv/web data")
        options = "lowerdir=/tmp/l,upperdir=/tmp/u,workdir=/tmp/w"
        tree.run("mount", "-t", "overlay", "cargo-union-0123", "/srv/web data", "-o", options)
        refused = tree.run("dpkg", "--remove", "cargo-hostd", check=False)
        assert refused.returncode != 0
        assert "/srv/web" in refused.stderr
        assert "cargoctl finalise" in refused.stderr
        assert (tree.root / "usr/bin/cargo-hostd").exists()
        assert tree.run("cargo-hostd", "--version").stdout
        tree.run("umount", "/srv/web data")
        tree.run("dpkg", "--remove", "cargo-hostd")


ETCD = "set -a; . /etc/default/etcd; exec setpriv --reuid=etcd --regid=etcd --clear-groups etcd"
"""As its unit starts it."""
ETCDCTL = (
    "ETCDCTL_API=3 etcdctl --endpoints https://10.0.0.1:2379 --cacert /etc/cargo/fleet/ca.crt "
    "--cert /etc/cargo/fleet/operator.crt --key /etc/cargo/fleet/operator.key"
)


def guides_blocks() -> list[str]:
    """The operator's guide's commands, in its order."""
    text = (REPOSITORY / "docs/operators-guide.md").read_text()
    return re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


class Reader:
    """Does what the guide says, block by block, and what a service manager and a person would do in between."""

    def __init__(self, tree: PackageTree) -> None:
        self.tree = tree
        self.joining: subprocess.Popen[str] | None = None
        self.shown = ""
        self.certificate = b""

    def do(self, block: str) -> None:
        script = re.sub(r"systemctl (reload|restart) \w+", "true", block.replace("enable --now", "enable")).rstrip()
        if "fleet approve" in block:
            script += f" --fingerprint {self.shown}"
        line = ("sh", "-ec", f"cd /run/packages\n{script}".replace("alpha.token", "/tmp/alpha.token"))
        if "cargo-hostd join" in block:
            self.joining = self.tree.start(*line)
            assert self.joining.stdout is not None
            assert "asks to join" in self.joining.stdout.readline()
            self.shown = self.joining.stdout.readline().strip()
            return
        done = self.tree.run(*line, check=False)
        said = f"{block}{done.stdout}{done.stderr}"
        assert done.returncode in ((0, 1) if "cargo-hostd check" in block else (0,)), said
        self.go_on(block, done.stdout)

    def go_on(self, block: str, said: str) -> None:
        """What is to be seen after the block, or has to be waited for."""
        if "restart etcd" in block:
            self.restart_etcd()
        elif "cargo-coordinator check" in block:
            assert said.endswith("coordinator c1: ready\n"), said
        elif "--now cargo-coordinator" in block:
            command = "exec runuser -u cargo-coordinator -- cargo-coordinator -c /etc/cargo/coordinator.cfg"
            self.tree.start("sh", "-c", command, quiet=True)
        elif "sshd_config.d" in block:
            check_sshd(self.tree)
        elif "fleet approve" in block:
            assert self.joining is not None
            assert "alpha is a member" in self.joining.communicate(timeout=60)[0]
        elif "cargo-hostd check" in block:
            check_host_of_the_fleet(said)
        elif "--now cargo-hostd" in block:
            self.tree.start("cargo-hostd", "-c", "/etc/cargo/hostd.cfg", quiet=True)
            wait_until(self.asks_for_a_certificate, "the agent does not ask for its next certificate", 60)
            self.certificate = self.certificate_of_alpha()
        elif "fleet renew alpha" in block:
            wait_until(lambda: self.certificate_of_alpha() != self.certificate, "alpha does not fetch it", 60)

    def restart_etcd(self) -> None:
        """As its unit does, which is of the type notify: the former one has ended, and the new one answers."""
        self.tree.run("pkill", "-x", "etcd", check=False)
        wait_until(lambda: not self.succeeds("pgrep", "-x", "etcd"), "etcd does not end", 60)
        self.tree.start("sh", "-c", ETCD, quiet=True)
        wait_until(lambda: self.succeeds("bash", "-c", "exec 3<>/dev/tcp/10.0.0.1/2379"), "etcd does not answer", 60)

    def succeeds(self, *line: str) -> bool:
        return self.tree.run(*line, check=False).returncode == 0

    def asks_for_a_certificate(self) -> bool:
        return "alpha" in self.tree.run("sh", "-c", f"{ETCDCTL} get --keys-only /cargo/join/alpha/renewal").stdout

    def certificate_of_alpha(self) -> bytes:
        return (self.tree.root / "etc/cargo/trust/etcd.crt").read_bytes()


def test_the_guides_commands_make_a_fleet_and_upgrade(packages: Path) -> None:
    """Every command of the operator's guide, in its order, one machine playing all; etcd, coordinator and agent are real.

    No service manager runs there: the test starts what the guide enables. Of the person only the answer is given: the fingerprint
    as the host has shown it.
    """
    blocks = guides_blocks()
    assert len(blocks) > 20
    with package_tree(Path("/"), packages, ("10.0.0.1", "10.0.0.11")) as tree:
        reader = Reader(tree)
        for block in blocks:
            reader.do(block)
        wanted = tree.root / "etc/systemd/system/multi-user.target.wants"
        assert {unit.name for unit in wanted.glob("cargo-*")} == {"cargo-hostd.service", "cargo-coordinator.service"}
        for private in (*(tree.root / "etc/cargo").rglob("*.key"), tree.root / "etc/cargo/ssh/id_ed25519"):
            assert not private.stat().st_mode & 0o007, f"{private} is everybody's"


def check_host_of_the_fleet(said: str) -> None:
    """What is missing is a Docker and an sshd, which do not run in the tree, and nothing of what joining gives."""
    assert said.splitlines()[-1].startswith("host alpha: ")
    assert "may write /cargo/hosts/alpha" in said
    problems = set(re.findall(r"^ +PROBLEM ([\w-]+):", said, re.MULTILINE))
    assert problems <= {"docker", "sshd", "space", "dev-fuse"}, said


def check_sshd(tree: PackageTree) -> None:
    """sshd takes it as it is meant: for root, and for nobody else."""
    tree.run("mkdir", "-p", "/run/sshd")
    said = [tree.run("sshd", "-T", "-C", f"user={user},host=h,addr=10.0.0.12").stdout for user in ("root", "daemon")]
    assert "permitrootlogin forced-commands-only\n" in said[0]
    assert "/etc/cargo/ssh/authorized_keys\n" in said[0]
    assert "/etc/cargo/ssh/authorized_keys" not in said[1]


# --- units, as text --------------------------------------------------------------------------------------


def options_of(unit: str) -> dict[str, list[str]]:
    """Every option of a unit, with its values in order."""
    found: dict[str, list[str]] = {}
    for line in (REPOSITORY / "packaging" / "systemd" / unit).read_text().splitlines():
        if match := re.fullmatch(r"(\w+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def test_the_units_that_mount_have_no_mount_namespace_of_their_own() -> None:
    """O13: each of these options would hide the mounts from Docker, whatever else is said."""
    hiding = re.compile(
        r"Protect(System|Home|Proc|KernelTunables|KernelModules|KernelLogs|ControlGroups|Hostname)|Private\w+|ProcSubset"
        r"|(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec)Paths|(Bind|BindReadOnly)Paths|TemporaryFileSystem|DynamicUser"
        r"|RootDirectory|RootImage|MountFlags|MountAPIVFS|MountImages|ExtensionImages"
    )
    for unit in ("cargo-hostd.service", "cargo-hostd-mounts.service"):
        assert [option for option in options_of(unit) if hiding.fullmatch(option)] == []


def test_mounts_come_before_docker_and_the_agent_outlives_what_it_serves() -> None:
    """A6, A11, A12: order of the boot; what serves a container's data survives the agent; Docker's restart does not end it."""
    first, agent = options_of("cargo-hostd-mounts.service"), options_of("cargo-hostd.service")
    assert "docker.service" in first["Before"][0].split()
    assert first["WantedBy"] == ["docker.service"]
    assert first["TimeoutStartSec"] == ["15min"], "after it Docker starts containers on what is not mounted"
    assert {"cargo-hostd-mounts.service", "docker.service"} <= set(agent["After"][0].split())
    assert agent["KillMode"] == first["KillMode"] == ["process"]
    assert agent["Restart"] == ["always"]
    assert not {"Requires", "BindsTo", "PartOf"} & agent.keys()


# --- the wheel ---------------------------------------------------------------------------------------------


def test_the_wheel_holds_everything_and_its_commands_run(tmp_path: Path) -> None:
    wheel = wheel_of(REPOSITORY, tmp_path / "source", tmp_path / "wheels")
    assert f"-{VERSION}-py3-none-any" in wheel.name
    place = tmp_path / "place"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--target", str(place), str(wheel)], check=True)
    for package in ("events", "coordinator", "hostd"):
        tracked = {path.relative_to(REPOSITORY) for path in (REPOSITORY / package).rglob("*.py")}
        assert {path for path in tracked if not (place / path).exists()} == set(), "left out of pyproject's packages"
    assert (place / "hostd/runtime/cargo-runc").exists()
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    environment = {**os.environ, "PYTHONPATH": f"{place}:{libraries}"}
    for name in ("cargo-coordinator", "cargo-hostd"):
        said = subprocess.run(
            [str(place / "bin" / name), "--version"], capture_output=True, text=True, check=True, env=environment
        )
        assert said.stdout == f"{name} {VERSION}\n"


@pytest.mark.long
def test_pip_installs_the_wheel_with_all_it_needs_into_a_new_environment(tmp_path: Path) -> None:
    wheel = wheel_of(REPOSITORY, tmp_path / "source", tmp_path / "wheels")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "--quiet", "install", str(wheel)], check=True)
    for name in ("cargo-coordinator", "cargo-hostd"):
        said = subprocess.run([str(python.with_name(name)), "--version"], capture_output=True, text=True, check=True)
        assert said.stdout == f"{name} {VERSION}\n"

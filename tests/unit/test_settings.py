"""Configuration files: every mistake at once, in words; the samples are right."""

from pathlib import Path

import pytest

from coordinator import settings as coordinator_settings
from events.settings import SettingsError
from hostd import settings as host_settings

SAMPLES = Path(__file__).parents[2] / "docs" / "samples"
MINIMAL = "[host]\nname=alpha\naddress=10.0.0.1\n[etcd]\nendpoints=10.0.0.1:2379\n"


def write(directory: Path, text: str) -> Path:
    file = directory / "config.cfg"
    file.write_text(text)
    return file


def test_the_samples_load_and_explain_every_option() -> None:
    coordinator_settings.load(SAMPLES / "coordinator.cfg")
    host_settings.load(SAMPLES / "hostd.cfg")
    for module, name in ((coordinator_settings, "coordinator.cfg"), (host_settings, "hostd.cfg")):
        text = (SAMPLES / name).read_text()
        for section, options in module.KNOWN.items():
            assert f"[{section}]" in text
            for option in options:
                assert f"\n{option} =" in text, (name, section, option)


def test_a_minimal_file_is_enough_for_a_host(tmp_path: Path) -> None:
    loaded = host_settings.load(write(tmp_path, MINIMAL))
    assert loaded.state_dir == Path("/var/lib/cargo")
    assert loaded.ssh_port == 22


def test_an_empty_file_is_enough_for_a_coordinator(tmp_path: Path) -> None:
    assert coordinator_settings.load(write(tmp_path, "")).etcd.endpoints == ()


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no configuration file"):
        host_settings.load(tmp_path / "nothing.cfg")


def test_all_mistakes_of_a_host_file_are_listed_at_once(tmp_path: Path) -> None:
    text = "[host]\nname=-bad-\naddress=nowhere\ncolour=red\n[ssh]\nport=0\nidentity=relative\n[fun]\nx=1\n[log]\nlevel=loud\n"
    with pytest.raises(SettingsError) as caught:
        host_settings.load(write(tmp_path, text))
    words = str(caught.value)
    for part in ("name", "address", "colour", "port", "identity", "[fun]", "level", "endpoints"):
        assert part in words


@pytest.mark.parametrize("text", ["name=alpha", "[host", "\x00", "[host]\nname=a\nname=b\n"])
def test_what_is_no_ini_file_is_said_without_a_trace(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=r"cannot be read|mistakes"):
        host_settings.load(write(tmp_path, text))


def test_a_percent_sign_is_just_a_percent_sign(tmp_path: Path) -> None:
    loaded = coordinator_settings.load(write(tmp_path, "[coordinator]\ndata_dir=/var/100%/x\n"))
    assert loaded.data_dir == Path("/var/100%/x")

"""Stamps: unique, in UTC with milliseconds, and bound to one life of one process."""

from __future__ import annotations

import re

from events.stamp import Stamper, utc_now_text


def test_two_stamps_of_one_process_share_all_but_identity_and_time() -> None:
    stamper = Stamper("hostd/alpha")
    one, two = stamper.stamp(3), stamper.stamp(4)
    assert (one.by, one.boot, one.epoch, two.epoch) == ("hostd/alpha", two.boot, 3, 4)
    assert one.uuid != two.uuid


def test_another_life_has_another_boot_unless_it_is_given() -> None:
    assert Stamper("hostd/alpha").boot != Stamper("hostd/alpha").boot
    assert Stamper("hostd/alpha", boot="b").stamp(0).boot == "b"


def test_time_is_written_in_utc_with_milliseconds() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", utc_now_text())

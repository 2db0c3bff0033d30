"""Tests of records.py: records keep their form in the ledger, and what is not known is absent."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cogvideox.config.buckets import Bucket
from cogvideox.data.media.transforms import Fit
from cogvideox.data.records import FAILED, KILLED, OK, SHORT, ClipRecord, Cut, Source, Variant

CUT = Cut(Bucket(5, 32, 48), (Variant((0, 1, 2, 3, 4), Fit(32, 48, 0, 0, 32, 48, False), "pyav"),))
GOOD = ClipRecord("r", "a.mp4", OK, "", None, [9, 1], Source(17, 8.0, 64, 96, "h264"), 17, "c" * 64, (CUT,))
IMAGE = ClipRecord("i", "a.png", OK, "", None, [8, 2], Source(1, 1.0, 64, 96, "png", ("icc",)), None, "d" * 64)


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        (GOOD, {"stamp", "source", "available", "content", "cuts"}),
        (IMAGE, {"stamp", "source", "content", "cuts"}),
        (replace(GOOD, image=IMAGE), {"stamp", "source", "available", "content", "cuts", "image"}),
        (
            ClipRecord("r", "a.mp4", SHORT, "x", None, [9, 1], None, 0),
            {"reason", "stamp", "available"},
        ),
        (ClipRecord("r", "a.mp4", FAILED, "x", stamp=[]), {"reason", "stamp"}),
        (ClipRecord("r", "a.mp4", KILLED, "x", [9.0, 1024]), {"reason", "limits"}),
    ],
    ids=["clip", "image", "clip with image", "short", "failed", "killed"],
)
def test_records_are_restored_and_have_only_known_fields(record: ClipRecord, fields: set[str]) -> None:
    line = json.loads(json.dumps(record.to_json()))
    assert ClipRecord.from_json(line) == record
    assert set(line) == {"request", "path", "status"} | fields


def test_the_form_in_the_ledger_is_fixed() -> None:
    """Folders that older versions prepared have this form, and keys of the cache are hashes of variants."""
    fit = {"resize_height": 32, "resize_width": 48, "top": 0, "left": 0, "height": 32, "width": 48, "flip": False}
    variant = {"indices": [0, 1, 2, 3, 4], "fit": fit, "reader": "pyav"}
    assert json.loads(json.dumps(GOOD.to_json())) == {
        "request": "r",
        "path": "a.mp4",
        "status": "ok",
        "stamp": [9, 1],
        "source": {"frames": 17, "fps": 8.0, "height": 64, "width": 96, "codec": "h264"},
        "available": 17,
        "content": "c" * 64,
        "cuts": [{"bucket": {"frames": 5, "height": 32, "width": 48}, "variants": [variant]}],
    }
    assert IMAGE.to_json()["source"]["conversions"] == ("icc",)


@pytest.mark.parametrize(
    "change", [{"status": "odd"}, {"status": FAILED}, {"cuts": None}, {"cuts": [{}]}, {"source": {"frames": 1}}]
)
def test_malformed_lines_are_not_restored(change: dict[str, Any]) -> None:
    assert ClipRecord.from_json(GOOD.to_json() | change) is None
    assert ClipRecord.from_json({}) is None

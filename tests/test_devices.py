"""Device strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_llm.devices import MAX_ENTRIES, DeviceEntry, parse_devices
from furiosa_llm.errors import DeviceError


@pytest.mark.parametrize(
    ("spec", "entries"),
    [
        pytest.param("npu:0", [DeviceEntry(0)], id="card"),
        pytest.param("npu:3:*", [DeviceEntry(3)], id="star is the card"),
        pytest.param("npu:0:5", [DeviceEntry(0, 5, 5)], id="one PE"),
        pytest.param("npu:0:4-7", [DeviceEntry(0, 4, 7)], id="range"),
        pytest.param("npu:0:3-3", [DeviceEntry(0, 3, 3)], id="range of one"),
        pytest.param("npu:1:8-15", [DeviceEntry(1, 8, 15)], id="cards may have over 8 PEs"),
        pytest.param("cpu", [DeviceEntry(None)], id="cpu"),
        pytest.param(" npu:1 ,\tnpu:0 ", [DeviceEntry(0), DeviceEntry(1)], id="spaces"),
        pytest.param(["npu:1", "npu:0"], [DeviceEntry(0), DeviceEntry(1)], id="list"),
        pytest.param(("npu:0", "npu:1:0,npu:1:1"),
                     [DeviceEntry(0), DeviceEntry(1, 0, 0), DeviceEntry(1, 1, 1)],
                     id="lists in a list"),
        pytest.param("npu:10,npu:2", [DeviceEntry(2), DeviceEntry(10)], id="cards as numbers"),
        pytest.param("npu:0:10,npu:0:2", [DeviceEntry(0, 2, 2), DeviceEntry(0, 10, 10)],
                     id="PEs as numbers"),
    ],
)  # fmt: skip
def test_parse(spec, entries):
    assert parse_devices(spec) == tuple(entries)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        pytest.param("", "names no device", id="empty"),
        pytest.param(" , ", "names no device", id="only a comma"),
        pytest.param([], "names no device", id="empty list"),
        pytest.param("npu:0,", "empty entry", id="trailing comma"),
        pytest.param(["npu:0", ""], "empty entry", id="empty string in a list"),
        pytest.param("npu", "'npu' is not a device", id="no card"),
        pytest.param("npu:x", "'npu:x' is not a device", id="no number"),
        pytest.param("npu:-1", "'npu:-1' is not a device", id="negative"),
        pytest.param("npu:0:", "is not a device", id="no PE"),
        pytest.param("npu:0:1-", "is not a device", id="no end"),
        pytest.param("npu:0:*-1", "is not a device", id="star range"),
        pytest.param("npu: 0", "is not a device", id="space within"),
        pytest.param("npu:0\n:1", "is not a device", id="line break within"),
        pytest.param("npu:\u0663", "is not a device", id="digit of another script"),
        pytest.param("npu:" + "9" * 5000, "is not a device", id="huge number"),
        pytest.param("cuda:0", "'cuda:0' is not a device", id="another kind"),
        pytest.param("npu:0:3-0", "runs backwards", id="backwards"),
        pytest.param("npu:0:0-2", "has 3 PEs", id="width is no power of two"),
        pytest.param("npu:0:2-5", "begins at 2: a range begins at a multiple of its width, "
                     "such as 0 or 4", id="not aligned"),
        pytest.param("npu:0,npu:0", "npu:0 is named twice", id="card twice"),
        pytest.param("npu:0,npu:0:*", "npu:0 is named twice", id="card twice, two spellings"),
        pytest.param("cpu,cpu", "cpu is named twice", id="cpu twice"),
        pytest.param("npu:0:1,npu:0", "npu:0 and npu:0:1 overlap", id="PE of a whole card"),
        pytest.param("npu:0:0-3,npu:0:2", "npu:0:0-3 and npu:0:2 overlap", id="PE of a range"),
        pytest.param("npu:0:0-7,npu:0:1,npu:0:4-5", "overlap", id="not neighbours in order"),
        pytest.param("cpu,npu:0", "mixes npu and cpu", id="kinds"),
        pytest.param(["npu:0", 1], "not a string or a list of strings", id="number in a list"),
        pytest.param(0, "not a string or a list of strings", id="number"),
        pytest.param(None, "not a string or a list of strings", id="None"),
        pytest.param("npu:0," * MAX_ENTRIES + "npu:0", "are more than", id="too many"),
    ],
)  # fmt: skip
def test_refuse(spec, reason):
    with pytest.raises(DeviceError) as caught:
        parse_devices(spec)
    assert reason in str(caught.value)
    assert "npu:X:A-B" in str(caught.value), "what is allowed"
    assert caught.value.param == "devices"


@given(st.text(alphabet="npucd:*-,0123 ", max_size=24))
def test_any_text_is_parsed_or_refused(text):
    try:
        entries = parse_devices(text)
    except DeviceError:
        return
    assert entries
    assert parse_devices(",".join(map(str, entries))) == entries

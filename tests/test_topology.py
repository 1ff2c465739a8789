"""The machine's cards and PEs, and how they are divided into groups."""

from __future__ import annotations

import math

import pytest
from click.testing import CliRunner

from furiosa_llm.cli.devices import devices
from furiosa_llm.cpu_quota import cpu_quota
from furiosa_llm.devices import parse_devices
from furiosa_llm.errors import DeviceError
from furiosa_llm.groups import form_groups
from furiosa_llm.topology import MAX_VIRTUAL_PES, TOPOLOGY_VARIABLE, discover_topology


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.fixture
def sysfs(tmp_path):
    """Two nodes of four cores of two threads each: core i has CPUs i and 8 + i."""
    write(tmp_path / "devices/system/node/node0/cpulist", "0-3,8-11")
    write(tmp_path / "devices/system/node/node1/cpulist", "4-7,12-15")
    write(tmp_path / "devices/system/node/online", "0-1")
    for cpu in range(16):
        write(
            tmp_path / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list",
            f"{cpu % 8},{cpu % 8 + 8}",
        )
    return tmp_path


def discover(sysfs, affinity=range(16), quota=math.inf, **env):
    return discover_topology(sysfs=sysfs, affinity=affinity, quota=quota, env=env)


def cpus_by_card(topology):
    return {str(card): [pe.cpus for pe in card.pes] for card in topology.cards}


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"),
    [
        pytest.param(
            range(16), math.inf,
            {"npu:0": [(0, 8), (1, 9), (2, 10), (3, 11)],
             "npu:1": [(4, 12), (5, 13), (6, 14), (7, 15)]},
            id="a card is a node, a PE a core",
        ),
        pytest.param({1, 9, 2, 12}, math.inf, {"npu:0": [(1, 9), (2,)], "npu:1": [(12,)]},
                     id="only the affinity mask"),
        pytest.param({4, 5}, math.inf, {"npu:1": [(4,), (5,)]}, id="cards keep their numbers"),
        pytest.param(range(16), 2.9, {"npu:0": [(0, 8), (1, 9)]}, id="the quota rounds down"),
        pytest.param(range(16), 5.0,
                     {"npu:0": [(0, 8), (1, 9), (2, 10), (3, 11)], "npu:1": [(4, 12)]},
                     id="the quota reaches the second card"),
        pytest.param(range(16), 0.3, {"npu:0": [(0, 8)]}, id="always one PE"),
        pytest.param({0, 99}, math.inf, {"npu:0": [(0,), (99,)]}, id="a CPU of no node"),
    ],
)  # fmt: skip
def test_discover(sysfs, affinity, quota, expected):
    assert cpus_by_card(discover(sysfs, affinity, quota)) == expected


def test_without_sysfs_each_cpu_is_a_pe(tmp_path):
    assert cpus_by_card(discover(tmp_path, {0, 1, 5})) == {"npu:0": [(0,), (1,), (5,)]}


def test_damaged_sysfs_is_as_none(sysfs):
    write(sysfs / "devices/system/node/node0/cpulist", "zero")
    write(sysfs / "devices/system/cpu/cpu0/topology/thread_siblings_list", "")
    assert cpus_by_card(discover(sysfs, {0, 8}))["npu:0"] == [(0,), (8,)]


def test_this_machine():
    topology = discover_topology()
    assert topology.pes
    assert all(pe.cpus for pe in topology.pes)


@pytest.mark.parametrize(
    ("text", "affinity", "expected"),
    [
        pytest.param("2x2", {0, 1, 2, 3},
                     {"npu:0": [(0,), (1,)], "npu:1": [(2,), (3,)]}, id="enough cores"),
        pytest.param("4x2", {0, 1},
                     {f"npu:{card}": [(0,), (1,)] for card in range(4)}, id="shared in turn"),
        pytest.param("1x3", {0, 8}, {"npu:0": [(0, 8)] * 3}, id="whole cores"),
        pytest.param(" 1X1 ", {0, 1}, {"npu:0": [(0,)]}, id="spelling"),
        pytest.param("", {0}, {"npu:0": [(0,)]}, id="empty is unset"),
    ],
)  # fmt: skip
def test_virtual_topology(sysfs, text, affinity, expected):
    topology = discover(sysfs, affinity, **{TOPOLOGY_VARIABLE: text})
    assert cpus_by_card(topology) == expected


@pytest.mark.parametrize("text", ["4", "0x2", "2x0", "-1x2", "axb", "2x2x2", "1x1025", "9999x9999"])
def test_virtual_topology_refuses(sysfs, text):
    with pytest.raises(DeviceError, match=TOPOLOGY_VARIABLE) as caught:
        discover(sysfs, **{TOPOLOGY_VARIABLE: text})
    assert repr(text) in str(caught.value)
    assert str(MAX_VIRTUAL_PES) in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        pytest.param("0::/a/b", {"a/b/cpu.max": "250000 100000"}, 2.5, id="v2"),
        pytest.param("0::/a/b", {"a/b/cpu.max": "max 100000"}, math.inf, id="v2 without limit"),
        pytest.param("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "100000 100000"},
                     1.0, id="v2 parent"),
        pytest.param("0::/", {"cpu.max": "300000 100000"}, 3.0, id="v2 root of a container"),
        pytest.param("0::/../x", {"cpu.max": "300000 100000"}, 3.0, id="outside the namespace"),
        pytest.param("0::/host/only", {"cpu.max": "200000 100000"}, 2.0, id="path of the host"),
        pytest.param("3:cpu,cpuacct:/c\n0::/",
                     {"cpu,cpuacct/c/cpu.cfs_quota_us": "150000",
                      "cpu,cpuacct/c/cpu.cfs_period_us": "50000"}, 3.0, id="v1"),
        pytest.param("1:cpu:/c", {"cpu/c/cpu.cfs_quota_us": "-1",
                                  "cpu/c/cpu.cfs_period_us": "100000"}, math.inf,
                     id="v1 without limit"),
        pytest.param("1:cpu:/c/d", {"cpu/c/cpu.cfs_quota_us": "50000",
                                    "cpu/c/cpu.cfs_period_us": "100000"}, 0.5, id="v1 parent"),
        pytest.param("2:cpuset:/c", {"cpuset/c/cpu.cfs_quota_us": "1",
                                     "cpuset/c/cpu.cfs_period_us": "1"}, math.inf,
                     id="another controller"),
        pytest.param("0::/a", {"a/cpu.max": "nonsense"}, math.inf, id="unreadable"),
        pytest.param("0::/a", {"a/cpu.max": "1 0"}, math.inf, id="no period"),
        pytest.param("", {}, math.inf, id="no groups"),
    ],
)  # fmt: skip
def test_cpu_quota(tmp_path, lines, files, expected):
    write(tmp_path / "proc/self/cgroup", lines)
    for name, text in files.items():
        write(tmp_path / "cgroup" / name, text)
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "proc") == expected


def test_cpu_quota_without_proc(tmp_path):
    assert cpu_quota(tmp_path, tmp_path) == math.inf


def groups_of(spec, shape, data_parallel=None, tensor_parallel=None):
    topology = discover_topology(
        affinity={0, 1}, quota=math.inf, env={TOPOLOGY_VARIABLE: shape}
    )  # fmt: skip
    groups = form_groups(
        None if spec is None else parse_devices(spec),
        topology,
        data_parallel_size=data_parallel,
        tensor_parallel_size=tensor_parallel,
    )
    assert [group.index for group in groups] == list(range(len(groups)))
    return [str(group) for group in groups]


@pytest.mark.parametrize(
    ("spec", "shape", "dp", "tp", "expected"),
    [
        pytest.param(None, "2x4", None, None, ["npu:0:0-3", "npu:1:0-3"], id="a group per card"),
        pytest.param("npu:1", "2x4", None, None, ["npu:1:0-3"], id="a card"),
        pytest.param("cpu", "2x4", None, None, ["npu:0:0-3,npu:1:0-3"], id="cpu is all"),
        pytest.param("npu:0:0,npu:0:2-3", "1x4", None, None, ["npu:0:0", "npu:0:2-3"],
                     id="a group per entry, uneven as written"),
        pytest.param(None, "2x4", 4, None, ["npu:0:0-1", "npu:0:2-3", "npu:1:0-1", "npu:1:2-3"],
                     id="dp splits"),
        pytest.param(None, "4x2", 2, None, ["npu:0:0-1,npu:1:0-1", "npu:2:0-1,npu:3:0-1"],
                     id="dp merges"),
        pytest.param(None, "2x3", 1, None, ["npu:0:0-2,npu:1:0-2"], id="dp 1 is all"),
        pytest.param("cpu", "2x3", 3, None, ["npu:0:0-1", "npu:0:2,npu:1:0", "npu:1:1-2"],
                     id="cpu ignores cards"),
        pytest.param("npu:0:0,npu:0:1,npu:0:2", "1x4", 1, None, ["npu:0:0-2"],
                     id="entries merge on one card"),
        pytest.param(None, "2x4", None, 2, ["npu:0:0-1", "npu:0:2-3", "npu:1:0-1", "npu:1:2-3"],
                     id="tp splits"),
        pytest.param(None, "2x4", None, 8, ["npu:0:0-3,npu:1:0-3"], id="tp merges"),
        pytest.param(None, "2x4", 2, 4, ["npu:0:0-3", "npu:1:0-3"], id="both"),
        pytest.param("npu:2,npu:10", "11x1", None, None, ["npu:2:0", "npu:10:0"],
                     id="numeric order"),
    ],
)  # fmt: skip
def test_groups(spec, shape, dp, tp, expected):
    assert groups_of(spec, shape, dp, tp) == expected


@pytest.mark.parametrize(
    ("spec", "shape", "dp", "tp", "reason"),
    [
        pytest.param("npu:2", "2x4", None, None, "no card npu:2", id="no such card"),
        pytest.param("npu:0:4", "2x4", None, None, "needs PE 4 but npu:0 has PEs 0 to 3",
                     id="no such PE"),
        pytest.param("npu:0:8-15", "1x8", None, None, "needs PE 15 but npu:0 has PEs 0 to 7",
                     id="a range beyond the card"),
        pytest.param("npu:0:1", "1x1", None, None, "PE 0 only", id="a card of one"),
        pytest.param(None, "2x4", 3, None, "8 / 3 = 2 remainder 2): use 1, 2, 4, 8", id="dp"),
        pytest.param(None, "1x2", 4, None, "2 PEs", id="more groups than PEs"),
        pytest.param(None, "2x4", None, 3, "8 / 3 = 2 remainder 2): use 1, 2, 4, 8", id="tp"),
        pytest.param(None, "1x2", None, 4, "2 / 4 = 0 remainder 2", id="more than there are"),
        pytest.param(None, "2x4", 2, 2, "2 times --tensor-parallel-size 2 is 4 PEs but the "
                     "devices have 8 PEs", id="both, a surplus"),
        pytest.param(None, "2x4", 4, 4, "is 16 PEs but", id="both, too few"),
        pytest.param(None, "2x3", 3, None, "takes 1 of the 3 PEs of npu:0", id="dp across cards"),
        pytest.param("npu:0:0-3,npu:1:0-1", "2x4", None, 3, "takes 1 of the 4 PEs of npu:0:0-3",
                     id="tp across cards"),
    ],
)  # fmt: skip
def test_groups_refuse(spec, shape, dp, tp, reason):
    with pytest.raises(DeviceError) as caught:
        groups_of(spec, shape, dp, tp)
    assert reason in str(caught.value)
    assert "--" in str(caught.value), "names a flag"


def test_a_group_has_the_cpus_of_each_pe(sysfs):
    groups = form_groups(parse_devices("npu:1:0-1"), discover(sysfs))
    assert groups[0].cpus == ((4, 12), (5, 13))


def test_devices_command(monkeypatch):
    monkeypatch.setenv(TOPOLOGY_VARIABLE, "2x2")
    done = CliRunner().invoke(devices, ["--devices", "npu:1", "--data-parallel-size", "2"])
    assert done.exit_code == 0, done.output
    lines = [line.split("  CPU ")[0] for line in done.output.splitlines()]
    assert lines == [
        "card npu:0: 2 PEs", "  npu:0:0", "  npu:0:1",
        "card npu:1: 2 PEs", "  npu:1:0", "  npu:1:1",
        "group 0: npu:1:0", "group 1: npu:1:1",
    ]  # fmt: skip


def test_devices_command_refuses(monkeypatch):
    monkeypatch.setenv(TOPOLOGY_VARIABLE, "2x2")
    done = CliRunner().invoke(devices, ["--devices", "npu:7"])
    assert isinstance(done.exception, DeviceError)

"""CPUs: what the mask and the cgroup allow, and which worker sits where. The cgroup files are made up."""

from __future__ import annotations

import os

import pytest

from kore.process import affinity

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
V1_MOUNT = "33 24 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


def fake_root(tmp_path, mountinfo, cgroup, files):
    for name, text in ({"proc/self/mountinfo": mountinfo, "proc/self/cgroup": cgroup} | files).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("mountinfo", "cgroup", "files", "quota"),
    [
        ("", "", {}, None),
        (V2_MOUNT, "0::/app\n", {"sys/fs/cgroup/app/cpu.max": "max 100000\n"}, None),
        (V2_MOUNT, "0::/app\n", {"sys/fs/cgroup/app/cpu.max": "150000 100000\n"}, 1.5),
        (
            V2_MOUNT,
            "0::/slice/app\n",
            {"sys/fs/cgroup/slice/cpu.max": "50000 100000\n", "sys/fs/cgroup/slice/app/cpu.max": "200000 100000\n"},
            0.5,
        ),
        # A container: the host's path is not below the mount, whose root is the container's own cgroup.
        (
            V2_MOUNT.replace(" / /sys", " /docker/abc /sys"),
            "0::/docker/abc\n",
            {"sys/fs/cgroup/cpu.max": "300000 100000"},
            3,
        ),
        (V2_MOUNT, "0::/../outside\n", {"sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
        (
            V1_MOUNT,
            "4:cpu,cpuacct:/app\n3:memory:/app\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            V1_MOUNT,
            "4:cpu,cpuacct:/\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        (V2_MOUNT, "0::/app\n", {"sys/fs/cgroup/app/cpu.max": "nonsense\n"}, None),
    ],
)
def test_the_quota_of_the_cgroup_is_the_least_on_the_way_up(tmp_path, mountinfo, cgroup, files, quota):
    assert affinity.cpu_quota(fake_root(tmp_path, mountinfo, cgroup, files)) == quota


@pytest.mark.parametrize(
    ("limit", "workers"), [("150000 100000", 2), ("10000 100000", 1), ("max 100000", 4), ("900000 100000", 4)]
)
def test_default_workers_are_the_allowed_cpus_and_no_more_than_the_quota_pays(tmp_path, monkeypatch, limit, workers):
    monkeypatch.setattr(affinity, "allowed_cpus", lambda: [0, 2, 5, 7])
    root = fake_root(tmp_path, V2_MOUNT, "0::/\n", {"sys/fs/cgroup/cpu.max": limit})
    assert affinity.default_workers(root) == workers


def test_workers_take_the_allowed_cpus_in_turn():
    assert [affinity.cpu_of_worker(worker, [2, 3, 7]) for worker in range(1, 6)] == [2, 3, 7, 2, 3]


def test_pinning_obeys_the_mask_and_reports_what_is_not_allowed():
    before = os.sched_getaffinity(0)
    try:
        cpu = min(before)
        assert affinity.pin(cpu) is None
        assert affinity.allowed_cpus() == [cpu]
        assert affinity.pin(1023) is not None
    finally:
        os.sched_setaffinity(0, before)

from pathlib import Path

import pytest

from peercredd.mounts import CgroupError, cgroup_directory, mount_points

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:10 master:2 - cgroup2 cgroup2 rw
42 31 0:38 /user.slice /mnt/part rw - cgroup2 cgroup2 rw
43 23 0:40 / /mnt/a\\040b\\134c rw - bpf none rw
"""


@pytest.fixture
def hybrid(tmp_path: Path) -> Path:
    file = tmp_path / "mountinfo"
    file.write_text(HYBRID)
    return file


def test_cgroup_v2_is_found_on_a_hybrid_host(hybrid: Path) -> None:
    assert cgroup_directory("root", hybrid) == Path("/sys/fs/cgroup/unified")


def test_a_bind_mount_of_a_part_is_not_taken_for_the_whole(hybrid: Path) -> None:
    assert mount_points("cgroup2", hybrid) == [Path("/sys/fs/cgroup/unified")]


def test_a_mount_point_with_spaces_is_read_as_it_is(hybrid: Path) -> None:
    assert mount_points("bpf", hybrid) == [Path("/mnt/a b\\c")]


def test_a_host_without_cgroup_v2_is_told_how_to_mount_it(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text("43 23 0:40 / /mnt rw - bpf none rw\n")

    with pytest.raises(CgroupError, match=r"mount -t cgroup2 none /sys/fs/cgroup$"):
        cgroup_directory("root", mountinfo)


def test_a_mount_on_a_hybrid_host_is_to_hide_no_v1_controller(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(HYBRID.replace("cgroup2", "cgroup"))

    with pytest.raises(CgroupError, match=r"mount -t cgroup2 none /sys/fs/cgroup/unified$"):
        cgroup_directory("root", mountinfo)


def test_the_root_of_this_machine_is_a_cgroup_v2_directory() -> None:
    root = cgroup_directory("root")

    assert cgroup_directory(str(root)) == root


def test_a_folder_that_is_no_cgroup_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CgroupError, match="is no cgroup v2 directory; name one in /"):
        cgroup_directory(str(tmp_path))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CgroupError, match="is not a directory; make it"):
        cgroup_directory(str(tmp_path / "none"))

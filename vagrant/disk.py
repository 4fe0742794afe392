"""A disk that starts itself: GRUB in a boot sector, and one ext4 partition behind it.

It is made out of a folder, with neither loop devices nor mounts.
"""

from __future__ import annotations

import struct
from pathlib import Path

SECTOR = 512  # bytes, as are all figures here
BOOT_CODE = 440
PARTITION_TABLE = 446
PARTITION = 1 << 20
LINUX = 0x83
ACTIVE = 0x80
BEYOND_CYLINDERS = b"\xfe\xff\xff"
SIGNATURE = b"\x55\xaa"

# GRUB of Debian 12 cannot read what these change.
_NEWER_THAN_GRUB = "^64bit,^metadata_csum_seed,^orphan_file"


def partition(disk: Path, root: Path, size: int) -> None:
    """Make `disk` with the GRUB that is below `root`, and one partition, as yet empty."""
    with disk.open("wb") as file:
        file.truncate(size)
        file.write((root / "usr/lib/grub/i386-pc/boot.img").read_bytes()[:BOOT_CODE])
        file.seek(PARTITION_TABLE)
        first, count = PARTITION // SECTOR, (size - PARTITION) // SECTOR
        ends = (ACTIVE, BEYOND_CYLINDERS, LINUX, BEYOND_CYLINDERS)
        file.write(struct.pack("<B3sB3sII", *ends, first, count))
        file.seek(SECTOR - len(SIGNATURE))
        file.write(SIGNATURE + (root / "boot/grub/core.img").read_bytes())


def fill_command(disk: Path, root: Path, size: int) -> list[str]:
    """The command that makes the partition's file system and copies `root` into it."""
    return [
        *("/usr/sbin/mke2fs", "-qt", "ext4", "-L", "root", "-d", str(root)),
        *("-O", _NEWER_THAN_GRUB, "-E", f"offset={PARTITION}"),
        *(str(disk), f"{(size - PARTITION) >> 10}k"),
    ]

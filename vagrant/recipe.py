"""What a box consists of. Whatever changes here, or in `./dev packages`, is a new box."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import msgspec

from vagrant.kernels import COMMAND_LINE, Kernel

PROJECT = Path(__file__).resolve().parents[1]
ARCHITECTURE = "amd64"
DISK_SIZE = 10 << 30  # bytes
READY_PORT = "peercredd.ready"
"""A virtio port that the guest opens once ssh answers."""

PACKAGES = (
    "ca-certificates",
    "dbus",
    "grub-common",
    "grub-pc-bin",
    "initramfs-tools",
    "iproute2",
    "kmod",
    "openssh-server",
    "procps",
    "rsync",
    "sudo",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
    # What is attached in the kernel, whoever attached it.
    "bpftool",
)
"""What makes a machine of it: a bare one, which has nothing that the project needs."""

MORE_PACKAGES = (
    # What the benchmark compares with.
    "bpfcc-tools",
    # For hands.
    "less",
    "strace",
    "tcpdump",
)
"""What other machines have besides; what the project needs comes from `./dev packages`."""

# The well-known key that `vagrant ssh` tries first. Machines that the lab boots itself
# take it away again before ssh starts.
_VAGRANT_KEY = (
    "ssh-rsa AAAAB3NzaC1yc2EAAAABIwAAAQEA6NF8iallvQVp22WDkTkyrtvp9eWW6A8YVr+kz4TjGYe7gHzIw+niNltGEF"
    "HzD8+v1I2YJ6oXevct1YeS0o9HZyN1Q9qgCgzUFtdOKLv6IedplqoPkcmF0aYet2PkEDo3MlTBckFXPITAMzF8dJSIFo9D8"
    "HfdOV0IAdx4O7PtixWKn5y2hMNG0zQPyUecp4pzC6kivAIhyfHilFR61RGL+GPXQ2MWZWFYbAGjyiYJnAmCP3NOTd0jMZEn"
    "DkbUvxhMmBYSdETk1rRgm+R4LOzFUGaHqHDLKLX+FIPKcF96hrucXzcWyLbIbEgE98OHlnVYCzRdK8jlqm8tehUc9c9WhQ="
    "= vagrant insecure public key\n"
)
VAGRANT_KEYS = "/home/vagrant/.ssh/authorized_keys"

FILES = {
    "/boot/grub/grub.cfg": f"linux /vmlinuz {COMMAND_LINE}\ninitrd /initrd.img\nboot\n",
    "/etc/hostname": "lab\n",
    # A machine without an id takes its boot for the first, and sets up every unit again.
    "/etc/machine-id": "7065657263726564642d766d2d6c6162\n",
    "/etc/hosts": "127.0.0.1 localhost lab\n::1 localhost\n",
    "/etc/fstab": "LABEL=root / ext4 defaults 0 1\n",
    # libvirt hands out addresses by MAC.
    "/etc/systemd/network/80-lab.network": (
        "[Match]\nName=e*\n[Network]\nDHCP=yes\n[DHCPv4]\nClientIdentifier=mac\n"
    ),
    "/etc/ssh/sshd_config.d/lab.conf": "UseDNS no\n",
    "/etc/sudoers.d/vagrant": "vagrant ALL=(ALL) NOPASSWD: ALL\n",
    "/etc/systemd/system/lab-ready.service": (
        "[Unit]\n"
        "Description=Tell the lab that ssh answers\n"
        "Wants=systemd-networkd-wait-online.service\n"
        "After=systemd-networkd-wait-online.service ssh.service\n"
        "[Service]\n"
        "Type=oneshot\n"
        f"ExecStart=sh -c 'echo ready >/dev/virtio-ports/{READY_PORT}'\n"
        "[Install]\n"
        rf"WantedBy=dev-virtio\x2dports-{READY_PORT}.device" + "\n"
    ),
    VAGRANT_KEYS: _VAGRANT_KEY,
}
COMMANDS = (
    "useradd --shell /bin/bash vagrant",
    "chown -R vagrant: /home/vagrant",
    "chmod -R go= /home/vagrant /etc/sudoers.d/vagrant",
    "systemctl --quiet enable systemd-networkd lab-ready",
    # libvirt's QEMU may not read a kernel in somebody's home: so the disk starts itself.
    "grub-mkimage -O i386-pc -p (hd0,msdos1)/boot/grub -o /boot/grub/core.img"
    " biosdisk part_msdos ext2 normal linux",
)
"""What is done in the box's root once `FILES` are there."""


def packages(kernel: Kernel) -> list[str]:
    """Every package of a box but the kernel; those of the project as `./dev` lists them."""
    if kernel.is_bare:
        return sorted(PACKAGES)
    listed = subprocess.run(
        [PROJECT / "dev", "packages"], stdout=subprocess.PIPE, text=True, check=True
    )
    return sorted({*PACKAGES, *MORE_PACKAGES, *listed.stdout.split()})


def sources(kernel: Kernel, mirror: str) -> list[str]:
    """The lines of a sources.list."""
    return [
        f"deb {mirror}{'-security' if archive.endswith('-security') else ''} {archive} main"
        for archive in kernel.archives
    ]


def fingerprint(kernel: Kernel) -> str:
    """What a box is made of, in 12 hexadecimal digits."""
    made_of = hashlib.sha256(Path(__file__).read_bytes())
    made_of.update(
        msgspec.json.encode([packages(kernel), kernel.suite, kernel.archives, kernel.package])
    )
    return made_of.hexdigest()[:12]

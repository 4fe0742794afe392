"""Every default path and number of the daemon, and why it is that one."""

from __future__ import annotations

from typing import Final

CONFIG_FILE: Final = "/etc/peercredd/peercredd.toml"
"""Read when no ``--config`` is given; it need not exist."""

PIN_DIR: Final = "/sys/fs/bpf/peercredd"
"""A folder of its own on the bpffs that systemd mounts on every distribution."""

HOOKS: Final = "auto"
"""Who accepted is worth knowing, and a kernel that locks tracing down should not need a setting."""

CGROUP: Final = "root"
"""Not a path: where cgroup v2 is mounted differs between unified and hybrid hosts."""

MAX_CONNECTIONS: Final = 65_536
"""Twice the 28,232 ephemeral ports that one pair of loopback addresses has. Larger tables
leave the CPU's cache sooner, and then every connect() pays."""

MAX_PENDING: Final = 16_384
"""Connections between SYN and establishment. A listener's queue is 4,096 by default
(net.core.somaxconn), so this is four of them full."""

SOCKET: Final = "/run/peercredd/peercredd.sock"
"""systemd's RuntimeDirectory= makes the folder, and tmpfs forgets it at boot."""

GROUP: Final = "peercredd"
"""Made by packaging's sysusers.d; its members may ask about every connection."""

SO_PEERCRED_STATE: Final = "/var/lib/peercredd/so_peercred.json"
"""What an administrator enables stays enabled after a reboot; systemd's StateDirectory= makes the
folder."""

SWEEP_INTERVAL_SECONDS: Final = 30
"""A sweep takes some 0.2 s of CPU, most of it to start: 1/150 of one CPU."""

PENDING_AGE_SECONDS: Final = 120
"""About as long as the kernel sends SYNs for (tcp_syn_retries = 6: 127 s)."""

RECORD_AGE_SECONDS: Final = 300
"""A record is removed only if no socket stands behind it; the age spares young ones the
question."""

METRICS_ADDRESS = ""
LOG_LEVEL: Final = "info"
"""A start, a stop and what an administrator should look at; nothing per connection."""

LOG_FORMAT: Final = "auto"
"""Text where a person or the journal reads, JSON where a collector does."""

LOADER_TIMEOUT_SECONDS: Final = 300
"""A load takes a second, nearly all of it the compiler's; an emulated machine that has other
work takes more than a minute. Beyond this it hangs."""

SWEEPER_TIMEOUT_SECONDS: Final = 60
"""A sweep takes milliseconds; the next one must not wait for a stuck one for ever."""

STOP_GRACE_SECONDS: Final = 1
"""For calls under way at SIGTERM. Unary calls take microseconds; a stream never ends by
itself, so waiting longer only makes the stop slower."""

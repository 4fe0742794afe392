"""Every default path and number of the daemon, and why it is that one."""

from __future__ import annotations

from typing import Final

CONFIG_FILE: Final = "/etc/peercredd/peercredd.toml"
"""Read when no ``--config`` is given; it need not exist."""

PIN_DIR: Final = "/sys/fs/bpf/peercredd"
"""A folder of its own on the bpffs that systemd mounts on every distribution."""

CACHE_DIR: Final = "/var/cache/peercredd"
"""systemd's CacheDirectory= makes the folder, for root alone."""

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

MAX_PERCENT_PER_USER: Final = 25
"""Four users may have all they are allowed, and one still 16,384 connections: more descriptors
than most services may open."""

SOCKET: Final = "/run/peercredd/peercredd.sock"
"""systemd's RuntimeDirectory= makes the folder, and tmpfs forgets it at boot."""

GROUP: Final = "peercredd"
"""Made by packaging's sysusers.d; its members may ask about every connection."""

TCP: Final = True
"""For everybody who may not open the socket: they learn about what is theirs."""

TCP_PORT: Final = 338
"""Below 1024, so that nobody without a privilege can stand in for a daemon that is down. IANA has
assigned none of 334 to 343; and below 512, where bindresvport(3) takes no port for a client."""
USER: Final = "peercredd"
"""Made by packaging's sysusers.d; owns nothing, and nobody logs in as it."""

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
"""A load takes a second, the first one some more for the compiler; an emulated machine that has
other work takes more than a minute. Beyond this it hangs."""

REFUSALS_LOG_SECONDS: Final = 60
"""What callers were refused is logged once in that time, however much it was."""

SWEEPER_TIMEOUT_SECONDS: Final = 60
"""A sweep takes milliseconds; the next one must not wait for a stuck one for ever."""

PULSE_SECONDS: Final = 1.0
"""Between two questions whether the server is alive; each costs some microseconds."""

PULSE_TIMEOUT_SECONDS: Final = 30.0
"""A server that is silent for so long is replaced. A machine that is short of CPU or memory may
make it wait for some seconds; a client waits for 5."""

SERVER_START_SECONDS: Final = 60.0
"""A start takes half a second; an emulated machine that has other work takes many."""

RESTART_SECONDS: Final = (0.0, 0.1, 0.2, 0.5, 1.0)
"""Before a server that died has its successor: at once, and later while they keep dying; the last
one stays. A start takes half a second of CPU, and callers wait for it."""

RESTART_FORGIVEN_SECONDS: Final = 10.0
"""A server that has lived so long died of something new."""

STOP_GRACE_SECONDS: Final = 1
"""For calls under way at SIGTERM. Unary calls take microseconds; a stream never ends by
itself, so waiting longer only makes the stop slower."""

#!/bin/bash
# The life of the package in a machine that has nothing it needs, as root: life.sh OLD.deb NEW.deb
# It changes the machine for good. A line says what was seen, or was not; what was said follows then.
set -u -o pipefail
cd -- "$(dirname -- "$0")"
readonly old=$1 new=$2 interpreter=/usr/lib/peercredd/bin/python
export DEBIAN_FRONTEND=noninteractive LC_ALL=C unit=peercredd.service
failures=0

# $1: a promise; then the command that shows whether it is kept.
see() {
  local promise=$1 said
  shift
  SECONDS=0
  if said=$("$@" 2>&1); then
    printf 'ok      %s (%d s)\n' "$promise" "$SECONDS"
    # Figures, where the command has any.
    [[ $1 != through ]] || sed -n '/ connections before, /s/^/        /p' <<<"$said"
  else
    printf 'FAILED  %s\n' "$promise"
    tail -n 30 <<<"$said" | sed 's/^/        /'
    ((++failures))
  fi
}

# A command while users connect: see through.py.
through() { "$interpreter" through.py "$@"; }

# Only what is named has to do: nothing that is merely recommended.
install() { apt-get --quiet --yes --no-install-recommends install "$@"; }

# Whatever installs and removes packages keeps its books, caches and logs elsewhere.
files() {
  {
    find / -xdev \( -path /root -o -path /tmp -o -path /var/tmp -o -path /var/cache \
      -o -path /var/log -o -path /var/lib/apt -o -path /var/lib/dpkg -o -path /var/lib/systemd \) \
      -prune -o -print
    find /run/peercredd* /run/systemd/system /dev/shm /var/cache/peercredd* 2>/dev/null
  } | sort
}

# Those of systemd come and go with other units.
programs() {
  bpftool prog show | sed -n 's/^[0-9]*: \([a-z_]*  name [^ ]*\).*/\1/p' | grep -v ' sd_' | sort -u
}

pins() { find /sys/fs/bpf -mindepth 1; }

attached() { pins | grep . && programs | grep '^tracing .*tcp_connect'; }

nothing_attached() { diff <(echo "$programs_before") - <<<"$(programs)" && ! pins | grep .; }

has_nothing_of_it() { [[ ! -e /usr/bin/python3 && ! -e /usr/include/linux/bpf.h && -z $(pins) ]]; }

# On an emulated machine that is busy a start may take longer than it may; systemd tries again.
runs() {
  for _ in {1..300}; do
    [[ $(systemctl is-active "$unit") == activating ]] || break
    sleep 1
  done
  systemctl is-active "$unit" && systemctl is-enabled "$unit"
}

# There, the check of the host may take longer than doctor waits for it.
nothing_missing() {
  local said
  said=$(peercred doctor) && return
  echo "$said"
  grep -q '^unknown  host ' <<<"$said" && ! grep -q '^failed' <<<"$said" && peercredd check
}

# $1: a file; is it what is installed and answers?
is_version() {
  peercred status | grep -x "version  *$(dpkg-deb --field "$1" Version)"
}

no_complaint() {
  local said
  said=$(systemd-analyze verify --man=no "$unit" 2>&1) && [[ -z $said ]] || {
    echo "$said"
    return 1
  }
}

# The supervisor is root; who answers has nothing, and can get nothing.
server_without_privileges() {
  local server
  server=$(pgrep --uid peercredd --full peercredd.server_process) || return
  cat "/proc/$server/status"
  [[ $(stat --format %U "/proc/$server") == peercredd ]] &&
    ! grep -E '^Cap(Inh|Prm|Eff|Bnd|Amb):.*[1-9a-f]' "/proc/$server/status" &&
    grep -x $'NoNewPrivs:\t1' "/proc/$server/status" &&
    grep -x $'Seccomp:\t2' "/proc/$server/status"
}

socket_for_its_group() {
  stat --format '%U:%G %a' /run/peercredd/peercredd.sock | grep -x 'root:peercredd 660'
}

as_nobody() { setpriv --reuid 65534 --regid 65534 --clear-groups -- "$@"; }

# What is not nobody's is not there; who was refused the journal tells, in a minute, from the server.
refused_to_nobody() {
  local cookie
  cookie=$(peercred list --json | sed -n 's|.*"server_socket_cookie": *\([0-9]*\).*|\1|p' | head -1) &&
    ! as_nobody peercred lookup --cookie "$cookie"
}

refusal_in_the_journal() {
  for _ in {1..60}; do
    journalctl --unit "$unit" --output json "_UID=$(id --user peercredd)" PEERCREDD_REASON=NOT_VISIBLE |
      grep '"PEERCREDD_UID":"65534"' && return
    sleep 2
  done
  journalctl --unit "$unit" --output json --lines 3
  return 1
}

clock_set_back() {
  date --set '1 hour ago' && sleep 2 && ! peercred status | grep -i problem
  local status=$?
  date --set '1 hour'
  return "$status"
}

# systemd hears of it each second, and would end it if it did not.
is_watched() {
  local before now
  [[ $(systemctl show --property Type --value "$unit") == notify ]] || return
  [[ $(systemctl show --property WatchdogUSec --value "$unit") == "1min 30s" ]] || return
  before=$(systemctl show --property WatchdogTimestampMonotonic --value "$unit")
  for _ in {1..60}; do
    now=$(systemctl show --property WatchdogTimestampMonotonic --value "$unit")
    ((now == before)) || return 0
    sleep 1
  done
  return 1
}

main_pid() { systemctl show --property MainPID --value "$unit"; }

stop_and_start() {
  systemctl stop "$unit" && ! peercred status && attached && systemctl start "$unit"
}

kill_main() {
  local before
  before=$(main_pid)
  kill -9 "$before"
  for _ in {1..120}; do
    if systemctl --quiet is-active "$unit" && [[ $(main_pid) != "$before" ]]; then
      [[ $(systemctl show --property NRestarts --value "$unit") == 1 ]]
      return
    fi
    sleep 1
  done
  systemctl status "$unit"
  return 1
}

export -f as_nobody refused_to_nobody clock_set_back main_pid pins programs attached stop_and_start kill_main

capture_began() { peercred status | grep '^capture since'; }

same_capture() { diff <(echo "$began") <(capture_began); }

same_configuration() { grep -x '# An administrator was here.' /etc/peercredd/peercredd.toml; }

no_unit() {
  [[ $(systemctl show --property LoadState --value "$unit") == not-found ]] &&
    ! systemctl list-unit-files | grep peercred
}

removed() {
  [[ -e /etc/peercredd/peercredd.toml && ! -e /usr/bin/peercredd && ! -e /usr/lib/peercredd ]]
}

as_before() { diff <(echo "$files_before") <(files); }

see "nothing that it needs is here: no Python, no headers" has_nothing_of_it
files_before=$(files)
programs_before=$(programs)
see "apt knows its sources" apt-get --quiet update
see "apt-get installs it, with all that it needs" install "$old"
see "the service is enabled and runs" runs
see "it is the version that was installed" is_version "$old"
see "peercred doctor finds nothing missing" nothing_missing
see "systemd has no complaint about the unit" no_complaint
see "the server is peercredd's, without a capability, filtered" server_without_privileges
see "users' connections are answered for" through sleep 2
see "its socket is root's, and for the group peercredd" socket_for_its_group
see "whoever is nobody may ask what is its own" as_nobody peercred whoami
see "whoever is nobody is refused what is not" through bash -c refused_to_nobody
see "the journal tells that, in fields" refusal_in_the_journal
see "a clock that is set back changes nothing" through bash -c clock_set_back
see "SO_PEERCRED is switched on" peercredd so-peercred enable all
echo '# An administrator was here.' >>/etc/peercredd/peercredd.toml
began=$(capture_began)

see "apt-get upgrades it, and no live record is lost" through \
  apt-get --quiet --yes --no-install-recommends install "$new"
see "the service is enabled and runs" runs
see "it is the version that it was upgraded to" is_version "$new"
see "the capture is the one that was begun first" same_capture
see "the administrator's configuration is kept" same_configuration
see "a restart loses no live record" through systemctl restart "$unit"
see "a stop and a start lose no live record" through bash -c stop_and_start
see "killed, it is started again, and no live record is lost" through bash -c kill_main
see "the capture is the one that was begun first" same_capture
see "systemd hears that it lives" is_watched
see "programs are attached" attached

see "apt-get removes it" apt-get --quiet --yes remove peercredd
see "nothing is attached or pinned any more" nothing_attached
see "the configuration is kept, and nothing else" removed
see "apt-get purges it" apt-get --quiet --yes purge peercredd
see "there is no unit any more" no_unit
# Also what others suggest, such as python3: it was not there before.
see "apt-get removes what it had needed" apt-get --quiet --yes --purge \
  --option APT::AutoRemove::SuggestsImportant=false \
  --option APT::AutoRemove::RecommendsImportant=false autoremove
see "the machine has the files that it had before" as_before

if ((failures)); then
  echo "$failures promises are not kept"
  journalctl --unit "$unit" --output cat --lines 50
  exit 1
fi

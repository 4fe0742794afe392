# A TCP server for one client: prints its own port, then who that client is, as pid, uid
# and gid.
use strict;
use warnings;
use Socket;

$| = 1;
socket(my $listener, AF_INET, SOCK_STREAM, 0) or die "socket: $!";
bind($listener, pack_sockaddr_in(0, INADDR_LOOPBACK)) or die "bind: $!";
listen($listener, 1) or die "listen: $!";
my ($port) = unpack_sockaddr_in(getsockname($listener));
print "$port\n";

accept(my $accepted, $listener) or die "accept: $!";
my $peer = getsockopt($accepted, SOL_SOCKET, SO_PEERCRED) or die "getsockopt: $!";
print join(' ', unpack('l L L', $peer)), "\n";

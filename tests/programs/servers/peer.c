/*
 * A TCP server for one client: prints its own port, then who that client is, as pid, uid
 * and gid.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <netinet/in.h>
#include <stdio.h>
#include <sys/socket.h>

int main(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET,
				       .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t address_length = sizeof(address), peer_length;
	int listener = socket(AF_INET, SOCK_STREAM, 0), accepted;
	struct ucred peer;

	if (listener < 0 || bind(listener, (void *)&address, sizeof(address)) ||
	    listen(listener, 1) || getsockname(listener, (void *)&address, &address_length))
		err(1, "listen");
	printf("%d\n", ntohs(address.sin_port));
	fflush(stdout);

	accepted = accept(listener, NULL, NULL);
	peer_length = sizeof(peer);
	if (accepted < 0 || getsockopt(accepted, SOL_SOCKET, SO_PEERCRED, &peer, &peer_length))
		err(1, "accept");
	printf("%d %u %u\n", peer.pid, peer.uid, peer.gid);
	return 0;
}

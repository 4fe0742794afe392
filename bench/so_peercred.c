/*
 * What one getsockopt(2) costs, by option and socket.
 *
 *   so_peercred CALLS
 *
 * Each line of input names a cgroup's directory and is answered with one line: how long a
 * call of each kind took there, in ns: those of `kinds`, in that order. Of CALLS calls of each,
 * it is the shortest stretch that counts: short enough that other tasks leave some alone.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define WARM_UP_CALLS 50
#define STRETCH 500

struct connection {
	int listener;
	int client;
	int server;
};

static struct connection unix_connection, tcp_connection;

static const struct kind {
	int *fd;
	int level;
	int option;
	socklen_t length;
} kinds[] = {
	{ &unix_connection.server, SOL_SOCKET, SO_PEERCRED, sizeof(struct ucred) },
	{ &tcp_connection.server, SOL_SOCKET, SO_PEERCRED, sizeof(struct ucred) },
	{ &tcp_connection.client, SOL_SOCKET, SO_PEERCRED, sizeof(struct ucred) },
	{ &tcp_connection.server, SOL_SOCKET, SO_TYPE, sizeof(int) },
	{ &tcp_connection.server, IPPROTO_TCP, TCP_NODELAY, sizeof(int) },
};
#define KINDS (sizeof(kinds) / sizeof(kinds[0]))

static double now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e9 + now.tv_nsec;
}

static void pin_to_this_cpu(void)
{
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(sched_getcpu(), &one);
	if (sched_setaffinity(0, sizeof(one), &one))
		err(1, "sched_setaffinity");
}

static void enter_cgroup(const char *directory)
{
	char path[4096];
	int fd;

	snprintf(path, sizeof(path), "%s/cgroup.procs", directory);
	fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, "0", 1) != 1)
		err(1, "%s", path);
	close(fd);
}

static struct connection connect_to_self(struct sockaddr *address, socklen_t length)
{
	struct connection made = { .listener = socket(address->sa_family, SOCK_STREAM, 0),
				   .client = socket(address->sa_family, SOCK_STREAM, 0) };
	struct sockaddr_storage bound;
	socklen_t bound_length = sizeof(bound);

	if (made.listener < 0 || made.client < 0 || bind(made.listener, address, length) ||
	    listen(made.listener, 1) ||
	    getsockname(made.listener, (void *)&bound, &bound_length) ||
	    connect(made.client, (void *)&bound, bound_length))
		err(1, "connect");
	made.server = accept(made.listener, NULL, NULL);
	if (made.server < 0)
		err(1, "accept");
	return made;
}

static void close_all(const struct connection *connection)
{
	close(connection->client);
	close(connection->server);
	close(connection->listener);
}

static void call(const struct kind *kind, int calls)
{
	char value[sizeof(struct ucred)];

	for (int i = 0; i < calls; i++) {
		socklen_t length = kind->length;

		if (getsockopt(*kind->fd, kind->level, kind->option, value, &length))
			err(1, "getsockopt");
	}
}

/* In turns: what makes the CPU faster or slower meets all kinds alike. */
static void measure(int calls, double *shortest)
{
	for (int done = 0; done < calls; done += STRETCH) {
		for (size_t i = 0; i < KINDS; i++) {
			double start, took;

			call(&kinds[i], WARM_UP_CALLS);
			start = now_ns();
			call(&kinds[i], STRETCH);
			took = (now_ns() - start) / STRETCH;
			if (!done || took < shortest[i])
				shortest[i] = took;
		}
	}
}

int main(int argc, char **argv)
{
	/* With a family and nothing else, the kernel chooses an abstract name. */
	struct sockaddr_un unix_address = { .sun_family = AF_UNIX };
	struct sockaddr_in tcp_address = { .sin_family = AF_INET,
					   .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	double shortest[KINDS];
	char cgroup[4096];
	int calls;

	if (argc != 2)
		errx(2, "usage: so_peercred CALLS");
	calls = atoi(argv[1]);
	pin_to_this_cpu();
	while (scanf("%4095[^\n]%*c", cgroup) == 1) {
		/* A socket belongs to the cgroup that it was made in. */
		enter_cgroup(cgroup);
		unix_connection = connect_to_self((void *)&unix_address, sizeof(sa_family_t));
		tcp_connection = connect_to_self((void *)&tcp_address, sizeof(tcp_address));
		measure(calls, shortest);
		for (size_t i = 0; i < KINDS; i++)
			printf("%.3f ", shortest[i]);
		printf("\n");
		fflush(stdout);
		close_all(&unix_connection);
		close_all(&tcp_connection);
	}
	return 0;
}

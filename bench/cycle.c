/*
 * What one loopback connection costs: socket, connect, accept, close, close, by
 * one task on one CPU.
 *
 *   cycle FAMILY CLOSING CYCLES WARM_UP_CYCLES
 *
 * FAMILY is 4 or 6; CLOSING is "fin" or "reset". Each line of input names a cgroup's
 * directory and is answered with one line: CPU and elapsed time, in ns, of one cycle
 * in that cgroup, and how many connections were made for it in all.
 *
 * One CPU, because then both ends, and the softirq work between them, run inside
 * this task's system calls and are charged to it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct server {
	int fd;
	struct sockaddr_storage address;
	socklen_t length;
};

struct cost {
	double cpu_ns;
	double elapsed_ns;
};

static double now_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * 1e9 + now.tv_nsec;
}

static void pin_to_last_allowed_cpu(void)
{
	cpu_set_t allowed, one;
	int cpu = CPU_SETSIZE - 1;

	if (sched_getaffinity(0, sizeof(allowed), &allowed))
		err(1, "sched_getaffinity");
	while (!CPU_ISSET(cpu, &allowed))
		cpu--;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	if (sched_setaffinity(0, sizeof(one), &one))
		err(1, "sched_setaffinity");
}

/* The TIME_WAIT sockets that "fin" leaves behind must burden nobody else. */
static void enter_own_network(void)
{
	struct ifreq loopback = { .ifr_name = "lo", .ifr_flags = IFF_UP };
	int fd;

	if (unshare(CLONE_NEWNET))
		err(1, "unshare(CLONE_NEWNET)");
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &loopback))
		err(1, "bring lo up");
	close(fd);
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

static struct server listen_on_loopback(int family)
{
	struct server server = { .fd = socket(family, SOCK_STREAM, 0) };

	if (family == AF_INET) {
		struct sockaddr_in *address = (void *)&server.address;

		*address = (struct sockaddr_in){ .sin_family = AF_INET,
						 .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
		server.length = sizeof(*address);
	} else {
		struct sockaddr_in6 *address = (void *)&server.address;

		*address = (struct sockaddr_in6){ .sin6_family = AF_INET6,
						  .sin6_addr = IN6ADDR_LOOPBACK_INIT };
		server.length = sizeof(*address);
	}
	if (server.fd < 0 || bind(server.fd, (void *)&server.address, server.length) ||
	    listen(server.fd, 16) ||
	    getsockname(server.fd, (void *)&server.address, &server.length))
		err(1, "listen");
	return server;
}

static void cycle(const struct server *server, int reset)
{
	struct linger at_once = { .l_onoff = 1, .l_linger = 0 };
	int client = socket(server->address.ss_family, SOCK_STREAM, 0);
	int accepted;

	if (client < 0 || connect(client, (void *)&server->address, server->length))
		err(1, "connect");
	accepted = accept(server->fd, NULL, NULL);
	if (accepted < 0)
		err(1, "accept");
	if (reset && setsockopt(client, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once)))
		err(1, "SO_LINGER");
	close(client);
	close(accepted);
}

/* A new listener each time: a socket belongs to the cgroup it was made in, and a
 * port of its own never meets the TIME_WAIT sockets of an earlier round. */
static struct cost measure(const char *cgroup, int family, int reset, int cycles, int warm_up)
{
	struct server server;
	struct cost cost;

	enter_cgroup(cgroup);
	server = listen_on_loopback(family);
	for (int i = 0; i < warm_up; i++)
		cycle(&server, reset);
	cost.cpu_ns = -now_ns(CLOCK_PROCESS_CPUTIME_ID);
	cost.elapsed_ns = -now_ns(CLOCK_MONOTONIC);
	for (int i = 0; i < cycles; i++)
		cycle(&server, reset);
	cost.cpu_ns += now_ns(CLOCK_PROCESS_CPUTIME_ID);
	cost.elapsed_ns += now_ns(CLOCK_MONOTONIC);
	close(server.fd);
	cost.cpu_ns /= cycles;
	cost.elapsed_ns /= cycles;
	return cost;
}

int main(int argc, char **argv)
{
	char cgroup[4096];

	if (argc != 5)
		errx(2, "usage: cycle 4|6 fin|reset CYCLES WARM_UP_CYCLES");

	int family = strcmp(argv[1], "6") ? AF_INET : AF_INET6;
	int reset = !strcmp(argv[2], "reset");
	int cycles = atoi(argv[3]);
	int warm_up = atoi(argv[4]);

	pin_to_last_allowed_cpu();
	enter_own_network();
	while (scanf("%4095[^\n]%*c", cgroup) == 1) {
		struct cost cost = measure(cgroup, family, reset, cycles, warm_up);

		printf("%.0f %.0f %d\n", cost.cpu_ns, cost.elapsed_ns, warm_up + cycles);
		fflush(stdout);
	}
	return 0;
}

/* SPDX-License-Identifier: MIT OR GPL-2.0-only
 *
 * Reading the kernel's structs without its headers. The OFFSET_* macros are
 * written by peercredd/capture.py from the running kernel's BTF.
 *
 * Kernel addresses travel as u64: a pointer would be taken by BCC for one that it
 * has to rewrite.
 */

#define AF_INET6 10
#define IPPROTO_TCP 6
#define SOCK_STREAM 1
#define SOCK_DONE (1U << 1)     /* sock.sk_flags */
#define IFF_LOOPBACK (1U << 3)  /* net_device.flags */
#define PF_KTHREAD 0x00200000U  /* task_struct.flags */
#define PFA_NO_NEW_PRIVS 1U     /* bit 0 of task_struct.atomic_flags */
#define MAX_BASE_EXTENTS 5      /* UID_GID_MAP_MAX_BASE_EXTENTS */
#define MAX_USER_NAMESPACE_HOPS 32

/* The compiler may fuse neighbouring context accesses, or move them behind pointer
 * arithmetic; the verifier refuses both. After this it has to have loaded the value. */
#define KEEP(value) asm volatile("" : "+r"(value))

/* BCC's own declaration returns 32 bits of the cookie. */
static u64 (*socket_cookie_of)(void *context) = (void *)BPF_FUNC_get_socket_cookie;
static void *(*tcp_sock_of)(void *socket) = (void *)BPF_FUNC_skc_to_tcp_sock;
static u64 (*boot_time_ns)(void) = (void *)BPF_FUNC_ktime_get_boot_ns;
static u64 (*current_task)(void) = (void *)BPF_FUNC_get_current_task_btf;
static long (*read_kernel)(void *to, u32 size, u64 from) = (void *)BPF_FUNC_probe_read_kernel;

/* A member of a struct that the verifier knows: a socket, the current task, and what
 * they point to. A plain load, and 0 should the address be bad. */
#define LOAD(type, address, member) (*(type *)((address) + OFFSET_##member))

/* SPDX-License-Identifier: MIT OR GPL-2.0-only
 *
 * The `trace` hook set: the functions of the kernel that the moments are named after.
 * Its programs see every socket of the host. ARGUMENT_* and RESULT_* say where in a
 * program's context a function's argument or result is; peercredd/capture.py takes
 * them from the kernel's BTF.
 *
 * A tracing program is skipped, and counted as missed, while it runs on the same CPU
 * already (__bpf_prog_enter_recur() in kernel/bpf/trampoline.c).
 */
#include <bcc/proto.h>
#include "records.h"
#include "maps.h"
#include "kernel.h"
#include "credentials.h"
#include "core.h"
#include "so_peercred.h"

#define BPF_LICENSE Dual MIT/GPL

#define ARGUMENT(function, name) ctx[ARGUMENT_##function##_##name]
#define RESULT(function) ctx[RESULT_##function]

/* Whether a socket was made in the cgroup that bounds the capture, or below. */
static __always_inline bool is_captured(u64 socket)
{
#ifdef OFFSET_cgroup_level
    u64 cgroup = LOAD(u64, socket, sock_cgroup), ancestor = 0, node = 0, identity = 0;
    struct settings *chosen = own_settings();
    if (!chosen || LOAD(u32, cgroup, cgroup_level) < chosen->cgroup_level)
        return false;
    read_kernel(&ancestor, sizeof(ancestor),
                cgroup + OFFSET_cgroup_ancestors + chosen->cgroup_level * sizeof(ancestor));
    read_kernel(&node, sizeof(node), ancestor + OFFSET_cgroup_kn);
    read_kernel(&identity, sizeof(identity), node + OFFSET_kernfs_node_id);
    return identity == chosen->cgroup_id;
#else
    return true;
#endif
}

/* While a new version takes over, its programs and those of the old one are attached. */
static __always_inline bool is_active(void)
{
    int zero = 0;
    u32 *active = generation.lookup(&zero);
    struct settings *chosen = own_settings();
    return active && chosen && *active == chosen->generation;
}

/* NULL for what is not a TCP socket of the capture. */
static __always_inline void *captured_socket(u64 sock)
{
    if (!is_active())
        return NULL;
    void *socket = tcp_sock_of((void *)sock);
    return socket && is_captured((u64)socket) ? socket : NULL;
}

/* The traced functions take no lock for it, so another one may be first. */
static __always_inline u64 cookie_of(void *socket, bool *had_cookie)
{
    u64 cookie = LOAD(u64, (u64)socket, sock_cookie);
    *had_cookie = cookie != 0;
    return cookie ? cookie : socket_cookie_of(socket);
}

KFUNC_PROBE(inet_csk_listen_start)
{
    bool had_cookie;
    void *socket = captured_socket(ARGUMENT(inet_csk_listen_start, sk));
    if (!socket)
        return 0;
    u64 cookie = cookie_of(socket, &had_cookie);
    listen(socket, cookie, had_cookie);
    return 0;
}

KFUNC_PROBE(tcp_v4_connect)
{
    void *socket = captured_socket(ARGUMENT(tcp_v4_connect, sk));
    if (socket)
        connect((u64)socket, socket);
    return 0;
}

KFUNC_PROBE(tcp_v6_connect)
{
    void *socket = captured_socket(ARGUMENT(tcp_v6_connect, sk));
    if (socket)
        connect((u64)socket, socket);
    return 0;
}

KFUNC_PROBE(tcp_connect)
{
    bool had_cookie;
    void *socket = captured_socket(ARGUMENT(tcp_connect, sk));
    if (!socket)
        return 0;
    u64 cookie = cookie_of(socket, &had_cookie);
    publish((u64)socket, socket, cookie, had_cookie);
    return 0;
}

static __always_inline void establish_child(u64 child)
{
    bool had_cookie;
    void *socket = captured_socket(child);
    if (socket)
        establish((u64)socket, socket, cookie_of(socket, &had_cookie));
}

/* A handshake is complete and its child about to be queued: before anybody can accept
 * it, and with bottom halves off, so never missed. */
KFUNC_PROBE(inet_csk_complete_hashdance)
{
    if ((u8)ARGUMENT(inet_csk_complete_hashdance, own_req)) /* else it is a duplicate */
        establish_child(ARGUMENT(inet_csk_complete_hashdance, child));
    return 0;
}

/* The child of a SYN cookie: there was no request that knew its listener. Others come
 * by here too, unless the compiler has inlined this for them. */
KFUNC_PROBE(inet_csk_reqsk_queue_add)
{
    u64 request = ARGUMENT(inet_csk_reqsk_queue_add, req);
    if (!LOAD(u64, request, request_listener))
        establish_child(ARGUMENT(inet_csk_reqsk_queue_add, child));
    return 0;
}

/* Fast Open's child, whose client is answered before it is queued; and a simultaneous
 * open's socket, which is not queued: it has an owner. */
KFUNC_PROBE(tcp_init_transfer)
{
    if ((u32)ARGUMENT(tcp_init_transfer, bpf_op) != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
        return 0;
    u64 sock = ARGUMENT(tcp_init_transfer, sk);
    void *socket = tcp_sock_of((void *)sock);
    if (socket && (LOAD(u64, (u64)socket, tcp_fastopen_rsk) ||
                   LOAD(u64, (u64)socket, sock_socket)))
        establish_child(sock);
    return 0;
}

/* From here on no bounds are looked at: what is not captured has no record either. */

KRETFUNC_PROBE(inet_csk_accept)
{
    void *socket = tcp_sock_of((void *)RESULT(inet_csk_accept));
    if (socket && is_active())
        accept(LOAD(u64, (u64)socket, sock_cookie));
    return 0;
}

/* Every captured socket has a cookie. */
KFUNC_PROBE(tcp_set_state)
{
    if ((u32)ARGUMENT(tcp_set_state, state) != TCP_CLOSE_STATE || !is_active())
        return 0;
    void *socket = tcp_sock_of((void *)ARGUMENT(tcp_set_state, sk));
    if (!socket)
        return 0;
    u64 cookie = LOAD(u64, (u64)socket, sock_cookie);
    if (cookie)
        closed((u64)socket, socket, cookie, LOAD(u8, (u64)socket, sock_state));
    return 0;
}

/* Runs when the last descriptor of a socket goes, from inet_release(). */
KFUNC_PROBE(tcp_close)
{
    void *socket = tcp_sock_of((void *)ARGUMENT(tcp_close, sk));
    if (!socket || !is_active())
        return 0;
    u64 cookie = LOAD(u64, (u64)socket, sock_cookie);
    if (cookie)
        release(socket, cookie);
    return 0;
}

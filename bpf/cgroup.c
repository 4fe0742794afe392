/* SPDX-License-Identifier: MIT OR GPL-2.0-only
 *
 * The `cgroup` hook set: for kernels that do not let tracing programs attach. Its
 * programs see the sockets created in the cgroup that they are attached to, and
 * below. There is no hook at accept().
 */
#include <bcc/proto.h>
#include "records.h"
#include "maps.h"
#include "kernel.h"
#include "credentials.h"
#include "core.h"
#include "so_peercred.h"

#define BPF_LICENSE Dual MIT/GPL

/* Runs in connect(), before the route is chosen; always lets the call proceed. Not
 * run for AF_UNSPEC (__inet_stream_connect() in net/ipv4/af_inet.c). */
static __always_inline int before_connect(struct bpf_sock_addr *context)
{
    u32 type = context->type;
    KEEP(type);
    u32 protocol = context->protocol;
    KEEP(protocol);
    if (type != SOCK_STREAM || protocol != IPPROTO_TCP)
        return 1;
    void *socket = context->sk;
    KEEP(socket);
    if (!socket)
        return 1;
    socket = tcp_sock_of(socket);
    if (socket)
        connect((u64)socket, socket);
    return 1;
}

int cgroup_connect4(struct bpf_sock_addr *context)
{
    return before_connect(context);
}

int cgroup_connect6(struct bpf_sock_addr *context)
{
    return before_connect(context);
}

/* Runs some ten times in the life of a connection, mostly to return at once. */
int cgroup_sock_ops(struct bpf_sock_ops *context)
{
    u32 operation = context->op;
    KEEP(operation);
    if (operation != BPF_SOCK_OPS_STATE_CB && operation != BPF_SOCK_OPS_TCP_CONNECT_CB &&
        operation != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB &&
        operation != BPF_SOCK_OPS_TCP_LISTEN_CB)
        return 1;

    u32 old_state = context->args[0];
    KEEP(old_state);
    u32 new_state = context->args[1];
    KEEP(new_state);
    if (operation == BPF_SOCK_OPS_STATE_CB && new_state != TCP_CLOSE_STATE)
        return 1;

    void *socket = context->sk;
    KEEP(socket);
    if (!socket)
        return 1;
    socket = tcp_sock_of(socket);
    if (!socket)
        return 1;
    u64 cookie = LOAD(u64, (u64)socket, sock_cookie);
    bool had_cookie = cookie != 0;
    if (!had_cookie)
        cookie = socket_cookie_of(context);
    bool recorded = false;

    if (operation == BPF_SOCK_OPS_STATE_CB)
        closed((u64)socket, socket, cookie, old_state);
    else if (operation == BPF_SOCK_OPS_TCP_CONNECT_CB)
        recorded = publish((u64)socket, socket, cookie, had_cookie);
    else if (operation == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
        recorded = establish((u64)socket, socket, cookie);
    else
        listen(socket, cookie, had_cookie);
    if (recorded) {
        /* Other programs of this cgroup may have set flags of their own. */
        u32 flags = context->bpf_sock_ops_cb_flags;
        KEEP(flags);
        bpf_sock_ops_cb_flags_set(context, flags | BPF_SOCK_OPS_STATE_CB_FLAG);
    }
    return 1;
}

/* Runs when the last descriptor of a socket goes (inet_release()). */
int cgroup_sock_release(struct bpf_sock *context)
{
    u32 protocol = context->protocol;
    KEEP(protocol);
    if (protocol == IPPROTO_TCP)
        release(context, socket_cookie_of(context));
    return 1;
}

/* SPDX-License-Identifier: MIT OR GPL-2.0-only
 *
 * One function per moment in the life of a connection. A hook set calls them with
 * what it gets out of its context:
 *
 *   socket   address of the struct tcp_sock (u64), known to the verifier
 *   storage  what the hook's bpf_sk_storage_get() takes for that socket
 *   cookie   the socket's cookie; had_cookie: it had one before
 *
 * listen, connect, publish, establish and accept run before user space can see their
 * effect; closed and release run when a socket has no more to say.
 */

#define TCP_ESTABLISHED_STATE 1
#define TCP_SYN_SENT_STATE 2
#define TCP_SYN_RECV_STATE 3
#define TCP_FIN_WAIT1_STATE 4
#define TCP_FIN_WAIT2_STATE 5
#define TCP_CLOSE_STATE 7
#define TCP_CLOSE_WAIT_STATE 8
#define TCP_LISTEN_STATE 10

static __always_inline void count_drop(enum drop reason)
{
    int index = reason;
    u64 *count = drops.lookup(&index);
    if (count)
        __sync_fetch_and_add(count, 1);
}

/* ---- watchers ---- */

/* `zero` is any u32 on the stack that is 0: there is no room for more of them. */
static __always_inline bool is_watched(u32 *zero)
{
    u32 *flag = watched.lookup(zero);
    return flag && *flag;
}

static __always_inline void tell_established(struct connection *record, u32 *zero)
{
    struct totals *counted = totals.lookup(zero);
    if (counted)
        counted->established++;
    if (is_watched(zero) && events.ringbuf_output(record, sizeof(*record), 0) != 0)
        count_drop(DROP_EVENT_LOST);
}

static __always_inline void tell_retired(u64 server_cookie, u32 *zero)
{
    struct totals *counted = totals.lookup(zero);
    if (counted)
        counted->retired++;
    if (is_watched(zero) && events.ringbuf_output(&server_cookie, sizeof(server_cookie), 0) != 0)
        count_drop(DROP_EVENT_LOST);
}

/* ---- tuples ---- */

static __always_inline void read_address(u32 to[4], u64 socket, bool local)
{
    if (LOAD(u16, socket, sock_family) == AF_INET6) {
        u64 from = local ? OFFSET_sock_v6_rcv_saddr : OFFSET_sock_v6_daddr;
        read_kernel(to, 16, socket + from);
    } else {
        to[0] = to[1] = 0;
        to[2] = bpf_htonl(0xffff);
        to[3] = local ? LOAD(u32, socket, sock_rcv_saddr) : LOAD(u32, socket, sock_daddr);
    }
}

/* The tuple of a socket that is the client (or the server) of its connection.
 * `to` is zeroed by the caller. */
static __always_inline void read_tuple(u64 socket, bool is_client, struct tuple *to)
{
    u64 net = LOAD(u64, socket, sock_net);
    u16 local = LOAD(u16, socket, sock_num);
    u16 remote = bpf_ntohs(LOAD(u16, socket, sock_dport));

    to->netns_cookie = LOAD(u64, net, net_cookie);
    read_address(to->client_address, socket, is_client);
    read_address(to->server_address, socket, !is_client);
    to->client_port = is_client ? local : remote;
    to->server_port = is_client ? remote : local;
}

/* Local is what the kernel routes over a loopback device: 127/8, ::1 and the
 * host's own addresses, and nothing else. Without a route is only a deferred Fast Open
 * socket that lost it to a setsockopt(); it gets one behind this hook, and should that
 * leave the host, no server socket will ever match. */
static __always_inline bool is_local(u64 socket)
{
    u64 destination = LOAD(u64, socket, sock_dst_cache);
    if (!destination)
        return true;
    u64 device = LOAD(u64, destination, dst_dev);
    return device && LOAD(u32, device, net_device_flags) & IFF_LOOPBACK;
}

/* A tuple is used anew: what it found before, from either end, is not the newest
 * connection any more, whether or not the new one comes to have a record. */
static __always_inline void forget_tuple(struct tuple *tuple)
{
    struct tuple reversed = {
        .netns_cookie = tuple->netns_cookie,
        .client_address = {tuple->server_address[0], tuple->server_address[1],
                           tuple->server_address[2], tuple->server_address[3]},
        .server_address = {tuple->client_address[0], tuple->client_address[1],
                           tuple->client_address[2], tuple->client_address[3]},
        .client_port = tuple->server_port,
        .server_port = tuple->client_port,
    };
    /* Mostly there is nothing, and to look takes no lock. */
    if (by_tuple.lookup(tuple))
        by_tuple.delete(tuple);
    if (by_tuple.lookup(&reversed))
        by_tuple.delete(&reversed);
}

/* ---- why there is no record ---- */

static __always_inline u64 mixed(u64 hash, u64 word)
{
    hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
    return hash ^ hash >> 32;
}

static __always_inline u64 hash_of_tuple(struct tuple *tuple)
{
    u64 *words = (u64 *)tuple, hash = 1; /* not 0: no tuple is a cookie */
#pragma unroll
    for (int i = 0; i < sizeof(*tuple) / sizeof(u64); i++)
        hash = mixed(hash, words[i]);
    return hash;
}

static __always_inline u64 *absence_of(u64 hash)
{
    int slot = hash >> 2 & (ABSENCE_SLOTS - 1);
    return absences.lookup(&slot);
}

static __always_inline void note_absence_of(u64 hash, u64 reason)
{
    u64 *absence = absence_of(hash);
    if (absence)
        *absence = (hash & ~ABSENCE_REASON) | reason;
}

static __always_inline void note_absence(u64 cookie, struct tuple *tuple, u64 reason)
{
    note_absence_of(mixed(0, cookie), reason);
    note_absence_of(hash_of_tuple(tuple), reason);
}

/* An end that is not born yet, or not known, is 0. */
static __always_inline void drop_record(enum drop reason, u64 client_cookie, u64 server_cookie,
                                        struct tuple *tuple)
{
    u64 absence = reason == DROP_PENDING_FULL || reason == DROP_CONNECTIONS_FULL ||
                          reason == DROP_INDEX_FULL || reason == DROP_USER_OVER_SHARE
                      ? ABSENT_TABLE_WAS_FULL
                      : ABSENT_NOT_RECORDED;
    count_drop(reason);
    note_absence(client_cookie, tuple, absence);
    note_absence_of(mixed(0, server_cookie), absence);
}

/* ---- shares ----
 *
 * What is in `pending` counts against the user that connects, and so does what is in
 * `connections`, until the client has gone. From then on it is kept for the server, which may
 * never close it, or have been flooded: which of the two means harm cannot be told, so it
 * counts against the pair of them, and neither takes a share of the other. Whoever succeeds in
 * removing an entry gives back. The limits are looked at without a lock: each CPU may exceed
 * one by one.
 */

/* NULL where there is no room to count another user. */
static __always_inline struct user *user_of(u32 uid)
{
    struct user *user = users.lookup(&uid);
    if (user)
        return user;
    struct user none = {};
    users.insert(&uid, &none);
    return users.lookup(&uid);
}

static __always_inline struct settings *own_settings(void)
{
    int zero = 0;
    return settings.lookup(&zero);
}

static __always_inline bool may_connect(u32 uid, struct user *user)
{
    struct settings *chosen = own_settings();
    if (!chosen)
        return false;
    if (!user || (user->pending < chosen->pending_share &&
                  user->pending + user->connections < chosen->connections_share))
        return true;
    struct user *over = users_over.lookup(&uid);
    if (!over)
        return false;
    s32 pending = user->pending - over->pending;
    s32 connections = user->connections - over->connections;
    return pending < chosen->pending_share && pending + connections < chosen->connections_share;
}

static __always_inline bool may_leave_more(struct pair *pair)
{
    struct settings *chosen = own_settings();
    s32 *count = left.lookup(pair);
    if (!chosen)
        return false;
    if (!count || *count < chosen->left_share)
        return true;
    s32 *over = left_over.lookup(pair);
    return over && *count - *over < chosen->left_share;
}

static __always_inline bool may_have_more_resets(u32 uid, struct user *user)
{
    struct settings *chosen = own_settings();
    if (!chosen)
        return false;
    if (!user || user->resets < chosen->connections_share)
        return true;
    struct user *over = users_over.lookup(&uid);
    return over && user->resets - over->resets < chosen->connections_share;
}

static __always_inline s32 *left_by(struct pair *pair)
{
    s32 *count = left.lookup(pair);
    if (count)
        return count;
    s32 none = 0;
    left.insert(pair, &none);
    return left.lookup(pair);
}

/* The client has gone, and the record stays for the server. False if the client goes on to
 * pay: its listener is not known, or there is no room to count. */
static __always_inline bool leave(struct connection *record)
{
    if (!record->listener_cookie)
        return false;
    struct pair pair = {record->client.charged_uid, record->listener.charged_uid};
    s32 *count = left_by(&pair);
    if (!count)
        return false;
    __sync_fetch_and_add(count, 1);
    record->left = 1;
    return true;
}

static __always_inline void remove_pending(struct tuple *tuple)
{
    struct pending *entry = pending.lookup(tuple);
    if (!entry)
        return;
    u32 uid = entry->client.charged_uid;
    if (pending.delete(tuple) != 0)
        return;
    struct user *user = users.lookup(&uid);
    if (user)
        __sync_fetch_and_add(&user->pending, -1);
}

/* False if another CPU was faster. */
static __always_inline bool remove_connection(u64 server_cookie, struct connection *record)
{
    struct pair pair = {record->client.charged_uid, record->listener.charged_uid};
    bool was_left = record->left;
    if (connections.delete(&server_cookie) != 0)
        return false;
    if (was_left) {
        s32 *count = left.lookup(&pair);
        if (count)
            __sync_fetch_and_add(count, -1);
    } else {
        struct user *user = users.lookup(&pair.client_uid);
        if (user)
            __sync_fetch_and_add(&user->connections, -1);
    }
    return true;
}

static __always_inline void remove_reset(u64 listener_cookie)
{
    u32 *charged = reset_in_queue.lookup(&listener_cookie);
    if (!charged)
        return;
    u32 uid = *charged;
    if (reset_in_queue.delete(&listener_cookie) != 0)
        return;
    struct user *user = users.lookup(&uid);
    if (user)
        __sync_fetch_and_add(&user->resets, -1);
}

/* ---- retire ---- */

static __always_inline void forget(u64 server_cookie, struct connection *record)
{
    struct tuple tuple = record->tuple;
    note_absence(server_cookie, &tuple, ABSENT_RETIRED);
    /* A newer connection of the same tuple owns the index now. Should it take it
     * over between these two calls, it loses the index, not its record: its own
     * cookie still finds it, and the sweeper mends the index. */
    u64 *newest = by_tuple.lookup(&tuple);
    if (newest && *newest == server_cookie)
        by_tuple.delete(&tuple);
    if (remove_connection(server_cookie, record))
        tell_retired(server_cookie, &tuple.padding);
}

/* Each end of a connection counts itself once; the later of the two retires it. */
static __always_inline void end_gone(u64 server_cookie, struct connection *record)
{
    __sync_fetch_and_add(&record->ends_gone, 1);
    if (record->ends_gone >= 2)
        forget(server_cookie, record);
}

static __always_inline void server_end_gone(struct server_socket *server, u64 cookie)
{
    if (server->gone)
        return;
    server->gone = 1;
    struct connection *record = connections.lookup(&cookie);
    if (!record)
        return;
    record->server_gone = 1;
    end_gone(cookie, record);
}

static __always_inline void client_end_gone(u64 cookie)
{
    u64 *found = by_client.lookup(&cookie);
    if (!found)
        return;
    u64 server_cookie = *found;
    /* Only one of several that close the same socket at once succeeds here. Until it has
     * counted itself, the other end cannot retire the record. */
    if (by_client.delete(&cookie) != 0)
        return;
    struct connection *record = connections.lookup(&server_cookie);
    if (!record)
        return;
    if (!record->server_gone && leave(record)) {
        u32 uid = record->client.charged_uid;
        struct user *user = users.lookup(&uid);
        if (user)
            __sync_fetch_and_add(&user->connections, -1);
    }
    end_gone(server_cookie, record);
}

/* The last descriptor of a socket goes: its owner cannot ask any more. */
static __always_inline void release(void *storage, u64 cookie)
{
    struct server_socket *server = server_sockets.sk_storage_get(storage, 0, 0);
    if (server && server->role == ROLE_CHILD) {
        server_end_gone(server, cookie);
        if (!server->is_client)
            return;
    } else if (server && server->role == ROLE_LISTENER) {
        remove_reset(cookie);
    }
    client_end_gone(cookie);
}

/* A socket may be disconnected (connect() with AF_UNSPEC) and used again, by
 * anybody, in any role: what it carried before is not the next user's. One that
 * nobody has asked for its cookie yet carries nothing. */
static __always_inline void wipe(void *storage, u64 cookie, bool had_cookie)
{
    if (!had_cookie)
        return;
    release(storage, cookie);
    server_sockets.sk_storage_delete(storage);
}

/* Whether a socket reached TCP_CLOSE because its owner disconnected it. What the
 * peer or the protocol does from these states sets sk_err first (tcp_reset() in
 * net/ipv4/tcp_input.c, tcp_write_err() in tcp_timer.c, tcp_abort() in tcp.c), or
 * SOCK_DONE (tcp_fin() in tcp_input.c); tcp_disconnect() changes the state before it
 * sets anything. */
static __always_inline bool was_disconnected(u64 socket, u32 old_state)
{
    bool fin_received = LOAD(u64, socket, sock_flags) & SOCK_DONE;
    return (old_state == TCP_ESTABLISHED_STATE || old_state == TCP_CLOSE_WAIT_STATE ||
            old_state == TCP_FIN_WAIT1_STATE || old_state == TCP_SYN_RECV_STATE ||
            (old_state == TCP_FIN_WAIT2_STATE && !fin_received)) &&
           LOAD(u32, socket, sock_err) == 0;
}

/* A pending connect() that cannot have a server socket any more, or that had one
 * where nobody captures. Its server socket may be born yet if the server has
 * acknowledged no more than the SYN (our last ACK may be in a queue), or if the SYN
 * carried data and was not refused: the sweeper decides. */
static __always_inline void drop_pending(u64 socket, u64 cookie, u32 old_state, bool over)
{
    struct tuple tuple = {};
    read_tuple(socket, true, &tuple);
    struct pending *entry = pending.lookup(&tuple);
    if (!entry || entry->client_cookie != cookie)
        return;
    u32 acknowledged = LOAD(u32, socket, tcp_snd_una) - entry->initial_sequence;
    bool refused = LOAD(u32, socket, sock_err) != 0 ||
                   !(LOAD(u8, socket, tcp_syn_data) & MASK_tcp_syn_data);
    if ((old_state == TCP_SYN_SENT_STATE && refused) || old_state >= TCP_CLOSE_WAIT_STATE ||
        acknowledged > 1)
        remove_pending(&tuple);
    else if (over)
        __sync_fetch_and_add(&entry->client_gone, 1);
}

/* A server socket was reset before accept(). Should nobody accept it, no event tells
 * when it goes; but one tells when its listener does, and the sweeper looks there. */
static __always_inline void wait_in_queue(struct connection *record, struct server_socket *server,
                                          u64 cookie)
{
    u64 listener_cookie = record->listener_cookie;
    u32 uid = record->listener.charged_uid;
    enum drop reason = DROP_USER_OVER_SHARE;
    record->closed_in_queue = 1;
    if (!listener_cookie || reset_in_queue.lookup(&listener_cookie))
        return;
    struct user *user = user_of(uid);
    if (may_have_more_resets(uid, user)) {
        if (reset_in_queue.insert(&listener_cookie, &uid) == 0) {
            if (user)
                __sync_fetch_and_add(&user->resets, 1);
            return;
        }
        if (reset_in_queue.lookup(&listener_cookie)) /* another CPU was faster */
            return;
        reason = DROP_INDEX_FULL;
    }
    count_drop(reason);
    server_end_gone(server, cookie);
}

/* A socket reaches TCP_CLOSE. If a descriptor is left its owner can still ask: after
 * a reset, unread data is still there and AF_UNIX still names the peer. Without one,
 * a server socket that was reset waits for accept(), which will hand it out. */
static __always_inline void closed(u64 socket, void *storage, u64 cookie, u32 old_state)
{
    struct server_socket *own = server_sockets.sk_storage_get(storage, 0, 0);
    struct server_socket *server = own && own->role == ROLE_CHILD ? own : NULL;
    if (server && server->gone && !server->is_client)
        return;

    bool has_descriptor = LOAD(u64, socket, sock_socket) != 0;
    bool in_queue = server && !has_descriptor && LOAD(u32, socket, sock_err) != 0;
    /* A subflow of MPTCP has no descriptor of its own: no release will come. */
    bool over = (!has_descriptor && !in_queue) || was_disconnected(socket, old_state) ||
                old_state == TCP_SYN_SENT_STATE || /* it never had a peer to ask about */
                LOAD(u8, socket, tcp_is_mptcp) & MASK_tcp_is_mptcp;
    if (!server) {
        drop_pending(socket, cookie, old_state, over);
        if (over) {
            if (own && own->role == ROLE_CLIENT)
                own->gone = 1;
            client_end_gone(cookie);
        } else {
            u64 *found = by_client.lookup(&cookie);
            struct connection *record = found ? connections.lookup(found) : NULL;
            if (record)
                record->client_closed_with_descriptor = 1;
        }
    } else if (over) {
        release(storage, cookie);
    } else {
        struct connection *record = connections.lookup(&cookie);
        if (record && in_queue)
            wait_in_queue(record, server, cookie);
        else if (record)
            record->closed_with_descriptor = 1;
    }
}

/* ---- listen ---- */

static __always_inline void listen(void *storage, u64 cookie, bool had_cookie)
{
    wipe(storage, cookie, had_cookie);
    server_sockets.sk_storage_delete(storage); /* of its own listener, if it was a child */
    struct server_socket *server =
        server_sockets.sk_storage_get(storage, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (!server) {
        count_drop(DROP_NO_STORAGE);
        return;
    }
    enum drop reason = read_credentials(&server->listener);
    if (reason != DROP_NONE) {
        count_drop(reason);
        server_sockets.sk_storage_delete(storage);
        return;
    }
    server->listener_cookie = cookie;
    server->role = ROLE_LISTENER;
}

/* ---- connect ---- */

/* Credentials are kept from here to publish only for a socket whose SYN may
 * leave in another task's name: its first write() after a deferred Fast Open. */
static __always_inline void connect(u64 socket, void *storage)
{
    connecting.sk_storage_delete(storage);
    if (!(LOAD(u8, socket, tcp_fastopen_connect) & MASK_tcp_fastopen_connect))
        return;
    /* Nor does it get to publish before that: until then it must not name an old peer. */
    u64 cookie = LOAD(u64, socket, sock_cookie);
    wipe(storage, cookie, cookie != 0);
    struct credentials client = {};
    enum drop reason = read_credentials(&client);
    if (reason != DROP_NONE)
        count_drop(reason);
    else if (!connecting.sk_storage_get(storage, &client, BPF_SK_STORAGE_GET_F_CREATE))
        count_drop(DROP_NO_STORAGE);
}

/* ---- publish ---- */

/* The SYN is about to leave; the server may accept before connect() returns. True if
 * the connection was recorded: `closed` must see this socket then. */
static __always_inline bool publish(u64 socket, void *storage, u64 cookie, bool had_cookie)
{
    struct tuple tuple = {};

    wipe(storage, cookie, had_cookie);
    if (!is_local(socket))
        return false;

    read_tuple(socket, true, &tuple);
    forget_tuple(&tuple);
    /* Not before: what ran until here has used its place on the stack. */
    struct pending entry = {};
    entry.published_ns = boot_time_ns();
    entry.client_cookie = cookie;
    entry.initial_sequence = LOAD(u32, socket, tcp_write_seq);

    enum drop reason = DROP_NONE;
    if (LOAD(u8, socket, tcp_fastopen_connect) & MASK_tcp_fastopen_connect) {
        struct credentials *stash = connecting.sk_storage_get(storage, 0, 0);
        if (stash)
            entry.client = *stash;
        else
            reason = DROP_DEFERRED_UNKNOWN;
        connecting.sk_storage_delete(storage);
    } else {
        reason = read_credentials(&entry.client);
    }
    struct user *user = NULL;
    if (reason == DROP_NONE) {
        user = user_of(entry.client.charged_uid);
        if (!may_connect(entry.client.charged_uid, user))
            reason = DROP_USER_OVER_SHARE;
    }
    if (reason == DROP_NONE && pending.insert(&tuple, &entry) != 0) {
        remove_pending(&tuple); /* an earlier connect() of the same tuple left one */
        if (pending.insert(&tuple, &entry) != 0)
            reason = DROP_PENDING_FULL;
    }
    if (reason == DROP_NONE) {
        if (user)
            __sync_fetch_and_add(&user->pending, 1);
        return true;
    }
    /* What an earlier connect() of the same tuple left must not answer for this. */
    remove_pending(&tuple);
    drop_record(reason, cookie, 0, &tuple);
    return false;
}

/* ---- establish ---- */

/* A child without a pending connect(): its client is not captured, or was dropped
 * at publish, and then the child inherits the reason. */
static __always_inline void inherit_absence(u64 server_cookie, struct tuple *tuple)
{
    u64 hash = hash_of_tuple(tuple);
    u64 *absence = absence_of(hash);
    if (!absence || (*absence ^ hash) & ~ABSENCE_REASON)
        return;
    u64 reason = *absence & ABSENCE_REASON;
    if (reason != ABSENT_RETIRED)
        note_absence_of(mixed(0, server_cookie), reason);
}

/* A child that gets no record must not have another's: the cgroup hook of listen() runs
 * when children can be born already, and the first may have inherited what their listener
 * was before, an accepted socket or a client's. */
static __always_inline void disinherit(void *storage)
{
    struct server_socket *server = server_sockets.sk_storage_get(storage, 0, 0);
    if (server && server->role != ROLE_LISTENER)
        server_sockets.sk_storage_delete(storage);
}

/* Fills the record of a new server socket, all but the time that makes it valid.
 * DROP_NONE, or why it must go again. `client_gone` is set if the client's end has been
 * counted here. */
static __always_inline enum drop fill(struct connection *record, struct pending *entry,
                                      struct server_socket *server, struct tuple *tuple,
                                      u64 server_cookie, u32 initial_sequence,
                                      bool *client_gone)
{
    u64 published_ns = entry->published_ns;
    u64 client_cookie = entry->client_cookie;

    record->server_cookie = server_cookie;
    record->client_cookie = client_cookie;
    record->tuple = *tuple;
    record->client = entry->client;
    if (server->role == ROLE_LISTENER) {
        record->listener_cookie = server->listener_cookie;
        record->listener = server->listener;
    }
    /* The entry may have been deleted and its memory used again since it was found,
     * for another tuple or for this one. If the same connect() of this very SYN is
     * there, it was not. */
    entry = pending.lookup(tuple);
    if (!entry || entry->published_ns != published_ns || entry->client_cookie != client_cookie ||
        entry->initial_sequence != initial_sequence)
        return DROP_OVERTAKEN;

    /* A client that is gone by now is counted here. One that goes meanwhile sets the
     * mark before it looks for its pointer, and the pointer is written before the mark
     * is read again: whoever deletes the pointer counts. */
    if (entry->client_gone) {
        record->ends_gone = 1;
        *client_gone = true;
    } else {
        if (by_client.update(&client_cookie, &server_cookie) != 0)
            return DROP_INDEX_FULL;
        if (entry->client_gone && by_client.delete(&client_cookie) == 0) {
            __sync_fetch_and_add(&record->ends_gone, 1);
            *client_gone = true;
        }
    }
    if (by_tuple.update(tuple, &server_cookie) != 0) {
        by_client.delete(&client_cookie);
        return DROP_INDEX_FULL;
    }
    return DROP_NONE;
}

/* An empty record. A socket that was another connection's server before, and is used again,
 * may have left one there. NULL if there is no room. */
static __always_inline struct connection *add_connection(u64 server_cookie)
{
    int zero = 0;
    struct connection *empty = empty_connection.lookup(&zero);
    if (!empty)
        return NULL;
    if (connections.insert(&server_cookie, empty) != 0) {
        struct connection *earlier = connections.lookup(&server_cookie);
        if (!earlier)
            return NULL;
        remove_connection(server_cookie, earlier);
        if (connections.insert(&server_cookie, empty) != 0)
            return NULL;
    }
    return connections.lookup(&server_cookie);
}

/* A server socket is born; nobody has a descriptor of it yet, or will have before
 * this returns (accept() takes the lock that is held here). True if recorded. */
static __always_inline bool establish(u64 socket, void *storage, u64 server_cookie)
{
    struct tuple tuple = {};

    read_tuple(socket, false, &tuple);
    struct pending *entry = pending.lookup(&tuple);
    if (!entry) {
        disinherit(storage);
        forget_tuple(&tuple);
        inherit_absence(server_cookie, &tuple);
        return false;
    }
    u32 initial_sequence = LOAD(u32, socket, tcp_rcv_nxt) - 1;
    if (entry->initial_sequence != initial_sequence) {
        disinherit(storage);
        forget_tuple(&tuple);
        drop_record(DROP_OTHER_SYN, 0, server_cookie, &tuple);
        return false;
    }

    enum drop reason;
    bool client_gone = false;
    u64 client_cookie = entry->client_cookie;
    struct server_socket *server =
        server_sockets.sk_storage_get(storage, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (!server) {
        reason = DROP_NO_STORAGE;
        goto dropped;
    }
    if (server->role == ROLE_LISTENER) {
        struct pair pair = {entry->client.charged_uid, server->listener.charged_uid};
        if (!may_leave_more(&pair)) {
            reason = DROP_USER_OVER_SHARE;
            goto dropped;
        }
    }
    struct connection *record = add_connection(server_cookie);
    if (!record) {
        reason = DROP_CONNECTIONS_FULL;
        goto dropped;
    }
    reason = fill(record, entry, server, &tuple, server_cookie, initial_sequence, &client_gone);
    if (reason != DROP_NONE) {
        connections.delete(&server_cookie); /* nobody has been charged for it yet */
        goto dropped;
    }
    server->role = ROLE_CHILD;
    server->gone = 0;
    server->cookie = server_cookie;
    server->peer_tgid = record->client.tgid;
    server->peer_euid = record->client.euid;
    server->peer_egid = record->client.egid;
    server->is_client = LOAD(u64, socket, sock_socket) != 0;
    /* An atomic operation, so that it is not moved before what it vouches for. */
    __sync_fetch_and_add(&record->established_ns, boot_time_ns());
    bool was_pending = pending.delete(&tuple) == 0;
    u32 uid = record->client.charged_uid;
    struct user *user = users.lookup(&uid);
    if (user && was_pending)
        __sync_fetch_and_add(&user->pending, -1);
    if (!(client_gone && leave(record)) && user)
        __sync_fetch_and_add(&user->connections, 1);
    tell_established(record, &tuple.padding);
    return true;

dropped:
    disinherit(storage);
    remove_pending(&tuple);
    forget_tuple(&tuple);
    drop_record(reason, client_cookie, server_cookie, &tuple);
    return false;
}

/* ---- accept ---- */

/* The accepted socket is about to get a descriptor. Its record is there already, if it
 * has one at all, where establish ran before the socket was queued. A kernel thread
 * that accepts stays unnamed. */
static __always_inline void accept(u64 cookie)
{
    struct credentials acceptor = {};
    struct connection *record = connections.lookup(&cookie);

    if (!record || record->accepted_ns || read_credentials(&acceptor) != DROP_NONE)
        return;
    record->acceptor = acceptor;
    __sync_fetch_and_add(&record->accepted_ns, acceptor.time_ns);
}

/* SPDX-License-Identifier: MIT OR GPL-2.0-only
 *
 * SO_PEERCRED and SO_PEERGROUPS of TCP sockets, for programs that know nothing of this:
 * what the kernel's own handlers (sk_getsockopt() in net/core/sock.c) say of an AF_UNIX
 * socket. The program runs behind them, under the socket's lock, for sockets created in
 * the cgroups that it is attached to.
 */
#ifdef SO_PEERCRED_IS_POSSIBLE

#define SOL_SOCKET 1
#define SO_PEERCRED 17
#define SO_PEERGROUPS 59
#define IPPROTO_MPTCP 262
#define ERANGE 34
#define ENODATA 61
#define EXTENT_STEPS 9     /* to halve UID_GID_MAP_MAX_EXTENTS, 340, down to 0 */

static int (*set_return_value)(int value) = (void *)BPF_FUNC_set_retval;
#ifdef CAST_TO_KERN_CTX
/* No call: the verifier makes a move of it. */
static u64 (*kernel_context)(void *context) = (void *)CAST_TO_KERN_CTX;
#endif

/* struct ucred, and what it is where the kernel knows nobody. */
struct peer {
    u32 pid;
    u32 uid;
    u32 gid;
};
#define NO_PEER ((struct peer){0, -1, -1})

/* Its pid and uid, and those of a server_socket's peer, with one load and one store: on the way
 * that nearly every call takes. */
static __always_inline u64 pid_and_uid(void *from)
{
    u64 both;
    __builtin_memcpy(&both, __builtin_assume_aligned(from, sizeof(both)), sizeof(both));
    return both;
}

static __always_inline void set_pid_and_uid(void *to, u64 both)
{
    __builtin_memcpy(__builtin_assume_aligned(to, sizeof(both)), &both, sizeof(both));
}

/* A user namespace's map of uids or of gids. */
struct extent {
    u32 first;
    u32 lower_first;
    u32 count;
};
struct id_map {
    u64 sorted; /* by lower_first; NULL where `extents` has all */
    u32 count;
    struct extent extents[MAX_BASE_EXTENTS];
};

/* What lies behind it is not known to the verifier, so it is read by helper. This type
 * of program gets no other way to the socket. */
static __always_inline u64 address_of_socket(struct bpf_sockopt *context)
{
    u64 socket = 0;
    read_kernel(&socket, sizeof(socket), (u64)context + OFFSET_sockopt_sk);
    return socket;
}

static __always_inline u64 cookie_at(u64 socket)
{
    u64 cookie = 0;
    read_kernel(&cookie, sizeof(cookie), socket + OFFSET_sock_cookie);
    return cookie;
}

/* Somebody's credentials, and the record that they stand in, if it is one. */
struct found {
    struct credentials *credentials;
    struct connection *record;
    u64 server_cookie;
};

static __always_inline bool find_by_server(u64 cookie, struct found *found)
{
    struct connection *record = connections.lookup(&cookie);
    if (!record || !record->established_ns || record->server_gone)
        return false;
    *found = (struct found){&record->client, record, cookie};
    return true;
}

static __always_inline bool find_by_client(u64 cookie, struct found *found)
{
    u64 *server_cookie = by_client.lookup(&cookie);
    if (!server_cookie)
        return false;
    u64 server = *server_cookie;
    struct connection *record = connections.lookup(&server);
    if (!record || !record->established_ns || record->client_cookie != cookie ||
        !record->listener_cookie)
        return false;
    *found = (struct found){&record->listener, record, server};
    return true;
}

/* Whom AF_UNIX would name: who connected, who listens, or oneself on a listener. False
 * where that is not known. */
static __always_inline bool find_peer(struct bpf_sockopt *context, struct bpf_sock *socket,
                                      struct found *found)
{
    u64 address = address_of_socket(context), first = 0;

    if (socket->protocol == IPPROTO_MPTCP) {
        /* Its own cookie may be its listener's; that of its first subflow never is. */
#ifdef OFFSET_mptcp_first
        read_kernel(&first, sizeof(first), address + OFFSET_mptcp_first);
#endif
        if (!first)
            return false;
        u64 cookie = cookie_at(first);
        return find_by_server(cookie, found) || find_by_client(cookie, found);
    }
    struct server_socket *server = server_sockets.sk_storage_get(socket, 0, 0);
    if (server && server->role == ROLE_CHILD)
        return find_by_server(server->cookie, found);
    /* A child without a record has its listener's storage, but does not listen. */
    if (server && server->role == ROLE_LISTENER && socket->state == TCP_LISTEN_STATE) {
        *found = (struct found){&server->listener};
        return true;
    }
    return find_by_client(cookie_at(address), found);
}

/* Whether what was read since is of that record: a subflow of MPTCP may end meanwhile, and
 * the memory become another connection's. The atomic operation keeps the order. */
static __always_inline bool is_still(struct found *found)
{
    struct connection *record = found->record;
    return !record || (__sync_fetch_and_add(&record->established_ns, 0) &&
                       record->server_cookie == found->server_cookie);
}

/* ---- the caller's namespaces ---- */

/* The inode number of a pid namespace may be used again. It is the one that was written
 * down if its first process is older than that. */
static __always_inline bool is_older(u64 pid_namespace, u64 time_ns)
{
    u64 reaper = 0, leader = 0, started_ns = 0;
    return !read_kernel(&reaper, 8, pid_namespace + OFFSET_pid_namespace_reaper) &&
           !read_kernel(&leader, 8, reaper + OFFSET_task_group_leader) &&
           !read_kernel(&started_ns, 8, leader + OFFSET_task_start_boottime) &&
           started_ns <= time_ns;
}

/* As pid_vnr() (kernel/pid.c): the number in the caller's namespace, or 0. False where it
 * was not written down. */
static __always_inline bool pid_seen_by(u64 task, struct credentials *peer, u32 *number)
{
    u64 pid = LOAD(u64, task, task_thread_pid), namespace = 0;
    u32 level = LOAD(u32, pid, pid_level), inode = 0;

    if (level == 0) {
        *number = peer->tgid;
        return true;
    }
    if (!(peer->known & HAS_PID_NAMESPACE))
        return false;
    *number = 0;
    if (level > peer->pid_level)
        return true;
    if (level > MAX_PID_LEVELS ||
        read_kernel(&namespace, 8, pid + OFFSET_pid_numbers + level * SIZE_upid + OFFSET_upid_ns) ||
        read_kernel(&inode, 4, namespace + OFFSET_pid_namespace_inum))
        return false;
    u64 place = 2 * (u64)(level - 1);
    KEEP(place); /* the verifier must see the bound on this very register */
    if (place > 2 * (MAX_PID_LEVELS - 1))
        return false;
    if (peer->pids[place + 1] == inode && is_older(namespace, peer->time_ns))
        *number = peer->pids[place];
    return true;
}

/* False if it could not be read. */
static __always_inline bool read_id_map(u64 map, struct id_map *to)
{
    if (read_kernel(&to->count, sizeof(to->count), map + OFFSET_id_map_count))
        return false;
    if (to->count > MAX_BASE_EXTENTS)
        return !read_kernel(&to->sorted, sizeof(to->sorted), map + OFFSET_id_map_reverse);
    return !read_kernel(to->extents, sizeof(to->extents), map + OFFSET_id_map_extent);
}

/* As from_kuid_munged() (kernel/user_namespace.c). */
static __always_inline u32 mapped(struct id_map *map, u32 id, u32 overflow)
{
    struct extent extent = {};

    if (!map->sorted) {
#pragma unroll
        for (int i = 0; i < MAX_BASE_EXTENTS; i++) {
            extent = map->extents[i];
            if (i < map->count && id - extent.lower_first < extent.count)
                return extent.first + (id - extent.lower_first);
        }
        return overflow;
    }
    u32 low = 0, high = map->count;
    for (int step = 0; step < EXTENT_STEPS && low < high; step++) {
        u32 middle = (low + high) / 2;
        if (read_kernel(&extent, sizeof(extent), map->sorted + middle * sizeof(extent)))
            return overflow;
        if (id < extent.lower_first)
            high = middle;
        else if (id - extent.lower_first >= extent.count)
            low = middle + 1;
        else
            return extent.first + (id - extent.lower_first);
    }
    return overflow;
}

/* ---- the options ---- */

/* As cred_to_ucred() (net/core/sock.c). */
static __always_inline bool see(struct credentials *credentials, struct peer *to)
{
    u64 task = current_task();
    u64 namespace = LOAD(u64, LOAD(u64, task, task_cred), cred_user_ns);

    if (!pid_seen_by(task, credentials, &to->pid))
        return false;
    to->uid = credentials->euid;
    to->gid = credentials->egid;
    if (LOAD(u32, namespace, user_namespace_level) == 0)
        return true;
    struct id_map map = {};
    if (!read_id_map(namespace + OFFSET_user_namespace_uid_map, &map))
        return false;
    to->uid = mapped(&map, to->uid, OVERFLOW_UID);
    map.sorted = 0;
    if (!read_id_map(namespace + OFFSET_user_namespace_gid_map, &map))
        return false;
    to->gid = mapped(&map, to->gid, OVERFLOW_GID);
    return true;
}

/* The caller's task. With the kernel's own context no helper need be called, which takes a third of
 * the time that an answer at once does, where returns are made safe. */
static __always_inline u64 caller(struct bpf_sockopt *context)
{
#ifdef CAST_TO_KERN_CTX
    return LOAD(u64, kernel_context(context), sockopt_task);
#else
    return current_task();
#endif
}

/* What the socket itself carries is enough for a caller in the initial namespaces, which is
 * nearly every one. */
static __always_inline bool see_at_once(struct bpf_sockopt *context, struct bpf_sock *socket,
                                        struct peer *to)
{
    u64 task = caller(context);
    struct server_socket *server = server_sockets.sk_storage_get(socket, 0, 0);

    if (!server || (server->role != ROLE_CHILD && server->role != ROLE_CLIENT) || server->gone ||
        LOAD(u32, LOAD(u64, task, task_thread_pid), pid_level) ||
        LOAD(u32, LOAD(u64, LOAD(u64, task, task_cred), cred_user_ns), user_namespace_level))
        return false;
    set_pid_and_uid(to, pid_and_uid(&server->peer_tgid));
    to->gid = server->peer_egid;
    return true;
}

/* A client that asks for a second time gets the answer kept with its socket. Not at the first:
 * most never ask again, and storage takes longer to make than a record to find. Whatever ends
 * its connection, or begins another one, marks it as gone or deletes it. */
static __always_inline void keep_listener(struct bpf_sock *socket, struct connection *record,
                                          struct peer *listener)
{
    if (!record->client_asked) {
        record->client_asked = 1;
        return;
    }
    struct server_socket *own =
        server_sockets.sk_storage_get(socket, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (!own || own->role != ROLE_NONE)
        return;
    own->peer_tgid = listener->pid;
    own->peer_euid = listener->uid;
    own->peer_egid = listener->gid;
    own->role = ROLE_CLIENT;
}

static __always_inline bool see_in_record(struct bpf_sockopt *context, struct bpf_sock *socket,
                                          struct peer *to)
{
    struct found found = {};

    if (!find_peer(context, socket, &found) || !see(found.credentials, to))
        return false;
    struct credentials *peer = found.credentials;
    struct peer unseen = {peer->tgid, peer->euid, peer->egid};
    if (!is_still(&found))
        return false;
    struct connection *record = found.record;
    if (record && peer == &record->listener && socket->protocol == IPPROTO_TCP)
        keep_listener(socket, record, &unseen);
    return true;
}

/* Whether a buffer that is too short for all of it has what the kernel says of nobody. */
static __always_inline bool says_nobody(struct bpf_sockopt *context, s32 length)
{
    struct peer nobody = NO_PEER;
    u8 *value = context->optval;
    KEEP(value);
    u8 *end = context->optval_end;
    KEEP(end);

#pragma unroll
    for (int i = 0; i < sizeof(nobody); i++)
        if (i < length && (value + i + 1 > end || value[i] != ((u8 *)&nobody)[i]))
            return false;
    return true;
}

static __always_inline void write_as_much_as_fits(struct bpf_sockopt *context, s32 length,
                                                  struct peer *peer)
{
    u8 *value = context->optval;
    KEEP(value);
    u8 *end = context->optval_end;
    KEEP(end);

    if (length == sizeof(*peer) && value + sizeof(*peer) <= end) {
        *(struct peer *)value = *peer;
        return;
    }
#pragma unroll
    for (int i = 0; i < sizeof(*peer); i++)
        if (i < length && value + i + 1 <= end)
            value[i] = ((u8 *)peer)[i];
}

/* Replaces what the kernel has answered, if that is nobody: it, or another program, may
 * know better. As many bytes as it has answered with; should it have failed, it goes on
 * to fail. */
static __always_inline void give_credentials(struct bpf_sockopt *context, struct bpf_sock *socket)
{
    struct peer peer = {}, nobody = NO_PEER;
    u64 length = (u32)context->optlen;
    KEEP(length);
    u8 *value = context->optval;
    KEEP(value);
    u8 *end = context->optval_end;
    KEEP(end);

    if (value + sizeof(peer) <= end) {
        struct peer *answer = (struct peer *)value;
        if (length != sizeof(peer) || pid_and_uid(answer) != pid_and_uid(&nobody) ||
            answer->gid != nobody.gid || see_at_once(context, socket, answer))
            return;
    } else if (!says_nobody(context, length)) {
        return;
    }
    if (see_in_record(context, socket, &peer) || see_at_once(context, socket, &peer))
        write_as_much_as_fits(context, length, &peer);
}

/* No groups at all are not given: an empty answer would leave the caller's length as it
 * was, and so hand out what happens to be in the caller's buffer. */
static __always_inline void give_groups(struct bpf_sockopt *context, struct bpf_sock *socket)
{
    s32 result = context->retval;
    KEEP(result);
    s32 room = context->optlen;
    KEEP(room);
    u32 *value = context->optval;
    KEEP(value);
    u32 *end = context->optval_end;
    KEEP(end);
    struct found found = {};

    if (result != -ENODATA || !find_peer(context, socket, &found))
        return;
    u32 count = found.credentials->group_count;
    if (count == 0 || count > MAX_GROUPS)
        return;
    s32 length = count * sizeof(*value);
    if (room < length) {
        if (is_still(&found))
            set_return_value(-ERANGE);
        return;
    }
    u64 namespace = LOAD(u64, LOAD(u64, current_task(), task_cred), cred_user_ns);
    bool is_nested = LOAD(u32, namespace, user_namespace_level) != 0;
    struct id_map map = {};
    if (is_nested && !read_id_map(namespace + OFFSET_user_namespace_gid_map, &map))
        return;
    for (u64 i = 0; i < count; i++) {
        KEEP(i); /* the verifier must see the bound on this very register */
        if (i >= MAX_GROUPS || value + i + 1 > end)
            return;
        u32 group = found.credentials->groups[i];
        value[i] = is_nested ? mapped(&map, group, OVERFLOW_GID) : group;
    }
    if (!is_still(&found))
        return;
    context->optlen = length;
    set_return_value(0);
}

/* A socket that was disconnected has no port there, and one that connects has no peer yet. */
static __always_inline bool has_peer(struct bpf_sock *socket)
{
    return socket->state == TCP_LISTEN_STATE ||
           (socket->dst_port && socket->state != TCP_SYN_SENT_STATE);
}

int so_peercred_getsockopt(struct bpf_sockopt *context)
{
    u64 level = (u32)context->level;
    KEEP(level);
    u64 option = (u32)context->optname;
    KEEP(option);
    if (level == SOL_SOCKET && (option == SO_PEERCRED || option == SO_PEERGROUPS)) {
        struct bpf_sock *socket = context->sk;
        KEEP(socket);
        if (!socket || (socket->protocol != IPPROTO_TCP && socket->protocol != IPPROTO_MPTCP) ||
            !has_peer(socket))
            return 1;
        if (option == SO_PEERCRED)
            give_credentials(context, socket);
        else
            give_groups(context, socket);
        return 1;
    }
    /* A longer answer is not in the buffer as a whole. The kernel must not give back what
     * is; before 6.5 (29ebbba7d461) it would fail the call. */
    s32 length = context->optlen;
    KEEP(length);
    if (length > PAGE_SIZE)
        context->optlen = 0;
    return 1;
}

#endif

/* SPDX-License-Identifier: MIT OR GPL-2.0-only
 *
 * The maps. Hash tables are not preallocated: an idle host pays for no more
 * than the buckets. Nothing here evicts a live record: a full table drops the
 * new one and counts it.
 *
 * A new version goes on with what an older one has recorded, if this file and records.h say the
 * same in both.
 */

/* Stands for a number that the loader is given; and the programs are the same with any. */
#define CHOSEN 1

/* Of 4 KB: some 1,800 connections. The daemon reads them in less than their time. */
#define EVENT_PAGES 512

BPF_F_TABLE("hash", struct tuple, struct pending, pending, CHOSEN, BPF_F_NO_PREALLOC);

/* Server socket's cookie to its record, and the two ways to find that cookie. */
BPF_F_TABLE("hash", u64, struct connection, connections, CHOSEN, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct tuple, u64, by_tuple, CHOSEN, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", u64, u64, by_client, CHOSEN, BPF_F_NO_PREALLOC);

/* Cookies of listeners that had a server socket reset in their accept queue, and the user
 * that it is charged to. */
BPF_F_TABLE("hash", u64, u32, reset_in_queue, CHOSEN, BPF_F_NO_PREALLOC);

/* What each user holds. An entry stays, so that no count is lost with one; there are at most
 * as many as users that have ever connected. Should they be more, the last to come are
 * bounded by the tables only. */
BPF_F_TABLE("hash", u32, struct user, users, MAX_USERS, BPF_F_NO_PREALLOC);

/* How many connections one user has left at another's servers. Likewise; what there is no
 * room to count here goes on to count against the client. */
BPF_F_TABLE("hash", struct pair, s32, left, MAX_USERS, BPF_F_NO_PREALLOC);

/* By how much these are too high, since the sweeper removes what is counted: it alone writes
 * here, and the kernel alone there, so that neither overwrites what the other counts. */
BPF_F_TABLE("hash", u32, struct user, users_over, MAX_USERS, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct pair, s32, left_over, MAX_USERS, BPF_F_NO_PREALLOC);

/* An array, not an LRU hash: one store instead of a microsecond for each connection. */
BPF_F_TABLE("array", int, u64, absences, ABSENCE_SLOTS, 0);

/* Connections found by the loader that are older than the capture, by the same hashes. */
BPF_F_TABLE("hash", u64, u32, older, CHOSEN, BPF_F_NO_PREALLOC);

BPF_F_TABLE("array", int, u64, drops, DROP_COUNT, 0);

/* For each CPU, so that none waits for another. */
BPF_F_TABLE("percpu_array", int, struct totals, totals, 1, 0);

/* For those who watch: the record of a connection that was established, the server socket's
 * cookie of one that was retired. The daemon sets `watched` while anybody does. */
BPF_F_TABLE("array", int, u32, watched, 1, 0);

BPF_RINGBUF_OUTPUT(events, EVENT_PAGES);

/* An all-zero record, too large for the stack, to insert before filling in. */
BPF_F_TABLE("array", int, struct connection, empty_connection, 1, 0);

/* Which tracing programs record: those whose generation it is. A takeover attaches the new
 * ones beside the old, and turns to them by this. */
BPF_F_TABLE("array", int, u32, generation, 1, 0);

/* Of these very programs: a takeover brings its own. */
BPF_F_TABLE("array", int, struct settings, settings, 1, 0);

/* What the loader says of this capture, as JSON. */
BPF_F_TABLE("array", int, struct about, about, 1, 0);

/* BCC's BPF_SK_STORAGE has no way to ask for BPF_F_CLONE. */
#define SOCKET_STORAGE(name, value_type, map_flags)                                   \
    struct name##_table_t {                                                           \
        int key;                                                                      \
        value_type leaf;                                                              \
        void *(*sk_storage_get)(void *, void *, int);                                 \
        int (*sk_storage_delete)(void *);                                             \
        u32 flags;                                                                    \
    };                                                                                \
    __attribute__((section("maps/sk_storage"))) struct name##_table_t name = {        \
        .flags = BPF_F_NO_PREALLOC | (map_flags)};                                    \
    BPF_ANNOTATE_KV_PAIR(name, int, value_type)

SOCKET_STORAGE(server_sockets, struct server_socket, BPF_F_CLONE);

/* Credentials of a connect() whose SYN leaves later (deferred Fast Open). */
SOCKET_STORAGE(connecting, struct credentials, 0);

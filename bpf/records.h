/* SPDX-License-Identifier: MIT OR GPL-2.0-only
 *
 * What is written down. User space decodes these structs in
 * peercredd/records.py; tests/kernel/test_layout.py compares every offset with
 * what BCC compiled. Members are ordered so that no compiler pads: what padding
 * there is has a name, because map keys are compared byte by byte.
 */

#define MAX_GROUPS 32
#define MAX_PID_LEVELS 6
#define COMM_LENGTH 16

/* credentials.known: which optional fields this kernel provided. */
#define HAS_NO_NEW_PRIVS (1U << 0)
#define HAS_LOGIN_UID (1U << 1)
#define HAS_AUDIT_SESSION_ID (1U << 2)
#define HAS_CGROUP_ID (1U << 3)
#define HAS_PID_NAMESPACE (1U << 4)
#define HAS_USER_NAMESPACE (1U << 5)
#define HAS_NETWORK_NAMESPACE (1U << 6)
#define HAS_START_TIME (1U << 7)
#define HAS_CAPABILITIES (1U << 8)
/* The value of no_new_privs itself. */
#define NO_NEW_PRIVS (1U << 16)

/* A task's credentials at one moment. Ids are those of the initial namespaces. */
struct credentials {
    u64 time_ns; /* since boot, as are all times here */
    u64 process_start_time_ns;
    u64 effective_capabilities;
    u64 cgroup_id;
    u32 tgid;
    u32 tid;
    u32 uid;
    u32 gid;
    u32 suid;
    u32 sgid;
    u32 euid;
    u32 egid;
    u32 fsuid;
    u32 fsgid;
    u32 login_uid;
    u32 audit_session_id;
    u32 pid_namespace;
    u32 user_namespace;
    u32 network_namespace;
    u32 known;
    u32 group_count;
    char comm[COMM_LENGTH];
    u32 groups[MAX_GROUPS];
    /* How deep the task's pid namespace is nested, 0 being the initial one; and for each
     * level from 1 on the tgid there, and that namespace's inode number. */
    u32 pid_level;
    u32 pids[2 * MAX_PID_LEVELS];
    u32 charged_uid; /* whose share of the tables this counts against */
    u32 padding;
};

/* A connection's addresses, seen from neither end: client and server, IPv4 as
 * v4-mapped IPv6, ports in host byte order. A map key. */
struct tuple {
    u64 netns_cookie;
    u32 client_address[4];
    u32 server_address[4];
    u16 client_port;
    u16 server_port;
    u32 padding;
};

/* A connect() whose SYN is about to leave, or has left, and whose server socket
 * is not born yet. */
struct pending {
    u64 published_ns;
    u64 client_cookie;
    /* The SYN's sequence number. A server socket born of another SYN with the
     * same tuple is not this client's. */
    u32 initial_sequence;
    u32 client_gone; /* nobody can ask from that end any more */
    struct credentials client;
};

/* An established connection. */
struct connection {
    /* Written last: a record in which it is 0 is not complete. */
    u64 established_ns;
    u64 server_cookie;
    u64 client_cookie;
    u64 listener_cookie; /* 0: the listener is older than the capture */
    struct tuple tuple;
    u32 ends_gone; /* at 2 nobody can ask any more */
    /* Each a byte of its own: CPUs write them without a lock. */
    u8 closed_with_descriptor; /* in TCP_CLOSE, its owner can still ask */
    u8 closed_in_queue;        /* in TCP_CLOSE, waiting for accept() */
    u8 server_gone;            /* the server's socket was closed or disconnected */
    u8 client_closed_with_descriptor;
    u8 left; /* the client went first, and it is charged to the pair of users */
    u8 client_asked; /* for its peer, by SO_PEERCRED */
    u8 padding[6];
    /* Written after `acceptor`, which is unknown as long as this is 0. */
    u64 accepted_ns;
    struct credentials client;
    struct credentials listener;
    struct credentials acceptor;
};

/* Storage on a listening socket, cloned by the kernel to each child; and on a client's that
 * asks for its peer more than once. What is read at each question comes first. */
struct server_socket {
    u16 role;
    u8 gone;      /* its connection is over: of a child, counted in connection.ends_gone */
    u8 is_client; /* a simultaneous open: both ends called connect() */
    /* Of a ROLE_CHILD its client's, of a ROLE_CLIENT its listener's. The last two are handed out
     * at once. */
    u32 peer_egid;
    u32 peer_tgid;
    u32 peer_euid;
    u64 cookie; /* of a ROLE_CHILD */
    u64 listener_cookie;
    struct credentials listener;
};

/* What one user has in the tables. Signed: should one of them ever be too low, that user
 * is not locked out. */
struct user {
    s32 pending;
    s32 connections; /* whose client it is, without those it has left */
    s32 resets;      /* listeners of it in `reset_in_queue` */
};

/* Who connected and who listens. */
struct pair {
    u32 client_uid;
    u32 listener_uid;
};

#define ROLE_NONE 0
#define ROLE_LISTENER 1
#define ROLE_CHILD 2
#define ROLE_CLIENT 3

/* What the loader asks of one load of the programs. */
struct settings {
    u64 cgroup_id; /* where a hook set is bounded that sees the whole host */
    u32 cgroup_level;
    u32 generation;
    s32 connections_share; /* how much of a table one user may have */
    s32 pending_share;
    s32 left_share;
    u32 padding;
};

/* Why a connection has no record, for the newest of those that have none: a table
 * with one slot for each hash of a cookie or of a tuple. A slot holds the hash, its
 * lowest two bits replaced by the reason. A newer subject of the same slot replaces
 * an older: that costs a reason, never an answer. */
#define ABSENCE_SLOTS (1 << 15)
#define ABSENCE_REASON 3ULL

#define ABSENT_RETIRED 1
#define ABSENT_TABLE_WAS_FULL 2
#define ABSENT_NOT_RECORDED 3

#define MAX_USERS (1 << 16)

struct about {
    char json[4096];
};

/* How many records there have been since the capture began. */
struct totals {
    u64 established;
    u64 retired;
};

/* Indexes of the drop counters; peercredd/records.py describes each. */
enum drop {
    DROP_NONE,
    DROP_PENDING_FULL,
    DROP_CONNECTIONS_FULL,
    DROP_INDEX_FULL,
    DROP_NO_STORAGE,
    DROP_CREDENTIALS_UNREADABLE,
    DROP_DEFERRED_UNKNOWN,
    DROP_KERNEL_THREAD,
    DROP_OTHER_SYN,
    DROP_OVERTAKEN,
    DROP_USER_OVER_SHARE,
    DROP_EVENT_LOST,
    DROP_COUNT,
};

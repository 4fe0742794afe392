/* SPDX-License-Identifier: MIT OR GPL-2.0-only
 *
 * The credentials of the current task, as the kernel's init_peercred()
 * (net/unix/af_unix.c) takes them: the thread group, and task->cred, which an
 * io_uring personality or an override may have replaced for this very call.
 * bpf_get_current_uid_gid() would give the real ids, not the effective ones.
 */

static __always_inline int read_groups(u64 cred, struct credentials *to)
{
    u64 group_info = LOAD(u64, cred, cred_group_info);
    u32 count = LOAD(u32, group_info, group_info_ngroups);

    to->group_count = count;
    if (count > MAX_GROUPS)
        count = MAX_GROUPS;
    u32 size = count * sizeof(u32);
    asm volatile("" : "+r"(size)); /* the verifier must see the bound on this very register */
    if (size > sizeof(to->groups))
        return -1;
    return size ? read_kernel(to->groups, size, group_info + OFFSET_group_info_gid) : 0;
}

/* What a kernel may lack: each has its own bit in `known`. None of those that hang on
 * a pointer is ever 0; a load through a bad one is. */
static __always_inline void read_optional(u64 task, u64 cred, struct credentials *to)
{
#ifdef OFFSET_task_start_boottime
    to->process_start_time_ns =
        LOAD(u64, LOAD(u64, task, task_group_leader), task_start_boottime);
    if (to->process_start_time_ns)
        to->known |= HAS_START_TIME;
#endif
#ifdef OFFSET_cred_cap_effective
    /* Two u32 before 6.3 (f122a08b197d), one u64 since. */
    to->effective_capabilities =
        LOAD(u32, cred, cred_cap_effective) | (u64)LOAD(u32, cred + 4, cred_cap_effective) << 32;
    to->known |= HAS_CAPABILITIES;
#endif
#ifdef OFFSET_task_atomic_flags
    to->known |= HAS_NO_NEW_PRIVS;
    if (LOAD(u64, task, task_atomic_flags) & PFA_NO_NEW_PRIVS)
        to->known |= NO_NEW_PRIVS;
#endif
#ifdef OFFSET_task_loginuid
    to->login_uid = LOAD(u32, task, task_loginuid);
    to->known |= HAS_LOGIN_UID;
#endif
#ifdef OFFSET_task_sessionid
    to->audit_session_id = LOAD(u32, task, task_sessionid);
    to->known |= HAS_AUDIT_SESSION_ID;
#endif
#ifdef OFFSET_task_cgroups
    u64 cgroup = LOAD(u64, LOAD(u64, task, task_cgroups), css_set_dfl_cgrp);
    to->cgroup_id = LOAD(u64, LOAD(u64, cgroup, cgroup_kn), kernfs_node_id);
    if (to->cgroup_id)
        to->known |= HAS_CGROUP_ID;
#endif
}

#ifdef OFFSET_task_thread_pid
/* One of the numbers of a struct pid, and its namespace's inode number. No plain loads:
 * where they are depends on the level. */
static __always_inline int read_number(u64 from, u32 *number, u32 *inode)
{
    u64 namespace = 0;
    return read_kernel(number, sizeof(*number), from + OFFSET_upid_nr) ||
           read_kernel(&namespace, sizeof(namespace), from + OFFSET_upid_ns) ||
           read_kernel(inode, sizeof(*inode), namespace + OFFSET_pid_namespace_inum);
}

/* All of them, from the initial namespace to its own: what pid_nr_ns() (kernel/pid.c)
 * chooses from when somebody asks. */
static __always_inline int read_pids(u64 pid, struct credentials *to)
{
    u32 level = LOAD(u32, pid, pid_level), number;
    u64 numbers = pid + OFFSET_pid_numbers;

    if (read_number(numbers + level * SIZE_upid, &number, &to->pid_namespace))
        return -1;
#pragma unroll
    for (int i = 0; i < MAX_PID_LEVELS; i++) {
        numbers += SIZE_upid;
        if (i < level && read_number(numbers, &to->pids[2 * i], &to->pids[2 * i + 1]))
            return -1;
    }
    to->pid_level = level;
    return 0;
}
#endif

static __always_inline void read_namespaces(u64 task, u64 cred, struct credentials *to)
{
#ifdef OFFSET_task_thread_pid
    if (!read_pids(LOAD(u64, LOAD(u64, task, task_group_leader), task_thread_pid), to))
        to->known |= HAS_PID_NAMESPACE;
#endif
#ifdef OFFSET_cred_user_ns
    to->user_namespace = LOAD(u32, LOAD(u64, cred, cred_user_ns), user_namespace_inum);
    if (to->user_namespace)
        to->known |= HAS_USER_NAMESPACE;
#endif
#ifdef OFFSET_task_nsproxy
    u64 network = LOAD(u64, LOAD(u64, task, task_nsproxy), nsproxy_net_ns);
    to->network_namespace = LOAD(u32, network, net_inum);
    if (to->network_namespace)
        to->known |= HAS_NETWORK_NAMESPACE;
#endif
}

#ifdef OFFSET_user_namespace_owner
/* Who is behind a user namespace, below the initial one: a user gets as many ids there as
 * /etc/subuid says, and could be as many users. 0 where that is root. */
static __always_inline u32 user_behind(u64 namespace)
{
    u32 owner = 0, count = 0, uid = 0;

    /* MAX_USER_NAMESPACE_HOPS of them: create_user_ns() (kernel/user_namespace.c) allows
     * a level of 33, and that of the outermost is 1. */
#pragma unroll
    for (int i = 0; i < MAX_USER_NAMESPACE_HOPS; i++)
        if (LOAD(u32, namespace, user_namespace_level) > 1)
            namespace = LOAD(u64, namespace, user_namespace_parent);
    owner = LOAD(u32, namespace, user_namespace_owner);
    if (owner)
        return owner;
    /* Made by root for somebody: a container has the host's ids from a first one on. */
    u64 extent = namespace + OFFSET_user_namespace_uid_map + OFFSET_id_map_extent;
    u64 map = namespace + OFFSET_user_namespace_uid_map;
    if (read_kernel(&count, sizeof(count), map + OFFSET_id_map_count) || !count)
        return 0;
    if (count > MAX_BASE_EXTENTS &&
        read_kernel(&extent, sizeof(extent), map + OFFSET_id_map_forward))
        return 0;
    return read_kernel(&uid, sizeof(uid), extent + OFFSET_id_map_lower_first) ? 0 : uid;
}
#endif

/* Who pays for what a task does. As for the kernel's own limits (RLIMIT_NPROC) that is the
 * real uid: a setuid program's caller, not its owner. For a daemon that root has started it
 * is whom that acts for. */
static __always_inline u32 charged_user(u64 cred)
{
    u32 uid = 0;
#ifdef OFFSET_user_namespace_owner
    u64 namespace = LOAD(u64, cred, cred_user_ns);
    if (LOAD(u32, namespace, user_namespace_level))
        uid = user_behind(namespace);
#endif
    if (!uid)
        uid = LOAD(u32, cred, cred_uid);
    return uid ? uid : LOAD(u32, cred, cred_euid);
}

/* DROP_NONE, or why there are none. `to` is zeroed by the caller. */
static __always_inline enum drop read_credentials(struct credentials *to)
{
    u64 task = current_task();
    u64 cred = LOAD(u64, task, task_cred);

    /* The kernel connects in a worker's name (an NFS mount, a further subflow of
     * MPTCP): no user stands behind those numbers. */
    if (LOAD(u32, task, task_flags) & PF_KTHREAD)
        return DROP_KERNEL_THREAD;
    /* Loads through a bad address give 0, and 0 is root. */
    if (!cred || !LOAD(u64, cred, cred_group_info))
        return DROP_CREDENTIALS_UNREADABLE;

    to->time_ns = boot_time_ns();
    to->tgid = LOAD(u32, task, task_tgid);
    to->tid = LOAD(u32, task, task_pid);
    to->uid = LOAD(u32, cred, cred_uid);
    to->gid = LOAD(u32, cred, cred_gid);
    to->suid = LOAD(u32, cred, cred_suid);
    to->sgid = LOAD(u32, cred, cred_sgid);
    to->euid = LOAD(u32, cred, cred_euid);
    to->egid = LOAD(u32, cred, cred_egid);
    to->fsuid = LOAD(u32, cred, cred_fsuid);
    to->fsgid = LOAD(u32, cred, cred_fsgid);
    to->charged_uid = charged_user(cred);
    if (read_kernel(to->comm, sizeof(to->comm), task + OFFSET_task_comm) || read_groups(cred, to))
        return DROP_CREDENTIALS_UNREADABLE;
    read_optional(task, cred, to);
    read_namespaces(task, cred, to);
    return DROP_NONE;
}

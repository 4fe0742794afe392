/* SPDX-License-Identifier: MIT OR GPL-2.0-only
 *
 * The credentials of the current task, as the kernel's init_peercred()
 * (net/unix/af_unix.c) takes them: the thread group, and task->cred, which an
 * io_uring personality or an override may have replaced for this very call.
 * bpf_get_current_uid_gid() would give the real ids, not the effective ones.
 */

static __always_inline int read_groups(u64 cred, struct credentials *to)
{
    u64 group_info = 0;
    u32 count = 0;

    if (READ(group_info, cred, cred_group_info) || READ(count, group_info, group_info_ngroups))
        return -1;
    to->group_count = count;
    to->known |= HAS_GROUPS;
    if (count > MAX_GROUPS)
        count = MAX_GROUPS;
    u32 size = count * sizeof(u32);
    asm volatile("" : "+r"(size)); /* the verifier must see the bound on this very register */
    if (size > sizeof(to->groups))
        return -1;
    return size ? read_kernel(to->groups, size, group_info + OFFSET_group_info_gid) : 0;
}

static __always_inline void read_namespaces(u64 task, u64 cred, struct credentials *to)
{
    u64 namespace = 0, pid = 0, proxy = 0;
    u32 level = 0;

#ifdef OFFSET_task_thread_pid
    if (!READ(pid, task, task_thread_pid) && !READ(level, pid, pid_level) &&
        !READ(namespace, pid + OFFSET_pid_numbers + level * SIZE_upid, upid_ns) &&
        !READ(to->pid_namespace, namespace, pid_namespace_inum))
        to->known |= HAS_PID_NAMESPACE;
#endif
#ifdef OFFSET_cred_user_ns
    if (!READ(namespace, cred, cred_user_ns) &&
        !READ(to->user_namespace, namespace, user_namespace_inum))
        to->known |= HAS_USER_NAMESPACE;
#endif
#ifdef OFFSET_task_nsproxy
    if (!READ(proxy, task, task_nsproxy) && !READ(namespace, proxy, nsproxy_net_ns) &&
        !READ(to->network_namespace, namespace, net_inum))
        to->known |= HAS_NETWORK_NAMESPACE;
#endif
}

/* What a kernel may lack: each its own bit in `known`. */
static __always_inline void read_optional(u64 task, u64 cred, struct credentials *to)
{
    u64 leader = 0, flags = 0, set = 0, cgroup = 0, node = 0;

#ifdef OFFSET_task_start_boottime
    if (!READ(leader, task, task_group_leader) &&
        !READ(to->process_start_time_ns, leader, task_start_boottime))
        to->known |= HAS_START_TIME;
#endif
#ifdef OFFSET_cred_cap_effective
    if (!READ(to->effective_capabilities, cred, cred_cap_effective))
        to->known |= HAS_CAPABILITIES;
#endif
#ifdef OFFSET_task_atomic_flags
    if (!READ(flags, task, task_atomic_flags))
        to->known |= HAS_NO_NEW_PRIVS | (flags & PFA_NO_NEW_PRIVS ? NO_NEW_PRIVS : 0);
#endif
#ifdef OFFSET_task_loginuid
    if (!READ(to->login_uid, task, task_loginuid))
        to->known |= HAS_LOGIN_UID;
#endif
#ifdef OFFSET_task_sessionid
    if (!READ(to->audit_session_id, task, task_sessionid))
        to->known |= HAS_AUDIT_SESSION_ID;
#endif
#ifdef OFFSET_task_cgroups
    if (!READ(set, task, task_cgroups) && !READ(cgroup, set, css_set_dfl_cgrp) &&
        !READ(node, cgroup, cgroup_kn) && !READ(to->cgroup_id, node, kernfs_node_id))
        to->known |= HAS_CGROUP_ID;
#endif
}

/* DROP_NONE, or why there are none. `to` is zeroed by the caller. */
static __always_inline enum drop read_credentials(struct credentials *to)
{
    u64 task = current_task(), cred = 0;
    u32 flags = 0;

    /* The kernel connects in a worker's name (an NFS mount, a further subflow of
     * MPTCP): no user stands behind those numbers. */
    if (READ(flags, task, task_flags))
        return DROP_CREDENTIALS_UNREADABLE;
    if (flags & PF_KTHREAD)
        return DROP_KERNEL_THREAD;

    to->time_ns = boot_time_ns();
    if (READ(cred, task, task_cred) || READ(to->tgid, task, task_tgid) ||
        READ(to->tid, task, task_pid) || READ(to->comm, task, task_comm) ||
        READ(to->uid, cred, cred_uid) || READ(to->gid, cred, cred_gid) ||
        READ(to->suid, cred, cred_suid) || READ(to->sgid, cred, cred_sgid) ||
        READ(to->euid, cred, cred_euid) || READ(to->egid, cred, cred_egid) ||
        READ(to->fsuid, cred, cred_fsuid) || READ(to->fsgid, cred, cred_fsgid) ||
        read_groups(cred, to))
        return DROP_CREDENTIALS_UNREADABLE;
    read_optional(task, cred, to);
    read_namespaces(task, cred, to);
    return DROP_NONE;
}

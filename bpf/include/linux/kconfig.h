/* BCC includes this before all else, and wants to know that the kernel has bpf(2). */
#define CONFIG_BPF_SYSCALL 1

/* BCC carries its own copy of linux/bpf.h and has included it already. */

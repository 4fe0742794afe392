/* BCC's helpers.h includes it and uses nothing of it. */

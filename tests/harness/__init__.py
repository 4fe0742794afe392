"""What the kernel and conformance tests are made of: real processes, sockets and daemons."""

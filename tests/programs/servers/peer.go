// A TCP server for one client: prints its own port, then who that client is, as pid, uid
// and gid.
package main

import (
	"fmt"
	"log"
	"net"
	"syscall"
)

func peer(conn *net.TCPConn) (*syscall.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *syscall.Ucred
	var failure error
	err = raw.Control(func(fd uintptr) {
		peer, failure = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err != nil {
		return nil, err
	}
	return peer, failure
}

func main() {
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	conn, err := listener.AcceptTCP()
	if err != nil {
		log.Fatal(err)
	}
	client, err := peer(conn)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(client.Pid, client.Uid, client.Gid)
}

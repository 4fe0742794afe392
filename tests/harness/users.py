"""Numbers of users and groups; the machine need not know them."""

SERVICE = 61000
ALICE = 61001
BOB = 61002
CAROL = 61003
DAVE = 61004
STAFF = 62001
GAMES = 62002

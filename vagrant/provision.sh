#!/usr/bin/env bash
# In the machine, as its user: install the project from the synced tree as README.md says,
# and run its daemon as docs/operations.md says.
set -euo pipefail
cd ~/peercredd

# For this installation, and for whatever people install later.
if [[ -e ~/host-certificates.pem ]]; then
  printf '[global]\ncert = %s\n' ~/host-certificates.pem | sudo tee /etc/pip.conf >/dev/null
fi

./dev setup

sudo ln -sf "$PWD/.venv/bin/peercredd" "$PWD/.venv/bin/peercred" /usr/local/bin/
sudo install -D --mode 644 packaging/peercredd.sysusers /etc/sysusers.d/peercredd.conf
sudo systemd-sysusers
sudo usermod --append --groups peercredd "$USER"
sed s,/usr/bin/,/usr/local/bin/, packaging/peercredd.service |
  sudo tee /etc/systemd/system/peercredd.service >/dev/null
# Here the program is in a home.
sudo mkdir -p /etc/systemd/system/peercredd.service.d
printf '[Service]\nProtectHome=read-only\n' |
  sudo tee /etc/systemd/system/peercredd.service.d/home.conf >/dev/null
sudo systemctl daemon-reload
sudo systemctl --quiet enable peercredd
sudo systemctl restart peercredd || {
  sudo journalctl --unit peercredd --output cat --lines 5
  exit 1
}
echo "peercredd runs on $(uname -r): vagrant ssh $(hostname), then: peercred status"

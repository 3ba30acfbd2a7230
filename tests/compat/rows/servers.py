"""Servers that are started in a cage, with their own clients over its loopback or a socket file."""

from __future__ import annotations

from tests.compat.program import Program

_TLS = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=localhost 2>log\n"

SERVERS = (
    Program("PostgreSQL", "initdb, start, a table, a query over its socket", r"""
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
initdb -D data -A trust -U me >log
pg_ctl -D data -o "-k /tmp -c listen_addresses=''" -l log -w start >/dev/null
psql -h /tmp -U me -d postgres -qAtc 'create table t (a int); insert into t select generate_series(1, 100)'
test "$(psql -h /tmp -U me -d postgres -qAtc 'select sum(a) from t')" = 5050
pg_ctl -D data -w -m fast stop >/dev/null
""", flags="--memory 512M --tmp 256M", packages="postgresql"),
    Program("Redis", "set, get, save to disk", r"""
redis-server --port 6379 --bind 127.0.0.1 --dir /tmp >log 2>&1 &
up 6379
redis-cli set a 7 >/dev/null
test "$(redis-cli get a)" = 7
redis-cli save >/dev/null
redis-cli shutdown || true
test -s dump.rdb
""", packages="redis-server"),
    Program("MariaDB", "install, start, a query over its socket", r"""
mariadb-install-db --no-defaults --datadir=/tmp/data --auth-root-authentication-method=normal --skip-test-db >log 2>&1
mariadbd --no-defaults --datadir=/tmp/data --socket=/tmp/m.sock --skip-networking --innodb-buffer-pool-size=32M \
    --innodb-log-file-size=8M --pid-file=/tmp/pid >log 2>&1 &
ping() { mariadb-admin --no-defaults -S /tmp/m.sock -u root ping >ping 2>&1; }
for i in $(seq 300); do ping && break; sleep 0.1; done
test "$(mariadb --no-defaults -S /tmp/m.sock -u root -Ne 'select 6 * 7')" = 42
mariadb-admin --no-defaults -S /tmp/m.sock -u root shutdown
""", flags="--memory 1G --tmp 256M", packages="mariadb-server"),
    Program("nginx", "two workers, a file, a TLS connection", _TLS + r"""
cat >conf <<'END'
daemon off; worker_processes 2; pid /tmp/pid; error_log /tmp/error;
events {}
http {
    access_log off; client_body_temp_path /tmp/a; proxy_temp_path /tmp/b; fastcgi_temp_path /tmp/c;
    uwsgi_temp_path /tmp/d; scgi_temp_path /tmp/e;
    ssl_certificate /tmp/cert.pem; ssl_certificate_key /tmp/key.pem;
    server { listen 127.0.0.1:8443 ssl http2; root /tmp/www; }
}
END
mkdir www
echo fine >www/x
nginx -e /tmp/error -c /tmp/conf &
up 8443
test "$(curl -s --http2 --cacert cert.pem -o out -w '%{http_version}' https://localhost:8443/x)" = 2
test "$(cat out)" = fine
nginx -e /tmp/error -c /tmp/conf -s quit
""", packages="nginx-light curl openssl"),
    Program("HAProxy", "forward to another server, with a check", r"""
printf 'defaults\n mode http\n timeout client 5s\n timeout server 5s\n timeout connect 5s\n' >conf
printf 'frontend f\n bind 127.0.0.1:8080\n default_backend b\nbackend b\n server s 127.0.0.1:8000 check\n' >>conf
echo fine >x
python3 -m http.server -b 127.0.0.1 8000 >log 2>&1 &
up 8000
haproxy -f conf >hlog 2>&1 &
up 8080
test "$(curl -s http://127.0.0.1:8080/x)" = fine
""", packages="haproxy curl"),
    Program("lighttpd", "a file", r"""
printf 'server.document-root = "/tmp"\nserver.port = 8000\nserver.bind = "127.0.0.1"\n' >conf
echo fine >x
lighttpd -D -f conf >log 2>&1 &
up 8000
test "$(curl -s http://127.0.0.1:8000/x)" = fine
""", packages="lighttpd curl"),
    Program("Caddy", "a file server", r"""
export HOME=/tmp XDG_DATA_HOME=/tmp/data XDG_CONFIG_HOME=/tmp/config
echo fine >x
caddy file-server --listen 127.0.0.1:8000 --root /tmp >log 2>&1 &
up 8000
test "$(curl -s http://127.0.0.1:8000/x)" = fine
""", packages="caddy curl"),
    Program("memcached", "set and get", r"""
memcached -l 127.0.0.1 -p 11211 -U 0 -m 16 >log 2>&1 &
up 11211
exec 3<>/dev/tcp/127.0.0.1/11211
printf 'set a 0 0 1\r\n7\r\nget a\r\nquit\r\n' >&3
grep -q 'VALUE a' <&3
""", packages="memcached"),
    Program("Mosquitto", "publish and subscribe", r"""
mosquitto -p 1883 >log 2>&1 &
up 1883
mosquitto_sub -t a -C 1 >got &
for i in $(seq 100); do mosquitto_pub -t a -m fine -r; test -s got && break; sleep 0.1; done
test "$(head -1 got)" = fine
""", packages="mosquitto mosquitto-clients"),
    Program("OpenSSH server", "a login with a key and a command, without root", r"""
ssh-keygen -q -t ed25519 -N '' -f key
ssh-keygen -q -t ed25519 -N '' -f host
cat key.pub >authorized
/usr/sbin/sshd -D -e -f /dev/null -p 2222 -o ListenAddress=127.0.0.1 -o HostKey=/tmp/host -o PidFile=none \
    -o AuthorizedKeysFile=/tmp/authorized -o StrictModes=no -o UsePAM=no >log 2>&1 &
up 2222
set -- -F /dev/null -i key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/tmp/known
ssh "$@" -p 2222 "$(id -un)@127.0.0.1" echo fine >out
test "$(cat out)" = fine
""", packages="openssh-server openssh-client"),
    Program("ssh-agent", "hold a key and sign with it", r"""
eval "$(ssh-agent)" >/dev/null
ssh-keygen -q -t ed25519 -N '' -f key
ssh-add -q key
echo text >x
ssh-keygen -q -Y sign -f key.pub -n file x 2>/dev/null
test -s x.sig
ssh-agent -k >/dev/null
""", packages="openssh-client"),
    Program("git daemon", "clone and push over the git protocol", r"""
export HOME=/tmp GIT_CONFIG_GLOBAL=/tmp/gitconfig
git config --global user.name a
git config --global user.email a@b
git init -q --bare srv.git
git daemon --base-path=/tmp --export-all --enable=receive-pack --listen=127.0.0.1 --reuseaddr >log 2>&1 &
up 9418
git clone -q git://127.0.0.1/srv.git work 2>/dev/null
cd work
git commit -q --allow-empty -m first
git push -q origin HEAD
test "$(git --git-dir=/tmp/srv.git log --format=%s --all)" = first
""", packages="git"),
    Program("rsync daemon", "a folder over the rsync protocol", r"""
mkdir a b
seq 1000 >a/file
printf 'use chroot = no\n[m]\n path = /tmp/a\n' >conf
rsync --daemon --no-detach --config=conf --port=8730 --address=127.0.0.1 --log-file=/tmp/log &
up 8730
rsync -a rsync://127.0.0.1:8730/m/ b/
cmp a/file b/file
""", packages="rsync"),
    Program("dnsmasq", "answer a question", r"""
dnsmasq --no-daemon --no-resolv --no-hosts --port=5353 --listen-address=127.0.0.1 --bind-interfaces --user= \
    --pid-file= --address=/x.test/192.0.2.7 >log 2>&1 &
up 5353
python3 - <<'END'
import socket
q = b"\0\1\1\0\0\1\0\0\0\0\0\0\1x\4test\0\0\1\0\1"
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20); s.sendto(q, ("127.0.0.1", 5353))
assert s.recv(500).endswith(bytes([192, 0, 2, 7]))
END
""", packages="dnsmasq-base"),
    Program("stunnel", "TLS in front of a plain server", _TLS + r"""
echo fine >x
python3 -m http.server -b 127.0.0.1 8000 >log 2>&1 &
cat key.pem cert.pem >both.pem
printf 'foreground = yes\npid =\n[s]\naccept = 127.0.0.1:8443\nconnect = 127.0.0.1:8000\ncert = /tmp/both.pem\n' >conf
stunnel conf >slog 2>&1 &
up 8000
up 8443
test "$(curl -s --cacert cert.pem https://localhost:8443/x)" = fine
""", packages="stunnel4 curl openssl"),
    Program("nghttpd", "HTTP/2 with many streams", _TLS + r"""
echo fine >x
nghttpd -d /tmp 8443 key.pem cert.pem >log 2>&1 &
up 8443
h2load -n 100 -c 2 -m 10 https://127.0.0.1:8443/x | found '100 succeeded'
""", packages="nghttp2 openssl"),
    Program("OpenSSL", "a server, a client, a key, a signature", _TLS + r"""
openssl s_server -accept 4433 -cert cert.pem -key key.pem -www -quiet >log 2>&1 &
up 4433
printf 'GET / HTTP/1.0\r\n\r\n' |
    openssl s_client -connect 127.0.0.1:4433 -CAfile cert.pem -verify_return_error -quiet 2>log >out
grep -q 'HTTP/1.0 200' out
openssl genpkey -algorithm ed25519 -out k
echo text >x
openssl pkeyutl -sign -inkey k -rawin -in x -out s
""", packages="openssl"),
    Program("socat", "TCP to a socket file", r"""
socat UNIX-LISTEN:/tmp/s,fork EXEC:cat &
socat TCP-LISTEN:8000,bind=127.0.0.1,fork UNIX-CONNECT:/tmp/s &
up 8000
test "$(echo fine | socat - TCP:127.0.0.1:8000)" = fine
""", packages="socat"),
    Program("ncat", "a line over TLS", r"""
ncat -v -l 127.0.0.1 8000 --ssl --recv-only >got 2>log &
for i in $(seq 300); do grep -q Listening log && break; sleep 0.1; done
echo fine | ncat --ssl --send-only 127.0.0.1 8000
wait
grep -q fine got
""", packages="ncat"),
    Program("systemd's socket activation", "a listening socket passed on", r"""
/usr/lib/systemd/systemd-socket-activate --help >/dev/null 2>&1 || systemd-socket-activate --help >/dev/null
systemd-socket-activate -l 127.0.0.1:8000 python3 -c '
import os, socket
s = socket.socket(fileno=3); assert os.environ["LISTEN_FDS"] == "1"; s.accept()[0].sendall(b"fine\n")' >log 2>&1 &
up0() { for i in $(seq 200); do grep -q Listening log && return; sleep 0.1; done; return 1; }
up0
test "$(head -1 </dev/tcp/127.0.0.1/8000)" = fine
""", packages="systemd"),
)  # fmt: skip

"""Servers on the pretend internet, reached from a cage by name and port through the broker."""

from __future__ import annotations

from tests.compat.program import Service

_NGINX = r"""
cat >conf <<END
daemon off; pid $PWD/pid; events {}
http {
    access_log off; client_body_temp_path $PWD/a; proxy_temp_path $PWD/b; fastcgi_temp_path $PWD/c;
    uwsgi_temp_path $PWD/d; scgi_temp_path $PWD/e;
    server { listen PORT ssl http2; ssl_certificate $PWD/ca.pem; ssl_certificate_key $PWD/key.pem; root $PWD/www; }
}
END
mkdir www
echo fine >www/x
head -c 3000000 /dev/zero >www/large
nginx -e "$PWD/error" -c "$PWD/conf" &
"""

SERVICES = (
    Service("PostgreSQL, psql", "a table and a query, with TLS", 5432, r"""
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
initdb -D data -A trust -U me >log
echo 'host all all all trust' >>data/pg_hba.conf
cp ca.pem key.pem data/
chmod 0600 data/key.pem
set -- -c ssl=on -c ssl_cert_file=ca.pem -c ssl_key_file=key.pem
postgres -D data -k "$PWD" -c listen_addresses='*' "$@" >>log 2>&1 &
""", r"""
export PGSSLMODE=verify-full PGSSLROOTCERT=$CA
psql -h "$HOST" -U me -d postgres -qAtc 'create table t (a int); insert into t select generate_series(1, 100)'
test "$(psql -h "$HOST" -U me -d postgres -qAtc 'select sum(a) from t')" = 5050
""", packages="postgresql postgresql-client"),
    Service("PostgreSQL, psycopg2", "a transaction, a large copy", 5433, r"""
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
initdb -D data -A trust -U me >log
echo 'host all all all trust' >>data/pg_hba.conf
postgres -D data -k "$PWD" -p 5433 -c listen_addresses='*' >>log 2>&1 &
""", r"""
python3 - <<'END'
import io, os, psycopg2
with psycopg2.connect(host=os.environ["HOST"], port=5433, user="me", dbname="postgres") as c, c.cursor() as cursor:
    cursor.execute("create table t (a text)")
    cursor.copy_from(io.StringIO(("x" * 100 + "\n") * 20000), "t")
    cursor.execute("select count(*) from t")
    assert cursor.fetchone() == (20000,)
END
""", packages="postgresql python3-psycopg2"),
    Service("Redis, redis-py", "a pipeline, a subscription", 6379, r"""
redis-server --port 6379 --protected-mode no --save '' >log 2>&1 &
""", r"""
test "$(redis-cli -h "$HOST" ping)" = PONG
python3 - <<'END'
import os, redis
r = redis.Redis(os.environ["HOST"])
with r.pipeline() as p:
    p.set("a", 7); p.incr("a"); assert p.execute() == [True, 8]
s = r.pubsub(); s.subscribe("c"); assert s.get_message(timeout=20)["type"] == "subscribe"
r.publish("c", "hi"); assert s.get_message(timeout=20)["data"] == b"hi"
END
""", packages="redis-server redis-tools python3-redis"),
    Service("MariaDB, PyMySQL", "a query", 3306, r"""
mariadb-install-db --no-defaults --datadir="$PWD/data" --auth-root-authentication-method=normal --skip-test-db >log 2>&1
printf "create user me@'%%';\ngrant all on *.* to me@'%%';\n" >init.sql
mariadbd --no-defaults --datadir="$PWD/data" --socket="$PWD/s" --init-file="$PWD/init.sql" \
    --innodb-buffer-pool-size=32M --bind-address=0.0.0.0 --skip-name-resolve --pid-file="$PWD/pid" >log 2>&1 &
""", r"""
python3 - <<'END'
import os, pymysql
with pymysql.connect(host=os.environ["HOST"], user="me") as c, c.cursor() as cursor:
    cursor.execute("select 6 * 7"); assert cursor.fetchone() == (42,)
END
""", packages="mariadb-server python3-pymysql"),
    Service("nginx, curl: HTTP/2", "a small and a large file", 8443, _NGINX.replace("PORT", "8443"), r"""
test "$(curl -sf --http2 --cacert "$CA" -o out -w '%{http_version}' "https://$HOST:8443/x")" = 2
test "$(cat out)" = fine
curl -sf --cacert "$CA" "https://$HOST:8443/large" | cmp - <(head -c 3000000 /dev/zero)
""", packages="nginx-light curl"),
    Service("nginx, httpx and h2", "many requests on one HTTP/2 connection", 8444, _NGINX.replace("PORT", "8444"), r"""
python3 - <<'END'
import asyncio, httpx, os
async def main():
    async with httpx.AsyncClient(http2=True, verify=os.environ["CA"]) as c:
        got = await asyncio.gather(*(c.get(f"https://{os.environ['HOST']}:8444/x") for _ in range(50)))
    assert {(g.http_version, g.text) for g in got} == {("HTTP/2", "fine\n")}
asyncio.run(main())
END
""", packages="nginx-light python3-httpx python3-h2"),
    Service("nginx, Node.js: http2", "a request and its answer", 8445, _NGINX.replace("PORT", "8445"), r"""
cat >main.js <<'END'
const ca = require('fs').readFileSync(process.env.CA);
const c = require('http2').connect(`https://${process.env.HOST}:8445`, {ca});
const r = c.request({':path': '/x'});
let text = '';
r.setEncoding('utf8'); r.on('data', d => text += d);
r.on('end', () => { c.close(); process.exit(text === 'fine\n' ? 0 : 1); });
END
node main.js
""", packages="nginx-light nodejs"),
    Service("OpenSSH, ssh and scp", "a command and a file", 2222, r"""
ssh-keygen -q -t ed25519 -N '' -f host
cp ../shown/key.pub authorized
/usr/sbin/sshd -D -e -f /dev/null -p 2222 -o HostKey="$PWD/host" -o PidFile=none \
    -o AuthorizedKeysFile="$PWD/authorized" -o StrictModes=no -o UsePAM=no -o Subsystem='sftp internal-sftp' >log 2>&1 &
""", r"""
cp "${CA%/*}/key" /tmp/key
chmod 0600 /tmp/key
set -- -F /dev/null -i /tmp/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/tmp/known -o LogLevel=ERROR
test "$(ssh "$@" -p 2222 "author@$HOST" echo fine)" = fine
head -c 1000000 /dev/urandom >x
scp -q "$@" -P 2222 x "author@$HOST:/tmp/x"
ssh "$@" -p 2222 "author@$HOST" cat /tmp/x | cmp - x
""", packages="openssh-server openssh-client"),
    Service("git over ssh", "clone, commit, push", 2223, r"""
ssh-keygen -q -t ed25519 -N '' -f host
cp ../shown/key.pub authorized
git init -q --bare /tmp/srv.git
/usr/sbin/sshd -D -e -f /dev/null -p 2223 -o HostKey="$PWD/host" -o PidFile=none \
    -o AuthorizedKeysFile="$PWD/authorized" -o StrictModes=no -o UsePAM=no >log 2>&1 &
""", r"""
cp "${CA%/*}/key" /tmp/key
chmod 0600 /tmp/key
export GIT_CONFIG_GLOBAL=/tmp/config
export GIT_SSH_COMMAND='ssh -F /dev/null -i /tmp/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/tmp/known'
git config --global user.name a
git config --global user.email a@b
git clone -q "ssh://author@$HOST:2223/tmp/srv.git" work 2>/dev/null
cd work
git commit -q --allow-empty -m first
git push -q origin HEAD
git ls-remote -q | found refs/heads
""", packages="git openssh-server openssh-client"),
    Service("git over the git protocol", "clone", 9418, r"""
export GIT_CONFIG_GLOBAL=/tmp/config
git init -q srv.git
git -C srv.git -c user.name=a -c user.email=a@b commit -q --allow-empty -m first
git daemon --base-path="$PWD" --export-all --reuseaddr >log 2>&1 &
""", r"""
git clone -q "git://$HOST/srv.git" work
test "$(git -C work log --format=%s)" = first
""", packages="git"),
    Service("gRPC", "calls and a stream, with TLS", 8446, r"""
cat >server.py <<'END'
import grpc, time
from concurrent import futures
class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        if details.method.endswith("y"):
            return grpc.unary_unary_rpc_method_handler(lambda request, context: request[::-1])
        return grpc.unary_stream_rpc_method_handler(lambda request, context: (request for _ in range(100)))
server = grpc.server(futures.ThreadPoolExecutor(2)); server.add_generic_rpc_handlers((Handler(),))
pair = open("key.pem", "rb").read(), open("ca.pem", "rb").read()
server.add_secure_port("0.0.0.0:8446", grpc.ssl_server_credentials([pair]))
server.start(); server.wait_for_termination()
END
python3 server.py >log 2>&1 &
""", r"""
python3 - <<'END'
import grpc, os
credentials = grpc.ssl_channel_credentials(open(os.environ["CA"], "rb").read())
with grpc.secure_channel(f"{os.environ['HOST']}:8446", credentials) as channel:
    assert channel.unary_unary("/x/y")(b"abc", timeout=30) == b"cba"
    assert len(list(channel.unary_stream("/x/z")(b"abc", timeout=30))) == 100
END
""", packages="python3-grpcio"),
    Service("websockets", "a conversation, with TLS", 8447, r"""
cat >server.py <<'END'
import asyncio, ssl, websockets
async def echo(s, *_):
    async for m in s: await s.send(m)
async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain("ca.pem", "key.pem")
    async with websockets.serve(echo, "0.0.0.0", 8447, ssl=context): await asyncio.Future()
asyncio.run(main())
END
python3 server.py >log 2>&1 &
""", r"""
python3 - <<'END'
import asyncio, os, ssl, websockets
async def main():
    context = ssl.create_default_context(cafile=os.environ["CA"])
    async with websockets.connect(f"wss://{os.environ['HOST']}:8447", ssl=context) as c:
        for size in (1, 100, 500000):
            await c.send("x" * size); assert await c.recv() == "x" * size
        await (await c.ping())
asyncio.run(main())
END
""", packages="python3-websockets"),
    Service("Mosquitto", "publish and subscribe, with TLS", 8883, r"""
printf 'listener 8883\nallow_anonymous true\ncertfile %s/ca.pem\nkeyfile %s/key.pem\n' "$PWD" "$PWD" >conf
mosquitto -c conf >log 2>&1 &
""", r"""
mosquitto_sub -h "$HOST" -p 8883 --cafile "$CA" -t a -C 1 >got &
for i in $(seq 100); do
    mosquitto_pub -h "$HOST" -p 8883 --cafile "$CA" -t a -m fine -r
    test -s got && break
    sleep 0.1
done
test "$(head -1 got)" = fine
""", packages="mosquitto mosquitto-clients"),
    Service("memcached", "set and get", 11211, "memcached -p 11211 -U 0 -l 0.0.0.0 -m 16 >log 2>&1 &\n", r"""
exec 3<>"/dev/tcp/$HOST/11211"
printf 'set a 0 0 1\r\n7\r\nget a\r\nquit\r\n' >&3
grep -q 'VALUE a' <&3
""", packages="memcached"),
    Service("rsync", "a folder of 200 files", 8730, r"""
mkdir files
for i in $(seq 200); do seq "$i" >"files/$i"; done
printf 'use chroot = no\n[m]\n path = %s/files\n' "$PWD" >conf
rsync --daemon --no-detach --config=conf --port=8730 --log-file="$PWD/log" &
""", r"""
rsync -a "rsync://$HOST:8730/m/" got/
test "$(ls got | wc -l)" = 200
""", packages="rsync"),
    Service("aiohttp", "a thousand requests on a few connections", 8081, r"""
cat >server.py <<'END'
from aiohttp import web
async def root(request): return web.Response(text="fine")
app = web.Application(); app.router.add_get("/", root)
web.run_app(app, port=8081, print=None)
END
python3 server.py >log 2>&1 &
""", r"""
python3 - <<'END'
import aiohttp, asyncio, os
async def main():
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=8)) as c:
        async def one():
            async with c.get(f"http://{os.environ['HOST']}:8081/") as r: return await r.text()
        assert set(await asyncio.gather(*(one() for _ in range(1000)))) == {"fine"}
asyncio.run(main())
END
""", packages="python3-aiohttp"),
)  # fmt: skip

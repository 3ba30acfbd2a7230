"""Libraries, most of Python: the ones that plugins are written with, and those that ask the system much."""

from __future__ import annotations

from tests.compat.program import Program


def _python(name: str, work: str, code: str, packages: str, flags: str = "") -> Program:
    return Program(name, work, f"python3 - <<'END'\n{code.strip()}\nEND\n", flags, packages)


LIBRARIES = (
    _python("NumPy", "linear algebra on all its threads", """
import numpy as np
a = np.random.default_rng(1).random((300, 300))
assert np.allclose(np.linalg.inv(a) @ a, np.eye(300))
""", "python3-numpy", "--memory 512M"),
    _python("pandas", "group, join, CSV and back", """
import pandas as pd
d = pd.DataFrame({"k": list("aab"), "v": [1, 2, 3]})
assert d.groupby("k").v.sum().to_dict() == {"a": 3, "b": 3}
d.to_csv("/tmp/x.csv"); assert len(pd.read_csv("/tmp/x.csv")) == 3
""", "python3-pandas", "--memory 512M"),
    _python("SciPy", "optimise and solve", """
from scipy import optimize
assert abs(optimize.brentq(lambda x: x * x - 2, 0, 2) - 2 ** 0.5) < 1e-9
""", "python3-scipy", "--memory 512M"),
    _python("Matplotlib", "a plot with text, as PNG", """
import os; os.environ["MPLCONFIGDIR"] = "/tmp/mpl"
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
plt.plot([1, 2, 3]); plt.title("grün"); plt.savefig("/tmp/x.png")
assert os.path.getsize("/tmp/x.png") > 1000
""", "python3-matplotlib", "--memory 512M"),
    _python("Pillow", "scale an image, draw on it", """
from PIL import Image, ImageDraw
i = Image.new("RGB", (200, 200)); ImageDraw.Draw(i).line((0, 0, 200, 200)); i.resize((50, 50)).save("/tmp/x.jpg")
assert Image.open("/tmp/x.jpg").size == (50, 50)
""", "python3-pil"),
    _python("lxml", "parse, XPath, transform", """
from lxml import etree
t = etree.fromstring("<a><b>1</b><b>2</b></a>")
assert t.xpath("sum(b)") == 3
""", "python3-lxml"),
    _python("cryptography", "keys, a certificate, signatures", """
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
k = ed25519.Ed25519PrivateKey.generate(); k.public_key().verify(k.sign(b"x"), b"x")
rsa.generate_private_key(65537, 2048)
""", "python3-cryptography"),
    _python("psutil", "what it shows of the machine", """
import psutil
p = psutil.Process(); p.memory_info(); p.cpu_times(); p.open_files(); p.create_time(); p.num_threads()
assert psutil.cpu_count() >= 1, "no processor"
assert psutil.virtual_memory().total > 0
psutil.cpu_percent(); psutil.cpu_times(); psutil.boot_time(); psutil.pids()
psutil.net_if_addrs(); psutil.disk_usage("/tmp")
assert len(list(psutil.process_iter())) < 12, "others' processes"
""", "python3-psutil"),
    _python("requests", "a session with a server of the cage's own", """
import http.server, threading, requests
s = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=s.serve_forever, daemon=True).start()
with requests.Session() as c:
    assert c.get(f"http://127.0.0.1:{s.server_port}/").status_code == 200
""", "python3-requests"),
    _python("aiohttp", "server and client on one loop, a websocket", """
import asyncio
from aiohttp import ClientSession, web
async def socket(request):
    s = web.WebSocketResponse(); await s.prepare(request)
    async for m in s: await s.send_str(m.data + "!")
    return s
async def main():
    app = web.Application(); app.router.add_get("/s", socket)
    runner = web.AppRunner(app); await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 8080); await site.start()
    async with ClientSession() as c, c.ws_connect("http://127.0.0.1:8080/s") as w:
        await w.send_str("hi"); assert (await w.receive()).data == "hi!"
    await runner.cleanup()
asyncio.run(main())
""", "python3-aiohttp"),
    _python("websockets", "echo", """
import asyncio, websockets
async def echo(s, *_):
    async for m in s: await s.send(m)
async def main():
    async with websockets.serve(echo, "127.0.0.1", 8765), websockets.connect("ws://127.0.0.1:8765") as c:
        await c.send("hi"); assert await c.recv() == "hi"
asyncio.run(main())
""", "python3-websockets"),
    _python("gRPC", "a server and a client of one method", """
import grpc
from concurrent import futures
class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: request[::-1])
server = grpc.server(futures.ThreadPoolExecutor(2)); server.add_generic_rpc_handlers((Handler(),))
port = server.add_insecure_port("127.0.0.1:0"); server.start()
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    assert channel.unary_unary("/x/y")(b"abc", timeout=20) == b"cba"
server.stop(0)
""", "python3-grpcio"),
    _python("ZeroMQ", "request and reply over TCP and inproc", """
import zmq
c = zmq.Context()
for place in ("tcp://127.0.0.1:5555", "inproc://x"):
    with c.socket(zmq.REP) as s, c.socket(zmq.REQ) as r:
        s.bind(place); r.connect(place); r.send(b"x"); assert s.recv() == b"x"; s.send(b"y"); assert r.recv() == b"y"
""", "python3-zmq"),
    Program("Jupyter kernel", "start a kernel, run a cell", r"""
export HOME=/tmp IPYTHONDIR=/tmp/ipython JUPYTER_RUNTIME_DIR=/tmp/run
python3 - <<'END'
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="python3", startup_timeout=100)
reply = client.execute_interactive("print(6 * 7)", timeout=60, output_hook=lambda m: None)
assert reply["content"]["status"] == "ok"
client.stop_channels(); manager.shutdown_kernel(now=True)
END
""", flags="--memory 512M", packages="python3-ipykernel"),
    Program("Flask under gunicorn", "two workers and a request", r"""
printf 'from flask import Flask\napp = Flask("x")\n@app.route("/")\ndef root(): return "fine"\n' >app.py
gunicorn --workers 2 --bind 127.0.0.1:8000 app:app >log 2>&1 &
up 8000
test "$(curl -s http://127.0.0.1:8000/)" = fine
""", packages="python3-flask gunicorn curl"),
    Program("uvicorn", "an ASGI application and a request", r"""
cat >app.py <<'END'
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})
END
python3 -m uvicorn --log-level warning --port 8000 app:app >log 2>&1 &
up 8000
test "$(curl -s http://127.0.0.1:8000/)" = fine
""", packages="python3-uvicorn curl"),
    Program("Django", "a project, a migration, its test client", r"""
export PYTHONPATH=/tmp/site
mkdir -p site
cd site
django-admin startproject thing .
python3 manage.py migrate -v 0
python3 manage.py shell -c '
from django.contrib.auth.models import User
User.objects.create(username="x")
assert User.objects.count() == 1'
python3 manage.py check
""", packages="python3-django"),
    _python("h2", "an HTTP/2 handshake in memory", """
import h2.config, h2.connection
c = h2.connection.H2Connection(); s = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
c.initiate_connection(); s.initiate_connection(); s.receive_data(c.data_to_send()); c.receive_data(s.data_to_send())
c.send_headers(1, [(":method", "GET"), (":path", "/"), (":scheme", "https"), (":authority", "x")], end_stream=True)
assert any(type(e).__name__ == "RequestReceived" for e in s.receive_data(c.data_to_send()))
""", "python3-h2"),
    _python("Paramiko", "its own SSH server and a command over it", """
import paramiko, socket, threading
key = paramiko.RSAKey.generate(2048)
class Server(paramiko.ServerInterface):
    def check_channel_request(self, kind, number): return paramiko.OPEN_SUCCEEDED
    def check_auth_password(self, user, password): return paramiko.AUTH_SUCCESSFUL
    def check_channel_exec_request(self, channel, command):
        def answer(): channel.sendall(command[::-1]); channel.send_exit_status(0); channel.close()
        threading.Timer(0.5, answer).start()
        return True
listener = socket.create_server(("127.0.0.1", 2222))
def serve():
    t = paramiko.Transport(listener.accept()[0]); t.add_server_key(key); t.start_server(server=Server()); kept.append(t)
    while t.is_active(): kept.append(t.accept(1))
kept = []
threading.Thread(target=serve, daemon=True).start()
c = paramiko.SSHClient(); c.set_missing_host_key_policy(paramiko.AutoAddPolicy())
c.connect("127.0.0.1", 2222, "x", "y", allow_agent=False, look_for_keys=False)
assert c.exec_command("abc")[1].read() == b"cba"
""", "python3-paramiko"),
    _python("multiprocessing", "shared memory, a manager, a barrier", """
import multiprocessing as m
from multiprocessing import shared_memory
def work(barrier, values): barrier.wait(); values.append(1)
s = shared_memory.SharedMemory(create=True, size=4096); s.buf[0] = 7; s.close(); s.unlink()
with m.Manager() as manager:
    values, barrier = manager.list(), manager.Barrier(3)
    ps = [m.Process(target=work, args=(barrier, values)) for _ in range(3)]
    [p.start() for p in ps]; [p.join() for p in ps]; assert len(values) == 3
""", "python3"),
    _python("asyncio", "subprocesses, signals, a thousand timers", """
import asyncio, os, signal
async def main():
    seen = asyncio.Event(); asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, seen.set)
    os.kill(os.getpid(), signal.SIGUSR1); await asyncio.wait_for(seen.wait(), 20)
    p = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1); assert (await p.communicate(b"x"))[0] == b"x"
    await asyncio.gather(*(asyncio.sleep(0.01) for _ in range(1000)))
asyncio.run(main())
""", "python3"),
    _python("boto3", "a client, a signed request to a server of the cage's own", """
import boto3, http.server, threading
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        assert "AWS4-HMAC-SHA256" in self.headers["Authorization"]
        body = b'<ListAllMyBucketsResult><Buckets><Bucket><Name>b</Name></Bucket></Buckets></ListAllMyBucketsResult>'
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *a): pass
s = http.server.HTTPServer(("127.0.0.1", 0), H); threading.Thread(target=s.serve_forever, daemon=True).start()
c = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s.server_port}", region_name="x", aws_access_key_id="a",
                 aws_secret_access_key="b")
assert [b["Name"] for b in c.list_buckets()["Buckets"]] == ["b"]
""", "python3-boto3"),
)  # fmt: skip

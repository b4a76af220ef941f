"""Real servers of object storage on loopback: one that speaks S3, one that speaks GCS.

Both are processes of their own. vLLM looks at everything in every module that is loaded, and Flask,
which Moto loads, has things that must not be looked at.
"""

import http.client
import logging
import subprocess
import sys
import threading

import boto3
from ports import free_port
from werkzeug.serving import make_server

S3 = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class S3Server:
    """Moto's server; `hook` may hold a request up, or answer it with a status of its own."""

    def __init__(self):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = subprocess.Popen(
            [sys.executable, "-c", S3],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._port = int(self._moto.stdout.readline())
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.hook = None
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="someone",
            aws_secret_access_key="secret",
        )

    def __call__(self, environ, start_response):
        status = self.hook(environ) if self.hook else None
        chunked = "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "")
        size = -1 if chunked else int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(size)
        if status is not None:
            start_response(status, [("Content-Length", "0")])
            return [b""]
        headers = {
            name.removeprefix("HTTP_").replace("_", "-"): value
            for name, value in environ.items()
            if name.startswith("HTTP_") or (name == "CONTENT_TYPE" and value)
        }
        for hop in ("TRANSFER-ENCODING", "EXPECT", "CONNECTION"):
            headers.pop(hop, None)
        moto = http.client.HTTPConnection("127.0.0.1", self._port)
        moto.request(environ["REQUEST_METHOD"], environ["RAW_URI"], body, headers)
        answer = moto.getresponse()
        data = answer.read()
        hops = ("connection", "transfer-encoding", "server", "date")
        given = [(name, value) for name, value in answer.getheaders() if name.lower() not in hops]
        start_response(f"{answer.status} {answer.reason}", given)
        moto.close()
        return [data]

    def names(self, bucket):
        """The objects that are there, with their sizes."""
        listed = self.client.list_objects_v2(Bucket=bucket).get("Contents", [])
        return {item["Key"]: item["Size"] for item in listed}

    def unfinished(self, bucket):
        """The uploads in parts that were not completed."""
        listed = self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        return [item["Key"] for item in listed]

    def close(self):
        self._server.shutdown()
        self._moto.kill()
        self._moto.communicate()


GCS = """
import http.server, sys
from gcp_storage_emulator import server

# Its own class answers one at a time, and a client that keeps a connection waits for ever.
server.server.HTTPServer = http.server.ThreadingHTTPServer
one = server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket")
one.start()
print("listens", flush=True)
sys.stdin.read()
"""


class GcsServer:
    """gcp-storage-emulator, with a bucket named bucket.

    In a process of its own: pyarrow holds Python's lock while it waits for an answer of GCS.
    """

    def __init__(self):
        port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-c", GCS, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdout.readline() == b"listens\n"
        self.environment = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}

    def close(self):
        self._process.kill()
        self._process.communicate()

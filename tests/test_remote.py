"""A server process over HTTP: answers by class, bounds, and clients at once."""

import http.client
import threading
import traceback
from base64 import b64encode
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from tiny_model import SENTENCES

from hf_he import errors
from hf_he.errors import HEError
from hf_he.protocol import error_from_json, error_to_json
from hf_he.remote import connect


class TestHTTP:
    def test_bad_bytes_are_answered_by_class_and_the_server_goes_on(self, client, remote, batch, key_folder):
        data = batch.to_bytes()
        cases = [
            (b"", 400, "CorruptFileError"),
            (b"hello", 400, "CorruptFileError"),
            (data[:-1], 400, "CorruptFileError"),
            ((key_folder / "secret.key").read_bytes(), 403, "SecretKeyOnServerError"),
            (replace(batch, identity=replace(batch.identity, model="0" * 16)).to_bytes(), 409, "ModelMismatchError"),
            (replace(batch, identity=replace(batch.identity, key_id="0" * 16)).to_bytes(), 409, "WrongKeyError"),
            (replace(batch, identity=replace(batch.identity, parameters="0" * 16)).to_bytes(), 422, "ParameterError"),
        ]
        for body, status, name in cases:
            response = httpx.post(f"{remote.url}/jobs", content=body)
            assert (response.status_code, response.json()["error"]) == (status, name)
        assert client.infer(remote, SENTENCES[:1]).agreement == 1.0

    def test_oversized_messages_are_refused_before_they_are_read(self, remote):
        connection = http.client.HTTPConnection(remote.url.removeprefix("http://"), timeout=10)
        connection.putrequest("POST", "/jobs")
        connection.putheader("Content-Length", str(10**12))
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()

    def test_unknown_jobs(self, remote):
        assert httpx.get(f"{remote.url}/jobs/none/next").status_code == 404
        assert httpx.post(f"{remote.url}/jobs/none/refresh?sequence=1", content=b"").status_code == 404
        assert httpx.delete(f"{remote.url}/jobs/none").status_code == 204

    def test_two_clients_at_once_are_served_in_turn(self, client, remote):
        results = []
        threads = [threading.Thread(target=lambda: results.append(client.infer(connect(remote.url), SENTENCES))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [result.agreement for result in results] == [1.0, 1.0]

    def test_info_identifies_what_is_served(self, client, remote):
        info = remote.describe()
        assert (info["model_fingerprint"], info["key_id"]) == (client.model_fingerprint, client.keys.key_id)

    def test_nobody_there(self):
        with pytest.raises(HEError, match="start it with `hf-he serve`"):
            connect("http://127.0.0.1:9")

    def test_a_log_in_is_sent_and_not_shown(self):
        """What a proxy in front of the server asks for; errors and logs show the address without it."""
        seen = []

        class Proxy(BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append(self.headers["Authorization"])
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_):
                pass

        with HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
            threading.Thread(target=proxy.handle_request).start()
            server = connect(f"http://alice:pass%2Fword@127.0.0.1:{proxy.server_port}/")
        assert seen == ["Basic " + b64encode(b"alice:pass/word").decode()]
        assert server.url == f"http://127.0.0.1:{proxy.server_port}"
        with pytest.raises(HEError) as caught:
            server.describe()
        text = "".join(traceback.format_exception(caught.value))
        assert "pass/word" not in text and "pass%2F" not in text and "alice" not in text

    def test_an_address_that_is_none(self):
        with pytest.raises(HEError, match="looks like"):
            connect("http://host:port")

    def test_errors_keep_their_class_and_internal_ones_keep_their_text_to_themselves(self):
        for name in ("CorruptFileError", "WrongKeyError", "MissingKeyError", "RangeError", "HEError"):
            error = error_from_json(error_to_json(getattr(errors, name)("what to do")))
            assert type(error).__name__ == name and str(error) == "what to do"
        assert "secret detail" not in str(error_from_json(error_to_json(ValueError("secret detail"))))
        for foreign in (None, [], {"error": 1, "message": "x"}, {"error": "os", "message": "x"}, {"error": "SystemExit", "message": "x"}):
            assert type(error_from_json(foreign)) is HEError

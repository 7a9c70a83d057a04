"""What crosses the wire under seeded mutations: messages, the server object, its HTTP endpoints, the client's refresher, a hostile server."""

import json
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest
from mutation import NUMBERS, STRINGS, Outcomes, damaged, generator, json_value, sealed
from starlette.testclient import TestClient
from tiny_model import SENTENCES

from hf_he import errors
from hf_he.errors import HEError
from hf_he.protocol import EncryptedResult, error_from_json, error_to_json
from hf_he.remote import RemoteServer
from hf_he.results import merge_reports
from hf_he.scripts.files import Notes
from hf_he.service import create_app


@pytest.fixture(scope="module")
def batch(client):
    return client.encrypt(client.prepare(SENTENCES[:1]))


@pytest.fixture(scope="module")
def result(client, server, batch):
    return client.run(server, batch)


def mutated(data, kind, rng):
    return damaged(data, rng) if rng.random() < 0.4 else sealed(data, kind, rng)


def inner_mutated(message, field, rng):
    """A right message around a mutated ciphertext."""
    how, inner = mutated(getattr(message, field), "ciphertext", rng)
    return f"{field}: {how}", replace(message, **{field: inner}).to_bytes()


def test_batches_and_results(batch, result):
    rng, outcomes = generator("messages"), Outcomes()
    for message, kind in ((batch, "encrypted_batch"), (result, "encrypted_result")):
        data = message.to_bytes()
        for _ in range(800):
            how, bad = mutated(data, kind, rng)
            with outcomes.expect(f"{kind} {how}"):
                again = type(message).from_bytes(bad)
                assert 1 <= again.batches <= 256 and len(again.batch_id) == 16 and again.to_bytes()
    assert outcomes["CorruptFileError"] > outcomes["inputs"] / 2


def test_reports_of_a_server(result):
    """A report that is read can be merged and shown; one with other types is refused when it is read."""
    rng, outcomes = generator("reports"), Outcomes()
    for _ in range(600):
        report = json_value(result.report, rng)
        with outcomes.expect(f"report {str(report)[:300]}"):
            found = EncryptedResult.from_bytes(replace(result, report=report).to_bytes()).report
            merge_reports([found, result.report, found])
    assert outcomes["accepted"] and outcomes["CorruptFileError"]


def test_the_server_object(server, batch):
    rng, outcomes = generator("server"), Outcomes()
    data = batch.to_bytes()
    for _ in range(800):
        how, bad = mutated(data, "encrypted_batch", rng) if rng.random() < 0.5 else inner_mutated(batch, rng.choice(("embeddings", "attention_mask")), rng)
        with outcomes.expect(f"batch {how}"):
            work = server.open(bad)
            assert work.embeddings.key_id == work.attention_mask.key_id == server.identity.key_id
    assert outcomes["accepted"] < outcomes["inputs"] / 2


def test_results_are_checked_before_they_are_decrypted(client, result):
    rng, outcomes = generator("decrypt"), Outcomes()
    sentences = client.prepare(SENTENCES[:1])
    for _ in range(500):
        how, bad = inner_mutated(result, "logits", rng) if rng.random() < 0.7 else mutated(result.to_bytes(), "encrypted_result", rng)
        with outcomes.expect(f"result {how}"):
            decrypted = client.decrypt(EncryptedResult.from_bytes(bad), sentences)
            assert np.isfinite(decrypted[0].logits).all()


def test_refresh_requests(client):
    rng, outcomes = generator("refresh"), Outcomes()
    backend = client.backend
    ciphertext = backend.encrypt(np.zeros((2, backend.parameters.slots)), client.keys.secret, level=1)
    data, refresh = backend.serialize(ciphertext), client.refresher(16)
    for _ in range(600):
        how, bad = mutated(data, "ciphertext", rng)
        with outcomes.expect(f"refresh {how}"):
            fresh = backend.deserialize(refresh(bad), "ciphertext")
            assert fresh.level == backend.parameters.max_level and fresh.key_id == client.keys.key_id
    assert outcomes["accepted"] and outcomes["CorruptFileError"]


def test_http_endpoints(server, batch, result):
    """Every answer to hostile requests is JSON naming an hf_he error; the server then still answers an honest one."""
    rng, outcomes = generator("http"), Outcomes()
    data = batch.to_bytes()
    queries = ("wait=nan", "wait=inf", "wait=-1e400", "wait=abc", "wait=", "wait=-1", "sequence=nan", "sequence=" + "9" * 5000, "sequence=-1", "sequence=x", "")
    paths = ("/jobs/x/next", "/jobs/%00/refresh", "/jobs/../info", "/nothing", "/jobs", "/info", "/jobs/" + "a" * 5000, "/jobs/%F0%9F%98%80/next", "/docs")
    with TestClient(create_app(server), raise_server_exceptions=False) as http:
        for _ in range(700):
            if rng.random() < 0.5:
                method, url, (how, body) = "POST", "/jobs", mutated(data, "encrypted_batch", rng)
            else:
                method, url = rng.choice(("GET", "POST", "DELETE", "PUT", "PATCH")), f"{rng.choice(paths)}?{rng.choice(queries)}"
                how, body = url, rng.randbytes(rng.randrange(100))
            headers = {"Content-Length": rng.choice((b"x", b"-1", b"\xb2", b"1" * 5000))} if rng.random() < 0.1 and method == "POST" else {}
            outcomes["inputs"] += 1
            response = http.request(method, url, content=body, headers=headers)
            outcomes[response.status_code] += 1
            assert response.status_code < 500 or response.status_code == 503, f"{method} {how} {headers}: {response.status_code} {response.text[:300]}"
            if response.status_code == 202:
                http.delete(f"/jobs/{response.json()['id']}")
            elif response.is_error:
                assert isinstance(response.json()["message"], str) and response.json()["error"].endswith("Error"), f"{method} {how}: {response.text}"
        job = http.post("/jobs", content=data).json()["id"]
        for query in ("wait=nan", "wait=inf", "wait=1e400"):
            assert http.get(f"/jobs/{job}/next?{query}").status_code == 422
        assert http.get("/info").json()["server"] == "hf_he"
        for _ in range(100):
            if http.get(f"/jobs/{job}/next?wait=0.2").headers["X-HF-HE-Event"] == "refresh":
                break
        for body in (b"", b"x", result.to_bytes(), data):
            http.post(f"/jobs/{job}/refresh?sequence=99", content=body)
        http.post(f"/jobs/{job}/refresh?sequence=1", content=b"not a ciphertext")
        for _ in range(100):
            event = http.get(f"/jobs/{job}/next?wait=0.2")
            if event.headers["X-HF-HE-Event"] == "error":
                break
        assert event.json()["error"] == "RefreshError"
    assert set(outcomes) & {400, 404, 405, 422}


def test_a_hostile_server():
    """Whatever a server answers, the client raises an hf_he error, soon, and shows no control characters of the server's."""
    rng, outcomes = generator("hostile"), Outcomes()
    bodies = (b"", b"null", b"[]", b"7", b'"x"', b"[" * 100_000, b"\xff\xfe", b"\x1f\x8b" + bytes(9))
    bodies += (b'{"id": 7}', b'{"id": "../info"}', b'{"id": "\\u0663"}', b'{"id": "abc"}', b'{"batch": {}, "batches": 1}')
    bodies += (b'{"error": "WrongKeyError", "message": "\\u001b[2J\\ud800"}', b'{"error": {}, "message": []}')
    events = ("refresh", "result", "error", "progress", "progress", "", "\x7f")

    def answer(request: httpx.Request) -> httpx.Response:
        headers = {"X-HF-HE-Event": rng.choice(events), "X-HF-HE-Sequence": rng.choice(("1", "-1", "9" * 50, "x", "1&wait=5"))}
        if rng.random() < 0.1:
            headers["Content-Encoding"] = rng.choice(("gzip", "br", "nonsense"))
        body = b'{"id": "abc"}' if request.method == "POST" and rng.random() < 0.7 else rng.choice(bodies)
        return httpx.Response(rng.choice((200, 200, 200, 200, 202, 302, 404, 500, 503)), headers=headers, stream=httpx.ByteStream(body))

    def refuse(data: bytes) -> bytes:
        raise errors.CorruptFileError("not a ciphertext")

    remote = RemoteServer("http://server.invalid", max_answer_bytes=50_000)
    remote._http = httpx.Client(base_url=remote.url, transport=httpx.MockTransport(answer))
    start = time.monotonic()
    for _ in range(1500):
        with outcomes.expect("hostile answer"):
            assert isinstance(remote.infer(b"batch", refuse, lambda event: json.dumps(event)), bytes)
        with outcomes.expect("hostile description"):
            assert isinstance(remote.describe(), dict)
    assert outcomes["accepted"], outcomes
    assert time.monotonic() - start < 60


def test_endless_answers_are_cut_off():
    def endless():
        while True:
            yield bytes(10_000)

    remote = RemoteServer("http://server.invalid", max_answer_bytes=10**6)
    remote._http = httpx.Client(base_url=remote.url, transport=httpx.MockTransport(lambda request: httpx.Response(200, content=endless())))
    with pytest.raises(errors.CorruptFileError, match="larger than 1000000 bytes"):
        remote.describe()


def test_errors_by_name():
    rng, outcomes = generator("errors"), Outcomes()
    values = [*NUMBERS, *(text for text in STRINGS if len(text) < 1000), "\x1b[31m", "HEError", "MissingKeyError", "__doc__", "annotations", ["x"], {"x": 1}]
    for _ in range(1000):
        error = error_from_json(rng.choice((rng.choice(values), {"error": rng.choice(values), "message": rng.choice(values)})))
        outcomes["inputs"] += 1
        assert isinstance(error, HEError) and str(error).replace("\n", "").isprintable()
        assert json.dumps(error_to_json(error), ensure_ascii=False).encode()


def test_notes_of_a_batch(client, batch, tmp_path):
    rng, outcomes = generator("notes"), Outcomes()
    Notes(client.prepare(SENTENCES[:1]), {"encrypt": 1.0}, {"ciphertext_in": 1}).save(tmp_path, batch.batch_id)
    path = tmp_path / "batches" / f"{batch.batch_id}.json"
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    data = json.loads(path.read_bytes())
    for _ in range(400):
        path.write_text(json.dumps(json_value(data, rng)) if rng.random() < 0.9 else rng.choice(STRINGS).encode("utf-8", "replace").decode())
        with outcomes.expect("notes"):
            for sentence in Notes.load(tmp_path, batch.batch_id).sentences:
                assert isinstance(sentence.text, str)
                sentence.to_json()
    assert outcomes["accepted"] and outcomes["CorruptFileError"]

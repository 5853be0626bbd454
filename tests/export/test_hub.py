"""Pushing to a small Hub on the loopback device."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from fastdiff.export.hub import push_to_hub

CARD = "---\nlicense: apache-2.0\nlibrary_name: diffusers\n---\n\n# Student\n"


class FakeHub(BaseHTTPRequestHandler):
    """whoami, repos/create, validate-yaml, preupload (everything regular) and commit."""

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []})
        return self.answer({"error": self.path}, 404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append((self.path, self.headers.get("Authorization"), body))
        if self.path == "/api/repos/create":
            return self.answer(
                {"url": f"{self.server.url}/me/{json.loads(body)['name']}", "id": "me/fast", "name": "fast"}
            )
        if self.path == "/api/validate-yaml":
            bad = "license: nonsense" in json.loads(body)["content"]
            errors = [{"message": "license is not in the list"}] if bad else []
            return self.answer({"errors": errors, "warnings": []}, 400 if bad else 200)
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.answer({"files": modes})
        if "/commit/" in self.path:
            url = f"{self.server.url}/me/fast/commit/0123"
            return self.answer({"commitUrl": url, "commitOid": "0123", "success": True})
        return self.answer({"error": self.path}, 404)

    def answer(self, content, status=200):
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.url, server.calls = f"http://127.0.0.1:{server.server_port}", []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "fastdiff.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights.safetensors").write_bytes(b"weights")
    for unwanted in ("checkpoints/step-1", "logs", "checkpoint-5"):
        (tmp_path / unwanted).mkdir(parents=True)
        (tmp_path / unwanted / "junk").write_text("junk")
    return tmp_path


def commits(hub):
    return [
        [json.loads(line) for line in body.decode().splitlines()] for path, _, body in hub.calls if "/commit/" in path
    ]


def test_push_uploads_the_student_in_one_commit(hub, folder):
    url = push_to_hub(folder, "me/fast", token="hf_secret", private=True, endpoint=hub.url)
    assert url.endswith("/me/fast/commit/0123")
    created = next(json.loads(body) for path, _, body in hub.calls if path == "/api/repos/create")
    assert created["name"] == "fast"
    assert created.get("private") is True or created.get("visibility") == "private"
    (commit,) = commits(hub)
    assert commit[0]["value"]["summary"] == "End of training"
    files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in commit[1:]}
    assert set(files) == {"README.md", "fastdiff.json", "unet/weights.safetensors"}
    assert files["unet/weights.safetensors"] == b"weights"
    assert {token for path, token, _ in hub.calls if "/api/models" in path} == {"Bearer hf_secret"}


@pytest.mark.parametrize("card", ["# no metadata\n", "---\nlibrary_name: diffusers\n---\n"])
def test_unknown_licence_is_not_pushed(hub, folder, card):
    (folder / "README.md").write_text(card)
    with pytest.raises(ValueError, match="licence"):
        push_to_hub(folder, "me/fast", token="hf_secret", endpoint=hub.url)
    assert hub.calls == []


def test_invalid_metadata_is_not_pushed(hub, folder):
    (folder / "README.md").write_text(CARD.replace("apache-2.0", "nonsense"))
    with pytest.raises(ValueError, match="not in the list"):
        push_to_hub(folder, "me/fast", token="hf_secret", endpoint=hub.url)
    assert commits(hub) == []


def test_missing_card_is_refused(hub, folder):
    (folder / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match="model card"):
        push_to_hub(folder, "me/fast", token="hf_secret", endpoint=hub.url)
    assert hub.calls == []

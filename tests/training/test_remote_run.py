"""Training on shards at an address whose server is slow, drops connections and cuts answers short, over loopback."""

import http.server
import json
import threading
import time
from functools import partial

from wantrain.data import remote


class Faulty(http.server.SimpleHTTPRequestHandler):
    """Each tar comes after a delay; the first answer for it is none, the second too short."""

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        if name.endswith(".tar"):
            self.server.asked[name] = asked = self.server.asked.get(name, 0) + 1
            if asked == 1:
                self.close_connection = True
                return
            if asked == 2:
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                self.wfile.write(b"x" * 1000)
                self.close_connection = True
                return
            time.sleep(self.server.delay)
        super().do_GET()

    def log_message(self, *_):
        pass


def rows(folder):
    lines = (folder / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def test_faulty_server(tiny, call, tmp_path, monkeypatch):
    """The samples and losses are those of shards on the disk; the wait is logged, and said."""
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    how = [*tiny.train, "init=scratch", "batch_size=2", "steps=10", "run=r"]
    (tmp_path / "disk").mkdir()
    call("train.py", *how, f"runs={tmp_path / 'disk' / 'runs'}")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Faulty, directory=tiny.latents)) as server:
        server.asked, server.delay = {}, 0.3
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        said = call(
            "train.py", *how, f"data.shards={url}", f"data.cache={tmp_path / 'cache'}", "validation.every=0"
        ).stdout
        server.shutdown()
    assert set(server.asked.values()) == {3}
    here, there = rows(tmp_path / "disk"), rows(tmp_path)
    assert [(row["loss"], row["clips"]) for row in here] == [(row["loss"], row["clips"]) for row in there]
    assert not any("data/wait" in row for row in here)
    (waits,) = [row for row in there if "data/wait" in row]
    fetched = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar"))
    assert 0 < waits["data/wait"] <= sum(row["time/data"] for row in there) + 0.1
    assert 0 < waits["data/mb_per_second"] < waits["data/mb_per_second_needed"]
    assert waits["data/mb_per_second"] <= fetched / 1e6 / waits["data/wait"]
    assert f"of the last 10 steps for {url}: " in said and "MB/s are needed" in said
